"""The small real models and their tokenizers."""

from transformer_lens_rome.demo.gemma import ASK, NAME, REQUEST
from transformer_lens_rome.demo.load import load_demo_hf, load_demo_model

__all__ = ["ASK", "NAME", "REQUEST", "load_demo_hf", "load_demo_model"]
