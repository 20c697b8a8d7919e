"""Measure the effect of an edit on the model, and warn about signs of a bad edit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from transformer_lens_rome.edits.base_bytes import live_weight
from transformer_lens_rome.edits.in_passes import score_edited
from transformer_lens_rome.edits.kinds import Edit, EditHealth
from transformer_lens_rome.model.protocol import Model
from transformer_lens_rome.prompts.encoder import Encoder, Row
from transformer_lens_rome.prompts.scores import TargetScore, score_rows

_ROWS = 1024  # rows of a matrix that are converted to float64 at a time


class Measured(NamedTuple):
    """The bare prompt as a row, its score before the edit, and the edit's measurements."""

    bare: Row
    before: TargetScore
    health: EditHealth


def measured(model: Model, encoder: Encoder, edit: Edit) -> EditHealth:
    """Measure any edit: the target's probability before and after, and the size of the change."""
    return measured_each(model, encoder, [edit])[0].health


def measured_each(model: Model, encoder: Encoder, edits: Sequence[Edit]) -> list[Measured]:
    """Measure independent edits, each on the model as it is now; see `measured`."""
    bare = [
        encoder.templated_row(request.prompt, request.subject, target=request.target_new)
        for request in (edit.request for edit in edits)
    ]
    before = score_rows(model, bare)
    after = score_edited(model, bare, edits, range(len(edits)))
    each = []
    for edit, *score in zip(edits, before, after, strict=True):
        p_before, p_after = (one.log_probs.sum().exp().item() for one in score)
        norm, error, warnings = size_of_change(model, edit)
        health = EditHealth(
            p_before=p_before,
            p_after=p_after,
            relative_norm=norm,
            rounding_error=error,
            warnings=warnings,
        )
        each.append(health)
    return list(map(Measured, bare, before, each))


@torch.no_grad()
def size_of_change(model: Model, edit: Edit) -> tuple[float | None, float, tuple[str, ...]]:
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
