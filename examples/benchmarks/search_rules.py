"""Rules of the search for v*: what an edit costs, and what it does to CounterFact's metrics.

    python examples/scripts/choose_settings.py gemma RECORDS --first 100 SETTING ...
    python examples/benchmarks/search_rules.py RECORDS [--count 25]

The first command edits and scores the choosing records with the settings of RULES. The second one
counts steps and operations of the first --count of their edits, one after another (in a batch,
short prompts are padded), adds them to examples/results/search_rules/, and prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from measure import count_flops

from transformer_lens_rome import CounterFact
from transformer_lens_rome.demo import load_demo_model
from transformer_lens_rome.evaluation import Results
from transformer_lens_rome.evaluation.metrics import score
from transformer_lens_rome.methods.rome import Rome

sys.path.append(str(Path(__file__).parents[1] / "scripts"))
from choose_settings import RESULTS, choosing_records, rome, with_prefixes

SHOWN = ("ES", "PS", "NS", "S", "EM", "PM", "EA")
RULES = {
    "all prefixes, until the loss is below 0.05": (
        "layer=0,clamp=0.75,stop=loss,prefixes_a_step=21"
    ),
    "7 prefixes a step, until the target is on top": "layer=0,clamp=0.75",
}


def count(records: CounterFact) -> None:
    """Count what the edits of the records cost, with each rule."""
    model = load_demo_model()
    prepared = with_prefixes(model, RESULTS / "settings" / "gemma")
    for setting in RULES.values():
        method = rome(model, prepared, setting)
        path = RESULTS / "search_rules" / f"{setting}.jsonl"
        with path.open("a+", encoding="utf-8") as file:
            file.seek(0)
            done = {json.loads(line)["case_id"] for line in file}
            for record in records:
                if record.case_id not in done:
                    file.write(json.dumps(cost(model, method, record)) + "\n")
                    file.flush()


def cost(model: Any, method: Rome, record: Any) -> dict[str, Any]:
    """Return the steps and the operations of a record's edit."""
    edits: list[Any] = []
    flops = count_flops(lambda: edits.append(method.compute(model, record.request)))
    steps = len(edits[0].health.losses)
    return {"case_id": record.case_id, "steps": steps, "gflop": flops / 1e9}


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


def table() -> str:
    """Return a Markdown table of the rules."""
    folder = RESULTS / "settings" / "gemma"
    runs = {rule: Results.load(folder / f"{setting}.jsonl") for rule, setting in RULES.items()}
    released, *_ = runs.values()
    head = ["rule", "steps", "GFLOP an edit", *SHOWN, "S less that of the first rule"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for rule, setting in RULES.items():
        text = (RESULTS / "search_rules" / f"{setting}.jsonl").read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.splitlines()]
        steps, gflop = (fmean(row[name] for row in rows) for name in ("steps", "gflop"))
        scores = runs[rule].scores(cases=set(released.after))
        cells = " | ".join(str(scores[m]) for m in SHOWN)
        less, half = difference_of_S(runs[rule], released)
        less = "" if runs[rule] is released else f"{less:+.1f} ({half:.1f})"
        lines.append(f"| {rule} | {steps:.1f} | {gflop:.0f} | {cells} | {less} |")
    return "\n".join(lines)


def main() -> None:
    """Read the options, count, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("records", help="CounterFact, published schema")
    parser.add_argument("--count", type=int, default=25, help="edits whose operations are counted")
    args = parser.parse_args()
    count(CounterFact.load(args.records).only(choosing_records()[: args.count]))
    print(table())


if __name__ == "__main__":
    main()
