"""Editor files of the published layout: read without running them, and the same edits as there."""

import argparse
import dataclasses
import os
import pickle
import shlex
import sys
import zipfile

import pytest
import torch
from conftest import CLASSES, make_model
from helpers.released_editors import (
    ReleasedKE,
    ReleasedMend,
    gradients,
    inner_names,
    ours,
    published,
    tokens_of,
)
from helpers.tiny_models import tiny_hf
from transformers import GPT2Config

from transformer_lens_rome import EditRequest, applied, get_method
from transformer_lens_rome.methods.hypernetworks.published_editors import convert_editor

REQUEST = EditRequest("{} is in", "The Space Needle", "Paris by the river", "Seattle")
SHORT = EditRequest("{} is in", "The Space Needle", "Paris", "Seattle")


@pytest.fixture(scope="module")
def built(tokenizer):
    """The reference networks, by kind and shape, with the Hugging Face models they are for."""
    found = {}
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(torch.Generator().manual_seed(3).get_state())
        for shape in ("gpt2", "gptj"):
            hf = tiny_hf(shape, tokenizer)
            found["mend", shape] = hf, ReleasedMend(hf, inner_names(shape))
            if shape == "gpt2":
                found["ke", shape] = hf, ReleasedKE(hf, inner_names(shape))
    return found


@pytest.fixture(scope="module")
def files(built, tmp_path_factory):
    """Their files, as published."""
    folder, found = tmp_path_factory.mktemp("published"), {}
    for key, (hf, module) in built.items():
        found[key] = folder / f"{'-'.join(key)}.pt"
        torch.save(published(module, hf.config), found[key])
    return found


@pytest.fixture(params=["gpt2", "gptj"])
def shape(request):
    return request.param


@pytest.fixture
def model(model_class, shape, tokenizer):
    return make_model(model_class, shape, tokenizer)


def assert_alike(edit, expected, hf):
    """Changes of ours `[d_in, d_out]` are those of Hugging Face's parameters."""
    changes, conv = edit.changes(), type(hf).__name__.startswith("GPT2")
    assert set(changes) == {ours(name) for name in expected}
    for name, change in expected.items():
        change = change if conv else change.T
        assert change.norm() > 1e-4
        error = (changes[ours(name)] - change).norm() / change.norm()
        assert error < 2e-3, (name, error)


# ------------------------------------------------------------ the same edits


@pytest.mark.parametrize("request_", [REQUEST, SHORT], ids=["long", "one-token"])
@pytest.mark.parametrize("released", [False, True], ids=["as-trained", "as-released"])
def test_mend_makes_the_released_edit(
    model, shape, built, files, tokenizer, tmp_path, released, request_
):
    hf, module = built["mend", shape]
    ids, n_labels = tokens_of(tokenizer, request_)
    assert (n_labels == 1) == (request_ is SHORT)
    factors, _ = gradients(hf, module.names, ids, n_labels)
    stored = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    expected = module.updates(hf, factors, released)
    module.load_state_dict(stored)
    for transform in module.mend.values():
        transform.started = False

    out = tmp_path / "editor.safetensors"
    convert_editor(files["mend", shape], model, counterfact=False, out=out)
    options = {"swap_alphas": shape == "gpt2", "own_statistics": True} if released else {}
    edit = get_method("mend", editor=out, **options).compute(model, request_)
    assert_alike(edit, expected, hf)
    other = {} if released else {"swap_alphas": True}
    with pytest.raises(AssertionError):
        assert_alike(get_method("mend", editor=out, **other).compute(model, request_), expected, hf)


def test_ke_makes_the_released_edit(gpt2, built, files, tokenizer, tmp_path):
    hf, module = built["ke", "gpt2"]
    ids, n_labels = tokens_of(tokenizer, REQUEST)
    _, whole = gradients(hf, module.names, ids, n_labels)
    out = tmp_path / "editor.safetensors"
    convert_editor(files["ke", "gpt2"], gpt2, counterfact=True, out=out)
    edit = get_method("ke-cf", editor=out).compute(gpt2, REQUEST)
    assert_alike(edit, module.updates(ids, whole), hf)
    with pytest.raises(AssertionError):  # the text matters: its tokens, and their order
        assert_alike(edit, module.updates(ids.flip(0), whole), hf)
    with pytest.raises(AssertionError):  # and the gradient
        assert_alike(edit, module.updates(ids, {n: 0 * g for n, g in whole.items()}), hf)


