"""Rules of the search for v*: what an edit costs, and what it does to CounterFact's metrics.

    python examples/benchmarks/search_rules.py RECORDS OUT [RULE ...] [--first 25]
    python examples/benchmarks/search_rules.py RECORDS OUT --choose TRAIN

RECORDS is CounterFact in the published schema. Only the records that are listed in
examples/results/choosing_records.json are used, in the file's order: those that settings may be
chosen on. `--choose` writes that list: of RECORDS, those whose case ids are among the first 1,420
of TRAIN, and the first of the others, until there are 100.

Each rule named edits the records on the demo model with the default layer, clamp and prefixes, and
all their prompts are scored before and after. Rows go to OUT as they come, and a run that was
stopped goes on where it was. Then steps and operations of the first --count records are counted,
one edit after another (in a batch, short prompts are padded), and a Markdown table of all rules
that OUT has is printed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from measure import count_flops

from transformer_lens_rome import CounterFact, RomeConfig, evaluate_counterfact
from transformer_lens_rome.demo import load_demo_model
from transformer_lens_rome.evaluation import CounterFactRecord, Results
from transformer_lens_rome.evaluation.metrics import score
from transformer_lens_rome.files.strict_json import parse
from transformer_lens_rome.methods.rome import Rome

SHOWN = ("ES", "PS", "NS", "S", "EM", "PM", "EA")
CHOSEN = Path(__file__).parents[1] / "results" / "choosing_records.json"
RULES = {
    "loss": RomeConfig(stop="loss", prefixes_a_step=None),
    "top": RomeConfig(stop="top", prefixes_a_step=None),
    "top-7": RomeConfig(stop="top", prefixes_a_step=7),
}


def choose(records: CounterFact, train: str) -> None:
    """Write the case ids of the records that settings may be chosen on."""
    items = parse(Path(train).read_bytes(), train)
    seen = {item["case_id"] for item in items[:1420]}
    cases = [record.case_id for record in records]
    old = [case for case in cases if case in seen]
    new = [case for case in cases if case not in seen][: 100 - len(old)]
    print(f"{len(old)} of {len(records)} records were among the first 1,420 of {train}")
    CHOSEN.write_text(json.dumps(sorted(old + new, key=cases.index)) + "\n", encoding="utf-8")


def run(records: Sequence[CounterFactRecord], out: Path, names: Sequence[str], n: int) -> None:
    """Edit and score the records with each rule; count what the edits of the first n cost."""
    model = load_demo_model()
    prepared = Rome().prepared(model)
    for name in names:
        rome = dataclasses.replace(prepared, config=RULES[name]).prepared(model)
        path = out / f"{name}.jsonl"
        evaluate_counterfact(model, records, rome, out=path, progress=False, batch_size=4)
    for name in names:
        rome = dataclasses.replace(prepared, config=RULES[name]).prepared(model)
        with (out / f"{name}_costs.jsonl").open("a+", encoding="utf-8") as file:
            file.seek(0)
            done = {json.loads(line)["case_id"] for line in file}
            for record in records[:n]:
                if record.case_id not in done:
                    file.write(json.dumps(cost(model, rome, record)) + "\n")
                    file.flush()


def cost(model: Any, rome: Rome, record: CounterFactRecord) -> dict[str, Any]:
    """Return the steps and the operations of a record's edit."""
    edits: list[Any] = []
    flops = count_flops(lambda: edits.append(rome.compute(model, record.request)))
    steps = len(edits[0].health.losses)
    return {"case_id": record.case_id, "steps": steps, "gflop": flops / 1e9}


def costs(path: Path) -> tuple[int, float, float]:
    """Return the number of edits that were counted, their mean steps and their mean GFLOP."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines] or [{"steps": 0, "gflop": 0}]
    return len(lines), fmean(row["steps"] for row in rows), fmean(row["gflop"] for row in rows)


def difference_of_S(one: Results, other: Results, times: int = 10_000) -> tuple[float, float]:
    """Return S less the other's S, with half of its 95% interval: a bootstrap over records."""
    mine, theirs = one.metrics(), other.metrics()
    both = [case for case in mine if case in theirs]
    values = [
        torch.tensor([[100 * run[case][m] for m in ("ES", "PS", "NS")] for case in both]).double()
        for run in (mine, theirs)
    ]
    chosen = torch.randint(
        len(both), (times, len(both)), generator=torch.Generator().manual_seed(0)
    )
    first, second = (3 / (1 / some[chosen].mean(1)).sum(1) for some in values)
    low, high = (first - second).quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    point = [score(*some.mean(0).tolist()) for some in values]
    return point[0] - point[1], (high - low) / 2


def show(records: Sequence[CounterFactRecord], out: Path, names: Sequence[str]) -> None:
    """Print the table, on the records that each rule has."""
    cases = {record.case_id for record in records}
    runs = {}
    for name in names:
        loaded = Results.load(out / f"{name}.jsonl")
        after = {case: row for case, row in loaded.after.items() if case in cases}
        runs[name] = dataclasses.replace(loaded, after=after)
    head = ["rule", "records", "counted", "steps", "GFLOP an edit", *SHOWN, "S less that of `loss`"]
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for name, results in runs.items():
        counted, steps, gflop = costs(out / f"{name}_costs.jsonl")
        n = len(results.after)
        scores = results.scores()
        cells = " | ".join(str(scores[m]) for m in SHOWN)
        less, half = difference_of_S(results, runs["loss"])
        less = f"{less:+.1f} ({half:.1f})" if results is not runs["loss"] else ""
        print(f"| `{name}` | {n} | {counted} | {steps:.1f} | {gflop:.0f} | {cells} | {less} |")


def main() -> None:
    """Read the options, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("records", help="CounterFact, published schema")
    parser.add_argument("out", type=Path, help="the folder of the rows")
    parser.add_argument("rules", nargs="*", metavar="RULE", help=f"of {', '.join(RULES)}")
    parser.add_argument("--first", type=int, default=100, help="the number of records")
    parser.add_argument("--count", type=int, default=25, help="edits whose operations are counted")
    parser.add_argument("--choose", metavar="TRAIN", help="write the list of records and stop")
    args = parser.parse_args()
    every = CounterFact.load(args.records)
    if args.choose:
        return choose(every, args.choose)
    cases = json.loads(CHOSEN.read_text(encoding="utf-8"))[: args.first]
    records = every.only(cases)
    if args.rules:
        args.out.mkdir(parents=True, exist_ok=True)
        run(records, args.out, args.rules, args.count)
    names = [name for name in RULES if (args.out / f"{name}.jsonl").exists()]
    show(records, args.out, names)


if __name__ == "__main__":
    main()
