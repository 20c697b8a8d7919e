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
- rows that together need more columns than the model's context, or are above its rotation limit;
- models with hooks of the user's own, which may count positions.

Several sets of changes run as one batch; in BLOOM sets for a single row run one by one.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens_rome.model import adapter, passes
from transformer_lens_rome.model.adapter import Point
from transformer_lens_rome.model.block_calls import Recording, record
from transformer_lens_rome.model.changes import Change, Noise, embedded, replace
from transformer_lens_rome.model.self_check import difference, has_users_hooks, holds

logger = logging.getLogger(__name__)


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
        noise: Noise | None = None,
        cut: bool | None = None,
    ) -> None:
        """Run, once and without gradients, what stays the same.

        Args:
            model: A HookedTransformer or TransformerBridge.
            layer: The first block in which anything changes.
            rows: Token ids, not padded. What stands after the last scored token is best left out.
            starts: The first position of each row at which anything changes.
            noise: A change of embeddings that holds in all passes.
            cut: False runs whole passes, True never does. None: whole ones where the rows or the
                model cannot be cut, see above.

        Raises:
            ValueError: a start that is not a position of its row, or a row that is too long.
        """
        if any(not 0 <= start < len(ids) for ids, start in zip(rows, starts, strict=True)):
            raise ValueError("every start must be a position of its row")
        if len(passes.apart(model, [len(ids) for ids in rows])) > 1:
            raise ValueError(
                f"some of these texts are longer than {adapter.rotation_limit(model)} tokens and "
                "some are not, and this model rotates them differently (LongRoPE), so they do not "
                "fit into one pass; shorten the long ones"
            )
        self.model = model
        if cut is None:
            cut = _rows_can_be_cut(model, rows, starts) and _can_be_cut(model)
        self.tokens, self.starts = _padded([list(ids) for ids in rows]), torch.tensor(starts)
        self.first = self.starts if cut else torch.zeros_like(self.starts)
        self._layer, self._noise = layer, noise
        self.recording = _record(model, layer, rows, starts, noise) if cut else None

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
        return self.variants([changes], rows, positions)[0]

    def variants(
        self,
        variants: Sequence[Sequence[Change]],
        rows: Int[Tensor, "n"],
        positions: Int[Tensor, "n"],
    ) -> Float[Tensor, "variant n d_vocab"]:
        """The same for several sets of changes, each made by itself; run as one batch."""
        if self.recording is None:
            return torch.stack([self._whole(changes, rows, positions) for changes in variants])
        final = self.finals(variants, rows, positions)
        return passes.unembed(self.model, final.flatten(0, 1)).unflatten(0, final.shape[:2])

    def log_probs(
        self,
        variants: Sequence[Sequence[Change]],
        rows: Int[Tensor, "n"],
        positions: Int[Tensor, "n"],
        labels: Int[Tensor, "n k"],
    ) -> Float[Tensor, "variant n k"]:
        """Log-probabilities of k tokens at each place, in float32; no logits are kept."""
        if self.recording is None:
            whole = (self._whole(changes, rows, positions).float() for changes in variants)
            found = [one.log_softmax(-1).gather(1, labels.to(one.device)) for one in whole]
            return torch.stack(found)
        final = self.finals(variants, rows, positions)
        every = labels.repeat(len(variants), 1).to(final.device)
        found = passes.log_probs(self.model, final.flatten(0, 1), every)
        return found.unflatten(0, final.shape[:2])

    def finals(
        self,
        variants: Sequence[Sequence[Change]],
        rows: Int[Tensor, "n"],
        positions: Int[Tensor, "n"],
    ) -> Float[Tensor, "variant n d_model"]:
        """Residuals after the last block, of variants that run as one batch where they can."""
        if len(variants) == 1 or _can_be_stacked(self.model, len(self.tokens)):
            return self.stacked(variants, rows, positions)
        return torch.cat([self.stacked([one], rows, positions) for one in variants])

    def stacked(
        self,
        variants: Sequence[Sequence[Change]],
        rows: Int[Tensor, "n"],
        positions: Int[Tensor, "n"],
    ) -> Float[Tensor, "variant n d_model"]:
        """Run variants as one batch, which each joins at the first layer that it changes."""
        assert self.recording is not None
        first = [min((c.point.layer for c in one), default=self._layer) for one in variants]
        order = sorted(range(len(variants)), key=first.__getitem__)
        with self.changed([variants[i] for i in order]):
            final = self.recording.replay(Counter(first))
        final = final.unflatten(0, (len(variants), -1))
        rows, columns = rows.to(final.device), (positions - self.first[rows]).to(final.device)
        return final[torch.tensor(order).argsort()][:, rows, columns]

    def _whole(
        self, changes: Sequence[Change], rows: Int[Tensor, "n"], positions: Int[Tensor, "n"]
    ) -> Float[Tensor, "n d_vocab"]:
        with self.changed([changes]):
            return passes.logits_at(self.model, self.tokens, rows, positions)

    def read(self, points: Sequence[Point]) -> list[Float[Tensor, "row d"]]:
        """Activations at each row's start, with nothing changed, in the layers from the first on.

        The pass stops once it has passed the last of the points.
        """

        def run() -> None:
            if self.recording is None:
                with self.changed(()):
                    passes.final_residual(self.model, self.tokens)
            else:
                self.recording.replay({self._layer: 1})

        found = passes.read_during(self.model, points, run)
        every = torch.arange(len(self.tokens))
        return [found[point][every, self.starts - self.first] for point in points]

    def changed(self, variants: Sequence[Sequence[Change]]) -> AbstractContextManager[None]:
        """While this is open, passes run with each variant's changes made in its rows."""
        made: dict[Point, list[tuple[Tensor, Tensor, Callable]]] = {}
        for i, changes in enumerate(variants):
            for point, rows, positions, fn in changes:
                columns = positions - self.first[rows]
                made.setdefault(point, []).append((rows + i * len(self.tokens), columns, fn))
        hooks = [(point, partial(replace, some)) for point, some in made.items()]
        held = [] if self.recording else embedded(self._noise, self.first)
        return adapter.hooks(self.model, held + hooks)


