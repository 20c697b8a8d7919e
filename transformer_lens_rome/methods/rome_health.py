"""Is a ROME edit sound? Compare its keys, and say in words what looks wrong."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxtyping import Float
from torch import Tensor

from transformer_lens_rome.edits.health import EditHealth
from transformer_lens_rome.edits.kinds import RankOneEdit
from transformer_lens_rome.edits.measure import measured_row
from transformer_lens_rome.methods.v_star import Optimised
from transformer_lens_rome.model.keys import read_keys_and_values
from transformer_lens_rome.model.partial_forward import PartialForward
from transformer_lens_rome.prompts.encoder import Encoder
from transformer_lens_rome.statistics.second_moment import SecondMoment, cosine


def measure_health(
    model: Any,
    encoder: Encoder,
    edit: RankOneEdit,
    k_mean: Float[Tensor, "d_mlp"],
    found: Optimised,
    second_moment: SecondMoment,
) -> EditHealth:
    """Score the target on the bare prompt before and after, and compare the keys involved."""
    bare, before, health = measured_row(model, encoder, edit)
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
