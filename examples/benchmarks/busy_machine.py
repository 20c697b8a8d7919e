"""One ROME edit on a machine whose cores others use too: wall and processor time by threads.

    python examples/benchmarks/busy_machine.py [--threads 1 2] [--others 0 1 2]

Each edit is one of Gemma-3-270M, made by a process of its own after a first edit, with that many
torch threads, beside that many processes that do nothing but use a core. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from transformer_lens_rome import EditRequest, compute_rome_edit
from transformer_lens_rome.demo import load_demo_model

REQUESTS = [
    EditRequest("{} is located in the city of", name, city)
    for name, city in (("Big Ben", "Cairo"), ("The Space Needle", "Paris"))
]


@contextmanager
def busy(n: int) -> Iterator[None]:
    """Run n processes that use a core each."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def edit() -> dict[str, float]:
    """Make two edits; return the seconds of the second."""
    model = load_demo_model()
    compute_rome_edit(model, REQUESTS[0], progress=False)  # prefixes, C and self-checks
    wall, processor = time.perf_counter(), time.process_time()
    compute_rome_edit(model, REQUESTS[1], progress=False)
    return {"wall": time.perf_counter() - wall, "processor": time.process_time() - processor}


def main() -> None:
    """Time an edit for each number of threads and of other processes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--others", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--edit", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.edit:
        print(json.dumps(edit()))
        return
    print(f"On {os.cpu_count()} cores:\n")
    print(f"| threads | other processes | s | s of processor |\n{'|---' * 4}|")
    for threads in args.threads:
        for others in args.others:
            environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
            with busy(others):
                command = [sys.executable, __file__, "--edit"]
                done = subprocess.run(command, env=environment, capture_output=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            print(
                f"| {threads} | {others} | {found['wall']:.1f} | {found['processor']:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
