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

from transformer_lens_rome import adapter, refusals
from transformer_lens_rome.torch_states import torch_defaults

logger = logging.getLogger(__name__)
P = ParamSpec("P")
R = TypeVar("R")


def model_call(function: Callable[P, R]) -> Callable[P, R]:
    """For a public function that runs its parameter `model`: it is `weights_call`, and more.

    The outermost call refuses a model that no function can run as it is now, see `check_model`.
    """
    return _alone(function, refusals.check_model)


def weights_call(function: Callable[P, R]) -> Callable[P, R]:
    """For a function that reads or writes the weights of its parameter `model`, and no more.

    It runs under torch's defaults and alone on that model.
    """
    return _alone(function, None)


def _alone(function: Callable[P, R], check: Callable[[Any], None] | None) -> Callable[P, R]:
    place = list(inspect.signature(function).parameters).index("model")

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if "model" not in kwargs and place >= len(args):
            return function(*args, **kwargs)  # which says what is missing
        model = kwargs["model"] if "model" in kwargs else args[place]
        with alone_on(model) as outermost, torch_defaults():
            if check and outermost:
                check(model)
            return function(*args, **kwargs)

    return call


@contextmanager
def alone_on(model: Any) -> Iterator[bool]:
    """Keep other threads' calls on this model waiting until exit; whether no call was on it."""
    lock = vars(adapter.shared_part(model)).setdefault("_rome_lock", _Lock())
    if not lock.acquire(blocking=False):
        logger.info("waiting for another thread's call on this model to return")
        lock.acquire()
    try:
        lock.depth += 1
        yield lock.depth == 1
    finally:
        lock.depth -= 1
        lock.release()


class _Lock:
    """A lock that one thread may take several times, and that copies of a model do not share."""

    def __init__(self) -> None:
        lock = threading.RLock()
        self.acquire, self.release, self.depth = lock.acquire, lock.release, 0

    def __reduce__(self) -> tuple[type[_Lock], tuple[()]]:
        return _Lock, ()
