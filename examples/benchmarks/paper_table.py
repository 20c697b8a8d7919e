"""The paper's comparison on CounterFact: unedited, FT, FT+L, KN, KE, KE-CF, MEND, MEND-CF, ROME.

    python examples/benchmarks/paper_table.py RECORDS TEXT EDITORS [NAME ...]

RECORDS are CounterFact records. By case_id, the first 200 are scored (KN: 50, it is slow), and text
is generated for the first 10; settings were chosen on records 200 to 319, and KE-CF and MEND-CF
were trained on records 320 to 1419 (`train_editors.py`, which fills the folder EDITORS). TEXT is
where ROME's second moment comes from. SNIPPETS=FILE in the environment (attribute_snippets.json)
adds RS.

Runs the methods named, else all, and prints the table of all runs that there are. Rows go to
examples/results/counterfact/ as they come; a run that was stopped goes on where it was.
"""

import os
import sys

from paper_methods import NAMES, RESULTS, paper_method

from transformer_lens_rome import CounterFact, evaluate_counterfact
from transformer_lens_rome.demo import load_demo_model
from transformer_lens_rome.evaluation import References, Results, comparison, markdown

FOLDER = RESULTS / "counterfact"
N, N_GENERATED = {"kn": 50}, 10


def run(records_file: str, text: str, editors: str, *names: str) -> None:
    """Score the methods named, and generate text after their edits."""
    records = sorted(CounterFact.load(records_file), key=lambda record: record.case_id)[:200]
    some = records[:N_GENERATED]
    snippets = os.environ.get("SNIPPETS")
    references = References.extract(some, snippets) if snippets else None
    model = load_demo_model()
    for name in names or NAMES:
        method, file = paper_method(name, model, text, editors), f"{name}.jsonl"
        evaluate_counterfact(model, records[: N.get(name, 200)], method, out=FOLDER / file)
        out = FOLDER / "generated" / file
        evaluate_counterfact(model, some, method, out=out, generate=True, references=references)


def show() -> None:
    """Print both tables, and the paired tests of ROME against the others."""
    for folder in (FOLDER, FOLDER / "generated"):
        runs = [
            Results.load(folder / f"{n}.jsonl") for n in NAMES if (folder / f"{n}.jsonl").exists()
        ]
        print(f"\n{folder.name}\n\n{markdown(runs)}\n")
        for other in runs[:-1]:
            print(f"\n{comparison(runs[-1], other)}")


if __name__ == "__main__":
    run(*sys.argv[1:])
    show()
