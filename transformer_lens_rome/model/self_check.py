"""Whether a shortcut gives what the plain way gives: tried once on each model, on a few tokens.

Architectures differ in more ways than can be listed, and libraries below change. So what saves
passes is not taken on trust: the first use of it is compared with whole passes, and where they
differ the plain way is taken from then on, and the log says so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from transformer_lens_rome.model import adapter
from transformer_lens_rome.model.state import state_digest

logger = logging.getLogger(__name__)


def has_users_hooks(model: Any) -> bool:
    """Whether hooks of the user's own are on the model; said, as passes are whole ones then."""
    if found := adapter.has_hooks(model):
        logger.info("whole passes: the model has hooks, which may count positions")
    return found


_UNABLE = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, NameError),
    *(NotImplementedError, RuntimeError, TypeError, ValueError),
)
"""How hosts without caches, masks or positions fail. A user's interrupt or timeout is none."""


def forget_other_states(model: Any) -> None:
    """Forget what was tried on a model that computed in another way than it does now."""
    digest, noted = state_digest(model), vars(model).get("_rome_trials")
    if noted and noted.get(_STATE) != digest:
        noted.clear()
    vars(model).setdefault("_rome_trials", {})[_STATE] = digest


_STATE = "state of the model"


def holds(model: Any, instead: str, error: Callable[[], float]) -> bool:
    """Whether a shortcut holds for a model: tried once, noted on the model, said if it fails.

    It is tried again when something that decides how the model computes is another, see
    `forget_other_states`.

    Args:
        model: A HookedTransformer or TransformerBridge.
        instead: What is done where it does not hold; the name of the trial.
        error: By how much the shortcut is wrong; 0 if rounding explains it.
    """
    trials = model.__dict__.setdefault("_rome_trials", {})
    if instead not in trials:
        try:
            with torch.no_grad():
                found = error()
            reason = f"results differ by {found:.1e}" if found else ""
        except (MemoryError, torch.cuda.OutOfMemoryError):
            raise  # which says nothing of the model
        except _UNABLE as fault:
            reason = f"{type(fault).__name__}: {fault}"
        if reason:
            logger.warning("%s for %s, slower: %s", instead, adapter.architecture(model), reason)
        trials[instead] = not reason
    return trials[instead]


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference relative to the largest entry; 0 if rounding explains it."""
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    return 0.0 if error < max(1e-3, 16 * torch.finfo(expected.dtype).eps) else error
