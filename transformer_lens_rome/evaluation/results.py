"""The results of an evaluation: raw numbers, and tables made from them."""

from __future__ import annotations

import html
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from transformer_lens_rome.evaluation.benchmarks import Benchmark, get_benchmark
from transformer_lens_rome.evaluation.metrics import Estimate, paired_difference, summarise
from transformer_lens_rome.evaluation.rows import RecordRow, row_reader
from transformer_lens_rome.files.run_file import read_run
from transformer_lens_rome.showing import Shown, figure

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_LATEX = {letter: f"\\{letter}" for letter in "_&%#${}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}
UNEDITED = "unedited.jsonl"
"""The name of the file with the unedited model's scores, in the folder of the methods' files."""


@dataclass(frozen=True)
class Results(Shown):
    """One method's run, record by record.

    Attributes:
        name: The method's name.
        setting: The run's setting: model, method and its options, seed, BOS rule.
        before: Rows of the unedited model, by case.
        after: Rows of the edited model; empty for the unedited model itself.
        data: The sha256 of the file of records, if known, and their schema.
    """

    name: str
    setting: Mapping[str, Any]
    before: Mapping[int, RecordRow] = field(repr=False)
    after: Mapping[int, RecordRow] = field(repr=False)
    data: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Any) -> Results:
        """Read the file of an evaluation (its argument `out`); the run may be unfinished.

        Raises:
            ValueError: The file is not a run or is damaged, or `unedited.jsonl` belongs to another
                run.
            OSError: There is no such file, or no `unedited.jsonl` in its folder.
        """
        path = Path(path)
        head, rows = read_run(path, row_reader)
        unedited_head, unedited_rows = read_run(path.with_name(UNEDITED), row_reader)
        before = {row.case_id: row for row in unedited_rows}
        setting, data = head["setting"], _data(path, head.get("made_with"))
        if "method" not in setting:
            return cls("unedited", setting, before, {}, data)
        after = {row.case_id: row for row in rows}
        before = {case: before[case] for case in after if case in before}
        same = all(setting.get(name) == value for name, value in unedited_head["setting"].items())
        if not same or any(row.record != after[case].record for case, row in before.items()):
            raise ValueError(
                f"{UNEDITED} in the folder of {path} belongs to another model, setting or data set"
            )
        return cls(setting["method"]["name"], setting, before, after, data)

    @property
    def failed(self) -> dict[int, str]:
        """Return the reason of each failed record, by case; averages leave such records out."""
        return _failed(self.after or self.before)

    def metrics(self, *, edited: bool | None = None) -> dict[int, dict[str, float]]:
        """Return the metrics of each record that counts, as fractions, by the metric's name.

        By default they are those after the edits, if there are any.
        """
        edited = bool(self.after) if edited is None else edited
        rows = self.after if edited else self.before
        metrics = {}
        for case, row in rows.items():
            if row.scores is not None and case not in self.unmet:
                before = self.before[case].scores if case in self.before else None
                metrics[case] = self.benchmark.metrics(row.scores, before or {}) | row.metrics()
        return metrics

    @property
    def unmet(self) -> set[int]:
        """Return the cases of records that do not count, see `Benchmark.counts`."""
        counts = self.benchmark.counts
        if self.after or counts is None:
            return {case for case, row in self.after.items() if row.unmet}
        return {case for case, row in self.before.items() if row.scores and not counts(row.scores)}

    @property
    def protocol(self) -> str:
        """Return the name of the benchmark, such as "counterfact"."""
        return self.setting.get("protocol", "counterfact")

    @property
    def benchmark(self) -> Benchmark:
        """Return the registered benchmark of this run."""
        return get_benchmark(self.protocol)

    @property
    def seconds(self) -> dict[str, float]:
        """Return mean seconds per record: of the edit alone, and of edit, scoring and undo."""
        each = [
            (row.edit_seconds, row.seconds)
            for row in self.after.values()
            if row.edit_seconds is not None and row.seconds is not None
        ]
        names = ("edit_seconds", "seconds")
        return {name: fmean(values) for name, values in zip(names, zip(*each))}

    def scores(
        self, *, edited: bool | None = None, cases: Collection[int] | None = None
    ) -> dict[str, Estimate]:
        """Return the averages in the benchmark's columns, by default of all records."""
        metrics = self.metrics(edited=edited)
        rows = [row for case, row in metrics.items() if cases is None or case in cases]
        of = self.benchmark
        return summarise(rows, columns=of.columns, s_of=of.s_of, plain=of.plain)

    def compare(self, other: Results) -> dict[str, tuple[Estimate, float]]:
        """Return differences to another method on the records of both runs, and p-values.

        A sign-flip test on paired records; see `metrics.paired_difference`.

        Raises:
            ValueError: The runs have different models, settings or data sets, or no common record.
        """
        check_comparable([self, other])
        mine, theirs = self.metrics(), other.metrics()
        both = [case for case in mine if case in theirs]
        if not both:
            raise ValueError("the runs have no record in common")
        one, two = ([run[case] for case in both] for run in (mine, theirs))
        compared = {}
        for name in self.benchmark.columns:
            if all(name in row for row in (*one, *two)):
                scale = 1 if name in self.benchmark.plain else 100
                compared[name] = paired_difference(one, two, name, scale=scale)
        return compared

    def to_dataframe(self) -> pd.DataFrame:
        """Return a pandas DataFrame, one row per record: metrics before and after, and seconds."""
        import pandas as pd

        before, after = self.metrics(edited=False), self.metrics(edited=True)
        rows = []
        for case in self.before:
            row: dict[str, Any] = {"case_id": case}
            row |= {f"{name}_before": x for name, x in before.get(case, {}).items()}
            row |= {f"{name}_after": x for name, x in after.get(case, {}).items()}
            row["edit_seconds"] = self.after[case].edit_seconds if case in self.after else None
            rows.append(row)
        return pd.DataFrame(rows)

    def table(self, *others: Results, style: str = "markdown") -> str:
        """Return a "markdown" or "latex" table of the unedited model, this method and others."""
        styles = {"markdown": markdown, "latex": latex}
        if style not in styles:
            raise ValueError(f"style must be one of {sorted(styles)}, got {style!r}")
        return styles[style]([self, *others])

    def plot(self, *others: Results) -> Figure:
        """Plot the main metrics of the unedited model, this method and others, as bars."""
        return figure(self, *others)


