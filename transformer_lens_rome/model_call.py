"""What holds while a public function runs a model: torch's own defaults, and no second thread.

Hooks belong to a model and not to a thread, so a second thread that calls a function on the same
model waits until the first one has returned.
"""

from __future__ import annotations

import functools
import inspect
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

from transformer_lens_rome import adapter
from transformer_lens_rome.torch_states import torch_defaults

logger = logging.getLogger(__name__)
P = ParamSpec("P")
R = TypeVar("R")


def model_call(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function that has a parameter `model` under torch's defaults, alone on that model."""
    place = list(inspect.signature(function).parameters).index("model")

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if "model" not in kwargs and place >= len(args):
            return function(*args, **kwargs)  # which says what is missing
        with alone_on(kwargs["model"] if "model" in kwargs else args[place]), torch_defaults():
            return function(*args, **kwargs)

    return call


@contextmanager
def alone_on(model: Any) -> Iterator[None]:
    """Keep other threads' calls on this model waiting until exit."""
    lock = vars(adapter.shared_part(model)).setdefault("_rome_lock", _Lock())
    if not lock.acquire(blocking=False):
        logger.info("waiting for another thread's call on this model to return")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


class _Lock:
    """A lock that one thread may take several times, and that copies of a model do not share."""

    def __init__(self) -> None:
        lock = threading.RLock()
        self.acquire, self.release = lock.acquire, lock.release

    def __reduce__(self) -> tuple[type[_Lock], tuple[()]]:
        return _Lock, ()
