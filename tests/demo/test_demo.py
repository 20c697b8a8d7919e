"""The bundled model is unpacked once, and again only where its copy is not what it should be."""

from importlib.metadata import version

import pytest
import torch
import transformers

from transformer_lens_rome.demo import gemma as demo
from transformer_lens_rome.model.adapter import w_out
from transformer_lens_rome.prompts.encoder import Encoder
from transformer_lens_rome.prompts.sampling import sample_tokens
from transformer_lens_rome.statistics.sources import bundled_texts


class Unpacked(Exception):
    pass


@pytest.fixture
def asked(monkeypatch):
    """Nothing is unpacked; the folder that should be is in an exception."""

    def unpack(path, folder):
        raise Unpacked(folder)

    monkeypatch.setattr(demo, "_unpack", unpack)


@pytest.mark.parametrize("held", [None, b"", b"not the weights"])
def test_what_is_missing_or_damaged_is_unpacked(asked, held, monkeypatch, tmp_path):
    monkeypatch.setenv("TRANSFORMER_LENS_ROME_CACHE", str(tmp_path))
    monkeypatch.setattr(demo, "demo_weights", lambda: None)
    folder = tmp_path / "gemma-3-270m" / f"transformers-{transformers.__version__}"
    if held is not None:
        (folder / "model").mkdir(parents=True)
        (folder / "model" / "model.safetensors").write_bytes(held)
    with pytest.raises(Unpacked) as found:
        demo.load_demo_hf()
    assert found.value.args == (folder,)


@pytest.mark.real_model
def test_what_is_there_is_not_unpacked_again(gemma, asked):
    model, tokenizer = demo.load_demo_hf()
    for layer in (0, 17):
        assert torch.equal(model.model.layers[layer].mlp.down_proj.weight.T, w_out(gemma, layer))
    assert tokenizer("The Space Needle")["input_ids"] == [2, 818, 13510, 154649]


@pytest.mark.real_model
@pytest.mark.skipif(version("transformer-lens") < "4", reason="sampled anew on one version")
def test_the_text_that_ships_is_the_models_own(gemma):
    """Sampling anew gives the same first tokens; `scripts/sample_text.py` made the whole."""
    texts, encoder = bundled_texts(gemma), Encoder.of(gemma)
    assert len(texts) == 69
    tokens = sample_tokens(gemma, len(texts), 4, generator=torch.Generator().manual_seed(0))
    begun = encoder.tokenizer.batch_decode(tokens[:, 1:], skip_special_tokens=True)
    assert all(text.startswith(first) for text, first in zip(texts, begun, strict=True))
    other = sample_tokens(gemma, len(texts), 4, generator=torch.Generator().manual_seed(1))
    begun = encoder.tokenizer.batch_decode(other[:, 1:], skip_special_tokens=True)
    alike = [text.startswith(first) for text, first in zip(texts, begun, strict=True)]
    assert sum(alike) < 5
