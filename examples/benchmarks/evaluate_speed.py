"""Scoring CounterFact records by the evaluator and the plain way: records an hour, equality.

    python examples/benchmarks/evaluate_speed.py RECORDS.json [--records 10] [--neighbours 10]

The plain way does what the released code does short of batching: each prompt with each target is a
pass of its own, with logits at every position, before and after the edit. Both ways take the same
edits, made before the clock starts, and verify nothing but what they always do. Each record gets
the neighbourhood prompts of others too, as many as the published file has. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import torch
from measure import Measured

from transformer_lens_rome import CounterFact, applied, evaluate_counterfact, get_method
from transformer_lens_rome.demo import load_demo_model
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


def main() -> None:
    """Read the options, run both ways, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", help="CounterFact records")
    parser.add_argument("--records", type=int, default=10)
    parser.add_argument("--neighbours", type=int, default=10)
    args = parser.parse_args()
    every = sorted(CounterFact.load(args.file), key=lambda record: record.case_id)
    prompts = [record.neighborhood_prompts[0] for record in every]
    records = [
        dataclasses.replace(
            record, neighborhood_prompts=tuple(prompts[i * args.neighbours :][: args.neighbours])
        )
        for i, record in enumerate(every[: args.records])
    ]
    model = load_demo_model()
    encoder, method = Encoder.of(model), get_method("ft", steps=5)
    edits = {record.request.text: method.compute(model, record.request) for record in records}

    with Measured(torch.device("cpu")) as plain:
        by_hand = []
        for record in records:
            with applied(model, edits[record.request.text]):
                after = plain_scores(model, encoder, record)
            by_hand.append((plain_scores(model, encoder, record), after))
    with Measured(torch.device("cpu")) as ours:
        found = evaluate_counterfact(model, records, Made(edits), progress=False)

    rows = [(found.before[r.case_id], found.after[r.case_id]) for r in records]
    apart = max(
        abs(mine - theirs)
        for pair, other in zip(rows, by_hand, strict=True)
        for row, scores in zip(pair, other, strict=True)
        for mine, theirs in zip(
            record_metrics(row.scores).values(), record_metrics(scores).values(), strict=True
        )
    )
    print("| way | seconds | records an hour | peak MB above the model |\n|---|---|---|---|")
    for name, run in (("plain", plain), ("evaluator", ours)):
        rate = 3600 * len(records) / run.seconds
        print(f"| {name} | {run.seconds:.1f} | {rate:.0f} | {run.peak_mb:.0f} |")
    print(f"\nratio {plain.seconds / ours.seconds:.2f}; metrics differ by {apart:.1e} at most")


if __name__ == "__main__":
    main()
