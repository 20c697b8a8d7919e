"""Where and how far to edit Gemma-3-270M: test edits over layers, clamps and statistics.

    python examples/scripts/sweep_gemma.py RECORDS.json TEXT.txt [part of a setting's name]

RECORDS is CounterFact, of which 16 records are used (positions 200 to 215 by case_id); TEXT is
where the second moment comes from. Three prefixes instead of the default 21 make it quicker.
Rows go to examples/results/sweep/ as they come, and a run that was stopped goes on where it was.
Prints the table of examples/guide/which_layer.md.
"""

import json
import sys
from pathlib import Path

import torch

from transformer_lens_rome import (
    CounterFact,
    RomeConfig,
    SecondMoment,
    collect_second_moment,
    sweep_layers,
)
from transformer_lens_rome.demo import load_demo_model
from transformer_lens_rome.statistics.sources import sampled_second_moment

RESULTS = Path(__file__).parents[1] / "results" / "sweep"
LAYERS = (0, 1, 2, 5, 8)
SETTINGS = {
    **{f"layer {n}, clamp 0.75": (n, "text", RomeConfig(clamp=0.75)) for n in LAYERS},
    "layer 5, released": (5, "text", RomeConfig.released(ridge=1e-6)),
    "layer 0, C = I": (0, "identity", RomeConfig(clamp=0.75)),
    **{f"layer 0, clamp {c}": (0, "text", RomeConfig(clamp=c)) for c in (1.5, 4.0)},
    "layer 0, weight decay 10": (0, "text", RomeConfig(clamp=0.75, weight_decay=10.0)),
    "layer 0, KL 1": (0, "text", RomeConfig(clamp=0.75, kl_factor=1.0)),
    "layer 0, C sampled": (0, "sampled", RomeConfig(clamp=0.75)),
}


def statistics(model, corpus: str, text_file: str) -> dict[int, SecondMoment]:
    """C by layer, from the text, from text that the model writes, or as the identity."""
    if corpus == "identity":
        return {0: SecondMoment.identity(2048)}
    if corpus == "sampled":
        return {0: sampled_second_moment(model, 0)}
    ids = model.tokenizer(
        Path(text_file).read_text(encoding="utf-8"), add_special_tokens=False
    ).input_ids
    rows = [ids[i : i + 255] for i in range(0, 240 * 255, 255)]
    return collect_second_moment(model, rows, LAYERS, max_tokens=61_440, source="wikitext-2")


def main(records_file: str, text_file: str, part: str = "") -> None:
    """Run the settings and print a table of their scores."""
    records = sorted(CounterFact.load(records_file), key=lambda r: r.case_id)
    model = load_demo_model()
    prefixes = json.loads((RESULTS.parent / "prefixes.json").read_text())[::10]
    moments: dict[str, dict[int, SecondMoment]] = {}
    print("| setting | ES | PS | NS | S | NS before |\n|---|---|---|---|---|---|")
    for name, (layer, corpus, config) in SETTINGS.items():
        if part not in name:
            continue
        if corpus not in moments:
            moments[corpus] = statistics(model, corpus, text_file)
        (score,) = sweep_layers(
            model,
            records[200:216],
            [layer],
            second_moments=moments[corpus],
            prefixes=prefixes,
            config=config,
            out=RESULTS / f"{name.replace(' ', '_').replace(',', '')}.jsonl",
            progress=False,
        )
        numbers = [score.ES, score.PS, score.NS, score.S, score.before["NS"]]
        print(f"| {name} |", " | ".join(f"{number:.1f}" for number in numbers), "|", flush=True)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main(*sys.argv[1:])
