"""Independent edits searched in batches are those made one by one."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import make_model
from helpers.rome_setting import CONFIG, LAYER, PREFIXES, random_moment, small_edit

from transformer_lens_rome import EditRequest, RomeConfig, compute_rome_edit, compute_rome_edits
from transformer_lens_rome.methods import batches, v_star
from transformer_lens_rome.methods.rome import Rome
from transformer_lens_rome.model.adapter import w_out, weight_hash

pytestmark = pytest.mark.usefixtures("any_lengths")

REQUESTS = [
    EditRequest("{} is in", "The Space Needle", "Paris"),
    EditRequest("{}", "Rome", "the best"),
    EditRequest("In the old city of the best of times and the old man, {} was", "Cuba", "in Rome"),
    EditRequest("{} is", "The old man and the sea", "the best of the old times in Rome and Cuba"),
    EditRequest("{} is in", "The Space Needle", "Paris"),
]
"""They differ in everything, but for the last, which is the first again."""
IN_TURN = dataclasses.replace(CONFIG, stop="top", prefixes_a_step=2)
RELEASED = dataclasses.replace(RomeConfig.released(), steps=4, lr=0.2)


def options(model, **changed):
    moment = random_moment(len(w_out(model, LAYER)))
    known = {"layer": LAYER, "second_moment": moment, "prefixes": PREFIXES, "config": CONFIG}
    return known | {"progress": False} | changed


def apart(one, other):
    """The relative difference of two edits."""
    return ((one.delta() - other.delta()).norm() / other.delta().norm()).item()


CONFIGS = {"default": CONFIG, "released": RELEASED, "in turn": IN_TURN}
SIZES, SHAPES = (None, 1, 2), ("gpt2", "gptj", "gemma3")
SQUARE = [
    (shape, name, SIZES[(i + j) % 3])
    for i, shape in enumerate(SHAPES)
    for j, name in enumerate(CONFIGS)
]
"""Each two of shape, configuration and batch size meet once."""


@pytest.mark.parametrize(("shape", "config", "batch_size"), SQUARE)
def test_a_batch_gives_the_edits_of_one_by_one(
    model_class, shape, config, batch_size, tokenizer_of, monkeypatch
):
    model = make_model(model_class, shape, tokenizer_of(shape))
    before, known = weight_hash(w_out(model, LAYER)), options(model, config=CONFIGS[config])
    alone = [compute_rome_edit(model, request, **known) for request in REQUESTS]
    together = compute_rome_edits(model, REQUESTS, batch_size=batch_size, **known)
    for one, other in zip(together, alone, strict=True):
        assert apart(one, other) < 1e-4
        assert one.request == other.request and one.model_hash == before
        assert one.health.losses == pytest.approx(other.health.losses, rel=1e-4)
        assert one.health.p_after == pytest.approx(other.health.p_after, rel=1e-3)
    assert together[0].digest == together[4].digest or apart(together[0], together[4]) < 1e-5
    assert apart(together[0], together[1]) > 0.1  # the control
    assert weight_hash(w_out(model, LAYER)) == before


def test_one_request_is_the_very_edit_of_one_by_one(gpt2):
    known = options(gpt2)
    (edit,) = compute_rome_edits(gpt2, REQUESTS[:1], **known)
    assert edit.digest == compute_rome_edit(gpt2, REQUESTS[0], **known).digest


def test_each_is_made_on_the_model_as_it_is(gpt2):
    """In a list of `compute_rome_edit`, the second is made with the first applied."""
    known = options(gpt2)
    _, second = compute_rome_edits(gpt2, REQUESTS[:2], **known)
    _, after_the_first = compute_rome_edit(gpt2, REQUESTS[:2], **known)
    assert second.model_hash == weight_hash(w_out(gpt2, LAYER)) != after_the_first.model_hash


@pytest.mark.slow
def test_a_search_that_has_ended_leaves_the_batch(gpt2, monkeypatch):
    """Each stops by its own loss, and rows are left out as soon as that is half of them."""
    config = dataclasses.replace(CONFIG, steps=8, stop_loss=0.0)
    known = options(gpt2, config=config)
    whole = [compute_rome_edit(gpt2, request, **known).health.losses for request in REQUESTS]
    stop = sorted(losses[3] for losses in whole)[3]  # four of the five get there within four steps
    known["config"] = dataclasses.replace(config, stop_loss=stop + 1e-4)
    alone = [compute_rome_edit(gpt2, request, **known) for request in REQUESTS]
    steps = [len(edit.health.losses) for edit in alone]
    assert max(steps) == 8 and sorted(steps)[3] <= 4
    sizes, real = [], v_star.stacked

    def counted(model, layer, some):
        sizes.append(len(some))
        return real(model, layer, some)

    monkeypatch.setattr(v_star, "stacked", counted)
    together = compute_rome_edits(gpt2, REQUESTS, batch_size=5, **known)
    assert [len(edit.health.losses) for edit in together] == steps
    for one, other in zip(together, alone, strict=True):  # some stop before their first step
        assert (one.delta() - other.delta()).norm() <= 1e-4 * other.delta().norm()
    assert sizes[0] == 5 and len(sizes) > 1 and max(sizes[1:]) < 5


# ---------------------------------------------------------------- failures


def each(model, requests, **changed):
    known = options(model) | changed
    return Rome(**known).compute_each(model, requests)


@pytest.mark.slow
def test_a_request_that_cannot_be_read_fails_alone(gpt2):
    long = EditRequest("{} " + "is in " * 200, "Rome", "Paris")
    found = each(gpt2, [REQUESTS[0], long, REQUESTS[1]])
    assert "longer than the model's context" in str(found[1])
    assert isinstance(found[1], ValueError)
    assert apart(found[0], small_edit(gpt2, REQUESTS[0])) < 1e-4
    assert apart(found[2], small_edit(gpt2, REQUESTS[1])) < 1e-4
    with pytest.raises(ValueError, match="1 of 3 requests failed .request 1: a text of"):
        compute_rome_edits(gpt2, [REQUESTS[0], long, REQUESTS[1]], **options(gpt2))


def test_a_search_that_turns_nan_fails_alone(gpt2, monkeypatch):
    real = v_star.Search.objective

    def broken(self, logits):
        loss = real(self, logits)
        return loss * torch.nan if len(self.losses) == 2 and len(self.batch.labels) > 9 else loss

    def noted(self, logits):
        loss = broken(self, logits)
        if loss.isnan():
            self.error = "the objective is nan at step 1"
        return loss

    monkeypatch.setattr(v_star.Search, "objective", noted)
    found = each(gpt2, REQUESTS)
    bad = [i for i, one in enumerate(found) if isinstance(one, ValueError)]
    assert bad == [3] and "nan at step 1" in str(found[3])
    monkeypatch.undo()
    for i in (0, 1, 2, 4):
        assert apart(found[i], small_edit(gpt2, REQUESTS[i])) < 1e-4


def test_a_batch_that_does_not_fit_is_halved(gpt2, monkeypatch, caplog):
    real, tried = Rome._compute, []

    def cramped(self, model, encoder, requests, seed):
        tried.append(len(requests))
        if len(requests) > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ...")
        return real(self, model, encoder, requests, seed)

    monkeypatch.setattr(Rome, "_compute", cramped)
    found = each(gpt2, REQUESTS)
    assert tried == [5, 3, 2, 1, 2] and "a batch of 5 does not fit into memory" in caplog.text
    monkeypatch.undo()
    assert apart(found[2], small_edit(gpt2, REQUESTS[2])) < 1e-4


def test_other_errors_and_interrupts_go_through(gpt2, monkeypatch):
    for error in (KeyboardInterrupt, RuntimeError("something else")):

        def fail(*_, error=error):
            raise error

        monkeypatch.setattr(Rome, "_compute", fail)
        with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else RuntimeError):
            each(gpt2, REQUESTS)
    with pytest.raises(ValueError, match="batch_size must be 1 or more"):
        compute_rome_edits(gpt2, REQUESTS, batch_size=0, **options(gpt2))


@pytest.mark.parametrize("device", ("cpu", "meta"))
def test_on_a_cpu_little_of_a_batch_is_padding(gpt2, monkeypatch, device):
    """A pass of rows of 4 and 8 tokens runs half as many again."""
    monkeypatch.setattr(batches, "_PADDING", 1.25)
    lengths, seen = [8, 4, 8, 4, 9], []
    shapes = {i: batches.Shape(2, n, n) for i, n in enumerate(lengths)}
    monkeypatch.setattr(batches, "free_memory", lambda model: 1e9)
    batches.in_batches(
        gpt2.to(device), range(5), shapes.get, lambda some: seen.append(some) or some
    )
    assert seen == ([[1, 3], [0, 2, 4]] if device == "cpu" else [[1, 3, 0, 2, 4]])


def test_batches_are_of_like_lengths_and_of_the_size_that_memory_allows(gpt2, monkeypatch):
    def sizes(batch_size=None):
        seen = []

        def work(items):
            seen.append(items)
            return list(items)

        shapes = {i: batches.Shape(2, 9 - i, 1 + i % 3) for i in range(9)}
        found = batches.in_batches(gpt2, range(9), shapes.get, work, batch_size=batch_size)
        assert found == list(range(9))
        return seen

    assert sizes(3) == [[6, 3, 0], [7, 4, 1], [8, 5, 2]]  # by what is run again, then by length
    assert [len(batch) for batch in sizes()] == [9]
    monkeypatch.setattr(batches, "free_memory", lambda model: 0.0)
    assert [len(batch) for batch in sizes()] == [1] * 9
