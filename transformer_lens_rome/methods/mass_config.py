"""The constants of MEMIT, EMMET and AlphaEdit; `memit` lists where they depart from the papers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple

from transformer_lens_rome.methods.rome_config import SearchConfig
from transformer_lens_rome.model import refusals
from transformer_lens_rome.model.adapter import short_name
from transformer_lens_rome.model.calls import model_call
from transformer_lens_rome.model.default_layer import default_layer, norm_follows_mlp
from transformer_lens_rome.model.protocol import Model

logger = logging.getLogger(__name__)

Solve = Literal["memit", "emmet", "alphaedit"]
"""The closed forms of the family; see `mass_solve`."""


@dataclass(frozen=True)
class MemitConfig(SearchConfig):
    """The constants of an edit of many facts; those of the search are explained at `SearchConfig`.

    A field that a closed form does not have is not used: λ in AlphaEdit, the slack outside EMMET,
    the null space outside AlphaEdit.

    Attributes:
        steps: As in `SearchConfig`.
        clamp: As in `SearchConfig`, in units of the norm of the residual after the last edited
            block. If a norm follows the MLP: of the value's norm.
        stop: As in `SearchConfig`; "top" is ENCORE's stop, see `top_steps`.
        top_steps: With stop="top": the number of steps, one after another, at which the target is
            on top.
        covariance_weight: λ, the weight of C. None: d_mlp, with which a key of the corpus absorbs
            half of its residual on average; in the released variant 15,000.
        norm_weight: The weight of the squared norm of the change: ENCORE's μ in MEMIT and EMMET
            (None: 0), L2 in AlphaEdit (None: tr(P C), with which a key of the corpus absorbs half
            of its residual on average; in the released variant 10).
        slack: ε of EMMET, by which the facts may miss their targets; in units of the mean of
            diag(Kᵀ G⁻¹ K). In the released variant it is absolute, and 0 for a single fact.
        threshold: AlphaEdit: the largest eigenvalue of C that belongs to the null space. None: by
            `null_fraction`; in the released variant 0.02.
        null_fraction: AlphaEdit: the dimension of the null space, rank(P) / d_mlp.
        anchor: NAS: the norm to which the value at the subject is scaled (`mean_value_norm`). None:
            it is not scaled.
        history_keys: The keys that later batches preserve: "after" takes them from the model with
            all layers of the batch edited, "solved" are those of the solve (ENCORE).
        variant: "consistent" measures keys and residuals on the same prefixes with the same
            weights, and counts every prefix in the stop. "released" measures residuals on the bare
            prompt, and ENCORE's stop leaves out the first prefix and adds up steps that do not
            follow each other, as the published programs do.
        prefix_length: The length in tokens of each of the sampled prefixes.
    """

    steps: int = 25
    clamp: float | None = 0.75
    stop: Literal["loss", "top"] = "loss"
    top_steps: int = 1
    covariance_weight: float | None = None
    norm_weight: float | None = None
    slack: float = 0.0
    threshold: float | None = None
    null_fraction: float = 0.5
    anchor: float | None = None
    history_keys: Literal["after", "solved"] = "after"
    variant: Literal["consistent", "released"] = "consistent"
    prefix_length: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.history_keys not in ("after", "solved"):
            raise ValueError(f"history_keys must be 'after' or 'solved', got {self.history_keys!r}")
        if self.variant not in ("consistent", "released"):
            raise ValueError(f"variant must be 'consistent' or 'released', got {self.variant!r}")
        if self.clamp is None:
            raise ValueError("clamp must be positive, got None")
        self._check_positive("top_steps", "covariance_weight", "threshold", "anchor")
        self._check_positive("prefix_length")
        self._check_not_negative("norm_weight", "slack")
        if not 0 < self.null_fraction < 1:
            raise ValueError(f"null_fraction must be between 0 and 1, got {self.null_fraction}")

    @classmethod
    def released(
        cls,
        *,
        of: str = "gpt-j-6b",
        covariance_weight: float | None = None,
        norm_weight: float | None = None,
        slack: float = 0.1,
        threshold: float = 0.02,
        top_steps: int | None = None,
        anchor: float | None = None,
    ) -> MemitConfig:
        """Return the constants of the published programs.

        Args:
            of: The model whose steps, learning rate and λ are taken, from `PUBLISHED`.
            covariance_weight: λ. None: that of the model.
            norm_weight: ENCORE's μ, or L2 of AlphaEdit.
            slack: ε of EMMET, absolute.
            threshold: The largest singular value of AlphaEdit's null space, absolute.
            top_steps: |cutoff| of ENCORE, whose rule for the history is then taken too. None: the
                other programs.
            anchor: NAS's mean norm.
        """
        if of not in PUBLISHED:
            raise ValueError(f"no published constants of {of!r}; there are {sorted(PUBLISHED)}")
        known = PUBLISHED[of]
        return cls(
            steps=known.steps,
            lr=known.lr,
            stop="loss" if top_steps is None else "top",
            top_steps=top_steps or 1,
            covariance_weight=covariance_weight or known.covariance_weight,
            norm_weight=norm_weight,
            slack=slack,
            threshold=threshold,
            anchor=anchor,
            history_keys="after" if top_steps is None else "solved",
            variant="released",
        )


class Published(NamedTuple):
    """The constants of a model in the published configurations."""

    layers: tuple[int, ...]
    steps: int
    lr: float
    covariance_weight: float


_LLAMA_3 = Published((4, 5, 6, 7, 8), 25, 0.1, 15_000)
_LLAMA_2 = Published((4, 5, 6, 7, 8), 25, 0.5, 15_000)
_QWEN_2_5 = Published((7, 8, 9, 10, 11), 25, 0.1, 15_000)
PUBLISHED: Mapping[str, Published] = MappingProxyType(
    {
        "gpt2-xl": Published((13, 14, 15, 16, 17), 20, 0.5, 20_000),
        "gpt-j-6b": Published((3, 4, 5, 6, 7, 8), 25, 0.5, 15_000),
        "meta-llama-3-8b": _LLAMA_3,
        "meta-llama-3-8b-instruct": _LLAMA_3,
        "llama-2-7b-hf": _LLAMA_2,
        "qwen2.5-7b": _QWEN_2_5,
        "qwen2.5-7b-instruct": _QWEN_2_5,
    }
)
"""MEMIT's repository (GPT), AlphaEdit's (Llama 3), ENCORE's (Llama 2), NAS's (Qwen)."""


@model_call
def default_layers(model: Model) -> tuple[int, ...]:
    """Return the layers that many facts are written into: published ones, or from the shape.

    The rule is five layers that end at three tenths of the depth, as the published ones end between
    0.25 (Llama 3) and 0.39 (Qwen 2.5) of it. If a norm follows the MLP, it is the one layer of
    `default_layer`.
    """
    name, n_layers = short_name(model), model.cfg.n_layers
    if name in PUBLISHED and max(PUBLISHED[name].layers) < n_layers:
        logger.info("layers %s, the published ones of %s", PUBLISHED[name].layers, name)
        return PUBLISHED[name].layers
    last = max(0, 3 * n_layers // 10)
    refusals.check_editable(model, [last])
    if norm_follows_mlp(model, last):
        return (default_layer(model),)
    layers = tuple(range(max(0, last - 4), last + 1))
    logger.warning(
        "no layers are known to be good for %s: using layers %d to %d of %d, a guess from the "
        "model's shape; pass layers= for others",
        name,
        layers[0],
        layers[-1],
        n_layers,
    )
    return layers


def check_layers(model: Model, layers: tuple[int, ...]) -> bool:
    """Check the layers of an edit; return whether a norm follows the MLP in them.

    Raises:
        ValueError: There are none, they are not in ascending order, or one cannot be edited.
        NotImplementedError: There are several, and a norm follows the MLP.
    """
    refusals.check_editable(model, layers)
    if not layers or list(layers) != sorted(set(layers)):
        raise ValueError(f"layers must be different, in ascending order, got {list(layers)}")
    normed = any(norm_follows_mlp(model, layer) for layer in layers)
    if normed and len(layers) > 1:
        raise NotImplementedError(
            f"a norm follows the MLP of this model, so a change of the value by R does not change "
            f"the residual by R, and several layers cannot share one residual; pass one layer, for "
            f"instance layers=[{default_layer(model)}]"
        )
    return normed
