"""Scoring CounterFact records, one at a time, in batches and the plain way: speed and equality.

    python examples/benchmarks/evaluate_speed.py RECORDS.json [--records 10] [--batches 1 5 10]

RECORDS is in the published schema. The plain way does what the released code does short of
batching: each prompt with each target is a pass of its own, with logits at every position, before
and after the edit. All ways take the same edits, made before the clock starts, and verify nothing
but what they always do. Prints a Markdown table, with counted operations and what the machine
reaches in products of like shapes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from measure import Measured, count_flops, matmul_flops_per_second

from transformer_lens_rome import CounterFact, applied, evaluate_counterfact, get_method
from transformer_lens_rome.demo import load_demo_model
from transformer_lens_rome.evaluation import Results
from transformer_lens_rome.evaluation.metrics import PromptScore, record_metrics
from transformer_lens_rome.prompts.encoder import Encoder


class Made:
    """A method whose edits are there already."""

    name = "made before"

    def __init__(self, edits: dict[str, Any]) -> None:
        self._edits = edits

    def compute(self, model: Any, request: Any, *, seed: int = 0) -> Any:
        """The edit of a request."""
        return self._edits[request.text]


@torch.no_grad()
def plain_scores(model: Any, encoder: Encoder, record: Any) -> dict[str, list[PromptScore]]:
    """Every prompt and target alone, with all logits."""
    request, scores = record.request, {}
    kinds = {
        "rewrite": [request.text],
        "paraphrase": record.paraphrase_prompts,
        "neighborhood": record.neighborhood_prompts,
    }
    for kind, prompts in kinds.items():
        scores[kind] = []
        for prompt in prompts:
            found, correct = [], []
            for target in (request.target_new, request.target_true):
                row = encoder.row(prompt, target=target)
                log_probs = model(torch.tensor([row.ids]))[0].float().log_softmax(-1)
                pairs = [(log_probs[p - 1], row.ids[p]) for p in row.target]
                found.append([at[token].item() for at, token in pairs])
                correct.append([int(at.argmax()) == token for at, token in pairs])
            scores[kind].append(PromptScore(*found, *correct))
    return scores


def apart(found: Results, by_hand: list[Any], records: Any) -> float:
    """Return the largest difference of a metric of a record."""
    pairs = [(found.before[r.case_id].scores, found.after[r.case_id].scores) for r in records]
    differences = [
        abs(mine - theirs)
        for pair, other in zip(pairs, by_hand, strict=True)
        for scores, plain in zip(pair, other, strict=True)
        for mine, theirs in zip(
            record_metrics(scores).values(), record_metrics(plain).values(), strict=True
        )
    ]
    return max(differences)


def main() -> None:
    """Read the options, run all ways, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", help="CounterFact records")
    parser.add_argument("--records", type=int, default=10)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 5, 10])
    args = parser.parse_args()
    records = CounterFact.load(args.file, limit=args.records)
    model, cpu = load_demo_model(), torch.device("cpu")
    encoder, method = Encoder.of(model), get_method("ft", steps=5)
    edits = {record.request.text: method.compute(model, record.request) for record in records}
    evaluate_counterfact(model, records[:2], Made(edits), progress=False, batch_size=2)  # trials

    by_hand: list[Any] = []

    def plain() -> None:
        by_hand.clear()
        for record in records:
            with applied(model, edits[record.request.text]):
                after = plain_scores(model, encoder, record)
            by_hand.append((plain_scores(model, encoder, record), after))

    print("| way | records an hour | ratio | GFLOP a record | GFLOP/s | peak MB | difference |")
    print("|---|---|---|---|---|---|---|")
    base = row("plain", plain, records, cpu)
    for size in args.batches:
        found: list[Results] = []
        run = partial(evaluate_counterfact, model, records, Made(edits), progress=False)
        row(
            f"batches of {size}",
            lambda run=run, size=size, found=found: found.append(run(batch_size=size)),
            records,
            cpu,
            base,
            lambda found=found: apart(found[0], by_hand, records),
        )
    width = model.cfg.d_model
    for tokens in (64, 256):
        speed = matmul_flops_per_second(tokens, width, 4 * width, cpu, torch.float32) / 1e9
        print(f"\n[{tokens}, {width}] @ [{width}, {4 * width}]: {speed:.0f} GFLOP/s")


def row(
    name: str,
    run: Callable[[], Any],
    records: Any,
    device: torch.device,
    base: float | None = None,
    difference: Callable[[], float] = lambda: 0.0,
) -> float:
    """Time a way, count its operations in a second run, print its row; return its seconds."""
    with Measured(device) as measured:
        run()
    gflop = count_flops(run) / 1e9
    rate, ratio = 3600 * len(records) / measured.seconds, (base or measured.seconds)
    cells = f"{rate:.0f} | {ratio / measured.seconds:.2f} | {gflop / len(records):.0f} | "
    cells += f"{gflop / measured.seconds:.0f} | {measured.peak_mb:.0f} | {difference():.1e}"
    print(f"| {name} | {cells} |", flush=True)
    return measured.seconds


if __name__ == "__main__":
    main()
