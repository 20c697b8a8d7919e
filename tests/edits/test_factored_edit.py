"""Edits of several matrices: on the model, off it to the byte, and as values."""

import dataclasses
import itertools

import pytest
import torch
from conftest import make_model, once_a_class
from helpers.matrices import FOUR, matrices, same, weights
from helpers.rome_setting import LAYER, REQUEST, factored_edit, random_edit

from transformer_lens_rome import applied, apply_edit
from transformer_lens_rome.edits import base_bytes
from transformer_lens_rome.edits.kinds import EditHealth, FactoredEdit
from transformer_lens_rome.edits.ledger import active_edits, edited_weights, revert_all, without
from transformer_lens_rome.model import adapter
from transformer_lens_rome.model.adapter import Weight, parameter, weight_hash

# ---------------------------------------------------------------- on the model and off it


@pytest.mark.parametrize("shape", ["gpt2", "gemma3", "phi3"])
def test_apply_adds_the_products_and_revert_restores_the_bytes(model_class, shape, bos_tokenizer):
    model = make_model(model_class, shape, bos_tokenizer)
    before, edit = weights(model), factored_edit(model, matrices(model))
    undo, expected = apply_edit(model, edit), dict(before)
    for where, (left, right) in edit.factors.items():
        expected[where] = before[where] + left @ right
        assert not torch.equal(expected[where], before[where])
    assert same(weights(model), expected)
    assert [active_edits(model, layer) for layer in range(3)] == [(edit,)] * 3  # once a layer
    assert set(edited_weights(model)) == set(edit.factors)
    undo.revert()
    assert same(weights(model), before) and not undo.active and edited_weights(model) == []
    assert not any(hasattr(p, "_rome_ledger") for p in model.parameters())


@once_a_class
@pytest.mark.parametrize("order", itertools.permutations(range(4)))
def test_nested_with_other_kinds_and_undone_in_any_order(gpt2, order):
    """After each undo every weight is its base plus the edits that are left, in their order."""
    model, base = gpt2, weights(gpt2)
    edits = [
        random_edit(model),
        factored_edit(model, matrices(model)),
        random_edit(model, rank=3, seed=1, bias=True),
        factored_edit(model, [Weight("W_out", LAYER), Weight("W_in", 2)], seed=1),
    ]
    done, left = [apply_edit(model, edit) for edit in edits], list(edits)
    assert set(active_edits(model, LAYER)) == set(edits)
    for index in order:
        done[index].revert()
        left.remove(edits[index])
        expected = {where: tensor.clone() for where, tensor in base.items()}
        for where, change in ((w, c) for edit in left for w, c in edit.changes().items()):
            expected[where] += change
        assert same(weights(model), expected)
    assert same(weights(model), base)


@pytest.mark.parametrize("call", range(1, 5))
@pytest.mark.parametrize("undoing", [False, True])
def test_a_failure_in_the_middle_leaves_all_or_nothing(gpt2, monkeypatch, call, undoing):
    model, real, calls = gpt2, base_bytes.write, []
    base, edit = weights(model), factored_edit(model, FOUR)

    def write(*args):
        calls.append(args)
        if len(calls) == call:
            raise KeyboardInterrupt
        real(*args)

    undo = apply_edit(model, edit) if undoing else None
    before = weights(model)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(base_bytes, "write", write)
        undo.revert() if undoing else apply_edit(model, edit)
    assert len(calls) == 2 * call and same(weights(model), before)  # as many were taken back
    assert active_edits(model, 0) == active_edits(model, 2) == ((edit,) if undoing else ())
    (undo or apply_edit(model, edit)).revert()
    assert same(weights(model), base) and edited_weights(model) == []


def test_all_edits_go_and_one_can_be_lifted(gemma3):
    model = gemma3
    base, edit, other = weights(model), factored_edit(model, matrices(model)), random_edit(model)
    for one in (other, edit):
        apply_edit(model, one)
    both = weights(model)
    with without(model, edit):
        alone = base | {Weight("W_out", LAYER): base[Weight("W_out", LAYER)] + other.delta()}
        assert same(weights(model), alone)
    assert same(weights(model), both) and not same(both, base)
    revert_all(model)
    assert same(weights(model), base) and active_edits(model, LAYER) == ()


def test_another_model_is_refused_by_the_matrix_that_differs(gpt2):
    edit = factored_edit(gpt2, FOUR)
    with torch.no_grad():
        parameter(gpt2, Weight("W_in", 2))[0, 0] += 1
    before = weights(gpt2)
    with pytest.raises(ValueError, match="^W_in of layer 2 is not the weight.*force=True"):
        apply_edit(gpt2, edit)
    assert same(weights(gpt2), before) and edited_weights(gpt2) == []
    with applied(gpt2, edit, force=True):
        assert not same(weights(gpt2), before)
        for again in (edit, dataclasses.replace(edit, health=EditHealth(p_after=0.5))):
            with pytest.raises(ValueError, match="already.*scale"):
                apply_edit(gpt2, again, force=True)
    assert same(weights(gpt2), before)


