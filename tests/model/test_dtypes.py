"""Models in bfloat16 and float16: what is computed is wide, and what rounding costs is said."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import CLASSES, make_model
from helpers.rome_setting import LAYER, NEAR, factored_edit, random_edit, random_moment, small_edit

from transformer_lens_rome import EditRequest, applied, apply_edit, get_method
from transformer_lens_rome.edits.measure import measured
from transformer_lens_rome.model import passes
from transformer_lens_rome.model.adapter import Point, Weight, parameter, w_out, weight_hash
from transformer_lens_rome.prompts.encoder import Encoder
from transformer_lens_rome.statistics.collect import collect_second_moment

HALVES = [torch.bfloat16, torch.float16]
PLACES = [Weight("W_in", 0), Weight("W_out", LAYER)]


@pytest.fixture(params=CLASSES)
def any_class(request):
    return request.param


def in_dtype(model_class, tokenizer, dtype):
    model = make_model(model_class, "llama", tokenizer).to(dtype)
    model.cfg.dtype = dtype
    return model


@pytest.mark.parametrize("dtype", HALVES)
def test_the_solve_is_wide(any_class, bos_tokenizer, dtype):
    """Both u and Λ keep Eq. 2 to float32 rounding, which half precision would miss by far."""
    model = in_dtype(any_class, bos_tokenizer, dtype)
    edit = small_edit(model)
    moment = random_moment(len(w_out(model, LAYER)))
    assert all(tensor.dtype == torch.float32 for tensor in edit.tensors().values())
    u = torch.linalg.solve(moment.C, edit.k_star.double())
    assert (edit.u - u).norm() / u.norm() < 1e-5
    old = edit.k_star.double() @ w_out(model, LAYER).detach().double()
    new = old + (edit.k_star.double() @ edit.u.double()) * edit.lam.double()
    moved = (edit.v_star - old).norm()
    assert moved > 0.01 * old.norm()
    # the old value was read from the model, which rounds it
    assert (edit.v_star - new).norm() < 8 * torch.finfo(dtype).eps * old.norm()


@pytest.mark.parametrize("dtype", HALVES)
def test_statistics_add_the_model_s_keys_in_float64(any_class, bos_tokenizer, dtype):
    model = in_dtype(any_class, bos_tokenizer, dtype)
    ids, point = list(range(5, 60)), Point("key", LAYER)
    known = {"max_tokens": len(ids), "batch_size": 1, "progress": False}
    moment = collect_second_moment(model, [ids], LAYER, **known)
    row = torch.tensor([[Encoder.of(model).bos_id, *ids][: len(ids)]])
    keys = passes.read(model, row, [point])[point][0]
    assert keys.dtype == dtype and moment.n_tokens == len(keys)
    exact = keys.double().T @ keys.double()
    assert (moment.sum_kk - exact).norm() < 1e-6 * exact.norm()  # products are of float32
    narrow = (keys.T @ keys).double()
    assert (moment.sum_kk - exact).norm() < 0.1 * (narrow - exact).norm()


@pytest.mark.parametrize("dtype", HALVES)
def test_edits_are_added_wide_and_rounded_once(any_class, bos_tokenizer, dtype):
    model = in_dtype(any_class, bos_tokenizer, dtype)
    base, weight = w_out(model, LAYER).detach().clone(), w_out(model, LAYER)
    edits = [random_edit(model, seed=seed, strength=0.01) for seed in range(6)]
    with applied(model, *edits):
        once = (base.float() + sum(edit.delta() for edit in edits)).to(dtype)
        each = base.clone()
        for edit in edits:
            each += edit.delta().to(dtype)
        assert torch.allclose(weight, once, rtol=2 * torch.finfo(dtype).eps, atol=0)
        exact = base.double() + sum(edit.delta().double() for edit in edits)
        assert (weight.double() - exact).norm() < 0.9 * (each.double() - exact).norm()
    assert torch.equal(w_out(model, LAYER), base)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("make", [random_edit, lambda model: factored_edit(model, PLACES)])
def test_the_rounding_error_is_what_the_weights_lost(any_class, bos_tokenizer, dtype, make):
    model = in_dtype(any_class, bos_tokenizer, dtype)
    edit = make(model)
    found = measured(model, Encoder.of(model), edit)
    changes = {where: change.double() for where, change in edit.changes().items()}
    before = {where: parameter(model, where).detach().double() for where in changes}
    with applied(model, edit):
        lost = [parameter(model, w).detach().double() - before[w] - changes[w] for w in changes]
    error = sum(x.square().sum() for x in lost).sqrt()
    error = error / sum(x.square().sum() for x in changes.values()).sqrt()
    assert found.rounding_error == pytest.approx(error.item(), rel=0.02)
    assert (found.rounding_error < 1e-5) == (dtype == torch.float32)
    size = sum(x.square().sum() for x in changes.values()) / sum(
        x.square().sum() for x in before.values()
    )
    assert found.relative_norm == pytest.approx(size.sqrt().item(), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALVES)
def test_an_edit_too_small_for_the_dtype_says_so(any_class, bos_tokenizer, dtype):
    model = in_dtype(any_class, bos_tokenizer, dtype)
    edit = random_edit(model)
    sound = measured(model, Encoder.of(model), edit)
    assert not [text for text in sound.warnings if "rounding" in text]
    tiny = edit.scale(1e-5)
    found = measured(model, Encoder.of(model), tiny)
    (warning,) = [text for text in found.warnings if "rounding" in text]
    name = str(dtype).split(".")[1]
    assert f"rounding to {name} loses" in warning and "load the model in float32" in warning
    assert found.rounding_error > 0.5
    wide = in_dtype(any_class, bos_tokenizer, torch.float32)
    assert not measured(wide, Encoder.of(wide), _on(wide, tiny)).warnings


def _on(model, edit):
    """The same edit, as if made on this model."""
    return dataclasses.replace(edit, model_hash=weight_hash(w_out(model, LAYER)))


@pytest.mark.parametrize("name", ["rome", "ft", "ft+l", "kn"])
def test_every_untrained_method_says_what_rounding_cost(any_class, bos_tokenizer, name):
    model = in_dtype(any_class, bos_tokenizer, torch.bfloat16)
    moment = random_moment(len(w_out(model, LAYER)))
    rome = {"layer": LAYER, "second_moment": moment, "prefixes": ("",)}
    method = get_method(name, **(rome if name == "rome" else {}))
    request = EditRequest(NEAR.prompt, NEAR.subject, NEAR.target_new, "Seattle")
    assert method.compute(model, request).health.rounding_error >= 0


def test_float64_is_not_narrowed(any_class, bos_tokenizer):
    """A float64 weight gets base + delta in float64, and its bytes back."""
    model = in_dtype(any_class, bos_tokenizer, torch.float64)
    base = w_out(model, LAYER).detach().clone()
    edits = [random_edit(model, seed=seed) for seed in range(2)]
    done = [apply_edit(model, edit) for edit in edits]
    expected = base + edits[0].delta().double() + edits[1].delta().double()
    assert torch.equal(w_out(model, LAYER), expected) and expected.dtype == torch.float64
    for one in done:
        one.revert()
    assert torch.equal(w_out(model, LAYER), base)
