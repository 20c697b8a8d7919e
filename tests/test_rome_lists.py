"""Ten facts written one after another, and taken back in any order."""

from __future__ import annotations

import random

import pytest
import torch
from helpers.rome_setting import CONFIG, LAYER, random_moment, small_edit

from transformer_lens_rome import EditRequest, applied, rome_edit
from transformer_lens_rome.edits.ledger import active_edits
from transformer_lens_rome.model.adapter import w_out

SUBJECTS = "Paris Rome Seattle London Danielle LeBron Leonardo Apple Microsoft Space".split()
REQUESTS = [EditRequest("{} is in", subject, "French") for subject in SUBJECTS]


@pytest.fixture
def ten(gpt2):
    """The model with ten edits on it, and the bytes it had before."""
    base = w_out(gpt2, LAYER).detach().clone()
    moment = random_moment(len(base))
    known = {"second_moment": moment, "prefixes": [""], "config": CONFIG, "progress": False}
    return gpt2, base, rome_edit(gpt2, REQUESTS, layer=LAYER, **known)


def test_each_is_made_on_those_before_it(ten):
    model, base, done = ten
    assert [edit.request for edit in done.edits] == REQUESTS
    assert len({edit.model_hash for edit in done.edits}) == len(REQUESTS)
    total = sum(edit.delta() for edit in done.edits)
    assert torch.allclose(w_out(model, LAYER), base + total, atol=1e-5)
    first = done.edits[0]
    done.revert()
    assert small_edit(model, REQUESTS[0], prefixes=[""]).digest == first.digest


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_undone_in_any_order_to_the_byte(ten, seed):
    model, base, done = ten
    order = list(done)
    random.Random(seed).shuffle(order)
    left = list(done.edits)
    for one in order:
        one.revert()
        left.remove(one.edit)
        assert list(active_edits(model, LAYER)) == left
        found = w_out(model, LAYER).detach().clone()
        expected = base.clone()
        for other in left:
            expected += other.delta()
        assert torch.equal(found, expected)
    assert torch.equal(w_out(model, LAYER), base) and not done.active


def test_a_failure_in_the_middle_of_a_list_leaves_nothing(gpt2):
    base = w_out(gpt2, LAYER).detach().clone()
    good = small_edit(gpt2)
    with pytest.raises(ValueError, match="target_new is empty"):
        small_edit(gpt2, [REQUESTS[0], {"prompt": "{} is", "subject": "x", "target_new": " "}])
    assert torch.equal(w_out(gpt2, LAYER), base)
    with applied(gpt2, good):
        assert not torch.equal(w_out(gpt2, LAYER), base)
    assert torch.equal(w_out(gpt2, LAYER), base)
