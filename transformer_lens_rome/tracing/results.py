"""The result of a causal trace: a value to compare, tabulate, save and load."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens_rome.files.result import Result
from transformer_lens_rome.showing import Shown, figure
from transformer_lens_rome.torch_states import torch_defaults
from transformer_lens_rome.tracing.patching import patching_result

Kind = Literal["resid", "mlp", "attn"]
Metric = Literal["probability", "log_probability", "logit_diff"]


@dataclass(frozen=True, eq=False)
class CausalTrace(Result, Shown):
    """What restoring each state of a corrupted run brings back (Meng et al. 2022, section 2).

    Attributes:
        samples: The metric in each corrupted sample, by the layer (the centre of the window) and
            the position that were restored.
        corrupted_samples: The same with nothing restored.
        p_clean: The metric without corruption.
        tokens: The prompt's tokens as text, BOS included where there is one.
        subject_positions: Positions of the subject's tokens, which were corrupted.
        answer: The text whose metric is taken.
        kind: "resid" restores one residual state; "mlp" and "attn" a window of layers' outputs.
        window: How many layers; 1 for "resid".
        metric: "probability" of the whole answer, its "log_probability" in nats, or "logit_diff"
            against another answer.
        info: How it was made: model, prompt, options. Noise that was given as a tensor, or has
            tensors in it, is named only.
    """

    samples: Float[Tensor, "sample layer pos"]
    corrupted_samples: Float[Tensor, "sample"]
    p_clean: float
    tokens: tuple[str, ...]
    subject_positions: tuple[int, ...]
    answer: str
    kind: Kind
    window: int
    metric: Metric
    info: dict[str, Any]

    FORMAT: ClassVar[str] = "transformer_lens_rome.trace.1"

    def __post_init__(self) -> None:
        n, _, positions = self.samples.shape
        if (n, positions) != (len(self.corrupted_samples), len(self.tokens)):
            raise ValueError(f"axes do not fit: {tuple(self.samples.shape)}")
        at = self.subject_positions
        if not at or not self.samples.numel() or not all(0 <= p < positions for p in at):
            raise ValueError(f"there are no samples, or no subject among {positions} tokens: {at}")

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
        """What the corruption takes away: p_clean - p_corrupted."""
        return self.p_clean - self.p_corrupted

    @property
    def indirect_effect(self) -> Float[Tensor, "layer pos"]:
        """What restoring brings back: scores - p_corrupted."""
        return self.scores - self.p_corrupted

    @property
    def subject_last(self) -> int:
        """Position of the last subject token."""
        return self.subject_positions[-1]

    @torch_defaults()
    def to_dataframe(self) -> Any:
        """One row a cell, as a pandas DataFrame: layer, position, token, score and its error."""
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
            }
        )

    def to_patching_result(self) -> Any:
        """The same as a `transformer_lens.patching.PatchingResult` (TransformerLens 4).

        Its batch is the samples, its baseline the corrupted run.
        """
        values = self.samples.permute(1, 2, 0)
        positions = range(values.shape[1])
        return patching_result(values, self.corrupted_samples, positions, self.metric)

    def plot(self, *, ax: Any = None) -> Any:
        """A heat map as a matplotlib figure (the `plot` extra); see `viz.plot_trace`."""
        return figure(self, ax=ax)


Sever = Literal["mlp", "attn"]


class Severed(Result, Shown):
    """What a trace and an average of traces have in common."""

    def plot(self) -> Any:
        """Bars as a matplotlib figure (the `plot` extra); see `viz.plot_severed`."""
        return figure(self)


@dataclass(frozen=True, eq=False)
class SeveredTrace(Severed):
    """What restoring the last subject token brings back with a path cut.

    Attributes:
        ordinary: The answer's probability in each corrupted sample, by the layer restored.
        severed: The same, while the cut modules above keep their corrupted outputs at that token.
        corrupted_samples: The same with nothing restored.
        p_clean: The probability without corruption.
        sever: Which modules were cut: "mlp" or "attn".
        answer: The text whose probability is taken.
        info: How it was made: model, prompt, options. Noise that was given as a tensor, or has
            tensors in it, is named only.
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

    def to_dataframe(self) -> Any:
        """One row a layer and state of the path, as a pandas DataFrame."""
        return table_of_paths(self.effects, self.sever)


def check_severed_axes(ordinary: Tensor, severed: Tensor, n: int) -> None:
    """Raise a ValueError if effects with a path whole and cut do not have the same axes."""
    if ordinary.ndim != 2 or ordinary.shape != severed.shape or len(ordinary) != n or not n:
        raise ValueError(f"axes do not fit: {tuple(ordinary.shape)}, {tuple(severed.shape)}")


def table_of_paths(effects: Float[Tensor, "2 layer"], sever: Sever) -> Any:
    """Return one row a layer and state of the path, as a pandas DataFrame."""
    import pandas as pd

    layers = effects.shape[1]
    return pd.DataFrame(
        {
            "path": ["ordinary"] * layers + [f"{sever} severed"] * layers,
            "layer": list(range(layers)) * 2,
            "indirect_effect": effects.flatten().tolist(),
        }
    )
