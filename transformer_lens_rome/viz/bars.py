"""Bar plots of editing methods: S, ES, PS and NS with their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from transformer_lens_rome.evaluation.results import Results
from transformer_lens_rome.showing import figure as figure_of
from transformer_lens_rome.viz.figures import new_figure, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TITLES = {"S": "score", "ES": "efficacy", "PS": "generalization", "NS": "specificity"}


def plot_results(runs: Sequence[Results]) -> Figure:
    """Plot one panel per metric and one bar per method; the unedited model is also a line.

    Args:
        runs: Runs of one model and data set. For zsRE the panels show shares of correct tokens.
    """
    columns = [("unedited", runs[0].scores(edited=False))]
    columns += [(run.name, run.scores()) for run in runs if run.after]
    zsre = runs[0].protocol == "zsre"
    figure = new_figure(2.2 * len(_TITLES), 2.6)
    panels = figure.subplots(1, len(_TITLES), sharey=True)
    for ax, (metric, title) in zip(panels, _TITLES.items(), strict=True):
        metric = metric.replace("S", "A") if zsre and len(metric) > 1 else metric
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
