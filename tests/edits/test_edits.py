"""Requests, the algebra of edits, and edits on disk."""

import dataclasses
import pickle

import pytest
import torch
from helpers.matrices import same, weights
from helpers.rome_setting import REQUEST, random_edit, small_edit, without_tensors

from transformer_lens_rome import (
    DenseEdit,
    EditRequest,
    RankOneEdit,
    SecondMoment,
    applied,
    apply_edit,
    load_edit,
)
from transformer_lens_rome.edits.kinds import Edit, EditHealth
from transformer_lens_rome.files import tensors as files_module
from transformer_lens_rome.model.adapter import Weight, b_out, w_out, weight_hash

# ---------------------------------------------------------------- requests


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"prompt": "Rome is in"}, "exactly one '{}'.*found 0"),
        ({"prompt": "{} and {} are in"}, "exactly one '{}'.*found 2"),
        ({"subject": ""}, "subject is empty"),
        ({"subject": "  "}, "subject is empty"),
        ({"target_new": ""}, "target_new is empty"),
        ({"target_new": " "}, "target_new is empty"),
        ({"subject": "the {} of Rome"}, "contains '{}'"),
    ],
)
def test_request_refuses_what_cannot_be_edited(fields, complaint):
    good = {"prompt": "{} is in", "subject": "Rome", "target_new": "France"}
    assert EditRequest(**good).text == "Rome is in"
    with pytest.raises(ValueError, match=complaint):
        EditRequest(**(good | fields))


def test_released_and_flat_records_give_the_same_request():
    released = {
        "prompt": "{} is in",
        "subject": "The Space Needle",
        "target_new": {"str": "Paris", "id": "Q90"},
        "target_true": {"str": "Seattle", "id": "Q5083"},
        "relation_id": "P276",
    }
    flat = {
        "case_id": 3,
        "prompt": "The Space Needle is in",
        "subject": "The Space Needle",
        "target_new": "Paris",
        "ground_truth": "Seattle",
    }
    assert EditRequest.from_dict(released) == EditRequest.from_dict(flat) == REQUEST
    without_truth = {key: flat[key] for key in ("prompt", "subject", "target_new")}
    assert EditRequest.from_dict(without_truth) == dataclasses.replace(REQUEST, target_true=None)


def test_only_the_hole_is_filled_in():
    tricky = EditRequest("{} {0} {x} of", "A {b} %s", "Paris")
    assert tricky.text == "A {b} %s {0} {x} of"


@pytest.mark.parametrize(("subject", "times"), [("Berlin", 0), ("Rome", 2)])
def test_a_flat_record_needs_its_subject_exactly_once(subject, times):
    record = {"prompt": "Rome, the old Rome, is in", "subject": subject, "target_new": "France"}
    with pytest.raises(ValueError, match=f"occurs {times} times"):
        EditRequest.from_dict(record)


def test_a_record_that_lacks_a_field_says_which():
    with pytest.raises(ValueError, match="lacks.*target_new"):
        EditRequest.from_dict({"prompt": "{} is in", "subject": "Rome"})


def test_a_request_is_taken_as_it_is_or_from_a_dict():
    assert EditRequest.of(REQUEST) is REQUEST
    flat = {"prompt": "{} is in", "subject": "The Space Needle", "target_new": "Paris"}
    released = flat | {"target_new": {"str": "Paris"}, "target_true": {"str": "Seattle"}}
    assert EditRequest.of(released) == REQUEST
    assert EditRequest.of(flat) == dataclasses.replace(REQUEST, target_true=None)
    for other in ("The Space Needle is in", 3, None, [REQUEST], REQUEST.text.encode()):
        with pytest.raises(ValueError, match=r"a request is an EditRequest or a dict, got .*write"):
            EditRequest.of(other)


# ---------------------------------------------------------------- algebra


@pytest.mark.parametrize("rank", [1, 3])
def test_scale_is_linear_in_the_change(gpt2, rank):
    edit = random_edit(gpt2, rank=rank)
    delta = edit.delta()
    assert delta.norm() > 0.1
    assert torch.equal(edit.scale(1).delta(), delta)
    assert torch.equal(edit.scale(-1).delta(), -delta)
    assert not edit.scale(0).delta().any()
    torch.testing.assert_close(edit.scale(0.3).scale(5).delta(), 1.5 * delta)
    torch.testing.assert_close(edit.scale(0.3).delta() + edit.scale(0.7).delta(), delta)
    assert torch.equal(edit.delta(), delta)  # a value: scaling makes another one


