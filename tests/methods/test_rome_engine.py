"""ROME makes the same edits on partial passes as on whole ones, from fewer rows."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from conftest import make_model, newest
from helpers.rome_setting import CONFIG, NEAR, PREFIXES, REQUEST, small_edit

from transformer_lens_rome import EditRequest, RomeConfig, compute_rome_edit
from transformer_lens_rome.methods import v_star
from transformer_lens_rome.methods.v_star import Batch
from transformer_lens_rome.model.adapter import Point
from transformer_lens_rome.model.changes import Change
from transformer_lens_rome.model.partial_forward import PartialForward
from transformer_lens_rome.prompts.encoder import Encoder
from transformer_lens_rome.statistics.second_moment import SecondMoment

RELEASED = dataclasses.replace(RomeConfig.released(), steps=4, lr=0.2)
AWAY = EditRequest("In the city {} was", "The Space Needle", "in Paris")


def both_ways(monkeypatch, edit):
    """An edit on partial passes and on whole ones, and how far apart they are."""
    mine = edit()
    with monkeypatch.context() as patch:
        patch.setattr(v_star, "PartialForward", partial(PartialForward, cut=False))
        whole = edit()
    difference = (mine.delta() - whole.delta()).norm() / whole.delta().norm()
    return mine, whole, difference.item()


@pytest.mark.parametrize("request_", (REQUEST, NEAR, AWAY), ids=("first", "near", "away"))
@pytest.mark.parametrize("config", (CONFIG, RELEASED), ids=("default", "released"))
@pytest.mark.parametrize("shape", ("gpt2", "gemma3"))  # `test_partial_forward` has every shape
def test_edits_are_those_of_whole_passes(
    model_class, shape, config, request_, tokenizer, monkeypatch
):
    model = make_model(model_class, shape, tokenizer)
    edit = partial(small_edit, model, request_, config=config)
    mine, whole, difference = both_ways(monkeypatch, edit)
    assert mine.health.losses == pytest.approx(whole.health.losses, rel=1e-4)
    assert difference < 1e-4
    assert abs(whole.health.losses[-1] - whole.health.losses[0]) > 1e-3  # the search moved


def batch(encoder, request):
    parts = (request.prompt, request.subject)
    rows = [encoder.templated_row(*parts, prefix, request.target_new) for prefix in PREFIXES]
    return rows, Batch.of(rows, encoder.templated_row("{} is a", request.subject))


def test_a_row_ends_where_nothing_more_is_needed(gpt2):
    encoder = Encoder.of(gpt2)
    rows, found = batch(encoder, AWAY)
    assert [len(ids) for ids in found.rows[:3]] == [row.target[-1] for row in rows]
    kl = encoder.templated_row("{} is a", AWAY.subject)
    assert found.rows[3] == kl.ids[: kl.subject[-1] + 1] and found.where[-1] == 3


def test_the_kl_term_shares_the_row_that_begins_like_it(gpt2):
    """A prompt that starts with the subject holds the KL row; one that does not, does not."""
    encoder = Encoder.of(gpt2)
    rows, found = batch(encoder, REQUEST)
    assert len(found.rows) == len(rows) == 3 and found.where[-1] == 0
    kl = encoder.templated_row("{} is a", REQUEST.subject)
    last = kl.subject[-1]
    assert found.at[-1] == last and found.rows[0][: last + 1] == kl.ids[: last + 1]

    shared = PartialForward(gpt2, 1, found.rows, found.lookup.tolist())
    alone = PartialForward(gpt2, 1, [kl.ids], [last])
    one = torch.tensor([0])

    def turned(n, lookup):
        return Change(Point("value", 1), torch.arange(n), lookup, lambda value: -value)

    in_batch = shared.logits([turned(3, found.lookup)], found.where[-1:], found.at[-1:])
    by_itself = alone.logits([turned(1, torch.tensor([last]))], one, torch.tensor([last]))
    torch.testing.assert_close(in_batch, by_itself, rtol=1e-4, atol=1e-4)
    untouched = alone.logits([], one, torch.tensor([last]))
    assert not torch.allclose(by_itself, untouched, atol=1e-2)


# ---------------------------------------------------------------- Gemma-3-270M

FACT = EditRequest("The mother tongue of {} is", "Danielle Darrieux", "English")
TEXTS = ("", "He said.", "A few days ago, I was reading about.")


@newest
@pytest.mark.real_model
@pytest.mark.parametrize("released", (False, True))
def test_gemma_edits(gemma, released, monkeypatch):
    config = dataclasses.replace(RomeConfig.released() if released else RomeConfig(), steps=5)
    moment = SecondMoment.identity(2048)
    settings = {"layer": 5, "second_moment": moment, "prefixes": TEXTS, "config": config}
    edit = partial(compute_rome_edit, gemma, FACT, progress=False, **settings)
    mine, whole, difference = both_ways(monkeypatch, edit)
    assert difference < 1e-4
    assert whole.health.losses[-1] < whole.health.losses[0]
