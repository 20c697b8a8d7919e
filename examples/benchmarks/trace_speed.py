"""A whole causal trace by the partial forward engine, and the plain way: time, memory, equality.

    python examples/benchmarks/trace_speed.py
    python examples/benchmarks/trace_speed.py --random gpt2-xl --tokenizer FOLDER

The plain way does what the released code does for each cell: all rows, and a clean one beside them,
through all layers, and the unembedding at every position. All three grids of one prompt are traced
in one process, with the same noise. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
from typing import Any
from unittest.mock import patch

import torch
from measure import Measured
from plain import PlainForward
from shapes import SHAPES, random_model

from transformer_lens_rome.demo import load_demo_model
from transformer_lens_rome.tracing import runs as restoring
from transformer_lens_rome.tracing.causal_trace import causal_trace

PROMPT, SUBJECT = "The Space Needle is in the downtown of the city of", "The Space Needle"


class ReleasedForward(PlainForward):
    """The plain way with one more row, the clean run that the released code has in each batch."""

    def __init__(self, model: Any, layer: int, rows: Any, starts: Any, **options: Any) -> None:
        super().__init__(model, layer, [*rows, rows[0]], [*starts, starts[0]], **options)


def trace_all(model: Any, n_samples: int, kinds: list[str]) -> list[torch.Tensor]:
    """The grids, one after the other."""
    options = {"noise_std": 1.0, "n_samples": n_samples, "progress": False}
    return [causal_trace(model, PROMPT, SUBJECT, kind=kind, **options).scores for kind in kinds]


def main() -> None:
    """Read the options, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--random", choices=SHAPES, help="random weights of a known shape")
    parser.add_argument("--tokenizer", help="folder of a tokenizer for --random")
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--kinds", nargs="+", default=["resid", "mlp", "attn"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    if args.random:
        model = random_model(args.random, args.tokenizer, args.device, dtype)
    else:
        model = load_demo_model().to(args.device).to(dtype)
    trace_all(model, 2, args.kinds[:1])  # warm-up
    found, took = {}, {}
    for name, forward in (("engine", restoring.PartialForward), ("plain", ReleasedForward)):
        with patch.object(restoring, "PartialForward", forward):
            with Measured(torch.device(args.device)) as took[name]:
                found[name] = trace_all(model, args.samples, args.kinds)
    print(f"{len(found['engine'][0])} layers, {found['engine'][0].shape[1]} tokens, {args}\n")
    print("| three grids | plain | engine | ratio |\n|---|---|---|---|")
    for name in ("seconds", "peak_mb"):
        plain, engine = (getattr(took[way], name) for way in ("plain", "engine"))
        print(f"| {name} | {plain:.1f} | {engine:.1f} | {plain / engine:.2f} |")
    for kind, one, other in zip(args.kinds, found["engine"], found["plain"], strict=True):
        print(f"- {kind}: largest difference {(one - other).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
