"""What an edit did to its own prompt, in numbers, as part of the edit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from transformer_lens_rome.files.fields import make
from transformer_lens_rome.showing import Shown


@dataclass(frozen=True)
class EditHealth(Shown):
    """What an edit did, in numbers that tell a good one from a bad one.

    Attributes:
        subject_token: The token whose key was written, as text.
        losses: The objective at every step of the optimisation.
        p_before, p_after: Probability of the target after the bare prompt, on the model itself.
        clamp_hits: Steps after which delta was pulled back to the allowed norm.
        relative_norm: ||delta W|| / ||W||, Frobenius, over all weights that change.
        rounding_error: What rounding to the weights' dtype loses of this change, as a share of it:
            ||W_after - W_before - delta W|| / ||delta W||.
        k_C_k: k̄ᵀ C⁻¹ k̄ with the mean key k̄ over prefixes: Eq. 2's denominator where k* is k̄.
        key_agreement: Cosine of the bare prompt's key and k̄.
        warnings: What a user should look at, in words.
    """

    subject_token: str = ""
    losses: tuple[float, ...] = ()
    p_before: float | None = None
    p_after: float | None = None
    clamp_hits: int = 0
    relative_norm: float | None = None
    rounding_error: float | None = None
    k_C_k: float | None = None
    key_agreement: float | None = None
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EditHealth:
        """The inverse of `to_dict`, also after a round through JSON.

        Raises:
            ValueError: a value of another type than its field's.
        """
        return make(cls, {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def said(health: EditHealth) -> Iterator[tuple[str, str]]:
    """Names and values of what was measured, in words; the losses as first and last."""
    for name, value in health.to_dict().items():
        if name == "losses" and value:
            yield name, f"{value[0]:.3g} to {value[-1]:.3g} in {len(value)} steps"
        elif name == "warnings":
            yield from (("warning", text) for text in value)
        elif isinstance(value, float):
            yield name, f"{value:.4g}"
        elif value not in (None, (), ""):
            yield name, str(value)
