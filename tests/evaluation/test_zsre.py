"""zsRE: the published file's records, and shares of correct tokens."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.evaluation_setting import RandomEdits

from transformer_lens_rome.evaluation import Results, Zsre, evaluate_zsre
from transformer_lens_rome.evaluation.metrics import AnswerScore, score, zsre_metrics
from transformer_lens_rome.prompts.encoder import Encoder


def item(**changed):
    known = {
        "subject": "The tower",
        "src": "Where is The tower in Rome?",
        "pred": "x",
        "rephrase": "In what city is The tower?",
        "alt": "y",
        "answers": ["The best of Paris", "Paris"],
        "loc": "nq question: who is the best in Cuba",
        "loc_ans": "the old man",
        "cond": "a >> b || c",
    }
    return known | changed


@pytest.fixture
def path(tmp_path):
    def write(*items):
        path = tmp_path / "zsre.json"
        path.write_text(json.dumps(items))
        return path

    return write


def test_records_are_those_of_the_published_layout(path):
    found = Zsre.load(path(item(), item(src="The tower of The tower?"), item(subject="Rome")))
    assert [record.case_id for record in found] == [0, 2] and len(found) == 2
    assert "occurs 2 times" in found.skipped[0] and found.skipped[0].startswith("record 1: subject")
    first = found[0]
    assert first.request.text == item()["src"] and first.request.target_new == "The best of Paris"
    assert first.locality_prompt == "nq question: who is the best in Cuba?"
    assert found[1].request.prompt == "Where is The tower in {}?"
    assert [record.case_id for record in Zsre.load(path(item(), item()), limit=1)] == [0]


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"answers": []}, "record 0: answers"),
        ({"loc": "who"}, "record 0: loc: it begins"),
        ({"rephrase": 3}, "record 0: rephrase: it is 3"),
        ({"subject": "Berlin"}, "occurs 0 times"),
        ({"src": "Where {} is The tower?"}, "record 0: request"),
    ],
)
def test_what_cannot_be_used_is_named(path, changed, complaint):
    with pytest.raises(ValueError, match=complaint):
        Zsre.load(path(item(**changed)))
    with pytest.raises(ValueError, match=complaint):
        Zsre.load(path(item(**changed), item()), strict=True)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "a").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        Zsre.load(tmp_path / "a")
    (tmp_path / "a").write_text("{}")
    with pytest.raises(ValueError, match="not a list"):
        Zsre.load(tmp_path / "a")


def test_metrics_by_hand():
    scores = {
        "rewrite": [AnswerScore([-1, -1], [True, False])],
        "paraphrase": [AnswerScore([-1, -1], [False, False])],
        "neighborhood": [AnswerScore([-1] * 4, [True, True, True, False])],
    }
    assert zsre_metrics(scores) == {"EA": 0.5, "PA": 0.0, "NA": 0.75}


def test_an_evaluation_counts_the_models_top_tokens(gpt2, path, tmp_path):
    records = Zsre.load(path(item(), item(subject="Rome", loc_ans="Cuba")))
    out = tmp_path / "run" / "random.jsonl"
    found = evaluate_zsre(gpt2, records, RandomEdits(), out=out, progress=False)
    encoder = Encoder.of(gpt2)
    row = encoder.row("nq question: who is the best in Cuba?", target="the old man")
    with torch.no_grad():
        best = gpt2(torch.tensor([row.ids]))[0].argmax(-1)
    expected = [int(best[p - 1]) == row.ids[p] for p in row.target]
    assert found.before[0].scores["neighborhood"][0].correct == expected
    scores = found.scores()
    parts = [scores[name].mean for name in ("EA", "PA", "NA")]
    assert scores["S"].mean == pytest.approx(score(*parts)) and scores["S"].n == 2
    assert "zsRE" in found.table() and "ES" not in found.table().split("\n")[0]
    loaded = Results.load(out)
    assert loaded.scores() == scores and loaded.protocol == "zsre"
