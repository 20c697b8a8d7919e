"""Recompute only what a change can reach.

A change at token t of layer l reaches tokens from t on, in layers from l on, and nothing else. Each
row of a batch has a first token that may change. `PartialForward` computes the unchanged part once:
it stores the keys and values of earlier tokens, and the residual before the first layer. After that
it runs only the remainder, differentiably, and unembeds only scored positions:

    columns     0 ............. P-1 | P ............. P+S-1
    a row       pad pad  a   b   c  |  d   e   f  pad pad     d is its first token that may change
                keys, values: kept  |  recomputed from layer l on

Rows are aligned at their first changing token, so that there is no gap between their tokens. Masks,
learned positions, rotations and sliding windows all require this.

This module does not depend on the architecture. The prefix fills the model's cache. Then the model
runs the remainder once, and the call of each block is recorded. Later the same calls are repeated
with other residuals. A self-check compares this with a whole pass once per model, on a few tokens.
Passes are whole ones, and the log reports it, for

- models that fail the self-check, such as models without key-value caches or with inexact ones;
- models that scale or project their logits outside `ln_final` and `unembed` (OPT-350M, Cohere);
- rows that together need more columns than the model's context, or exceed its rotation limit;
- models on which the user has set hooks, as hooks may count positions.

Several sets of changes run as one batch; in BLOOM, sets for a single row run one by one.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens_rome.model import adapter, passes, vocabulary
from transformer_lens_rome.model.adapter import Point
from transformer_lens_rome.model.block_calls import Recording, record
from transformer_lens_rome.model.changes import Change, Noise, embedded, replace
from transformer_lens_rome.model.protocol import Model
from transformer_lens_rome.model.self_check import difference, has_users_hooks, holds
from transformer_lens_rome.model.vocabulary import Losses, Scored

logger = logging.getLogger(__name__)


class PartialForward:
    """The remainder of a forward pass in which only some tokens change, from some layer on.

    Attributes:
        model: The model.
        tokens: All rows, padded on the right.
        starts: The first position of each row at which anything changes.
        first: The position in each row of a pass's first column: its start, or 0 in whole passes.
        recording: The recorded calls that run the remainder; None if passes are whole.
    """

    def __init__(
        self,
        model: Model,
        layer: int,
        rows: Sequence[Sequence[int]],
        starts: Sequence[int],
        *,
        noise: Noise | None = None,
        cut: bool | None = None,
    ) -> None:
        """Run the unchanged part once, without gradients.

        Args:
            model: A HookedTransformer or TransformerBridge.
            layer: The first block in which anything changes.
            rows: Token ids, not padded. To save time, leave out tokens after the last scored one.
            starts: The first position of each row at which anything changes.
            noise: A change of embeddings in all passes.
            cut: True always runs only the remainder, False always runs whole passes. None runs
                whole passes if the rows or the model require them, see above.

        Raises:
            ValueError: A start is not a position of its row, or a row is too long.
        """
        if any(not 0 <= start < len(ids) for ids, start in zip(rows, starts, strict=True)):
            raise ValueError("every start must be a position of its row")
        if len(passes.apart(model, [len(ids) for ids in rows])) > 1:
            raise ValueError(
                f"some of these texts are longer than {adapter.rotation_limit(model)} tokens and "
                "some are not, and this model rotates them differently (LongRoPE), so one pass "
                "cannot run both; shorten the long ones"
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
        """Return next-token logits at (row, position) pairs, with some activations changed.

        Pairs and changes must be at or after the start of their row, and changes in the first layer
        or above. The result is differentiable in the tensors that the changes' functions use.
        """
        return self.variants([changes], rows, positions)[0]

    def variants(
        self,
        variants: Sequence[Sequence[Change]],
        rows: Int[Tensor, "n"],
        positions: Int[Tensor, "n"],
    ) -> Float[Tensor, "variant n d_vocab"]:
        """Return the logits for several sets of changes, each applied alone, in one batch."""
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
    ) -> Scored:
        """Return log-probabilities of k tokens at each pair and variant, and the top token.

        Both have a first axis of variants, and are in main memory. Only whole passes store logits,
        those of one variant at a time.
        """
        if self.recording is None:
            whole = (self._whole(changes, rows, positions) for changes in variants)
            each = [vocabulary.scored(logits, labels) for logits in whole]
            return Scored(*(torch.stack(some).cpu() for some in zip(*each, strict=True)))
        final = self.finals(variants, rows, positions)
        every = labels.repeat(len(variants), 1).to(final.device)
        flat = passes.log_probs(self.model, final.flatten(0, 1), every)
        return Scored(*(one.unflatten(0, final.shape[:2]).cpu() for one in flat))

    def losses(
        self,
        changes: Sequence[Change],
        rows: Int[Tensor, "n_plus_k"],
        positions: Int[Tensor, "n_plus_k"],
        labels: Int[Tensor, "n"],
        log_q: Float[Tensor, "k d_vocab"] | None = None,
    ) -> Losses:
        """Return -log P of n labels at the first n pairs, and KL(P || Q) at the other k.

        The result is differentiable as logits are. See `vocabulary.losses`; whole passes store
        their logits.
        """
        if self.recording is None:
            whole = self._whole(changes, rows, positions)
            return vocabulary.losses_of_logits(whole, labels, log_q)
        (final,) = self.finals([changes], rows, positions)
        return passes.losses(self.model, final, labels, log_q)

    def finals(
        self,
        variants: Sequence[Sequence[Change]],
        rows: Int[Tensor, "n"],
        positions: Int[Tensor, "n"],
    ) -> Float[Tensor, "variant n d_model"]:
        """Return residuals after the last block, with all variants in one batch if possible."""
        if len(variants) == 1 or _can_be_stacked(self.model, len(self.tokens)):
            return self.stacked(variants, rows, positions)
        return torch.cat([self.stacked([one], rows, positions) for one in variants])

    def stacked(
        self,
        variants: Sequence[Sequence[Change]],
        rows: Int[Tensor, "n"],
        positions: Int[Tensor, "n"],
    ) -> Float[Tensor, "variant n d_model"]:
        """Run variants as one batch; each variant joins at the first layer that it changes."""
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
        """Return logits from a whole pass with changes."""
        with self.changed([changes]):
            return passes.logits_at(self.model, self.tokens, rows, positions)

    def read(self, points: Sequence[Point]) -> list[Float[Tensor, "row d"]]:
        """Read activations at each row's start, without changes, in layers from the first on.

        The pass stops after the last of the points.
        """

        def run() -> None:
            if self.recording is None:
                with self.changed(()):
                    passes.final_residual(self.model, self.tokens)
            else:
                self.recording.replay({self._layer: 1})

        activations = passes.read_during(self.model, points, run)
        every = torch.arange(len(self.tokens))
        return [activations[point][every, self.starts - self.first] for point in points]

    def changed(self, variants: Sequence[Sequence[Change]]) -> AbstractContextManager[None]:
        """Within this context, apply each variant's changes to its rows in every pass."""
        edits: dict[Point, list[tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]]] = {}
        for i, changes in enumerate(variants):
            for point, rows, positions, fn in changes:
                columns = positions - self.first[rows]
                edits.setdefault(point, []).append((rows + i * len(self.tokens), columns, fn))
        hooks = [] if self.recording else embedded(self._noise, self.first)
        hooks += [(point, partial(replace, some)) for point, some in edits.items()]
        return adapter.hooks(self.model, hooks)


