"""Decorators for public functions: torch's defaults, one thread, and a model that can run."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

from transformer_lens_rome.model import adapter, device_check, refusals
from transformer_lens_rome.model.protocol import Model
from transformer_lens_rome.model.self_check import forget_other_states
from transformer_lens_rome.torch_states import torch_defaults

P = ParamSpec("P")
R = TypeVar("R")


def model_call(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a public function that runs its parameter `model`.

    It does all that `weights_call` does. In addition the outermost call checks the model (see
    `check_model`), and discards the results of self-checks if the model has changed since (see
    `forget_other_states`).
    """
    return _called(function, _begin)


def weights_call(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function that only reads or writes the weights of its parameter `model`.

    The function runs under torch's defaults, and calls from other threads wait until it returns.
    """
    return _called(function, adapter.model_class)


def _called(function: Callable[P, R], begin: Callable[[Any], object]) -> Callable[P, R]:
    """Run a function under torch's defaults; the outermost call for a model calls `begin` first."""
    place = list(inspect.signature(function).parameters).index("model")

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if "model" not in kwargs and place >= len(args):
            return function(*args, **kwargs)  # raises the TypeError for the missing argument
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


def _begin(model: Model) -> None:
    """Check the model and its device, and discard results of self-checks of an earlier state."""
    refusals.check_model(model)
    device_check.compare_with_cpu(model)
    forget_other_states(model)


_RUNNING: ContextVar[frozenset[int]] = ContextVar("models of calls", default=frozenset())
