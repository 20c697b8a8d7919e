"""Health: what an edit reports of itself is what can be measured on the model."""

import dataclasses

import pytest
import torch
from conftest import make_model
from helpers.rome_setting import (
    CONFIG,
    LAYER,
    NEAR,
    PREFIXES,
    REQUEST,
    keys_and_values,
    random_moment,
    small_edit,
)

from transformer_lens_rome import RomeConfig, SecondMoment, applied, target_log_probs
from transformer_lens_rome.edits.kinds import EditHealth
from transformer_lens_rome.methods.rome_health import _suspicions
from transformer_lens_rome.model.adapter import w_out
from transformer_lens_rome.prompts.encoder import Encoder

STRONG = RomeConfig(steps=20, lr=0.5, clamp=20.0, stop="loss")


@pytest.fixture(params=["gpt2", "gemma3"])
def model(request, model_class, tokenizer, bos_tokenizer):
    known = bos_tokenizer if request.param == "gemma3" else tokenizer
    return make_model(model_class, request.param, known)


def p_target(model):
    return target_log_probs(model, [REQUEST.text], [REQUEST.target_new])[0].sum().exp().item()


@pytest.mark.parametrize("key", ["mean", "released"])
def test_every_number_is_the_one_that_can_be_measured(model, key):
    moment = random_moment(len(w_out(model, LAYER)))
    edit = small_edit(model, second_moment=moment, config=dataclasses.replace(CONFIG, key=key))
    found = edit.health
    assert found.p_before == pytest.approx(p_target(model), rel=1e-4)
    with applied(model, edit):
        assert found.p_after == pytest.approx(p_target(model), rel=1e-3)
    assert found.p_after != pytest.approx(found.p_before, rel=1e-2)  # control
    encoder = Encoder.of(model)
    rows = [encoder.templated_row(REQUEST.prompt, REQUEST.subject, p) for p in PREFIXES]
    keys = keys_and_values(model, rows)[0]
    k_mean = keys.mean(0)
    cosine = (keys[0] @ k_mean / keys[0].norm() / k_mean.norm()).item()
    assert found.key_agreement == pytest.approx(cosine, abs=1e-4)
    assert found.k_C_k == pytest.approx((k_mean.double() @ moment.solve(k_mean)).item(), rel=1e-4)
    ratio = edit.delta().norm() / w_out(model, LAYER).norm()
    assert found.relative_norm == pytest.approx(ratio.item(), rel=1e-4)
    assert found.subject_token.strip() in REQUEST.subject.split()[-1]
    assert len(found.losses) == CONFIG.steps


def test_an_edit_that_works_and_the_same_edit_again(gpt2):
    edit = small_edit(gpt2, NEAR, config=STRONG)
    assert edit.health.p_after > 0.5 > edit.health.p_before
    assert not any("the target's probability" in text for text in edit.health.warnings)
    with applied(gpt2, edit):
        again = small_edit(gpt2, NEAR, config=dataclasses.replace(STRONG, steps=2))
    assert any("the target already" in text for text in again.health.warnings)
    assert not any("the target already" in text for text in edit.health.warnings)
    assert again.health.p_before == pytest.approx(edit.health.p_after, rel=1e-3)


def test_an_edit_that_does_nothing_warns_in_the_log_and_in_itself(gpt2, caplog):
    edit = small_edit(gpt2, config=dataclasses.replace(CONFIG, steps=1))
    assert not edit.delta().any() and edit.health.p_after == edit.health.p_before
    (text,) = [text for text in edit.health.warnings if "larger clamp" in text]
    assert f"{REQUEST.text} -> {REQUEST.target_new}: {text}" in caplog.text


SOUND = EditHealth(
    p_before=0.01, p_after=0.9, relative_norm=0.1, k_C_k=1.0, key_agreement=0.9, losses=(3.0, 0.1)
)


@pytest.mark.parametrize(
    ("changes", "agreement", "known", "words"),
    [
        ({}, None, False, None),
        ({}, 0.9, False, None),
        ({}, None, True, "already"),
        ({"p_after": 0.05, "p_before": 0.01}, None, False, "0.050 after the edit"),
        ({"p_after": 0.3, "p_before": 0.4}, None, False, "it was 0.400"),
        ({"relative_norm": 0.7}, None, False, "0.70 times the weight's norm"),
        ({"key_agreement": 0.2}, None, False, "agree only to 0.20"),
        ({"k_C_k": 10.0}, None, False, "denominator is 0.10 of the mean key's"),
        ({"k_C_k": -1.0}, None, False, "denominator is -1.00"),
        ({}, 0.2, False, "agreement 0.20"),
    ],
)
def test_each_suspicion_has_its_warning_and_no_other(gpt2, changes, agreement, known, words):
    unit = torch.eye(128)[0]
    edit = dataclasses.replace(small_edit(gpt2), k_star=unit, u=unit)  # u·k* = 1
    moment = random_moment(128)
    moment.half_agreement = agreement
    found = _suspicions(edit, dataclasses.replace(SOUND, **changes), known, moment)
    assert len(found) == (words is not None)
    assert words is None or words in found[0]


@pytest.mark.parametrize(
    ("tokens", "warned"), [(12, True), (130, True), (128, False), (256, False)]
)
def test_few_tokens_are_warned_of_and_the_identity_is_not(gpt2, tokens, warned):
    """128 dimensions; the identity counts as one token for each."""
    unit = torch.eye(128)[0]
    edit = dataclasses.replace(small_edit(gpt2), k_star=unit, u=unit)
    moment = SecondMoment.from_moment(torch.eye(128), tokens)
    found = _suspicions(edit, SOUND, False, moment)
    assert [f"only {tokens} tokens" in text for text in found] == [True] * warned
