"""Record how a model calls its blocks, and repeat the calls with other residuals.

The arguments of a block are the residual and more: masks, positions, rotations, the cache. They
depend on the architecture, but the model has prepared them once. The same call with another
residual therefore gives the output that the model would give for this residual.

Several variants of a batch can run at once, concatenated along the batch axis. A variant that
differs from the base only from some layer on joins at this layer, with the residual of the base.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from transformer_lens_rome.model import passes
from transformer_lens_rome.model.protocol import Model


class BlockCall(NamedTuple):
    """One call of a block: the block, the residual, and the other arguments."""

    block: Any
    residual: Float[Tensor, "row pos d_model"]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Recording(NamedTuple):
    """The calls of a model's last blocks in one pass, to be repeated.

    Attributes:
        layer: The layer of the first call.
        calls: The calls in order.
        cache: Keys and values of the earlier tokens; None if there are none.
        passed: The copy of the cache that was an argument of the calls.
    """

    layer: int
    calls: list[BlockCall]
    cache: Any
    passed: Any

    def replay(self, joining: Mapping[int, int]) -> Float[Tensor, "variant_row pos d_model"]:
        """Return the residual after the last block, for all variants.

        The variants differ through hooks that the caller has set.

        Args:
            joining: The number of variants that join at each layer.
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
                own_cache = cache if variants == 1 else _copy_of(self.cache, layer, variants)
                args, kwargs = self._arguments(call, own_cache, variants)
                with passes.cache_by_both_names([call.block]):
                    output = call.block(residual, *args, **kwargs)
                residual = output[0] if isinstance(output, tuple) else output
        return residual

    def _arguments(
        self, call: BlockCall, cache: Any, variants: int
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return a call's arguments for several variants, with a cache that may be changed."""
        rows = len(call.residual)

        def adapted(value: Any) -> Any:
            return cache if value is self.passed else _for_variants(value, rows, variants)

        return tuple(map(adapted, call.args)), {k: adapted(v) for k, v in call.kwargs.items()}


def _for_variants(value: Any, rows: int, variants: int) -> Any:
    """Repeat an argument for several variants if it has one entry per row.

    A tensor with one axis, or with a first axis of 1, applies to every row and is not repeated.
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
    """Return a copy of an object (keys and values of one layer) with its tensors repeated."""
    tensors = {k: v for k, v in getattr(value, "__dict__", {}).items() if isinstance(v, Tensor)}
    if tensors:
        value = copy.copy(value)
        for name, tensor in tensors.items():
            setattr(value, name, _repeated(tensor, times))
    return value


def _repeated(tensor: Tensor, times: int) -> Tensor:
    """Repeat a tensor several times along its first axis."""
    return tensor if times == 1 else tensor.repeat(times, *[1] * (tensor.ndim - 1))


def _copy_of(cache: Any, layer: int = 0, variants: int = 1) -> Any:
    """Return a copy of a cache, so that a pass can change the copy.

    The tensors are shared, as passes do not change them in place. For several variants, the keys
    and values of one layer are repeated.
    """
    new = copy.copy(cache)
    for name, items in list(vars(cache).items()) if cache is not None else ():
        if isinstance(items, list):
            copies = [item if isinstance(item, Tensor) else copy.copy(item) for item in items]
            if variants > 1 and layer < len(copies):
                entry = copies[layer]
                repeat = _repeated if isinstance(entry, Tensor) else _with_tensors_repeated
                copies[layer] = repeat(entry, variants)
            setattr(new, name, copies)
    return new


@torch.no_grad()
def record(
    model: Model,
    layer: int,
    tokens: Int[Tensor, "row new"],
    mask: Int[Tensor, "row old_and_new"],
    cache: Any = None,
) -> Recording:
    """Run new tokens after cached ones, and record the calls of the blocks from `layer` on."""
    calls: list[BlockCall] = []

    def keep(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
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