def _record(
    model: Model,
    layer: int,
    rows: Sequence[Sequence[int]],
    starts: Sequence[int],
    noise: Noise | None,
) -> Recording:
    """Store the prefixes' keys and values, and record the blocks' calls on the remainders."""
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
    """Pad rows of token ids with 0 on the right."""
    width = max(map(len, rows))
    return torch.tensor([ids + [0] * (width - len(ids)) for ids in rows])


def _rows_can_be_cut(model: Model, rows: Sequence[Sequence[int]], starts: Sequence[int]) -> bool:
    """Return whether the aligned rows fit into a pass and the user has set no hooks."""
    remainder = max(len(ids) - start for ids, start in zip(rows, starts))
    longest = max(map(len, rows))
    if longest > (adapter.rotation_limit(model) or longest):
        logger.info(
            "using whole passes, since the model may rotate a part of a long text differently"
        )
        return False
    if max(starts) + remainder > (model.cfg.n_ctx or torch.inf):
        logger.info(
            "using whole passes, since the aligned rows are longer than the model's context"
        )
        return False
    return not has_users_hooks(model)


# ---------------------------------------------------------------- self-checks


def _can_be_cut(model: Model) -> bool:
    """Return whether partial passes and whole passes agree for this model."""
    return holds(model, "whole passes", lambda: _error_of_cutting(model))


def _can_be_stacked(model: Model, rows: int) -> bool:
    """Return whether one batch of variants and single variants agree for this model.

    If the number of rows divides the number of heads, this number has a test of its own, since a
    tensor with one entry per head looks as if it had entries per row. This includes a single row,
    with which a tensor's first axis cannot show whether it has one entry per row.
    """
    divides = model.cfg.n_heads % rows == 0
    alternative = f"variants of {rows} rows one by one" if divides else "variants one by one"
    n = rows if divides else min(rows, 3)
    return holds(model, alternative, lambda: _error_of_stacking(model, n))


def _error_of_cutting(model: Model) -> float:
    """Return the difference between partial and whole passes on three short rows."""
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


def _error_of_stacking(model: Model, n: int) -> float:
    """Return the difference between stacked and single variants, with as many columns as rows."""
    rows = [[(7 * i + j) % model.cfg.d_vocab for i in range(4 + n)] for j in range(1, 1 + n)]
    each, start = torch.arange(n), torch.full((n,), 4)
    variants = [
        [Change(Point("resid_post", layer), each, start, lambda old: 0.5 * old)]
        for layer in (model.cfg.n_layers // 2, 0)
    ]
    forward = PartialForward(model, 0, rows, start.tolist(), cut=True)
    single = [forward.stacked([changes], each, start + n - 1) for changes in variants]
    return difference(forward.stacked(variants, each, start + n - 1), torch.cat(single))
