"""Limits on the damage that edits in sequence may do, and the check of each edit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Limit = Literal["finite", "one_edit", "all_edits"]
"""The limit that an edit exceeded: its NLL is not finite, or rose by more than a guard allows."""


@dataclass(frozen=True)
class Guard:
    """Limits on the damage that a sequence of edits may do to a model.

    Attributes:
        one_edit: Largest rise of the held-out NLL by one edit, nats a token.
        all_edits: Largest rise by all edits, over the unedited model, nats a token.
    """

    one_edit: float = 0.05
    all_edits: float = 0.2

    def __post_init__(self) -> None:
        if not (self.one_edit > 0 and self.all_edits > 0):
            raise ValueError(f"a guard's limits must be positive, got {self}")


@dataclass(frozen=True)
class Refusal:
    """Why an edit is undone.

    Attributes:
        limit: What the edit exceeded.
        reason: The same in words, with numbers.
    """

    limit: Limit
    reason: str


def refusal(guard: Guard | None, nll: float, last: float, first: float) -> Refusal | None:
    """Return why an edit is undone, from the held-out NLL in nats a token; None to keep it.

    `nll` is measured with this edit on the model, `last` before it, and `first` without any edit.
    """
    if not math.isfinite(nll):
        return Refusal("finite", f"held-out NLL is {nll}")
    one, every = nll - last, nll - first
    if guard and one > guard.one_edit:
        return Refusal("one_edit", _rose(one, "at once", guard.one_edit))
    if guard and every > guard.all_edits:
        return Refusal("all_edits", _rose(every, "in all", guard.all_edits))
    return None


def _rose(rise: float, when: str, most: float) -> str:
    return f"held-out NLL rose by {rise:.3f} nats {when}, more than {most}"
