"""Sequential editing: many facts, one after another, with a guard against model collapse."""

from transformer_lens_rome.sequential.guard import Guard
from transformer_lens_rome.sequential.sequence import EditSequence, edit_in_sequence
from transformer_lens_rome.sequential.steps import Step

__all__ = ["EditSequence", "Guard", "Step", "edit_in_sequence"]
