"""A trace estimated from gradients, with cells that were run exactly, as a check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens_rome.torch_states import torch_defaults
from transformer_lens_rome.tracing.corrupted_run import CorruptedRun
from transformer_lens_rome.tracing.results import CausalTrace
from transformer_lens_rome.tracing.runs import restore_some

TRUSTED = 0.9
"""The rank correlation with exact cells from which an estimate counts as a causal effect."""


class Agreement(NamedTuple):
    """How well an estimate agrees with the cells that were run exactly.

    Attributes:
        spearman: The rank correlation of estimated and exact scores; NaN for fewer than 3 cells.
        largest_miss: The largest difference of a score, in units of the metric.
        n: The number of cells.
    """

    spearman: float
    largest_miss: float
    n: int


@dataclass(frozen=True, eq=False)
class EstimatedTrace(CausalTrace):
    """A trace from `causal_trace(..., method="gradient")`; `samples` are estimates.

    Attributes:
        checked: The layer and position of each cell that was run exactly: those with the largest
            estimates, then cells drawn at random from the others.
        n_top: The number of the former.
        exact: The metric in each sample and checked cell, as in an exact trace.
    """

    checked: Int[Tensor, "cell 2"]
    n_top: int
    exact: Float[Tensor, "sample cell"]

    FORMAT: ClassVar[str] = "transformer_lens_rome.estimated_trace.1"

    def __post_init__(self) -> None:
        super().__post_init__()
        n, layers, positions = self.samples.shape
        inside = ((self.checked >= 0) & (self.checked < torch.tensor([layers, positions]))).all()
        if self.exact.shape != (n, len(self.checked)) or not inside:
            raise ValueError(f"the checked cells do not fit: {tuple(self.exact.shape)}")
        if not 0 <= self.n_top <= len(self.checked):
            raise ValueError(f"{self.n_top} of {len(self.checked)} checked cells are the largest")

    @property
    @torch_defaults()
    def agreement(self) -> Agreement:
        """The agreement of the estimate with all cells that were run exactly."""
        estimated = self.scores[self.checked[:, 0], self.checked[:, 1]]
        exact, n = self.exact.mean(0), len(self.checked)
        miss = (estimated - exact).abs().max().item() if n else float("nan")
        return Agreement(rank_correlation(estimated, exact), miss, n)

    @property
    def is_causal(self) -> bool:
        """Whether the estimate may stand for causal effects: its rank correlation is 0.9 or more.

        Below, it only says where to look, and `exact` has the effects of the cells that were run.
        """
        return self.agreement.spearman >= TRUSTED

    @property
    def top_exact(self) -> list[tuple[int, int, float]]:
        """The layer, position and exact score of the checked cells, the largest score first."""
        scores = self.exact.mean(0)
        order = scores.argsort(descending=True).tolist()
        cells = self.checked.tolist()
        return [(cells[i][0], cells[i][1], scores[i].item()) for i in order]

    def __str__(self) -> str:
        spearman, miss, n = self.agreement
        if not n:
            return f"gradient estimates of {self.kind}: a screen; no cell was run exactly"
        what = "causal effects" if self.is_causal else "a screen, not causal effects"
        return (
            f"gradient estimates of {self.kind}: {what} (Spearman {spearman:.2f} with {n} cells "
            f"that were run exactly, largest miss {miss:.2g})"
        )


def rank_correlation(one: Float[Tensor, "n"], other: Float[Tensor, "n"]) -> float:
    """Return Spearman's rank correlation, with mean ranks for ties; NaN for fewer than 3 values."""
    if len(one) < 3:
        return float("nan")
    ranks = torch.stack([_ranks(one), _ranks(other)])
    return torch.corrcoef(ranks)[0, 1].item()


def _ranks(values: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    """Return the rank of each value; equal values share the mean of their ranks."""
    below = (values[None] < values[:, None]).sum(1)
    equal = (values[None] == values[:, None]).sum(1)
    return below.double() + (equal - 1).double() / 2


def check_cells(
    corrupted: CorruptedRun,
    kind: str,
    window: int,
    estimate: Float[Tensor, "sample layer pos"],
    verify: int,
    batch_size: int,
    seed: int,
) -> dict[str, Any]:
    """Run the cells with the largest estimates exactly, and as many others at random.

    Cells before the subject are not drawn: restoring them changes nothing.

    Returns:
        The last three fields of an `EstimatedTrace`.
    """
    first = corrupted.clean.subject[0]
    scores = estimate.mean(0)[:, first:]
    order = scores.flatten().argsort(descending=True)
    n_top = min(verify, len(order))
    generator = torch.Generator().manual_seed(seed)
    others = order[n_top:][torch.randperm(len(order) - n_top, generator=generator)][:verify]
    chosen = torch.cat([order[:n_top], others])
    width = scores.shape[1]
    cells = torch.stack([chosen // width, chosen % width + first], 1)
    exact = restore_some(corrupted, kind, window, cells.tolist(), batch_size)
    return {"checked": cells, "n_top": n_top, "exact": exact}
