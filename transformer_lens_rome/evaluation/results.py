"""The results of an evaluation: raw numbers, and tables made from them."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from transformer_lens_rome.evaluation.metrics import (
    NAMES,
    Estimate,
    paired_difference,
    record_metrics,
    summarise,
    zsre_metrics,
)
from transformer_lens_rome.evaluation.rows import row_checker
from transformer_lens_rome.files.run_file import read_run
from transformer_lens_rome.showing import Shown, figure

PROTOCOLS = {
    "counterfact": (
        "CounterFact, in percent, half of the 95% interval in brackets. ES, PS: p(new) > p(true) "
        "after the prompt and after paraphrases; NS: p(true) > p(new) at neighbours; EM, PM, NM: "
        "the mean differences; EA, PA, NA: all tokens of the new (NA: true) target are top tokens; "
        "p: the geometric mean over the target's tokens, teacher-forced; S: the harmonic mean of "
        "ES, PS and NS, with a bootstrap's interval."
    ),
    "zsre": (
        "zsRE, in percent, half of the 95% interval in brackets. EA, PA: tokens of the new answer "
        "that are top tokens, teacher-forced, after the question and its rephrasing; NA: the same "
        "of the true answer to an unrelated question; S: the harmonic mean of the three, with a "
        "bootstrap's interval."
    ),
}
_LATEX = {letter: f"\\{letter}" for letter in "_&%#${}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}
UNEDITED = "unedited.jsonl"
"""The name of the file with the unedited model's scores, beside those of the methods."""

GENERATION = (
    " GE: entropy of bigrams and trigrams of generated text, in hundredths of bits; RS: TF-IDF "
    "cosine with reference texts."
)


@dataclass(frozen=True)
class Results(Shown):
    """One method's run, record by record.

    Attributes:
        name: The method's.
        setting: What the run depends on: model, method and its options, seed, BOS rule.
        before: Rows of the unedited model, by case.
        after: Rows of the edited model; empty for the unedited model itself.
    """

    name: str
    setting: Mapping[str, Any]
    before: Mapping[int, Mapping[str, Any]] = field(repr=False)
    after: Mapping[int, Mapping[str, Any]] = field(repr=False)

    @classmethod
    def load(cls, path: Any) -> Results:
        """Read a run that `evaluate_counterfact(out=path)` wrote, also an unfinished one.

        Raises:
            ValueError: not a run's file, a damaged one, or `unedited.jsonl` is of another run.
            OSError: no such file, or no `unedited.jsonl` beside it.
        """
        path = Path(path)
        head, rows = read_run(path, row_checker)
        beside, unedited = read_run(path.with_name(UNEDITED), row_checker)
        before = {row["case_id"]: row for row in unedited}
        setting = head["setting"]
        if "method" not in setting:
            return cls("unedited", setting, before, {})
        after = {row["case_id"]: row for row in rows}
        before = {case: before[case] for case in after if case in before}
        alike = all(setting.get(name) == value for name, value in beside["setting"].items())
        if not alike or any(row["record"] != after[case]["record"] for case, row in before.items()):
            raise ValueError(f"{UNEDITED} beside {path} is of another model, setting or data set")
        return cls(setting["method"]["name"], setting, before, after)

    @property
    def failed(self) -> dict[int, str]:
        """Why a record could not be edited or scored, by case; such records are in no average."""
        return _failed(self.after or self.before)

    def metrics(self, *, edited: bool | None = None) -> dict[int, dict[str, float]]:
        """ES to NA of each record, as fractions; of the edited model where there is one."""
        edited = bool(self.after) if edited is None else edited
        rows = self.after if edited else self.before
        of = zsre_metrics if self.protocol == "zsre" else record_metrics
        return {
            case: of(row["scores"])
            | {
                name: row["generation"][name]
                for name in ("GE", "RS")
                if name in row.get("generation", ())
            }
            for case, row in rows.items()
            if "scores" in row
        }

    @property
    def protocol(self) -> str:
        """The data set whose metrics these are: "counterfact" or "zsre"."""
        return self.setting.get("protocol", "counterfact")

    @property
    def seconds(self) -> dict[str, float]:
        """Mean seconds a record: of the edit, and of edit, scoring and undoing together."""
        rows = [row for row in self.after.values() if "edit_seconds" in row]
        names = ("edit_seconds", "seconds") if rows else ()
        return {name: fmean(row[name] for row in rows) for name in names}

    def scores(self, *, edited: bool | None = None) -> dict[str, Estimate]:
        """S, ES, EM, PS, PM, NS, NM and accuracies in percent, with their 95% intervals."""
        rows = list(self.metrics(edited=edited).values())
        return summarise(rows, protocol=self.protocol)

    def compare(self, other: Results) -> dict[str, tuple[Estimate, float]]:
        """Differences to another method on the records that both have, and p-values.

        A sign-flip test on paired records; see `metrics.paired_difference`.

        Raises:
            ValueError: the runs are of different models, settings or data sets, or have no record
                in common.
        """
        _check_alike([self, other])
        mine, theirs = self.metrics(), other.metrics()
        both = [case for case in mine if case in theirs]
        if not both:
            raise ValueError("the runs have no record in common")
        one, two = ([run[case] for case in both] for run in (mine, theirs))
        names = [name for name in NAMES[1:] if all(name in row for row in (*one, *two))]
        return {name: paired_difference(one, two, name) for name in names}

    def to_dataframe(self) -> Any:
        """One row a record, as a pandas DataFrame: metrics before and after, and seconds."""
        import pandas as pd

        before, after = self.metrics(edited=False), self.metrics(edited=True)
        rows = []
        for case in self.before:
            row = {"case_id": case}
            row |= {f"{name}_before": x for name, x in before.get(case, {}).items()}
            row |= {f"{name}_after": x for name, x in after.get(case, {}).items()}
            row["edit_seconds"] = self.after.get(case, {}).get("edit_seconds")
            rows.append(row)
        return pd.DataFrame(rows)

    def table(self, *others: Results, style: str = "markdown") -> str:
        """A table of the unedited model, this method and others: "markdown" or "latex"."""
        styles = {"markdown": markdown, "latex": latex}
        if style not in styles:
            raise ValueError(f"style must be one of {sorted(styles)}, got {style!r}")
        return styles[style]([self, *others])

    def plot(self, *others: Results) -> Any:
        """ES, PS, NS and S of the unedited model, this method and others, as bars."""
        return figure(self, *others)


