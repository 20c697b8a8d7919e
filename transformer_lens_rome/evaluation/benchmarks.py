"""The registry of benchmarks. A new benchmark is one new file that registers one `Benchmark`.

A benchmark is a loader of records, a scoring, which asks the model about them, and the metrics that
are computed from the scores of a record. Editing, undoing, run files, batches, Ray workers and
tables are the same for all benchmarks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from transformer_lens_rome.edits.request import EditRequest

Scores = Mapping[str, Sequence[Any]]
"""By kind of prompt, the scores of the prompts in order; each score is a named tuple."""


class Record(Protocol):
    """A record of a data set: a frozen dataclass of plain values and requests."""

    @property
    def case_id(self) -> int:
        """The record's number in the data set."""
        ...

    @property
    def request(self) -> EditRequest:
        """The fact to write; the first one if there are several."""
        ...


@dataclass(frozen=True)
class Benchmark:
    """A data set with its protocol.

    Attributes:
        name: The name in `--dataset`, and the protocol's name in run files.
        load: `load(path, *, limit, strict)` returns the records; further options are its own. The
            result has `skipped`, the reasons why records were left out.
        scoring: `scoring(**options)` returns a `scoring.Scoring` of this name.
        kinds: The type of the scores of each kind of prompt, by kind. Every row has "rewrite".
        metrics: `metrics(scores, before)` returns the metrics of a record from its scores, as
            fractions. `before` are the scores of the unedited model, which may be the same object.
        columns: The columns of a table, in order.
        legend: The sentences below a table.
        notes: Further sentences of the legend, by the column that needs them.
        s_of: The three metrics of which S is the harmonic mean; empty for no S.
        plain: The columns that are no percentages and are shown as they are.
        panels: The metrics of a bar plot with their titles; percentages only.
        counts: `counts(scores)` returns whether a record counts, from the scores of the unedited
            model. A record that does not count is not edited. None: all records count.
        condition: What the unedited model must meet for a record to count, as part of a sentence.
    """

    name: str
    load: Callable[..., Sequence[Any]]
    scoring: Callable[..., Any]
    kinds: Mapping[str, type]
    metrics: Callable[[Scores, Scores], dict[str, float]]
    columns: Sequence[str]
    legend: str
    notes: Mapping[str, str] = field(default_factory=dict)
    s_of: Sequence[str] = ()
    plain: Sequence[str] = ()
    panels: Mapping[str, str] = field(default_factory=dict)
    counts: Callable[[Scores], bool] | None = None
    condition: str = ""


_REGISTRY: dict[str, Benchmark] = {}


def register_benchmark(benchmark: Benchmark) -> None:
    """Register a benchmark by its name.

    Raises:
        ValueError: Another benchmark has this name, or "rewrite" is not one of its kinds.
    """
    if _REGISTRY.get(benchmark.name, benchmark) is not benchmark:
        raise ValueError(
            f"the benchmark {benchmark.name!r} is registered already; choose another name"
        )
    if "rewrite" not in benchmark.kinds:
        raise ValueError(
            f"the benchmark {benchmark.name!r} has no kind 'rewrite'; score the edited prompt too"
        )
    _REGISTRY[benchmark.name] = benchmark


def get_benchmark(name: str) -> Benchmark:
    """Return the benchmark of this name.

    Raises:
        ValueError: No benchmark has this name.
    """
    if name not in _REGISTRY:
        raise ValueError(f"no benchmark {name!r:.40}; there are {benchmark_names()}")
    return _REGISTRY[name]


def benchmark_names() -> list[str]:
    """Return the names of the registered benchmarks."""
    return sorted(_REGISTRY)
