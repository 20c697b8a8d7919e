"""Measure the effect of an edit on the model, and warn about signs of a bad edit."""

from __future__ import annotations

import torch

from transformer_lens_rome.edits.base_bytes import live_weight
from transformer_lens_rome.edits.kinds import Edit, EditHealth
from transformer_lens_rome.edits.ledger import applied
from transformer_lens_rome.model.protocol import Model
from transformer_lens_rome.prompts.encoder import Encoder, Row
from transformer_lens_rome.prompts.scores import TargetScore, score_rows

_ROWS = 1024  # rows of a matrix that are converted to float64 at a time


def measured(model: Model, encoder: Encoder, edit: Edit) -> EditHealth:
    """Measure any edit: the target's probability before and after, and the size of the change."""
    return measured_row(model, encoder, edit)[2]


def measured_row(model: Model, encoder: Encoder, edit: Edit) -> tuple[Row, TargetScore, EditHealth]:
    """Return the bare prompt as a row, its score before the edit, and the edit's measurements."""
    request = edit.request
    bare = encoder.templated_row(request.prompt, request.subject, target=request.target_new)
    (before,) = score_rows(model, [bare])
    with applied(model, edit):
        (after,) = score_rows(model, [bare])
    relative_norm, rounding_error, warnings = _size(model, edit)
    health = EditHealth(
        p_before=before.log_probs.sum().exp().item(),
        p_after=after.log_probs.sum().exp().item(),
        relative_norm=relative_norm,
        rounding_error=rounding_error,
        warnings=warnings,
    )
    return bare, before, health


@torch.no_grad()
def _size(model: Model, edit: Edit) -> tuple[float | None, float, tuple[str, ...]]:
    """Return ||delta W|| / ||W|| over all changed weights, the rounding error, and warnings.

    They are computed for this edit alone, on the current weights.
    """
    weight, change, lost = 0.0, 0.0, 0.0
    for where, delta in edit.changes().items():
        whole = live_weight(model, where).detach()
        for old, more in zip(whole.split(_ROWS), delta.split(_ROWS), strict=True):
            wide, more = old.cpu().double(), more.cpu().double()  # not every device has float64
            weight += wide.square().sum().item()
            change += more.square().sum().item()
            after = (wide + more).to(old.dtype)
            lost += (after.double() - wide - more).square().sum().item()
    if not change:
        return 0.0, 0.0, ()
    error = (lost / change) ** 0.5
    warnings: tuple[str, ...] = ()
    if error > 0.1:
        warnings = (
            f"rounding to {str(whole.dtype).removeprefix('torch.')} loses {min(error, 1.0):.0%} of "
            "the change, which is too small for that dtype; load the model in float32",
        )
    return (change / weight) ** 0.5 if weight else None, error, warnings
