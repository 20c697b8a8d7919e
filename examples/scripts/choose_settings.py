"""ROME's settings on the two demo models: layer, clamp, weight decay, KL, prefixes and C.

    python examples/scripts/choose_settings.py MODEL RECORDS [SETTING ...] [--first 25]

MODEL is gemma or smollm2. RECORDS is CounterFact in the published schema. Only the records that are
listed in examples/results/choosing_records.json are used, in the file's order: no table of results
has them. Each setting named edits the first of them, and all their prompts are scored before and
after; `coarse` stands for every setting of MODEL. A setting is written as its differences from
`RomeConfig()`, for instance `layer=1,clamp=1.5`, or, with `,released` at its end, from
`RomeConfig.released()`; `C=identity` drops the second moment.

Rows go to examples/results/settings/MODEL as they come, and a run that was stopped goes on where it
was. Then a Markdown table of all settings with that many records is printed, best S first.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformer_lens_rome import CounterFact, RomeConfig, SecondMoment, evaluate_counterfact
from transformer_lens_rome.demo import load_demo_model
from transformer_lens_rome.evaluation import Results
from transformer_lens_rome.methods.rome import Rome
from transformer_lens_rome.model.adapter import w_out
from transformer_lens_rome.statistics.sources import default_second_moment

RESULTS = Path(__file__).parents[1] / "results"
SHOWN = ("ES", "PS", "NS", "S", "EM", "PM", "EA", "PA")
COARSE = {
    "gemma": [
        *(f"layer={n},clamp=0.75" for n in (0, 1, 2, 3, 5)),
        *(f"layer=0,clamp={c}" for c in (0.5, 1.5)),
        "layer=0,clamp=0.75,weight_decay=5",
        "layer=0,clamp=0.75,kl_factor=1",
        "layer=0,clamp=0.75,prefixes=6",
        "layer=0,clamp=0.75,C=identity",
        "layer=5,ridge=1e-6,released",
    ],
    "smollm2": [
        *(f"layer={n},clamp=4" for n in (1, 2, 4, 6, 8, 10, 12)),
        *(f"layer=4,clamp={c}" for c in (1, 2)),
    ],
}


def rome(model: Any, prepared: Rome, setting: str) -> Rome:
    """Return the method of a setting; `prepared` has the prefixes."""
    released = setting.endswith(",released")
    options = dict(pair.split("=") for pair in setting.removesuffix(",released").split(","))
    layer, c = int(options.pop("layer")), options.pop("C", "")
    n_prefixes = int(options.pop("prefixes", len(prepared.prefixes or ())))
    numbers = {name: float(value) for name, value in options.items()}
    config = (RomeConfig.released if released else RomeConfig)(**numbers)
    if c == "identity":
        moment = SecondMoment.identity(w_out(model, layer).shape[0])
    else:
        moment = default_second_moment(model, layer, prepend_bos=prepared.prepend_bos)
    prefixes = (prepared.prefixes or ())[:n_prefixes]
    return dataclasses.replace(
        prepared, layer=layer, second_moment=moment, prefixes=prefixes, config=config
    )


def choosing_records() -> list[int]:
    """Return the case ids of the records on which settings are chosen."""
    return list(json.loads((RESULTS / "choosing_records.json").read_text(encoding="utf-8")))


def table(folder: Path, cases: Sequence[int]) -> str:
    """Return a Markdown table of the settings that have all of these records, best S first."""
    rows = {}
    for path in folder.glob("layer=*.jsonl"):
        results = Results.load(path)
        if set(cases) <= set(results.after):
            rows[path.stem.replace(",", ", ")] = results.scores(cases=cases)
            rows["unedited"] = results.scores(edited=False, cases=cases)
    lines = ["| setting | " + " | ".join(SHOWN) + " |", "|---" * (len(SHOWN) + 1) + "|"]
    for name in sorted(rows, key=lambda name: -rows[name]["S"].mean):
        lines.append(f"| {name} | " + " | ".join(str(rows[name][shown]) for shown in SHOWN) + " |")
    return "\n".join(lines)


def main() -> None:
    """Read the options, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=COARSE)
    parser.add_argument("records", help="CounterFact, published schema")
    parser.add_argument("settings", nargs="*", metavar="SETTING")
    parser.add_argument("--first", type=int, default=25, help="the number of records")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    cases = choosing_records()
    records = CounterFact.load(args.records).only(cases[: args.first])
    folder = RESULTS / "settings" / args.model
    folder.mkdir(parents=True, exist_ok=True)
    named = COARSE[args.model] if args.settings == ["coarse"] else args.settings
    if named:
        model = load_demo_model(args.model)
        prepared = Rome().prepared(model)
        for setting in named:
            method = rome(model, prepared, setting)
            out = folder / f"{setting}.jsonl"
            evaluate_counterfact(model, records, method, out=out, progress=False, batch_size=4)
    print(table(folder, cases[: args.first]))


if __name__ == "__main__":
    main()
