"""Adapters of every edit; a refused one leaves no folder, and no folder is written over."""

import json

import pytest
import torch
from conftest import make_model
from helpers import tiny_models
from helpers.exported import SHAPES, close, load, logits, parts, setting_of
from helpers.rome_setting import LAYER, factored_edit, random_edit

from transformer_lens_rome import DenseEdit, applied, apply_edit, export_hf, export_lora
from transformer_lens_rome.edits import export_lora as lora
from transformer_lens_rome.model.adapter import Weight, w_out


@pytest.fixture(params=SHAPES)
def setting(request, model_class, bos_tokenizer):
    return setting_of(request.param, model_class, bos_tokenizer)


def refused(model, edits, folder, message, error=ValueError, **options):
    """Check that nothing is written, and that the sentence says what helps."""
    before = sorted(folder.iterdir())
    with pytest.raises(error, match=message):
        export_lora(model, edits, folder / "out", **options)
    assert sorted(folder.iterdir()) == before


def test_edits_that_no_adapter_can_hold_are_refused(setting, tmp_path):
    model, edit = setting.model, random_edit(setting.model)
    if setting.shape in ("gpt2", "opt"):
        biased = random_edit(model, rank=2, bias=True)
        refused(model, biased, tmp_path, "b_out of layer 1.*export_hf", **setting.hf)
        unbiased = DenseEdit(**vars(biased) | {"bias": torch.zeros_like(biased.bias)})
        export_lora(model, unbiased, tmp_path / "zero bias", **setting.hf)
    refused(model, edit * 0, tmp_path, "changes nothing", **setting.hf)
    refused(model, [], tmp_path, "an edit or a list of edits", **setting.hf)
    refused(model, [edit, "edit"], tmp_path, "an edit or a list of edits", **setting.hf)
    refused(model, [edit, edit], tmp_path, "twice", **setting.hf)
    refused(model, edit, tmp_path, "no name of a repository", base_model="../x", **setting.hf)
    refused(model, edit, tmp_path, "license should be", license="a: b", **setting.hf)
    with torch.no_grad():
        w_out(model, LAYER).mul_(1.5)
    refused(model, edit, tmp_path, "not the weight that this edit was made on", **setting.hf)


def test_a_fused_matrix_is_refused(model_class, bos_tokenizer, tmp_path):
    model = make_model(model_class, "phi3", bos_tokenizer)
    hf = tiny_models.tiny_hf("phi3", bos_tokenizer)
    options = {"hf_model": hf} if model_class == "hooked" else {}
    for name in ("W_in", "W_gate"):
        edit = factored_edit(model, [Weight(name, LAYER), Weight("W_out", LAYER)])
        refused(model, edit, tmp_path, f"{name} of layer 1.*fused", **options)
    export_lora(model, factored_edit(model, [Weight("W_out", LAYER)]), tmp_path / "out", **options)


def test_processed_weights_are_refused(model_class, tokenizer, tmp_path):
    model = make_model(model_class, "gpt2", tokenizer, processed=True)
    hooked = model_class == "hooked"
    message = "without weight processing" if hooked else "enable_compatibility_mode"
    hf = {"hf_model": tiny_models.tiny_hf("gpt2", tokenizer)} if hooked else {}
    refused(model, random_edit(model), tmp_path, message, **hf)


@pytest.mark.skipif(not tiny_models.has_hooked(), reason="no HookedTransformer")
def test_a_hooked_transformer_needs_the_model_it_came_from(tokenizer, tmp_path):
    model = make_model("hooked", "gpt2", tokenizer)
    edit = random_edit(model)
    refused(model, edit, tmp_path, "pass the one that it was loaded from")
    other = tiny_models.tiny_hf("gpt2", tokenizer, seed=1)
    refused(model, edit, tmp_path, "no tensor equal to W_out of layer 1", hf_model=other)


def tied_gpt2(model_class, tokenizer, tie, monkeypatch):
    """A GPT-2 whose Hugging Face model was changed by `tie` before TransformerLens took it."""
    make = tiny_models.tiny_hf

    def changed(*args, **options):
        hf = make(*args, **options)
        tie(hf.transformer.h)
        return hf

    monkeypatch.setattr(tiny_models, "tiny_hf", changed)
    model = make_model(model_class, "gpt2", tokenizer)
    return model, {"hf_model": changed("gpt2", tokenizer)} if model_class == "hooked" else {}


