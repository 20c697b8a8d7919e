"""The results of an evaluation: raw numbers, and tables made from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformer_lens_rome.counterfact.metrics import (
    NAMES,
    Estimate,
    paired_difference,
    record_metrics,
    summarise,
)
from transformer_lens_rome.counterfact.run_file import read_run

PROTOCOL = (
    "In percent, half of the 95% interval in brackets. ES, PS: p(new) > p(true) after the prompt "
    "and after paraphrases; NS: p(true) > p(new) at neighbours; EM, PM, NM: the mean differences; "
    "EA, PA, NA: all tokens of the new (NA: true) target are top tokens; p: the geometric mean "
    "over the target's tokens, teacher-forced; S: the harmonic mean of ES, PS and NS, with a "
    "bootstrap's interval."
)


@dataclass(frozen=True)
class Results:
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
            ValueError: not a run's file, or a damaged one.
            OSError: no such file, or no `unedited.jsonl` beside it.
        """
        path = Path(path)
        head, rows = read_run(path)
        _, unedited = read_run(path.with_name("unedited.jsonl"))
        before = {row["case_id"]: row for row in unedited}
        if "method" not in head["setting"]:
            return cls("unedited", head["setting"], before, {})
        after = {row["case_id"]: row for row in rows}
        before = {case: before[case] for case in after if case in before}
        return cls(head["setting"]["method"]["name"], head["setting"], before, after)

    @property
    def failed(self) -> dict[int, str]:
        """Why the edit of a record failed, by case; such records are in no average."""
        return {case: row["failed"] for case, row in self.after.items() if "failed" in row}

    def metrics(self, *, edited: bool | None = None) -> dict[int, dict[str, float]]:
        """ES to NA of each record, as fractions; of the edited model where there is one."""
        edited = bool(self.after) if edited is None else edited
        rows = self.after if edited else self.before
        return {
            case: record_metrics(row["scores"]) for case, row in rows.items() if "scores" in row
        }

    def scores(self, *, edited: bool | None = None) -> dict[str, Estimate]:
        """S, ES, EM, PS, PM, NS, NM and accuracies in percent, with their 95% intervals."""
        return summarise(list(self.metrics(edited=edited).values()))

    def compare(self, other: Results) -> dict[str, tuple[Estimate, float]]:
        """Differences to another method on the records that both have, and p-values.

        A sign-flip test on paired records; see `metrics.paired_difference`.

        Raises:
            ValueError: the runs are of different models, or have no record in common.
        """
        if self.setting.get("model_hash") != other.setting.get("model_hash"):
            raise ValueError("the runs are of different models")
        mine, theirs = self.metrics(), other.metrics()
        both = [case for case in mine if case in theirs]
        if not both:
            raise ValueError("the runs have no record in common")
        one, two = ([run[case] for case in both] for run in (mine, theirs))
        names = [name for name in NAMES[1:] if name in one[0] and name in two[0]]
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

    def table(self, *others: Results) -> str:
        """A Markdown table of the unedited model, this method and others."""
        return markdown([self, *others])


def markdown(runs: Sequence[Results], names: Sequence[str] = NAMES) -> str:
    """A Markdown table: the unedited model, then a row a method, with what the numbers mean."""
    first = runs[0].scores(edited=False)
    shown = [name for name in names if name in first]
    lines = ["| method | records | failed | " + " | ".join(shown) + " |"]
    lines.append("|---" * (len(shown) + 3) + "|")
    rows = [("unedited", first, 0)]
    rows += [(run.name, run.scores(), len(run.failed)) for run in runs if run.after]
    for name, scores, failed in rows:
        n = scores["S"].n if "S" in scores else 0
        cells = " | ".join(str(scores[m]) if m in scores else "" for m in shown)
        lines.append(f"| {name} | {n} | {failed} | {cells} |")
    return "\n".join([*lines, "", PROTOCOL])
