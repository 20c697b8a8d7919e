"""Tell faults of the device, such as too little memory, from errors of the work."""

from __future__ import annotations

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out; on a CPU torch raises a RuntimeError for this."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


def is_device_fault(error: BaseException) -> bool:
    """Return whether the device failed, or memory ran out; the work may succeed later."""
    kinds = getattr(torch, "AcceleratorError", ())
    return is_out_of_memory(error) or isinstance(error, kinds) or "CUDA error" in str(error)
