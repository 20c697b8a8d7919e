"""Heat maps of effects: tables of numbers with coloured cells, which readers can explore.

A cell's colour says how far its effect is from 0, on one scale for both signs. A cell whose 95%
interval contains 0 is white with hatching. The table is what a screen reader reads and what stays
without JavaScript. `assets/map.js` lets readers choose the panel, the measure and the scale.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from transformer_lens_rome.viz.page import View

CELLS = 16_000
"""The most cells of one map; of a longer text, the tokens with the largest effects are shown."""
NUMBERS = 60_000
"""The most noise samples, over all cells of a map, that a page holds."""
CHARACTERS = 100_000
"""The most characters, over all cells of a panel, of what the runs say that a page holds."""
ROUNDING = 1e-5
"""The share of the largest effect up to which an effect may be rounding, as in `assets/map.js`."""
SEEN = 0.01
"""The share of the bound from which on an effect below 0 is seen, so that the legend shows it."""


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
        clean: The quantity without noise; None if samples are not known.
        metric: What panels with one scale have in common.
        logarithm: Whether readers may take the samples' logarithms, as those of probabilities.
        axes: What the rows and the columns are.
        joins: What joins a column's `cells` and a row's name in a sentence.
        title: The table's title; "": the change of the unit by the axes.
        tokens: Whether the rows are the tokens of a text.
        wide: Whether cells show their numbers.
        kept: Rows that are shown in any case if there are too many.
        tops: Returns what the runs of each cell of a row say; None if it is not known.
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
    clean: float | None = None
    metric: str = ""
    logarithm: bool = False
    axes: str = "token and layer"
    joins: str = "at"
    title: str = ""
    tokens: bool = False
    wide: bool = False
    kept: Sequence[int] = ()
    tops: Callable[[int], Sequence[str]] | None = None

    @property
    def bound(self) -> float:
        """The largest size of an effect; 1 if every effect is 0."""
        return self.effects.nan_to_num(0.0).abs().max().item() or 1.0


def holds_zero(
    effects: Float[Tensor, "row column"], half_width: Float[Tensor, "row column"]
) -> Bool[Tensor, "row column"]:
    """Return which intervals contain 0, up to rounding; an unknown interval does not."""
    rounding = ROUNDING * effects.nan_to_num(0.0).abs().max()
    return effects.abs() <= half_width.clamp(min=rounding)


def heat_map(*panels: Panel, interactive: bool = True) -> View:
    """Show panels, next to each other or, if readers can choose, one at a time.

    Panels of one metric have one scale, so that equal colours are equal effects.
    """
    tables, data = "", []
    numbers = sum(panel.effects.numel() for panel in panels)
    numbers *= max(0 if panel.samples is None else len(panel.samples) for panel in panels)
    for panel in panels:
        rows = _shown_rows(panel, CELLS // len(panels))
        bound = max(one.bound for one in panels if one.metric == panel.metric)
        tables += _table(panel, rows, bound)
        data.append(_data(panel, rows, with_samples=numbers <= NUMBERS))
    if not interactive:
        return View(f'<div class="tlr-map">{tables}</div>')
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    script = f'<script type="application/json" class="tlr-data">{text}</script>'
    return View(f'<div class="tlr-map">{tables}{script}</div>', frozenset({"map"}))


def _shown_rows(panel: Panel, cells: int) -> list[int]:
    """Return the rows that a table of so many cells shows: all, or those with large effects."""
    n, columns = panel.effects.shape
    most = max(cells // columns, 1)
    if n <= most:
        return list(range(n))
    largest = panel.effects.nan_to_num(0.0).abs().amax(1)
    largest[list(panel.kept)] = torch.inf
    return sorted(largest.topk(most).indices.tolist())


def _data(panel: Panel, rows: Sequence[int], *, with_samples: bool) -> dict[str, Any]:
    """Return what a program needs of a panel; a number that is none is null."""
    known: dict[str, Any] = {
        "choice": dict(panel.choice),
        "columns": [text[:1].upper() + text[1:] for text in panel.cells],
        "base": _number(panel.base),
        "whole": _number(panel.whole),
        "effects": _numbers(panel.effects[rows]),
        "half": _numbers(panel.half_width[rows]),
    }
    for name in ("unit", "metric", "logarithm", "joins", "tokens", "wide"):
        known[name] = getattr(panel, name)
    finite = panel.samples is not None and panel.samples.isfinite().all()
    if panel.samples is not None and finite and with_samples:
        known["samples"] = [_numbers(sample[rows]) for sample in panel.samples]
        known["bases"] = [_number(base) for base in panel.bases]
        known["clean"] = _number(panel.clean)
        texts = [text for i in rows for text in panel.tops(i)] if panel.tops else []
        numbers = {
            text: n for n, text in enumerate(dict.fromkeys(texts))
        }  # many cells say the same
        if sum(map(len, numbers)) <= CHARACTERS:
            known["says"], known["tops"] = list(numbers), [numbers[text] for text in texts]
    return known


def _numbers(values: Float[Tensor, "row column"]) -> list[float | None]:
    return [_number(x) for x in values.flatten().tolist()]


def _number(x: float | None) -> float | None:
    """Return a number with six digits."""
    return None if x is None or not math.isfinite(x) else float(f"{x:.6g}")


# ---------------------------------------------------------------- the table


def _table(panel: Panel, rows: Sequence[int], bound: float) -> str:
    """Return a panel as a table, with a legend of its colours."""
    white = holds_zero(panel.effects, panel.half_width)
    lines = [_line(panel, i, white[i].tolist(), bound) for i in rows]
    head = "".join(f'<th scope="col"><span>{html.escape(name)}</span>' for name in panel.columns)
    left_out = len(panel.rows) - len(rows)
    note = f" The {len(rows)} rows with the largest effects of {len(panel.rows)} rows."
    high, low = (f"{r},{g},{b}" for r, g, b in panel.colours)
    signs = " tlr-signs" if (panel.effects < -SEEN * bound)[~white].any() else ""
    wide = " tlr-wide" if panel.wide else ""
    title = panel.title or f"Change of {panel.unit}, by {panel.axes}"
    return (
        f'<div class="tlr-panel{signs}{wide}" style="--day-high:rgb({high});--day-low:rgb({low})">'
        f'<p class="tlr-finding">{html.escape(panel.caption)}{note if left_out else ""}</p>'
        f'<div class="tlr-scroll"><table><caption>{html.escape(title)}</caption>'
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
        f"{_legend(bound)}</div>"
    )


def _line(panel: Panel, i: int, white: Sequence[bool], bound: float) -> str:
    """Return one row of a table."""
    effects, half = panel.effects[i].tolist(), panel.half_width[i].tolist()
    texts = [_text(x, error, panel.wide) for x, error in zip(effects, half, strict=True)]
    cells = map(_cell, effects, texts, white, [bound] * len(effects))
    return f'<tr><th scope="row" dir="auto">{html.escape(panel.rows[i])}</th>{"".join(cells)}'


def _text(effect: float, half_width: float, wide: bool) -> str:
    """Return a cell's number; with its interval if the cell is wide enough to show it."""
    if not wide:
        return f"{effect:.3g}"
    return f"{effect:.1f}" + ("" if math.isnan(half_width) else f" ± {half_width:.1f}")


def _cell(effect: float, text: str, hatched: bool, bound: float) -> str:
    """Return one cell: its number as text, and its colour as a share of the bound in percent."""
    if math.isnan(effect):
        return '<td class="tlr-none">'
    if hatched:
        return f'<td class="tlr-zero">{text}'
    sign = ' class="tlr-low"' if effect < 0 else ""
    return f'<td{sign} style="--s:{min(abs(effect) / bound, 1.0) * 100:.0f}%">{text}'


def _legend(bound: float) -> str:
    """Return the scale: from the bound below 0, if there are negative effects, to the bound."""
    return (
        f'<p class="tlr-legend"><span class="tlr-below"><b>{-bound:.3g}</b> <i></i> </span>0 '
        f'<span class="tlr-above"><i></i> <b>{bound:.3g}</b></span> '
        f'<span class="tlr-hatched"></span> interval contains 0</p>'
    )