@pytest.mark.parametrize("wrong", ["gate", "shape", "nan", "quantised", "layer"])
def test_what_does_not_fit_is_refused_before_any_write(gpt2, monkeypatch, wrong):
    edit = factored_edit(gpt2, [Weight("W_out", 0), Weight("W_in", LAYER)])
    (left, right), digests = edit.factors[Weight("W_in", LAYER)], list(edit.hashes.values())
    where = {"gate": Weight("W_gate", LAYER), "layer": Weight("W_in", 3)}.get(wrong)
    where = where or Weight("W_in", LAYER)
    turned = (right.T, left.T) if wrong == "shape" else (left, right)
    factors = {Weight("W_out", 0): edit.factors[Weight("W_out", 0)], where: turned}
    bad = FactoredEdit.of(factors, dict(zip(factors, digests, strict=True)), request=REQUEST)
    if wrong == "nan":
        with torch.no_grad():
            parameter(gpt2, where)[3, 5] = torch.nan
    hashes = {at: weight_hash(tensor) for at, tensor in weights(gpt2).items()}
    known = adapter.parameter
    if wrong == "quantised":
        int8 = torch.zeros(32, 128, dtype=torch.int8)
        monkeypatch.setattr(
            adapter, "parameter", lambda m, at: int8 if at == where else known(m, at)
        )
    said = {"gate": "none", "shape": r"\(128, 32\)", "nan": "W_in of layer 1 contains NaN"}
    said |= {"quantised": "W_in of layer 1 is quantised", "layer": "layers 0 to 2"}
    with pytest.raises((ValueError, NotImplementedError), match=said[wrong]):
        apply_edit(gpt2, bad, force=True)
    assert {at: weight_hash(tensor) for at, tensor in weights(gpt2).items()} == hashes
    assert edited_weights(gpt2) == []


# ---------------------------------------------------------------- values


def test_algebra(gpt2):
    edit, changes = factored_edit(gpt2, FOUR), factored_edit(gpt2, FOUR).changes()
    assert list(changes) == sorted(FOUR, key=lambda where: (where.layer, where.name))
    assert edit.layer == 0 and edit.made_on().keys() == changes.keys()
    assert all(change.norm() > 0.1 for change in changes.values())
    assert same(edit.scale(-1).changes(), {where: -change for where, change in changes.items()})
    assert same(edit.scale(2).changes(), {where: 2 * change for where, change in changes.items()})
    assert not any(change.any() for change in edit.scale(0).changes().values())
    before = weights(gpt2)
    with applied(gpt2, edit.scale(0), edit.scale(0)):  # nothing, so twice is no mistake
        assert same(weights(gpt2), before)
    with applied(gpt2, edit, edit.scale(-1)):
        for where, tensor in weights(gpt2).items():
            torch.testing.assert_close(tensor, before[where], rtol=1e-5, atol=1e-6)
    assert same(weights(gpt2), before) and same(edit.changes(), changes)


def test_the_digest_follows_matrix_layer_and_factors(gpt2):
    edit = factored_edit(gpt2, FOUR)
    factors, hashes = dict(edit.factors), dict(edit.hashes)

    def digest(factors, **known):
        made = {where: hashes.get(where, "") for where in factors}
        return FactoredEdit.of(factors, made, request=REQUEST, **known).digest

    nudged = {w: (left.clone(), right.clone()) for w, (left, right) in factors.items()}
    nudged[FOUR[1]][1][0, 0] += 1e-6
    moved = {Weight("W_gate", 1) if w == FOUR[1] else w: both for w, both in factors.items()}
    renamed = {Weight("W_gate", 0) if w == FOUR[1] else w: both for w, both in factors.items()}
    fewer = {where: factors[where] for where in FOUR[1:]}
    found = [digest(one) for one in (factors, nudged, moved, renamed, fewer, {})]
    assert len(set(found)) == len(found) and edit.scale(-1).digest not in found
    turned = dict(reversed(factors.items()))
    assert found[0] == edit.digest == digest(turned) == digest(factors, config={"a": 1})
    direct = FactoredEdit(layer=0, factors=turned, hashes=hashes, request=REQUEST)
    assert direct.digest == edit.digest


@pytest.mark.parametrize("number", [0, 1, 2, 4])
def test_only_one_w_out_has_a_delta(gpt2, number):
    edit = factored_edit(gpt2, FOUR[:number])
    if number == 1:
        left, right = edit.factors[FOUR[0]]
        assert torch.equal(edit.delta(), left @ right)
        return
    said = "W_in of layer 0.*W_out of layer 2, not one W_out" if number else "changes nothing, not"
    with pytest.raises(ValueError, match=said):
        edit.delta()
    with pytest.raises(ValueError, match=r"W_in of layer 0, not one W_out.*changes\(\)"):
        factored_edit(gpt2, FOUR[1:2]).delta()
