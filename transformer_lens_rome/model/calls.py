"""What holds while a public function runs a model: torch's own defaults, a model that can run."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

from transformer_lens_rome.model import adapter, refusals
from transformer_lens_rome.model.self_check import forget_other_states
from transformer_lens_rome.torch_states import torch_defaults

P = ParamSpec("P")
R = TypeVar("R")


def model_call(function: Callable[P, R]) -> Callable[P, R]:
    """For a public function that runs its parameter `model`: it is `weights_call`, and more.

    The outermost call refuses a model that cannot be run as it is now (see `check_model`), and
    forgets what was tried on a model that computed in another way.
    """
    return _called(function, _begin)


def weights_call(function: Callable[P, R]) -> Callable[P, R]:
    """For a function that reads or writes the weights of its parameter `model`, and no more.

    It runs under torch's defaults, and no other thread's call runs meanwhile.
    """
    return _called(function, adapter.model_class)


def _called(function: Callable[P, R], begin: Callable[[Any], Any]) -> Callable[P, R]:
    place = list(inspect.signature(function).parameters).index("model")

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if "model" not in kwargs and place >= len(args):
            return function(*args, **kwargs)  # which says what is missing
        model = kwargs["model"] if "model" in kwargs else args[place]
        with torch_defaults():
            if id(model) in _RUNNING.get():
                return function(*args, **kwargs)
            token = _RUNNING.set(_RUNNING.get() | {id(model)})
            try:
                begin(model)
                return function(*args, **kwargs)
            finally:
                _RUNNING.reset(token)

    return call


def _begin(model: Any) -> None:
    refusals.check_model(model)
    forget_other_states(model)


_RUNNING: ContextVar[frozenset[int]] = ContextVar("models of calls", default=frozenset())
