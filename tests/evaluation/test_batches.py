"""Runs that edit and score several records at a time give the rows of one record at a time."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import make_model, newest
from helpers.editor_setting import random_editor
from helpers.evaluation_setting import (
    RECORDS,
    RandomEdits,
    assert_alike,
    evaluate,
    record,
    seconds_apart,
)
from helpers.rome_setting import CONFIG, LAYER, PREFIXES, random_moment

from transformer_lens_rome import EditRequest, get_method
from transformer_lens_rome.evaluation import evaluate_zsre, work
from transformer_lens_rome.evaluation.zsre import ZsreRecord
from transformer_lens_rome.methods import rome_method
from transformer_lens_rome.model.adapter import Weight, w_out, weight_hash

pytestmark = pytest.mark.usefixtures("any_lengths")

LONG = "In the old city of the best of times and the old man, {} was"
VARIED = [
    *RECORDS,
    dataclasses.replace(RECORDS[0], case_id=20),  # the same request twice
    record(21, "The old man and the sea", "the best of the old times", "Rome"),
    dataclasses.replace(
        RECORDS[0], case_id=22, request=EditRequest(LONG, "Cuba", "in Rome", "Paris")
    ),
]


def rome(model, config=CONFIG):
    moment = random_moment(len(w_out(model, LAYER)))
    known = {"layer": LAYER, "second_moment": moment, "prefixes": PREFIXES, "config": config}
    return get_method("rome", progress=False, **known)


METHODS = {
    "rome": rome,
    "rome, released": lambda model: rome(model, dataclasses.replace(CONFIG, key="released")),
    "ft": lambda model: get_method("ft", layer=LAYER, steps=4),
    "ft+l": lambda model: get_method("ft+l", layer=LAYER, steps=4),
    "kn": lambda model: get_method("kn", steps=4),
    "ke": lambda model: get_method("ke", editor=random_editor(model, "ke")),
    "mend": lambda model: get_method("mend", editor=random_editor(model, "mend")),
}


@pytest.fixture(params=("gpt2", "gemma3"))
def model(request, model_class, tokenizer_of):
    return make_model(model_class, request.param, tokenizer_of(request.param))


@pytest.mark.parametrize("name", METHODS)
def test_every_row_is_that_of_one_by_one(model, name):
    method = METHODS[name](model)
    before = weight_hash(w_out(model, LAYER))
    alone = evaluate(model, method, VARIED, batch_size=1, attributes=True)
    size = 3 if "rome" in name else None  # several batches, or one of all
    together = evaluate(model, method, VARIED, batch_size=size, attributes=True)
    assert_alike(seconds_apart(together.after), seconds_apart(alone.after))
    assert_alike(seconds_apart(together.before), seconds_apart(alone.before))
    scores = [row.scores["rewrite"] for row in alone.after.values()]
    assert scores[0] != scores[1] != scores[2]  # the control
    assert not any(row.failed for row in alone.after.values())
    assert weight_hash(w_out(model, LAYER)) == before


def test_rows_of_zsre_too(gpt2):
    request = EditRequest("{} is in", "The tower", "Paris")
    records = [
        ZsreRecord(i, dataclasses.replace(request, subject=name), f"In {name}", "Cuba is", "old")
        for i, name in enumerate(("The tower", "Old man", "Rome"))
    ]
    known = {"progress": False, "method": rome(gpt2)}
    alone = evaluate_zsre(gpt2, records, batch_size=1, **known)
    together = evaluate_zsre(gpt2, records, batch_size=3, **known)
    assert_alike(seconds_apart(together.after), seconds_apart(alone.after))


@pytest.mark.slow
def test_text_is_generated_with_the_edit_on(gpt2):
    method = RandomEdits(strength=1.0)
    alone = evaluate(gpt2, method, RECORDS[:2], batch_size=1, generate=True)
    together = evaluate(gpt2, method, RECORDS[:2], batch_size=2, generate=True)
    assert_alike(seconds_apart(together.after), seconds_apart(alone.after))
    texts = [row.generation.texts for row in alone.after.values()]
    assert texts[0] != alone.before[0].generation.texts


def test_what_fails_fails_alone(gpt2):
    """A request without an edit, a record that is too long, and one that cannot be scored."""
    too_long = dataclasses.replace(RECORDS[0], case_id=30, paraphrase_prompts=("the old " * 200,))
    no_truth = dataclasses.replace(
        RECORDS[1], case_id=31, request=EditRequest("{} is in", "Rome", "Paris")
    )
    records = [*RECORDS, too_long, no_truth]
    method = RandomEdits(broken=("The tower",))
    alone = evaluate(gpt2, method, records, batch_size=1)
    together = evaluate(gpt2, method, records, batch_size=6)
    assert_alike(seconds_apart(together.after), seconds_apart(alone.after))
    failed = {case: row.failed for case, row in together.after.items() if row.failed}
    assert failed.keys() == {1, 30, 31}
    assert "no such subject" in failed[1] and "context" in failed[30] and "true" in failed[31]


@pytest.mark.slow
def test_a_search_that_turns_nan_fails_alone(gpt2, monkeypatch):
    """It is named as in a run of one record at a time."""
    method, solve = rome(gpt2), rome_method.solve_rank_one
    sound = evaluate(gpt2, method, VARIED, batch_size=1)
    k_star = method.compute(gpt2, VARIED[2].request).k_star

    def solve_or_break(*arguments):
        update = solve(*arguments)
        wrong = torch.allclose(update.k_star, k_star, rtol=1e-3)
        return update._replace(lam=update.lam * torch.nan) if wrong else update

    monkeypatch.setattr(rome_method, "solve_rank_one", solve_or_break)
    together = evaluate(gpt2, method, VARIED, batch_size=7)
    failed = {case: row.failed for case, row in together.after.items() if row.failed}
    assert failed.keys() == {2} and "NaN" in failed[2]
    others = {case: row for case, row in together.after.items() if case != 2}
    expected = {case: row for case, row in sound.after.items() if case != 2}
    assert_alike(seconds_apart(others), seconds_apart(expected))


@pytest.mark.slow
def test_a_batch_that_does_not_fit_is_halved(gpt2, monkeypatch, caplog):
    """Both where edits are searched and where prompts are scored; the rows are the same."""
    method = rome(gpt2)
    alone = evaluate(gpt2, method, batch_size=1)
    score = work.score_records

    def small(model, encoder, scoring, records, edits=None):
        if len(records) > 1:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return score(model, encoder, scoring, records, edits)

    monkeypatch.setattr(work, "score_records", small)
    together = evaluate(gpt2, method, batch_size=4)
    assert "does not fit into memory; it is halved" in caplog.text
    assert_alike(seconds_apart(together.after), seconds_apart(alone.after))


def test_an_interrupt_leaves_the_model_and_the_rows_that_were_written(gpt2, tmp_path):
    before = weight_hash(w_out(gpt2, LAYER))

    @dataclasses.dataclass(frozen=True)
    class Interrupted(RandomEdits):
        def compute(self, model, request, *, seed=0):
            if request.subject == "Cuba":
                raise KeyboardInterrupt
            return super().compute(model, request, seed=seed)

    out = tmp_path / "run.jsonl"
    with pytest.raises(KeyboardInterrupt):
        evaluate(gpt2, Interrupted(), out=out, batch_size=3)
    assert weight_hash(w_out(gpt2, LAYER)) == before
    assert len(out.read_text().splitlines()) == 1 + 3  # the first line, and one batch


@pytest.mark.parametrize("size", (0, -1))
def test_a_batch_has_a_record(gpt2, size):
    with pytest.raises(ValueError, match="batch_size must be 1 or more"):
        evaluate(gpt2, batch_size=size)


def real_records():
    one = RECORDS[0]
    return [
        dataclasses.replace(one, case_id=i, request=EditRequest("{} is in", name, "Paris", "Rome"))
        for i, name in enumerate(("The Space Needle", "Big Ben"))
    ]


@newest
@pytest.mark.real_model
def test_rows_of_gemma(gemma, gemma_moment):
    """On the real model, for a search of few steps."""
    config = dataclasses.replace(CONFIG, clamp=0.75)
    method = get_method("rome", second_moment=gemma_moment, prefixes=PREFIXES, config=config)
    alone = evaluate(gemma, method, real_records(), batch_size=1)
    together = evaluate(gemma, method, real_records(), batch_size=2)
    assert_alike(seconds_apart(together.after), seconds_apart(alone.after))


@newest
@pytest.mark.real_model
@pytest.mark.parametrize("name", ("ft", "mend"))
def test_rows_of_smollm2(smollm2, name):
    """Training of few steps, and an editor of random tensors."""
    options = {"steps": 3}
    if name == "mend":
        places = [Weight(kind, 28) for kind in ("W_in", "W_out")]
        options = {"editor": random_editor(smollm2, name, matrices=places)}
    method = get_method(name, **options)
    alone = evaluate(smollm2, method, real_records(), batch_size=1)
    together = evaluate(smollm2, method, real_records(), batch_size=2)
    assert_alike(seconds_apart(together.after), seconds_apart(alone.after))
    first, second = (row.scores["rewrite"] for row in alone.after.values())
    assert first != second != alone.before[1].scores["rewrite"]  # the control
