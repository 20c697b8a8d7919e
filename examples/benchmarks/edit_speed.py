"""One ROME edit by the partial forward engine, and the plain way: time, memory, arithmetic.

    python examples/benchmarks/edit_speed.py
    python examples/benchmarks/edit_speed.py --random gpt2-xl --tokenizer FOLDER --layer 17

The plain way does what the released code does at each step: whole rows through all layers, and
logits at every position. Both ways make the same edit from the same prefixes, steps and second
moment, in one process. Prints a Markdown table and, with --out, appends a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from measure import Measured, Stopwatch, count_flops, matmul_flops_per_second
from plain import PlainForward
from shapes import SHAPES, random_model

from transformer_lens_rome import EditRequest, RomeConfig, SecondMoment, compute_rome_edit
from transformer_lens_rome.demo.gemma import load_demo_model
from transformer_lens_rome.methods import v_star
from transformer_lens_rome.model import passes
from transformer_lens_rome.model.adapter import w_out
from transformer_lens_rome.model.partial_forward import PartialForward

REQUESTS = (
    EditRequest("{} speaks the language", "Michael Winner", "Italian"),
    EditRequest("The native language of {} is", "Dany Robin", "German"),
    EditRequest("The capital of {} is", "Campania", "Brussels"),
)


class TimedForward(PartialForward):
    """The engine with a stopwatch on its parts; gradients that arrive say when backward is done."""

    def __init__(self, *args: Any, watch: Stopwatch) -> None:
        self._watch = watch
        with watch.part("capture"):
            super().__init__(*args)

    def losses(self, changes: Any, rows: Any, positions: Any, labels: Any, log_q: Any) -> Any:
        """As in the engine; the gradient is a part of the forward pass of the unembedding."""
        watch, marks = self._watch, {}

        def arrived(name: str, since: str) -> Any:
            def mark(_gradient: torch.Tensor) -> None:
                marks[name] = watch.now()
                part = "loss" if name == "unembedding" else f"{since}, backward"
                watch.add(part, marks[name] - marks[since])

            return mark

        def watched(value: torch.Tensor, fn: Any) -> torch.Tensor:
            changed = fn(value)
            changed.register_hook(arrived("change", "blocks"))
            return changed

        changes = [c._replace(fn=partial(watched, fn=c.fn)) for c in changes]
        with watch.part("blocks, forward"), self.changed([changes]):
            final = self.recording.replay({self.recording.layer: 1})
        chosen = final[rows, positions - self.first[rows]]
        chosen.register_hook(arrived("blocks", "unembedding"))
        with watch.part("unembedding"):
            found = passes.losses(self.model, chosen, labels, log_q)
        marks["losses"] = watch.now()
        found.nll.register_hook(arrived("unembedding", "losses"))
        return found


def edit_all(model: Any, forward: Any, requests: Any, **options: Any) -> list[torch.Tensor]:
    """The updates of all requests, found with a way to run the model."""
    with patch.object(v_star, "PartialForward", forward):
        return [compute_rome_edit(model, r, **options).delta().double() for r in requests]


def compare(model: Any, options: dict[str, Any], flops: bool) -> dict[str, Any]:
    """Both ways on the same edits: what they took, an edit, and how far apart they end."""
    weight = w_out(model, options["layer"])
    edit_all(model, PartialForward, **options | {"config": RomeConfig(steps=2)})  # warm-up
    found: dict[str, Any] = {}
    updates = {}
    for name, forward in (("engine", PartialForward), ("plain", PlainForward)):
        with Measured(weight.device) as measured:
            updates[name] = edit_all(model, forward, **options)
        found[name] = {
            "seconds": measured.seconds / len(options["requests"]),
            "peak_mb": measured.peak_mb,
        }
        if flops:
            total = count_flops(lambda f=forward: edit_all(model, f, **options))
            found[name]["gflop"] = total / len(options["requests"]) / 1e9
    watch = Stopwatch(weight.device)
    edit_all(model, partial(TimedForward, watch=watch), **options)
    found["parts"] = {name: s / len(options["requests"]) for name, s in watch.parts.items()}
    pairs = zip(updates["engine"], updates["plain"], strict=True)
    found["difference"] = max(((a - b).norm() / b.norm()).item() for a, b in pairs)
    for tokens in (32, 64, 256):
        speed = matmul_flops_per_second(
            tokens, *reversed(weight.shape), weight.device, weight.dtype
        )
        found[f"matmul_gflops_{tokens}"] = speed / 1e9
    return found


def table(found: dict[str, Any]) -> str:
    """The comparison as Markdown."""
    plain, engine = found["plain"], found["engine"]
    lines = ["| an edit | plain | engine | ratio |", "|---|---|---|---|"]
    for name in engine:
        ratio = plain[name] / engine[name]
        lines.append(f"| {name} | {plain[name]:.2f} | {engine[name]:.2f} | {ratio:.2f} |")
    lines.append(f"\nrelative difference of the updates: {found['difference']:.1e}")
    rest = engine["seconds"] - sum(found["parts"].values())
    parts = {**found["parts"], "Adam, keys, solve, health": rest}
    lines += [f"- {name}: {seconds:.3f} s" for name, seconds in parts.items()]
    lines += [f"- {name}: {n:.1f}" for name, n in found.items() if name.startswith("matmul")]
    if "gflop" in engine:
        lines.append(f"- engine: {engine['gflop'] / engine['seconds']:.1f} GFLOP/s")
    return "\n".join(lines)


def main() -> None:
    """Read the options, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--random", choices=SHAPES, help="random weights of a known shape")
    parser.add_argument("--tokenizer", help="folder of a tokenizer for --random")
    parser.add_argument("--layer", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--requests", type=int, default=3)
    parser.add_argument("--prefixes", default="11", help="how many, or a JSON file with a list")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--flops", action="store_true", help="count them too: one more run of each")
    parser.add_argument("--out", help="a file to append a line of JSON to")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    if args.random and not args.tokenizer:
        parser.error("--random needs --tokenizer FOLDER")
    dtype = getattr(torch, args.dtype)
    if args.random:
        model = random_model(args.random, args.tokenizer, args.device, dtype)
    else:
        model = load_demo_model().to(args.device).to(dtype)
    config = RomeConfig(steps=args.steps, clamp=4.0, stop_loss=0.0)
    options = {"layer": args.layer, "config": config, "progress": False}
    options["second_moment"] = SecondMoment.identity(len(w_out(model, args.layer)))
    options["prefixes"], options["requests"] = prefixes(args.prefixes), REQUESTS[: args.requests]
    found = {"options": vars(args), "threads": torch.get_num_threads()}
    found |= compare(model, options, args.flops)
    print(table(found))
    if args.out:
        with Path(args.out).open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")


def prefixes(given: str) -> list[str]:
    """The bare prompt, and texts of five and ten words in turn; or those of a file."""
    if not given.isdigit():
        return json.loads(Path(given).read_text(encoding="utf-8"))
    words = "one day in early spring the old man of the sea went out to look for".split()
    texts = (" ".join(words[i % 6 : i % 6 + 5 * (1 + i % 2)]) for i in range(int(given) - 1))
    return ["", *(f"{text}." for text in texts)]


if __name__ == "__main__":
    main()
