"""Optimise v*: the value with which the model predicts the target (Meng et al. 2022, Eq. 4).

    L(z) = mean over prefixes of -log P(target | prefix + prompt), value at the subject set to z
           + kl_factor · KL(P(· | subject) || P before(· | subject)), in the text "{subject} is a"
           + weight_decay · ||delta|| / ||v||²

The prefixes may be split into groups. Then each step takes the next group in turn, and the mean is
over its prefixes; the stop looks at the last step of every group.

Searches for several requests share their passes: each has its own delta, optimiser and stop, so the
results are those of one search after another, up to the rounding of larger products.

delta is added to the value at the last subject token of each row, including the "is a" row. v is
the value before any change. MEMIT adds delta to the residual after the block instead. The KL term
compares the predictions at the last subject token, as the released code does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate
from statistics import fmean
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from transformer_lens_rome.methods.rome_config import SearchConfig
from transformer_lens_rome.model import adapter
from transformer_lens_rome.model.adapter import Point
from transformer_lens_rome.model.changes import Change
from transformer_lens_rome.model.keys import read_keys_and_values
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
    """The rows of one step, and the positions that the objective scores.

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

    @property
    def n_prefixes(self) -> int:
        """Return the number of rows with a target; the KL row is one of them, or the last row."""
        return int(self.where[:-1].max()) + 1

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
        groups: The rows of the request, in the groups that take turns.
        v: The value before the edit, `[d_model]`.
        config: The constants.
        site: The point to which delta is added: the value, or the residual after the block.
        losses: The objective at every step, before that step's update.
        clamp_hits: Number of steps after which delta was scaled down to the allowed norm.
        error: The reason why the search failed; empty if it did not.
        log_q: The log-probabilities of the KL term before any change, `[1, d_vocab]`; None before
            the first step.
    """

    def __init__(
        self,
        groups: Sequence[Batch],
        v: Float[Tensor, "d_model"],
        config: SearchConfig,
        site: Literal["value", "resid_post"] = "value",
    ) -> None:
        assert config.clamp is not None  # None stands for a default, which the caller has chosen
        self.groups, self.v, self.config, self.site = groups, v, config, site
        self.losses: list[float] = []
        self._all_top: list[bool] = []
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
    def batch(self) -> Batch:
        """Return the rows of the next step."""
        return self.groups[len(self.losses) % len(self.groups)]

    @property
    def goes_on(self) -> bool:
        """Return whether the search needs another step."""
        return not (self.error or self._ended or len(self.losses) == self.config.steps)

    @property
    def _ended(self) -> bool:
        """Return whether the last step of every group says that the target is reached."""
        n = len(self.groups)
        if len(self.losses) < n:
            return False
        reached = self.config.stop == "top" and self._is_on_top()
        return reached or fmean(self.losses[-n:]) < self.config.stop_loss

    def _is_on_top(self) -> bool:
        """Return whether every token of the target was on top at the last step of every group."""
        return all(self._all_top[-len(self.groups) :])

    def _top(self, found: Losses) -> bool:
        """Return whether every token of the target is on top at this step."""
        return bool(found.is_top.all())

    def change(self, layer: int, first: int) -> Change:
        """Return the change that adds delta at the site; the rows start at row `first`."""
        delta = self._delta.requires_grad_(True)
        rows = first + torch.arange(len(self.batch.rows))
        add = lambda value: value + delta.to(value)  # noqa: E731
        return Change(Point(self.site, layer), rows, self.batch.lookup, add)

    def objective(self, found: Losses) -> Float[Tensor, ""]:
        """Compute L from the losses at the scored positions, and note it."""
        config, delta = self.config, self._delta
        if self.log_q is None:
            self.log_q = found.log_q
        nll, kl = found.nll.to(delta.device), found.kl.to(delta.device).sum()
        mean_nll = (self.batch.weights.to(nll) * nll).sum()
        decay = delta.norm() / self.v.norm() ** 2
        loss = mean_nll + config.kl_factor * kl + config.weight_decay * decay
        self.losses.append(loss.item())
        self._all_top.append(self._top(found))
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


def passes_of(model: Model, layer: int, each: Sequence[Sequence[Batch]]) -> list[PartialForward]:
    """Return the passes of each group, for the rows of several requests one after another."""
    return [stacked(model, layer, group) for group in zip(*each, strict=True)]


def stacked(model: Model, layer: int, batches: Sequence[Batch]) -> PartialForward:
    """Return the passes of the rows of several batches, one after another."""
    rows = [ids for batch in batches for ids in batch.rows]
    lookup = torch.cat([batch.lookup for batch in batches])
    return PartialForward(model, layer, rows, lookup.tolist())


def keys_and_values(
    forwards: Sequence[PartialForward], layer: int, each: Sequence[Sequence[Batch]]
) -> Iterator[tuple[Float[Tensor, "prefix d_mlp"], Float[Tensor, "prefix d_model"]]]:
    """Yield the keys and values of each request, one row for each prefix, in the groups' order."""
    parts = []
    for forward, group in zip(forwards, zip(*each, strict=True), strict=True):
        sizes = [len(batch.rows) for batch in group]
        keys, values = (read.split(sizes) for read in read_keys_and_values(forward, layer))
        n = [batch.n_prefixes for batch in group]
        parts.append([(k[:m], v[:m]) for k, v, m in zip(keys, values, n, strict=True)])
    for of_request in zip(*parts, strict=True):
        keys, values = (torch.cat(some) for some in zip(*of_request, strict=True))
        yield keys, values


def optimise(
    forwards: Sequence[PartialForward],
    layer: int,
    searches: Sequence[Search],
    *,
    progress: bool = True,
) -> None:
    """Run searches to their ends, each with at most `steps` losses and `steps - 1` updates.

    `forwards` run the rows of all searches, see `passes_of`. Searches that have ended leave the
    batch as soon as they are half of its rows.
    """
    model, steps = forwards[0].model, searches[0].config.steps
    held = live = list(searches)
    with adapter.gradients_for(model), tqdm(total=steps, desc="v*", disable=not progress) as bar:
        while live:
            if 2 * _n_rows(live) <= _n_rows(held):
                held = live
                forwards = passes_of(model, layer, [search.groups for search in held])
            turn = len(live[0].losses) % len(forwards)
            losses = _step(forwards[turn], layer, held, turn)
            live = [search for search in live if search.goes_on]
            bar.set_postfix(loss=f"{fmean(search.losses[-1] for search in losses):.3f}")
            bar.update()
            if live:
                deltas = [search._delta for search in live]
                gradients = torch.autograd.grad([losses[search] for search in live], deltas)
                for search, gradient in zip(live, gradients, strict=True):
                    search.descend(gradient)


def _n_rows(searches: Sequence[Search]) -> int:
    return sum(len(group.rows) for search in searches for group in search.groups)


def _step(
    forward: PartialForward, layer: int, held: Sequence[Search], turn: int
) -> dict[Search, Float[Tensor, ""]]:
    """Return the objectives of the searches that go on, from one pass of a group's rows."""
    firsts = [0, *accumulate(len(search.groups[turn].rows) for search in held)]
    live = [(search, first) for search, first in zip(held, firsts) if search.goes_on]
    batches = [search.groups[turn] for search, _ in live]
    changes = [search.change(layer, first) for search, first in live]
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
