"""ROME, FT and FT+L on CounterFact records, one at a time and in batches.

    python examples/benchmarks/batch_speed.py RECORDS [--records 8] [--batches 1 4 8] [--flops]
    python examples/benchmarks/batch_speed.py RECORDS --methods ft ft+l
    python examples/benchmarks/batch_speed.py RECORDS --random gpt2-xl --tokenizer FOLDER --steps 2

"released" and "default" are ROME by two rules of the search. Each way edits the same records and
scores them after it: a run of `evaluate_counterfact` in one process, with the unedited model scored
once before. "difference" is the largest difference of a log-probability to the same method one at a
time. With --steps, a search has that many losses and no stop. Prints a Markdown table; --flops
counts the operations of each way in a second run.
"""

import argparse
import dataclasses
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from measure import Measured, count_flops, matmul_flops_per_second
from shapes import SHAPES, random_model

from transformer_lens_rome import (
    CounterFact,
    RomeConfig,
    SecondMoment,
    evaluate_counterfact,
    get_method,
)
from transformer_lens_rome.demo import load_demo_model
from transformer_lens_rome.evaluation import Results
from transformer_lens_rome.methods.rome import Rome
from transformer_lens_rome.model.adapter import w_out

RULES = {
    "released": RomeConfig(stop="loss", prefixes_a_step=None),
    "default": RomeConfig(),
}


def difference(one: Results, other: Results) -> float:
    """Return the largest difference of a log-probability between the rows of two runs."""
    largest = 0.0
    for case, row in one.after.items():
        for kind, prompts in (row.scores or {}).items():
            for mine, theirs in zip(prompts, other.after[case].scores[kind], strict=True):
                pairs = zip([*mine.new, *mine.true], [*theirs.new, *theirs.true], strict=True)
                largest = max(largest, *(abs(a - b) for a, b in pairs))
    return largest


def method_of(model: Any, name: str, args: argparse.Namespace) -> Any:
    """Return a method with all that its edits share; a random model gets C = I."""
    known: dict[str, Any] = {"layer": args.layer}
    if name not in RULES:
        few = {"steps": args.steps, "stop_loss": 0.0} if args.steps else {}
        return get_method(name, **known, **few).prepared(model)
    known["config"] = RULES[name]
    if args.steps:
        few = {"steps": args.steps, "stop_loss": 0.0, "stop": "loss"}
        known["config"] = dataclasses.replace(RULES[name], **few)
    if args.random:
        known["layer"] = args.layer or model.cfg.n_layers // 3
        known["second_moment"] = SecondMoment.identity(len(w_out(model, known["layer"])))
    return Rome(**known).prepared(model)


def options() -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", help="CounterFact records")
    parser.add_argument("--records", type=int, default=8)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8])
    names = (*RULES, "ft", "ft+l")
    parser.add_argument("--methods", nargs="+", choices=names, default=list(RULES))
    parser.add_argument("--demo", default="gemma", choices=("gemma", "smollm2"))
    parser.add_argument("--random", choices=SHAPES, help="random weights of a known shape")
    parser.add_argument("--tokenizer", help="folder of a tokenizer for --random")
    parser.add_argument("--layer", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--flops", action="store_true")
    return parser.parse_args()


def measure(model: Any, method: Any, records: CounterFact, size: int, args: Any) -> dict[str, Any]:
    """Run one way, and count its operations in a second run; all numbers but the rows an edit."""
    device = w_out(model, 0).device
    with TemporaryDirectory() as folder:
        evaluate_counterfact(model, records, None, out=Path(folder) / "unedited.jsonl")

        def run(name: str) -> Results:
            known = {"out": Path(folder) / name, "batch_size": size, "progress": False}
            return evaluate_counterfact(model, records, method, **known)

        with Measured(device) as measured:
            found = run("timed.jsonl")
        flops = count_flops(lambda: run("counted.jsonl")) if args.flops else 0
    edit = found.seconds["edit_seconds"]
    return {
        "seconds": measured.seconds / len(records),
        "edit": edit,
        "score": found.seconds["seconds"] - edit,
        "gflop": flops / 1e9 / len(records),
        "peak_mb": measured.peak_mb,
        "found": found,
    }


def main() -> None:
    """Run all ways and print a table."""
    args = options()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    if args.random:
        model = random_model(args.random, args.tokenizer, args.device, dtype)
    else:
        model = load_demo_model(args.demo, device=device).to(dtype)
    records = CounterFact.load(args.file, limit=args.records)
    head = "method|batch|records an hour|ratio|seconds: edit|score|GFLOP|GFLOP/s|peak MB|difference"
    print(f"| {head.replace('|', ' | ')} |\n{'|---' * 10}|")
    base = None
    for name in args.methods:
        method, alone = method_of(model, name, args), None
        evaluate_counterfact(model, records[:1], method, progress=False)  # self-checks run once
        for size in args.batches:
            way = measure(model, method, records, size, args)
            base, alone = base or way, alone or way
            cells = [name, str(size), f"{3600 / way['seconds']:.0f}"]
            cells += [f"{base['seconds'] / way['seconds']:.2f}", f"{way['edit']:.1f}"]
            cells += [f"{way['score']:.1f}", f"{way['gflop']:.0f}"]
            cells += [f"{way['gflop'] / way['seconds']:.0f}", f"{way['peak_mb']:.0f}"]
            cells.append(f"{difference(way['found'], alone['found']):.1e}")
            print(f"| {' | '.join(cells)} |", flush=True)
    width = model.cfg.d_model
    for tokens in (32, 256):
        speed = matmul_flops_per_second(tokens, width, 4 * width, device, dtype) / 1e9
        print(f"\n[{tokens}, {width}] @ [{width}, {4 * width}]: {speed:.0f} GFLOP/s")


if __name__ == "__main__":
    main()
