"""The parser of the command line, and the function of each command."""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from transformer_lens_rome.cli.diff import aligned
from transformer_lens_rome.cli.edit import add_edit_parsers, edit_and_undo
from transformer_lens_rome.cli.evaluate import add_parsers
from transformer_lens_rome.cli.load_model import load_model
from transformer_lens_rome.demo import ASK, REQUEST, load_demo_model
from transformer_lens_rome.model import adapter
from transformer_lens_rome.model.default_layer import default_layer
from transformer_lens_rome.model.load import default_class
from transformer_lens_rome.prompts.sampling import sampled_texts
from transformer_lens_rome.statistics.collect import collect_second_moment
from transformer_lens_rome.statistics.sources import sampled_second_moment
from transformer_lens_rome.tracing.causal_trace import causal_trace
from transformer_lens_rome.tracing.estimated_trace import EstimatedTrace
from transformer_lens_rome.tracing.kinds import KINDS
from transformer_lens_rome.viz import save_html


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    # bytes that the locale could not decode are read as UTF-8
    given = [os.fsencode(text).decode("utf-8", "surrogateescape") for text in given]
    options = _parser().parse_args(given)
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # escape what the stream cannot encode
            stream.reconfigure(errors="backslashreplace")
    try:
        report = options.run(options)
        _print(report, options.json)
    except BrokenPipeError:  # the reader closed the pipe, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, NotImplementedError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if report.get("byte_identical", True) else 1


def _parser() -> argparse.ArgumentParser:
    """Build the parser of all commands."""
    parser = argparse.ArgumentParser(prog="transformer_lens_rome", description=__doc__)
    commands = parser.add_subparsers(required=True)

    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--model-class", choices=("bridge", "hooked"), default=default_class())
    shared.add_argument("--device", default="cpu", help="where the model runs (default: cpu)")
    shared.add_argument("--json", action="store_true", help="print one JSON object")
    shared.add_argument("--verbose", action="store_true", help="log which defaults are used")

    layer = argparse.ArgumentParser(add_help=False)
    layer.add_argument("--layer", type=int, help="block to edit, from 0 (default: the model's)")

    show = commands.add_parser(
        "demo", parents=[shared, layer], help="edit a fact in the demo model"
    )
    show.set_defaults(run=run_demo)

    add_edit_parsers(commands, shared, layer)

    stats = commands.add_parser(
        "statistics", parents=[shared, layer], help="collect a second moment"
    )
    stats.add_argument("model", help="hub name, folder, or 'demo'")
    stats.add_argument("out", help="file to write (safetensors)")
    stats.add_argument("--text", help="a text file (default: text sampled from the model)")
    stats.add_argument("--max-tokens", type=int, default=100_000)
    stats.set_defaults(run=run_statistics)

    trace = commands.add_parser("trace", parents=[shared], help="trace where a fact is recalled")
    trace.add_argument("model", help="hub name, folder, or 'demo'")
    trace.add_argument("prompt", help="text that the answer should follow")
    trace.add_argument("subject", help="the part of the prompt to corrupt")
    trace.add_argument("--answer", help="the answer (default: the model's top token)")
    trace.add_argument("--kind", choices=tuple(KINDS), default="resid")
    trace.add_argument("--window", type=int, default=10, help="layers restored at once")
    trace.add_argument(
        "--method",
        choices=("exact", "gradient"),
        default="exact",
        help="'gradient' estimates all cells, and runs some exactly",
    )
    trace.add_argument("--samples", type=int, default=10, help="number of noise samples")
    trace.add_argument("--seed", type=int, default=0)
    trace.add_argument("--save", help="file to write the trace to (safetensors)")
    trace.add_argument("--html", help="file to write a page with the trace to")
    trace.set_defaults(run=run_trace)
    add_parsers(commands, [shared])
    return parser


