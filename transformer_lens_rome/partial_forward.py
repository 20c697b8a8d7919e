"""Recompute only what a change can reach.

A change at token t of layer l reaches tokens from t on, in layers from l on, and nothing else. For
a batch of rows, each with its own first token that may change, `PartialForward` runs once what
stays: it keeps the keys and values of earlier tokens, and the residual where the first layer
starts. From then on it runs the remainder only, differentiably, and unembeds only scored places:

    columns     0 ............. P-1 | P ............. P+S-1
    a row       pad pad  a   b   c  |  d   e   f  pad pad     d is its first token that may change
                keys, values: kept  |  recomputed from layer l on

Rows are aligned at their first changing token, so that their tokens stand without a gap, which
masks, learned positions, rotations and sliding windows all count on.

Nothing here knows an architecture. The prefix runs into the model's own cache; then the model runs
the remainder once, while each block's call is recorded, and the blocks are called again as the
model called them, with another residual. Whether that gives what a whole pass gives is tried once
on each model, on a few tokens. Where it does not, every pass is a whole one, and the log says so:

- models without key-value caches, or whose caches are not exact;
- models that scale or project their logits outside `ln_final` and `unembed` (OPT-350M, Cohere);
- rows that together need more columns than the model's context.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens_rome import adapter, passes
from transformer_lens_rome.adapter import Point

logger = logging.getLogger(__name__)


class Change(NamedTuple):
    """New activations at some tokens.

    Attributes:
        point: Where in the model.
        rows: The row of each token.
        positions: Its position in that row.
        fn: From the activations there, `[n, d_model]`, to new ones of the same shape.
    """

    point: Point
    rows: Int[Tensor, "n"]
    positions: Int[Tensor, "n"]
    fn: Callable[[Tensor], Tensor]


class PartialForward:
    """What is left of a forward pass when only some tokens change, from some layer on.

    Attributes:
        model: The model.
        tokens: All rows, padded on the right.
        starts: The first position of each row at which anything changes.
        first: The position in each row of a pass's first column: its start, or 0 in whole passes.
        recording: How to run the remainder; None where passes are whole.
    """

    def __init__(
        self,
        model: Any,
        layer: int,
        rows: Sequence[Sequence[int]],
        starts: Sequence[int],
        *,
        cut: bool | None = None,
    ) -> None:
        """Run, once and without gradients, what stays the same.

        Args:
            model: A HookedTransformer or TransformerBridge.
            layer: The first block in which anything changes.
            rows: Token ids, not padded. What stands after the last scored token is best left out.
            starts: The first position of each row at which anything changes.
            cut: False runs whole passes, True never does. None: where the model cannot be cut.

        Raises:
            ValueError: a start that is not a position of its row, or a row that is too long.
        """
        if any(not 0 <= start < len(ids) for ids, start in zip(rows, starts, strict=True)):
            raise ValueError("every start must be a position of its row")
        self.model = model
        if cut is None:
            cut = _fits(model, rows, starts) and _can_be_cut(model)
        self.tokens, self.starts = _padded([list(ids) for ids in rows]), torch.tensor(starts)
        self.first = self.starts if cut else torch.zeros_like(self.starts)
        self.recording = _record(model, layer, rows, starts) if cut else None

    def logits(
        self,
        changes: Sequence[Change],
        rows: Int[Tensor, "n"],
        positions: Int[Tensor, "n"],
    ) -> Float[Tensor, "n d_vocab"]:
        """Next-token logits at (row, position) pairs, with activations changed at others.

        Pairs and changes stand at or after their row's start, and changes in the first layer or
        above. Differentiable in whatever the changes' functions hold.
        """
        with self.changed(changes):
            if self.recording is None:
                return passes.logits_at(self.model, self.tokens, rows, positions)
            final = self.recording.replay(self.recording.residual)
        index = (rows, positions - self.first[rows])
        return passes.unembed(self.model, final[tuple(i.to(final.device) for i in index)])

    def read(self, points: Sequence[Point]) -> list[Float[Tensor, "row d"]]:
        """Activations at each row's start, with nothing changed, in the layers from the first on.

        The pass stops once it has passed the last of the points.
        """

        def run() -> None:
            if self.recording is None:
                passes.final_residual(self.model, self.tokens)
            else:
                self.recording.replay(self.recording.residual)

        found = passes.read_during(self.model, points, run)
        every = torch.arange(len(self.tokens))
        return [found[point][every, self.starts - self.first] for point in points]

    def changed(self, changes: Sequence[Change]) -> AbstractContextManager[None]:
        """While this is open, passes over these rows run with the changes made."""
        return adapter.hooks(self.model, [(change.point, self._hook(change)) for change in changes])

    def _hook(self, change: Change) -> adapter.Hook:
        columns = change.positions - self.first[change.rows]

        def replace(activation: Float[Tensor, "row column d"]) -> Float[Tensor, "row column d"]:
            index = (change.rows.to(activation.device), columns.to(activation.device))
            return activation.index_put(index, change.fn(activation[index]).to(activation))

        return replace


def _record(
    model: Any, layer: int, rows: Sequence[Sequence[int]], starts: Sequence[int]
) -> passes.Recording:
    """Keep the prefixes' keys and values, and record the blocks' calls on the remainders."""
    width = max(starts)
    prefixes = [[0] * (width - start) + list(ids[:start]) for ids, start in zip(rows, starts)]
    remainders = _padded([list(ids[start:]) for ids, start in zip(rows, starts)])
    mask = (torch.arange(width) >= width - torch.tensor(starts)[:, None]).long()
    cache = passes.keys_and_values(model, torch.tensor(prefixes), mask) if width else None
    mask = torch.cat([mask, torch.ones_like(remainders)], dim=1)
    return passes.record(model, layer, remainders, mask, cache)


def _padded(rows: list[list[int]]) -> Int[Tensor, "row pos"]:
    width = max(map(len, rows))
    return torch.tensor([ids + [0] * (width - len(ids)) for ids in rows])


def _fits(model: Any, rows: Sequence[Sequence[int]], starts: Sequence[int]) -> bool:
    """Whether the rows, aligned at their starts, are no longer than the model's context."""
    remainder = max(len(ids) - start for ids, start in zip(rows, starts))
    fits = max(starts) + remainder <= (model.cfg.n_ctx or torch.inf)
    if not fits:
        logger.info("whole passes: the rows, aligned, are longer than the model's context")
    return fits


