"""A device that computes something else than the CPU is named before the first edit or trace."""

import copy
import logging
import re

import pytest
import torch
from conftest import make_model
from helpers.rome_setting import NEAR

from transformer_lens_rome import causal_trace, top_tokens
from transformer_lens_rome.model import device_check
from transformer_lens_rome.model.fingerprint import Fingerprint

CPU = torch.device("cpu")


@pytest.fixture(params=("gpt2", "gemma3", "gptj", "mixtral"))
def model(request, model_class, tokenizer_of):
    return make_model(model_class, request.param, tokenizer_of(request.param))


@pytest.fixture
def on_a_device(monkeypatch):
    """The CPU's own arithmetic, under the name of another device."""
    monkeypatch.setattr(device_check, "_devices", lambda model: {CPU})


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
    found = list(device_check.compared(model, {CPU}))
    layers = sorted({0, model.cfg.n_layers // 2, model.cfg.n_layers - 1})
    assert [one.part for one in found] == [*(f"layer {i}" for i in layers), "the unembedding"]
    assert max(one.size for one in found) < 0.1
    before.check(model, "comparing")


def test_a_wrong_layer_is_named(model, on_a_device, monkeypatch, caplog):
    broken = model.cfg.n_layers - 1
    break_layer(model, broken)
    monkeypatch.setattr(device_check.users_hooks, "has_hooks", lambda model: False)
    top_tokens(model, "The Space Needle is", 1)
    (said,) = [record.getMessage() for record in caplog.records if "the CPU" in record.getMessage()]
    assert said.startswith(f"cpu gives other results than the CPU for layer {broken}: ")
    times = float(re.search(r"is (\d+) times", said)[1])
    assert 1000 < times <= 2000  # twice what the block adds, in units of a thousandth
    caplog.clear()
    causal_trace(model, NEAR.subject + " is in", NEAR.subject, progress=False)
    assert "the CPU" not in caplog.text  # each device once


@pytest.mark.parametrize(("dtype", "warns"), [(torch.float32, True), (torch.bfloat16, False)])
def test_half_precision_may_differ_more(dtype, warns):
    there = torch.linspace(1, 2, 64).to(dtype)
    here = (there.float() * 1.01).to(dtype)
    assert (device_check._size(here, there, 0 * there) > 1) == warns
    assert device_check._size(-there, there, 0 * there) > 1


def test_a_copy_shares_nothing_with_the_model(model):
    own = {tensor.data_ptr() for tensor in model.blocks[0].state_dict().values() if tensor.numel()}
    copied = device_check._copy_on_cpu(model.blocks[0]).state_dict()
    assert copied.keys() == model.blocks[0].state_dict().keys()
    assert not own & {tensor.data_ptr() for tensor in copied.values()}


def test_nothing_is_compared_on_a_cpu_or_on_meta(gpt2, monkeypatch):
    monkeypatch.setattr(device_check, "compared", lambda *_: pytest.fail("it was compared"))
    top_tokens(gpt2, "The Space Needle is", 1)
    assert device_check._devices(torch.nn.Linear(2, 2, device="meta")) == set()


def test_the_users_hooks_see_no_pass_of_it(gpt2, on_a_device, monkeypatch):
    seen = []
    gpt2.add_hook("blocks.0.hook_resid_pre", lambda x, hook: seen.append(x.shape))
    monkeypatch.setattr(device_check, "compared", lambda *_: pytest.fail("it was compared"))
    top_tokens(gpt2, "The Space Needle is", 1)
    gpt2.reset_hooks()
    assert len(seen) == 1
    monkeypatch.setattr(device_check, "compared", lambda *_: [])
    device_check.compare_with_cpu(gpt2)
    assert gpt2._rome_devices == {CPU}


@pytest.mark.parametrize(
    "fault", [AttributeError("no part"), torch.OutOfMemoryError("no room"), copy.Error("no copy")]
)
def test_what_was_found_before_a_fault_is_said(gpt2, on_a_device, monkeypatch, caplog, fault):
    def fail(model, devices):
        yield device_check.Compared("layer 0", CPU, float("nan"))  # no rounding
        raise fault

    monkeypatch.setattr(device_check, "compared", fail)
    with caplog.at_level(logging.INFO):
        top_tokens(gpt2, "The Space Needle is", 1)
    assert f"not all of cpu was compared with the CPU: {fault}" in caplog.text
    assert "other results than the CPU for layer 0: " in caplog.text
