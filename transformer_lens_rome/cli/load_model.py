"""Load the model of a command."""

from __future__ import annotations

from typing import Any

import torch

from transformer_lens_rome.demo import load_demo_model
from transformer_lens_rome.model.load import ModelClass, wrap
from transformer_lens_rome.torch_states import torch_defaults


@torch_defaults()
def load_model(name: str, model_class: ModelClass | None = None, *, device: Any = "cpu") -> Any:
    """Load a checkpoint from a hub name or a folder, unprocessed.

    "demo" is Gemma-3-270M, "demo:smollm2" SmolLM2-135M, see `load_demo_model`.
    """
    if name == "demo" or name.startswith("demo:"):
        which: Any = name.removeprefix("demo").removeprefix(":") or "gemma"
        return load_demo_model(which, model_class=model_class, device=device)
    import transformers

    with torch.random.fork_rng(devices=[]):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        hf = transformers.AutoModelForCausalLM.from_pretrained(name, dtype="auto").eval()
        return wrap(name, hf, tokenizer, model_class, device)
