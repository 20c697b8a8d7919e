"""Health of an edit of many facts: what was absorbed of each, and warnings where nothing was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from transformer_lens_rome.edits.health import EditHealth, FactHealth
from transformer_lens_rome.edits.kinds import FactoredEdit
from transformer_lens_rome.edits.measure import size_of_change
from transformer_lens_rome.methods.mass_targets import Target
from transformer_lens_rome.methods.rome_health import moment_warnings
from transformer_lens_rome.model.protocol import Model
from transformer_lens_rome.prompts.encoder import Encoder, Row
from transformer_lens_rome.prompts.scores import TargetScore
from transformer_lens_rome.statistics.second_moment import SecondMoment

_ALIKE = 0.99
"""Keys with a larger cosine can hardly get different values."""


def fact_healths(
    encoder: Encoder,
    rows: Sequence[Row],
    targets: Sequence[Target],
    scores: tuple[Sequence[TargetScore], Sequence[TargetScore]],
    s: Float[Tensor, "layer n"],
    residuals: Float[Tensor, "one_more_than_layers n"],
) -> list[FactHealth]:
    """Return the measurements of each fact.

    Args:
        encoder: Decodes the subject's token.
        rows: The bare prompt of each fact.
        targets: The result of its search.
        scores: The scores of its target, before the edit and after it.
        s: kᵀ G⁻¹ k at each layer.
        residuals: ||z* - z|| before each layer was written, and after the last.
    """
    facts = []
    for i, (row, target, before, after) in enumerate(zip(rows, targets, *scores, strict=True)):
        p_before, p_after = (one.log_probs.sum().exp().item() for one in (before, after))
        norms = tuple(residuals[:, i].tolist())
        facts.append(
            FactHealth(
                subject_token=encoder.tokenizer.decode([row.ids[row.subject[-1]]]),
                p_before=p_before,
                p_after=p_after,
                steps=len(target.losses),
                losses=(target.losses[0], target.losses[-1]),
                clamp_hits=target.clamp_hits,
                s=tuple(s[:, i].tolist()),
                residuals=norms,
                warnings=_suspicions(target.losses, norms, p_before, p_after, row.subject[-1] == 0),
            )
        )
    return facts


def _is_hardly_written(residuals: Sequence[float]) -> bool:
    """Return whether the layers absorbed less than a tenth of a residual."""
    return 0 < residuals[0] and residuals[-1] > 0.9 * residuals[0]


_NOT_FOUND = "the search did not lower the objective; try earlier layers, or a larger clamp"
_REMEDY = "put words before the subject, or lower λ (L2 of AlphaEdit)"


def _found_nothing(losses: Sequence[float]) -> bool:
    """Return whether a search ended about where it began, above the loss at which it stops."""
    return losses[-1] > 0.99 * losses[0] and len(losses) > 1


def _suspicions(
    losses: Sequence[float],
    residuals: Sequence[float],
    p_before: float,
    p_after: float,
    at_start: bool,
) -> tuple[str, ...]:
    """Return the warnings for a fact."""
    warnings = []
    if _is_hardly_written(residuals):
        why = "; its subject is the first token, where keys say little" if at_start else ""
        share = 1 - residuals[-1] / residuals[0]
        warnings.append(f"the layers absorbed {share:.0%} of its residual{why}; {_REMEDY}")
    if _found_nothing(losses):
        warnings.append(_NOT_FOUND)
    if p_after < p_before:
        warnings.append("its target is less probable after the edit than before")
    return tuple(warnings)


def _summary(edit: FactoredEdit, facts: Sequence[FactHealth]) -> list[str]:
    """Return one warning for each kind, which names the first facts that it is about."""
    signs = {
        f"the layers absorbed less than a tenth of their residual; {_REMEDY}": [
            _is_hardly_written(fact.residuals) for fact in facts
        ],
        _NOT_FOUND: [_found_nothing(fact.losses) for fact in facts],
        "their target is less probable after the edit than before": [
            fact.p_after < fact.p_before for fact in facts
        ],
    }
    warnings = []
    for sign, each in signs.items():
        about = [f"{r.text!r:.80}" for r, so in zip(edit.requests, each, strict=True) if so]
        if about:
            names = ", ".join(about[:3]) + (", ..." if len(about) > 3 else "")
            warnings.append(f"{len(about)} of {len(facts)} facts ({names}): {sign}")
    return warnings


def health_of(
    model: Model,
    edit: FactoredEdit,
    facts: Sequence[FactHealth],
    keys: Mapping[int, Float[Tensor, "d_mlp n"]],
    moments: Mapping[int, SecondMoment],
) -> EditHealth:
    """Return the health of the whole edit; the model must be without it.

    Args:
        model: The model.
        edit: The edit.
        facts: The measurements of each fact.
        keys: K of each layer.
        moments: The statistics of each layer.
    """
    norm, error, warnings = size_of_change(model, edit)
    each = [warning for moment in moments.values() for warning in moment_warnings(moment)]
    return EditHealth(
        p_before=fmean(fact.p_before for fact in facts),
        p_after=fmean(fact.p_after for fact in facts),
        clamp_hits=sum(fact.clamp_hits for fact in facts),
        relative_norm=norm,
        rounding_error=error,
        warnings=(*warnings, *dict.fromkeys(each), *_alike(edit, keys), *_summary(edit, facts)),
        facts=tuple(facts),
    )


def _alike(edit: FactoredEdit, keys: Mapping[int, Float[Tensor, "d_mlp n"]]) -> list[str]:
    """Return a warning if two facts with different targets have nearly the same key."""
    first = normalize(keys[min(keys)], dim=0)
    cosines = (first.T @ first).triu(1)
    targets = [request.target_new for request in edit.requests]
    pairs = [
        (i, j) for i, j in torch.nonzero(cosines > _ALIKE).tolist() if targets[i] != targets[j]
    ]
    if not pairs:
        return []
    i, j = pairs[0]
    return [
        f"{len(pairs)} pairs of facts have keys with a cosine above {_ALIKE}, such as "
        f"{edit.requests[i].text!r:.80} and {edit.requests[j].text!r:.80}: their targets "
        "are averaged; write one of them"
    ]
