"""The constants of a ROME edit; `rome` lists where paper, released code and defaults differ."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Literal

from transformer_lens_rome.model.adapter import short_name
from transformer_lens_rome.model.calls import model_call
from transformer_lens_rome.model.default_layer import norm_follows_mlp
from transformer_lens_rome.model.protocol import Model
from transformer_lens_rome.prompts.sampling import PREFIX_LENGTHS

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SearchConfig:
    """The constants of a search for a vector that makes the model predict a target (`v_star`).

    Attributes:
        steps: Number of evaluations of the objective; there is one update fewer.
        lr: Adam's learning rate.
        clamp: Largest ||delta|| in units of the norm of the vector it is added to. None: a default
            of the method. Increase it if the target is not reached; decrease it if neighbouring
            facts change.
        weight_decay: Factor of ||delta|| / ||v||² in the objective.
        kl_factor: Factor of the KL term; a larger one preserves more of the subject's other facts.
        stop_loss: Stop as soon as the objective is below this.
        stop: "top" also stops as soon as every token of the target is the model's most probable one
            after every prefix. "loss" does not.
    """

    steps: int = 20
    lr: float = 0.5
    clamp: float | None = None
    weight_decay: float = 0.5
    kl_factor: float = 0.0625
    stop_loss: float = 5e-2
    stop: Literal["loss", "top"] = "top"

    def __post_init__(self) -> None:
        if self.stop not in ("loss", "top"):
            raise ValueError(f"stop must be 'loss' or 'top', got {self.stop!r}")
        self._check_positive("steps", "lr", "clamp")
        self._check_not_negative("weight_decay", "kl_factor", "stop_loss")

    def _check_positive(self, *names: str) -> None:
        """Raise ValueError for a field that is not positive; None stands for a default."""
        for name in names:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")

    def _check_not_negative(self, *names: str) -> None:
        """Raise ValueError for a field that is negative; None stands for a default."""
        for name in names:
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name} must not be negative, got {value}")


@dataclass(frozen=True)
class RomeConfig(SearchConfig):
    """The constants of an edit; those of the search are explained at `SearchConfig`.

    Attributes:
        clamp: As in `SearchConfig`, in units of the value's norm. None: the released constant, or
            less if a norm follows the MLP (`default_clamp`).
        stop: As in `SearchConfig`. The published code stops by "loss".
        prefixes_a_step: The largest number of prefixes on which a step computes the objective. The
            prefixes take turns in groups of like size, and both stops look at the last step of
            every group. None: all prefixes at each step, as the published code.
        ridge: Added to C's diagonal, in units of the diagonal's mean; 0 adds nothing.
        key: "mean" uses one k*, the mean over prefixes, in u and in Λ. "released" uses it in u only
            and the bare prompt's key and value in Λ, as the published code does.
        prefix_lengths: (tokens, number of texts) pairs for sampled prefixes.
    """

    prefixes_a_step: int | None = 7
    ridge: float = 0.0
    key: Literal["mean", "released"] = "mean"
    prefix_lengths: tuple[tuple[int, int], ...] = PREFIX_LENGTHS

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.key not in ("mean", "released"):
            raise ValueError(f"key must be 'mean' or 'released', got {self.key!r}")
        self._check_positive("prefixes_a_step")
        self._check_not_negative("ridge")

    @classmethod
    def released(cls, *, clamp: float | None = None, ridge: float = 0.0) -> RomeConfig:
        """Return the constants of the published code; `clamp=None` is 4, but 3 for GPT-2 medium."""
        search: dict[str, Any] = {"stop": "loss", "prefixes_a_step": None}
        return cls(clamp=clamp, ridge=ridge, key="released", **search)


CLAMPS = {"gpt2-medium": 3.0}
"""Clamps of the released configurations that are not 4."""


@model_call
def default_clamp(model: Model, layer: int) -> float:
    """Return the default clamp: the largest ||delta||, in units of the value's norm.

    It is the released 4 (3 for GPT-2 medium), or 0.75 if a norm follows the MLP. That norm
    saturates the effect of a larger value, but the change at every other key keeps growing.
    """
    normed = norm_follows_mlp(model, layer)
    clamp = 0.75 if normed else released_clamp(model)
    logger.info("clamp %s (%s norm after the MLP)", clamp, "a" if normed else "no")
    return clamp


def released_clamp(model: Model) -> float:
    """Return the published code's clamp for this model."""
    return CLAMPS.get(short_name(model), 4.0)
