"""Runs with generated text, and simulated raters who fill in a page's file."""

import json

import torch
from helpers.evaluation_setting import record

from transformer_lens_rome.evaluation import GeneratedText, PromptScore, RecordRow, Results
from transformer_lens_rome.evaluation.rows import record_digest
from transformer_lens_rome.rate import answers
from transformer_lens_rome.rate.key import LETTERS, QUESTIONS, SAME

SCORE = PromptScore([-1.0], [-2.0], [True], [False])
RECORDS = [record(i, f"Tower {i}") for i in range(24)]


def run(name, records=RECORDS, text="{name} says of {subject}: {i}", n_texts=3, **setting):
    """A run that wrote texts about each record; they tell which run wrote them."""

    def row(one, who):
        said = [text.format(name=who, subject=one.request.subject, i=i) for i in range(n_texts)]
        generation = GeneratedText(tuple(said), 5.0) if n_texts else None
        return RecordRow(one.case_id, record_digest(one), {"rewrite": [SCORE]}, generation)

    before = {one.case_id: row(one, "unedited") for one in records}
    after = {} if name == "unedited" else {one.case_id: row(one, name) for one in records}
    return Results(name, {"model_hash": "a", **setting}, before, after)


def simulated_answers(key, chances, seed=0):
    """Answers of a rater who prefers each method, or none, with the given chances."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for question in QUESTIONS:
        each = torch.tensor(chances[question], dtype=torch.float64)
        drawn = torch.multinomial(each, len(key.items), True, generator=generator).tolist()
        found[question] = [
            SAME if one == len(key.methods) else LETTERS[item.order.index(one)]
            for one, item in zip(drawn, key.items, strict=True)
        ]
    return found


def write_file(path, key, given, *, rater=0, kind="simulated", change=None):
    """Write a file as the page exports it; `change` is made after the checksum."""
    page, name = key.page, f"{rater:016x}"
    content = {
        "format": answers.FORMAT,
        "page": page,
        "rater": name,
        "kind": kind,
        "answers": given,
        "checksum": answers.checksum(page, name, kind, given),
    }
    path.write_text(json.dumps(content | (change or {})), encoding="utf-8")
    return path
