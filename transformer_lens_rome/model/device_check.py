"""Compare a device with the CPU once, before a model first runs on it.

Some versions of torch compute wrong logits on some devices, without an error (TransformerLens issue
1178, on MPS). Of each device, the first, the middle and the last block, and the unembedding of some
tokens, get the residuals of a short pass once more, as copies on the CPU.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from transformer_lens_rome.model import block_calls, passes, users_hooks
from transformer_lens_rome.model.block_calls import BlockCall
from transformer_lens_rome.model.protocol import Model
from transformer_lens_rome.model.self_check import UNABLE

logger = logging.getLogger(__name__)

N_TOKENS, N_UNEMBEDDED = 8, 1024


class Compared(NamedTuple):
    """A part of a model that ran on its device and on the CPU.

    Attributes:
        part: The part, in words.
        device: The part's device.
        size: The size of the difference; 1 is the largest that rounding explains.
    """

    part: str
    device: torch.device
    size: float


def compare_with_cpu(model: Model) -> None:
    """Log a warning if a device of the model computes something else than the CPU.

    Nothing happens on a CPU, on a device that was compared before, and while the user has hooks on
    the model, which would see the passes on the CPU. What cannot be compared is logged as such, and
    is not tried again.
    """
    known: set[torch.device] = vars(model).setdefault("_rome_devices", set())
    new = _devices(model) - known
    if not new or users_hooks.has_hooks(model):
        return
    known |= new
    wrong: list[Compared] = []
    try:
        wrong.extend(found for found in compared(model, new) if not found.size < 1)
    except (*UNABLE, copy.Error) as fault:  # also too little memory: this is only a check
        logger.info("not all of %s was compared with the CPU: %s", _named(new), fault)
    if wrong:
        logger.warning(
            "%s gives other results than the CPU for %s: the difference is %.0f times what "
            "rounding explains. Edits and traces on this device may be wrong; move the model with "
            'model.to("cpu"), or use another version of torch',
            _named({found.device for found in wrong}),
            ", ".join(found.part for found in wrong),
            max(found.size for found in wrong),
        )


@torch.no_grad()
def compared(model: Model, devices: set[torch.device]) -> Iterator[Compared]:
    """Yield the comparison of each part that is on one of the devices."""
    tokens = torch.arange(1, 1 + N_TOKENS)[None] % model.cfg.d_vocab
    calls = block_calls.record(model, 0, tokens, torch.ones_like(tokens)).calls
    for device in sorted(devices, key=str):
        mine = [i for i, call in enumerate(calls) if call.residual.device == device]
        for layer in sorted({mine[0], mine[len(mine) // 2], mine[-1]}) if mine else ():
            here, there = _both_ways(calls[layer])
            size = _size(here, there, calls[layer].residual.cpu())
            yield Compared(f"layer {layer}", device, size)
    weight = passes.unembedding(model).weight[:, :N_UNEMBEDDED]
    if weight.device in devices:
        x = calls[-1].residual.to(weight.device, weight.dtype)
        here, there = (x @ weight).cpu(), x.cpu() @ weight.cpu()
        yield Compared("the unembedding", weight.device, _size(here, there, 0 * there))


def _devices(model: Model) -> set[torch.device]:
    """Return the devices of the weights, less the CPU and those that compute nothing."""
    found = {parameter.device for parameter in model.parameters()}
    return {device for device in found if device.type not in ("cpu", "meta")}


def _named(devices: set[torch.device]) -> str:
    return ", ".join(sorted(map(str, devices)))


def _both_ways(call: BlockCall) -> tuple[Tensor, Tensor]:
    """Return the output of a block on its device, and of its copy on the CPU.

    The device comes last: a bridge's block keeps what its last pass read.
    """
    own = (call.residual, *call.args), call.kwargs
    args, kwargs = tree_map(lambda x: x.cpu() if isinstance(x, Tensor) else x, own)
    there = _copy_on_cpu(call.block)(*args, **kwargs)
    here = call.block(call.residual, *call.args, **call.kwargs)
    return _output(here).cpu(), _output(there)


def _copy_on_cpu(module: nn.Module) -> nn.Module:
    """Return a copy of a module in main memory; its device holds no second one meanwhile."""
    memo: dict[int, Any] = {}
    for part in module.modules():
        own = [*part._parameters.values(), *part._buffers.values(), *vars(part).values()]
        for tensor in own:
            if isinstance(tensor, Tensor) and id(tensor) not in memo:
                moved = tensor.detach().to("cpu", copy=True)
                is_weight = isinstance(tensor, nn.Parameter)
                memo[id(tensor)] = nn.Parameter(moved, requires_grad=False) if is_weight else moved
    return copy.deepcopy(module, memo)


def _output(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def _size(here: Tensor, there: Tensor, residual: Tensor) -> float:
    """Return the norm of the difference, where 1 is the largest that rounding explains.

    That is a share of what a part adds to its residual, and some rounding steps of the residual.
    """
    share = 1e-3 if there.dtype in (torch.float32, torch.float64) else 0.05
    step = torch.finfo(there.dtype).eps
    here, there, residual = here.float(), there.float(), residual.float()
    most = share * (there - residual).norm() + 4 * step * residual.norm()
    return ((here - there).norm() / most).item()
