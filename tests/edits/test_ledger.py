"""Edits go on a model and come off it to the byte, in any order and through any error."""

import copy
import dataclasses
import random

import pytest
import torch
from conftest import make_model
from helpers import tiny_models
from helpers.rome_setting import LAYER, random_edit

from transformer_lens_rome import AppliedEdit, DenseEdit, applied, apply_edit, revert_all
from transformer_lens_rome.edits.ledger import active_edits, base_weight, without
from transformer_lens_rome.model import adapter
from transformer_lens_rome.model.adapter import Weight, w_out, weight_hash


def weights(model):
    return [w_out(model, layer).detach().clone() for layer in range(model.cfg.n_layers)]


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


# ---------------------------------------------------------------- one edit


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("shape", ["gpt2", "gemma3"])
def test_apply_adds_delta_and_revert_restores_the_bytes(model_class, shape, rank, bos_tokenizer):
    model = make_model(model_class, shape, bos_tokenizer)
    before, edit = weights(model), random_edit(model, rank=rank)
    undo = apply_edit(model, edit)
    expected = [*before[:LAYER], before[LAYER] + edit.delta(), *before[LAYER + 1 :]]
    assert same(weights(model), expected)
    assert not same(weights(model), before)
    assert undo.active and undo.edit is edit and active_edits(model, LAYER) == (edit,)
    assert torch.equal(base_weight(model, Weight("W_out", LAYER)), before[LAYER])
    undo.revert()
    assert same(weights(model), before)
    assert not undo.active and active_edits(model, LAYER) == ()
    undo.revert()  # off already: nothing happens
    assert same(weights(model), before)


def test_an_edit_may_change_the_bias_too(gpt2, tmp_path):
    where = Weight("b_out", LAYER)
    before, bias = weights(gpt2), adapter.parameter(gpt2, where).detach().clone()
    edit = random_edit(gpt2, rank=3, bias=True)
    edit.save(tmp_path / "edit")
    edit = DenseEdit.load(tmp_path / "edit")
    double = edit.scale(2.0)
    with applied(gpt2, edit):
        assert torch.equal(adapter.parameter(gpt2, where), bias + edit.bias)
        with applied(gpt2, double):
            assert torch.equal(adapter.parameter(gpt2, where), bias + edit.bias + 2 * edit.bias)
            with without(gpt2, edit):
                assert torch.equal(adapter.parameter(gpt2, where), bias + 2 * edit.bias)
        assert torch.equal(base_weight(gpt2, where), bias)
    assert same(weights(gpt2), before) and torch.equal(adapter.parameter(gpt2, where), bias)
    apply_edit(gpt2, edit)
    revert_all(gpt2)
    assert same(weights(gpt2), before) and torch.equal(adapter.parameter(gpt2, where), bias)


def test_a_bias_that_cannot_be_changed_leaves_the_weight_alone(gpt2, tokenizer):
    before, edit = weights(gpt2), random_edit(gpt2, bias=True, rank=2)
    bad = dataclasses.replace(edit, bias=edit.bias + torch.inf)
    with pytest.raises(ValueError, match="b_out of layer"):
        apply_edit(gpt2, bad)
    assert same(weights(gpt2), before) and active_edits(gpt2, LAYER) == ()
    with pytest.raises(ValueError, match="do not fit together"):
        dataclasses.replace(edit, bias=edit.bias[:-1])


def test_an_edit_too_large_for_memory_is_refused_before_it_is_made(gpt2):
    """Two vectors of a million numbers are a matrix of four terabytes."""
    many, edit = torch.ones(1_000_000), random_edit(gpt2)
    huge = dataclasses.replace(edit, k_star=many, u=many, lam=many, v_star=many)
    with pytest.raises(ValueError, match=r"changes a W_out of shape \(1000000, 1000000\)"):
        apply_edit(gpt2, huge, force=True)


def test_an_edit_comes_off_all_its_weights_or_none(gpt2):
    edit, bias = random_edit(gpt2, bias=True, rank=2), Weight("b_out", LAYER)
    undo = apply_edit(gpt2, edit)
    with torch.no_grad():
        w_out(gpt2, LAYER)[0, 0] += 1
    edited = adapter.parameter(gpt2, bias).detach().clone()
    with pytest.raises(ValueError, match="changed by something else"):
        undo.revert()
    assert torch.equal(adapter.parameter(gpt2, bias), edited) and undo.active
    undo.revert(force=True)
    assert not undo.active


def test_the_edit_reaches_the_forward_pass(gpt2):
    tokens = torch.arange(1, 9)[None]
    before = gpt2(tokens)
    with applied(gpt2, random_edit(gpt2)) as model:
        assert not torch.allclose(model(tokens), before, atol=1e-3)
    assert torch.equal(gpt2(tokens), before)


