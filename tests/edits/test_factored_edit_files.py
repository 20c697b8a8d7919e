"""Edits of several matrices on disk: the same when read again, and refused when damaged."""

import pytest
import torch
from conftest import CLASSES, make_model
from helpers.matrices import FOUR, same, weights
from helpers.rome_setting import REQUEST, factored_edit, without_tensors

from transformer_lens_rome import DenseEdit, RankOneEdit, applied, load_edit
from transformer_lens_rome.edits.kinds import FactoredEdit
from transformer_lens_rome.edits.ledger import edited_weights
from transformer_lens_rome.files import tensors as files

FORMAT = "transformer_lens_rome.edit.1"


@pytest.fixture(scope="module")
def four(tokenizer):
    """An edit of four matrices."""
    return factored_edit(make_model(CLASSES[0], "gpt2", tokenizer), FOUR)


@pytest.mark.parametrize("number", [0, 1, 4])
def test_save_and_load_give_the_same_edit(gpt2, tmp_path, number):
    edit, before = factored_edit(gpt2, FOUR[:number]), weights(gpt2)
    turned = {w: (left.T.contiguous().T, right) for w, (left, right) in edit.factors.items()}
    for _, right in turned.values():
        right.requires_grad_()
    edit = FactoredEdit.of(turned, edit.hashes, request=REQUEST, config={"rank": (2,)})
    for tensor in edit.tensors().values():  # as it will be when read; and it keeps no graph alive
        assert tensor.is_contiguous() and not tensor.requires_grad
    edit.save(tmp_path / "edit")
    for loaded in (load_edit(tmp_path / "edit"), FactoredEdit.load(tmp_path / "edit")):
        assert loaded.digest == edit.digest and same(loaded.changes(), edit.changes())
        known = [without_tensors(one) | {"factors": None} for one in (loaded, edit)]
        assert known[0] == known[1] and known[0]["hashes"] == edit.hashes
        with applied(gpt2, loaded) as model:
            assert same(weights(model), before) == (number == 0)
            assert len(edited_weights(model)) == number
        assert same(weights(gpt2), before)
    for kind in (DenseEdit, RankOneEdit):
        with pytest.raises(ValueError, match="FactoredEdit.load"):
            kind.load(tmp_path / "edit")


def _damage(kind, tensors, info):
    """A file's tensors and description, made wrong in one way."""
    first, name = info["hashes"][0], "W_in.0.left"
    assert first[:2] == ["W_in", 0]
    if kind in HASHES:
        first[:] = HASHES[kind]
    elif kind in INFO:
        info |= INFO[kind]
    elif kind in TENSORS:
        tensors[name] = TENSORS[kind](tensors[name])
    elif kind == "no hashes":
        del info["hashes"]
    elif kind == "a hash short":
        del info["hashes"][0]
    elif kind == "a hash twice":
        info["hashes"][0] = list(info["hashes"][1])
    elif kind == "a hash more":
        info["hashes"].append(list(first))
    elif kind == "a tensor short":
        del tensors[name]
    elif kind == "a tensor more":
        tensors["W_in.1.left"] = tensors[name].clone()
    elif kind in ("evil", "other layer", "text layer"):
        where = {"evil": ["W_evil", 0], "other layer": ["W_in", 0.0], "text layer": ["W_in", "0"]}
        first[:2] = where[kind]
        for side in ("left", "right"):
            tensors[f"{first[0]}.{first[1]}.{side}"] = tensors.pop(f"W_in.0.{side}")
    return tensors, info


HASHES = {
    "number": ["W_in", 0, 7],
    "null": ["W_in", 0, None],
    "list": ["W_in", 0, ["0"]],
    "no layer": ["W_in", "0" * 64],
    "true layer": ["W_in", False, "0" * 64],
    "unhashable": [["W_in"], {}, "0" * 64],
}
INFO = {
    "kind": {"kind": "EvilEdit"},
    "unhashable kind": {"kind": ["FactoredEdit"]},
    "as dense": {"kind": "DenseEdit"},
    "hashes text": {"hashes": "W_in"},
    "hashes number": {"hashes": 3},
    "hashes null": {"hashes": None},
    "first layer": {"layer": 1},
    "layer text": {"layer": "0"},
    "layer true": {"layer": False},
    "model hash": {"model_hash": 5},
    "health": {"health": [1]},
    "request": {"request": {"prompt": 1, "subject": 2, "target_new": 3}},
    "config": {"config": 3},
}
TENSORS = {
    "vector": lambda left: left[:, 0].clone(),
    "cube": lambda left: left[None].clone(),
    "inner": lambda left: left[:, :1].clone(),
    "integers": lambda left: left.long(),
    "types": lambda left: left.double(),
}
HASH = ["no hashes", "a hash short", "a hash twice", "a hash more"]
NAMES = ["a tensor short", "a tensor more", "evil", "other layer", "text layer"]


@pytest.mark.parametrize("kind", [*HASHES, *INFO, *TENSORS, *HASH, *NAMES])
def test_a_damaged_file_is_refused_by_name(four, tmp_path, kind):
    path = tmp_path / "edit.safetensors"
    four.save(path)
    tensors, info = files.read_tensors(path, FORMAT)
    files.write_tensors(path, tensors, info)
    assert len(load_edit(path).factors) == len(FOUR)  # control: written again, it is whole
    files.write_tensors(path, *_damage(kind, tensors, info))
    with pytest.raises(ValueError, match="edit.safetensors is an incomplete edit file"):
        load_edit(path)


@pytest.mark.parametrize("text", ["[1]", "3", "{", '"text"', "[" * 100_000])
def test_a_description_that_is_no_json_object_is_refused_by_name(tmp_path, text):
    path = tmp_path / "edit.safetensors"
    described = {"transformer_lens_rome": text}
    files.save_file({"left": torch.zeros(1)}, path, metadata=described)
    with pytest.raises(ValueError, match="edit.safetensors contains no JSON object"):
        load_edit(path)
