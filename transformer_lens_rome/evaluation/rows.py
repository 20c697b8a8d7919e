"""The row of a record: what a run measured on it, and how this stands in the run's file.

every row      case_id, record (digits of a sha256)
scored row     scores: {kind: [[log-probabilities of each target, correctness of each], ...]}, or
               other scores that the benchmark names, generation: {texts, GE, RS},
               kl: {kind: [KL at each prompt, ...]}, seconds, edit_seconds, health
failed row     failed: the reason
unmet row      unmet: true, for a record that does not count, see `benchmarks`
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import fmean
from typing import Any, get_type_hints

from transformer_lens_rome.evaluation.benchmarks import (
    Benchmark,
    Scores,
    benchmark_names,
    get_benchmark,
)
from transformer_lens_rome.evaluation.metrics import KL_NAMES, AnswerScore, PromptScore
from transformer_lens_rome.files.fields import fits, make

_ABOVE_ZERO = 1e-3  # rounding may lift a log-probability above 0 by this much
_LONGEST = 1e9  # seconds


@dataclass(frozen=True)
class GeneratedText:
    """Text that the model wrote about the subject of a record.

    Attributes:
        texts: The texts, prompts included.
        GE: Fluency: the mean n-gram entropy of the texts, in bits.
        RS: Consistency with reference texts; None if there are none.
    """

    texts: tuple[str, ...]
    GE: float
    RS: float | None = None

    def __post_init__(self) -> None:
        check_range("GE", self.GE, 64.0)
        check_range("RS", self.RS, 1.001)

    def metrics(self) -> dict[str, float]:
        """Return GE, and RS if it is known."""
        return {"GE": self.GE} | ({} if self.RS is None else {"RS": self.RS})


@dataclass(frozen=True)
class RecordRow:
    """The measurements of a run on one record: its scores, or the reason why there are none.

    Attributes:
        case_id: The record's number in the data set.
        record: Digits of a sha256 of the record, from `record_digest`.
        scores: By kind of prompt, the score of each prompt; None if the record failed.
        generation: The generated text, if text was asked for.
        kl: By kind of prompt, KL(edited || unedited) of the next token after each prompt, in nats;
            None for the unedited model, and if it was not asked for.
        failed: The reason if the record failed.
        unmet: True if the record does not count: the unedited model does not meet the benchmark's
            condition, so the record was not edited.
        seconds: Duration of edit, scoring and undo; the mean over the records of a batch.
        edit_seconds: Duration of the edit alone, likewise; None for the unedited model.
        health: The edit's health, without its losses, or that of the record's fact if the edit
            wrote many; None for the unedited model.
    """

    case_id: int
    record: str
    scores: Scores | None = None
    generation: GeneratedText | None = None
    kl: Mapping[str, Sequence[float]] | None = None
    failed: str | None = None
    unmet: bool | None = None
    seconds: float | None = None
    edit_seconds: float | None = None
    health: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if (self.scores is not None) + (self.failed is not None) + bool(self.unmet) != 1:
            raise ValueError("a row needs either scores or the reason of a failure, or is unmet")
        if self.edit_seconds is not None and self.seconds is None:
            raise ValueError("seconds is missing")
        check_range("seconds", self.seconds, _LONGEST)
        check_range("edit_seconds", self.edit_seconds, _LONGEST)
        if self.scores is not None:
            _check_scores(self.scores)
        for kind, values in (self.kl or {}).items():
            if kind not in KL_NAMES or not values:
                raise ValueError(f"kl of {kind!r:.40} is not one of {', '.join(KL_NAMES)}")
            for value in values:
                check_range(f"kl of {kind}", value + _ABOVE_ZERO, 1e6)

    def metrics(self) -> dict[str, float]:
        """Return the means of the KL, and GE and RS, as far as they are known."""
        kl = {KL_NAMES[kind]: fmean(values) for kind, values in (self.kl or {}).items()}
        return kl | (self.generation.metrics() if self.generation else {})

    @property
    def key(self) -> int:
        """The record's number."""
        return self.case_id

    def to_json(self) -> dict[str, Any]:
        """Return the row as a JSON object, without what is None."""
        return asdict(self, dict_factory=lambda items: {k: v for k, v in items if v is not None})

    @classmethod
    def from_json(cls, row: Mapping[str, Any], benchmark: Benchmark) -> RecordRow:
        """Return the row of a line that `to_json` made, in a run on a benchmark.

        Raises:
            ValueError: A field is missing, unknown, or has an invalid value.
        """
        if "scores" in row:
            row = {**row, "scores": _typed(row["scores"], benchmark)}
        return make(cls, row)


