"""The edit of a record, which may have several facts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from transformer_lens_rome.edits.kinds import Edit, EditRequest
from transformer_lens_rome.edits.ledger import applied
from transformer_lens_rome.edits.several import SeveralEdits
from transformer_lens_rome.model.protocol import Model


def edit_of(method: Any, model: Model, requests: Sequence[EditRequest], *, seed: int = 0) -> Edit:
    """Return one edit that writes some facts: together if the method can, else in sequence.

    Args:
        method: An `EditMethod`. If it has `compute_many`, it gets all facts at once.
        model: The model, which is left as it was.
        requests: The facts, at least one. In sequence, the edit of each is made on the model with
            the edits of the earlier ones on it.
        seed: The seed of the method's draws.

    Raises:
        ValueError: The method cannot write a fact.
    """
    if len(requests) == 1:
        return method.compute(model, requests[0], seed=seed)
    if hasattr(method, "compute_many"):
        return method.compute_many(model, list(requests), seed=seed)
    parts: list[Edit] = []
    with ExitStack() as undo:
        for request in requests:
            if parts:
                undo.enter_context(applied(model, parts[-1]))
            parts.append(method.compute(model, request, seed=seed))
    return SeveralEdits.of(parts)
