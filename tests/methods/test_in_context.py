"""In-context editing: a text before every prompt, on every benchmark, and no change of a weight."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from helpers.evaluation_setting import RECORDS, assert_alike, evaluate, seconds_apart
from helpers.matrices import same, weights

from transformer_lens_rome import EditRequest, applied, get_method, show_edit
from transformer_lens_rome.edits.export_lora import export_lora
from transformer_lens_rome.evaluation import (
    MquakeRecord,
    Reversal,
    RippleRecord,
    ZsreRecord,
    benchmarks,
    evaluate_benchmark,
    evaluate_zsre,
    get_benchmark,
)
from transformer_lens_rome.evaluation.ripple_records import Query, RippleTest
from transformer_lens_rome.prompts.continuations import greedy_continuations
from transformer_lens_rome.prompts.encoder import Encoder, pad
from transformer_lens_rome.prompts.scores import target_log_probs
from transformer_lens_rome.sequential import edit_in_sequence

FACT = EditRequest("{} is in", "The tower", "Paris", "Rome")
TEXT = "The tower is in Paris. "


def test_the_text_states_the_facts(gpt2):
    method = get_method("in-context")
    edit = method.compute(gpt2, FACT)
    assert edit.text == TEXT and edit.requests == (FACT,)
    both = method.compute_many(gpt2, [FACT, RECORDS[0].request])
    assert both.text == TEXT + "Space Needle is in Paris. " and len(both.requests) == 2
    assert both.digest != edit.digest == method.compute(gpt2, FACT, seed=3).digest
    imagine = get_method("in-context", template="Imagine that {}.").compute(gpt2, FACT)
    assert imagine.text == "Imagine that The tower is in Paris. "
    assert "The tower is in Paris" in edit._repr_html_()
    with pytest.raises(ValueError, match="needs exactly one '{}'"):
        get_method("in-context", template="Imagine that.")


def test_what_needs_weights_is_refused_and_says_what_to_do(gpt2, tmp_path):
    edit, before = get_method("in-context").compute(gpt2, FACT), weights(gpt2)
    refused = "changes no weight, .*put its .text before your prompts"
    for call in (
        lambda: applied(gpt2, edit).__enter__(),
        lambda: edit.save(tmp_path / "edit"),
        lambda: edit.save_pretrained(tmp_path / "folder"),
        lambda: export_lora(gpt2, edit, tmp_path / "lora"),
        lambda: edit.scale(0.5),
        lambda: -edit,
        edit.changes,
        edit.delta,
        lambda: show_edit(gpt2, edit, ["The tower is in"]),
        lambda: edit_in_sequence(
            gpt2, [FACT], "in-context", texts=["a b c d"], progress=False, folder=tmp_path / "s"
        ),
    ):
        with pytest.raises(ValueError, match=refused):
            call()
    assert same(weights(gpt2), before)
    assert {path.name for path in tmp_path.iterdir()} <= {"s"}


def test_counterfact_is_scored_with_the_fact_in_front(gpt2):
    found = evaluate(gpt2, "in-context", RECORDS[:3], attributes=True, counterfact_plus=True)
    assert not found.failed and found.name == "in-context"
    record = RECORDS[1]
    prompts = [TEXT + prompt for prompt in record.neighborhood_prompts]
    expected = target_log_probs(gpt2, prompts, ["Paris"] * len(prompts))
    for one, log_probs in zip(found.after[1].scores["neighborhood"], expected, strict=True):
        assert list(one.new) == pytest.approx(log_probs.tolist(), abs=1e-3)
    assert found.after[1].scores != found.before[1].scores
    alone = evaluate(gpt2, "in-context", [record], attributes=True, counterfact_plus=True)
    assert_alike(seconds_apart(alone.after)[1], seconds_apart(found.after)[1])
    encoder, kls = Encoder.of(gpt2), []
    for prompt in record.neighborhood_prompts:
        with torch.no_grad():
            rows = [encoder.row(one) for one in (TEXT + prompt, prompt)]
            edited, unedited = (gpt2(pad([row]))[0, -1].log_softmax(-1) for row in rows)
        kls.append((edited.exp() * (edited - unedited)).sum().item())
    assert list(found.after[1].kl["neighborhood"]) == pytest.approx(kls, rel=1e-2, abs=1e-4)


def test_facts_of_a_batch_stand_together(gpt2):
    found = evaluate(gpt2, "in-context", RECORDS[:2], together=2)
    text = "Space Needle is in Paris. The tower is in Paris. "
    (expected,) = target_log_probs(gpt2, [text + "The tower is in"], ["Paris"])
    assert list(found.after[1].scores["rewrite"][0].new) == pytest.approx(
        expected.tolist(), abs=1e-3
    )


@pytest.mark.slow
def test_generated_text_is_without_the_fact_and_as_long_as_without_it(gpt2):
    pytest.importorskip("nltk")
    found = evaluate(gpt2, "in-context", RECORDS[1:2], generate=True)
    before, after = (rows[1].generation.texts for rows in (found.before, found.after))
    assert after[0].startswith("The tower is in") and before != after
    assert not any(text.startswith(TEXT) for text in after)


def test_zsre_is_scored(gpt2):
    record = ZsreRecord(0, FACT, "Where is The tower?", "nq question: where is Cuba?", "Rome")
    found = evaluate_zsre(gpt2, [record], "in-context", progress=False)
    (expected,) = target_log_probs(gpt2, [TEXT + "Where is The tower?"], ["Paris"])
    assert list(found.after[0].scores["paraphrase"][0].answer) == pytest.approx(
        expected.tolist(), abs=1e-3
    )


def test_written_answers_follow_the_fact(gpt2, tmp_path):
    (tmp_path / "prompts.txt").write_text("Q: a? A: b")
    facts = (FACT, EditRequest("{} is", "Cuba", "old"))
    case = MquakeRecord(0, facts, ("Where is it?",), ("Paris",), ("Rome",))
    test = RippleTest((Query("Cuba is", (("zzz",),)),))
    record = RippleRecord(0, FACT, "X", {"Relation_Specificity": (test,)})
    options = {"few_shot": tmp_path / "prompts.txt", "n_tokens": 4}
    found = evaluate_benchmark(
        gpt2, "mquake", [case], "in-context", options=options, progress=False
    )
    asked = TEXT + "Cuba is old. Q: a? A: b\nQ: Where is it? A:"
    assert [found.after[0].scores["multihop"][0].text] == greedy_continuations(gpt2, [asked], 4)
    found = evaluate_benchmark(gpt2, "rippleedits", [record], "in-context", progress=False)
    (text,) = found.after[0].scores["Relation_Specificity"][0].texts
    n_tokens = len(TEXT + "Cuba is") + 30 - len(Encoder.of(gpt2).ids(TEXT + "Cuba is"))
    assert [text] == greedy_continuations(gpt2, [TEXT + "Cuba is"], n_tokens)


def test_both_directions_may_be_stated(gpt2, tmp_path, monkeypatch):
    every = dataclasses.replace(get_benchmark("reversal"), counts=None)
    monkeypatch.setitem(benchmarks._REGISTRY, "reversal", every)
    pairs = [{"subject": s, "object": o} for s, o in (("France", "Paris"), ("Italy", "Rome"))]
    (tmp_path / "a.json").write_text(json.dumps({"name": "country capital city", "samples": pairs}))
    records = Reversal.load(tmp_path)
    found = evaluate_benchmark(
        gpt2, "reversal", records, "in-context", options={"both": True}, progress=False
    )
    text = "The capital of France is Rome. Rome is the capital of France. Rome is the capital of"
    (expected,) = target_log_probs(gpt2, [text], ["France"])
    assert list(found.after[0].scores["reverse"][0].answer) == pytest.approx(
        expected.tolist(), abs=1e-3
    )