def test_the_editor_edits_and_says_what_it_is(model, shape, files, tmp_path):
    editor = convert_editor(files["mend", shape], model, counterfact=False, out=tmp_path / "e")
    read = get_method("mend").load(tmp_path / "e")
    assert editor.info.items() <= read.info.items() and read.digest == editor.digest
    assert set(read.tensors) == set(editor.tensors)
    assert not read.has_seen(REQUEST) and read.info["train"] == []
    assert read.info["prepend_bos"] is False and not read.info["counterfact"]
    assert read.matrices == [ours(n) for n in inner_names(shape)]
    method = get_method("mend", editor=read)
    edit = method.compute(model, REQUEST)
    with applied(model, edit):
        assert edit.health.p_after != edit.health.p_before
    with pytest.raises(ValueError, match="use get_method\\('mend'"):
        get_method("mend-cf", editor=read).compute(model, REQUEST)


def test_edits_on_the_model_make_no_difference(gpt2, files):
    before = convert_editor(files["mend", "gpt2"], gpt2, counterfact=False)
    edit = get_method("mend", editor=before).compute(gpt2, REQUEST)
    with applied(gpt2, edit):
        during = convert_editor(files["mend", "gpt2"], gpt2, counterfact=False)
    assert before.info == during.info


# ------------------------------------------------------------ other files of the kind


@pytest.fixture(scope="module")
def one(tokenizer):
    """A model that is only converted for."""
    return make_model(CLASSES[0], "gpt2", tokenizer)


@pytest.fixture
def content(files):
    """The file's content, to be changed; a stand-in for its configuration is put back."""
    return torch.load(files["mend", "gpt2"], weights_only=False)


def saved(content, tmp_path, name="changed.pt", **options):
    torch.save(content, tmp_path / name, **options)
    return tmp_path / name


def test_older_names_and_stripped_files_give_the_same_editor(one, built, files, content, tmp_path):
    whole = convert_editor(files["mend", "gpt2"], one, counterfact=False)
    hf, module = built["mend", "gpt2"]
    older = saved(published(module, hf.config, prefix="gtn."), tmp_path, "older.pt")
    assert "gtn.(128, 32).k" in torch.load(older, weights_only=False)["model"]
    plain = {k: v for k, v in content["model"].items() if torch.is_tensor(v)}
    for path in (older, saved(plain, tmp_path), saved({"model": plain}, tmp_path, "only.pt")):
        assert convert_editor(path, one, counterfact=False).digest == whole.digest
    content["model"]["edit_lrs"] *= 2
    other = convert_editor(saved(content, tmp_path), one, counterfact=False)
    assert other.digest != whole.digest


def test_the_editor_does_not_hang_on_the_file(one, files, tmp_path):
    path = tmp_path / "copy.pt"
    path.write_bytes(files["mend", "gpt2"].read_bytes())
    editor = convert_editor(path, one, counterfact=False)
    before = editor.digest
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert dataclasses.replace(editor).digest == before  # computed again


def test_no_configuration_is_built_and_nothing_stays_allowed(one, files, monkeypatch):
    def refuse(*_):
        raise AssertionError("a class of the file was used")

    before = set(torch.serialization.get_safe_globals())
    monkeypatch.setattr(GPT2Config, "__setstate__", refuse, raising=False)
    convert_editor(files["mend", "gpt2"], one, counterfact=False)
    assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(AssertionError, match="of the file was used"):
        torch.load(files["mend", "gpt2"], weights_only=False)


def test_a_file_that_is_refused_can_be_stripped_by_the_command_in_the_message(
    one, files, content, tmp_path, monkeypatch
):
    content["model"]["model_config"] = argparse.Namespace(n_layer=3)
    path = saved(content, tmp_path)
    with pytest.raises(ValueError, match="argparse.Namespace") as refusal:
        convert_editor(path, one, counterfact=False)
    command = shlex.split(str(refusal.value).rpartition("\n")[2])
    assert command[:2] == ["python", "-c"] and command[3:] == ["old.pt", "new.pt"]
    new = tmp_path / "new.pt"
    monkeypatch.setattr(sys, "argv", ["-c", str(path), str(new)])
    exec(command[2], {})  # as a process of its own would
    editor = convert_editor(new, one, counterfact=False)
    whole = convert_editor(files["mend", "gpt2"], one, counterfact=False)
    assert editor.digest == whole.digest


