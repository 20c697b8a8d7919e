"""Optimise v*: the value with which the model predicts the target (Meng et al. 2022, Eq. 4).

    L(z) = mean over prefixes of -log P(target | prefix + prompt), value at the subject set to z
           + kl_factor · KL(P(· | subject) || P before(· | subject)), in the text "{subject} is a"
           + weight_decay · ||delta|| / ||v||²

Searches for several requests share their passes: each has its own delta, optimiser and stop, so the
results are those of one search after another, up to the rounding of larger products.

delta is added to the value at the last subject token of each row, including the "is a" row. v is
the value before any change. The KL term compares the predictions at the last subject token, as the
released code does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from statistics import fmean
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from transformer_lens_rome.methods.rome_config import RomeConfig
from transformer_lens_rome.model import adapter
from transformer_lens_rome.model.adapter import Point
from transformer_lens_rome.model.changes import Change
from transformer_lens_rome.model.partial_forward import PartialForward
from transformer_lens_rome.model.protocol import Model
from transformer_lens_rome.model.vocabulary import Losses
from transformer_lens_rome.prompts.encoder import Row
from transformer_lens_rome.prompts.scores import target_index


class Optimised(NamedTuple):
    """The result of the optimisation.

    Attributes:
        delta: The vector to add to the value.
        losses: The objective at every step, before that step's update.
        clamp_hits: Number of steps after which delta was scaled down to the allowed norm.
    """

    delta: Float[Tensor, "d_model"]
    losses: tuple[float, ...]
    clamp_hits: int


class Batch(NamedTuple):
    """The rows of one optimisation, and the positions that the objective scores.

    Attributes:
        rows: Token ids up to the last one that is needed.
        lookup: Position of the last subject token of each row.
        where: The row of each scored token; the last entry is the KL term's.
        at: The position that predicts each scored token.
        labels: Target tokens, one fewer than scored.
        weights: Weights of the mean over a row's target tokens, then over rows.
    """

    rows: list[tuple[int, ...]]
    lookup: Int[Tensor, "row"]
    where: Int[Tensor, "scored"]
    at: Int[Tensor, "scored"]
    labels: Int[Tensor, "n"]
    weights: Float[Tensor, "n"]

    @classmethod
    def of(cls, rows: Sequence[Row], kl_row: Row) -> Batch:
        """Collect the rows; add the KL row unless another row starts with the same tokens."""
        where, at, labels = target_index(rows)
        weights = 1 / (torch.tensor([len(row.target) for row in rows])[where] * len(rows))
        ids = [row.ids[: row.target[-1]] for row in rows]
        lookup = [row.subject[-1] for row in rows]
        last = kl_row.subject[-1]
        kl_ids = kl_row.ids[: last + 1]
        same = [i for i, row in enumerate(ids) if lookup[i] == last and row[: last + 1] == kl_ids]
        if not same:
            same, ids, lookup = [len(ids)], [*ids, kl_ids], [*lookup, last]
        where = torch.cat([where, torch.tensor(same[:1])])
        at = torch.cat([at, torch.tensor([last])])
        return cls(ids, torch.tensor(lookup), where, at, labels, weights)


class Search:
    """The search for one v*: its rows, its delta and its optimiser.

    Attributes:
        batch: The rows of the request.
        v: The value before the edit, `[d_model]`.
        config: The constants.
        losses: The objective at every step, before that step's update.
        clamp_hits: Number of steps after which delta was scaled down to the allowed norm.
        error: The reason why the search failed; empty if it did not.
        log_q: The log-probabilities of the KL term before any change, `[1, d_vocab]`; None before
            the first step.
    """

    def __init__(self, batch: Batch, v: Float[Tensor, "d_model"], config: RomeConfig) -> None:
        assert config.clamp is not None  # None stands for a default, which the caller has chosen
        self.batch, self.v, self.config = batch, v, config
        self.losses: list[float] = []
        self.clamp_hits, self.error = 0, ""
        self._limit = config.clamp * v.norm()
        self._delta = torch.zeros_like(v)
        self._adam = torch.optim.Adam([self._delta], lr=config.lr)
        self.log_q: Tensor | None = None

    @property
    def found(self) -> Optimised:
        """Return the result.

        Raises:
            ValueError: The search failed.
        """
        if self.error:
            raise ValueError(self.error)
        return Optimised(self._delta.detach(), tuple(self.losses), self.clamp_hits)

    @property
    def goes_on(self) -> bool:
        """Return whether the search needs another step."""
        ended = bool(self.losses) and self.losses[-1] < self.config.stop_loss
        return not (self.error or ended or len(self.losses) == self.config.steps)

    def change(self, layer: int, first: int) -> Change:
        """Return the change that adds delta to the values; the rows start at row `first`."""
        delta = self._delta.requires_grad_(True)
        rows = first + torch.arange(len(self.batch.rows))
        add = lambda value: value + delta.to(value)  # noqa: E731
        return Change(Point("value", layer), rows, self.batch.lookup, add)

    def objective(self, found: Losses) -> Float[Tensor, ""]:
        """Compute L from the losses at the scored positions, and note it."""
        config, delta = self.config, self._delta
        if self.log_q is None:
            self.log_q = found.log_q
        nll, kl = found.nll.to(delta.device), found.kl.to(delta.device).sum()
        nll = (self.batch.weights.to(nll) * nll).sum()
        loss = nll + config.kl_factor * kl + config.weight_decay * delta.norm() / self.v.norm() ** 2
        self.losses.append(loss.item())
        if not math.isfinite(self.losses[-1]):
            self.error = (
                f"the objective is {self.losses[-1]} at step {len(self.losses) - 1}, in float16 by "
                "overflow; load the model in float32 or bfloat16"
            )
        return loss

    def descend(self, gradient: Float[Tensor, "d_model"]) -> None:
        """Take one step of Adam, and scale delta down to ||delta|| <= clamp · ||v||."""
        self._delta.grad = gradient
        self._adam.step()
        self.clamp_hits += _clamp_(self._delta, self._limit)


def stacked(model: Model, layer: int, batches: Sequence[Batch]) -> PartialForward:
    """Return the passes of the rows of several batches, one after another."""
    rows = [ids for batch in batches for ids in batch.rows]
    lookup = torch.cat([batch.lookup for batch in batches])
    return PartialForward(model, layer, rows, lookup.tolist())


def optimise(
    forward: PartialForward, layer: int, searches: Sequence[Search], *, progress: bool = True
) -> None:
    """Run searches to their ends, each with at most `steps` losses and `steps - 1` updates.

    `forward` runs the rows of all searches, see `stacked`. Searches that have ended leave the batch
    as soon as they are half of its rows.
    """
    bar = tqdm(total=searches[0].config.steps, desc="v*", disable=not progress)
    held = live = list(searches)
    with adapter.gradients_for(forward.model), bar:
        while live:
            if 2 * _n_rows(live) <= _n_rows(held):
                held = live
                forward = stacked(forward.model, layer, [search.batch for search in held])
            losses = _step(forward, layer, held)
            live = [search for search in live if search.goes_on]
            bar.set_postfix(loss=f"{fmean(search.losses[-1] for search in losses):.3f}")
            bar.update()
            if live:
                deltas = [search._delta for search in live]
                gradients = torch.autograd.grad([losses[search] for search in live], deltas)
                for search, gradient in zip(live, gradients, strict=True):
                    search.descend(gradient)


def _n_rows(searches: Sequence[Search]) -> int:
    return sum(len(search.batch.rows) for search in searches)


def _step(
    forward: PartialForward, layer: int, held: Sequence[Search]
) -> dict[Search, Float[Tensor, ""]]:
    """Return the objectives of the searches that go on, from one pass of all rows."""
    firsts = [0, *accumulate(len(search.batch.rows) for search in held)]
    live = [(search, first) for search, first in zip(held, firsts) if search.goes_on]
    changes = [search.change(layer, first) for search, first in live]
    batches = [search.batch for search, _ in live]
    log_q = [search.log_q for search, _ in live if search.log_q is not None]
    found = forward.losses(
        changes,
        _last_last([first + batch.where for batch, (_, first) in zip(batches, live, strict=True)]),
        _last_last([batch.at for batch in batches]),
        torch.cat([batch.labels for batch in batches]),
        torch.cat(log_q) if log_q else None,
    )
    parts = found.split([len(batch.labels) for batch in batches])
    return {search: search.objective(part) for (search, _), part in zip(live, parts, strict=True)}


def _last_last(parts: Sequence[Tensor]) -> Tensor:
    """Return all entries but the last of each part, then the last ones, the KL terms'."""
    return torch.cat([*(part[:-1] for part in parts), *(part[-1:] for part in parts)])


@torch.no_grad()
def _clamp_(delta: Tensor, limit: Tensor) -> bool:
    """Scale delta down to a norm of at most `limit`, in place; return whether it was longer."""
    if too_long := bool(delta.norm() > limit):
        delta *= limit / delta.norm()
    return too_long
