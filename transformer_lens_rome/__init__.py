"""Locate, change and measure facts in the TransformerLens model that you already have."""

import transformer_lens_rome.methods  # noqa: F401  (registers the methods)
import transformer_lens_rome.viz  # noqa: F401  (registers the views in `showing`)
from transformer_lens_rome.edit_report import show_edit
from transformer_lens_rome.edits.export_hf import export_hf
from transformer_lens_rome.edits.export_lora import export_lora
from transformer_lens_rome.edits.kinds import DenseEdit, EditRequest, RankOneEdit, load_edit
from transformer_lens_rome.edits.ledger import AppliedEdit, applied, apply_edit, revert_all
from transformer_lens_rome.evaluation import CounterFact, evaluate_counterfact
from transformer_lens_rome.methods.base import get_method
from transformer_lens_rome.methods.mass_config import MemitConfig
from transformer_lens_rome.methods.memit import compute_memit_edit, memit_edit
from transformer_lens_rome.methods.rome import (
    RomeConfig,
    compute_rome_edit,
    compute_rome_edits,
    rome_edit,
)
from transformer_lens_rome.prompts.sampling import sampled_texts
from transformer_lens_rome.prompts.scores import target_log_probs, top_tokens
from transformer_lens_rome.statistics.collect import collect_second_moment
from transformer_lens_rome.statistics.second_moment import SecondMoment
from transformer_lens_rome.sweep import sweep_layers
from transformer_lens_rome.tracing.averages import average_traces
from transformer_lens_rome.tracing.causal_trace import causal_trace, severed_trace

__all__ = [
    "AppliedEdit",
    "CounterFact",
    "DenseEdit",
    "EditRequest",
    "MemitConfig",
    "RankOneEdit",
    "RomeConfig",
    "SecondMoment",
    "applied",
    "apply_edit",
    "average_traces",
    "causal_trace",
    "collect_second_moment",
    "compute_memit_edit",
    "compute_rome_edit",
    "compute_rome_edits",
    "evaluate_counterfact",
    "export_hf",
    "export_lora",
    "get_method",
    "load_edit",
    "memit_edit",
    "revert_all",
    "rome_edit",
    "sampled_texts",
    "severed_trace",
    "show_edit",
    "sweep_layers",
    "target_log_probs",
    "top_tokens",
]


def __getattr__(name: str) -> str:
    """Return `__version__` from the metadata of the installed package."""
    if name == "__version__":
        from importlib.metadata import version

        return version("transformer-lens-rome")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
