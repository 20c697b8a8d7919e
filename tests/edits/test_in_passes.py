"""An edit that acts on its texts of a pass gives what the written edit gives."""

from __future__ import annotations

import pytest
import torch
from conftest import make_model
from helpers.matrices import matrices
from helpers.rome_setting import LAYER, factored_edit, random_edit

from transformer_lens_rome import applied, apply_edit
from transformer_lens_rome.edits import base_bytes, in_passes
from transformer_lens_rome.edits.in_passes import additions, score_edited
from transformer_lens_rome.model import adapter
from transformer_lens_rome.model.adapter import Point, Weight, parameter, w_out, weight_hash
from transformer_lens_rome.prompts.encoder import Encoder
from transformer_lens_rome.prompts.scores import score_rows

PROMPTS = ("The old man is", "Rome is in", "The best of times was", "The old", "The old man is")
OWNERS = (2, 0, 1, 2, 0)
"""The edit of each prompt; the first and the last are one prompt under two edits."""
BIAS = Weight("b_out", LAYER)


def rows_of(model):
    encoder = Encoder.of(model)
    return [encoder.row(prompt, target=" the best") for prompt in PROMPTS]


def by_hand(model, edits, rows=None):
    """Each row scored with its edit written into the model."""
    scores = []
    for row, owner in zip(rows or rows_of(model), OWNERS, strict=True):
        with applied(model, edits[owner]):
            scores += score_rows(model, [row])
    return scores


def distance(one, other):
    return max((a.log_probs - b.log_probs).abs().max().item() for a, b in zip(one, other))


def three(model, kind):
    """Three edits of one kind."""
    if kind == "rank one":
        return [random_edit(model, seed=seed, strength=0.3) for seed in range(3)]
    if kind == "with a bias":
        known = {"rank": 2, "strength": 0.3, "bias": parameter(model, BIAS) is not None}
        return [random_edit(model, seed=seed, **known) for seed in range(3)]
    return [factored_edit(model, matrices(model), seed=seed, strength=0.3) for seed in range(3)]


@pytest.fixture
def unwritten(monkeypatch):
    """From its call on, writing a weight is an error."""

    def forbid():
        def write(*_):
            raise AssertionError("a weight was written")

        monkeypatch.setattr(base_bytes, "write", write)

    return forbid


@pytest.mark.parametrize("kind", ("rank one", "with a bias", "every matrix"))
@pytest.mark.parametrize("shape", ("gpt2", "gptj", "llama", "gemma3", "opt"))
def test_it_is_the_written_edit(model_class, shape, kind, tokenizer_of, unwritten):
    model = make_model(model_class, shape, tokenizer_of(shape))
    edits = three(model, kind)
    others = score_edited(model, rows_of(model), edits[::-1], OWNERS)  # and the trials
    before, expected = weight_hash(w_out(model, LAYER)), by_hand(model, edits)
    unwritten()
    found = score_edited(model, rows_of(model), edits, OWNERS)
    assert distance(found, expected) < 1e-4
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.correct, other.correct)
    assert distance(others, expected) > 0.01  # the control: each text has its own edit
    assert distance(score_rows(model, rows_of(model)), expected) > 0.01
    assert weight_hash(w_out(model, LAYER)) == before


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_what_acts_is_rounded_as_what_is_written(model_class, bos_tokenizer, dtype):
    """The additions are the exact difference of the weights; the scores differ by rounding."""
    model = make_model(model_class, "llama", bos_tokenizer).to(dtype)
    model.cfg.dtype = dtype
    edits = [random_edit(model, seed=seed, strength=0.1) for seed in range(3)]
    where, old = Weight("W_out", LAYER), w_out(model, LAYER).detach().clone()
    added = additions(model, edits[0])[where]
    with applied(model, edits[0]):
        assert torch.equal(old.float() + added, w_out(model, LAYER).detach().float())
    assert (added - edits[0].delta()).norm() > 1e-4 * added.norm()  # rounding is part of it
    found = score_edited(model, rows_of(model), edits, OWNERS)
    assert distance(found, by_hand(model, edits)) < 64 * torch.finfo(dtype).eps


def test_it_acts_on_top_of_the_edits_that_are_on(gpt2):
    edits = three(gpt2, "rank one")
    with apply_edit(gpt2, random_edit(gpt2, seed=7, strength=0.3)):
        more = three(gpt2, "rank one")
        found, expected = score_edited(gpt2, rows_of(gpt2), more, OWNERS), by_hand(gpt2, more)
        assert distance(found, expected) < 1e-4
    assert distance(score_edited(gpt2, rows_of(gpt2), edits, OWNERS), expected) > 0.01


def test_a_model_on_which_it_would_be_wrong_gets_written_edits(gpt2, monkeypatch, caplog):
    """Another input than the matrix's is noticed before it is used."""
    edits = three(gpt2, "rank one")
    expected = by_hand(gpt2, edits)
    ends = Point("pre", LAYER), Point("value", LAYER)
    monkeypatch.setattr(adapter, "ends", lambda model, where: ends)
    found = score_edited(gpt2, rows_of(gpt2), edits, OWNERS)
    assert distance(found, expected) < 1e-5
    assert "written one by one" in caplog.text and "results differ" in caplog.text


def test_users_hooks_see_written_edits(gpt2, monkeypatch):
    """A hook that acts on the first text of a batch would act on another edit's text."""
    edits = three(gpt2, "rank one")

    def first(activation, hook):
        activation[0] = 0
        return activation

    gpt2.add_hook(f"blocks.{LAYER}.hook_resid_post", first)
    try:
        acted = []
        monkeypatch.setattr(in_passes, "acting", lambda *_: acted.append(1))
        score_edited(gpt2, rows_of(gpt2), edits, OWNERS)
    finally:
        gpt2.reset_hooks()
    assert not acted


def test_an_edit_that_would_break_the_weight_is_refused(gpt2):
    edits = three(gpt2, "rank one")
    edits[1].lam.fill_(torch.inf)
    with pytest.raises(ValueError, match="NaN or infinity into W_out of layer 1"):
        score_edited(gpt2, rows_of(gpt2), edits, OWNERS)


def test_an_edit_of_another_shape_is_refused(gpt2, gemma3):
    edits = [random_edit(gpt2), random_edit(gemma3)]
    if edits[0].delta().shape != edits[1].delta().shape:
        with pytest.raises(ValueError, match="it was made on another model"):
            score_edited(gpt2, rows_of(gpt2)[:2], edits, (0, 1))
