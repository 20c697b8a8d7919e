"""Trace the known facts that a model gets right, and average: the paper's figures 2 and 3.

    python examples/scripts/average_traces.py MODEL FOLDER [KNOWN_FACTS.json] [--facts 100]

MODEL is gemma or smollm2. Traces are kept in FOLDER as they are made; run it again after a stop.
Averages are written to `examples/results/averages/MODEL/`; `python examples/scripts/figures.py`
draws Gemma's.
"""

import argparse
from pathlib import Path

from transformer_lens_rome.demo import load_demo_model
from transformer_lens_rome.tracing.averages import average_severed, average_traces
from transformer_lens_rome.tracing.fact_traces import facts_known_to, sever_facts, trace_facts
from transformer_lens_rome.tracing.known_facts import load_known_facts

RESULTS = Path(__file__).parents[1] / "results" / "averages"


def main() -> None:
    """Read the options, trace, average, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=("gemma", "smollm2"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("known_facts", nargs="?")
    parser.add_argument("--facts", type=int, default=100, help="the number of facts")
    args = parser.parse_args()
    model, results = load_demo_model(args.model), RESULTS / args.model
    results.mkdir(parents=True, exist_ok=True)
    known, wrong = facts_known_to(model, load_known_facts(args.known_facts), limit=args.facts)
    for kind in ("resid", "mlp", "attn"):
        traces = trace_facts(model, known, kind=kind, folder=args.folder / kind)
        average_traces(traces, n_wrong=wrong).save(results / f"{kind}.safetensors")
    for sever in ("mlp", "attn"):
        cut = sever_facts(model, known, sever=sever, folder=args.folder / f"severed_{sever}")
        average_severed(cut, n_wrong=wrong).save(results / f"severed_{sever}.safetensors")


if __name__ == "__main__":
    main()
