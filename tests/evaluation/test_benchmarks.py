"""The registry of benchmarks, and records that do not count."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
from helpers.evaluation_setting import RECORDS, RandomEdits, assert_alike, seconds_apart

from transformer_lens_rome.evaluation import (
    AnswerScore,
    Benchmark,
    RecordRow,
    Results,
    Scoring,
    benchmark_names,
    benchmarks,
    evaluate_benchmark,
    evaluate_counterfact,
    get_benchmark,
    register_benchmark,
)
from transformer_lens_rome.evaluation.work import ScoreUnedited


class Recall(Scoring):
    """Scores the new target after the prompt."""

    protocol = "recall"

    def asked(self, record):
        return {"rewrite": [(record.request.text, (record.request.target_new,))]}


def recall(counts):
    return Benchmark(
        name="recall",
        load=lambda path, **options: RECORDS,
        scoring=Recall,
        kinds={"rewrite": AnswerScore},
        metrics=lambda scores, before: {"L": scores["rewrite"][0].answer[0]},
        columns=("L",),
        plain=("L",),
        legend="L: a log-probability in nats.",
        counts=counts,
        condition="the first token of the new target is probable",
    )


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(benchmarks, "_REGISTRY", dict(benchmarks._REGISTRY))


def run(model, benchmark, records=RECORDS, method=RandomEdits(), **options):
    return evaluate_benchmark(model, benchmark, records, method, progress=False, **options)


def test_names_are_unique_and_known(registry):
    assert {"counterfact", "zsre"} <= set(benchmark_names())
    register_benchmark(get_benchmark("zsre"))  # the same one, again
    with pytest.raises(ValueError, match="'zsre' is registered already"):
        register_benchmark(dataclasses.replace(get_benchmark("zsre"), legend=""))
    with pytest.raises(ValueError, match="no benchmark 'other'; there are .*'counterfact'"):
        get_benchmark("other")
    with pytest.raises(ValueError, match="'x' has no kind 'rewrite'"):
        register_benchmark(dataclasses.replace(get_benchmark("zsre"), name="x", kinds={}))


def test_the_registered_counterfact_is_evaluate_counterfact(gpt2):
    found = run(gpt2, "counterfact", RECORDS[:2], options={"attributes": True})
    expected = evaluate_counterfact(
        gpt2, RECORDS[:2], RandomEdits(), attributes=True, progress=False
    )
    assert_alike(seconds_apart(found.after), seconds_apart(expected.after))
    assert found.table() == expected.table()
    with pytest.raises(ValueError, match="'counterfact' has no option few_shot"):
        run(gpt2, "counterfact", options={"few_shot": "a"})


def test_records_that_do_not_count_are_not_edited_but_counted(gpt2, registry, tmp_path):
    register_benchmark(recall(None))
    before = run(gpt2, "recall", method=None).before
    values = {case: row.scores["rewrite"][0].answer[0] for case, row in before.items()}
    first = sorted(values.values())
    middle = (first[1] + first[2]) / 2
    benchmarks._REGISTRY["recall"] = recall(lambda scores: scores["rewrite"][0].answer[0] > middle)
    path = tmp_path / "run.jsonl"
    others = [one.request.subject for one in RECORDS if values[one.case_id] <= middle]
    broken = RandomEdits(broken=tuple(others))  # an edit of those would fail
    found = run(gpt2, "recall", method=broken, out=path)
    assert not found.failed and found.unmet == {c for c, v in values.items() if v <= middle}
    table = found.table()
    assert "| RandomEdits | 2 | 0 |" in table and "| unedited | 2 | 0 |" in table
    assert "2 of 4 records count: those for which the first token" in table
    value = found.scores(edited=False)["L"]
    assert value.mean == pytest.approx((first[2] + first[3]) / 2) and value.n == 2  # not percent
    assert seconds_apart(Results.load(path).after) == seconds_apart(found.after)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]))
    again = run(gpt2, "recall", method=broken, out=path)
    assert_alike(seconds_apart(again.after), seconds_apart(found.after))
    assert len(path.read_text().splitlines()) == 5


def test_a_row_is_scored_failed_or_unmet():
    with pytest.raises(ValueError, match="or is unmet"):
        RecordRow(1, "r", failed="no", unmet=True)
    assert RecordRow(1, "r", unmet=True).to_json() == {"case_id": 1, "record": "r", "unmet": True}


@pytest.mark.parametrize("name", benchmark_names())
def test_the_work_on_each_benchmark_can_be_sent_to_workers(name, tmp_path):
    (tmp_path / "prompts.txt").write_text("Q: a? A: b")
    benchmark = get_benchmark(name)
    options = {"few_shot": tmp_path / "prompts.txt"} if name == "mquake" else {}
    scoring = benchmark.scoring(**options)
    assert scoring.protocol == name and set(benchmark.panels) <= set(benchmark.columns)
    sent = pickle.loads(pickle.dumps(ScoreUnedited(scoring, None, benchmark.counts)))
    assert sent.scoring == scoring and sent.scoring.setting == scoring.setting
    assert sent.counts is benchmark.counts
