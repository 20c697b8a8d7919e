"""The results of causal traces: values to compare, tabulate, save and load."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens_rome.files.intervals import half_width
from transformer_lens_rome.files.result import Result
from transformer_lens_rome.showing import Shown, figure
from transformer_lens_rome.torch_states import torch_defaults
from transformer_lens_rome.tracing.kinds import check_kind
from transformer_lens_rome.tracing.patching import patching_result

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Metric = Literal["probability", "log_probability", "logit_diff"]


@dataclass(frozen=True, eq=False)
class CausalTrace(Result, Shown):
    """The effect of restoring each state of a corrupted run (Meng et al. 2022, section 2).

    Attributes:
        samples: The metric in each corrupted sample, by the restored layer (the centre of the
            window) and position.
        corrupted_samples: The same with nothing restored.
        p_clean: The metric without corruption.
        tokens: The prompt's tokens as text, with BOS if there is one.
        subject_positions: Positions of the subject's tokens, which are corrupted.
        answer: The text that the metric scores.
        kind: What was restored, a key of `KINDS`: "resid" one residual state, "mlp" and "attn" the
            outputs of a window of layers.
        window: The number of layers in a window; 1 for "resid".
        metric: "probability" of the whole answer, its "log_probability" in nats, or "logit_diff"
            against another answer.
        info: How the trace was made: model, prompt, options. Noise that is a tensor, or contains
            tensors, is stored by name only.
        top: For each run, the index in `top_tokens` of the token that the model ranks first after
            the prompt; None if the runs were not made (estimates).
        top_tokens: These tokens as text.
    """

    samples: Float[Tensor, "sample layer pos"]
    corrupted_samples: Float[Tensor, "sample"]
    p_clean: float
    tokens: tuple[str, ...]
    subject_positions: tuple[int, ...]
    answer: str
    kind: str
    window: int
    metric: Metric
    info: dict[str, Any]
    top: Int[Tensor, "sample layer pos"] | None = field(default=None, kw_only=True)
    top_tokens: tuple[str, ...] = field(default=(), kw_only=True)

    FORMAT: ClassVar[str] = "transformer_lens_rome.trace.1"

    def __post_init__(self) -> None:
        check_kind(self.kind)
        n, _, positions = self.samples.shape
        if (n, positions) != (len(self.corrupted_samples), len(self.tokens)):
            raise ValueError(f"axes do not fit: {tuple(self.samples.shape)}")
        at = self.subject_positions
        if not at or not self.samples.numel() or not all(0 <= p < positions for p in at):
            raise ValueError(f"there are no samples, or no subject among {positions} tokens: {at}")
        if self.top is not None:
            inside = ((self.top >= 0) & (self.top < len(self.top_tokens))).all()
            if self.top.shape != self.samples.shape or not inside:
                raise ValueError(f"the top tokens do not fit: {tuple(self.top.shape)}")

    def top_at(self, layer: int, position: int) -> list[tuple[str, int]]:
        """Return the tokens that the model ranks first with a cell restored, most frequent first.

        Each comes with the number of noise samples in which it does. Estimated traces have none.
        """
        if self.top is None:
            return []
        found = Counter(self.top[:, layer, position].tolist())
        return [(self.top_tokens[index], n) for index, n in found.most_common()]

    @property
    def scores(self) -> Float[Tensor, "layer pos"]:
        """Mean over samples."""
        return self.samples.mean(0)

    @property
    def p_corrupted(self) -> float:
        """The metric with nothing restored, the mean over samples."""
        return self.corrupted_samples.mean().item()

    @property
    def total_effect(self) -> float:
        """The loss due to corruption: p_clean - p_corrupted."""
        return self.p_clean - self.p_corrupted

    @property
    def indirect_effect(self) -> Float[Tensor, "layer pos"]:
        """The gain due to restoring: scores - p_corrupted."""
        return self.scores - self.p_corrupted

    @property
    @torch_defaults()
    def half_width(self) -> Float[Tensor, "layer pos"]:
        """Half the 95% interval of the indirect effect over the samples; NaN for one sample."""
        return _half_width(self.samples - self.corrupted_samples[:, None, None])

    @property
    def subject_last(self) -> int:
        """Position of the last subject token."""
        return self.subject_positions[-1]

    @torch_defaults()
    def to_dataframe(self) -> pd.DataFrame:
        """Return a pandas DataFrame with a row per cell: layer, position, token, score, error.

        "top_token" is the token that the model ranks first in most samples.
        """
        import pandas as pd

        n, layers, positions = self.samples.shape
        spread = self.samples.std(0) if n > 1 else torch.full((layers, positions), torch.nan)
        cells = [(layer, position) for layer in range(layers) for position in range(positions)]
        return pd.DataFrame(
            {
                "layer": [layer for layer, _ in cells],
                "position": [position for _, position in cells],
                "token": [self.tokens[position] for _, position in cells],
                "in_subject": [position in self.subject_positions for _, position in cells],
                "score": self.scores.flatten().tolist(),
                "standard_error": (spread / n**0.5).flatten().tolist(),
                "indirect_effect": self.indirect_effect.flatten().tolist(),
                "top_token": [next(iter(self.top_at(*cell)), (None,))[0] for cell in cells],
            }
        )

    def to_patching_result(self) -> Any:
        """Return the trace as a `transformer_lens.patching.PatchingResult` (TransformerLens 4).

        The batch axis is the samples, and the baseline is the corrupted run.
        """
        values = self.samples.permute(1, 2, 0)
        positions = range(values.shape[1])
        return patching_result(values, self.corrupted_samples, positions, self.metric)

    def plot(self, *, ax: Any = None) -> Figure:
        """Return a heat map as a matplotlib figure (the `plot` extra); see `viz.plot_trace`."""
        return figure(self, ax=ax)


Sever = Literal["mlp", "attn"]


class Severed(Result, Shown):
    """The base class of SeveredTrace and AverageSevered: both are plotted as bars."""

    def plot(self) -> Figure:
        """Return bars as a matplotlib figure (the `plot` extra); see `viz.plot_severed`."""
        return figure(self)


@dataclass(frozen=True, eq=False)
class SeveredTrace(Severed):
    """The effect of restoring the last subject token with a path cut.

    Attributes:
        ordinary: The answer's probability in each corrupted sample, by the restored layer.
        severed: The same, while the cut modules above keep their corrupted outputs at that token.
        corrupted_samples: The same with nothing restored.
        p_clean: The probability without corruption.
        sever: Which modules were cut: "mlp" or "attn".
        answer: The text whose probability is scored.
        info: How the trace was made: model, prompt, options. Noise that is a tensor, or contains
            tensors, is stored by name only.
    """

    ordinary: Float[Tensor, "sample layer"]
    severed: Float[Tensor, "sample layer"]
    corrupted_samples: Float[Tensor, "sample"]
    p_clean: float
    sever: Sever
    answer: str
    info: dict[str, Any]

    FORMAT: ClassVar[str] = "transformer_lens_rome.severed_trace.1"

    def __post_init__(self) -> None:
        check_severed_axes(self.ordinary, self.severed, len(self.corrupted_samples))

    @property
    def p_corrupted(self) -> float:
        """The probability with nothing restored, the mean over samples."""
        return self.corrupted_samples.mean().item()

    @property
    def effects(self) -> Float[Tensor, "2 layer"]:
        """The figure's bars: ordinary and severed scores less the corrupted one."""
        return torch.stack([self.ordinary.mean(0), self.severed.mean(0)]) - self.p_corrupted

    @property
    @torch_defaults()
    def half_width(self) -> Float[Tensor, "2 layer"]:
        """Half the 95% interval of each bar over the samples; NaN for one sample."""
        paths = torch.stack([self.ordinary, self.severed], 1)
        return _half_width(paths - self.corrupted_samples[:, None, None])

    def to_dataframe(self) -> pd.DataFrame:
        """Return a pandas DataFrame with a row per layer and state of the path."""
        return table_of_paths(self.effects, self.sever)


def _half_width(effects: Float[Tensor, "sample row column"]) -> Float[Tensor, "row column"]:
    """Return 1.96 standard errors of the mean over samples; NaN for one sample."""
    if len(effects) < 2:
        return torch.full_like(effects[0], torch.nan)
    return half_width(effects.std(0), len(effects))


def check_severed_axes(ordinary: Tensor, severed: Tensor, n: int) -> None:
    """Raise ValueError if ordinary and severed effects do not have the same axes."""
    if ordinary.ndim != 2 or ordinary.shape != severed.shape or len(ordinary) != n or not n:
        raise ValueError(f"axes do not fit: {tuple(ordinary.shape)}, {tuple(severed.shape)}")


def table_of_paths(effects: Float[Tensor, "2 layer"], sever: Sever) -> pd.DataFrame:
    """Return a pandas DataFrame with a row per layer and state of the path."""
    import pandas as pd

    layers = effects.shape[1]
    return pd.DataFrame(
        {
            "path": ["ordinary"] * layers + [f"{sever} severed"] * layers,
            "layer": list(range(layers)) * 2,
            "indirect_effect": effects.flatten().tolist(),
        }
    )
