"""Bar plots of editing methods: the main metrics of a benchmark with their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from transformer_lens_rome.evaluation.results import Results
from transformer_lens_rome.showing import figure as figure_of
from transformer_lens_rome.viz.figures import new_figure, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_results(runs: Sequence[Results]) -> Figure:
    """Plot one panel per metric and one bar per method; the unedited model is also a line.

    Args:
        runs: Runs of one model and data set.
    """
    columns = [("unedited", runs[0].scores(edited=False))]
    columns += [(run.name, run.scores()) for run in runs if run.after]
    titles = runs[0].benchmark.panels
    figure = new_figure(2.2 * len(titles), 2.6)
    panels = figure.subplots(1, len(titles), sharey=True, squeeze=False)[0]
    for ax, (metric, title) in zip(panels, titles.items(), strict=True):
        for place, (name, scores) in enumerate(columns):
            if metric not in scores:
                continue
            mean, half, _ = scores[metric]
            error = None if math.isnan(half) else half
            colour = "#999999" if name == "unedited" else f"C{place - 1}"
            ax.bar(place, mean, yerr=error, color=colour, error_kw={"linewidth": 0.8})
        if metric in columns[0][1]:
            ax.axhline(columns[0][1][metric].mean, color="#999999", linewidth=0.8, linestyle=":")
        ax.set_title(f"{metric}: {title}", fontsize=10)
        names = [plain(name) for name, _ in columns]
        ax.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=8)
    panels[0].set_ylim(0, 105)
    panels[0].set_ylabel("percent", fontsize=9)
    return figure


@figure_of.register
def _(results: Results, *others: Results) -> Any:
    return plot_results([results, *others])