def cells(runs: Sequence[Results]) -> tuple[list[str], list[list[str]]]:
    """Return the columns of a table and its rows: the unedited model, then one row per method.

    All rows are about the records that the runs have in common.
    """
    cases = common_cases(runs)
    before = runs[0].scores(edited=False, cases=cases)
    scores = [("unedited", before, _failed(runs[0].before, cases))]
    for run in runs:
        if run.after:
            scores.append((run.name, run.scores(cases=cases), _failed(run.after, cases)))
    shown = [
        name
        for name in runs[0].benchmark.columns
        if any(name in estimates for _, estimates, _ in scores)
    ]
    rows = []
    for name, estimates, failed in scores:
        n = len(cases - runs[0].unmet) - len(failed)
        rows.append([name, str(n), str(len(failed)), *(str(estimates.get(m, "")) for m in shown)])
    return ["method", "records", "failed", *shown], rows


def common_cases(runs: Sequence[Results]) -> set[int]:
    """Return the case ids of the records that all runs have."""
    check_comparable(runs)
    cases = set.intersection(*(set(run.after or run.before) for run in runs))
    if not cases:
        raise ValueError("the runs have no record in common; is one of them still empty?")
    return cases


def _data(path: Path, made_with: Any) -> dict[str, str]:
    """Return what a run's file says about its records; nothing in a file that does not say it.

    Raises:
        ValueError: It is not a sha256 and the name of a schema.
    """
    data = made_with.get("data", {}) if isinstance(made_with, Mapping) else {}
    known = {"sha256": r"([0-9a-f]{64})?", "schema": "(published|flat)?"}
    if not isinstance(data, Mapping) or not data.keys() <= known.keys():
        raise ValueError(f"{path}: the run's data is {data!r:.80}, not a sha256 and a schema")
    for name, value in data.items():
        if not isinstance(value, str) or not re.fullmatch(known[name], value):
            raise ValueError(f"{path}: the {name} of the run's data is {value!r:.80}")
    return dict(data)


def _failed(rows: Mapping[int, RecordRow], cases: Collection[int] | None = None) -> dict[int, str]:
    """Return the reason of each failed record; by default of all records."""
    return {
        case: row.failed
        for case, row in rows.items()
        if row.failed is not None and (cases is None or case in cases)
    }


def check_comparable(runs: Sequence[Results]) -> None:
    """Raise ValueError if the runs have different models, data sets or BOS rules."""
    for name in ("model_hash", "protocol", "prepend_bos"):
        if len({str(run.setting.get(name)) for run in runs}) > 1:
            raise ValueError(
                f"the runs differ in {name}; compare only runs of one model and data set"
            )
    if len({run.data.get("schema") for run in runs if run.data.get("schema")}) > 1:
        raise ValueError(
            "the runs are on records of two schemas, which measure different things (see "
            "evaluation.records); compare only runs of one schema"
        )
    records: dict[int, str] = {}
    for run in runs:
        for case, row in run.before.items():
            if records.setdefault(case, row.record) != row.record:
                raise ValueError(
                    f"the runs differ in record {case}; compare only runs of one data set"
                )


