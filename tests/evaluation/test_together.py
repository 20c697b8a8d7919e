"""Many records written by one edit, then each scored with all of them on the model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
from conftest import make_model
from helpers.evaluation_setting import RECORDS, assert_alike, evaluate, record, seconds_apart
from helpers.mass_setting import method
from helpers.matrices import same, weights
from helpers.rome_setting import LAYER, factored_edit

from transformer_lens_rome import EditRequest, applied, evaluate_counterfact, get_method
from transformer_lens_rome.evaluation import Results, evaluate_zsre
from transformer_lens_rome.evaluation.counterfact import CounterFactScoring
from transformer_lens_rome.evaluation.scoring import score_records
from transformer_lens_rome.evaluation.zsre import ZsreRecord
from transformer_lens_rome.model.adapter import Weight
from transformer_lens_rome.prompts.encoder import Encoder

MANY = [*RECORDS, record(9, "A river", "Oslo", "Rome")]
TOO_LONG = dataclasses.replace(
    record(11, "Cuba"), request=EditRequest("word " * 200 + "{} is in", "Rome", "Oslo", "Paris")
)


@pytest.fixture(params=("gpt2", "gemma3"))
def model(request, model_class, tokenizer_of):
    return make_model(model_class, request.param, tokenizer_of(request.param))


def scores_with(model, edit, records, **options):
    """The scores of records with an edit on the model, by the public parts."""
    with applied(model, edit):
        return score_records(model, Encoder.of(model), CounterFactScoring(**options), records)


@dataclass(frozen=True)
class Drawn:
    """Random edits of all facts, which may leave some out, by the plain protocol."""

    name: str = "drawn"
    without: tuple[str, ...] = ()

    def compute_many(self, model, requests, *, seed=0):
        kept = tuple(one for one in requests if one.subject not in self.without)
        if not kept:
            raise ValueError("nothing is left")
        edit = factored_edit(model, [Weight("W_out", LAYER)], seed=len(requests), strength=0.3)
        return dataclasses.replace(edit, request=kept[0], requests=kept)


def test_every_record_is_scored_with_all_of_its_batch(model, tmp_path):
    one, before = method(model), weights(model)
    results = evaluate(model, one, MANY, together=3, out=tmp_path / "run.jsonl", attributes=True)
    assert same(weights(model), before) and not results.failed
    for some in (MANY[:3], MANY[3:]):
        edit = one.compute_many(model, [each.request for each in some])
        for each, scores in zip(some, scores_with(model, edit, some, attributes=True)):
            assert_alike(seconds_apart(results.after)[each.case_id]["scores"], plain(scores))
        facts = edit.health.facts
        for each, fact in zip(some, facts, strict=True):
            health = results.after[each.case_id].health
            assert health["p_after"] == pytest.approx(fact.p_after, rel=1e-3)
            assert health["s"] == pytest.approx(list(fact.s))
    alone = evaluate(model, one, MANY, attributes=True)
    rewrite = [row.scores["rewrite"] for row in alone.after.values()]
    assert rewrite != [row.scores["rewrite"] for row in results.after.values()]  # control
    assert_alike(seconds_apart(alone.before), seconds_apart(results.before))


def plain(scores):
    return {kind: [list(map(list, prompt)) for prompt in some] for kind, some in scores.items()}


def test_the_protocol_is_in_the_table_and_in_the_file(model, tmp_path):
    results = evaluate(model, method(model), MANY, together=3, out=tmp_path / "run.jsonl")
    loaded = Results.load(tmp_path / "run.jsonl")
    assert loaded.after == results.after and loaded.setting["together"] == 3
    single = evaluate(model, Drawn(), MANY, together=5)
    for style in ("markdown", "latex"):
        table = loaded.table(single, style=style)
        assert "Facts written by one edit (memit: 3, drawn: 5); each record was scored" in table
    assert "written by one edit" not in evaluate(model, method(model), MANY[:2]).table()


def test_a_name_of_a_file_is_no_markup(gpt2):
    table = evaluate(gpt2, Drawn(name="<b>|x\n# y"), MANY, together=2).table()
    assert "(&lt;b&gt;\\|x # y: 2)" in table and "<b>" not in table


@pytest.mark.slow
def test_a_stopped_run_goes_on_from_whole_batches(gpt2, tmp_path):
    path = tmp_path / "run.jsonl"
    whole = evaluate(gpt2, method(gpt2), MANY, together=2, out=path)
    lines = path.read_text().splitlines(keepends=True)
    for kept in (1, 2, 4, 6):  # the head, and none to all of the five rows
        path.write_text("".join(lines[:kept]))
        again = evaluate(gpt2, method(gpt2), MANY, together=2, out=path)
        assert_alike(seconds_apart(again.after), seconds_apart(whole.after))
        assert len(path.read_text().splitlines()) == 6
    for other in ({"together": 3}, {"records": MANY[:4]}):
        known = {"together": 2, "records": MANY} | other
        with pytest.raises(ValueError, match="a run with another (together|records)"):
            evaluate(gpt2, method(gpt2), out=path, **known)
    with pytest.raises(ValueError, match="a run with another .*together"):
        evaluate(gpt2, method(gpt2), MANY, out=path)


@pytest.mark.slow
def test_a_batch_without_an_edit_fails_and_the_others_go_on(gpt2):
    before = weights(gpt2)
    results = evaluate(gpt2, method(gpt2), [*MANY[:2], TOO_LONG, *MANY[2:]], together=2)
    assert sorted(results.failed) == [MANY[2].case_id, TOO_LONG.case_id]
    assert "1 of 2 requests failed" in results.failed[TOO_LONG.case_id]
    assert same(weights(gpt2), before)
    kept = method(gpt2, skip_failed=True)
    results = evaluate(gpt2, kept, [*MANY[:2], TOO_LONG, *MANY[2:]], together=3)
    assert list(results.failed) == [TOO_LONG.case_id]
    twice = [MANY[0], dataclasses.replace(MANY[0], case_id=20), *MANY[1:]]
    results = evaluate(gpt2, method(gpt2), twice, together=2)
    assert sorted(results.failed) == [MANY[0].case_id, 20]
    assert "are the same" in results.failed[20]


def test_an_edit_that_leaves_out_a_record_is_said(gpt2):
    drawn = Drawn(without=(MANY[1].request.subject,))
    results = evaluate(gpt2, drawn, MANY, together=5)
    assert results.failed == {1: "ValueError: the edit of its batch leaves it out"}
    edit = drawn.compute_many(gpt2, [each.request for each in MANY])
    found = seconds_apart(results.after)
    scores = scores_with(gpt2, edit, MANY)
    for each, expected in zip(MANY, scores, strict=True):
        if each.case_id not in results.failed:
            assert_alike(found[each.case_id]["scores"], plain(expected))
    with_all = Drawn(without=tuple(each.request.subject for each in MANY))
    assert len(evaluate(gpt2, with_all, MANY, together=5).failed) == 5


@pytest.mark.slow
def test_text_and_divergences_are_those_of_the_edited_model(gpt2):
    pytest.importorskip("nltk")
    options = {"counterfact_plus": True, "generate": True}
    results = evaluate(gpt2, Drawn(), MANY[:3], together=3, **options)
    edit = Drawn().compute_many(gpt2, [each.request for each in MANY[:3]])
    alone = evaluate(gpt2, One(edit), MANY[:1], **options)
    case = MANY[0].case_id
    assert results.after[case].generation == alone.after[case].generation
    for kind, values in alone.after[case].kl.items():
        assert results.after[case].kl[kind] == pytest.approx(values, rel=1e-3, abs=1e-5)
        assert max(values) > 1e-3


@dataclass(frozen=True)
class One:
    """A method that always gives one edit."""

    edit: object
    name: str = "one"
    options: dict = dataclasses.field(default_factory=dict)

    def compute(self, model, request, *, seed=0):
        return self.edit


def test_zsre_is_scored_together_too(gpt2):
    asked = ("Where is the tower?", "Where is Cuba?", "Rome")
    records = [ZsreRecord(i, one.request, *asked) for i, one in enumerate(MANY[:3])]
    results = evaluate_zsre(gpt2, records, method(gpt2), together=2, progress=False)
    assert not results.failed and "memit: 2" in results.table()


def test_what_cannot_be_written_together_is_refused(gpt2):
    with pytest.raises(ValueError, match="together=2 needs a method that writes many facts.*'ft'"):
        evaluate(gpt2, get_method("ft"), MANY, together=2)
    with pytest.raises(ValueError, match="together must be 1 or more, got 0"):
        evaluate(gpt2, method(gpt2), MANY, together=0)
    with pytest.raises(ValueError, match="needs a method that writes many facts"):
        evaluate_counterfact(gpt2, MANY, None, together=2, progress=False)
