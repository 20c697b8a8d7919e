"""Facts written one after another under a guard: kept, taken off, ended, and gone on with."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from helpers.rome_setting import LAYER, REQUEST, random_edit, random_moment

from transformer_lens_rome import EditRequest, apply_edit, get_method
from transformer_lens_rome.edits.ledger import active_edits
from transformer_lens_rome.model.adapter import w_out
from transformer_lens_rome.prompts.encoder import Encoder
from transformer_lens_rome.prompts.held_out import held_out_nll, held_out_rows
from transformer_lens_rome.sequential import EditSequence, Guard, edit_in_sequence, sequence
from transformer_lens_rome.sequential.guard import refusal

TEXTS = ["The old man said that it was the best of times.", "In the city of Paris it rained."]
REQUESTS = [EditRequest("{} is in", f"Place {n}", "Paris") for n in range(6)]
GUARD = Guard(one_edit=0.02, all_edits=0.5)


@dataclass
class Drawn:
    """Random edits, each as strong as its request's place says."""

    strengths: tuple[float, ...] = (0.01,) * 6
    name: str = "drawn"

    def __post_init__(self):
        self._computed = []
        self._fails = {}

    def compute(self, model, request, *, seed=0):
        number = REQUESTS.index(request)
        self._computed.append(number)
        if error := self._fails.get(number):
            raise error
        edit = random_edit(model, seed=number, strength=self.strengths[number])
        return dataclasses.replace(edit, request=request)


def run(model, method, n=6, **options) -> EditSequence:
    known = {"texts": TEXTS, "guard": None, "progress": False}
    return edit_in_sequence(model, REQUESTS[:n], method, **(known | options))


def nll(model) -> float:
    return held_out_nll(model, held_out_rows(Encoder.of(model), TEXTS))


@pytest.fixture
def base(gpt2):
    return w_out(gpt2, LAYER).detach().clone()


# ---------------------------------------------------------------- held-out text


def test_the_nll_is_that_of_whole_logits(gpt2):
    rows = held_out_rows(Encoder.of(gpt2), TEXTS, length=7)
    assert all(len(row.ids) <= 7 for row in rows)
    assert sum((list(row.ids) for row in rows), []) == sum(map(Encoder.of(gpt2).ids, TEXTS), [])
    total = count = 0
    for row in rows:
        log_probs = gpt2(torch.tensor([row.ids]))[0].double().log_softmax(-1)
        labels = torch.tensor(row.ids[1:])
        total -= log_probs[:-1].gather(1, labels[:, None]).sum().item()
        count += len(labels)
    assert held_out_nll(gpt2, rows) == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("texts", [[], [""], ["a"], "one text"])
def test_too_little_text_is_refused(gpt2, texts):
    with pytest.raises(ValueError, match="text"):
        run(gpt2, Drawn(), texts=texts)


# ---------------------------------------------------------------- the sequence


def test_without_a_guard_all_are_kept_and_watched(gpt2, base):
    before = nll(gpt2)
    method = Drawn((0.01, 0.3, 0.01, 0.01, 0.3, 0.01))
    with run(gpt2, method) as found:
        assert found.nll == before and not found.stopped
        assert [step.kept for step in found.steps] == [True] * 6
        assert list(active_edits(gpt2, LAYER)) == list(found.applied.edits)
        last = found.steps[-1].nll
        assert nll(gpt2) == last
    assert torch.equal(w_out(gpt2, LAYER), base)
    for edit, step in zip(found.applied.edits, found.steps, strict=True):
        apply_edit(gpt2, edit)
        assert nll(gpt2) == step.nll
    assert last != before


def test_one_that_does_damage_is_taken_off_and_the_rest_go_on(gpt2, base):
    method = Drawn((0.01, 0.01, 0.6, 0.01, 0.01, 0.01))
    free = run(gpt2, method)
    rises = [b.nll - a for a, b in zip([free.nll, *(s.nll for s in free.steps)], free.steps)]
    free.revert()
    assert rises[2] > 2 * max(abs(rise) for i, rise in enumerate(rises) if i != 2)  # control
    found = run(gpt2, method, guard=Guard(one_edit=rises[2] / 2, all_edits=100.0))
    assert [step.kept for step in found.steps] == [True, True, False, True, True, True]
    assert "at once" in found.steps[2].reason and not found.stopped
    assert found.steps[2].nll == free.steps[2].nll
    kept = base.clone()
    for number in (0, 1, 3, 4, 5):
        kept += random_edit(gpt2, seed=number, strength=0.01).delta()
    assert torch.equal(w_out(gpt2, LAYER), kept)
    found.revert()
    assert torch.equal(w_out(gpt2, LAYER), base)


