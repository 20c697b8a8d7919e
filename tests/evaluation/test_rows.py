"""Rows of runs: what is written is what was read, and what no run writes is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from transformer_lens_rome.evaluation import GeneratedText, PromptScore, RecordRow
from transformer_lens_rome.evaluation.rows import row_reader
from transformer_lens_rome.files.fields import as_read

RESULTS = Path(__file__).parents[2] / "examples" / "results"
RUNS = sorted(
    path for folder in ("counterfact", "settings") for path in RESULTS.glob(f"{folder}/**/*.jsonl")
)
PROMPT = PromptScore([-1.0, -2.0], [-3.0], [True, False], [True])
SCORES = {"rewrite": [PROMPT], "paraphrase": [PROMPT] * 2, "neighborhood": [PROMPT]}
ROW = RecordRow(
    7,
    "r7",
    SCORES,
    GeneratedText(("a b",), 5.5),
    seconds=2.0,
    edit_seconds=1.5,
    health={"p_after": None, "warnings": []},
)
READ = row_reader({"setting": {"protocol": "counterfact"}})


@pytest.mark.parametrize("path", RUNS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_each_committed_line_is_written_again_to_the_letter(path):
    first, *lines = path.read_text(encoding="utf-8").splitlines()
    read = row_reader(json.loads(first))
    assert lines
    for line in lines:
        assert json.dumps(read(json.loads(line)).to_json(), ensure_ascii=False) == line


def test_there_are_committed_runs():
    assert len(RUNS) >= 18


def test_a_row_has_no_field_for_what_is_not_known():
    saved = as_read(ROW.to_json())
    assert list(saved) == [
        *("case_id", "record", "scores", "generation", "seconds", "edit_seconds", "health"),
    ]
    assert saved["scores"]["rewrite"] == [[[-1.0, -2.0], [-3.0], [True, False], [True]]]
    assert saved["generation"] == {"texts": ["a b"], "GE": 5.5}  # no RS
    assert saved["health"] == {"p_after": None, "warnings": []}  # as the health has it
    assert READ(saved) == ROW
    failed = RecordRow(7, "r7", failed="ValueError: no")
    assert failed.to_json() == {"case_id": 7, "record": "r7", "failed": "ValueError: no"}


def prompts(*change):
    return {"scores": {kind: [list(change)] for kind in SCORES}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"case_id": True}, "case_id should be int"),
        ({"record": None}, "record should be str"),
        ({"failed": "and scores"}, "either scores or the reason"),
        (
            {"scores": {"paraphrase": [[[-1.0], [-1.0], [True], [True]]]}},
            "rewrite are missing",
        ),
        ({"scores": {"rewrite": 3}}, "not lists of prompts"),
        (prompts([-1.0], [True]), "need new, true, new_correct, true_correct"),
        (prompts([-1.0], [-1.0], [1], [True]), "a list of values for each target"),
        (prompts([0.5], [-1.0], [True], [True]), "not log-probabilities"),
        (prompts([float("nan")], [-1.0], [True], [True]), "not log-probabilities"),
        (prompts(["-1"], [-1.0], [True], [True]), "not log-probabilities"),
        (prompts([-1.0], [-1.0], [True, True], [True]), "differ in length"),
        (prompts([], [-1.0], [], [True]), "differ in length or are empty"),
        ({"generation": {"texts": ["a"], "GE": 65.0}}, "GE is 65"),
        ({"generation": {"texts": ["a"], "GE": 1.0, "RS": -0.1}}, "RS is -0.1"),
        ({"generation": ["a"]}, "generation should be"),
        ({"seconds": -1.0}, "seconds is -1.0"),
        ({"seconds": None}, "seconds is missing"),
        ({"health": [1]}, "health should be"),
        ({"minutes": 1.0}, "has no field minutes"),
    ],
)
def test_what_no_run_writes_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        READ(as_read(ROW.to_json()) | change)


def test_the_scores_of_another_data_set_are_refused():
    read = row_reader({"setting": {"protocol": "zsre"}})
    with pytest.raises(ValueError, match="need answer, correct"):
        read(as_read(ROW.to_json()))
    with pytest.raises(ValueError, match="protocol is 'other'"):
        row_reader({"setting": {"protocol": "other"}})
