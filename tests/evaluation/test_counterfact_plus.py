"""CounterFact+, attribute prompts and continuation prompts: each number by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers.evaluation_setting import (
    RECORDS,
    RandomEdits,
    assert_alike,
    evaluate,
    seconds_apart,
)

from transformer_lens_rome import applied
from transformer_lens_rome.evaluation import results as results_module
from transformer_lens_rome.evaluation.results import Results
from transformer_lens_rome.prompts.encoder import Encoder
from transformer_lens_rome.prompts.scores import target_log_probs

METHOD = RandomEdits(strength=0.6)


def next_log_probs(model, prompt):
    ids = Encoder.of(model).row(prompt).ids
    with torch.no_grad():
        return model(torch.tensor([ids]))[0, -1].double().log_softmax(-1)


@pytest.mark.parametrize("batch_size", (1, 4))
def test_neighbours_with_the_fact_in_front(model, batch_size):
    found = evaluate(model, METHOD, counterfact_plus=True, batch_size=batch_size)
    for record in RECORDS:
        row, request = found.after[record.case_id], record.request
        fact = f"{request.text} {request.target_new}. "
        edit = METHOD.compute(model, request)
        for i, neighbour in enumerate(record.neighborhood_prompts):
            prompts = {"neighborhood": neighbour, "neighborhood_plus": fact + neighbour}
            for kind, prompt in prompts.items():
                before = next_log_probs(model, prompt)
                with applied(model, edit):
                    after = next_log_probs(model, prompt)
                    (new,) = target_log_probs(model, [prompt], [request.target_new])
                kl = (after.exp() * (after - before)).sum().item()
                assert row.kl[kind][i] == pytest.approx(kl, rel=1e-3, abs=1e-5)
                assert row.scores[kind][i].new == pytest.approx(new.tolist(), abs=1e-4)
                backwards = (before.exp() * (before - after)).sum().item()
                assert row.kl[kind][i] != pytest.approx(backwards, rel=1e-3)  # the control
    assert {"NS+", "NM+", "NKL", "NKL+"} <= found.scores().keys()
    assert found.scores()["NKL"].mean > 0
    assert found.before[0].kl is None and "NS+" in found.scores(edited=False)


@pytest.fixture
def model(gpt2):
    return gpt2


def test_a_run_with_them_is_kept_and_loaded(gpt2, tmp_path):
    out = tmp_path / "run.jsonl"
    found = evaluate(gpt2, METHOD, counterfact_plus=True, attributes=True, out=out)
    loaded = Results.load(out)
    assert_alike(seconds_apart(loaded.after), seconds_apart(found.after))
    assert loaded.scores().keys() >= {"AS", "AM", "NS+", "NKL+"}
    table = loaded.table()
    assert "AS, AM" in table and "edited fact in front" in table
    assert "4 records (published schema); prompts a record: 1 rewrite, 2 paraphrase" in table


def test_metrics_that_a_record_has_no_prompts_for_are_absent(gpt2):
    empty = {"paraphrase_prompts": (), "neighborhood_prompts": ()}
    records = [dataclasses.replace(record, **empty) for record in RECORDS]
    found = evaluate(gpt2, METHOD, records, attributes=True, counterfact_plus=True)
    assert found.scores().keys() == {"ES", "EM", "EA", "AS", "AM"}
    assert found.after[0].kl is None
    assert "PS" not in found.table().splitlines()[0]


def test_the_flat_files_column_has_its_own_name_and_no_score(gpt2):
    records = flat(RECORDS)
    found = evaluate(gpt2, METHOD, records)
    assert found.data["schema"] == "flat"
    head = found.table().splitlines()[0]
    assert " CS " in head and " PS " not in head and " S " not in head
    assert "paraphrase in one record of six only" in found.table()
    same = evaluate(gpt2, METHOD, RECORDS)
    assert found.scores()["CS"] == same.scores()["PS"]  # the same prompts, by another name


def flat(records):
    return [
        dataclasses.replace(r, paraphrase_prompts=(), continuation_prompts=r.paraphrase_prompts)
        for r in records
    ]


def test_runs_of_two_schemas_make_no_table(gpt2):
    others = [dataclasses.replace(record, case_id=record.case_id + 50) for record in flat(RECORDS)]
    one, other = evaluate(gpt2, METHOD, RECORDS), evaluate(gpt2, METHOD, others)
    with pytest.raises(ValueError, match="records of two schemas"):
        one.table(other)


def test_a_table_has_the_records_that_all_runs_have(gpt2):
    one = evaluate(gpt2, METHOD, RECORDS)
    few = evaluate(gpt2, dataclasses.replace(METHOD, strength=0.1), RECORDS[1:3])
    _, rows = results_module.cells([one, few])
    assert [row[1] for row in rows] == ["2", "2", "2"]
    assert "2 records (published schema), those that all runs have of 4" in one.table(few)
    rest = evaluate(gpt2, METHOD, RECORDS[:1])
    with pytest.raises(ValueError, match="no record in common"):
        few.table(rest)
