"""Editing methods: ROME and the methods that the paper compares it with, registered by name.

A module registers its methods when it is imported, so each new one is imported here.
"""

from transformer_lens_rome.methods.base import (
    EditMethod,
    described,
    get_method,
    provenance,
    register_method,
)
from transformer_lens_rome.methods.fine_tuning import FineTuning
from transformer_lens_rome.methods.hypernetworks.knowledge_editor import KnowledgeEditor
from transformer_lens_rome.methods.hypernetworks.mend import Mend
from transformer_lens_rome.methods.hypernetworks.published_editors import convert_editor
from transformer_lens_rome.methods.hypernetworks.trained_editor import TrainedEditor
from transformer_lens_rome.methods.hypernetworks.training import Training
from transformer_lens_rome.methods.in_context import InContext
from transformer_lens_rome.methods.knowledge_neurons import KnowledgeNeurons
from transformer_lens_rome.methods.mass_config import MemitConfig
from transformer_lens_rome.methods.mass_history import History, extended_history
from transformer_lens_rome.methods.mass_targets import mean_value_norm
from transformer_lens_rome.methods.memit import Memit
from transformer_lens_rome.methods.rome import Rome
from transformer_lens_rome.methods.rome_config import RomeConfig

__all__ = [
    "EditMethod",
    "FineTuning",
    "History",
    "InContext",
    "KnowledgeEditor",
    "KnowledgeNeurons",
    "Memit",
    "MemitConfig",
    "Mend",
    "Rome",
    "RomeConfig",
    "TrainedEditor",
    "Training",
    "convert_editor",
    "described",
    "extended_history",
    "get_method",
    "mean_value_norm",
    "provenance",
    "register_method",
]
