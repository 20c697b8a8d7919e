"""Files that are not whole editors are refused with a ValueError, and nothing else."""

from __future__ import annotations

import pytest
import torch
from conftest import CLASSES, make_model
from helpers.editor_setting import found, random_editor

from transformer_lens_rome import get_method
from transformer_lens_rome.files.tensors import read_tensors, write_tensors
from transformer_lens_rome.model.adapter import Weight
from transformer_lens_rome.statistics.second_moment import SecondMoment

FORMAT = "transformer_lens_rome.editor.1"
MATRICES = [Weight("W_out", 1), Weight("W_in", 2)]


def _spoil(kind, path, editor):
    """Write a file that is not a whole editor."""
    editor.save(path)
    tensors, info = read_tensors(path, FORMAT)
    changed = {
        "no matrices": {"matrices": None},
        "a hash short": {"hashes": info["hashes"][1:]},
        "odd matrices": {"matrices": [["W_out", 1], 5]},
        "unknown matrices": {"matrices": [["W_Q", 1], ["W_in", 2]]},
        "odd facts": {"train": [["a"], {}]},
        "width": {"d_model": "thirty-two"},
        "edit": {"format": "transformer_lens_rome.edit.1"},
    }
    if kind in changed:
        write_tensors(path, tensors, info | changed[kind])
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "pickle":
        torch.save(editor.tensors, path)
    elif kind == "statistics":
        SecondMoment.identity(8).save(path)
    elif kind == "a tensor short":
        write_tensors(path, dict(list(tensors.items())[1:]), info)
    elif kind == "a tensor of another shape":
        name = max(tensors, key=lambda key: tensors[key].ndim)
        write_tensors(path, tensors | {name: tensors[name][1:]}, info)


@pytest.mark.parametrize(
    "kind",
    [
        "no matrices",
        "a hash short",
        "odd matrices",
        "unknown matrices",
        "odd facts",
        "width",
        "edit",
        "truncated",
        "empty",
        "pickle",
        "statistics",
        "a tensor short",
        "a tensor of another shape",
    ],
)
@pytest.mark.parametrize("name", ("ke", "mend"))
def test_damaged_files_are_value_errors(tokenizer, tmp_path, name, kind):
    gpt2 = make_model(CLASSES[-1], "gpt2", tokenizer)
    editor = random_editor(gpt2, name, matrices=MATRICES)
    path, before = tmp_path / "editor", found(gpt2)
    _spoil(kind, path, editor)
    with pytest.raises(ValueError):
        get_method(name, editor=path).prepared(gpt2)
    assert found(gpt2) == before
    editor.save(path)  # the control
    get_method(name, editor=path).prepared(gpt2)
