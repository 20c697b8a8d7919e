"""How much of an edit reaches other subjects: key overlap by layer, with C and without.

    python examples/scripts/key_overlap.py RECORDS.json TEXT.txt

An edit moves the value at a key k by (k · u) / (k* · u) times what it does at k*. For 12 records
(positions 200 to 211 by case_id) the table gives the mean over records of the largest such ratio,
in absolute value, over the tokens of the neighbouring prompt, and of the ratio at the paraphrase's
own maximum; BOS left out. No edit is made.
"""

import sys
from pathlib import Path

import torch

from transformer_lens_rome import CounterFact, SecondMoment, collect_second_moment
from transformer_lens_rome.demo import load_demo_model
from transformer_lens_rome.model.adapter import Point
from transformer_lens_rome.model.passes import read
from transformer_lens_rome.prompts.encoder import Encoder, pad

LAYERS = tuple(range(10))


def keys(model, row) -> dict[int, torch.Tensor]:
    """Keys of every token of one row, BOS left out, by layer."""
    found = read(model, pad([row]), [Point("key", layer) for layer in LAYERS])
    return {point.layer: tensor[0, 1:].float() for point, tensor in found.items()}


def main(records_file: str, text_file: str) -> None:
    """Print the table."""
    records = sorted(CounterFact.load(records_file), key=lambda r: r.case_id)
    model = load_demo_model()
    encoder = Encoder.of(model)
    ids = encoder.ids(Path(text_file).read_text(encoding="utf-8"))
    rows = [ids[i : i + 255] for i in range(0, 240 * 255, 255)]
    text = collect_second_moment(model, rows, LAYERS, max_tokens=61_440)
    ratios = {}
    for record in records[200:212]:
        request = record.request
        row = encoder.templated_row(request.prompt, request.subject)
        edited = keys(model, row)
        near = keys(model, encoder.row(record.neighborhood_prompts[0]))
        same = keys(model, encoder.row(record.paraphrase_prompts[0]))
        for layer in LAYERS:
            k_star = edited[layer][row.subject[-1] - 1]
            for name, C in (("I", SecondMoment.identity(2048)), ("C", text[layer])):
                u = C.solve(k_star).float()
                pair = [(k[layer] @ u / (k_star @ u)).abs().max().item() for k in (near, same)]
                ratios.setdefault((layer, name), []).append(pair)
    print("| layer | neighbour, C = I | neighbour, C | paraphrase, C |\n|---|---|---|---|")
    for layer in LAYERS:
        mean = {name: torch.tensor(ratios[layer, name]).mean(0).tolist() for name in ("I", "C")}
        print(f"| {layer} | {mean['I'][0]:.2f} | {mean['C'][0]:.2f} | {mean['C'][1]:.2f} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
