"""A tiny model with what its Hugging Face side needs, and readers of exported folders."""

import json
from types import SimpleNamespace

import torch
from conftest import make_model
from helpers import tiny_models
from safetensors import safe_open
from transformers import AutoModelForCausalLM

SHAPES = ("gpt2", "llama", "gemma3", "opt")  # the first has Conv1D, the others Linear
TOKENS = torch.tensor([[1, 37, 74, 111, 148]])


def setting_of(shape, model_class, tokenizer):
    """A tiny model, what makes its Hugging Face model, and the argument that exports need."""
    make = lambda: tiny_models.tiny_hf(shape, tokenizer)  # noqa: E731
    model = make_model(model_class, shape, tokenizer)
    hf = {"hf_model": make()} if model_class == "hooked" else {}
    return SimpleNamespace(model=model, shape=shape, make=make, hf=hf)


def load(folder, **options):
    """An exported model, as transformers reads it."""
    with torch.random.fork_rng(devices=[]):
        options = {"attn_implementation": "eager"} | options
        return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@torch.no_grad()
def logits(model):
    """The logits of five tokens, of a model of any library."""
    found = model(TOKENS)
    return getattr(found, "logits", found)


def parts(folder):
    """The tensors, the metadata and the configuration of an adapter."""
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        metadata = file.metadata()
    return tensors, metadata, json.loads((folder / "adapter_config.json").read_text())


def close(found, expected):
    """Equal to float32 rounding: 20 units in the last place of the largest logit."""
    worst = (found - expected).abs().max() / expected.abs().max()
    assert worst < 20 * torch.finfo(torch.float32).eps, worst
