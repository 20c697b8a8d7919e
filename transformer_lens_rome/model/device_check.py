"""Compare a device with the CPU once, before a model's first edit or trace on it.

Some versions of torch compute wrong logits on some devices, without an error (TransformerLens issue
1178, on MPS). The first, the middle and the last block, and the unembedding of some tokens, get the
residuals of a short pass once more, with copies of their weights on the CPU.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from transformer_lens_rome.model import adapter, block_calls, passes, users_hooks
from transformer_lens_rome.model.faults import is_out_of_memory
from transformer_lens_rome.model.protocol import Model
from transformer_lens_rome.model.self_check import UNABLE

logger = logging.getLogger(__name__)

N_TOKENS, N_UNEMBEDDED = 8, 1024


def compare_with_cpu(model: Model) -> None:
    """Log a warning if a device of the model computes something else than the CPU.

    Nothing happens on a CPU, on a device that was compared before, and while the user has hooks on
    the model, which would see the passes on the CPU.
    """
    compared: set[torch.device] = vars(model).setdefault("_rome_devices", set())
    new = _devices(model) - compared
    if not new or users_hooks.has_hooks(model):
        return
    names = ", ".join(sorted(map(str, new)))
    try:
        wrong = {part: size for part, size in errors(model) if not size < _rounding(model)}
    except UNABLE as fault:
        if is_out_of_memory(fault):
            raise
        logger.info("%s is not compared with the CPU: %s", names, fault)
    else:
        if wrong:
            logger.warning(
                "%s gives other results than the CPU for %s: they differ by %.0e, relative, and "
                "rounding explains %.0e. Edits and traces on this device may be wrong; move the "
                'model with model.to("cpu"), or use another version of torch',
                names,
                ", ".join(wrong),
                max(wrong.values()),
                _rounding(model),
            )
    compared |= new


@torch.no_grad()
def errors(model: Model) -> Iterator[tuple[str, float]]:
    """Yield how far each compared part is from the same part on the CPU, relative to the latter.

    For a block, this is the norm of the difference over the norm of what the block adds.
    """
    tokens = torch.arange(1, 1 + N_TOKENS)[None] % model.cfg.d_vocab
    calls = block_calls.record(model, 0, tokens, torch.ones_like(tokens)).calls
    for layer in sorted({0, len(calls) // 2, len(calls) - 1}):
        block, residual, args, kwargs = calls[layer]
        last = _output(block(residual, *args, **kwargs))
        there = _output(_called_on_cpu(block, (residual, *args), kwargs))
        yield f"layer {layer}", _relative(last.cpu(), there, residual.cpu())
    columns = passes.unembedding(model).weight[:, :N_UNEMBEDDED].to(last.dtype)
    there = _called_on_cpu(model.ln_final, (last,), {}) @ columns.cpu()
    yield "the unembedding", _relative((model.ln_final(last) @ columns).cpu(), there, 0.0)


def _devices(model: Model) -> set[torch.device]:
    """Return the devices of the weights, less the CPU and those that compute nothing."""
    found = {parameter.device for parameter in model.parameters()}
    return {device for device in found if device.type not in ("cpu", "meta")}


def _rounding(model: Model) -> float:
    """Return the largest relative error that is taken for rounding, TF32's among it."""
    return 0.02 if adapter.w_out(model, 0).dtype in (torch.float32, torch.float64) else 0.1


def _called_on_cpu(module: torch.nn.Module, args: tuple[Any, ...], kwargs: Any) -> Any:
    """Call a copy of a module on the CPU, with copies of the arguments."""
    args, kwargs = tree_map(lambda x: x.cpu() if isinstance(x, Tensor) else x, (args, kwargs))
    return copy.deepcopy(module).to("cpu")(*args, **kwargs)


def _output(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def _relative(here: Tensor, there: Tensor, base: Tensor | float) -> float:
    return ((here - there).float().norm() / (there - base).float().norm()).item()
