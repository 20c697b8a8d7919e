"""Locate, change and measure facts in the TransformerLens model that you already have."""

from transformer_lens_rome.collection import collect_second_moment
from transformer_lens_rome.edits import DenseEdit, EditHealth, EditRequest, RankOneEdit, load_edit
from transformer_lens_rome.export import export_hf
from transformer_lens_rome.ledger import AppliedEdit, active_edits, applied, apply_edit, revert_all
from transformer_lens_rome.methods import EditMethod, get_method, register_method
from transformer_lens_rome.prompts import target_log_probs, top_tokens
from transformer_lens_rome.rome import RomeConfig, compute_rome_edit, rome_edit
from transformer_lens_rome.sampling import sample_prefixes, sampled_texts
from transformer_lens_rome.second_moment import SecondMoment
from transformer_lens_rome.sweep import sweep_layers

__all__ = [
    "AppliedEdit",
    "DenseEdit",
    "EditHealth",
    "EditMethod",
    "EditRequest",
    "RankOneEdit",
    "RomeConfig",
    "SecondMoment",
    "active_edits",
    "applied",
    "apply_edit",
    "collect_second_moment",
    "compute_rome_edit",
    "export_hf",
    "get_method",
    "load_edit",
    "register_method",
    "revert_all",
    "rome_edit",
    "sample_prefixes",
    "sampled_texts",
    "sweep_layers",
    "target_log_probs",
    "top_tokens",
]
