"""Is an edit sound? Measure what it did on the model, and say in words what looks wrong."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens_rome import adapter
from transformer_lens_rome.edits import Edit, EditHealth, RankOneEdit
from transformer_lens_rome.ledger import applied
from transformer_lens_rome.partial_forward import PartialForward
from transformer_lens_rome.prompts import Encoder, Row, TargetScore, score_rows
from transformer_lens_rome.second_moment import SecondMoment, cosine
from transformer_lens_rome.v_star import Optimised, read_keys_and_values

_ROWS = 1024  # of a matrix, taken to float64 at a time


def measure_health(
    model: Any,
    encoder: Encoder,
    edit: RankOneEdit,
    k_mean: Float[Tensor, "d_mlp"],
    found: Optimised,
    second_moment: SecondMoment,
) -> EditHealth:
    """Score the target on the bare prompt before and after, and compare the keys involved."""
    bare, before, health = _measured(model, encoder, edit)
    forward = PartialForward(model, edit.layer, [bare.ids], [bare.subject[-1]], cut=False)
    bare_key = read_keys_and_values(forward, edit.layer)[0][0].cpu()
    k_mean = k_mean.cpu()
    health = dataclasses.replace(
        health,
        subject_token=encoder.tokenizer.decode([bare.ids[bare.subject[-1]]]),
        losses=found.losses,
        clamp_hits=found.clamp_hits,
        k_C_k=(k_mean @ edit.u).item(),
        key_agreement=cosine(bare_key, k_mean),
    )
    warnings = _suspicions(edit, health, bool(before.correct.all()), second_moment)
    return dataclasses.replace(health, warnings=(*health.warnings, *warnings))


def measured(model: Any, encoder: Encoder, edit: Edit) -> EditHealth:
    """What can be said of any edit: the target before and after, and the size of the change."""
    return _measured(model, encoder, edit)[2]


def _measured(model: Any, encoder: Encoder, edit: Edit) -> tuple[Row, TargetScore, EditHealth]:
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
def _size(model: Any, edit: Edit) -> tuple[float | None, float, tuple[str, ...]]:
    """||delta W|| / ||W|| over all weights that change, the rounding error, and a warning.

    Of this edit alone, on the weights as they are now.
    """
    weight, change, lost = 0.0, 0.0, 0.0
    for where, delta in edit.changes().items():
        whole = adapter.parameter(model, where).detach()
        for old, more in zip(whole.split(_ROWS), delta.split(_ROWS), strict=True):
            wide, more = old.cpu().double(), more.cpu().double()  # not every device has float64
            weight += wide.square().sum().item()
            change += more.square().sum().item()
            after = (wide + more).to(old.dtype)
            lost += (after.double() - wide - more).square().sum().item()
    if not change:
        return 0.0, 0.0, ()
    error = (lost / change) ** 0.5
    warnings = ()
    if error > 0.1:
        warnings = (
            f"rounding to {str(whole.dtype).removeprefix('torch.')} loses {min(error, 1.0):.0%} of "
            "the change, which is too small for that dtype; load the model in float32",
        )
    return (change / weight) ** 0.5 if weight else None, error, warnings


def _suspicions(
    edit: RankOneEdit, health: EditHealth, known_before: bool, second_moment: SecondMoment
) -> list[str]:
    """What a user should look at before trusting an edit, and what to do about it."""
    found = []
    if known_before:
        found.append("the model's top prediction was the target already; there was little to edit")
    if health.p_after < 0.1 or health.p_after < health.p_before:
        found.append(
            f"the target's probability is {health.p_after:.3f} after the edit (it was "
            f"{health.p_before:.3f}); try another layer, a larger clamp or more steps"
        )
    if (health.relative_norm or 0.0) > 0.5:
        found.append(
            f"the change is {health.relative_norm:.2f} times the weight's norm and may damage "
            "other facts; collect a larger second moment or pass a ridge"
        )
    if health.key_agreement < 0.3:
        found.append(
            f"the bare prompt's key and k* agree only to {health.key_agreement:.2f} (cosine); a "
            "subject at the start of the prompt does that: check the bare prompt after the edit"
        )
    ratio = (edit.u @ edit.k_star).item() / health.k_C_k
    if ratio < 0.2:
        found.append(
            f"the bare key's part of the denominator is {ratio:.2f} of the mean key's, the mark of "
            'an edit that disables the model; RomeConfig(key="mean") avoids it'
        )
    agreement = second_moment.half_agreement
    if agreement is not None and agreement < 0.3:
        found.append(
            f"the second moment has not converged (half-sample agreement {agreement:.2f}); "
            f"collect more than its {second_moment.n_tokens} tokens"
        )
    elif agreement is None and _is_short(second_moment):
        found.append(
            f"the second moment has only {second_moment.n_tokens} tokens for its width of "
            f"{second_moment.d_mlp}; collect several times as many"
        )
    return found


def _is_short(second_moment: SecondMoment) -> bool:
    """Fewer than two tokens a dimension; the identity, which counts as one for each, is not."""
    tokens, width = second_moment.n_tokens, second_moment.d_mlp
    return tokens < 2 * width and tokens != width
