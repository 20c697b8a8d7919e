"""Reversal: LRE's pairs, the metrics by hand, and edits of both directions."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from helpers import mass_setting
from helpers.evaluation_setting import RandomEdits, assert_alike, seconds_apart

from transformer_lens_rome.evaluation import (
    AnswerScore,
    Results,
    Reversal,
    benchmarks,
    evaluate_reversal,
    get_benchmark,
)
from transformer_lens_rome.evaluation.reversal import RELATIONS, is_known, reversal_metrics
from transformer_lens_rome.prompts.scores import target_log_probs

CAPITALS = [("France", "Paris"), ("Italy", "Rome "), ("Germany", "Berlin"), ("England", "London")]


def relation(*pairs, name="country capital city"):
    return {"name": name, "samples": [{"subject": s, "object": o} for s, o in pairs]}


@pytest.fixture
def folder(tmp_path):
    def write(*contents):
        for i, content in enumerate(contents):
            (tmp_path / f"{i}.json").write_text(json.dumps(content))
        return tmp_path

    return write


@pytest.fixture
def all_count(monkeypatch):
    """A tiny random model knows nothing; here every record counts."""
    every = dataclasses.replace(get_benchmark("reversal"), counts=lambda scores: True)
    monkeypatch.setitem(benchmarks._REGISTRY, "reversal", every)


def test_pairs_become_records_in_turns(folder):
    people = relation(("Ida", "Bo"), ("Kai", "Lea"), name="person father")
    other = relation(("a", "b"), name="person occupation")
    found = Reversal.load(folder(relation(*CAPITALS, ("Gaul", "Paris")), people, other))
    assert [one.request.subject for one in found] == ["Italy", "Ida", "Germany", "Kai", "England"]
    assert [one.case_id for one in found] == [0, 1, 2, 3, 4] and len(found.digest) == 64
    assert found.skipped == (
        "country capital city: France - Paris is not one-to-one",
        "country capital city: Gaul - Paris is not one-to-one",
    )
    italy = found[0]
    assert italy.request.text == "The capital of Italy is"
    assert (italy.request.target_new, italy.request.target_true) == ("Berlin", "Rome")
    assert italy.subjects == ("Italy", "Germany", "England")
    reverse = italy.reverse_request
    assert (reverse.text, reverse.target_new) == ("Berlin is the capital of", "Italy")
    assert reverse.target_true == "Germany"
    assert len(Reversal.load(folder(relation(*CAPITALS)), limit=2)) == 2


def test_every_template_has_one_hole():
    for templates in RELATIONS.values():
        assert [one.count("{}") for one in templates] == [1, 1]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1], "contains a list, not a relation"),
        ({"name": "person father"}, "not a relation of LRE .samples: it is missing"),
        (relation(name="person occupation"), "no pairs of LRE's relations"),
        (relation(("a", "b")), "no pairs of LRE's relations"),  # no other object to write
    ],
)
def test_other_files_are_refused(folder, content, words):
    with pytest.raises(ValueError, match=words):
        Reversal.load(folder(content))


@pytest.mark.parametrize(
    ("sample", "words"),
    [
        ({"subject": "Peru"}, "sample 4: object: it is missing"),
        ({"subject": " ", "object": "Lima"}, "sample 4: subject: it is empty"),
        ({"subject": "{}", "object": "Lima"}, "sample 4: .*contains '{}'"),
        ({"subject": "Peru", "object": "a {} b"}, "sample 4: .*contains '{}'"),
        ({"subject": "Brazil", "object": "Bras\\u00edlia"}, "the code of a character"),
        ("Peru", "sample 4: it is a str"),
    ],
)
def test_an_invalid_pair_is_named(folder, sample, words):
    content = relation(*CAPITALS)
    content["samples"].append(sample)
    with pytest.raises(ValueError, match=words):
        Reversal.load(folder(content), strict=True)
    found = Reversal.load(folder(content))
    assert len(found) == 4 and len(found.skipped) == 1


def scores(*reverse, new=True, forward=True, backward=True):
    return {
        "rewrite": [AnswerScore([-1.0], [new])],
        "forward": [AnswerScore([-1.0, -1.0], [True, forward])],
        "backward": [AnswerScore([-1.0], [backward])],
        "reverse": [AnswerScore(list(one), [False] * len(one)) for one in reverse],
    }


def test_metrics_by_hand():
    before = scores([-5.0, -3.0], [-1.0], [-6.0])
    after = scores([-1.0, -2.0], [-2.0], [-1.0, -1.0], new=True, backward=False)
    found = reversal_metrics(after, before)
    wanted = {"EA": 1.0, "p": math.exp(-1.5), "log p": -1.5, "rank": 2.0, "first": 0.0, "BA": 0.0}
    assert found == pytest.approx(wanted | {"rise": 2.5})
    assert "rise" not in reversal_metrics(before, before)
    assert reversal_metrics(scores([-1.0], [-2.0]), {})["first"] == 1.0
    assert is_known(before) and is_known(scores([-1.0], new=False))
    assert not is_known(scores([-1.0], forward=False)) and not is_known(after)


def test_the_reverse_question_is_scored_before_and_after(gpt2, folder, all_count, tmp_path):
    records = Reversal.load(folder(relation(*CAPITALS)), limit=2)
    path = tmp_path / "runs" / "random.jsonl"
    found = evaluate_reversal(gpt2, records, RandomEdits(), out=path, progress=False)
    asked = [f"{records[0].request.target_new} is the capital of"] * 4
    expected = target_log_probs(gpt2, asked, list(records[0].subjects))
    for one, log_probs in zip(found.before[0].scores["reverse"], expected, strict=True):
        assert list(one.answer) == pytest.approx(log_probs.tolist(), abs=1e-4)
    rises = [one["rise"] for one in found.metrics().values()]
    assert any(abs(rise) > 0.01 for rise in rises)
    assert found.scores()["rise"].mean == pytest.approx(sum(rises) / 2)  # nats, not percent
    assert seconds_apart(Results.load(path).after) == seconds_apart(found.after)
    table = found.table()
    assert "| method | records | failed | EA | p | log p | rise | rank | first | BA |" in table
    with pytest.raises(ValueError, match="a run with another both"):
        evaluate_reversal(gpt2, records, RandomEdits(), both=True, out=path, progress=False)


def test_what_is_not_known_does_not_count(gpt2, folder):
    found = evaluate_reversal(
        gpt2, Reversal.load(folder(relation(*CAPITALS))), RandomEdits(), progress=False
    )
    assert len(found.unmet) == 4 and "| RandomEdits | 0 | 0 |" in found.table()
    assert "0 of 4 records count: those for which the unedited model knows" in found.table()
    assert not any("reverse" in row.scores for row in found.before.values())  # nothing to compare


@pytest.mark.parametrize("make", [mass_setting.method, lambda model: RandomEdits()])
def test_both_directions_are_written(gpt2, folder, all_count, make, monkeypatch):
    records, written = Reversal.load(folder(relation(*CAPITALS)), limit=1), []
    from transformer_lens_rome.evaluation import work

    made = work.edit_of
    monkeypatch.setattr(
        work, "edit_of", lambda *args, **kw: written.append(made(*args, **kw)) or written[-1]
    )
    both = evaluate_reversal(gpt2, records, make(gpt2), both=True, progress=False)
    assert written[0].requests == (records[0].request, records[0].reverse_request)
    one = evaluate_reversal(gpt2, records, make(gpt2), progress=False)
    assert not both.failed and both.setting["both"] and "both" not in one.setting
    assert both.metrics()[0]["log p"] != pytest.approx(one.metrics()[0]["log p"], abs=1e-3)
    assert_alike(seconds_apart(both.before), seconds_apart(one.before))