def row_reader(first: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], RecordRow]:
    """Return a function that makes rows of the lines of a run with this first line."""
    return partial(RecordRow.from_json, benchmark=get_benchmark(protocol_of(first)))


def protocol_of(first: Mapping[str, Any]) -> str:
    """Return the protocol of a run, from its first line.

    Raises:
        ValueError: The setting is missing or invalid.
    """
    setting = first.get("setting")
    if not isinstance(setting, Mapping):
        raise ValueError("the setting of the run is missing")
    method, protocol = setting.get("method", {"name": ""}), setting.get("protocol", "counterfact")
    if not isinstance(method, Mapping) or not isinstance(method.get("name"), str):
        raise ValueError("its method has no name")
    if not isinstance(protocol, str) or protocol not in benchmark_names():
        raise ValueError(f"its protocol is {protocol!r:.40}, which is no registered benchmark")
    return protocol


def record_digest(record: Any) -> str:
    """Return the first sixteen digits of the sha256 of all fields of a record."""
    text = json.dumps(asdict(record), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_range(name: str, value: float | None, most: float) -> None:
    """Raise ValueError if a value is given, and is not between 0 and `most`."""
    if value is not None and not 0 <= value <= most:
        raise ValueError(f"{name} is {value!r:.40}")


def check_log_probs(kind: str, *values: Sequence[float]) -> None:
    """Raise ValueError if some values are not log-probabilities."""
    numbers = [number for one in values for number in one]
    if not fits(numbers, list[float]) or not all(-1e39 < n <= _ABOVE_ZERO for n in numbers):
        raise ValueError(f"scores of {kind[:40]!r} are not log-probabilities")


def _typed(scores: Any, benchmark: Benchmark) -> Scores:
    """Return scores read from a file with the types that their benchmark names."""
    if not fits(scores, Mapping) or not all(fits(one, list[list]) for one in scores.values()):
        raise ValueError("scores are not lists of prompts, by kind")
    typed = {}
    for kind, prompts in scores.items():
        if kind not in benchmark.kinds:
            raise ValueError(f"scores of {kind[:40]!r}, which is no kind of prompt")
        score: Any = benchmark.kinds[kind]
        if any(len(prompt) != len(score._fields) for prompt in prompts):
            raise ValueError(f"scores of {kind[:40]!r} need {', '.join(score._fields)} a prompt")
        typed[kind] = [score(*prompt) for prompt in prompts]
    return typed


def _check_scores(scores: Scores) -> None:
    """Raise ValueError if scores have values of other types, or those of the edit are missing."""
    if not scores.get("rewrite"):
        raise ValueError("scores of rewrite are missing")
    for kind, prompts in scores.items():
        for prompt in prompts:
            if isinstance(prompt, (PromptScore, AnswerScore)):
                _check_log_prob_score(kind, prompt)
                continue
            for (name, hint), value in zip(get_type_hints(type(prompt)).items(), prompt):
                if not fits(value, hint):
                    raise ValueError(f"{name} in the scores of {kind[:40]!r} is {value!r:.40}")


def _check_log_prob_score(kind: str, prompt: PromptScore | AnswerScore) -> None:
    """Raise ValueError if a score does not have equally many log-probabilities and flags."""
    values, correct = prompt[: len(prompt) // 2], prompt[len(prompt) // 2 :]
    if not fits([*values], list[list]) or not fits([*correct], list[list[bool]]):
        raise ValueError(f"scores of {kind[:40]!r} need a list of values for each target")
    check_log_probs(kind, *values)
    if [*map(len, values)] != [*map(len, correct)] or not all(values):
        raise ValueError(f"scores of {kind[:40]!r} differ in length or are empty")
