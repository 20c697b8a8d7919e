"""The rules of the search for v*: when it stops, and which prefixes a step takes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import make_model
from helpers.rome_setting import LAYER, NEAR, PREFIXES, keys_and_values, random_moment, small_edit

from transformer_lens_rome import EditRequest, RomeConfig, compute_rome_edit, compute_rome_edits
from transformer_lens_rome.methods.v_star import Batch, Search
from transformer_lens_rome.model.adapter import w_out
from transformer_lens_rome.model.partial_forward import PartialForward
from transformer_lens_rome.model.vocabulary import losses_of_logits
from transformer_lens_rome.prompts.encoder import Encoder

FREE = RomeConfig(steps=40, lr=0.5, clamp=20.0, stop_loss=0.0, kl_factor=0.0, weight_decay=0.0)
LONG = EditRequest("{}", "The Space Needle", "Paris, the best")
"""Several tokens of the target, right after the subject."""


@pytest.fixture(params=["gpt2", "gemma3"])
def model(request, model_class, tokenizer, bos_tokenizer):
    known = bos_tokenizer if request.param == "gemma3" else tokenizer
    return make_model(model_class, request.param, known)


def searched(model, request=NEAR, **changed):
    """The vector that the search adds to the value, and its losses."""
    edit = small_edit(model, request, config=dataclasses.replace(FREE, **changed))
    value = edit.k_star @ w_out(model, LAYER).detach().float()
    bias = keys_and_values(model, rows(model, request))[1].mean(0) - value
    return edit.v_star - value - bias, list(edit.health.losses)


def rows(model, request=NEAR):
    encoder, parts = Encoder.of(model), (request.prompt, request.subject)
    return [encoder.templated_row(*parts, prefix, request.target_new) for prefix in PREFIXES]


@torch.no_grad()
def scored(model, row, delta):
    """The mean NLL of a row's target with the value changed, and whether it is on top."""

    def add(resid, hook=None):
        resid = resid.clone()
        resid[:, row.subject[-1]] += delta
        return resid

    hooks = [(f"blocks.{LAYER}.hook_resid_post", add)]
    found = model.run_with_hooks(torch.tensor([row.ids]), fwd_hooks=hooks)[0].log_softmax(-1)
    at = [p - 1 for p in row.target]
    labels = torch.tensor([row.ids[p] for p in row.target])
    top = bool((found[at].argmax(-1) == labels).all())
    return -found[at, labels].mean().item(), top


# ---------------------------------------------------------------- the stop


def test_the_top_stop_is_the_first_loss_with_the_target_on_top_after_every_prefix(gpt2):
    _, losses = searched(gpt2, stop="top")
    assert 2 < len(losses) < FREE.steps
    found = {}
    for n in (len(losses) - 1, len(losses)):
        delta, before = searched(gpt2, stop="loss", steps=n)
        assert before == losses[:n]
        each = [scored(gpt2, row, delta) for row in rows(gpt2)]
        assert sum(nll for nll, _ in each) / 3 == pytest.approx(losses[n - 1], rel=1e-3)
        found[n] = [top for _, top in each]
    assert all(found[len(losses)]) and not all(found[len(losses) - 1])
    assert len(searched(gpt2, stop="loss")[1]) == FREE.steps  # the control


@pytest.mark.parametrize("stop", ("top", "loss"))
def test_the_top_stop_asks_for_every_token_of_every_row(gpt2, stop):
    """By hand: logits with every label of the rows on top, then with one label second."""
    encoder, d_vocab = Encoder.of(gpt2), gpt2.cfg.d_vocab
    batch = Batch.of(rows(gpt2, LONG), encoder.templated_row("{} is a", LONG.subject))
    assert len(batch.labels) > 9
    logits = torch.zeros(len(batch.at), d_vocab)
    logits[range(len(batch.labels)), batch.labels] = 1.0
    for worse in (None, *range(len(batch.labels))):
        some = logits.clone()
        if worse is not None:
            some[worse, (batch.labels[worse] + 1) % d_vocab] = 2.0
        search = Search([batch], torch.ones(32), dataclasses.replace(FREE, stop=stop))
        search.objective(losses_of_logits(some, batch.labels))
        assert search.goes_on == (stop == "loss" or worse is not None)


def test_the_top_stop_also_stops_at_the_loss(model):
    losses = searched(model, stop="loss", steps=6)[1]
    found = searched(model, stop="top", steps=6, stop_loss=losses[1] + 1e-4)[1]
    assert len(found) <= 2


# ---------------------------------------------------------------- prefixes that take turns


def test_each_step_takes_the_next_prefix(gpt2):
    """The loss of a step is that of one prefix, at the delta of that step; then it begins again."""
    every = rows(gpt2)
    for n in (1, 2, 3, 4):
        delta, losses = searched(gpt2, steps=n, prefixes_a_step=1)
        each = [scored(gpt2, row, delta)[0] for row in every]
        assert losses[-1] == pytest.approx(each[(n - 1) % 3], rel=1e-3)
        assert min(abs(each[i] - each[i - 1]) for i in range(3)) > 0.02  # they can be told apart


