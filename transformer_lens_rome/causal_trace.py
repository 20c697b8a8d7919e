"""The result of a causal trace: a value to compare, tabulate, save and load."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens_rome.files import read_tensors, write_tensors

Kind = Literal["resid", "mlp", "attn"]
Metric = Literal["probability", "log_probability", "logit_diff"]
_FORMAT = "transformer_lens_rome.trace.1"
_TENSORS = ("samples", "corrupted_samples")


@dataclass(frozen=True, eq=False)
class CausalTrace:
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
        info: Everything else that is needed to make the trace again.
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

    def save(self, path: Any) -> None:
        """Write safetensors with JSON metadata."""
        info = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        tensors = {name: info.pop(name) for name in _TENSORS}
        write_tensors(path, tensors, {"format": _FORMAT, **info})

    @classmethod
    def load(cls, path: Any) -> CausalTrace:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError, ValueError: no such file, or not a whole trace file.
        """
        tensors, info = read_tensors(path, _FORMAT)
        try:
            info = {name: value for name, value in info.items() if name != "format"}
            for name in ("tokens", "subject_positions"):
                info[name] = tuple(info[name])
            found = cls(**tensors, **info)
            sizes = found.samples.ndim, found.samples.shape[2], len(found.corrupted_samples)
            if sizes != (3, len(found.tokens), len(found.samples)):
                raise ValueError(f"axes do not fit: {tuple(found.samples.shape)}")
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise ValueError(f"{path} does not hold a whole trace ({error})") from error
        return found


@dataclass(frozen=True, eq=False)
class SeveredTrace:
    """What restoring the last subject token brings back with a path cut (Meng et al. 2022, fig. 3).

    Attributes:
        ordinary: The answer's probability in each corrupted sample, by the layer restored.
        severed: The same, while the cut modules above keep their corrupted outputs at that token.
        corrupted_samples: The same with nothing restored.
        p_clean: The probability without corruption.
        sever: Which modules were cut: "mlp" or "attn".
        answer: The text whose probability is taken.
    """

    ordinary: Float[Tensor, "sample layer"]
    severed: Float[Tensor, "sample layer"]
    corrupted_samples: Float[Tensor, "sample"]
    p_clean: float
    sever: Literal["mlp", "attn"]
    answer: str

    @property
    def effects(self) -> Float[Tensor, "2 layer"]:
        """The figure's bars: ordinary and severed scores less the corrupted one."""
        scores = (self.ordinary.mean(0), self.severed.mean(0))
        return torch.stack(scores) - self.corrupted_samples.mean()
