"""Facts written in batches by a method for many facts: history, guard, and going on."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from helpers.mass_setting import FACTS, SHORT, method
from helpers.matrices import same, weights

from transformer_lens_rome import EditRequest, apply_edit, get_method, revert_all
from transformer_lens_rome.methods import Memit
from transformer_lens_rome.sequential import Guard, edit_in_sequence

TEXTS = ["The old man said that it was the best of times.", "In the city of Paris it rained."]
REQUESTS = [*FACTS, EditRequest("{} is in", "The tower", "Cuba")]
TOO_LONG = EditRequest("word " * 200 + "{} is in", "Rome", "Oslo")


def run(model, requests=REQUESTS, editor=None, **options):
    known = {"texts": TEXTS, "guard": None, "progress": False, "batch_size": 2}
    return edit_in_sequence(model, requests, editor or method(model), **(known | options))


def by_hand(model, requests=REQUESTS, size=2, history=True):
    """The edits of batches, each on the model with those before it."""
    one, edits = method(model), []
    for i in range(0, len(requests), size):
        edits.append(one.compute_many(model, requests[i : i + size]))
        apply_edit(model, edits[-1])
        one = one.after(model, edits[-1]) if history else one
    revert_all(model)
    return [edit.digest for edit in edits]


@pytest.mark.parametrize("history", [True, False])
def test_batches_are_written_with_the_history_of_those_before(gpt2, history):
    before = weights(gpt2)
    with run(gpt2, history=history) as sequence:
        found = [edit.digest for edit in sequence.applied.edits]
    assert same(weights(gpt2), before)
    assert found == by_hand(gpt2, history=history)
    assert [step.number for step in sequence.steps] == [1, 2, 3, 4, 5]
    assert all(step.kept for step in sequence.steps)
    nlls = [step.nll for step in sequence.steps]
    assert nlls[0] == nlls[1] != nlls[2] == nlls[3] != nlls[4]
    chances = [step.p_after for step in sequence.steps]
    assert len(set(chances)) == 5


@pytest.mark.slow
def test_the_history_matters(gpt2):
    assert by_hand(gpt2)[0] == by_hand(gpt2, history=False)[0]
    assert by_hand(gpt2)[1] != by_hand(gpt2, history=False)[1]


@pytest.mark.parametrize("name", ["memit", "emmet", "alphaedit"])
def test_every_method_of_the_family_writes_sequences(gpt2, name):
    editor = dataclasses.replace(method(gpt2), solve=name)
    before = weights(gpt2)
    with run(gpt2, editor=editor) as sequence:
        assert len(sequence.applied.edits) == 3
    assert same(weights(gpt2), before)


@pytest.mark.slow
def test_a_batch_that_does_damage_is_undone_as_a_whole(gpt2):
    class Harmful(Memit):
        def compute_many(self, model, requests, *, seed=0, batch_size=None):
            edit = super().compute_many(model, requests, seed=seed)
            return edit.scale(80.0) if FACTS[2] in requests else edit

    known = {f.name: getattr(method(gpt2), f.name) for f in dataclasses.fields(Memit)}
    guard = Guard(one_edit=0.5, all_edits=50.0)
    with run(gpt2, editor=Harmful(**known), guard=guard) as sequence:
        assert [step.kept for step in sequence.steps] == [True, True, False, False, True]
        assert "rose by" in sequence.steps[2].reason and not sequence.stopped
        digests = [edit.digest for edit in sequence.applied.edits]
    last = by_hand(gpt2, [*REQUESTS[:2], REQUESTS[4]])
    assert digests == last  # the undone batch is not in the history either


@pytest.mark.slow
def test_all_damage_together_ends_the_sequence(gpt2):
    before = weights(gpt2)
    with run(gpt2, guard=Guard(one_edit=1e-9, all_edits=1e-9)) as sequence:
        kept = [step for step in sequence.steps if step.kept]
        assert len(sequence.steps) % 2 == 0 or len(sequence.steps) == 5
        assert all(step.reason for step in sequence.steps if not step.kept)
        assert len(sequence.applied.edits) <= 3 and len(kept) <= 5
    assert same(weights(gpt2), before)


@pytest.mark.slow
def test_a_request_that_is_left_out_is_said_and_its_batch_goes_on(gpt2):
    editor = method(gpt2, skip_failed=True)
    with run(gpt2, [*FACTS[:1], TOO_LONG, *FACTS[1:3]], editor=editor) as sequence:
        assert [step.kept for step in sequence.steps] == [True, False, True, True]
        assert sequence.steps[1].reason == "no edit: left out of its batch"
        assert sequence.steps[1].nll is None and sequence.steps[0].nll is not None
        assert sequence.applied.edits[0].requests == (FACTS[0],)
    with pytest.raises(ValueError, match="1 of 2 requests failed"):
        run(gpt2, [FACTS[0], TOO_LONG])
    with run(gpt2, [*FACTS[:2], FACTS[2], TOO_LONG]) as sequence:
        assert [step.kept for step in sequence.steps] == [True, True, False, False]
        assert "1 of 2 requests failed" in sequence.steps[2].reason


# ---------------------------------------------------------------- going on


@pytest.mark.slow
def test_a_stopped_sequence_goes_on_from_whole_batches(gpt2, tmp_path):
    with run(gpt2, folder=tmp_path / "whole") as whole:
        after = weights(gpt2)
    with run(gpt2, REQUESTS[:2], folder=tmp_path / "parts"):
        pass
    with run(gpt2, folder=tmp_path / "parts") as parts:
        assert same(weights(gpt2), after)
        assert [edit.digest for edit in parts.applied.edits] == [
            edit.digest for edit in whole.applied.edits
        ]
    assert parts.steps == whole.steps
    assert sorted(path.name for path in (tmp_path / "whole").iterdir()) == [
        "00001.safetensors",
        "00003.safetensors",
        "00005.safetensors",
        "steps.jsonl",
    ]


@pytest.mark.slow
def test_a_sequence_killed_inside_a_batch_goes_on(gpt2, tmp_path):
    with run(gpt2, folder=tmp_path) as whole:
        pass
    lines = (tmp_path / "steps.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "steps.jsonl").write_text("".join(lines[:4]))  # the head and three steps
    with run(gpt2, folder=tmp_path) as again:
        assert len(again.applied.edits) == 3
    assert again.steps == whole.steps
    assert (tmp_path / "steps.jsonl").read_text() == "".join(lines)


@pytest.mark.slow
def test_a_sequence_with_another_batch_size_is_another_sequence(gpt2, tmp_path):
    with run(gpt2, REQUESTS[:3], folder=tmp_path):
        pass
    before = weights(gpt2)
    with pytest.raises(ValueError, match="step 3 of a smaller batch"):
        run(gpt2, REQUESTS[:4], folder=tmp_path)
    for other in ({"batch_size": 3}, {"history": False}, {"batch_size": 1}):
        with pytest.raises(ValueError, match="a run with another (batch_size|history)"):
            run(gpt2, REQUESTS[:2], folder=tmp_path, **other)
    assert same(weights(gpt2), before)


def test_a_method_for_single_facts_has_no_batches(gpt2, tmp_path):
    with pytest.raises(ValueError, match="batch_size=2 needs a method that writes many facts"):
        run(gpt2, editor=get_method("ft", steps=1))
    with pytest.raises(ValueError, match="batch_size=0"):
        run(gpt2, batch_size=0)
    with run(gpt2, editor=get_method("ft", steps=1), batch_size=1, folder=tmp_path) as sequence:
        assert len(sequence.applied.edits) == 5
    head = json.loads((tmp_path / "steps.jsonl").read_text().splitlines()[0])
    assert not {"batch_size", "history"} & set(head["setting"])


@pytest.mark.slow
def test_one_fact_at_a_time_keeps_a_history_too(gpt2):
    config = dataclasses.replace(SHORT, covariance_weight=1.0)
    editor = method(gpt2, config=config)
    sequences = []
    for history in (True, False):
        with run(gpt2, FACTS[:3], editor=editor, batch_size=1, history=history) as sequence:
            sequences.append([edit.digest for edit in sequence.applied.edits])
    with_it, without = sequences
    assert with_it[0] == without[0] and with_it[1:] != without[1:]
    assert torch.is_grad_enabled()
