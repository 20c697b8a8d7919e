"""Make the tables of README and guide anew from the committed rows.

    python examples/scripts/tables.py

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`. Rows are in
examples/results/, where the scripts that the pages name wrote them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from choose_settings import RESULTS, choosing_records
from choose_settings import table as settings_table

from transformer_lens_rome.evaluation import Results

EXAMPLES = Path(__file__).parents[1]
PAGES = [EXAMPLES.parent / "README.md", *sorted((EXAMPLES / "guide").glob("*.md"))]
METHODS = ("ft", "ft+l", "kn", "ke", "ke-cf", "mend", "mend-cf", "rome", "in-context")
MARKED = re.compile(r"(<!-- table: (.+?) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def settings(model: str, first: int) -> str:
    """Return the table of ROME's settings on the first of the choosing records."""
    return settings_table(RESULTS / "settings" / model, choosing_records()[:first])


def _complete(folder: Path, n: int) -> dict[str, Results]:
    """Return the runs of a folder that have n records, by name."""
    paths = {name: folder / f"{name}.jsonl" for name in METHODS}
    runs = {name: Results.load(path) for name, path in paths.items() if path.exists()}
    return {name: run for name, run in runs.items() if len(run.after) == n}


def paper(model: str, columns: str) -> str:
    """Return some columns of the paper's table, with the runs that have all records.

    GE is of the runs that generated text.
    """
    folder = RESULTS / "counterfact" / model
    runs, texts = _complete(folder, 200), _complete(folder / "generated", 50)
    names = list(runs)
    head = columns.split()
    lines = ["| | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    for name in ("unedited", *names):
        edited, source = name != "unedited", name if name != "unedited" else names[0]
        scores = runs[source].scores(edited=edited)
        run = texts.get(source) if edited else next(iter(texts.values()), None)
        if run is not None:
            scores |= {"GE": run.scores(edited=edited)["GE"]}
        cells = " | ".join(str(scores.get(column, "")) for column in head)
        lines.append(f"| {name if name == 'unedited' else name.upper()} | {cells} |")
    return "\n".join(lines)


TABLES: dict[str, Callable[[], str]] = {
    **{
        f"settings of {model}, {first} records": partial(settings, model, first)
        for model in ("gemma", "smollm2")
        for first in (25, 100)
    },
    **{
        f"methods on {model}{more}": partial(paper, model, columns)
        for model in ("gemma", "smollm2")
        for more, columns in (
            ("", "S ES EM PS PM NS NM GE"),
            (", further columns", "NS+ NM+ NKL NKL+ AS AM EA PA NA"),
        )
    },
}


def filled(text: str) -> str:
    """Return a page with its tables made anew."""
    return MARKED.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}", text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