def test_dense_edit_is_the_product_of_its_factors():
    left, right = torch.tensor([[1.0, 2.0], [0.0, -1.0], [3.0, 0.0]]), torch.eye(2)[:, [1, 0]]
    edit = DenseEdit(layer=0, request=REQUEST, left=left, right=right)
    expected = torch.tensor([[2.0, 1.0], [-1.0, 0.0], [0.0, 3.0]])
    assert torch.equal(edit.delta(), expected)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, -1.0, 3.0])
def test_v_star_is_what_k_star_gets_from_the_scaled_edit(gpt2, alpha):
    edit = small_edit(gpt2).scale(alpha)
    W1 = w_out(gpt2, edit.layer).detach() + edit.delta()
    reached = edit.k_star @ W1 + b_out(gpt2, edit.layer)
    torch.testing.assert_close(edit.v_star, reached, rtol=1e-4, atol=1e-4)
    unscaled = small_edit(gpt2).v_star
    assert torch.allclose(unscaled, reached, atol=1e-3) == (alpha == 1)  # control


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Towards(Edit):
    """A kind of edit that no file knows: it adds one vector to a bias and to all rows of W_out."""

    vector: torch.Tensor

    def changes(self):
        return {Weight("W_out", 1): self.vector.expand(128, -1), Weight("b_out", 2): self.vector}

    def scale(self, alpha):
        return dataclasses.replace(self, vector=alpha * self.vector)


def test_a_kind_of_edit_is_its_changes(gpt2):
    """`changes` and `scale` are all that a kind has to define to be put on a model."""
    with pytest.raises(TypeError, match="abstract"):
        Edit(layer=1, request=REQUEST)
    before, vector = weights(gpt2), torch.linspace(-1, 1, 32)
    known = {"layer": 1, "request": REQUEST, "model_hash": weight_hash(w_out(gpt2, 1))}
    edit = Towards(vector=vector, **known)
    assert edit.sizes() == {Weight("W_out", 1): (128, 32), Weight("b_out", 2): (32,)}
    assert torch.equal(edit.delta(), vector.expand(128, -1)) and edit.digest != (-edit).digest
    with applied(gpt2, -edit):
        found = weights(gpt2)
        for where, change in edit.changes().items():
            assert torch.equal(found.pop(where), before[where] - change)
        assert all(torch.equal(tensor, before[where]) for where, tensor in found.items())
    assert same(weights(gpt2), before)
    with pytest.raises(ValueError, match="not the weight"):
        apply_edit(gpt2, dataclasses.replace(edit, model_hash="other"))


# ---------------------------------------------------------------- digest and disk


def test_digest_follows_the_change_and_nothing_else(gpt2):
    edit = random_edit(gpt2)
    moved = edit.u.clone()
    moved[0] += 1e-6
    assert edit.digest == dataclasses.replace(edit, u=edit.u.clone()).digest
    assert edit.digest == dataclasses.replace(edit, health=EditHealth(p_after=0.5)).digest
    assert edit.digest != dataclasses.replace(edit, u=moved).digest
    assert edit.digest != dataclasses.replace(edit, layer=2).digest
    assert edit.digest != edit.scale(-1).digest


@pytest.mark.parametrize("kind", ["rome", "rank one", "dense"])
def test_save_and_load_give_the_same_edit(gpt2, tmp_path, kind):
    rank = 3 if kind == "dense" else 1
    edit = small_edit(gpt2) if kind == "rome" else random_edit(gpt2, rank=rank)
    path = tmp_path / "new folder" / "edit.safetensors"
    edit.save(path)
    for loaded in (type(edit).load(path), load_edit(str(path))):
        assert type(loaded) is type(edit)
        assert without_tensors(loaded) == without_tensors(edit)
        assert loaded.tensors().keys() == edit.tensors().keys()
        for name, tensor in edit.tensors().items():
            assert torch.equal(loaded.tensors()[name], tensor)
        assert loaded.digest == edit.digest
        assert torch.equal(loaded.delta(), edit.delta())


