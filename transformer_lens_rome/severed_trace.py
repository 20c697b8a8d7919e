"""The results of tracing with a path cut (Meng et al. 2022, figure 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens_rome.results import Result
from transformer_lens_rome.showing import Shown, figure
from transformer_lens_rome.torch_states import torch_defaults

Sever = Literal["mlp", "attn"]


class _Severed(Result, Shown):
    """What a trace and an average of traces have in common."""

    def plot(self) -> Any:
        """Bars as a matplotlib figure (the `plot` extra); see `viz.plot_severed`."""
        return figure(self)


@dataclass(frozen=True, eq=False)
class SeveredTrace(_Severed):
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
        _check_axes(self.ordinary, self.severed, len(self.corrupted_samples))

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
        return _table(self.effects, self.sever)


@dataclass(frozen=True, eq=False)
class AverageSevered(_Severed):
    """The bars of figure 3: severed traces averaged over facts.

    Attributes:
        ordinary: Indirect effect in each fact, by the layer restored.
        severed: The same with the path cut.
        sever: Which modules were cut: "mlp" or "attn".
        n_wrong: Facts that were left out because the model does not know them.
    """

    ordinary: Float[Tensor, "fact layer"]
    severed: Float[Tensor, "fact layer"]
    sever: Sever
    n_wrong: int = 0

    FORMAT: ClassVar[str] = "transformer_lens_rome.average_severed.1"

    def __post_init__(self) -> None:
        _check_axes(self.ordinary, self.severed, len(self.ordinary))

    @property
    def n_facts(self) -> int:
        """How many facts were averaged."""
        return len(self.ordinary)

    @property
    def effects(self) -> Float[Tensor, "2 layer"]:
        """The bars: mean indirect effects, ordinary and severed."""
        return torch.stack([self.ordinary.mean(0), self.severed.mean(0)])

    @property
    @torch_defaults()
    def half_width(self) -> Float[Tensor, "2 layer"]:
        """Half the 95% interval of each bar, 1.96 standard errors; NaN for a single fact."""
        stacked = torch.stack([self.ordinary, self.severed])
        if self.n_facts < 2:
            return torch.full_like(stacked[:, 0], torch.nan)
        return 1.96 * stacked.std(1) / self.n_facts**0.5

    def to_dataframe(self) -> Any:
        """One row a layer and state of the path, as a pandas DataFrame."""
        table = _table(self.effects, self.sever)
        table["half_width"] = self.half_width.flatten().tolist()
        return table


@torch_defaults()
def average_severed(traces: Sequence[SeveredTrace], *, n_wrong: int = 0) -> AverageSevered:
    """Average traces with one path cut over facts.

    Raises:
        ValueError: no traces, or traces that do not belong together.
    """
    if not traces:
        raise ValueError("there are no traces to average")
    alike = {(t.sever, t.ordinary.shape[1], str(t.info.get("model"))) for t in traces}
    if len(alike) > 1:
        raise ValueError(f"traces with different paths cut, or of different models: {alike}")
    ordinary, severed = (torch.stack([t.effects[i] for t in traces]) for i in (0, 1))
    return AverageSevered(ordinary, severed, traces[0].sever, n_wrong)


def _check_axes(ordinary: Tensor, severed: Tensor, n: int) -> None:
    if ordinary.ndim != 2 or ordinary.shape != severed.shape or len(ordinary) != n or not n:
        raise ValueError(f"axes do not fit: {tuple(ordinary.shape)}, {tuple(severed.shape)}")


def _table(effects: Float[Tensor, "2 layer"], sever: Sever) -> Any:
    import pandas as pd

    layers = effects.shape[1]
    return pd.DataFrame(
        {
            "path": ["ordinary"] * layers + [f"{sever} severed"] * layers,
            "layer": list(range(layers)) * 2,
            "indirect_effect": effects.flatten().tolist(),
        }
    )
