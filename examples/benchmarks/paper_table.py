"""The paper's comparison on CounterFact: unedited, FT, FT+L, KN, KE, KE-CF, MEND, MEND-CF, ROME.

    python examples/benchmarks/paper_table.py MODEL RECORDS [NAME ...] [--editors FOLDER]

MODEL is gemma or smollm2. RECORDS is CounterFact in the published schema. The first 200 records
that are not in examples/results/choosing_records.json are scored, with attribute prompts and with
CounterFact+; for the first 50 of them, text is generated after their first three generation
prompts. Each method has its defaults. FOLDER is where `train_editors.py` put KE and MEND. Beside
the paper's methods, NAME may be `in-context`: the fact before each prompt, and no changed weight.

Rows of the methods that are named go to examples/results/counterfact/MODEL as they come; a run that
was stopped goes on where it was. `examples/scripts/tables.py` makes the tables.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

from transformer_lens_rome import CounterFact, evaluate_counterfact, get_method
from transformer_lens_rome.demo import load_demo_model
from transformer_lens_rome.evaluation import CounterFactRecord

NAMES = ("ft", "ft+l", "kn", "ke", "ke-cf", "mend", "mend-cf", "rome")
RESULTS = Path(__file__).parents[1] / "results"
N, N_GENERATED, N_TEXTS, BATCH = 200, 50, 3, 8


def table_records(path: str) -> CounterFact:
    """Return the records of the tables: those on which no setting was chosen."""
    records = CounterFact.load(path)
    chosen = json.loads((RESULTS / "choosing_records.json").read_text(encoding="utf-8"))
    return records.only([record.case_id for record in records if record.case_id not in chosen][:N])


def paper_method(name: str, editors: Path | None) -> Any:
    """Return a method with its defaults, or a trained editor from the folder `editors`."""
    if not name.startswith(("ke", "mend")):
        return get_method(name)
    if editors is None:
        raise SystemExit(f"{name} is a trained editor; pass --editors FOLDER")
    return get_method(name, editor=editors / name)


def with_few_texts(record: CounterFactRecord) -> CounterFactRecord:
    """Return the record with its first generation prompts only."""
    return dataclasses.replace(record, generation_prompts=record.generation_prompts[:N_TEXTS])


def main() -> None:
    """Score the methods named, and generate text after their edits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=("gemma", "smollm2"))
    parser.add_argument("records", help="CounterFact, published schema")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--editors", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    records = table_records(args.records)
    some = [with_few_texts(record) for record in records[:N_GENERATED]]
    model, folder = load_demo_model(args.model), RESULTS / "counterfact" / args.model
    for name in args.names:
        method, file = paper_method(name, args.editors), f"{name}.jsonl"
        run = partial(evaluate_counterfact, model, batch_size=BATCH)
        run(records, method, out=folder / file, attributes=True, counterfact_plus=True)
        run(some, method, out=folder / "generated" / file, generate=True)


if __name__ == "__main__":
    main()