def test_it_ends_before_too_much_is_lost(gpt2, base):
    method = Drawn((0.3,) * 6)
    free = run(gpt2, method)
    rises = [step.nll - free.nll for step in free.steps]
    free.revert()
    first = next(i for i in range(2, 6) if rises[i] > max(0, *rises[:i]))  # control: there is one
    limit = (max(0, *rises[:first]) + rises[first]) / 2
    found = run(gpt2, method, guard=Guard(one_edit=100.0, all_edits=limit))
    assert len(found.steps) == first + 1 and not found.steps[-1].kept
    assert found.stopped.startswith(f"request {first + 1}: ") and "in all" in found.stopped
    assert len(found.applied.edits) == first and nll(gpt2) - found.nll <= limit
    found.revert()
    assert torch.equal(w_out(gpt2, LAYER), base)


@pytest.mark.parametrize("guard", [None, GUARD])
def test_what_makes_the_model_say_nothing_is_taken_off(gpt2, base, guard, monkeypatch):
    found = iter([5.0, 5.0, float("nan"), 5.0])  # of the unedited model, and after each edit
    monkeypatch.setattr(sequence, "held_out_nll", lambda model, rows: next(found))
    made = run(gpt2, Drawn(), 3, guard=guard)
    assert [step.kept for step in made.steps] == [True, False, True]
    assert made.steps[1].nll is None and "NLL is nan" in made.steps[1].reason


def test_a_request_that_gives_no_edit_is_noted(gpt2):
    method = Drawn()
    method._fails[1] = ValueError("the target is empty")
    found = run(gpt2, method)
    assert [step.kept for step in found.steps] == [True, False, True, True, True, True]
    assert found.steps[1].reason == "no edit: the target is empty"


def test_what_fails_on_the_first_request_is_not_the_request_s_fault(gpt2, base, tmp_path):
    """Statistics that cannot be solved with, say, would otherwise give a sequence of nothing."""
    method = Drawn()
    method._fails[0] = ValueError("C is singular")
    with pytest.raises(ValueError, match="C is singular"):
        run(gpt2, method, folder=tmp_path)
    assert torch.equal(w_out(gpt2, LAYER), base)
    assert len((tmp_path / "steps.jsonl").read_text().splitlines()) == 1  # what the run is


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_any_other_error_leaves_the_model_as_it_was(gpt2, base, error):
    method = Drawn()
    method._fails[3] = error
    with pytest.raises(type(error)):
        run(gpt2, method)
    assert torch.equal(w_out(gpt2, LAYER), base) and not active_edits(gpt2, LAYER)


def test_rome_in_sequence(gpt2, base):
    moment = random_moment(len(base))
    rome = get_method("rome", layer=LAYER, second_moment=moment, prefixes=("",))
    with run(gpt2, rome, 3) as found:
        assert len({edit.model_hash for edit in found.applied.edits}) == 3
        assert all(step.p_after is not None and step.relative_norm > 0 for step in found.steps)
    assert torch.equal(w_out(gpt2, LAYER), base)


def test_a_refusal_says_which_limit_was_exceeded():
    guard = Guard(one_edit=0.05, all_edits=0.2)
    assert refusal(guard, 2.0, 1.96, 1.9) is None
    for nll, last, first, limit, words in (
        (2.0, 1.9, 1.9, "one_edit", "rose by 0.100 nats at once, more than 0.05"),
        (2.0, 1.96, 1.7, "all_edits", "rose by 0.300 nats in all, more than 0.2"),
        (2.0, 1.9, 1.7, "one_edit", "at once"),  # both: the sequence goes on without this edit
        (float("inf"), 1.9, 1.9, "finite", "is inf"),
    ):
        refused = refusal(guard, nll, last, first)
        assert refused.limit == limit and words in refused.reason
    assert refusal(None, 9.0, 1.0, 1.0) is None
    assert refusal(None, float("nan"), 1.0, 1.0).limit == "finite"


# ---------------------------------------------------------------- going on


