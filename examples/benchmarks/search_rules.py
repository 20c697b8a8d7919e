"""Rules of the search for v*: what an edit costs, and what it does to CounterFact's metrics.

    python examples/benchmarks/search_rules.py RECORDS OUT [RULE ...] [--first 25]
    python examples/benchmarks/search_rules.py RECORDS OUT --choose TRAIN

RECORDS is CounterFact in the published schema. Only the records that are listed in
examples/results/choosing_records.json are used, in the file's order: those that settings may be
chosen on. `--choose` writes that list: of RECORDS, those whose case ids are among the first 1,420
of TRAIN, and the first of the others, until there are 100.

Each rule named edits the records on the demo model with the default layer, clamp and prefixes, and
all their prompts are scored before and after. Rows go to OUT as they come, and a run that was
stopped goes on where it was. Then prints a Markdown table of all rules that OUT has. Operations are
those of edits one by one: in a batch, short prompts are padded.
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
from transformer_lens_rome.demo.gemma import load_demo_model
from transformer_lens_rome.evaluation import CounterFactRecord, Results
from transformer_lens_rome.evaluation.metrics import score
from transformer_lens_rome.files.strict_json import parse
from transformer_lens_rome.methods.base import described
from transformer_lens_rome.methods.rome import Rome

SHOWN = ("ES", "PS", "NS", "S", "EM", "PM", "EA")
CHOSEN = Path(__file__).parents[1] / "results" / "choosing_records.json"
RULES = {
    "loss": RomeConfig(stop="loss", prefixes_a_step=None),
    "top": RomeConfig(stop="top", prefixes_a_step=None),
    "top-7": RomeConfig(stop="top", prefixes_a_step=7),
}


class Counted:
    """ROME with one rule; what each edit costs is written down.

    Attributes:
        name: The rule's name.
        options: What identifies the run; of the constants, those that are not the released ones.
    """

    def __init__(self, name: str, rome: Rome, costs: Path) -> None:
        self.name, self._rome, self._costs = name, rome, costs
        constants = dataclasses.asdict(rome.config)
        same = dataclasses.asdict(RomeConfig.released())
        changed = {k: v for k, v in constants.items() if v != same[k]}
        self.options = described(rome)["options"] | {"config": changed}

    def compute(self, model: Any, request: Any, *, seed: int = 0) -> Any:
        """Return the edit of a request, and count its operations."""
        edits: list[Any] = []
        flops = count_flops(lambda: edits.append(self._rome.compute(model, request, seed=seed)))
        row = {"request": request.text, "steps": len(edits[0].health.losses), "gflop": flops / 1e9}
        with self._costs.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        return edits[0]


def choose(records: CounterFact, train: str) -> None:
    """Write the case ids of the records that settings may be chosen on."""
    items = parse(Path(train).read_bytes(), train)
    seen = {item["case_id"] for item in items[:1420]}
    cases = [record.case_id for record in records]
    old = [case for case in cases if case in seen]
    new = [case for case in cases if case not in seen][: 100 - len(old)]
    print(f"{len(old)} of {len(records)} records were among the first 1,420 of {train}")
    CHOSEN.write_text(json.dumps(sorted(old + new, key=cases.index)) + "\n", encoding="utf-8")


def run(records: Sequence[CounterFactRecord], out: Path, names: Sequence[str]) -> None:
    """Edit and score the records with each rule."""
    model = load_demo_model()
    prepared = Rome().prepared(model)
    for name in names:
        rome = dataclasses.replace(prepared, config=RULES[name]).prepared(model)
        method = Counted(name, rome, out / f"{name}_costs.jsonl")
        evaluate_counterfact(model, records, method, out=out / f"{name}.jsonl", progress=False)


def costs(path: Path, records: Sequence[CounterFactRecord]) -> tuple[float, float]:
    """Return the mean steps and GFLOP of an edit; of a request made twice, the last counts."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    by_request = {row["request"]: row for row in rows}
    found = [by_request[record.request.text] for record in records]
    return fmean(row["steps"] for row in found), fmean(row["gflop"] for row in found)


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
    head = ["rule", "records", "steps", "GFLOP an edit", *SHOWN, "S less that of `loss`"]
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for name, results in runs.items():
        done = [record for record in records if record.case_id in results.after]
        steps, gflop = costs(out / f"{name}_costs.jsonl", done)
        scores = results.scores()
        cells = " | ".join(str(scores[m]) for m in SHOWN)
        less, half = difference_of_S(results, runs["loss"])
        less = f"{less:+.1f} ({half:.1f})" if results is not runs["loss"] else ""
        print(f"| `{name}` | {len(done)} | {steps:.1f} | {gflop:.0f} | {cells} | {less} |")


def main() -> None:
    """Read the options, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("records", help="CounterFact, published schema")
    parser.add_argument("out", type=Path, help="the folder of the rows")
    parser.add_argument("rules", nargs="*", metavar="RULE", help=f"of {', '.join(RULES)}")
    parser.add_argument("--first", type=int, default=100, help="the number of records")
    parser.add_argument("--choose", metavar="TRAIN", help="write the list of records and stop")
    args = parser.parse_args()
    every = CounterFact.load(args.records)
    if args.choose:
        return choose(every, args.choose)
    cases = json.loads(CHOSEN.read_text(encoding="utf-8"))[: args.first]
    records = [record for record in every if record.case_id in set(cases)]
    if args.rules:
        args.out.mkdir(parents=True, exist_ok=True)
        run(records, args.out, args.rules)
    names = [name for name in RULES if (args.out / f"{name}.jsonl").exists()]
    show(records, args.out, names)


if __name__ == "__main__":
    main()