def test_tied_matrices_are_refused(model_class, tokenizer, tmp_path, monkeypatch):
    def tie(h):
        h[2].mlp.c_proj.weight = h[LAYER].mlp.c_proj.weight

    model, options = tied_gpt2(model_class, tokenizer, tie, monkeypatch)
    message = r"one parameter with transformer\.h\.2\.mlp\.c_proj\.weight"
    refused(model, random_edit(model), tmp_path, message, **options)


def test_equal_matrices_are_told_apart_by_their_layers(
    model_class, tokenizer, tmp_path, monkeypatch
):
    """In a model that is not trained yet, all may be zeros."""

    def equal(h):
        for block in h:
            torch.nn.init.zeros_(block.mlp.c_proj.weight)

    model, options = tied_gpt2(model_class, tokenizer, equal, monkeypatch)
    edit = random_edit(model, layer=2)
    config = parts(export_lora(model, edit, tmp_path / "out", **options))[2]
    assert config["target_modules"] == ["transformer.h.2.mlp.c_proj"]
    with applied(model, edit):
        whole = load(export_hf(model, tmp_path / "whole", **options))
        close(logits(whole), logits(model))
    assert whole.transformer.h[2].mlp.c_proj.weight.any()
    assert not whole.transformer.h[0].mlp.c_proj.weight.any()


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "link to nothing"])
def test_nothing_is_written_over(gpt2, tokenizer, tmp_path, kind):
    there = tmp_path / "out"
    if "folder" in kind:
        there.mkdir()
    if kind == "folder":
        (there / "adapter_config.json").write_text("mine")
    elif kind == "file":
        there.write_text("mine")
    elif kind == "link to nothing":
        there.symlink_to(tmp_path / "nowhere")
    hf = tiny_models.tiny_hf("gpt2", tokenizer)
    refused(gpt2, random_edit(gpt2), tmp_path, "out exists", FileExistsError, hf_model=hf)
    if kind == "folder":
        assert [p.read_text() for p in there.iterdir()] == ["mine"]


def test_an_error_half_way_leaves_nothing(gpt2, tokenizer, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(lora, "adapter_card", full)  # the last of the three files
    hf = tiny_models.tiny_hf("gpt2", tokenizer)
    refused(gpt2, random_edit(gpt2), tmp_path, "no space", OSError, hf_model=hf)


# ---------------------------------------------------------------- the base model's name


def test_the_base_model_is_named_if_it_has_a_name_on_the_hub(setting, tmp_path, monkeypatch):
    model, edit = setting.model, random_edit(setting.model)
    hf = setting.hf.get("hf_model") or model.original_model
    for name, base in (("gpt2", "gpt2"), ("owner/name", "owner/name"), (str(tmp_path), None)):
        hf.config._name_or_path, hf.config._commit_hash = name, "0123abc"
        folder = export_lora(model, edit, tmp_path / name.replace("/", "_"), **setting.hf)
        config, card = parts(folder)[2], (folder / "README.md").read_text()
        revision = None if base is None else "0123abc"
        assert (config["base_model_name_or_path"], config["revision"]) == (base, revision)
        assert str(tmp_path) not in card + json.dumps(config)
        assert (f'base_model: "{base}"' in card) == (base is not None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)  # a folder here, though it reads as a name
    hf.config._name_or_path = "models/mine"
    config = parts(export_lora(model, edit, tmp_path / "folder", **setting.hf))[2]
    assert config["base_model_name_or_path"] is None and config["revision"] is None
    folder = export_lora(model, edit, tmp_path / "given", base_model="a/b", **setting.hf)
    config = parts(folder)[2]
    assert (config["base_model_name_or_path"], config["revision"]) == ("a/b", None)


def test_an_applied_edit_is_taken_as_the_edit(gpt2, tokenizer, tmp_path):
    hf = tiny_models.tiny_hf("gpt2", tokenizer)
    with apply_edit(gpt2, random_edit(gpt2)) as on:
        first = export_lora(gpt2, on, tmp_path / "on", hf_model=hf)
    second = export_lora(gpt2, on.edit, tmp_path / "off", hf_model=hf)
    assert parts(first)[2] == parts(second)[2]
    assert all(torch.equal(parts(first)[0][n], t) for n, t in parts(second)[0].items())
