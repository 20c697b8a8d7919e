"""Does anything stay behind? Memory, tensors, hooks, files after many edits and traces.

    cd tests && python -m leaks [--cycles 1000] [--traces 200]
    cd tests && python -m leaks --demo [--cycles 50] [--traces 10]

On a tiny random GPT-2 of each model class that is installed, or on the demo model: edits of every
kind that are put on and taken off, in a `with`, out of order, by
`revert_all`, through a file; every other cycle ends in an exception at another tensor operation.
Then causal traces of the three kinds. Prints a Markdown table of what there was after a warm-up
and at the end, and exits with 1 if something grew.

Before it is counted what there is, the same edit and the same trace are made: a bridge keeps some
inputs of its last pass. Resident memory may grow, a cycle, by a quarter of one W_out (3.8 kB in the
tiny model) between the medians of the second and the last quarter of the run: a ledger's copy of a
weight that stays behind after one cycle in four is seen, and what an allocator needs for
interruptions in ever new places is not. Whatever is smaller and belongs to Python is counted.

Last, models are used in several ways and let go; one that is still there then is a leak, too.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import torch
from helpers.tiny_models import has_bridge, has_hooked, tiny_bridge, tiny_hooked
from helpers.tiny_tokenizer import tiny_tokenizer
from leaks.cycles import KINDS, REQUEST, Setting, tiny_setting
from leaks.footprint import footprint, grown, run, slope

from transformer_lens_rome import causal_trace, collect_second_moment, compute_rome_edit, rome_edit
from transformer_lens_rome.demo import load_demo_model
from transformer_lens_rome.statistics.sources import sampled_second_moment

DEFAULTS = {
    (False, "edits"): 1000,
    (False, "traces"): 200,
    (True, "edits"): 50,
    (True, "traces"): 10,
}
"""How many cycles, by whether it is the demo model."""


# ---------------------------------------------------------------- models


def tiny_settings(folder: str) -> Iterator[tuple[str, Callable[[], Setting]]]:
    """What makes a tiny GPT-2 of each class that is installed."""
    tokenizer = tiny_tokenizer(folder, bos=False)
    for make, there in ((tiny_bridge, has_bridge()), (tiny_hooked, has_hooked())):
        if there:
            yield make.__name__, lambda make=make: tiny_setting(make("gpt2", tokenizer))


# ---------------------------------------------------------------- does a model go when it is let go


def users(setting: Setting) -> dict[str, Callable[[], Any]]:
    """What may be done with a model before it is let go."""
    model = setting.model
    return {
        "nothing": lambda: None,
        "an edit, undone": setting.edited_in_with,
        "an edit, not undone": lambda: rome_edit(model, REQUEST, **setting.options) and None,
        "an edit that is kept": lambda: compute_rome_edit(model, REQUEST, **setting.options),
        "traces, kept": lambda: [
            causal_trace(model, REQUEST.text, REQUEST.subject, kind=kind, progress=False)
            for kind in KINDS
        ],
        "statistics, kept": lambda: collect_second_moment(
            model, [REQUEST.text] * 40, setting.layer, progress=False
        ),
        "fine-tuning": setting.fine_tuned,
        "an exception": lambda: setting.interrupted(setting.edited_in_with, 900),
    }


def survivors(make: Callable[[], Setting]) -> list[str]:
    """After which uses a model is still there when the last reference to it is gone."""
    names, found = list(users(make())), []
    for name in names:
        setting = make()
        gone = weakref.ref(setting.model)
        kept = users(setting)[name]()
        del setting
        gc.collect()
        if gone() is not None:
            found.append(name)
        del kept
    return found


# ---------------------------------------------------------------- the table


def measured(name: str, setting: Setting, n: int, kind: str) -> tuple[list[str], list[str]]:
    """Lines of a table about n cycles, and what grew."""
    cycles = setting.edits if kind == "edits" else setting.traces
    started = time.perf_counter()
    run(cycles(max(10, n // 10)), 1)
    setting.settle()
    before = footprint(setting.model)
    samples, every = run(cycles(n), 40)
    setting.settle()
    after = footprint(setting.model)
    growth, bad = slope(samples, every), grown(before, after)
    seconds = time.perf_counter() - started
    if growth > setting.tolerance:
        bad.append("resident memory")
    lines = [
        f"\n{name}: {n} {kind}, {seconds:.0f} s\n",
        "| | before | after | |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {what} | {old} | {after[what]} | {'grew' if what in bad else ''} |"
        for what, old in before.items()
    ]
    lines += [
        f"| resident memory, MB, first and last of {len(samples)} | {samples[0] / 1e6:.2f} | "
        f"{samples[-1] / 1e6:.2f} | {growth:+.0f} B a cycle, {setting.tolerance:.0f} allowed |"
    ]
    return lines, bad


def all_measured(options: argparse.Namespace, folder: str) -> list[str]:
    """Print every table; what grew."""
    if options.demo:
        model = load_demo_model()
        made = Setting(model, 5, sampled_second_moment(model, 5, progress=False))
        settings = iter([("demo model", lambda: made)])
    else:
        settings = tiny_settings(folder)
    failed = []
    for name, make in settings:
        setting = make()
        for kind, n in (("edits", options.cycles), ("traces", options.traces)):
            lines, bad = measured(name, setting, n or DEFAULTS[options.demo, kind], kind)
            print("\n".join(lines), flush=True)
            failed += [f"{name}, {kind}: {what}" for what in bad]
        if not options.demo:
            kept = survivors(make)
            print(f"\n{name}: models let go {len(users(setting))}, still there: {kept or 'none'}")
            failed += [f"{name}: a model after {what}" for what in kept]
    return failed


def main() -> int:
    """Measure, print, and say whether anything grew."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", action="store_true", help="the demo model, not tiny ones")
    parser.add_argument("--cycles", type=int, help="edit cycles (1000; 50 with --demo)")
    parser.add_argument("--traces", type=int, help="causal traces (200; 10 with --demo)")
    options = parser.parse_args()
    logging.getLogger("transformer_lens_rome").setLevel(logging.ERROR)  # health of hasty edits
    print(f"TransformerLens {version('transformer-lens')}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as own:
        tempfile.tempdir = own  # so that only our own temporary files are counted
        if not options.demo:
            os.environ["TRANSFORMER_LENS_ROME_CACHE"] = own
        failed = all_measured(options, folder)
    print("\ngrew: " + "; ".join(failed) if failed else "\nnothing grew")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
