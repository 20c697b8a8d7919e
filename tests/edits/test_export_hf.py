"""An exported folder is the edited model, for a reader that knows nothing of TransformerLens."""

import pytest
import torch
from conftest import make_model
from helpers import tiny_models
from helpers.rome_setting import LAYER, factored_edit, random_edit
from helpers.tiny_tokenizer import tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from transformer_lens_rome import applied, apply_edit, export_hf
from transformer_lens_rome.model.adapter import Weight, w_out, weight_hash

SHAPES = ("gpt2", "llama", "gemma3")
TOKENS = torch.tensor([[1, 37, 74, 111, 148]])  # within one sliding window


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


@torch.no_grad()
def logits(model):
    found = model(TOKENS)
    return getattr(found, "logits", found)


def hf_weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_folder_has_the_edited_models_logits(model_class, shape, rank, bos_tokenizer, tmp_path):
    model = make_model(model_class, shape, bos_tokenizer)
    hf = tiny_models.tiny_hf(shape, bos_tokenizer) if model_class == "hooked" else None
    source = None if hf is None else hf_weights(hf)
    before, unedited = weight_hash(w_out(model, LAYER)), logits(model)
    first = random_edit(model, seed=0, rank=rank, bias=shape == "gpt2")
    edits = [first, random_edit(model, layer=2, seed=1)]
    with applied(model, *edits):
        during = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        edited = logits(model)
        folder = export_hf(model, tmp_path / "out", hf_model=hf)
        torch.testing.assert_close(logits(load(folder)), edited, rtol=1e-3, atol=1e-4)
        assert (edited - unedited).abs().max() > 0.1  # control: the edits matter
        now = model.state_dict()
        assert all(torch.equal(now[name], tensor) for name, tensor in during.items())
    assert weight_hash(w_out(model, LAYER)) == before  # still revertible
    assert torch.equal(logits(model), unedited)
    if hf is not None:
        assert all(torch.equal(hf.state_dict()[name], tensor) for name, tensor in source.items())
    text = "The Space Needle is in"
    assert AutoTokenizer.from_pretrained(folder)(text).input_ids == bos_tokenizer(text).input_ids


@pytest.mark.parametrize("shape", [*SHAPES, "opt"])
def test_an_edit_of_several_matrices_is_in_the_folder(model_class, shape, bos_tokenizer, tmp_path):
    model = make_model(model_class, shape, bos_tokenizer)
    hf = tiny_models.tiny_hf(shape, bos_tokenizer) if model_class == "hooked" else None
    names = ["W_in", "W_gate", "W_out"] if shape in ("llama", "gemma3") else ["W_in", "W_out"]
    for name in names:  # each matrix on its own, so that none can hide behind another
        edit = factored_edit(model, [Weight(name, layer) for layer in (0, 2)])
        unedited = logits(model)
        with applied(model, edit):
            edited = logits(model)
            folder = export_hf(model, tmp_path / name, hf_model=hf)
        torch.testing.assert_close(logits(load(folder)), edited, rtol=1e-3, atol=1e-4)
        assert (edited - unedited).abs().max() > 0.1 and torch.equal(logits(model), unedited)


