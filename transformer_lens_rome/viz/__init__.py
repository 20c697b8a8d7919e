"""Views of results: static figures (matplotlib), interactive ones (circuitsvis), saved pages."""

import transformer_lens_rome.viz.cells  # noqa: F401  (registers the views in `showing`)
import transformer_lens_rome.viz.comparison  # noqa: F401
import transformer_lens_rome.viz.traces  # noqa: F401
from transformer_lens_rome.viz.bars import plot_results
from transformer_lens_rome.viz.edit_figure import plot_edit
from transformer_lens_rome.viz.figures import plot_averages, plot_lines, plot_severed, plot_trace
from transformer_lens_rome.viz.findings import finding
from transformer_lens_rome.viz.interactive import (
    attention_before_and_after,
    log_probs_before_and_after,
)
from transformer_lens_rome.viz.page import View, save_html, stack
from transformer_lens_rome.viz.preferences import plot_preferences

__all__ = [
    "View",
    "attention_before_and_after",
    "finding",
    "log_probs_before_and_after",
    "plot_averages",
    "plot_edit",
    "plot_lines",
    "plot_preferences",
    "plot_results",
    "plot_severed",
    "plot_trace",
    "save_html",
    "stack",
]