def test_a_sequence_that_was_stopped_goes_on(gpt2, base, tmp_path):
    strengths = (0.01, 0.6, 0.01, 0.01, 0.01, 0.01)
    whole = run(gpt2, Drawn(strengths), guard=GUARD, folder=tmp_path / "whole")
    there = w_out(gpt2, LAYER).detach().clone()
    whole.revert()
    first = Drawn(strengths)
    first._fails[4] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run(gpt2, first, guard=GUARD, folder=tmp_path / "parts")
    steps = tmp_path / "parts" / "steps.jsonl"
    steps.write_bytes(steps.read_bytes()[:-9])  # killed in the middle of a line
    second = Drawn(strengths)
    parts = run(gpt2, second, guard=GUARD, folder=tmp_path / "parts")
    assert second._computed == [3, 4, 5]
    assert torch.equal(w_out(gpt2, LAYER), there)
    assert [s.nll for s in parts.steps] == [s.nll for s in whole.steps]
    assert [s.kept for s in parts.steps] == [s.kept for s in whole.steps]
    parts.revert()
    again = Drawn(strengths)
    assert not run(gpt2, again, guard=GUARD, folder=tmp_path / "parts").stopped
    assert not again._computed


def test_a_sequence_that_was_ended_stays_ended(gpt2, tmp_path):
    guard = Guard(one_edit=100.0, all_edits=1e-4)
    first = run(gpt2, Drawn((0.6,) * 6), guard=guard, folder=tmp_path)
    assert first.stopped
    first.revert()
    again = Drawn((0.6,) * 6)
    found = run(gpt2, again, guard=guard, folder=tmp_path)
    assert (found.stopped, found.steps) == (first.stopped, first.steps) and not again._computed


@pytest.mark.parametrize("change", ["method", "guard", "texts", "seed"])
def test_another_sequence_s_folder_is_refused(gpt2, base, tmp_path, change):
    run(gpt2, Drawn(), 2, folder=tmp_path).revert()
    other = {"guard": GUARD, "texts": TEXTS[:1], "seed": 1}
    options = {} if change == "method" else {change: other[change]}
    method = Drawn((0.02,) * 6) if change == "method" else Drawn()
    with pytest.raises(ValueError, match=f"another {change}"):
        run(gpt2, method, folder=tmp_path, **options)
    assert torch.equal(w_out(gpt2, LAYER), base)


def test_other_requests_are_refused(gpt2, base, tmp_path):
    run(gpt2, Drawn(), 2, folder=tmp_path).revert()
    with pytest.raises(ValueError, match="another request 1"):
        edit_in_sequence(gpt2, REQUESTS[1:], Drawn(), texts=TEXTS, guard=None, folder=tmp_path)
    assert torch.equal(w_out(gpt2, LAYER), base)


@pytest.mark.parametrize(
    "found, hostile",
    [
        ('"kept": true', '"kept": "yes"'),
        ('"number": 2', '"number": "../x"'),
        ('"subject"', '"subjekt"'),
        ('"request": {', '"requests": {'),
    ],
)
def test_a_damaged_file_is_refused(gpt2, base, tmp_path, found, hostile):
    run(gpt2, Drawn(), 3, folder=tmp_path).revert()
    path = tmp_path / "steps.jsonl"
    text = path.read_text()
    assert found in text
    path.write_text(text.replace(found, hostile))
    with pytest.raises(ValueError, match="is damaged"):
        run(gpt2, Drawn(), 3, folder=tmp_path)
    assert torch.equal(w_out(gpt2, LAYER), base)


def test_an_edit_file_that_was_changed_is_refused(gpt2, base, tmp_path):
    """Each edit names the weight that it was made on, so the chain cannot be tampered with."""
    run(gpt2, Drawn(), 3, folder=tmp_path).revert()
    (tmp_path / "00002.safetensors").write_bytes((tmp_path / "00001.safetensors").read_bytes())
    with pytest.raises(ValueError, match="on the model already"):
        run(gpt2, Drawn(), 3, folder=tmp_path)
    random_edit(gpt2, seed=9).save(tmp_path / "00001.safetensors")
    with pytest.raises(ValueError, match="not the weight that this edit was made on"):
        run(gpt2, Drawn(), 3, folder=tmp_path)
    assert torch.equal(w_out(gpt2, LAYER), base)


# ---------------------------------------------------------------- refusals


def test_what_cannot_be_a_sequence_is_refused(gpt2):
    with pytest.raises(ValueError, match="list of requests is empty"):
        edit_in_sequence(gpt2, [], Drawn(), texts=TEXTS)
    with pytest.raises(ValueError, match="must be positive"):
        Guard(one_edit=0)
    with apply_edit(gpt2, random_edit(gpt2)):
        with pytest.raises(ValueError, match="edits on the model"):
            run(gpt2, Drawn())
    with pytest.raises(ValueError, match="target_new"):
        edit_in_sequence(gpt2, [{"prompt": "{}", "subject": "x"}], Drawn(), texts=TEXTS)
    assert REQUEST.target_new  # the setting's own request is a sound one
