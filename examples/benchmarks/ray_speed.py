"""The same evaluation in one process and on Ray workers: equality, speed-up, overhead a record.

    OMP_NUM_THREADS=1 python examples/benchmarks/ray_speed.py RECORDS.json [--records 20]

Runs FT on the demo model in this process, then on Ray workers on this machine; starting the workers
(a process, the libraries, a copy of the model each) is timed by itself, and so is handing out
work that does nothing. With one thread a process, both ways have the same cores for each record.
Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from transformer_lens_rome import CounterFact, evaluate_counterfact, get_method
from transformer_lens_rome.demo import load_demo_model
from transformer_lens_rome.distributed import on_workers
from transformer_lens_rome.evaluation import Results


def nothing(model: Any, record: Any) -> None:
    """No work at all."""


def handing_out(model: Any, workers: int, n: int) -> float:
    """Seconds from the first of n empty results to the last: workers are up by then."""
    found = on_workers(workers, None, model, nothing, list(range(n)))
    next(found)
    started = time.perf_counter()
    for _ in found:
        pass
    return time.perf_counter() - started


def numbers(results: Results) -> list[Any]:
    """All scores of a run, before and after."""
    return [row.scores for rows in (results.before, results.after) for row in rows.values()]


def main() -> None:
    """Read the options, run both ways, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", help="CounterFact records")
    parser.add_argument("--records", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    records = sorted(CounterFact.load(args.file), key=lambda record: record.case_id)
    records, model, method = records[: args.records], load_demo_model(), get_method("ft")

    empty, seconds, runs = handing_out(model, args.workers, 200) / 199, {}, {}
    for workers in (1, args.workers):
        started = time.perf_counter()
        runs[workers] = evaluate_counterfact(
            model, records, method, workers=workers, progress=False
        )
        seconds[workers] = time.perf_counter() - started
        print(f"workers {workers}: {seconds[workers]:.1f} s", flush=True)
    alone, spread = seconds[1], seconds[args.workers]
    work = sum(
        row.seconds
        for rows in (runs[args.workers].before, runs[args.workers].after)
        for row in rows.values()
    )
    starting = spread - work / args.workers
    print("| | one process | Ray |\n|---|---|---|")
    print(f"| workers | 1 | {args.workers} |")
    print(f"| seconds | {alone:.1f} | {spread:.1f} |")
    print(f"| of these, not spent on records | - | {starting:.1f} |")
    print(f"| speed-up, all | 1 | {alone / spread:.2f} |")
    print(f"| speed-up, workers up | 1 | {alone / (spread - starting):.2f} |")
    print(f"| handing out a record | - | {1000 * empty:.1f} ms |")
    print(f"\nequal: {numbers(runs[1]) == numbers(runs[args.workers])}")


if __name__ == "__main__":
    main()
