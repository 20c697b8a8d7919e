"""Health of a ROME edit: compare the keys involved and warn about suspicious numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from transformer_lens_rome.edits.health import EditHealth
from transformer_lens_rome.edits.kinds import RankOneEdit
from transformer_lens_rome.edits.measure import measured_each
from transformer_lens_rome.methods.v_star import Optimised
from transformer_lens_rome.model.keys import read_keys_and_values
from transformer_lens_rome.model.partial_forward import PartialForward
from transformer_lens_rome.model.protocol import Model
from transformer_lens_rome.prompts.encoder import Encoder
from transformer_lens_rome.statistics.second_moment import SecondMoment, cosine


def measure_health(
    model: Model,
    encoder: Encoder,
    edits: Sequence[RankOneEdit],
    k_means: Sequence[Float[Tensor, "d_mlp"]],
    optimised: Sequence[Optimised],
    second_moment: SecondMoment,
) -> list[EditHealth]:
    """Score each target on the bare prompt before and after its edit, and compare the keys."""
    if not edits:
        return []
    each = measured_each(model, encoder, edits)
    bare = [one.bare for one in each]
    starts = [row.subject[-1] for row in bare]
    forward = PartialForward(model, edits[0].layer, [row.ids for row in bare], starts, cut=False)
    bare_keys = read_keys_and_values(forward, edits[0].layer)[0].cpu()
    healths = []
    for edit, (row, before, health), k_mean, found, bare_key in zip(
        edits, each, k_means, optimised, bare_keys, strict=True
    ):
        health = dataclasses.replace(
            health,
            subject_token=encoder.tokenizer.decode([row.ids[row.subject[-1]]]),
            losses=found.losses,
            clamp_hits=found.clamp_hits,
            k_C_k=(k_mean.cpu() @ edit.u).item(),
            key_agreement=cosine(bare_key, k_mean.cpu()),
        )
        warnings = _suspicions(edit, health, bool(before.correct.all()), second_moment)
        healths.append(dataclasses.replace(health, warnings=(*health.warnings, *warnings)))
    return healths


def _suspicions(
    edit: RankOneEdit, health: EditHealth, known_before: bool, second_moment: SecondMoment
) -> list[str]:
    """Return the warnings for an edit: what looks wrong, and what to do about it."""
    p_before, p_after, agreement = health.p_before, health.p_after, health.key_agreement
    k_C_k, relative_norm = health.k_C_k, health.relative_norm
    assert p_before is not None and p_after is not None
    assert k_C_k is not None and agreement is not None
    warnings = []
    if known_before:
        warnings.append(
            "the model's top prediction was the target already; there was little to edit"
        )
    if p_after < 0.1 or p_after < p_before:
        warnings.append(
            f"the target's probability is {p_after:.3f} after the edit (it was "
            f"{p_before:.3f}); try another layer, a larger clamp or more steps"
        )
    if relative_norm is not None and relative_norm > 0.5:
        warnings.append(
            f"the change is {relative_norm:.2f} times the weight's norm and may damage "
            "other facts; collect a larger second moment or pass a ridge"
        )
    if agreement < 0.3:
        warnings.append(
            f"the bare prompt's key and k* agree only to {agreement:.2f} (cosine), as happens when "
            "the prompt starts with the subject; check the bare prompt after the edit"
        )
    ratio = (edit.u @ edit.k_star).item() / k_C_k
    if ratio < 0.2:
        warnings.append(
            f"the bare key's part of the denominator is {ratio:.2f} of the mean key's; such an "
            'edit can disable the model; RomeConfig(key="mean") avoids it'
        )
    return warnings + moment_warnings(second_moment)


def moment_warnings(second_moment: SecondMoment) -> list[str]:
    """Return a warning if the second moment was collected from too few tokens."""
    agreement = second_moment.half_agreement
    if agreement is not None and agreement < 0.3:
        return [
            f"the second moment has not converged (half-sample agreement {agreement:.2f}); "
            f"collect more than its {second_moment.n_tokens} tokens"
        ]
    if agreement is None and _has_few_tokens(second_moment):
        return [
            f"the second moment has only {second_moment.n_tokens} tokens for its width of "
            f"{second_moment.d_mlp}; collect several times as many"
        ]
    return []


def _has_few_tokens(second_moment: SecondMoment) -> bool:
    """Return whether there are fewer than two tokens per dimension.

    The identity matrix counts as one token per dimension and is not reported.
    """
    tokens, width = second_moment.n_tokens, second_moment.d_mlp
    return tokens < 2 * width and tokens != width
