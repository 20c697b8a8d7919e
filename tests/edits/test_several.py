"""Edits that were made one after another, as one edit."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers.matrices import same, weights
from helpers.rome_setting import LAYER, REQUEST, random_edit

from transformer_lens_rome import EditRequest, applied
from transformer_lens_rome.edits.several import SeveralEdits
from transformer_lens_rome.evaluation.several import edit_of
from transformer_lens_rome.model.adapter import Weight

FACTS = [REQUEST, EditRequest("{} is in", "Cuba", "Rome")]


class Drawn:
    """Random edits, each of the weight as it is now; the second one changes the bias too."""

    def compute(self, model, request, *, seed=0):
        edit = random_edit(model, seed=seed + len(request.subject), rank=2, bias=request != REQUEST)
        return dataclasses.replace(edit, request=request)


def test_the_sum_is_the_model_with_all_of_them(gpt2):
    before = weights(gpt2)
    edit = edit_of(Drawn(), gpt2, FACTS)
    assert isinstance(edit, SeveralEdits) and edit.requests == tuple(FACTS)
    assert same(weights(gpt2), before)
    first, second = edit.parts
    assert first.model_hash != second.model_hash  # the second was made on the first
    with applied(gpt2, first, second):
        expected = weights(gpt2)
    with applied(gpt2, edit):  # its hashes are those of the unedited model
        for name, weight in weights(gpt2).items():
            assert torch.allclose(weight, expected[name], atol=1e-6), name
    assert not same(expected, before) and same(weights(gpt2), before)
    assert set(edit.sizes()) == {Weight("W_out", LAYER), Weight("b_out", LAYER)}
    half = edit.scale(0.5).change(Weight("W_out", LAYER))
    assert torch.allclose(2 * half, edit.change(Weight("W_out", LAYER)))


def test_one_fact_is_the_methods_own_edit(gpt2):
    assert type(edit_of(Drawn(), gpt2, FACTS[:1])).__name__ == "DenseEdit"


def test_there_is_no_file_of_several(gpt2, tmp_path):
    with pytest.raises(ValueError, match="save each of .parts"):
        edit_of(Drawn(), gpt2, FACTS).save(tmp_path / "edit")