def cells(runs: Sequence[Results]) -> tuple[list[str], list[list[str]]]:
    """The columns of a table, and its rows: the unedited model, then one a method."""
    _check_alike(runs)
    scores = [("unedited", runs[0].scores(edited=False), len(_failed(runs[0].before)))]
    scores += [(run.name, run.scores(), len(run.failed)) for run in runs if run.after]
    shown = [name for name in NAMES if any(name in found for _, found, _ in scores)]
    rows = []
    for name, found, failed in scores:
        n = found["S"].n if "S" in found else 0
        rows.append([name, str(n), str(failed), *(str(found.get(m, "")) for m in shown)])
    return ["method", "records", "failed", *shown], rows


def _failed(rows: Mapping[int, Mapping[str, Any]]) -> dict[int, str]:
    return {case: row["failed"] for case, row in rows.items() if "failed" in row}


def _check_alike(runs: Sequence[Results]) -> None:
    """Refuse runs whose numbers do not belong side by side."""
    for name in ("model_hash", "protocol", "prepend_bos"):
        if len({str(run.setting.get(name)) for run in runs}) > 1:
            raise ValueError(f"the runs have another {name}; they do not belong side by side")
    seen: dict[int, Any] = {}
    for run in runs:
        for case, row in run.before.items():
            if seen.setdefault(case, row.get("record")) != row.get("record"):
                raise ValueError(f"the runs have another record {case}: another data set")


def _protocol(runs: Sequence[Results], shown: Sequence[str]) -> str:
    return PROTOCOLS[runs[0].protocol] + (GENERATION if "GE" in shown else "")


def markdown(runs: Sequence[Results]) -> str:
    """A Markdown table: the unedited model, then a row a method, with what the numbers mean."""
    head, rows = cells(runs)
    for row in rows:  # a name is whatever a file says
        row[0] = html.escape(" ".join(row[0].split()), quote=False).replace("|", "\\|")
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    lines.insert(1, "|---" * len(head) + "|")
    return "\n".join([*lines, "", _protocol(runs, head)])


def latex(runs: Sequence[Results]) -> str:
    """The same as a LaTeX `tabular` with booktabs rules; what the numbers mean is a comment."""
    head, rows = cells(runs)
    for row in rows:
        row[0] = "".join(_LATEX.get(letter, letter) for letter in " ".join(row[0].split()))
    lines = [" & ".join(row) + r" \\" for row in (head, *rows)]
    spec = "l" + "r" * (len(head) - 1)
    return "\n".join(
        [
            "% " + _protocol(runs, head).replace("%", r"\%"),
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
    """A Markdown table of paired differences, one less other, and p-values of sign-flip tests."""
    lines = [f"| {one.name} less {other.name} | difference | p |", "|---|---|---|"]
    for name, (difference, p) in one.compare(other).items():
        lines.append(f"| {name} | {difference} | {p:.2g} |")
    return "\n".join(lines)
