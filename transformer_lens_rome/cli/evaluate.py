"""Two commands: `evaluate` scores a method on a data set, `table` compares saved runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from inspect import signature
from typing import Any

from transformer_lens_rome.cli.load_model import load_model
from transformer_lens_rome.evaluation import (
    References,
    Results,
    benchmark_names,
    comparison,
    evaluate_benchmark,
    get_benchmark,
    latex,
    markdown,
)
from transformer_lens_rome.evaluation.records import read_items
from transformer_lens_rome.methods.base import get_method, methods_with
from transformer_lens_rome.statistics.second_moment import SecondMoment

TABLES = {"markdown": markdown, "latex": latex}

READING = ("true_paraphrases",)
"""Arguments of the command that are options of some benchmarks' loaders."""
ASKING = ("generate", "attributes", "counterfact_plus", "both", "few_shot", "n_tokens")
"""Arguments of the command that are options of some benchmarks' scorings."""
OPTIONS = {"layer": "layer", "statistics": "second_moment", "editor": "editor"}
"""Arguments of the command that are options of some methods, and the options' names."""


def add_parsers(commands: Any, parents: Sequence[argparse.ArgumentParser]) -> None:
    """Add both commands to the parser of the command line."""
    run = commands.add_parser("evaluate", parents=parents, help="score a method on a data set")
    run.add_argument("model", help="hub name, folder, or 'demo'")
    run.add_argument("method", help="'unedited', or a method's name, such as 'rome' or 'ft'")
    run.add_argument(
        "out",
        help="file for the rows (.jsonl), which a stopped run continues from; for 'unedited', "
        "the file unedited.jsonl in the folder of the other runs",
    )
    run.add_argument("--records", help="the data set's file or folder (CounterFact: downloaded)")
    run.add_argument("--dataset", choices=benchmark_names(), default="counterfact")
    run.add_argument("--limit", type=int, help="number of records to use, from the first")
    run.add_argument("--lenient", action="store_true", help="leave out invalid records")
    run.add_argument(
        "--layer", type=int, help="block to edit, from 0 (default: the method's choice)"
    )
    run.add_argument("--statistics", help="a second-moment file, for methods that use one")
    run.add_argument("--editor", help="a trained editor's file, for methods that need one")
    run.add_argument("--attributes", action="store_true", help="score the attribute prompts too")
    run.add_argument(
        "--counterfact-plus",
        action="store_true",
        help="score the neighbours with the edited fact in front too, and the KL there",
    )
    run.add_argument(
        "--true-paraphrases",
        help="JSON list of the case ids of a flat file whose rephrase_prompt is a paraphrase",
    )
    run.add_argument("--generate", action="store_true", help="generate text, for GE")
    run.add_argument("--snippets", help="attribute_snippets.json, for RS ('download' fetches it)")
    run.add_argument(
        "--both", action="store_true", help="reversal: write the reverse fact too, after the fact"
    )
    run.add_argument("--few-shot", help="mquake: file of the published few-shot prompt")
    run.add_argument(
        "--n-tokens",
        type=int,
        metavar="N",
        help="rippleedits, mquake: the length of an answer (default: as published)",
    )
    run.add_argument(
        "--batch-size", type=int, help="number of records that are edited and scored together"
    )
    run.add_argument(
        "--together",
        type=int,
        help="number of facts that one edit writes, before each is scored with all of them on the "
        "model (memit, emmet, alphaedit)",
    )
    run.add_argument("--workers", type=int, default=1, help="number of copies of the model, on Ray")
    run.add_argument("--ray", metavar="ADDRESS", help="address of an existing Ray cluster")
    run.add_argument("--seed", type=int, default=0)
    run.set_defaults(run=run_evaluate)

    table = commands.add_parser("table", help="print a table of runs that `evaluate` saved")
    table.add_argument("runs", nargs="+", help="files that `evaluate` wrote")
    table.add_argument("--style", choices=sorted(TABLES), default="markdown")
    table.add_argument(
        "--compare", action="store_true", help="also test the first run against the others"
    )
    table.add_argument("--json", action="store_true", help="print one JSON object")
    table.set_defaults(run=run_table, verbose=False)


def run_evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """Score a method; `table` can print the same table again from the file."""
    _check(options)
    reading, asking = _of_benchmark(options)
    given = {option: getattr(options, argument) for argument, option in OPTIONS.items()}
    given = {option: value for option, value in given.items() if value is not None}
    if options.statistics is not None:
        given["second_moment"] = SecondMoment.load(options.statistics)
    method = None if options.method == "unedited" else get_method(options.method, **given)
    shared = {
        "out": options.out,
        "seed": options.seed,
        "batch_size": options.batch_size,
        "together": options.together,
        "workers": options.workers,
        "ray_address": options.ray,
        "progress": not options.json,
    }
    records = get_benchmark(options.dataset).load(options.records, **reading)
    if options.snippets:
        path = None if options.snippets == "download" else options.snippets
        asking["references"] = References.extract(records, path)
    model = load_model(options.model, options.model_class, device=options.device)
    results = evaluate_benchmark(model, options.dataset, records, method, options=asking, **shared)
    left_out = getattr(records, "skipped", ())
    failed = {str(case): reason for case, reason in results.failed.items()}
    report = {"table": results.table(), "left_out": list(left_out), "failed": failed}
    return report | ({"seconds": results.seconds} if results.after else {})


def run_table(options: argparse.Namespace) -> dict[str, Any]:
    """Make a table, and optionally paired tests, from saved runs."""
    runs = [Results.load(path) for path in options.runs]
    report = {"table": TABLES[options.style](runs)}
    if options.compare:
        for other in runs[1:]:
            report[f"{runs[0].name} less {other.name}"] = comparison(runs[0], other)
    return report


def _check(options: argparse.Namespace) -> None:
    """Raise ValueError for options that have no effect together."""
    for argument, option in OPTIONS.items():
        names = methods_with(option)
        if getattr(options, argument) is not None and options.method not in names:
            raise ValueError(
                f"--{argument} is for {', '.join(names)}, not for {options.method!r}; leave it out"
            )
    if options.editor is None and options.method in methods_with("editor"):
        raise ValueError(f"{options.method!r} has to be trained; give the editor's file, --editor")
    if options.snippets and not options.generate:
        raise ValueError("--snippets are for generated text; give --generate too")


def _of_benchmark(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options of the benchmark's loader and of its scoring.

    Raises:
        ValueError: An option is given that the benchmark does not have.
    """
    benchmark = get_benchmark(options.dataset)
    loader, scoring = (signature(one).parameters for one in (benchmark.load, benchmark.scoring))
    reading: dict[str, Any] = {"strict": not options.lenient}
    if options.limit is not None:
        reading["limit"] = options.limit
    asking: dict[str, Any] = {"seed": options.seed} if "seed" in scoring else {}
    known: dict[str, tuple[Any, dict[str, Any]]] = {
        **{name: (loader, reading) for name in READING},
        **{name: (scoring, asking) for name in ASKING},
        "snippets": (["snippets"] if "references" in scoring else [], {}),
    }
    for name, (parameters, given) in known.items():
        if not (value := getattr(options, name)):
            continue
        if name not in parameters:
            raise ValueError(
                f"{options.dataset} has none of this; leave out --{name.replace('_', '-')}"
            )
        given[name] = value
    if ids := reading.get("true_paraphrases"):
        reading["true_paraphrases"] = read_items(ids)[0]
    return reading, asking
