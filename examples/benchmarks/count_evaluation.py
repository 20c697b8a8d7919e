"""Counted work of one CounterFact record on large models: a ROME edit, and scoring.

    python examples/benchmarks/count_evaluation.py TOKENIZER [gpt2-xl gpt-j-6b]

Operations are counted on models of the right width with random weights and two or three blocks,
and scaled: the work is a sum of what each block below the edit costs, each block above it, and each
token of the vocabulary, so three counts give all. TOKENIZER is a folder with a tokenizer of 20,000
tokens or more, such as SmolLM2's: with fewer, what the vocabulary does not cost is scaled too.
One record is edited with 21 prefixes, by the released rule in 20 steps and by the default rule in
13, the mean on Gemma-3-270M (`search_rules.py`), and scored on 13 prompts of 12 tokens. Prints a
Markdown table.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from typing import Any

import torch
from measure import count_flops
from shapes import SHAPES, random_model

from transformer_lens_rome import EditRequest, RomeConfig, SecondMoment, compute_rome_edit
from transformer_lens_rome.evaluation import CounterFactRecord
from transformer_lens_rome.evaluation.counterfact import CounterFactScoring
from transformer_lens_rome.evaluation.scoring import score_records
from transformer_lens_rome.model.adapter import w_out
from transformer_lens_rome.prompts.encoder import Encoder

RULES = {"all prefixes, 20 steps": (None, 20), "7 prefixes a step, 13 steps": (7, 13)}
VOCABULARY = {"gpt2-xl": 50257, "gpt-j-6b": 50400}
LAYERS = {"gpt2-xl": (48, 17), "gpt-j-6b": (28, 5)}
WORD = " the"


def text(n: int) -> str:
    """About n tokens."""
    return ("The" + WORD * n)[: 4 * n - 1]


def edit(model: Any, layer: int, steps: int, prefixes_a_step: int | None) -> int:
    """Operations of one edit with 21 prefixes: the bare prompt, ten of 5 tokens, ten of 10."""
    request = EditRequest(text(4) + " {} is" + WORD, "Ada Love", "London")
    prefixes = ["", *[text(4) + "."] * 10, *[text(9) + "."] * 10]
    config = RomeConfig(stop="loss", stop_loss=0.0, lr=1e-3, steps=steps)
    config = replace(config, prefixes_a_step=prefixes_a_step)
    options = {"layer": layer, "prefixes": prefixes, "config": config, "progress": False}
    options["second_moment"] = SecondMoment.identity(len(w_out(model, layer)))
    return count_flops(lambda: compute_rome_edit(model, request, **options))


def score(model: Any) -> int:
    """Operations of scoring a record once."""
    prompts = [f"{i} " + text(9) for i in range(13)]
    request = EditRequest("{}" + WORD * 8, "Ada Love", "London", "Paris")
    record = CounterFactRecord(0, request, tuple(prompts[:2]), tuple(prompts[2:12]))
    encoder = Encoder.of(model)
    return count_flops(lambda: score_records(model, encoder, CounterFactScoring(), [record]))


def scaled(shape: str, tokenizer: str, count: Any) -> float:
    """Operations at full depth and vocabulary, from three shallow models."""
    blocks, edited = LAYERS[shape]
    found, vocabulary = {}, 0
    for depth, layer in ((2, 0), (3, 0), (3, 1)):
        name = "n_layer"
        kept = SHAPES[shape]
        SHAPES[shape] = (kept[0], kept[1] | {name: depth})
        try:
            model = random_model(shape, tokenizer, "cpu", torch.float32)
        finally:
            SHAPES[shape] = kept
        found[depth, layer], vocabulary = count(model, layer), model.cfg.d_vocab
    if vocabulary < 20_000:
        raise SystemExit(f"the tokenizer has {vocabulary} tokens; take one with 20,000 or more")
    above = found[3, 0] - found[2, 0]
    below = found[3, 1] - found[2, 0]
    rest = found[2, 0] - 2 * above
    return edited * below + (blocks - edited) * above + rest * VOCABULARY[shape] / vocabulary


def main(tokenizer: str, *shapes: str) -> None:
    """Count and print."""
    logging.disable(logging.WARNING)  # random models do not learn facts
    print("| model | search | edit, TFLOP | scoring before and after, TFLOP | a record, TFLOP |")
    print("|---|---|---|---|---|")
    for shape in shapes or tuple(LAYERS):
        scores = 2 * scaled(shape, tokenizer, lambda model, layer: score(model))
        for rule, (few, steps) in RULES.items():
            three, six = (
                scaled(shape, tokenizer, lambda m, at, n=n: edit(m, at, n, few)) for n in (3, 6)
            )
            edits = three + (steps - 3) * (six - three) / 3
            cells = " | ".join(f"{n / 1e12:.1f}" for n in (edits, scores, edits + scores))
            print(f"| {shape} | {rule} | {cells} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
