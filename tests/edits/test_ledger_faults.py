"""What goes wrong while an edit is put on or taken off must not cost the model its bytes."""

from __future__ import annotations

import pytest
import torch
from helpers.rome_setting import random_edit

from transformer_lens_rome import applied, apply_edit, revert_all
from transformer_lens_rome.edits.ledger import active_edits
from transformer_lens_rome.model import adapter
from transformer_lens_rome.model.adapter import w_out


def interrupt_at(monkeypatch, call: int):
    """Ctrl-C in the n-th hash of a weight."""
    real, calls = adapter.weight_hash, []

    def weight_hash(weight):
        calls.append(weight)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(weight)

    monkeypatch.setattr(adapter, "weight_hash", weight_hash)


@pytest.mark.parametrize("call", [1, 2])
def test_interrupted_while_it_is_applied(gpt2, monkeypatch, call):
    edit, base = random_edit(gpt2, layer=1), w_out(gpt2, 1).detach().clone()
    with monkeypatch.context() as patch:
        interrupt_at(patch, call)
        with pytest.raises(KeyboardInterrupt), applied(gpt2, edit):
            pass
    assert torch.equal(w_out(gpt2, 1), base) and active_edits(gpt2, 1) == ()
    with applied(gpt2, edit):
        assert not torch.equal(w_out(gpt2, 1), base)


@pytest.mark.parametrize("call", [1, 2])
def test_interrupted_while_it_is_undone(gpt2, monkeypatch, call):
    edit, base = random_edit(gpt2, layer=1), w_out(gpt2, 1).detach().clone()
    undo = apply_edit(gpt2, edit)
    with monkeypatch.context() as patch:
        interrupt_at(patch, call)
        with pytest.raises(KeyboardInterrupt):
            undo.revert()
    assert undo.active and active_edits(gpt2, 1) == (edit,)
    undo.revert()
    assert torch.equal(w_out(gpt2, 1), base) and not undo.active


def test_one_layer_that_cannot_be_undone_does_not_keep_the_others(gpt2):
    bases = [w_out(gpt2, layer).detach().clone() for layer in (0, 2)]
    edits = [random_edit(gpt2, layer=layer) for layer in (0, 2)]
    with pytest.raises(ValueError, match="changed by something else"), applied(gpt2, *edits):
        with torch.no_grad():
            w_out(gpt2, 2)[0, 0] += 1
    assert torch.equal(w_out(gpt2, 0), bases[0])
    revert_all(gpt2, force=True)
    assert torch.equal(w_out(gpt2, 2), bases[1])


def test_all_edits_go_also_those_nobody_holds(gpt2):
    bases = [w_out(gpt2, layer).detach().clone() for layer in range(3)]
    for layer, seed in ((0, 1), (2, 2), (0, 3)):
        apply_edit(gpt2, random_edit(gpt2, layer=layer, seed=seed), force=True)
    revert_all(gpt2)
    for layer, base in enumerate(bases):
        assert torch.equal(w_out(gpt2, layer), base) and active_edits(gpt2, layer) == ()


def test_what_one_weight_fails_on_does_not_keep_the_others(gpt2):
    bases = [w_out(gpt2, layer).detach().clone() for layer in range(3)]
    for layer in range(3):
        apply_edit(gpt2, random_edit(gpt2, layer=layer))
    with torch.no_grad():
        w_out(gpt2, 1)[0, 0] += 1
    with pytest.raises(ValueError, match="W_out of layer 1"):
        revert_all(gpt2)
    assert [len(active_edits(gpt2, layer)) for layer in range(3)] == [0, 1, 0]
    assert torch.equal(w_out(gpt2, 0), bases[0]) and torch.equal(w_out(gpt2, 2), bases[2])
    revert_all(gpt2, force=True)
    assert torch.equal(w_out(gpt2, 1), bases[1])
