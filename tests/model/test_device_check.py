"""A device that computes something else than the CPU is named before the first edit or trace."""

import logging

import pytest
import torch
from conftest import make_model
from helpers.rome_setting import NEAR

from transformer_lens_rome import causal_trace, top_tokens
from transformer_lens_rome.model import device_check
from transformer_lens_rome.model.fingerprint import Fingerprint

DEVICE = torch.device("mps")


@pytest.fixture(params=("gpt2", "gemma3", "gptj"))
def model(request, model_class, tokenizer_of):
    return make_model(model_class, request.param, tokenizer_of(request.param))


@pytest.fixture
def on_a_device(monkeypatch):
    """The CPU's own arithmetic, under the name of another device."""
    monkeypatch.setattr(device_check, "_devices", lambda model: {DEVICE})


def break_layer(model, layer):
    """Make a block wrong as long as it has its own weights, and right with copies of them."""
    own = {parameter.data_ptr() for parameter in model.blocks[layer].parameters()}

    def negate(block, args, output):
        if {parameter.data_ptr() for parameter in block.parameters()} != own:
            return None
        residual = args[0]
        first = output[0] if isinstance(output, tuple) else output
        wrong = 2 * residual - first  # what the block adds has the other sign
        return (wrong, *output[1:]) if isinstance(output, tuple) else wrong

    return model.blocks[layer].register_forward_hook(negate)


def test_a_sound_device_is_as_the_cpu(model):
    before = Fingerprint.of(model)
    found = dict(device_check.errors(model))
    assert list(found) == ["layer 0", "layer 1", "layer 2", "the unembedding"][-len(found) :]
    assert max(found.values()) < 1e-6
    before.check(model, "comparing")


def test_a_wrong_layer_is_named(model, on_a_device, monkeypatch, caplog):
    broken = model.cfg.n_layers - 1
    break_layer(model, broken)
    monkeypatch.setattr(device_check.users_hooks, "has_hooks", lambda model: False)
    top_tokens(model, "The Space Needle is", 1)
    assert f"mps gives other results than the CPU for layer {broken}: " in caplog.text
    assert "2e+00" in caplog.text  # twice what the block adds
    caplog.clear()
    causal_trace(model, NEAR.subject + " is in", NEAR.subject, progress=False)
    assert "mps" not in caplog.text  # each device once


def test_nothing_is_compared_on_a_cpu(gpt2, monkeypatch):
    monkeypatch.setattr(device_check, "errors", lambda model: pytest.fail("it was compared"))
    top_tokens(gpt2, "The Space Needle is", 1)


def test_the_users_hooks_see_no_pass_of_it(gpt2, on_a_device, monkeypatch):
    seen = []
    gpt2.add_hook("blocks.0.hook_resid_pre", lambda x, hook: seen.append(x.shape))
    monkeypatch.setattr(device_check, "errors", lambda model: pytest.fail("it was compared"))
    top_tokens(gpt2, "The Space Needle is", 1)
    gpt2.reset_hooks()
    assert len(seen) == 1
    monkeypatch.setattr(device_check, "errors", lambda model: [("layer 0", 0.5)])
    device_check.compare_with_cpu(gpt2)
    assert gpt2._rome_devices == {DEVICE}


def test_a_model_that_cannot_be_compared_is_used(gpt2, on_a_device, monkeypatch, caplog):
    def fail(model):
        raise AttributeError("no such part")

    monkeypatch.setattr(device_check, "errors", fail)
    with caplog.at_level(logging.INFO):
        device_check.compare_with_cpu(gpt2)
    assert "mps is not compared with the CPU: no such part" in caplog.text


def test_nan_is_no_rounding(gpt2, on_a_device, monkeypatch, caplog):
    monkeypatch.setattr(device_check, "errors", lambda model: [("layer 0", float("nan"))])
    device_check.compare_with_cpu(gpt2)
    assert "for layer 0" in caplog.text