# ------------------------------------------------------------ hostile and broken files


class Runs:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {shlex.quote(str(self.path))}",)


@pytest.mark.parametrize("where", ["all", "model", "model_config", "opt", "a tensor"])
def test_a_file_that_would_run_code_does_not(one, content, tmp_path, where):
    mark = tmp_path / "mark"
    if where == "all":
        content = Runs(mark)
    elif where in ("model", "opt"):
        content[where] = Runs(mark)
    elif where == "model_config":
        content["model"][where] = Runs(mark)
    else:
        content["model"]["edit_lrs"] = Runs(mark)
    path = saved(content, tmp_path)
    with pytest.raises(ValueError, match="without running code from it.*it needs posix.system"):
        convert_editor(path, one, counterfact=False)
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists(), "the file is harmless, so the test shows nothing"


def test_a_configuration_cannot_smuggle(one, content, tmp_path):
    mark = tmp_path / "mark"
    content["model"]["model_config"].task_specific_params = Runs(mark)
    with pytest.raises(ValueError, match="without running code from it"):
        convert_editor(saved(content, tmp_path), one, counterfact=False)
    assert not mark.exists()


KEY, SHAPE = "mend.(128, 32).u_std", (128,)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("edit_lrs"), "lacks .*edit_lrs"),
        (lambda s: s.pop("mend.(32, 128).mlp.layers.1.u"), "layers.1.u"),
        (lambda s: s.pop("mend.(32, 128).u_s"), "u_s"),
        (lambda s: s.update({"mend.(1, 2).k": torch.ones(1)}), "unknown .*mend.\\(1, 2\\).k"),
        (lambda s: s.update({KEY: torch.ones(64)}), "shape \\(128,\\) .* shape \\(64,\\)"),
        (lambda s: s.update({KEY: torch.ones(SHAPE).double()}), "torch.float32 .* torch.float64"),
        (lambda s: s.update({KEY: torch.ones(SHAPE).to_sparse()}), "dense"),
        (lambda s: s.update({KEY: torch.ones(SHAPE, device="meta")}), "dense"),
        (lambda s: s.update({KEY: 3}), "it is a int"),
        (lambda s: s[KEY].fill_(torch.nan), "u_std contains NaN"),
        (lambda s: s["edit_lrs"].data.fill_(torch.inf), "edit_lrs contains NaN or infinity"),
        (lambda s: s[KEY].fill_(-1), "u_std is not a standard deviation"),
        (lambda s: s["mend.(128, 32).k"].fill_(1), "not a standard deviation"),
        (lambda s: s.update({0: 1}), "no dictionary of tensors"),
    ],
)
def test_what_is_not_as_it_should_be_is_refused(one, content, tmp_path, change, message):
    convert_editor(saved(content, tmp_path), one, counterfact=False)
    change(content["model"])
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=message):
        convert_editor(saved(content, tmp_path), one, counterfact=False, out=out)
    assert not out.exists()


def test_a_ke_editor_without_the_row_of_pad_is_refused(one, files, tmp_path):
    content = torch.load(files["ke", "gpt2"], weights_only=False)
    name = "editor.condition.embedding.weight"
    content["model"][name] = content["model"][name][:-1]
    with pytest.raises(ValueError, match="embedding.weight should be .*\\(441, 32\\)"):
        convert_editor(saved(content, tmp_path), one, counterfact=False)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.999, 0.99999])
def test_a_truncated_file_is_refused(one, files, tmp_path, share):
    whole = files["mend", "gpt2"].read_bytes()
    path = tmp_path / "part.pt"
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match="truncated"):
        convert_editor(path, one, counterfact=False)


