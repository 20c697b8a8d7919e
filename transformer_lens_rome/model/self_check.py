"""Test once per model, on a few tokens, whether a shortcut gives the results of whole passes.

Architectures differ in more ways than can be listed, and the libraries below this one change. So a
shortcut that saves passes is compared with whole passes before its first use. If the results
differ, whole passes are used from then on, and the log reports it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from transformer_lens_rome.model import adapter, users_hooks
from transformer_lens_rome.model.faults import is_out_of_memory
from transformer_lens_rome.model.protocol import Model
from transformer_lens_rome.model.state import state_digest

logger = logging.getLogger(__name__)


def has_users_hooks(model: Model) -> bool:
    """Return whether the user has set hooks on the model, and log that passes are whole then."""
    hooked = users_hooks.has_hooks(model)
    if hooked:
        logger.info("using whole passes, since the model has hooks, which may count positions")
    return hooked


UNABLE = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, NameError),
    *(NotImplementedError, RuntimeError, TypeError, ValueError),
)
"""The errors of a model that does not support caches, masks or positions.

A user's interrupt or timeout is not among them.
"""


def forget_other_states(model: Model) -> None:
    """Discard the results of self-checks if the model's state has changed since they ran."""
    digest, trials = state_digest(model), trials_of(model)
    if trials.get(_STATE) != digest:
        trials.clear()
    trials[_STATE] = digest


def trials_of(model: Model) -> dict[str, Any]:
    """Return what was found out about a model in its present state; the model stores it."""
    trials: dict[str, Any] = vars(model).setdefault("_rome_trials", {})
    return trials


_STATE = "state of the model"


def holds(model: Model, instead: str, error: Callable[[], float]) -> bool:
    """Return whether a shortcut is valid for a model.

    The shortcut is tested once per model; the result is cached on the model, and a failure is
    logged. It is tested again when the model's state has changed, see `forget_other_states`.

    Args:
        model: A HookedTransformer or TransformerBridge.
        instead: The alternative if the shortcut is not valid; also the key of the cached result.
        error: Function that returns the error of the shortcut; 0 if rounding explains it.
    """
    trials = trials_of(model)
    if instead not in trials:
        try:
            with torch.no_grad():
                size = error()
            reason = f"results differ by {size:.1e}" if size else ""
        except UNABLE as fault:
            if is_out_of_memory(fault):
                raise  # too little memory is no evidence against the shortcut
            reason = f"{type(fault).__name__}: {fault}"
        if reason:
            logger.warning(
                "%s for %s, which is slower: %s", instead, adapter.architecture(model), reason
            )
        trials[instead] = not reason
    return bool(trials[instead])


def difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference relative to the largest entry; 0 if rounding explains it."""
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    return 0.0 if error < max(1e-3, 16 * torch.finfo(expected.dtype).eps) else error