def test_apply_and_revert_leave_everything_else(gemma3):
    parameters = dict(gemma3.named_parameters())
    frozen = list(parameters)[::2]
    for name in frozen:
        parameters[name].requires_grad_(False)
    keys = list(gemma3.state_dict())
    flags = {name: p.requires_grad for name, p in parameters.items()}
    with applied(gemma3, random_edit(gemma3)):
        found = dict(gemma3.named_parameters())
        assert {name: p.requires_grad for name, p in found.items()} == flags
        assert all(found[name] is parameters[name] for name in parameters)
        assert list(gemma3.state_dict()) == keys
    assert list(gemma3.state_dict()) == keys
    assert not gemma3.training and all(p.grad is None for p in parameters.values())
    assert not any(hasattr(p, "_rome_ledger") for p in parameters.values())


@pytest.mark.skipif(not tiny_models.has_bridge(), reason="no bridge")
def test_bfloat16_is_exact_too(tokenizer):
    model = make_model("bridge", "gpt2", tokenizer, dtype=torch.bfloat16)
    before, edits = weights(model), [random_edit(model, seed=n) for n in range(5)]
    done = [apply_edit(model, edit) for edit in edits]
    assert w_out(model, LAYER).dtype == torch.bfloat16 and not same(weights(model), before)
    for undo in done[::2] + done[1::2]:
        undo.revert()
    assert same(weights(model), before)


# ---------------------------------------------------------------- several edits


@pytest.mark.parametrize("seed", range(4))
def test_ten_edits_undone_in_any_order(gpt2, tokenizer, model_class, seed):
    """After each undo the weights are those that the other edits alone would have given."""
    draw = random.Random(seed)
    edits = [random_edit(gpt2, layer=n % 2, seed=n, rank=1 + n % 3) for n in range(10)]
    order, undo_order = draw.sample(edits, 10), draw.sample(range(10), 10)
    fresh = make_model(model_class, "gpt2", tokenizer)
    before = weights(gpt2)
    done = [apply_edit(gpt2, edit) for edit in order]
    off = set()
    for index in undo_order:
        done[index].revert()
        off.add(index)
        with applied(fresh, *(edit for i, edit in enumerate(order) if i not in off)):
            assert same(weights(gpt2), weights(fresh))
    assert same(weights(gpt2), before) and same(weights(fresh), before)


def test_nested_blocks_peel_off_one_by_one(gpt2):
    first, second = random_edit(gpt2, seed=1), random_edit(gpt2, seed=2)
    before = weights(gpt2)
    with applied(gpt2, first):
        one = weights(gpt2)
        with applied(gpt2, second):
            both = weights(gpt2)
            assert torch.equal(both[LAYER], one[LAYER] + second.delta())
        assert same(weights(gpt2), one)
    assert same(weights(gpt2), before)
    with applied(gpt2, first, second):
        assert same(weights(gpt2), both)
    assert same(weights(gpt2), before)


def test_an_exception_inside_still_restores(gpt2):
    before = weights(gpt2)
    with pytest.raises(KeyError, match="mine"), applied(gpt2, random_edit(gpt2)):
        raise KeyError("mine")
    with pytest.raises(KeyError, match="mine"), apply_edit(gpt2, random_edit(gpt2)):
        assert not same(weights(gpt2), before)
        raise KeyError("mine")
    assert same(weights(gpt2), before)


def test_a_second_edit_that_is_refused_takes_the_first_off_again(gpt2):
    before, good = weights(gpt2), random_edit(gpt2)
    bad = dataclasses.replace(random_edit(gpt2, seed=1, layer=2), model_hash="0" * 64)
    with pytest.raises(ValueError, match="not the weight"), applied(gpt2, good, bad):
        raise AssertionError("the block must not run")
    assert same(weights(gpt2), before) and not active_edits(gpt2, LAYER)


def test_an_edit_made_on_an_edited_weight_needs_that_weight(gpt2):
    first = random_edit(gpt2, seed=1)
    with applied(gpt2, first):
        second = random_edit(gpt2, seed=2)  # its hash is that of the edited weight
        with applied(gpt2, second):
            pass
    with pytest.raises(ValueError, match="not the weight"):
        apply_edit(gpt2, second)
    with applied(gpt2, first, second):
        assert len(active_edits(gpt2, LAYER)) == 2


def test_several_edits_have_no_single_edit(gpt2):
    one, two = (apply_edit(gpt2, random_edit(gpt2, seed=seed)) for seed in (1, 2))
    several = AppliedEdit.of(gpt2, [one, two])
    with pytest.raises(ValueError, match="2 edits"):
        _ = several.edit
    with pytest.raises(ValueError, match="2 edits"):
        _ = several.health


# ---------------------------------------------------------------- refusals


def test_the_same_edit_twice_is_refused(gpt2):
    edit, before = random_edit(gpt2), weights(gpt2)
    undo = apply_edit(gpt2, edit)
    after = weights(gpt2)
    for again in (edit, dataclasses.replace(edit, u=edit.u.clone())):
        with pytest.raises(ValueError, match="already.*scale"):
            apply_edit(gpt2, again)
    assert same(weights(gpt2), after)
    undo.revert()
    assert same(weights(gpt2), before)
    with applied(gpt2, edit):  # once it is off, it may go on again
        assert same(weights(gpt2), after)


