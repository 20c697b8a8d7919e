"""Figures of raters' preferences: bars with intervals, one panel per question."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from transformer_lens_rome.rate.analysis import Preferences
from transformer_lens_rome.rate.key import SAME
from transformer_lens_rome.showing import figure as figure_of
from transformer_lens_rome.showing import view
from transformer_lens_rome.viz.figures import new_figure, plain
from transformer_lens_rome.viz.page import View, stack, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_preferences(preferences: Preferences) -> Figure:
    """Plot the share of answers that prefer each method; the title says if raters are simulated."""
    figure = new_figure(3.0 * len(preferences.shares), 3.0)
    panels = figure.subplots(1, len(preferences.shares), sharey=True, squeeze=False)[0]
    for ax, (question, shares) in zip(panels, preferences.shares.items(), strict=True):
        for place, (name, share) in enumerate(shares.items()):
            around = [[share.mean - share.low], [share.high - share.mean]]
            ax.bar(
                place,
                share.mean,
                yerr=None if math.isnan(share.low) else around,
                color="#999999" if name == SAME else f"C{place}",
                error_kw={"linewidth": 0.8},
            )
        alpha = preferences.agreement[question]
        agreement = "" if math.isnan(alpha) else f" (alpha {alpha:.2f})"
        ax.set_title(f"{question}{agreement}", fontsize=10)
        names = [plain(name) for name in shares]
        ax.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=8)
    panels[0].set_ylim(0, 105)
    panels[0].set_ylabel("preferred, percent", fontsize=9)
    figure.suptitle(f"{preferences.who}, {preferences.n_items} items", fontsize=10)
    return figure


@figure_of.register
def _(preferences: Preferences) -> Any:
    return plot_preferences(preferences)


@view.register
def _(preferences: Preferences, *, interactive: bool = True) -> View:
    """Show the table and its legend."""
    head, rows = preferences.cells()
    return stack(table(map(tuple, rows), head), preferences.legend)
