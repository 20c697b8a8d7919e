"""Traces from gradients against exact ones: rank correlation, misses, seconds, operations.

    python examples/benchmarks/gradient_traces.py MODEL FOLDER KNOWN_FACTS.json [--facts 50]

MODEL is gemma or smollm2, FOLDER has the exact traces that `average_traces.py` keeps there. The
known facts are traced from gradients with the same noise, and compared cell by cell:

    Spearman    of all cells from the subject on, the mean over facts and the quartiles
    checked     the same of the cells that a user sees: 20 largest estimates and 20 others
    misses      of the five cells with the largest exact scores, those that were not run exactly

Time and operations are of the first fact, exact and estimated, in the same run. Prints Markdown.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from measure import Measured, count_flops

from transformer_lens_rome.demo import load_demo_model
from transformer_lens_rome.tracing.causal_trace import causal_trace, gradient_traces
from transformer_lens_rome.tracing.estimated_trace import EstimatedTrace, rank_correlation
from transformer_lens_rome.tracing.fact_traces import facts_known_to
from transformer_lens_rome.tracing.known_facts import KnownFact, load_known_facts
from transformer_lens_rome.tracing.results import CausalTrace

KINDS = ("resid", "mlp", "attn")


def compared(exact: CausalTrace, found: EstimatedTrace) -> tuple[float, float, int]:
    """Return the rank correlation of all cells and of the checked ones, and the misses."""
    first = exact.subject_positions[0]
    effects, estimates = (trace.scores[:, first:].flatten() for trace in (exact, found))
    width = exact.samples.shape[2] - first
    run = {layer * width + position - first for layer, position in found.checked.tolist()}
    missed = set(effects.topk(5).indices.tolist()) - run
    return rank_correlation(effects, estimates), found.agreement.spearman, len(missed)


def cost(model: object, fact: KnownFact, noise_std: float) -> list[str]:
    """Return a table of seconds and operations of the three grids of a fact, both ways."""
    known = {"noise_std": noise_std, "occurrence": 0}

    def exact() -> None:
        for kind in KINDS:
            causal_trace(model, fact.prompt, fact.subject, kind=kind, progress=False, **known)

    lines = ["| three grids | exact | gradient | ratio |", "|---|---|---|---|"]
    seconds, operations = [], []
    for run in (exact, lambda: gradient_traces(model, fact.prompt, fact.subject, **known)):
        with Measured(torch.device("cpu")) as took:
            run()
        seconds.append(took.seconds)
        operations.append(count_flops(run) / 1e9)
    for name, (one, other) in (("seconds", seconds), ("GFLOP", operations)):
        lines.append(f"| {name} | {one:.1f} | {other:.1f} | {one / other:.2f} |")
    return lines


def main() -> None:
    """Read the options, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=("gemma", "smollm2"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("known_facts")
    parser.add_argument("--facts", type=int, default=50)
    args = parser.parse_args()
    model = load_demo_model(args.model)
    facts, _ = facts_known_to(model, load_known_facts(args.known_facts), limit=args.facts)
    rows: dict[str, list[tuple[float, float, int]]] = {kind: [] for kind in KINDS}
    for fact in facts:
        exact = {
            kind: CausalTrace.load(args.folder / kind / f"{fact.known_id}.safetensors")
            for kind in KINDS
        }
        noise_std = exact["resid"].info["noise_std"]
        known = {"noise_std": noise_std, "occurrence": 0}
        found = gradient_traces(model, fact.prompt, fact.subject, **known)
        for kind in KINDS:
            rows[kind].append(compared(exact[kind], found[kind]))
    print(f"{len(facts)} facts on {args.model}\n")
    print("| kind | Spearman | quartiles | checked | misses of five |\n|---|---|---|---|---|")
    for kind, each in rows.items():
        every, checked, misses = (torch.tensor(column).double() for column in zip(*each))
        low, high = every.quantile(torch.tensor([0.25, 0.75], dtype=torch.float64)).tolist()
        print(
            f"| {kind} | {every.mean():.2f} | {low:.2f} to {high:.2f} | {checked.mean():.2f} | "
            f"{misses.mean():.2f} |"
        )
    print("\n" + "\n".join(cost(model, facts[0], noise_std)))


if __name__ == "__main__":
    main()