def _can_be_cut(model: Any) -> bool:
    """Whether partial passes give what whole ones give; tried once, and noted on the model."""
    if not hasattr(model, "_rome_can_be_cut"):
        try:
            reason = _difference(model)
        except Exception as error:  # hosts without caches, masks or positions fail in many ways
            reason = f"{type(error).__name__}: {error}"
        if reason:
            logger.warning("whole passes for %s, slower: %s", adapter.architecture(model), reason)
        model._rome_can_be_cut = not reason
    return model._rome_can_be_cut


@torch.no_grad()
def _difference(model: Any) -> str:
    """How partial and whole passes differ on three short rows, in words; empty if they agree."""
    ids = [(7 * i + 1) % model.cfg.d_vocab for i in range(9)]
    rows, starts, layer = (ids, ids[2:8], ids[5:]), (4, 2, 0), model.cfg.n_layers // 2
    each, first = torch.arange(3), torch.tensor(starts)
    last = torch.tensor([len(row) - 1 for row in rows])
    change = Change(Point("resid_post", layer), each, first, lambda old: 0.5 * old)
    part, whole = (
        PartialForward(model, layer, rows, starts, cut=cut).logits([change], each, last)
        for cut in (True, False)
    )
    error = ((part - whole).abs().max() / whole.abs().max()).item()
    limit = max(1e-3, 16 * torch.finfo(whole.dtype).eps)
    return "" if error < limit else f"cached passes differ from whole ones by {error:.1e}"
