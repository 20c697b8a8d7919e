"""Run this package's code under torch's defaults, and in one thread at a time.

Some states of torch, of a thread or of the process, change the results of the same code: autocast,
inference mode, the default dtype and device, the precision of float32 products. This package
computes under torch's defaults, so its results do not depend on these states. The caller's states
are restored when a function returns or raises.

Two states are not set here. torch's global random state is never used, and each computation turns
gradients on or off as it needs them.

Hooks belong to a model and states to the process, not to a thread. So a second thread that calls a
function of this package waits until the first call has returned. To run models in parallel, use
processes: `workers=`.
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
    """Within this context: no autocast, no inference mode, float32, CPU, full matmul precision."""
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
    """Make float32 the default dtype; return a function that restores the caller's."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    return lambda: torch.set_default_dtype(before)


def _matmul_precision() -> Callable[[], None]:
    """Compute float32 products in full precision; return a function that restores the caller's."""
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # the caller set one backend only, and torch then cannot read it
        cuda, mkldnn = torch.backends.cuda, torch.backends.mkldnn
        backends = (
            cuda.matmul,
            mkldnn.matmul,  # type: ignore[attr-defined]  # set at run time, not known to mypy
        )
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
