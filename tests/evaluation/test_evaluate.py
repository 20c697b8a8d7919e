"""Evaluation: the right numbers, an untouched model, and runs that survive what happens to them."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time

import pytest
import torch
from conftest import once_a_class
from helpers.evaluation_setting import (
    RECORDS,
    RandomEdits,
    evaluate,
    record,
    seconds_apart,
)
from helpers.rome_setting import CONFIG, LAYER, PREFIXES, random_edit, random_moment

from transformer_lens_rome import applied, apply_edit, get_method, target_log_probs
from transformer_lens_rome.evaluation import (
    References,
    Results,
    TfIdf,
    markdown,
)
from transformer_lens_rome.evaluation.rows import row_reader
from transformer_lens_rome.files.fields import as_read
from transformer_lens_rome.files.run_file import RunFile
from transformer_lens_rome.methods.rome import Rome
from transformer_lens_rome.model.adapter import w_out
from transformer_lens_rome.prompts.continuations import greedy_continuations
from transformer_lens_rome.prompts.encoder import Encoder

# ---------------------------------------------------------------- numbers


@pytest.mark.slow
def test_accuracy_is_exact_match_by_greedy_decoding(gpt2):
    """EA counts prompts that greedy decoding continues with exactly the new target."""
    method = get_method("ft", layer=LAYER, lr=2e-2, steps=30, objective="teacher_forced")
    records = [record(i, "The tower", new) for i, new in enumerate(("the best", "old Rome", "in"))]
    encoder, seen = Encoder.of(gpt2), set()
    found = evaluate(gpt2, method, records)
    for one in records:
        with applied(gpt2, method.compute(gpt2, one.request)):
            for i, prompt in enumerate(one.paraphrase_prompts):
                row = encoder.row(prompt, target=one.request.target_new)
                (text,) = greedy_continuations(gpt2, [prompt], len(row.target), encoder=encoder)
                greedy = text == encoder.tokenizer.decode([row.ids[p] for p in row.target])
                scores = found.after[one.case_id].scores["paraphrase"][i]
                assert all(scores.new_correct) == greedy
                seen.add(greedy)
        assert found.metrics()[one.case_id]["EA"] == 1
    assert seen == {True, False}


def test_rows_hold_what_scoring_by_hand_gives(gpt2):
    base = w_out(gpt2, LAYER).detach().clone()
    found = evaluate(gpt2, attributes=True)
    assert torch.equal(w_out(gpt2, LAYER), base) and list(found.after) == [0, 1, 2, 7]
    for one in RECORDS:
        prompts = [one.request.text, *one.paraphrase_prompts, *one.neighborhood_prompts]
        prompts += one.attribute_prompts
        edit = RandomEdits().compute(gpt2, one.request)
        for rows, edits in ((found.before, ()), (found.after, (edit,))):
            with applied(gpt2, *edits):
                new, true = (
                    target_log_probs(gpt2, prompts, [target] * len(prompts))
                    for target in (one.request.target_new, one.request.target_true)
                )
            scores = rows[one.case_id].scores
            given = [pair for kind in scores.values() for pair in kind]
            for pair, a, b in zip(given, new, true, strict=True):
                torch.testing.assert_close(torch.tensor(pair.new), a, rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(torch.tensor(pair.true), b, rtol=1e-5, atol=1e-5)
    assert [len(kind) for kind in scores.values()] == [1, 2, 2, 1]


def test_averages_are_those_of_the_records(gpt2):
    found = evaluate(gpt2)
    each = found.metrics()
    assert found.scores()["PM"].mean == pytest.approx(
        100 * sum(row["PM"] for row in each.values()) / 4
    )
    assert found.scores(edited=False)["PM"].mean != pytest.approx(found.scores()["PM"].mean)
    table = found.to_dataframe()
    assert list(table.case_id) == [0, 1, 2, 7]
    assert table.NM_after[3] == pytest.approx(each[7]["NM"])
    unedited = evaluate(gpt2, None)
    assert unedited.scores() == found.scores(edited=False) and not unedited.after


def test_tables_and_comparisons(gpt2):
    strong, weak = evaluate(gpt2), evaluate(gpt2, RandomEdits(1e-4))
    text = strong.table(weak)
    assert text.splitlines()[0].startswith("| method | records | failed | S | ES |")
    assert [line.split("|")[1].strip() for line in text.splitlines()[2:5]] == [
        "unedited",
        "RandomEdits",
        "RandomEdits",
    ]
    assert "geometric mean" in text and markdown([weak]).count("RandomEdits") == 1
    difference, p = strong.compare(weak)["EM"]
    wanted = strong.scores()["EM"].mean - weak.scores()["EM"].mean
    assert difference.mean == pytest.approx(wanted) and 0 < p <= 1
    with pytest.raises(ValueError, match="differ in model_hash"):
        strong.compare(dataclasses.replace(weak, setting={"model_hash": "x"}))


def test_rome_is_prepared_once(gpt2):
    method = Rome(LAYER, random_moment(len(w_out(gpt2, LAYER))), PREFIXES, CONFIG)
    found = evaluate(gpt2, method, RECORDS[:2])
    assert found.name == "rome" and found.setting["method"]["options"]["prefixes"] == list(PREFIXES)
    by_hand = method.compute(gpt2, RECORDS[1].request)
    assert found.after[1].health["p_after"] == pytest.approx(by_hand.health.p_after, rel=1e-4)


def test_order_and_company_of_records_change_nothing(gpt2):
    whole, turned = evaluate(gpt2), evaluate(gpt2, records=RECORDS[::-1])
    alone = evaluate(gpt2, records=RECORDS[2:3])
    assert seconds_apart(whole.after) == seconds_apart(turned.after)
    assert seconds_apart(alone.after)[2] == seconds_apart(whole.after)[2]


# ---------------------------------------------------------------- faults


def test_a_failed_edit_is_counted_and_the_run_goes_on(gpt2):
    found = evaluate(gpt2, RandomEdits(broken=("The tower",)))
    assert found.failed == {1: "ValueError: no such subject"}
    assert found.scores()["ES"].n == 3 and "| RandomEdits | 3 | 1 |" in found.table()
    found = evaluate(gpt2, RandomEdits(strength=1e30))  # NaN
    assert len(found.failed) == 4 and "| RandomEdits | 0 | 4 |" in found.table()


def test_a_model_that_cannot_be_edited_ends_the_run(gpt2, tmp_path, monkeypatch):
    def refuse(*_args, **_options):
        raise NotImplementedError("the value is not key @ W_out + b_out")

    monkeypatch.setattr(RandomEdits, "compute", refuse)
    with pytest.raises(NotImplementedError, match="the value is not"):
        evaluate(gpt2, out=tmp_path / "run.jsonl")


def test_a_prompt_that_is_too_long_fails_its_record_only(gpt2):
    long = record(20, "Cuba", paraphrase_prompts=("Cuba is in " * 200,))
    found = evaluate(gpt2, records=[*RECORDS, long])
    assert list(found.failed) == [20] and "longer than the model's context" in found.failed[20]
    assert found.scores()["PS"].n == found.scores(edited=False)["PS"].n == 4


def test_a_model_with_edits_is_refused(gpt2):
    undo = apply_edit(gpt2, random_edit(gpt2))
    with pytest.raises(ValueError, match="revert_all"):
        evaluate(gpt2)
    undo.revert()
    with pytest.raises(ValueError, match="no records"):
        evaluate(gpt2, records=[])


@pytest.mark.parametrize("layer", (LAYER, 2))
@pytest.mark.parametrize("fails", (False, True))
def test_a_method_that_changes_the_model_stops_the_run(gpt2, layer, fails, tmp_path):
    class Spoils(RandomEdits):
        def compute(self, model, request, *, seed=0):
            edit = super().compute(model, request, seed=seed)
            with torch.no_grad():
                w_out(model, layer).add_(1e-3)
            if fails:
                raise ValueError("and fails")
            return edit

    with pytest.raises(RuntimeError, match="has changed after record 0"):
        evaluate(gpt2, Spoils(), out=tmp_path / "run.jsonl")
    assert len((tmp_path / "run.jsonl").read_bytes().splitlines()) == 1  # no row was kept


def test_a_change_outside_the_mlps_stops_the_run_too(gpt2):
    class Spoils(RandomEdits):
        def compute(self, model, request, *, seed=0):
            with torch.no_grad():
                next(model.parameters()).mul_(1.5)
            return super().compute(model, request, seed=seed)

    with pytest.raises(RuntimeError, match="has changed after record 0"):
        evaluate(gpt2, Spoils())


def test_a_fault_of_the_device_is_not_the_records(gpt2, tmp_path):
    class Full(RandomEdits):
        def compute(self, model, request, *, seed=0):
            raise torch.cuda.OutOfMemoryError("no memory")

    with pytest.raises(torch.cuda.OutOfMemoryError):
        evaluate(gpt2, Full(), out=tmp_path / "run.jsonl")
    assert len((tmp_path / "run.jsonl").read_bytes().splitlines()) == 1


def test_when_every_edit_fails_the_table_says_so(gpt2):
    found = evaluate(gpt2, RandomEdits(broken=tuple(one.request.subject for one in RECORDS)))
    assert len(found.failed) == 4 and found.seconds == {}
    assert "| RandomEdits | 0 | 4 |" in found.table()


def test_records_that_cannot_be_scored_are_counted_for_the_unedited_model_too(gpt2):
    long = record(9, "The tower", neighborhood_prompts=("the best " * 200,))
    found = evaluate(gpt2, None, [*RECORDS, long])
    assert list(found.failed) == [9] and "| unedited | 4 | 1 |" in found.table()


def test_two_records_of_one_number_are_refused(gpt2):
    with pytest.raises(ValueError, match="the same case_id"):
        evaluate(gpt2, records=[*RECORDS, record(0, "Rome")])


def test_options_that_would_do_nothing_are_refused(gpt2, tmp_path):
    with pytest.raises(ValueError, match="generate=True"):
        evaluate(gpt2, references=References.of({}, TfIdf({})))
    with pytest.raises(ValueError, match="the name unedited.jsonl"):
        evaluate(gpt2, None, out=tmp_path / "mine.jsonl")
    with pytest.raises(ValueError, match="workers must be 1 or more"):
        evaluate(gpt2, workers=0)


# ---------------------------------------------------------------- runs on disk


def test_a_run_is_kept_and_loaded(gpt2, tmp_path):
    out = tmp_path / "runs" / "random.jsonl"
    found = evaluate(gpt2, out=out)
    again = Results.load(out)
    assert again.scores() == found.scores() and again.name == "RandomEdits"
    assert again.scores(edited=False) == found.scores(edited=False)
    assert Results.load(out.with_name("unedited.jsonl")).scores() == again.scores(edited=False)
    head = json.loads(out.read_text().splitlines()[0])
    assert head["setting"]["model_hash"] == found.setting["model_hash"]
    assert "torch" in head["made_with"]


def test_more_records_are_added_and_none_is_done_twice(gpt2, tmp_path, monkeypatch):
    out = tmp_path / "random.jsonl"
    evaluate(gpt2, records=RECORDS[:2], out=out)
    lines = out.read_text().splitlines()
    found = evaluate(gpt2, out=out)
    assert out.read_text().splitlines()[:3] == lines and len(found.after) == 4
    monkeypatch.setattr(RandomEdits, "compute", None)
    assert evaluate(gpt2, out=out).after == found.after


@pytest.mark.parametrize(
    ("changed", "words"),
    (
        ({"method": RandomEdits(0.1)}, "another method"),
        ({"seed": 1}, "another seed"),
        ({"attributes": True}, "another attributes"),
        ({"records": [record(0, "Another Needle")]}, "another record 0"),
    ),
)
def test_a_file_of_another_run_is_refused(gpt2, tmp_path, changed, words):
    evaluate(gpt2, out=tmp_path / "run.jsonl")
    with pytest.raises(ValueError, match=words):
        evaluate(gpt2, out=tmp_path / "run.jsonl", **changed)


def test_a_file_of_another_model_is_refused(gpt2, tmp_path):
    evaluate(gpt2, out=tmp_path / "run.jsonl")
    with torch.no_grad():
        w_out(gpt2, 0).mul_(1.01)
    with pytest.raises(ValueError, match="another model_hash"):
        evaluate(gpt2, out=tmp_path / "run.jsonl")


@pytest.mark.parametrize("cut", (1, 20, 200))
def test_a_torn_last_line_is_done_again(gpt2, tmp_path, cut):
    out = tmp_path / "run.jsonl"
    whole = evaluate(gpt2, out=out)
    data = out.read_bytes()
    out.write_bytes(data[:-cut])
    torn = Results.load(out)
    assert len(torn.after) == 3
    again = evaluate(gpt2, out=out)
    assert seconds_apart(again.after) == seconds_apart(whole.after)
    assert [json.loads(line) for line in out.read_bytes().splitlines()][1:] == [
        as_read(row.to_json()) for row in again.after.values()
    ]


@pytest.mark.parametrize("content", (b'[{"a": 1}]', b'{"a": 1}\n{"b"', b"text", b'{"format": 3}\n'))
def test_a_file_that_is_not_a_runs_is_left_as_it_is(gpt2, tmp_path, content):
    path = tmp_path / "records.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is not the file of a run"):
        evaluate(gpt2, out=path)
    assert path.read_bytes() == content


def test_a_run_goes_on_after_its_statistics_were_used(gpt2, tmp_path):
    moment = random_moment(len(w_out(gpt2, LAYER)))
    method = Rome(LAYER, moment, PREFIXES, CONFIG)
    first = evaluate(gpt2, method, RECORDS[:1], out=tmp_path / "rome.jsonl")
    moment.solve(torch.ones(moment.d_mlp).double())
    again = dataclasses.replace(method, progress=True)
    second = evaluate(gpt2, again, RECORDS[:1], out=tmp_path / "rome.jsonl")
    assert second.after == first.after


def test_an_unedited_file_of_another_run_is_refused(gpt2, tmp_path):
    evaluate(gpt2, out=tmp_path / "one" / "run.jsonl")
    evaluate(gpt2, out=tmp_path / "two" / "run.jsonl", attributes=True)
    (tmp_path / "two" / "unedited.jsonl").replace(tmp_path / "one" / "unedited.jsonl")
    with pytest.raises(ValueError, match="belongs to another model, setting or data set"):
        Results.load(tmp_path / "one" / "run.jsonl")


def test_damage_in_the_middle_is_said(gpt2, tmp_path):
    out = tmp_path / "run.jsonl"
    evaluate(gpt2, out=out)
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join([*lines[:2], b"\0" * 20 + b"\n", *lines[3:]]))
    with pytest.raises(ValueError, match="line 3 is damaged"):
        evaluate(gpt2, out=out)
    (tmp_path / "other.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(ValueError, match="is not the file of a run"):
        evaluate(gpt2, out=tmp_path / "other.jsonl")


def test_a_second_writer_is_refused(tmp_path):
    pytest.importorskip("fcntl", reason="this system has no file locks")
    with RunFile(tmp_path / "run.jsonl", {"a": 1}, {}, row_reader):
        with pytest.raises(ValueError, match="another process is writing"):
            RunFile(tmp_path / "run.jsonl", {"a": 1}, {}, row_reader)
    with RunFile(tmp_path / "run.jsonl", {"a": 1}, {}, row_reader) as file:  # free again
        assert file.rows == {}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.parametrize("limit", (700, 1500, 2600))
def test_a_full_disk_stops_the_run_and_loses_nothing(gpt2, tmp_path, limit):
    """A write that ends half-way is an error; what it left is done again."""
    import resource

    whole = evaluate(gpt2, out=tmp_path / "whole" / "run.jsonl")
    path = tmp_path / "full" / "run.jsonl"
    pid = os.fork()
    if not pid:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            evaluate(gpt2, out=path)
            os._exit(0)
        except OSError:
            os._exit(7)
        finally:
            os._exit(1)
    assert os.WEXITSTATUS(os.waitpid(pid, 0)[1]) == 7
    assert max(file.stat().st_size for file in path.parent.iterdir()) == limit  # torn there
    found = evaluate(gpt2, out=path)
    assert seconds_apart(found.after) == seconds_apart(whole.after)
    assert seconds_apart(found.before) == seconds_apart(whole.before)


def test_a_folder_that_cannot_be_written_is_an_error_before_any_work(gpt2, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        evaluate(gpt2, out=tmp_path / "file" / "run.jsonl")


@once_a_class
@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_killed_ten_times_nothing_is_lost_or_done_twice(gpt2, tmp_path):
    """`kill -9` at random moments of an evaluation; it ends as an uninterrupted one does."""
    method = get_method("ft", layer=LAYER, steps=2)
    records = [record(i, name) for i, name in enumerate(("The tower", "Cuba", "Old man") * 10)]
    whole = evaluate(gpt2, method, records, out=tmp_path / "whole" / "ft.jsonl", batch_size=1)
    path = tmp_path / "killed" / "ft.jsonl"
    generator, kills, rounds = torch.Generator().manual_seed(0), 0, []

    def written():
        files = path.parent.glob("*.jsonl") if path.parent.exists() else ()
        return sum(file.stat().st_size for file in files)

    def wait_for(size, patience=20.0):
        until = time.monotonic() + patience
        while written() < size and time.monotonic() < until:
            time.sleep(0.002)

    for _ in range(200):
        pid = os.fork()
        if not pid:
            try:
                evaluate(gpt2, method, records, out=path, batch_size=1)
                os._exit(0)
            finally:
                os._exit(1)
        if kills < 10:
            wait_for(written() + 1 + int(3000 * torch.rand(1, generator=generator)))
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        kills += os.WIFSIGNALED(status)
        rounds.append(written())
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
    found = Results.load(path)
    assert kills == 10 and len(set(rounds)) > 7  # the control: it was killed on the way
    assert seconds_apart(found.after) == seconds_apart(whole.after)
    assert seconds_apart(found.before) == seconds_apart(whole.before)
    for name in ("ft.jsonl", "unedited.jsonl"):
        lines = path.with_name(name).read_bytes().splitlines()
        assert [json.loads(line).get("case_id") for line in lines] == [None, *range(30)]
