"""ROME on 50 CounterFact records that no setting was chosen on: default and released constants.

    python examples/scripts/held_out.py RECORDS.json TEXT.txt [default | released]

RECORDS is CounterFact, of which the first 50 by case_id are used (the settings were chosen on
records 200 to 319); TEXT is where the second moment comes from. The context prefixes
were sampled once from the model and are kept beside the rows. Rows go to examples/results/ as they
come, and a run that was stopped goes on where it was.
"""

import dataclasses
import json
import sys
from pathlib import Path

from transformer_lens_rome import CounterFact, RomeConfig, collect_second_moment, sweep_layers
from transformer_lens_rome.demo import load_demo_model

RESULTS = Path(__file__).parents[1] / "results"
SETTINGS = {"default": (0, RomeConfig()), "released": (5, RomeConfig.released(ridge=1e-6))}


def main(records_file: str, text_file: str, *names: str) -> None:
    """Score both settings, or one of them."""
    records = sorted(CounterFact.load(records_file), key=lambda r: r.case_id)[:50]
    model = load_demo_model()
    ids = model.tokenizer(
        Path(text_file).read_text(encoding="utf-8"), add_special_tokens=False
    ).input_ids
    rows = [ids[i : i + 255] for i in range(0, 240 * 255, 255)]
    chosen = {name: SETTINGS[name] for name in names or SETTINGS}
    layers = [layer for layer, _ in chosen.values()]
    moments = collect_second_moment(model, rows, layers, max_tokens=61_440, source="wikitext-2")
    prefixes = json.loads((RESULTS / "prefixes.json").read_text())
    for name, (layer, config) in chosen.items():
        (score,) = sweep_layers(
            model,
            records,
            [layer],
            second_moments=moments,
            prefixes=prefixes,
            config=config,
            out=RESULTS / f"held_out_{name}.jsonl",
            progress=False,
        )
        print(name, json.dumps(dataclasses.asdict(score)))


if __name__ == "__main__":
    main(*sys.argv[1:])
