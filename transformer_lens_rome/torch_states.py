"""torch's own defaults, while this package computes, and one thread at a time.

torch keeps states for a thread or for the whole process that change what the same code computes:
autocast, inference mode, the default dtype and device, the precision of float32 products. What this
package computes is the same in all of them, as it is computed under torch's defaults. The caller's
states are back when a function returns or raises.

Two states are left alone. Nothing is drawn from torch's global random state; and gradients are on
or off as a computation needs them.

Hooks belong to a model and states to the process, not to a thread. So a second thread that calls a
function of this package waits until the first one's has returned. What runs models side by side
are processes: `workers=`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch

logger = logging.getLogger(__name__)
_ONE_THREAD = threading.RLock()


@contextmanager
def torch_defaults() -> Iterator[None]:
    """No autocast, no inference mode, float32 and the CPU as defaults, full matmul precision."""
    if not _ONE_THREAD.acquire(blocking=False):
        logger.info("waiting for another thread's call to return")
        _ONE_THREAD.acquire()
    with ExitStack() as stack:
        stack.callback(_ONE_THREAD.release)
        for kind in ("cpu", "cuda", "mps", "xpu"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.callback(_default_dtype())
        stack.callback(_matmul_precision())
        yield


def _default_dtype() -> Callable[[], None]:
    """Make float32 the default; returns what sets the caller's again."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    return lambda: torch.set_default_dtype(before)


def _matmul_precision() -> Callable[[], None]:
    """Compute float32 products in full; returns what sets the caller's precision again."""
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # set for one backend, which this function of torch's refuses to read
        backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
        each = [(backend, backend.fp32_precision) for backend in backends]
        for backend in backends:
            backend.fp32_precision = "ieee"

        def restore() -> None:
            for backend, precision in each:
                backend.fp32_precision = precision

        return restore
    if before == "highest":
        return lambda: None
    torch.set_float32_matmul_precision("highest")
    return lambda: torch.set_float32_matmul_precision(before)
