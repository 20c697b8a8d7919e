"""MQuAKE: cases of several facts, few-shot prompts, and answers in the model's own words."""

from __future__ import annotations

import copy
import json

import pytest
from helpers import mass_setting
from helpers.evaluation_setting import RandomEdits, assert_alike, seconds_apart

from transformer_lens_rome.evaluation import (
    AnswerScore,
    HopScore,
    Mquake,
    Results,
    evaluate_benchmark,
)
from transformer_lens_rome.evaluation.mquake import MquakeScoring, is_answer, mquake_metrics
from transformer_lens_rome.prompts.continuations import greedy_continuations
from transformer_lens_rome.prompts.scores import target_log_probs

EXAMPLES = "Q: Where is Rome? A: Italy\nQ: Where is Paris? A: France"
THOUGHTS = "Question: Where is Rome?\nThoughts: Rome is old.\nAnswer: Italy"


def rewrite(prompt, subject, new, true):
    targets = {"target_new": {"str": new, "id": "Q1"}, "target_true": {"str": true, "id": "Q2"}}
    return {"prompt": prompt, "subject": subject} | targets


def item(case_id=7, **changed):
    known = {
        "case_id": case_id,
        "requested_rewrite": [
            rewrite("{} was founded by", "Apple", "Ida", "Jobs"),
            rewrite("{} is a citizen of", "Ida", "Italy", "Norway"),
        ],
        "questions": ["Where is the founder of Apple from?", "Apple's founder is from where?"],
        "answer": "America",
        "answer_alias": ["USA", "U.S.A."],
        "new_answer": "Italy",
        "new_answer_alias": [],
    }
    return known | changed


@pytest.fixture
def path(tmp_path):
    def write(*items):
        path = tmp_path / "mquake.json"
        path.write_text(json.dumps(items))
        return path

    return write


@pytest.fixture
def few_shot(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text(EXAMPLES + "\n")
    return path


def test_a_case_has_several_facts(path):
    (record,) = Mquake.load(path(item()))
    assert [one.text for one in record.requests] == ["Apple was founded by", "Ida is a citizen of"]
    assert record.request is record.requests[0] and record.case_id == 7
    assert record.answers == ("Italy",) and record.old_answers == ("America", "USA", "U.S.A.")
    assert len(Mquake.load(path(item(1), item(2)), limit=1)) == 1


NO_HOLE = [rewrite("Apple was founded by", "Apple", "Ida", "Jobs")]
NO_SUBJECT = [rewrite("{} was founded by", "", "Ida", "Jobs")]
NO_TARGET = [{"prompt": "{} is", "subject": "a", "target_new": {"str": "b"}}]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"new_answer_alias": None}, "new_answer_alias: it is None"),
        ({"answer_alias": ["a", ""]}, "answer_alias: not all are texts"),
        ({"new_answer": " "}, "new_answer: it is empty"),
        ({"answer": 3}, "answer: it is 3"),
        ({"questions": []}, "questions: it is"),
        ({"questions": ["a", " "]}, "questions: it is"),
        ({"requested_rewrite": []}, "requested_rewrite: it is empty"),
        ({"requested_rewrite": [3]}, r"requested_rewrite\[0\]: it is a int"),
        ({"requested_rewrite": NO_HOLE}, r"requested_rewrite\[0\]: the prompt needs exactly one"),
        ({"requested_rewrite": NO_SUBJECT}, r"requested_rewrite\[0\]: the subject is empty"),
        ({"requested_rewrite": NO_TARGET}, r"requested_rewrite\[0\].target_true: it is missing"),
        (
            {"requested_rewrite": 2 * item()["requested_rewrite"]},
            "requested_rewrite: .*two of its prompts",
        ),
        ({"case_id": "7"}, "case_id: '7'"),
        ({"case_id": 8}, "case_id: 8"),
    ],
)
def test_an_invalid_case_is_named(path, changed, words):
    items = item(8), copy.deepcopy(item(**changed))
    with pytest.raises(ValueError, match=f"record 1: {words}"):
        Mquake.load(path(*items), strict=True)
    found = Mquake.load(path(*items))
    assert [record.case_id for record in found] == [8] and len(found.skipped) == 1
    missing = {name: value for name, value in item().items() if name != "new_answer_alias"}
    with pytest.raises(ValueError, match="new_answer_alias: it is missing"):
        Mquake.load(path(missing))


