"""How much text does C need? Agreement, conditioning and reach against tokens, on Gemma-3-270M.

    python examples/scripts/convergence.py RECORDS.json TEXT.txt

For 12 records (positions 200 to 211 by case_id), at layers 0 and 5: the cosine of C⁻¹k* with that
from all 61,440 tokens, and the largest share |k · u| / |k* · u| of the change that reaches a token
of the neighbouring prompt; means over records, BOS left out. No edit is made.
"""

import sys
from pathlib import Path

import torch

from transformer_lens_rome import CounterFact, SecondMoment, collect_second_moment
from transformer_lens_rome.demo import load_demo_model
from transformer_lens_rome.model.adapter import Point
from transformer_lens_rome.model.passes import read
from transformer_lens_rome.prompts.encoder import Encoder, pad
from transformer_lens_rome.statistics.sources import sampled_second_moment

LAYERS = (0, 5)
TOKENS = (2048, 4096, 8192, 16_384, 32_768, 61_440)


def keys(model, row) -> dict[int, torch.Tensor]:
    """Keys of every token of one row, BOS left out, by layer."""
    found = read(model, pad([row]), [Point("key", layer) for layer in LAYERS])
    return {point.layer: tensor[0, 1:].double() for point, tensor in found.items()}


def subjects(model, records) -> list[tuple[dict, dict]]:
    """For each record, k* (of the bare prompt) and its neighbouring prompt's keys, by layer."""
    encoder, found = Encoder.of(model), []
    for record in records:
        request = record.request
        row = encoder.templated_row(request.prompt, request.subject)
        own = {n: k[row.subject[-1] - 1] for n, k in keys(model, row).items()}
        found.append((own, keys(model, encoder.row(record.neighborhood_prompts[0]))))
    return found


def show(layer: int, name: str, moment: SecondMoment, ridge: float, found, reference) -> None:
    """One line of the table."""
    cosines, shares = [], []
    for (own, near), best in zip(found, reference[layer], strict=True):
        u = moment.solve(own[layer], ridge=ridge)
        cosines.append(torch.cosine_similarity(u, best, dim=0).item())
        shares.append((near[layer] @ u / (own[layer] @ u)).abs().max().item())
    mean = [f"{sum(values) / len(values):.2f}" for values in (cosines, shares)]
    report = moment.report()
    half = "" if moment.half_agreement is None else f"{moment.half_agreement:.2f}"
    cells = [str(layer), name, half, f"{report['condition_number']:.0e}", *mean]
    print(f"| {' | '.join(cells)} |", flush=True)


def main(records_file: str, text_file: str) -> None:
    """Print the table."""
    records = sorted(CounterFact.load(records_file), key=lambda r: r.case_id)
    model = load_demo_model()
    ids = Encoder.of(model).ids(Path(text_file).read_text(encoding="utf-8"))
    rows = [ids[i : i + 255] for i in range(0, 240 * 255, 255)]
    found = subjects(model, records[200:212])
    made = {n: collect_second_moment(model, rows, LAYERS, max_tokens=n) for n in TOKENS}
    bare = collect_second_moment(model, rows, LAYERS, max_tokens=61_200, prepend_bos=False)
    reference = {n: [made[61_440][n].solve(own[n]) for own, _ in found] for n in LAYERS}
    print("| layer | C from | half agreement | condition | cosine | neighbour |")
    for layer in LAYERS:
        for n, moments in made.items():
            if n > 2048:  # every text's BOS has one key, so 2,048 tokens are less than 2,048 keys
                show(layer, f"{n:,} tokens", moments[layer], 0.0, found, reference)
            show(layer, f"{n:,}, ridge 1e-3", moments[layer], 1e-3, found, reference)
        show(layer, "61,200, no BOS", bare[layer], 0.0, found, reference)
        show(layer, "identity", SecondMoment.identity(2048), 0.0, found, reference)
    show(0, "8,192 sampled", sampled_second_moment(model, 0), 0.0, found, reference)


if __name__ == "__main__":
    main(*sys.argv[1:])