def legend(runs: Sequence[Results], shown: Sequence[str]) -> str:
    """Return the sentences below a table: what its columns are, and on which records."""
    of = runs[0].benchmark
    notes = [note for name, note in of.notes.items() if name in shown]
    counted = []
    if of.counts is not None:
        n, some = len(common_cases(runs)), len(common_cases(runs) - runs[0].unmet)
        counted = [f"{some} of {n} records count: those for which {of.condition}."]
        counted += _numbers(runs)
    return " ".join([of.legend, *notes, *counted, *_together(runs), _records_of(runs)])


def _numbers(runs: Sequence[Results]) -> Iterator[str]:
    """Yield the sentence that says on how many records each column stands."""
    cases = common_cases(runs)
    scores = [("unedited", runs[0].scores(edited=False, cases=cases))]
    scores += [(_plain(run.name), run.scores(cases=cases)) for run in runs if run.after]
    listed = [
        f"{name}: {', '.join(f'{column} {one.n}' for column, one in estimates.items())}"
        for name, estimates in scores
        if estimates
    ]
    if listed:
        yield f"Numbers of records: {'; '.join(listed)}."


def _together(runs: Sequence[Results]) -> Iterator[str]:
    """Yield the sentence that names the methods whose facts were written together."""
    sizes = [(_plain(run.name), run.setting.get("together")) for run in runs if run.after]
    several = [f"{name}: {n}" for name, n in sizes if type(n) is int]
    if several:
        yield (
            f"Facts written by one edit ({', '.join(several)}); each record was scored with all "
            "facts of its batch on the model."
        )


def _records_of(runs: Sequence[Results]) -> str:
    """Return the sentence that names the records and the number of prompts of each kind."""
    cases = common_cases(runs)
    every = set().union(*(run.after or run.before for run in runs))
    scores = [row.scores for case, row in runs[0].before.items() if case in cases and row.scores]
    kinds = [kind for kind in runs[0].benchmark.kinds if any(kind in one for one in scores)]
    prompts = (
        f"{fmean(len(one.get(kind, ())) for one in scores):.3g} {kind.replace('_', ' ')}"
        for kind in kinds
    )
    data = next((run.data for run in runs if run.data.get("sha256")), {})
    file = f" of the file with sha256 {data['sha256'][:16]}" if data else ""
    schema = next((f" ({run.data['schema']} schema)" for run in runs if run.data.get("schema")), "")
    common = f", those that all runs have of {len(every)}" if every != cases else ""
    return f"{len(cases)} records{file}{schema}{common}; prompts a record: {', '.join(prompts)}."


def _plain(name: str) -> str:
    """Return a name on one line, without what Markdown or HTML would read as markup."""
    return html.escape(" ".join(name.split()), quote=False).replace("|", "\\|")


def markdown(runs: Sequence[Results]) -> str:
    """Return a Markdown table with a legend: the unedited model, then one row per method."""
    head, rows = cells(runs)
    for row in rows:  # the name comes from a file and may contain any text
        row[0] = _plain(row[0])
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    lines.insert(1, "|---" * len(head) + "|")
    return "\n".join([*lines, "", legend(runs, head)])


def latex(runs: Sequence[Results]) -> str:
    """Return a LaTeX `tabular` with booktabs rules; the legend is a comment."""
    head, rows = cells(runs)
    for row in rows:
        row[0] = "".join(_LATEX.get(letter, letter) for letter in " ".join(row[0].split()))
    lines = [" & ".join(row) + r" \\" for row in (head, *rows)]
    spec = "l" + "r" * (len(head) - 1)
    return "\n".join(
        [
            "% " + legend(runs, head).replace("%", r"\%"),
            rf"\begin{{tabular}}{{{spec}}}",
            r"\toprule",
            lines[0],
            r"\midrule",
            *lines[1:],
            r"\bottomrule",
            r"\end{tabular}",
        ]
    )


def comparison(one: Results, other: Results) -> str:
    """Return a Markdown table of paired differences (`one` minus `other`), with p-values."""
    lines = [f"| {one.name} less {other.name} | difference | p |", "|---|---|---|"]
    for name, (difference, p) in one.compare(other).items():
        lines.append(f"| {name} | {difference} | {p:.2g} |")
    return "\n".join(lines)
