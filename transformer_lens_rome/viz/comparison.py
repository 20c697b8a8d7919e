"""The view of runs of an evaluation: methods by metrics, and paired differences between methods."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens_rome.evaluation.results import Results, cells, common_cases, legend
from transformer_lens_rome.files.intervals import half_width
from transformer_lens_rome.showing import view
from transformer_lens_rome.viz.findings import finding
from transformer_lens_rome.viz.heat import Panel, heat_map
from transformer_lens_rome.viz.page import View, stack, table
from transformer_lens_rome.viz.words import readable

_COLOURS = ((5, 48, 97), (127, 59, 8))
_NOT_PERCENT = ("NKL", "NKL+", "GE", "RS")
"""Metrics in other units, which are in the table and have no colour."""


@view.register
def _(results: Results, *others: Results, interactive: bool = True) -> View:
    """Show scores of the unedited model and the methods, and how methods differ on each record."""
    runs = (results, *others)
    head, rows = cells(runs)
    shown, note = table([tuple(row) for row in rows], head), legend(runs, head)
    panels = _panels(runs, differences=interactive)
    return stack(*([heat_map(*panels, interactive=interactive)] if panels else []), shown, note)


def _panels(runs: Sequence[Results], differences: bool) -> list[Panel]:
    """Return the scores on the records that no run failed on, and the differences to each row."""
    edited = [run for run in runs if run.after]
    metrics = [runs[0].metrics(edited=False), *(run.metrics() for run in edited)]
    rows = ["unedited", *(readable(run.name) for run in edited)]
    cases = sorted(common_cases(runs).intersection(*metrics))
    every, of = [one[case] for one in metrics for case in cases], runs[0].benchmark
    names = [
        name
        for name in of.columns
        if every
        and name not in (*_NOT_PERCENT, *of.plain)
        and all(name in scores for scores in every)
    ]
    if not names:
        return []
    records = torch.tensor(
        [[[100 * one[case][name] for name in names] for case in cases] for one in metrics]
    )
    panels = [_panel(records, rows, names, "none", finding(*runs))]
    for i, row in enumerate(rows if differences else []):
        said = f"Each method less {row}, record by record, in points of percent."
        panels.append(_panel(records - records[i], rows, names, row, said))
    return panels


def _panel(
    records: Float[Tensor, "method record metric"],
    rows: Sequence[str],
    names: Sequence[str],
    subtracted: str,
    caption: str,
) -> Panel:
    """Return the means over records, with their intervals."""
    n = records.shape[1]
    unknown = torch.full_like(records[:, 0], torch.nan)
    scores = subtracted == "none"
    return Panel(
        effects=records.mean(1),
        half_width=half_width(records.std(1), n) if n > 1 else unknown,
        rows=rows,
        columns=names,
        cells=names,
        unit="percent" if scores else f"points more than {subtracted}",
        colours=_COLOURS,
        caption=caption,
        choice={"subtracted": subtracted},
        metric="scores" if scores else "differences",
        joins="of",
        title=f"Means over {n} records with 95% intervals, by method and metric",
        wide=True,
    )
