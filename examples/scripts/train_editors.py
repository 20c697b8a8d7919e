"""Train KE, KE-CF, MEND or MEND-CF for Gemma-3-270M; a run that was stopped goes on.

    python examples/scripts/train_editors.py NAME TRAIN TABLE TEXT EDITORS [STEPS]

TRAIN is CounterFact in the flat schema, TABLE the file of the tables in the published one: records
that it has are not trained on. The -CF editors train on the first 2,000 other records of TRAIN, KE
and MEND on texts that the model writes. What should stay as it is: the neighbours of the next 2,000
records with their true targets, in turn with paragraphs of TEXT. EDITORS is a folder, which gets
NAME, the editor. How training went is written to examples/results/editors/. Training ends after
STEPS steps, or before when validation gets no better; with more STEPS it goes on.

The published settings are for a million steps on a GPU. These are for an hour on one core: fewer
steps, so larger learning rates (KE's is De Cao et al.'s own), and shorter texts.
"""

import json
import logging
import resource
import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path

from transformer_lens_rome import CounterFact, get_method
from transformer_lens_rome.demo import load_demo_model
from transformer_lens_rome.files.strict_json import parse
from transformer_lens_rome.prompts.sampling import sampled_texts

RESULTS = Path(__file__).parents[1] / "results" / "editors"
N = 2000
SMALL = {"validate_every": 100, "n_locality": 2, "locality_tokens": 32, "patience": 400}
N_TEXTS = {"ke": 256, "mend": 800}
SETTINGS = {
    "ke": {"lr": 3e-4, "accumulate": 2, "max_steps": 700, "n_validation": 20},
    "mend": {"lr": 3e-6, "accumulate": 4, "max_steps": 500, "n_validation": 40},
}


def neighbours(train: str, used: set[int]) -> list[str]:
    """Return true sentences about neighbours of records on which no editor is trained."""
    items = [item for item in parse(Path(train).read_bytes(), train) if item["case_id"] not in used]
    return [f"{item['locality_prompt']} {item['locality_ground_truth']}" for item in items[:N]]


def main(name: str, train: str, table: str, text: str, folder: str, steps: str = "") -> None:
    """Train one editor and write down how it went."""
    logging.basicConfig(level=logging.INFO)
    model = load_demo_model()
    held_out = {record.case_id for record in CounterFact.load(table)}
    records = [record for record in CounterFact.load(train) if record.case_id not in held_out][:N]
    texts = Path(text).read_text(encoding="utf-8").split("\n")
    paragraphs = [line for line in texts if len(line) > 200][:N]
    around = neighbours(train, held_out | {record.case_id for record in records})
    locality = list(chain.from_iterable(zip(around, paragraphs)))
    if name.endswith("-cf"):
        data = records
    else:
        data = sampled_texts(model, N_TEXTS[name], length=32)
        data = [line for line in data if len(line.split()) > 14]
    method = get_method(name)
    settings = replace(method.settings(), **SMALL, **SETTINGS[method.kind])
    if steps:
        settings = replace(settings, max_steps=int(steps))
    path = Path(folder) / name
    info = method.fit(model, data, locality=locality, settings=settings, out=path).info
    row = {"method": name, "settings": info["settings"], "n_train": len(info["train"])}
    row |= {key: info[key] for key in ("step", "seconds", "curve")}
    row["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    row["editor_mb"] = path.stat().st_size / 1e6
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