def test_few_shot_prompts_are_needed_and_have_a_form(tmp_path):
    with pytest.raises(ValueError, match="pass few_shot=, the path of the published multihop"):
        MquakeScoring()
    for content, words in ((b"", "begins with ''"), (b"Hello", "'Hello'"), (b"\xff", "not UTF-8")):
        (tmp_path / "a.txt").write_bytes(content)
        with pytest.raises(ValueError, match=words):
            MquakeScoring(tmp_path / "a.txt")
    with pytest.raises(FileNotFoundError):
        MquakeScoring(tmp_path / "none.txt")


def test_answers_are_the_first_line():
    for text in (" Italy", " Italy.\nQ: Where", "Italy\n", "  Italy . ".replace(" .", ".")):
        assert is_answer(text, ("Italy",)), text
    assert is_answer(" U.S.A.", ("U.S.A.",)) and is_answer(" U.S.A", ("U.S.A",))
    for text in (" Italy and France", "italy", "\nItaly", "", " In Italy"):
        assert not is_answer(text, ("Italy",)), text


def test_thoughts_end_in_an_answer(path, tmp_path):
    (tmp_path / "cot.txt").write_text(THOUGHTS)
    scoring, (record,) = MquakeScoring(tmp_path / "cot.txt"), Mquake.load(path(item()))
    first = scoring.written(record, True)[0]
    assert first.prompt == f"{THOUGHTS}\n\nQuestion: {record.questions[0]}\nThoughts:"
    assert first.n_tokens == 128
    texts = [" It is so.\nAnswer: Italy\n\nQuestion:", " Italy", " x\nAnswer: USA"]
    found = scoring.judged(record, True, texts)["multihop"]
    assert [(one.new, one.old) for one in found] == [(True, False), (False, False), (False, True)]


def test_metrics_by_hand():
    scores = {
        "rewrite": [AnswerScore([-1.0], [True]), AnswerScore([-1.0] * 2, [True, False])],
        "multihop": [HopScore("a", False, True), HopScore("b", True, False)],
    }
    wanted = {"EA": 0.5, "AE": 0.0, "MH": 1.0, "MQ": 0.5, "OA": 1.0}
    assert mquake_metrics(scores, scores) == wanted
    scores["multihop"] = [HopScore("a", False, False)] * 3
    assert mquake_metrics(scores, {})["MH"] == 0.0


@pytest.mark.parametrize("make", [mass_setting.method, lambda model: RandomEdits()])
def test_all_facts_are_on_the_model_when_it_is_asked(gpt2, path, few_shot, tmp_path, make):
    from transformer_lens_rome import applied
    from transformer_lens_rome.evaluation.several import edit_of

    records, method = Mquake.load(path(item(), item(8))), make(gpt2)
    out = tmp_path / "run" / "method.jsonl"
    run = {"options": {"few_shot": few_shot, "n_tokens": 4}, "progress": False}
    found = evaluate_benchmark(gpt2, "mquake", records, method, out=out, **run)
    assert not found.failed
    asked = [f"{EXAMPLES}\nQ: {question} A:" for question in records[0].questions]
    prompts = [one.text for one in records[0].requests], ["Ida", "Italy"]
    texts, log_probs = greedy_continuations(gpt2, asked, 4), target_log_probs(gpt2, *prompts)
    check(found.before[7], texts, log_probs)
    with applied(gpt2, edit_of(method, gpt2, records[0].requests)):
        texts, log_probs = greedy_continuations(gpt2, asked, 4), target_log_probs(gpt2, *prompts)
    check(found.after[7], texts, log_probs)
    assert found.after[7].scores != found.before[7].scores
    loaded = Results.load(out)
    assert seconds_apart(loaded.after) == seconds_apart(found.after)
    assert "| EA | AE | MH | MQ | OA |" in loaded.table() and len(loaded.setting["few_shot"]) == 64
    together = evaluate_benchmark(gpt2, "mquake", records, method, batch_size=2, **run)
    assert_alike(seconds_apart(together.after), seconds_apart(found.after))
    few_shot.write_text(EXAMPLES + "!")
    with pytest.raises(ValueError, match="a run with another few_shot"):
        evaluate_benchmark(gpt2, "mquake", records, method, out=out, **run)


def check(row, texts, log_probs):
    assert [one.text for one in row.scores["multihop"]] == texts
    for one, expected in zip(row.scores["rewrite"], log_probs, strict=True):
        assert list(one.answer) == pytest.approx(expected.tolist(), abs=1e-3)