def _record(
    model: Any,
    layer: int,
    rows: Sequence[Sequence[int]],
    starts: Sequence[int],
    noise: Noise | None,
) -> Recording:
    """Keep the prefixes' keys and values, and record the blocks' calls on the remainders."""
    width, first = max(starts), torch.tensor(starts)
    prefixes = [[0] * (width - start) + list(ids[:start]) for ids, start in zip(rows, starts)]
    remainders = _padded([list(ids[start:]) for ids, start in zip(rows, starts)])
    mask, cache = (torch.arange(width) >= width - first[:, None]).long(), None
    if width:
        with adapter.hooks(model, embedded(noise, first - width, width)):
            cache = passes.keys_and_values(model, torch.tensor(prefixes), mask)
    mask = torch.cat([mask, torch.ones_like(remainders)], dim=1)
    with adapter.hooks(model, embedded(noise, first)):
        return record(model, layer, remainders, mask, cache)


def _padded(rows: list[list[int]]) -> Int[Tensor, "row pos"]:
    width = max(map(len, rows))
    return torch.tensor([ids + [0] * (width - len(ids)) for ids in rows])


def _rows_can_be_cut(model: Any, rows: Sequence[Sequence[int]], starts: Sequence[int]) -> bool:
    """Whether the rows fit when aligned, and no hook of the user's counts their positions."""
    remainder = max(len(ids) - start for ids, start in zip(rows, starts))
    longest = max(map(len, rows))
    if longest > (adapter.rotation_limit(model) or longest):
        logger.info("whole passes: a part of a text would be rotated otherwise than the whole")
        return False
    if max(starts) + remainder > (model.cfg.n_ctx or torch.inf):
        logger.info("whole passes: the rows, aligned, are longer than the model's context")
        return False
    return not has_users_hooks(model)


# ---------------------------------------------------------------- does it hold for this model?


def _can_be_cut(model: Any) -> bool:
    """Whether partial passes give what whole ones give."""
    return holds(model, "whole passes", lambda: _error_of_cutting(model))


def _can_be_stacked(model: Any, rows: int) -> bool:
    """Whether variants run as one batch give what each gives by itself.

    One row is a case of its own: then nothing tells what has one entry a row. So is each number
    that divides the heads': what has one entry a head looks as if it had some for each row.
    """
    own = model.cfg.n_heads % rows == 0
    what = f"variants of {rows} rows one by one" if own else "variants one by one"
    return holds(model, what, lambda: _error_of_stacking(model, rows if own else min(rows, 3)))


def _error_of_cutting(model: Any) -> float:
    """By how much partial and whole passes differ on three short rows."""
    ids = [(7 * i + 1) % model.cfg.d_vocab for i in range(9)]
    rows, starts, layer = (ids, ids[2:8], ids[5:]), (4, 2, 0), model.cfg.n_layers // 2
    last = torch.tensor([len(row) - 1 for row in rows])
    change = Change(
        Point("resid_post", layer), torch.arange(3), torch.tensor(starts), lambda old: 0.5 * old
    )
    part, whole = (
        PartialForward(model, layer, rows, starts, cut=cut).logits([change], torch.arange(3), last)
        for cut in (True, False)
    )
    return difference(part, whole)


def _error_of_stacking(model: Any, n: int) -> float:
    """By how much stacked variants differ from single ones; as many columns as rows."""
    rows = [[(7 * i + j) % model.cfg.d_vocab for i in range(4 + n)] for j in range(1, 1 + n)]
    each, start = torch.arange(n), torch.full((n,), 4)
    variants = [
        [Change(Point("resid_post", layer), each, start, lambda old: 0.5 * old)]
        for layer in (model.cfg.n_layers // 2, 0)
    ]
    forward = PartialForward(model, 0, rows, start.tolist(), cut=True)
    single = [forward.stacked([changes], each, start + n - 1) for changes in variants]
    return difference(forward.stacked(variants, each, start + n - 1), torch.cat(single))