def run_demo(options: argparse.Namespace) -> dict[str, Any]:
    """Edit a fact in the bundled model, save and reload the edit, undo it."""
    print(
        "Loads Gemma-3-270M, edits one fact, prompts the model before and after, undoes the edit. "
        "This takes about half a minute on two cores; the first run takes another half minute to "
        "unpack the model.",
        file=sys.stderr,
    )
    started = time.perf_counter()
    model = load_demo_model(model_class=options.model_class, device=options.device)
    loaded = time.perf_counter()
    layer = default_layer(model) if options.layer is None else options.layer
    moment = sampled_second_moment(model, layer, progress=not options.json)
    collected = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "edit.safetensors"
        report = edit_and_undo(model, REQUEST, layer, moment, ASK, options, path)
    report["seconds"] |= {
        "load model": round(loaded - started, 1),
        "statistics": round(collected - loaded, 1),
        "total": round(time.perf_counter() - started, 1),
    }
    if (peak := _peak_memory_gb()) is not None:
        report["peak_memory_gb"] = peak
    return report


def run_statistics(options: argparse.Namespace) -> dict[str, Any]:
    """Collect the second moment of one layer and write it to a file."""
    model = load_model(options.model, options.model_class, device=options.device)
    layer = default_layer(model) if options.layer is None else options.layer
    if options.text:
        name = os.fsencode(Path(options.text).name)
        texts, source = [_read_text(options.text)], name.decode("utf-8", "backslashreplace")
    else:
        texts, source = sampled_texts(model, -(-options.max_tokens // 120)), "sampled"
    moment = collect_second_moment(
        model, texts, layer, max_tokens=options.max_tokens, source=source
    )
    moment.save(options.out)
    report = moment.report()
    if not math.isfinite(report["condition_number"]):
        report["condition_number"] = "infinite"  # JSON has no such number
    return {"file": options.out} | report


def _read_text(path: str) -> str:
    """Read a text file, or raise ValueError if it is not UTF-8."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if "\0" in text:
            raise ValueError("it contains NUL")
        return text
    except ValueError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); convert it first") from error


def run_trace(options: argparse.Namespace) -> dict[str, Any]:
    """Trace one fact, and save the trace as data or as a page."""
    model = load_model(options.model, options.model_class, device=options.device)
    trace = causal_trace(
        model,
        options.prompt,
        options.subject,
        answer=options.answer,
        kind=options.kind,
        window=options.window,
        method=options.method,
        n_samples=options.samples,
        seed=options.seed,
        progress=not options.json,
    )
    if options.save:
        trace.save(options.save)
    if options.html:
        save_html(options.html, trace, title=options.prompt)
    best = trace.scores.flatten().argsort(descending=True)[:5].tolist()
    cells = [divmod(i, len(trace.tokens)) for i in best]
    estimated = {"estimate": str(trace)} if isinstance(trace, EstimatedTrace) else {}
    return {
        "model": adapter.model_name(model),
        **estimated,
        "answer": trace.answer,
        "p_clean": trace.p_clean,
        "p_corrupted": trace.p_corrupted,
        "best": [
            f"layer {layer} at {trace.tokens[position]!r}: {trace.scores[layer, position]:.3g}"
            for layer, position in cells
        ],
        "last_subject_token": trace.scores[:, trace.subject_last].tolist(),
    }


def _peak_memory_gb() -> float | None:
    """Return the peak memory of this process; None if the system does not report it (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1e9 if sys.platform == "darwin" else 1e6), 2)


def _print(report: dict[str, Any], as_json: bool) -> None:
    """Print a report as JSON or as text; escape what the encoding of stdout lacks."""
    if as_json:
        unicode = str(getattr(sys.stdout, "encoding", "")).lower().replace("-", "") == "utf8"
        print(json.dumps(report, indent=1, ensure_ascii=not unicode))
    else:
        _show(report)
    sys.stdout.flush()


def _show(report: dict[str, Any]) -> None:
    """Print a report for people."""
    for key, value in report.items():
        if key == "answers":
            for answer in value:
                print(f"\n[{answer['label']}] {answer['prompt']}")
                whens = ("before", "after")
                texts = [" ".join(answer[when]["text"].split()) for when in whens]
                for when, text in zip(whens, aligned(*texts) if answer.get("diff") else texts):
                    print(f"  {when:6} P(target) {answer[when]['p_target']:.4f}   ... {text}")
            print()
        elif isinstance(value, str) and "\n" in value:
            print(f"\n{value}\n")
        elif isinstance(value, dict):
            print(f"{key}:")
            for name, item in value.items():
                print(f"  {name}: {_short(item)}")
        else:
            print(f"{key}: {_short(value)}")


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_short(item) for item in value) or "none"
    return str(value)