def test_what_is_no_such_file_is_refused(one, files, content, tmp_path):
    def convert(path):
        convert_editor(path, one, counterfact=False)

    with pytest.raises(FileNotFoundError):
        convert(tmp_path / "none.pt")
    with pytest.raises(ValueError, match="no file"):
        convert(tmp_path)
    old = saved(content, tmp_path, "old.pt", _use_new_zipfile_serialization=False)
    text, packed, pickled, both = (tmp_path / name for name in ("text", "packed", "pickled", "two"))
    both.write_bytes(old.read_bytes() + files["mend", "gpt2"].read_bytes())
    assert zipfile.is_zipfile(both)  # to Python, but to torch it is a file of the old kind
    torch.load(both, weights_only=False)
    text.write_text("<html>404</html>")
    pickled.write_bytes(pickle.dumps({"model": {}}))
    with zipfile.ZipFile(files["mend", "gpt2"]) as whole:
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
            for name in whole.namelist():
                target.writestr(name, whole.read(name))
    for path in (old, text, packed, pickled, both):
        with pytest.raises(ValueError, match="cannot be read"):
            convert(path)
    for value in ([1, 2], torch.ones(3), {"model": [1]}, {"model": torch.ones(2)}):
        with pytest.raises(ValueError, match="no dictionary of tensors"):
            convert(saved(value, tmp_path))
    with pytest.raises(ValueError, match="lacks"):
        convert(saved({}, tmp_path))


@pytest.mark.parametrize("where", ["storage", "tensor", "expanded"])
def test_sizes_that_the_file_does_not_have_are_refused(one, content, tmp_path, where):
    """A number in the pickle says how long a storage, or how large a tensor, is."""
    marker, huge = 1_234_567, 2_000_000_011
    if where == "expanded":
        content["model"][KEY] = torch.ones(1).expand(huge, 128)
    else:
        content["model"][KEY] = torch.zeros(marker)
    path = saved(content, tmp_path)
    if where != "expanded":
        with zipfile.ZipFile(path) as file:
            parts = {name: file.read(name) for name in file.namelist()}
        name = next(n for n in parts if n.endswith("data.pkl"))
        number, replaced = (b"J" + n.to_bytes(4, "little") for n in (marker, huge))
        assert parts[name].count(number) == 2  # the storage's length, then the tensor's size
        at = parts[name].find(number) if where == "storage" else parts[name].rfind(number)
        parts[name] = parts[name][:at] + replaced + parts[name][at + len(number) :]
        with zipfile.ZipFile(path, "w") as target:
            for name, part in parts.items():
                target.writestr(name, part)
    with pytest.raises(ValueError):
        convert_editor(path, one, counterfact=False)


# ------------------------------------------------------------ other models


def test_other_models_are_refused(model_class, tokenizer, gpt2, files, content, tmp_path):
    gptj, llama = (make_model(model_class, shape, tokenizer) for shape in ("gptj", "llama"))
    with pytest.raises(NotImplementedError, match="only for GPT-2 and GPT-J"):
        convert_editor(files["mend", "gpt2"], llama, counterfact=False)
    with pytest.raises(ValueError, match="GPT2.*GPTJ"):
        convert_editor(files["mend", "gpt2"], gptj, counterfact=False)
    with pytest.raises(ValueError, match="GPTJ.*GPT2"):
        convert_editor(files["mend", "gptj"], gpt2, counterfact=False)
    with pytest.raises(ValueError, match="KE editor, and those are for GPT-2"):
        ke = torch.load(files["ke", "gpt2"], weights_only=False)
        ke["model"].pop("model_config")
        convert_editor(saved(ke, tmp_path, "ke.pt"), gptj, counterfact=False)
    content["model"]["model_config"].n_layer = 48
    with pytest.raises(ValueError, match="48, 32"):
        convert_editor(saved(content, tmp_path), gpt2, counterfact=False)
    folded = make_model(model_class, "gpt2", tokenizer, processed=True)
    with pytest.raises(ValueError, match="folded or centred"):
        convert_editor(files["mend", "gpt2"], folded, counterfact=False)
    other = make_model(model_class, "gpt2", tokenizer, seed=1)
    editor = convert_editor(files["mend", "gpt2"], gpt2, counterfact=False)
    with pytest.raises(ValueError, match="not the one that this editor was"):
        editor.compute(other, REQUEST)
