"""Measurements of an edit on its own prompt, stored with the edit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from transformer_lens_rome.files.fields import make
from transformer_lens_rome.showing import Shown


@dataclass(frozen=True)
class FactHealth:
    """Measurements of one fact of an edit that writes many.

    Attributes:
        subject_token: The token whose key the edit uses, as text.
        p_before, p_after: The model's probability of the target after the bare prompt.
        steps: The number of steps of the search.
        losses: The objective at the first and at the last step.
        clamp_hits: Steps after which delta was scaled back to the allowed norm.
        s: kᵀ G⁻¹ k at each edited layer: alone, the fact would absorb s / (1 + s) of its residual
            there (all of it in EMMET).
        residuals: ||z* - z|| before each edited layer was written, and after the last one.
        warnings: Problems that a user should check, as sentences.
    """

    subject_token: str
    p_before: float
    p_after: float
    steps: int
    losses: tuple[float, float]
    clamp_hits: int
    s: tuple[float, ...]
    residuals: tuple[float, ...]
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.residuals) != len(self.s) + 1:
            raise ValueError("a fact needs one residual before each layer, and one after the last")

    @property
    def absorbed(self) -> tuple[float, ...]:
        """Return the share of the whole residual that each layer absorbed."""
        whole = self.residuals[0] or 1.0
        pairs = zip(self.residuals[:-1], self.residuals[1:], strict=True)
        return tuple((before - after) / whole for before, after in pairs)


@dataclass(frozen=True)
class EditHealth(Shown):
    """Measurements that tell a good edit from a bad one.

    Attributes:
        subject_token: The token whose key the edit uses, as text.
        losses: The objective at every step of the optimisation.
        p_before, p_after: The model's probability of the target after the bare prompt.
        clamp_hits: Steps after which delta was scaled back to the allowed norm.
        relative_norm: ||delta W|| / ||W||, Frobenius, over all changed weights.
        rounding_error: Share of the change that rounding to the weights' dtype loses:
            ||W_after - W_before - delta W|| / ||delta W||.
        k_C_k: k̄ᵀ C⁻¹ k̄ with the mean key k̄ over prefixes: Eq. 2's denominator if k* is k̄.
        key_agreement: Cosine of the bare prompt's key and k̄.
        warnings: Problems that a user should check, as sentences.
        facts: If the edit writes many facts: the measurements of each, in the requests' order.
            Probabilities are then means over facts, and `clamp_hits` is the sum.
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
    facts: tuple[FactHealth, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON; without `facts` if there are none."""
        values = dataclasses.asdict(self)
        return values if self.facts else {k: v for k, v in values.items() if k != "facts"}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EditHealth:
        """Return the health that `to_dict` wrote, also from values read from JSON.

        Raises:
            ValueError: a value does not have the type of its field.
        """
        return make(cls, {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def said(health: EditHealth) -> Iterator[tuple[str, str]]:
    """Yield the name and text of each measured value; of the losses, the first and the last."""
    for name, value in health.to_dict().items():
        if name == "losses" and value:
            yield name, f"{value[0]:.3g} to {value[-1]:.3g} in {len(value)} steps"
        elif name == "facts":
            yield name, f"{len(value)}, each measured"
        elif name == "warnings":
            yield from (("warning", text) for text in value)
        elif isinstance(value, float):
            yield name, f"{value:.4g}"
        elif value not in (None, (), ""):
            yield name, str(value)
