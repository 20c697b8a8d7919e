"""Traces averaged over facts, in the paper's six categories of token (Meng et al. 2022, fig. 2).

    category                  position, of subject tokens b .. e-1 and n prompt tokens    n counts
    first subject token       b                                                           facts
    middle subject tokens     b+1 .. e-2                                                  tokens
    last subject token        e-1                                                         facts
    first subsequent token    e                                                           facts
    further tokens            e+1 .. n-2                                                  tokens
    last token                n-1                                                         facts

Categories overlap as in the paper: the only token of a subject is both its first and its last. A
prompt that ends with its subject has no subsequent token. Averages are those of the released code:
the mean score of a category minus the mean corrupted score of all facts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens_rome.files.intervals import half_width
from transformer_lens_rome.files.result import Result
from transformer_lens_rome.showing import Shown, figure
from transformer_lens_rome.torch_states import torch_defaults
from transformer_lens_rome.tracing.estimated_trace import EstimatedTrace
from transformer_lens_rome.tracing.kinds import check_kind
from transformer_lens_rome.tracing.results import (
    CausalTrace,
    Sever,
    Severed,
    SeveredTrace,
    check_severed_axes,
    table_of_paths,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

CATEGORIES = (
    "first subject token",
    "middle subject tokens",
    "last subject token",
    "first subsequent token",
    "further tokens",
    "last token",
)


@dataclass(frozen=True, eq=False)
class AverageTrace(Result, Shown):
    """Mean scores by category and layer.

    Attributes:
        scores: Mean metric with a state of the category restored; NaN for an empty category.
        half_width: Half the 95% interval of the indirect effect: 1.96 standard errors over the n of
            the category, from each item's score minus the corrupted score of its fact.
        n: The number of facts or tokens in each category.
        effects: Total effect of each fact.
        best_layer: For each fact, the layer with the highest score at the last subject token.
        p_clean: Mean metric of the clean runs.
        p_corrupted: Mean metric with nothing restored.
        kind: As in `CausalTrace`.
        window: As in `CausalTrace`.
        n_wrong: The number of facts left out because the model does not know them.
        info: The options that all traces share: model, metric, noise, samples, seed. For estimated
            traces also "method", and of the facts with exact cells the number "n_verified", the
            mean "spearman" and the "largest_miss".
    """

    scores: Float[Tensor, "category layer"]
    half_width: Float[Tensor, "category layer"]
    n: Int[Tensor, "category"]
    effects: Float[Tensor, "fact"]
    best_layer: Int[Tensor, "fact"]
    p_clean: float
    p_corrupted: float
    kind: str
    window: int
    n_wrong: int = 0
    info: dict[str, Any] = field(default_factory=dict)

    FORMAT: ClassVar[str] = "transformer_lens_rome.average_trace.1"
    categories: ClassVar[tuple[str, ...]] = CATEGORIES

    def __post_init__(self) -> None:
        check_kind(self.kind)
        whole = self.scores.shape == self.half_width.shape and self.scores.numel()
        if not whole or not len(self.scores) == len(self.n) == len(CATEGORIES):
            raise ValueError(f"axes do not fit: {tuple(self.scores.shape)}")

    @property
    def n_facts(self) -> int:
        """The number of averaged facts."""
        return len(self.effects)

    @property
    def indirect_effect(self) -> Float[Tensor, "category layer"]:
        """AIE: scores - p_corrupted."""
        return self.scores - self.p_corrupted

    @property
    def total_effect(self) -> float:
        """ATE: p_clean - p_corrupted."""
        return self.p_clean - self.p_corrupted

    def peak(self, category: str) -> tuple[int, float]:
        """Return the layer with the largest AIE of a category, and that AIE."""
        row = self.indirect_effect[CATEGORIES.index(category)]
        return int(row.argmax()), row.max().item()

    def to_dataframe(self) -> pd.DataFrame:
        """Return a pandas DataFrame with a row per category and layer."""
        import pandas as pd

        layers = self.scores.shape[1]
        effect = self.indirect_effect
        return pd.DataFrame(
            {
                "category": [name for name in CATEGORIES for _ in range(layers)],
                "layer": list(range(layers)) * len(CATEGORIES),
                "n": self.n.repeat_interleave(layers).tolist(),
                "score": self.scores.flatten().tolist(),
                "indirect_effect": effect.flatten().tolist(),
                "half_width": self.half_width.flatten().tolist(),
            }
        )

    def plot(self) -> Figure:
        """Return a heat map as a matplotlib figure (the `plot` extra); see `viz.plot_averages`."""
        return figure(self)


@torch_defaults()
def average_traces(traces: Sequence[CausalTrace], *, n_wrong: int = 0) -> AverageTrace:
    """Average traces of one kind, window, metric and model over facts.

    Raises:
        ValueError: there are no traces, or their kind, window, metric, samples or model differ.
    """
    if not traces:
        raise ValueError("there are no traces to average")
    alike = {
        (t.kind, t.window, t.metric, t.samples.shape[1], str(t.info.get("model"))) for t in traces
    }
    if len({isinstance(trace, EstimatedTrace) for trace in traces}) > 1:
        raise ValueError("estimated and exact traces have no common average; average each alone")
    if len(alike) > 1:
        raise ValueError(f"traces of different kinds, windows, metrics or models: {sorted(alike)}")
    columns = [_by_category(trace) for trace in traces]
    stacked = [torch.cat([one[i] for one in columns]) for i in range(len(CATEGORIES))]
    effects = [
        torch.cat([one[i] - trace.p_corrupted for one, trace in zip(columns, traces, strict=True)])
        for i in range(len(CATEGORIES))
    ]
    last = torch.stack([trace.scores[:, trace.subject_last] for trace in traces])
    return AverageTrace(
        scores=torch.stack([items.mean(0) for items in stacked]),
        half_width=torch.stack([_half_width(items) for items in effects]),
        n=torch.tensor([len(items) for items in stacked]),
        effects=torch.tensor([trace.total_effect for trace in traces]),
        best_layer=last.argmax(1),
        p_clean=sum(trace.p_clean for trace in traces) / len(traces),
        p_corrupted=sum(trace.p_corrupted for trace in traces) / len(traces),
        kind=traces[0].kind,
        window=traces[0].window,
        n_wrong=n_wrong,
        info=_shared_info(traces),
    )


def _shared_info(traces: Sequence[CausalTrace]) -> dict[str, Any]:
    """Return the options that are equal in all traces."""
    every = [
        {**trace.info, "metric": trace.metric, "n_samples": len(trace.samples)} for trace in traces
    ]
    names = ("model", "metric", "noise", "noise_std", "replace", "n_samples", "seed", "prepend_bos")
    shared = {
        name: every[0].get(name)
        for name in names
        if all(one.get(name) == every[0].get(name) for one in every)
    }
    return shared | _agreement([trace for trace in traces if isinstance(trace, EstimatedTrace)])


def _agreement(traces: Sequence[EstimatedTrace]) -> dict[str, Any]:
    """Return how well estimated traces agree with the cells that were run exactly."""
    if not traces:
        return {}
    each = [trace.agreement for trace in traces if len(trace.checked)]
    return {
        "method": "gradient",
        "n_verified": len(each),
        "spearman": fmean(one.spearman for one in each) if each else None,
        "largest_miss": max(one.largest_miss for one in each) if each else None,
    }


def _half_width(items: Float[Tensor, "item layer"]) -> Float[Tensor, "layer"]:
    """Return 1.96 standard errors of the mean; NaN for fewer than two items."""
    if len(items) < 2:
        return torch.full(items.shape[1:], torch.nan)
    return half_width(items.std(0), len(items))


def _by_category(trace: CausalTrace) -> list[Float[Tensor, "item layer"]]:
    """Return the scores of a trace in each category, a row per position."""
    begin, end = trace.subject_positions[0], trace.subject_positions[-1] + 1
    scores, n = trace.scores.T, len(trace.tokens)
    ranges = (
        (begin, begin + 1),
        (begin + 1, end - 1),
        (end - 1, end),
        (end, min(end + 1, n)),
        (end + 1, n - 1),
        (n - 1, n),
    )
    return [scores[first : max(first, last)] for first, last in ranges]


@dataclass(frozen=True, eq=False)
class AverageSevered(Severed):
    """The bars of figure 3: severed traces averaged over facts.

    Attributes:
        ordinary: Indirect effect in each fact, by the restored layer.
        severed: The same with the path cut.
        sever: Which modules were cut: "mlp" or "attn".
        n_wrong: The number of facts left out because the model does not know them.
    """

    ordinary: Float[Tensor, "fact layer"]
    severed: Float[Tensor, "fact layer"]
    sever: Sever
    n_wrong: int = 0

    FORMAT: ClassVar[str] = "transformer_lens_rome.average_severed.1"

    def __post_init__(self) -> None:
        check_severed_axes(self.ordinary, self.severed, len(self.ordinary))

    @property
    def n_facts(self) -> int:
        """The number of averaged facts."""
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
        return half_width(stacked.std(1), self.n_facts)

    def to_dataframe(self) -> pd.DataFrame:
        """Return a pandas DataFrame with a row per layer and state of the path."""
        table = table_of_paths(self.effects, self.sever)
        table["half_width"] = self.half_width.flatten().tolist()
        return table


@torch_defaults()
def average_severed(traces: Sequence[SeveredTrace], *, n_wrong: int = 0) -> AverageSevered:
    """Average traces with one path cut over facts.

    Raises:
        ValueError: there are no traces, or their cut paths, layers or models differ.
    """
    if not traces:
        raise ValueError("there are no traces to average")
    alike = {(t.sever, t.ordinary.shape[1], str(t.info.get("model"))) for t in traces}
    if len(alike) > 1:
        raise ValueError(f"traces with different paths cut, or of different models: {alike}")
    ordinary, severed = (torch.stack([t.effects[i] for t in traces]) for i in (0, 1))
    return AverageSevered(ordinary, severed, traces[0].sever, n_wrong)
