"""Train KE, KE-CF, MEND or MEND-CF for Gemma-3-270M; a run that was stopped goes on.

    python examples/scripts/train_editors.py mend-cf RECORDS TEXT EDITORS

RECORDS: CounterFact. Those at positions 320 to 1419 are trained on; the first 200 are for
evaluation. TEXT: a file of plain text, one paragraph a line, on which the model should stay as it
is. EDITORS: a folder, which gets `mend-cf`, the editor. How training went is written to
examples/results/editors/.

The published settings are for a million steps on a GPU. These are for an hour on one core: fewer
steps, so larger learning rates (KE's is De Cao et al.'s own), and shorter texts.
"""

import json
import logging
import resource
import sys
from dataclasses import replace
from pathlib import Path

from transformer_lens_rome import CounterFact, get_method
from transformer_lens_rome.demo import load_demo_model
from transformer_lens_rome.prompts.sampling import sampled_texts

RESULTS = Path(__file__).parents[1] / "results" / "editors"
SMALL = {"validate_every": 100, "n_locality": 1, "locality_tokens": 32, "patience": 300}
N_TEXTS = {"ke": 256, "mend": 800}
SETTINGS = {
    "ke": {"lr": 3e-4, "accumulate": 2, "max_steps": 300, "n_validation": 20},
    "mend": {"lr": 3e-6, "accumulate": 4, "max_steps": 400, "n_validation": 40},
}


def main(name: str, records: str, text: str, folder: str) -> None:
    """Train one editor and write down how it went."""
    logging.basicConfig(level=logging.INFO)
    model = load_demo_model()
    paragraphs = [
        line for line in Path(text).read_text(encoding="utf-8").split("\n") if len(line) > 200
    ][:600]
    if name.endswith("-cf"):
        data = sorted(CounterFact.load(records), key=lambda record: record.case_id)[320:1420]
    else:
        data = sampled_texts(model, N_TEXTS[name], length=32)
        data = [line for line in data if len(line.split()) > 14]
    method = get_method(name)
    settings = replace(method.settings(), **SMALL, **SETTINGS[method.kind])
    path = Path(folder) / name
    info = method.fit(model, data, locality=paragraphs, settings=settings, out=path).info
    row = {"method": name, "settings": info["settings"], "n_train": len(info["train"])}
    row |= {key: info[key] for key in ("step", "seconds", "curve")}
    row["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    row["editor_mb"] = path.stat().st_size / 1e6
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
