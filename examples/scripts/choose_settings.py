"""Settings on the two demo models: ROME's layer, clamp, prefixes and others, and FT+L's bound.

    python examples/scripts/choose_settings.py MODEL RECORDS [SETTING ...] [--first 25]
    python examples/scripts/choose_settings.py MODEL RECORDS --choose TRAIN

MODEL is gemma or smollm2. RECORDS is CounterFact in the published schema. Only the records that are
listed in examples/results/choosing_records.json are used, in the file's order: no table of methods
has them. `--choose` writes that list: of RECORDS, those whose case ids are among the first 1,420 of
TRAIN, and the first of the others, until there are 100.

Each setting named edits the first of them, and all their prompts are scored before and after;
`coarse` stands for the settings that were tried first. A setting is written as its differences from
`RomeConfig()`, for instance `layer=1,clamp=1.5`, or, with `,released` at its end, from
`RomeConfig.released()`; `prefixes=6` takes the first six prefixes, `C=identity` drops the second
moment.

Rows go to examples/results/settings/MODEL as they come, and a run that was stopped goes on where it
was. The prefixes are sampled once and kept beside them: another machine may sample others. Then a
Markdown table of all of ROME's settings with that many records is printed, best S first.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformer_lens_rome import (
    CounterFact,
    RomeConfig,
    SecondMoment,
    evaluate_counterfact,
    get_method,
)
from transformer_lens_rome.demo import load_demo_model
from transformer_lens_rome.evaluation import Results
from transformer_lens_rome.files.strict_json import parse
from transformer_lens_rome.methods.rome import Rome
from transformer_lens_rome.model.adapter import w_out
from transformer_lens_rome.statistics.sources import default_second_moment

RESULTS = Path(__file__).parents[1] / "results"
CHOSEN = RESULTS / "choosing_records.json"
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
        *(f"layer={n},clamp=4" for n in (1, 2, 3, 4, 6, 8, 10)),
        *(f"layer=2,clamp={c}" for c in (1, 2, 8)),
    ],
}
WORDS = {"stop": str, "prefixes_a_step": int}
"""The options of a configuration that are no plain numbers."""


def choose(records: CounterFact, train: str) -> None:
    """Write the case ids of the records that settings may be chosen on."""
    seen = {item["case_id"] for item in parse(Path(train).read_bytes(), train)[:1420]}
    cases = [record.case_id for record in records]
    old = [case for case in cases if case in seen]
    new = [case for case in cases if case not in seen][: 100 - len(old)]
    print(f"{len(old)} of {len(records)} records were among the first 1,420 of {train}")
    CHOSEN.write_text(json.dumps(sorted(old + new, key=cases.index)) + "\n", encoding="utf-8")


def choosing_records() -> list[int]:
    """Return the case ids of the records on which settings are chosen."""
    return list(json.loads(CHOSEN.read_text(encoding="utf-8")))


def with_prefixes(model: Any, folder: Path) -> Rome:
    """Return ROME with its defaults for a model, and the prefixes of the folder, if it has some."""
    path = folder / "prefixes.json"
    kept = tuple(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None
    prepared = Rome(prefixes=kept).prepared(model)
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(prepared.prefixes, indent=0) + "\n", encoding="utf-8")
    return prepared


def method_of(model: Any, prepared: Rome, setting: str) -> Any:
    """Return the method of a setting; `prepared` has ROME's prefixes."""
    if setting.startswith("ft+l,eps="):
        return get_method("ft+l", eps=float(setting.removeprefix("ft+l,eps=")))
    return rome(model, prepared, setting)


def rome(model: Any, prepared: Rome, setting: str) -> Rome:
    """Return ROME with a setting; `prepared` has the prefixes."""
    released = setting.endswith(",released")
    options = dict(pair.split("=") for pair in setting.removesuffix(",released").split(","))
    layer, c = int(options.pop("layer")), options.pop("C", "")
    n_prefixes = int(options.pop("prefixes", len(prepared.prefixes or ())))
    values: dict[str, Any] = {name: WORDS.get(name, float)(x) for name, x in options.items()}
    config = (RomeConfig.released if released else RomeConfig)(**values)
    if c == "identity":
        moment = SecondMoment.identity(w_out(model, layer).shape[0])
    else:
        moment = default_second_moment(model, layer, prepend_bos=prepared.prepend_bos)
    prefixes = (prepared.prefixes or ())[:n_prefixes]
    return dataclasses.replace(
        prepared, layer=layer, second_moment=moment, prefixes=prefixes, config=config
    )


def table(folder: Path, cases: Sequence[int], method: str = "layer=") -> str:
    """Return a Markdown table of the settings that have all of these records, best S first.

    The names of the settings start with `method`.
    """
    rows = {}
    for path in folder.glob(f"{method}*.jsonl"):
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
    parser.add_argument("--choose", metavar="TRAIN", help="write the list of records and stop")
    args = parser.parse_args()
    if args.choose:
        return choose(CounterFact.load(args.records), args.choose)
    logging.basicConfig(level=logging.INFO)
    cases = choosing_records()[: args.first]
    records = CounterFact.load(args.records).only(cases)
    folder = RESULTS / "settings" / args.model
    named = COARSE[args.model] if args.settings == ["coarse"] else args.settings
    if named:
        model = load_demo_model(args.model)
        prepared = with_prefixes(model, folder)
        for setting in named:
            method = method_of(model, prepared, setting)
            out = folder / f"{setting}.jsonl"
            evaluate_counterfact(model, records, method, out=out, progress=False, batch_size=4)
    print(table(folder, cases))


if __name__ == "__main__":
    main()
