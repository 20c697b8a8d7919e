"""What an edit implies: methods on the benchmarks of reversal, ripple effects and several facts.

    python examples/benchmarks/implications.py MODEL BENCHMARK DATA METHOD ... --first N

MODEL is gemma or smollm2. BENCHMARK is reversal (DATA: the folder of LRE's factual relations),
rippleedits, mquake (with --few-shot FILE, the published multihop-prompts.txt), counterfact or zsre.
METHOD is a registered name, such as rome, memit, ft+l and in-context, or "unedited"; each has its
defaults. The first N records of DATA are scored; --both writes reverse facts too (reversal).
--tokens N shortens written answers, which RippleEdits as released makes very long.

Rows go to examples/results/implications/MODEL/BENCHMARK as they come; a run that was stopped goes
on where it was. The table of the methods named is printed at the end.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from transformer_lens_rome.demo import load_demo_model
from transformer_lens_rome.evaluation import (
    Results,
    benchmark_names,
    evaluate_benchmark,
    get_benchmark,
    markdown,
)

RESULTS = Path(__file__).parents[1] / "results" / "implications"


def main() -> None:
    """Score the methods named on the records, and print their table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=("gemma", "smollm2"))
    parser.add_argument("benchmark", choices=benchmark_names())
    parser.add_argument("data", help="the benchmark's file or folder")
    parser.add_argument("methods", nargs="+", metavar="METHOD")
    parser.add_argument("--first", type=int, metavar="N", help="number of records")
    parser.add_argument("--few-shot", metavar="FILE", help="mquake: the few-shot prompt")
    parser.add_argument("--tokens", type=int, metavar="N", help="length of written answers")
    parser.add_argument("--both", action="store_true", help="reversal: write reverse facts too")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    args = parser.parse_args()
    records = get_benchmark(args.benchmark).load(args.data, limit=args.first, strict=False)
    print(f"{len(records)} records, {len(getattr(records, 'skipped', ()))} left out of the file")
    options = {"few_shot": args.few_shot, "both": args.both, "n_tokens": args.tokens}
    options = {name: value for name, value in options.items() if value}
    model, folder = load_demo_model(args.model), args.results / args.model / args.benchmark
    paths = []
    for name in args.methods:
        started = time.perf_counter()
        path = folder / f"{name}{'-both' if args.both and name != 'unedited' else ''}.jsonl"
        method = None if name == "unedited" else name
        run = evaluate_benchmark(model, args.benchmark, records, method, options=options, out=path)
        seconds = (time.perf_counter() - started) / len(records)
        print(f"{name}: {seconds:.1f} s a record; {len(run.unmet)} do not count")
        paths.append(path)
    print(markdown([Results.load(path) for path in paths]))


if __name__ == "__main__":
    main()
