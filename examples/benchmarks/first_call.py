"""Seconds of each part of an edit, in the first call of a process and in the second.

    python examples/benchmarks/first_call.py [gemma | smollm2]

Edits the demo's fact twice on the demo model, undoing it in between, under Python's profiler. C is
collected in the first process that needs it and then read from the cache folder; set
TRANSFORMER_LENS_ROME_CACHE to an empty folder to see its cost. Prints a Markdown table of the
seconds of each part, of both calls.
"""

from __future__ import annotations

import cProfile
import pstats
import sys
from typing import Any

from transformer_lens_rome import rome_edit
from transformer_lens_rome.demo import load_demo_model
from transformer_lens_rome.demo.gemma import REQUEST

PARTS = {
    "the checkpoint's tokenizer, for its BOS rule": "checkpoint_tokenizer",
    "prefixes": "sample_prefixes",
    "C": "default_second_moment",
    "default layer and clamp": "norm_follows_mlp",
    "trials of partial and shared passes": "holds",
    "keys and values": "keys_and_values",
    "the search for v*": "optimise",
    "the rank-one solve": "solve_rank_one",
    "health": "measure_health",
    "the weight's sha256": "weight_hash",
    "writing and keeping a copy": "apply_edit",
}


def seconds(model: Any) -> dict[str, float]:
    """Return the seconds of a call, by part; parts may contain others."""
    profiler = cProfile.Profile()
    profiler.enable()
    applied = rome_edit(model, REQUEST)
    profiler.disable()
    applied.revert()
    found: dict[str, float] = {}
    stats: Any = pstats.Stats(profiler)
    for (file, _, name), (*_, cumulative, _) in stats.stats.items():
        if "transformer_lens_rome" in file:
            found[name] = max(found.get(name, 0.0), cumulative)
    parts = {part: found.get(name, 0.0) for part, name in PARTS.items()}
    return parts | {"the whole call": stats.total_tt}


def main(name: Any = "gemma") -> None:
    """Edit twice and print."""
    model = load_demo_model(name)
    first, second = seconds(model), seconds(model)
    print("| part | first call, s | second call, s |\n|---|---|---|")
    for part in first:
        print(f"| {part} | {first[part]:.2f} | {second[part]:.2f} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