def test_edit_whose_fields_share_memory_can_be_saved(gpt2, tmp_path):
    edit = random_edit(gpt2)
    shared = dataclasses.replace(edit, u=edit.k_star)  # C = I
    shared.save(tmp_path / "edit")
    assert load_edit(tmp_path / "edit").digest == shared.digest


def test_an_edit_file_is_kilobytes(gpt2, tmp_path):
    edit = small_edit(gpt2, prefixes=["", *["The old man said."] * 20])
    edit.save(tmp_path / "edit")
    size, vectors = (tmp_path / "edit").stat().st_size, 4 * (2 * 128 + 2 * 32)
    assert vectors < size < vectors + 5000
    assert size < edit.delta().nbytes  # which is all that a bare matrix would hold


# ---------------------------------------------------------------- bad files


def _write_bad(kind, path, edit):
    edit.save(path)
    whole = path.read_bytes()
    if kind == "truncated":
        path.write_bytes(whole[:-100])
    elif kind == "truncated header":
        path.write_bytes(whole[:50])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("The Eiffel Tower is in Rome.\n" * 50)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({"u": [1.0], "format": "edit"}))
    elif kind == "torch":
        torch.save(edit.tensors(), path)
    elif kind == "statistics":
        SecondMoment.identity(8).save(path)
    elif kind == "another program":
        files_module.save_file(edit.tensors(), path)
    elif kind == "a tensor short":
        tensors, info = files_module.read_tensors(path, "transformer_lens_rome.edit.1")
        files_module.write_tensors(path, {"u": tensors["u"]}, info)


BAD = ["truncated", "truncated header", "empty", "text", "pickle", "torch", "statistics"]


@pytest.mark.parametrize("kind", [*BAD, "another program", "a tensor short"])
def test_anything_but_a_whole_edit_is_refused_by_name(gpt2, tmp_path, kind):
    before = weight_hash(w_out(gpt2, 1))
    path = tmp_path / "edit.safetensors"
    _write_bad(kind, path, random_edit(gpt2))
    content = path.read_bytes()
    with pytest.raises(ValueError, match="edit.safetensors"):
        RankOneEdit.load(path)
    assert path.read_bytes() == content
    assert weight_hash(w_out(gpt2, 1)) == before


def test_an_edit_of_another_kind_says_how_to_read_it(gpt2, tmp_path):
    random_edit(gpt2, rank=2).save(tmp_path / "dense")
    with pytest.raises(ValueError, match="DenseEdit.load"):
        RankOneEdit.load(tmp_path / "dense")
    random_edit(gpt2).save(tmp_path / "one")
    with pytest.raises(ValueError, match="RankOneEdit.load"):
        DenseEdit.load(tmp_path / "one")


def test_a_missing_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        RankOneEdit.load(tmp_path / "nowhere")


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_interrupted_save_leaves_the_old_file_whole(gpt2, tmp_path, monkeypatch, error):
    path = tmp_path / "edit"
    old, new = random_edit(gpt2, seed=1), random_edit(gpt2, seed=2)
    old.save(path)

    def half_way(tensors, target, **_):
        target.write_bytes(b"half a file")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(files_module, "save_file", half_way)
        with pytest.raises(type(error)):
            new.save(path)
    assert load_edit(path).digest == old.digest
    assert [p.name for p in tmp_path.iterdir()] == ["edit"]
    new.save(path)  # control: without the fault it is replaced
    assert load_edit(path).digest == new.digest


@pytest.mark.parametrize("rank", [1, 3])
def test_an_edit_is_scaled_and_turned_round_by_operators(gpt2, rank):
    edit = random_edit(gpt2, rank=rank)
    for one, alpha in ((edit * 0.5, 0.5), (0.5 * edit, 0.5), (-edit, -1.0)):
        assert one.digest == edit.scale(alpha).digest
        assert torch.allclose(one.delta(), alpha * edit.delta())
    assert torch.equal((-(-edit)).delta(), edit.delta())