def test_an_edit_of_a_fused_matrix_is_refused(model_class, bos_tokenizer, tmp_path):
    model = make_model(model_class, "phi3", bos_tokenizer)
    hf = tiny_models.tiny_hf("phi3", bos_tokenizer) if model_class == "hooked" else None
    for name in ("W_in", "W_gate"):
        edit = factored_edit(model, [Weight(name, LAYER), Weight("W_out", LAYER)])
        with applied(model, edit), pytest.raises(ValueError, match=f"{name} of layer 1.*fused"):
            export_hf(model, tmp_path, hf_model=hf)
        assert not list(tmp_path.iterdir())
    with applied(model, factored_edit(model, [Weight("W_out", LAYER)])):
        edited = logits(model)
        folder = export_hf(model, tmp_path / "out", hf_model=hf)
    torch.testing.assert_close(logits(load(folder)), edited, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_an_unedited_model_is_exported_as_it_is(model_class, shape, bos_tokenizer, tmp_path):
    model = make_model(model_class, shape, bos_tokenizer)
    hf = tiny_models.tiny_hf(shape, bos_tokenizer)
    folder = export_hf(model, tmp_path, hf_model=hf if model_class == "hooked" else None)
    loaded, expected = load(folder).state_dict(), hf.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def test_after_the_undo_the_export_is_the_old_model(gpt2, model_class, tokenizer, tmp_path):
    hf = tiny_models.tiny_hf("gpt2", tokenizer)
    apply_edit(gpt2, random_edit(gpt2)).revert()
    folder = export_hf(gpt2, tmp_path, hf_model=hf if model_class == "hooked" else None)
    assert torch.equal(logits(load(folder)), logits(hf))


@pytest.mark.skipif(not tiny_models.has_hooked(), reason="no HookedTransformer")
def test_a_hooked_transformer_needs_the_model_it_came_from(tokenizer, tmp_path):
    model = make_model("hooked", "gpt2", tokenizer)
    other = tiny_models.tiny_hf("gpt2", tokenizer, seed=1)
    with applied(model, random_edit(model)):
        with pytest.raises(ValueError, match="pass the one that it was loaded from"):
            export_hf(model, tmp_path)
        with pytest.raises(ValueError, match="has no tensor equal to W_out of layer 0"):
            export_hf(model, tmp_path, hf_model=other)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not tiny_models.has_hooked(), reason="no HookedTransformer")
def test_a_processed_hooked_transformer_is_refused(tokenizer, tmp_path):
    model = make_model("hooked", "gpt2", tokenizer, processed=True)
    hf = tiny_models.tiny_hf("gpt2", tokenizer)
    with applied(model, random_edit(model)), pytest.raises(ValueError, match="weight processing"):
        export_hf(model, tmp_path, hf_model=hf)


@pytest.mark.skipif(not tiny_models.has_bridge(), reason="no bridge")
def test_a_processed_bridge_is_refused(tokenizer, tmp_path):
    model = make_model("bridge", "gpt2", tokenizer, processed=True)
    with applied(model, random_edit(model)):
        with pytest.raises(ValueError, match="enable_compatibility_mode"):
            export_hf(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_tokens_and_a_template_that_were_added_are_in_the_folder(model_class, tmp_path):
    """Exported ids are those of `model.tokenizer`; BOS is the checkpoint's own rule."""
    tokenizer = tiny_tokenizer(tmp_path / "own", bos=False)
    model = make_model(model_class, "gpt2", tokenizer)
    hf = tiny_models.tiny_hf("gpt2", tokenizer) if model_class == "hooked" else None
    model.tokenizer.add_tokens(["<fact>", "Needle"])
    model.tokenizer.add_special_tokens({"sep_token": "<sep>"})
    model.tokenizer.chat_template = "<fact>{{ messages[0]['content'] }}<sep>"
    found = AutoTokenizer.from_pretrained(export_hf(model, tmp_path / "out", hf_model=hf))
    text = "<fact>The Space Needle is in<sep> Rome"
    for one in (found, model.tokenizer):
        assert (
            one.convert_ids_to_tokens(one(text, add_special_tokens=False).input_ids)[0] == "<fact>"
        )
    ids = [one(text, add_special_tokens=False).input_ids for one in (found, model.tokenizer)]
    assert ids[0] == ids[1] and found.sep_token == "<sep>"
    said = [{"role": "user", "content": "Rome"}]
    assert found.apply_chat_template(said, tokenize=False) == "<fact>Rome<sep>"
    assert found("Rome").input_ids == tokenizer("Rome").input_ids  # no BOS, as its files have it


def test_a_tokenizer_that_cannot_be_written_so_is_refused(model_class, tmp_path):
    from tokenizers import normalizers

    tokenizer = tiny_tokenizer(tmp_path / "own", bos=False)
    model = make_model(model_class, "gpt2", tokenizer)
    hf = tiny_models.tiny_hf("gpt2", tokenizer) if model_class == "hooked" else None
    model.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ValueError, match="other ids than its files"):
        export_hf(model, tmp_path / "out", hf_model=hf)