def test_an_edit_of_another_model_needs_force(gpt2, tokenizer, model_class):
    other = make_model(model_class, "gpt2", tokenizer, seed=1)
    edit, before = random_edit(other), weights(gpt2)
    with pytest.raises(ValueError, match="another model.*force=True"):
        apply_edit(gpt2, edit)
    assert same(weights(gpt2), before)
    with apply_edit(gpt2, edit, force=True):
        assert torch.equal(w_out(gpt2, LAYER), before[LAYER] + edit.delta())
    with applied(gpt2, edit, force=True):
        assert torch.equal(w_out(gpt2, LAYER), before[LAYER] + edit.delta())
    assert same(weights(gpt2), before)


@pytest.mark.parametrize("force", [False, True])
def test_a_wrong_shape_is_refused_even_with_force(gpt2, gemma3, force):
    before = weights(gpt2)
    with pytest.raises(ValueError, match=r"\(120, 32\).*\(128, 32\)"):
        apply_edit(gpt2, random_edit(gemma3), force=force)
    transposed = random_edit(gpt2, rank=2)
    transposed = dataclasses.replace(transposed, left=transposed.right.T, right=transposed.left.T)
    with pytest.raises(ValueError, match=r"\(32, 128\).*\(128, 32\)"):
        apply_edit(gpt2, transposed, force=force)
    assert same(weights(gpt2), before)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nan_never_reaches_the_weights(gpt2, poison):
    edit, before = random_edit(gpt2), weights(gpt2)
    lam = edit.lam.clone()
    lam[3] = poison
    bad = dataclasses.replace(edit, lam=lam)
    with pytest.raises(ValueError, match="NaN or infinity"):
        apply_edit(gpt2, bad)
    assert same(weights(gpt2), before) and not active_edits(gpt2, LAYER)
    with applied(gpt2, random_edit(gpt2, seed=1)):
        one = weights(gpt2)
        with pytest.raises(ValueError, match="NaN or infinity"):
            apply_edit(gpt2, bad)
        assert same(weights(gpt2), one) and len(active_edits(gpt2, LAYER)) == 1
    assert same(weights(gpt2), before)


@pytest.mark.parametrize("layer", [-1, 3])
def test_a_layer_out_of_range_is_refused(gpt2, layer):
    edit = dataclasses.replace(random_edit(gpt2), layer=layer)
    with pytest.raises(ValueError, match="layers 0 to 2"):
        apply_edit(gpt2, edit)


def test_a_change_by_others_is_neither_lost_nor_built_upon_silently(gpt2):
    before, edit = weights(gpt2), random_edit(gpt2)
    undo = apply_edit(gpt2, edit)
    with torch.no_grad():
        w_out(gpt2, LAYER)[5, 7] += 1
    changed = weights(gpt2)
    with pytest.raises(ValueError, match=r"changed by something else.*revert\(force=True\)"):
        undo.revert()
    with pytest.raises(ValueError, match="changed by something else"):
        apply_edit(gpt2, random_edit(gpt2, seed=1))
    assert same(weights(gpt2), changed) and undo.active
    undo.revert(force=True)
    assert same(weights(gpt2), before)


# ---------------------------------------------------------------- other models


def test_other_models_are_untouched(gpt2, tokenizer, model_class):
    twin, duplicate = make_model(model_class, "gpt2", tokenizer), copy.deepcopy(gpt2)
    before, edit = weights(gpt2), random_edit(gpt2)
    undo = apply_edit(gpt2, edit)
    for other in (twin, duplicate):
        assert same(weights(other), before) and not active_edits(other, LAYER)
        with applied(other, edit):
            assert same(weights(other), weights(gpt2))
        assert same(weights(other), before)
    copied_late = copy.deepcopy(gpt2)
    edited = weights(gpt2)
    undo.revert()
    assert same(weights(gpt2), before) and same(weights(copied_late), edited)


@pytest.mark.parametrize("shape", ["gpt2", "llama", "gemma3"])
@pytest.mark.parametrize("maker", ["bridge", "hooked"])
def test_an_edit_of_one_class_applies_to_the_other(shape, maker, bos_tokenizer):
    if not (tiny_models.has_bridge() and tiny_models.has_hooked()):
        pytest.skip("one model class only")
    bridge, hooked = (make_model(c, shape, bos_tokenizer) for c in ("bridge", "hooked"))
    edit = random_edit(bridge if maker == "bridge" else hooked)
    assert weight_hash(w_out(bridge, LAYER)) == weight_hash(w_out(hooked, LAYER))
    with applied(bridge, edit), applied(hooked, edit):
        assert same(weights(bridge), weights(hooked))
        assert weight_hash(w_out(bridge, LAYER)) != edit.model_hash
