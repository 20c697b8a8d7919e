"""Estimate a trace from gradients: every cell of several kinds from a few passes.

To first order, restoring the clean state of a site s changes a metric M of the corrupted run by

    M(s restored) - M(corrupted)  ~  < mean over a of dM/ds at e(a),  s(clean) - s(corrupted) >

with e(a) = e(corrupted) + a (e(clean) - e(corrupted)), the embeddings on the line between the two
runs: attribution patching with integrated gradients (Hanna et al. 2024, arXiv:2403.17806; Nanda
2023 takes a = 0 only). The gradients of all sites come from the same passes. A window's estimate is
the sum over its layers, which counts twice what one layer passes on to another.

M is the answer's log-probability or a difference of logits, because a probability near zero is
flat. An estimated probability is that of the estimated log-probability.

An estimate is no causal effect, and may be far from it. So cells are run exactly for comparison,
see `EstimatedTrace`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens_rome.model.adapter import Point
from transformer_lens_rome.model.changes import Change
from transformer_lens_rome.model.partial_forward import PartialForward
from transformer_lens_rome.tracing.kinds import KINDS
from transformer_lens_rome.tracing.patching import window_of
from transformer_lens_rome.tracing.runs import CorruptedRun

Site = tuple[str, int]
"""A kind of state, and its layer."""
Estimate = Float[Tensor, "sample layer pos"]


def estimate_each(
    corrupted: CorruptedRun, windows: dict[str, int], steps: int
) -> tuple[dict[str, Estimate], Float[Tensor, "sample"]]:
    """Return the estimated metric of each kind with each state restored, and with none restored.

    Args:
        corrupted: The corrupted run.
        windows: The kinds, with the number of layers restored at once.
        steps: The number of points on the line, each the middle of its part.

    Raises:
        ValueError: The gradients are zero everywhere, or not finite.
    """
    line, run = _Line(corrupted, tuple(windows)), corrupted.clean
    base, changes = line.ends()
    gains = {site: torch.zeros(change.shape[:-1]) for site, change in changes.items()}
    for step in range(steps):
        for site, gradient in line.gradients((step + 0.5) / steps, changes).items():
            gains[site] += (gradient * changes[site]).sum(-1).float().cpu() / steps
    every = torch.stack(list(gains.values()))
    if not torch.isfinite(every).all() or not every.any():
        raise ValueError(
            "the gradients of the answer's log-probability are zero everywhere or not finite; use "
            "method='exact'"
        )
    estimates = {}
    for kind, window in windows.items():
        single = torch.stack([gains[kind, i] for i in range(line.n_layers)], 1)
        inside = (list(window_of(i, window, line.n_layers)) for i in range(line.n_layers))
        gain = torch.stack([single[:, layers].sum(1) for layers in inside], 1)
        whole = torch.zeros(len(base), line.n_layers, run.n_prompt)
        whole[:, :, run.subject[0] :] = gain
        estimates[kind] = _metric(run.metric, base[:, None, None] + whole)
    return estimates, _metric(run.metric, base)


def _metric(name: str, value: Tensor) -> Tensor:
    """Return a score in its metric from a log-probability, which is at most 0, or a difference."""
    if name == "logit_diff":
        return value
    return value.clamp(max=0) if name == "log_probability" else value.clamp(max=0).exp()


class _Line:
    """Passes with embeddings on the line from the corrupted run to the clean one.

    Attributes:
        n_layers: The number of blocks.
    """

    def __init__(self, corrupted: CorruptedRun, kinds: Sequence[str]) -> None:
        run, self._n = corrupted.clean, len(corrupted.rows)
        self.n_layers, first = run.model.cfg.n_layers, run.subject[0]
        self._run, self._width = run, run.n_prompt - first
        self._rows = torch.arange(self._n).repeat_interleave(self._width)
        self._positions = torch.arange(first, run.n_prompt).repeat(self._n)
        self._points = {
            (kind, i): KINDS[kind].at(i) for kind in kinds for i in range(self.n_layers)
        }
        self._forward: PartialForward = corrupted.from_(first)
        self._clean = run.at_point(Point("resid_pre", 0))[self._positions]

    @torch.no_grad()
    def ends(self) -> tuple[Float[Tensor, "sample"], dict[Site, Float[Tensor, "sample pos d"]]]:
        """Return the metric of the corrupted run, and clean states less corrupted ones."""
        seen: list[dict[Site, Tensor]] = []
        for share in (0.0, 1.0):
            states: dict[Site, Tensor] = {}
            metric = self._pass(share, lambda site: _kept(states, site))
            seen.append(states)
            if share == 0.0:
                base = metric
        shape = (self._n, self._width)
        return base.float().cpu(), {
            site: (seen[1][site] - seen[0][site]).unflatten(0, shape) for site in self._points
        }

    def gradients(
        self, share: float, like: dict[Site, Float[Tensor, "sample pos d"]]
    ) -> dict[Site, Float[Tensor, "sample pos d"]]:
        """Return the metric's gradient by each site's states, at a point of the line.

        It is the gradient by zeros that are added to the states. Gradients of the states themselves
        are empty where TransformerLens hands a hook a view of an activation.
        """
        with torch.enable_grad():
            zeros = {
                site: torch.zeros_like(one.flatten(0, 1), requires_grad=True)
                for site, one in like.items()
            }
            total = self._pass(share, lambda site: lambda old: old + zeros[site]).sum()
            each = torch.autograd.grad(total, list(zeros.values()))
        shape = (self._n, self._width)
        return {site: one.unflatten(0, shape) for site, one in zip(zeros, each, strict=True)}

    def _pass(
        self, share: float, at: Callable[[Site], Callable[[Tensor], Tensor]]
    ) -> Float[Tensor, "sample"]:
        """Return the metric of each sample; `at` makes the change of each site."""
        run, rows, positions = self._run, self._rows, self._positions
        start = Change(
            Point("resid_pre", 0),
            rows,
            positions,
            lambda old: old + share * (self._clean.to(old) - old),
        )
        sites = [Change(point, rows, positions, at(site)) for site, point in self._points.items()]
        scored = torch.arange(self._n).repeat_interleave(len(run.labels))
        logits = self._forward.logits([start, *sites], scored, run.at.repeat(self._n))
        wanted = run.wanted.repeat(self._n, 1).to(logits.device)
        log_probs = logits.float().log_softmax(-1).gather(1, wanted).unflatten(0, (self._n, -1))
        if run.metric == "logit_diff":
            return log_probs[:, 0, 0] - log_probs[:, 0, 1]
        return log_probs[..., 0].sum(-1)


def _kept(states: dict[Site, Tensor], site: Site) -> Callable[[Tensor], Tensor]:
    """Return a function that stores the activations, and returns them."""

    def keep(old: Tensor) -> Tensor:
        states[site] = old.detach()
        return old

    return keep
