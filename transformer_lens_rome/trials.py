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

from transformer_lens_rome import adapter

logger = logging.getLogger(__name__)


def has_users_hooks(model: Any) -> bool:
    """Whether hooks of the user's own are on the model; said, as passes are whole ones then."""
    if found := adapter.has_hooks(model):
        logger.info("whole passes: the model has hooks, which may count positions")
    return found


def holds(model: Any, instead: str, error: Callable[[], float]) -> bool:
    """Whether a shortcut holds for a model: tried once, noted on the model, said if it fails.

    It is tried again when the model's dtype, device, attention or training flags are others.

    Args:
        model: A HookedTransformer or TransformerBridge.
        instead: What is done where it does not hold; the name of the trial.
        error: By how much the shortcut is wrong; 0 if rounding explains it.
    """
    trials = model.__dict__.setdefault("_rome_trials", {})
    trial = (instead, adapter.arithmetic(model))
    if trial not in trials:
        try:
            with torch.no_grad():
                found = error()
            reason = f"results differ by {found:.1e}" if found else ""
        except (MemoryError, torch.cuda.OutOfMemoryError):
            raise  # which says nothing of the model
        except Exception as fault:  # hosts without caches, masks or positions fail in many ways
            reason = f"{type(fault).__name__}: {fault}"
        if reason:
            logger.warning("%s for %s, slower: %s", instead, adapter.architecture(model), reason)
        trials[trial] = not reason
    return trials[trial]


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference relative to the largest entry; 0 if rounding explains it."""
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    return 0.0 if error < max(1e-3, 16 * torch.finfo(expected.dtype).eps) else error
