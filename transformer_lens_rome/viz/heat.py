"""Heat maps of effects: tables of numbers with coloured cells, which a program can make explorable.

A cell's colour says how far its effect is from 0, on one scale for both signs. A cell whose 95%
interval contains 0 is white with hatching. The table is what a screen reader reads and what stays
without JavaScript. `assets/map.js` lets readers choose the panel, the measure and the scale.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens_rome.viz.page import View

CELLS = 16_000
"""The most cells of one table; of a longer text, the tokens with the largest effects are shown."""
SEEN = 0.01
"""The share of the bound from which on an effect below 0 is seen, so that the legend shows it."""
NUMBERS = 100_000
"""The most noise samples, over all cells of a map, that a page holds."""


@dataclass(frozen=True, eq=False)
class Panel:
    """One table of a map.

    Attributes:
        effects: The mean effect of each cell; NaN where nothing was measured.
        half_width: Half the 95% interval of each effect; NaN where it is not known.
        rows: The names of the rows.
        columns: The names of the columns, such as layers.
        cells: For each column, what a cell restores or measures, as a sentence's beginning.
        unit: The quantity of which the effects are differences, such as "P(Seattle)".
        colours: The colours of the highest and of the lowest effect, in RGB.
        caption: The sentences above the table: the finding, and what it is about.
        choice: The values that tell this panel from others of its map, such as {"kind": "MLP"}.
        base: The quantity's value with effect 0; None if effects are not measured from a value.
        whole: The effect that counts as all; None if there is none.
        samples: The quantity in each noise sample; None if it is not known.
        bases: The quantity in each noise sample with nothing restored.
        metric: "probability" if samples are probabilities, so that their logarithms make sense.
        axes: What the rows and the columns are.
        tokens: Whether the rows are the tokens of a text.
        kept: Rows that are shown in any case if there are too many.
    """

    effects: Float[Tensor, "row column"]
    half_width: Float[Tensor, "row column"]
    rows: Sequence[str]
    columns: Sequence[str]
    cells: Sequence[str]
    unit: str
    colours: tuple[tuple[int, int, int], tuple[int, int, int]]
    caption: str = ""
    choice: Mapping[str, str] = field(default_factory=dict)
    base: float | None = None
    whole: float | None = None
    samples: Float[Tensor, "sample row column"] | None = None
    bases: Sequence[float] = ()
    metric: str = ""
    axes: str = "token and layer"
    tokens: bool = False
    kept: Sequence[int] = ()

    @property
    def bound(self) -> float:
        """The largest size of an effect; 1 if every effect is 0."""
        return self.effects.nan_to_num(0.0).abs().max().item() or 1.0


def holds_zero(
    effects: Float[Tensor, "row column"], half_width: Float[Tensor, "row column"]
) -> Tensor:
    """Return which intervals contain 0; an unknown interval does not."""
    return effects.abs() <= half_width


def heat_map(*panels: Panel, bound: float | None = None) -> View:
    """Show panels next to each other.

    Args:
        panels: The panels.
        bound: The effect with the full colour; None: the largest of all panels, so that equal
            colours are equal effects.
    """
    bound = bound or max(panel.bound for panel in panels)
    shown = [_shown_rows(panel) for panel in panels]
    tables = "".join(_table(one, rows, bound) for one, rows in zip(panels, shown, strict=True))
    return View(f'<div class="tlr-map">{tables}</div>')


def _shown_rows(panel: Panel) -> list[int]:
    """Return the rows that a table shows: all, or those with the largest effects."""
    n, columns = panel.effects.shape
    most = max(CELLS // columns, 1)
    if n <= most:
        return list(range(n))
    largest = panel.effects.nan_to_num(0.0).abs().amax(1)
    largest[list(panel.kept)] = torch.inf
    return sorted(largest.topk(most).indices.tolist())


def _table(panel: Panel, rows: Sequence[int], bound: float) -> str:
    """Return a panel as a table, with a legend of its colours."""
    white = holds_zero(panel.effects, panel.half_width)
    lines = [
        f'<tr><th scope="row" dir="auto">{html.escape(panel.rows[i])}</th>'
        + "".join(
            _cell(effect, hatched, bound)
            for effect, hatched in zip(panel.effects[i].tolist(), white[i].tolist(), strict=True)
        )
        for i in rows
    ]
    head = "".join(f'<th scope="col"><span>{html.escape(name)}</span>' for name in panel.columns)
    left_out = len(panel.rows) - len(rows)
    note = f" The {len(rows)} rows with the largest effects of {len(panel.rows)} rows."
    high, low = (f"{r},{g},{b}" for r, g, b in panel.colours)
    signs = " tlr-signs" if (panel.effects < -SEEN * bound)[~white].any() else ""
    return (
        f'<div class="tlr-panel{signs}" style="--day-high:rgb({high});--day-low:rgb({low})">'
        f'<p class="tlr-finding">{html.escape(panel.caption)}{note if left_out else ""}</p>'
        f"<table><caption>{html.escape(f'Change of {panel.unit}, by {panel.axes}')}</caption>"
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
        f"{_legend(panel, bound)}</div>"
    )


def _cell(effect: float, hatched: bool, bound: float) -> str:
    """Return one cell: its number as text, and its colour as a share of the bound in percent."""
    if effect != effect:
        return '<td class="tlr-none">'
    text = f"{effect:.3g}"
    if hatched:
        return f'<td class="tlr-zero">{text}'
    sign = ' class="tlr-low"' if effect < 0 else ""
    return f'<td{sign} style="--s:{min(abs(effect) / bound, 1.0) * 100:.0f}%">{text}'


def _legend(panel: Panel, bound: float) -> str:
    """Return the scale: from the bound below 0 if there are negative effects, to the bound."""
    return (
        f'<p class="tlr-legend"><span class="tlr-below">{-bound:.3g} <i></i></span> 0 '
        f"<i></i> {bound:.3g} "
        f'<span class="tlr-hatched"></span> interval contains 0</p>'
    )