def test_groups_are_of_even_size_and_the_bare_prompt_is_in_the_first(gpt2):
    delta, losses = searched(gpt2, steps=2, prefixes_a_step=2)
    each = [scored(gpt2, row, delta)[0] for row in rows(gpt2)]
    assert losses[1] == pytest.approx(each[1], rel=1e-3)
    start = [scored(gpt2, row, 0 * delta)[0] for row in rows(gpt2)]
    assert losses[0] == pytest.approx((start[0] + start[2]) / 2, rel=1e-3)
    whole = searched(gpt2, steps=2)[1]
    assert whole == searched(gpt2, steps=2, prefixes_a_step=3)[1]
    assert whole == searched(gpt2, steps=2, prefixes_a_step=99)[1]
    assert abs(whole[0] - losses[0]) > 1e-2  # the control


def test_the_keys_are_the_mean_over_all_prefixes(model):
    one, other = (
        small_edit(model, config=dataclasses.replace(FREE, steps=2, prefixes_a_step=n))
        for n in (None, 1)
    )
    torch.testing.assert_close(one.k_star, other.k_star)
    torch.testing.assert_close(one.u, other.u)
    assert not torch.allclose(one.lam, other.lam)
    released = dataclasses.replace(RomeConfig.released(clamp=4.0), steps=1)
    one, other = (
        small_edit(model, config=dataclasses.replace(released, prefixes_a_step=n))
        for n in (None, 1)
    )
    torch.testing.assert_close(one.k_star, other.k_star)  # the bare prompt's


def test_a_stop_looks_at_the_last_step_of_every_group(gpt2):
    losses = searched(gpt2, steps=9, prefixes_a_step=1)[1]
    low = min(range(8), key=losses.__getitem__)
    alone = losses[low] + 1e-3
    cycles = [sum(losses[i - 2 : i + 1]) / 3 for i in range(2, 9)]
    found = searched(gpt2, steps=9, prefixes_a_step=1, stop_loss=alone)[1]
    first = next((i + 3 for i, mean in enumerate(cycles) if mean < alone), 9)
    assert len(found) == first
    above = max(losses) + 1  # every loss is below it, but no group may be left out
    assert len(searched(gpt2, steps=9, prefixes_a_step=1, stop_loss=above)[1]) == 3


def test_the_top_stop_of_groups(gpt2):
    """Each group had the target on top in its last step, and one had not in the step before."""
    losses = searched(gpt2, stop="top", prefixes_a_step=1)[1]
    assert 3 < len(losses) < FREE.steps
    every, top = rows(gpt2), []
    for n in range(len(losses) - 3, len(losses) + 1):
        delta = searched(gpt2, steps=n, prefixes_a_step=1)[0]
        top.append(scored(gpt2, every[(n - 1) % 3], delta)[1])
    assert top == [False, True, True, True]


def test_a_step_with_fewer_prefixes_runs_fewer_rows(gpt2, monkeypatch):
    ran, real = [], PartialForward.losses

    def counted(self, *arguments):
        ran.append(len(self.tokens))
        return real(self, *arguments)

    monkeypatch.setattr(PartialForward, "losses", counted)
    searched(gpt2, steps=4)
    searched(gpt2, steps=4, prefixes_a_step=1)
    assert ran[-8:-4] == [3] * 4  # the KL row is the start of the bare prompt's
    assert ran[-4:] == [1, 2, 2, 1]  # the other groups have it as a row


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", (2, 3))
def test_searches_that_stop_at_the_top_leave_the_batch_and_change_nothing(gpt2, batch_size):
    """Which prefixes a step takes depends on the request only, not on what else is searched."""
    requests = [NEAR, LONG, EditRequest("{} is", "Rome", "the"), NEAR]
    config = dataclasses.replace(FREE, stop="top", prefixes_a_step=2, steps=25)
    known = {"layer": LAYER, "second_moment": random_moment(len(w_out(gpt2, LAYER)))}
    known |= {"prefixes": PREFIXES, "config": config, "progress": False}
    alone = [compute_rome_edit(gpt2, request, **known) for request in requests]
    together = compute_rome_edits(gpt2, requests, batch_size=batch_size, **known)
    for one, other in zip(together, alone, strict=True):
        assert (one.delta() - other.delta()).norm() < 1e-3 * other.delta().norm()
        assert one.health.losses == pytest.approx(other.health.losses, rel=1e-2, abs=1e-3)
    assert len({len(edit.health.losses) for edit in alone}) > 1  # some leave before others


@pytest.mark.parametrize("field", [{"stop": "never"}, {"prefixes_a_step": 0}])
def test_rules_that_there_are_not_are_refused(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        RomeConfig(**field)
