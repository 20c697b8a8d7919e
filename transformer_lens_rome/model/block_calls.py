"""Record how a model calls its blocks, and call them again: the third part of `adapter`.

A block is given more than the residual: masks, positions, rotations, the cache. Whatever the
architecture, the model has put them together once; repeated with another residual, the same call
gives what the model would have given.

Several variants of a batch can be run at once, one after the other along the batch axis. Variants
that differ from the base only from some layer on join there, with the residual of the base.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from transformer_lens_rome.model import passes


class BlockCall(NamedTuple):
    """One block, the residual that it was given, and what it was given beside it."""

    block: Any
    residual: Float[Tensor, "row pos d_model"]
    args: tuple
    kwargs: dict[str, Any]


class Recording(NamedTuple):
    """The calls of a model's last blocks in one pass, to be repeated.

    Attributes:
        layer: The layer of the first call.
        calls: The calls in order.
        cache: Keys and values of the tokens that stand before; None if there are none.
        passed: The copy of the cache that the calls were given.
    """

    layer: int
    calls: list[BlockCall]
    cache: Any
    passed: Any

    def replay(self, joining: Mapping[int, int]) -> Float[Tensor, "variant_row pos d_model"]:
        """The residual after the last block, for as many variants as join at each layer.

        What makes the variants differ are hooks that the caller has set.
        """
        cache, variants = _copy_of(self.cache), 0
        residual = self.calls[-1].residual[:0]
        for layer, call in enumerate(self.calls, start=self.layer):
            residual = residual.to(call.residual.device)
            if new := joining.get(layer, 0):
                base = _repeated(call.residual, new)
                residual = torch.cat([residual, base]) if variants else base
                variants += new
            if variants:
                given = cache if variants == 1 else _copy_of(self.cache, layer, variants)
                args, kwargs = self._arguments(call, given, variants)
                with passes.cache_by_both_names([call.block]):
                    output = call.block(residual, *args, **kwargs)
                residual = output[0] if isinstance(output, tuple) else output
        return residual

    def _arguments(self, call: BlockCall, cache: Any, variants: int) -> tuple[tuple, dict]:
        """A call's arguments for several variants, with a cache that may be written to."""
        rows = len(call.residual)

        def fit(value: Any) -> Any:
            return cache if value is self.passed else _for_variants(value, rows, variants)

        return tuple(map(fit, call.args)), {name: fit(v) for name, v in call.kwargs.items()}


def _for_variants(value: Any, rows: int, variants: int) -> Any:
    """An argument for one batch, made fit for several: what has one entry a row is repeated.

    Tensors with a first axis of 1 apply to every row as they are; so do those of one axis.
    """
    if variants == 1 or value is None or isinstance(value, nn.Module):
        return value
    if isinstance(value, Tensor):
        per_row = rows > 1 and value.ndim > 1 and len(value) % rows == 0
        return _repeated(value, variants) if per_row else value
    if isinstance(value, tuple):
        return tuple(_for_variants(item, rows, variants) for item in value)
    return _with_tensors_repeated(value, variants)


def _with_tensors_repeated(value: Any, times: int) -> Any:
    """A copy of an object (keys and values of one layer) with its tensors repeated."""
    tensors = {k: v for k, v in getattr(value, "__dict__", {}).items() if isinstance(v, Tensor)}
    if tensors:
        value = copy.copy(value)
        for name, tensor in tensors.items():
            setattr(value, name, _repeated(tensor, times))
    return value


def _repeated(tensor: Tensor, times: int) -> Tensor:
    """All rows of a tensor, several times over."""
    return tensor if times == 1 else tensor.repeat(times, *[1] * (tensor.ndim - 1))


def _copy_of(cache: Any, layer: int = 0, variants: int = 1) -> Any:
    """A cache to be written to in place of another; tensors, which are not, stay shared.

    For several variants, one layer's keys and values are repeated.
    """
    new = copy.copy(cache)
    for name, items in list(vars(cache).items()) if cache is not None else ():
        if isinstance(items, list):
            copies = [item if isinstance(item, Tensor) else copy.copy(item) for item in items]
            if variants > 1 and layer < len(copies):
                kept = copies[layer]
                repeat = _repeated if isinstance(kept, Tensor) else _with_tensors_repeated
                copies[layer] = repeat(kept, variants)
            setattr(new, name, copies)
    return new


@torch.no_grad()
def record(
    model: Any,
    layer: int,
    tokens: Int[Tensor, "row new"],
    mask: Int[Tensor, "row old_and_new"],
    cache: Any = None,
) -> Recording:
    """Run some tokens after cached ones, and record the calls of the blocks from `layer` on."""
    calls: list[BlockCall] = []

    def keep(block: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        kwargs = dict(kwargs)
        residual, *rest = args or (kwargs.pop("hidden_states"),)
        calls.append(BlockCall(block, residual, tuple(rest), kwargs))

    passed = _copy_of(cache)
    blocks = list(model.blocks)[layer:]
    handles = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in blocks]
    try:
        if cache is None:
            passes.logits_at(model, tokens, passes.NO_ROW, passes.NO_ROW)
        else:
            passes.continue_from(model, tokens, passed, mask, passes.NO_ROW)
    finally:
        for handle in handles:
            handle.remove()
    return Recording(layer, calls, cache, passed)
