"""The same facts edited on Gemma-3-270M in float32, bfloat16 and float16.

    python examples/benchmarks/dtypes.py RECORDS TEXT [EDITS]

RECORDS is CounterFact, of which the 400th and following by case_id are used; TEXT is plain text, of
which 12,288 tokens give C, on the model in each dtype. The last columns are what rounding the
weight loses of the change, of the edits and of a hundredth of the first.
"""

import sys
from pathlib import Path
from statistics import fmean

import torch

from transformer_lens_rome import CounterFact, collect_second_moment, compute_rome_edit
from transformer_lens_rome.demo import load_demo_model
from transformer_lens_rome.edits.measure import measured
from transformer_lens_rome.prompts.encoder import Encoder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PREFIXES = ["", "The 10.", "The first time I met the man I was."]


def main(records_file: str, text_file: str, edits: str = "5") -> None:
    """One line a dtype."""
    records = sorted(CounterFact.load(records_file), key=lambda record: record.case_id)[400:]
    print("| | P(target) before | after | relative norm | rounding error | of 1/100 |")
    print("|---|---|---|---|---|---|")
    for name, dtype in DTYPES.items():
        model = load_demo_model().to(dtype)
        ids = model.tokenizer(
            Path(text_file).read_text(encoding="utf-8"), add_special_tokens=False
        ).input_ids
        texts = [ids[i : i + 255] for i in range(0, 13_000, 255)]
        C = collect_second_moment(model, texts, 0, max_tokens=12_288, progress=False)
        known = {"layer": 0, "second_moment": C, "prefixes": PREFIXES, "progress": False}
        requests = [record.request for record in records[: int(edits)]]
        try:
            found = [compute_rome_edit(model, request, **known) for request in requests]
        except ValueError as error:
            print(f"| {name} | refused: {error} |", flush=True)
            continue
        weak = measured(model, Encoder.of(model), found[0].scale(0.01))
        means = [
            fmean(getattr(edit.health, field) for edit in found)
            for field in ("p_before", "p_after", "relative_norm", "rounding_error")
        ]
        numbers = " | ".join(f"{x:.2g}" for x in (*means, weak.rounding_error))
        print(f"| {name} | {numbers} |", flush=True)
        for warning in weak.warnings:
            print(f"  {name}, 1/100 of an edit: {warning}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
