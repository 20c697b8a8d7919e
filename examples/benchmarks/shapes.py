"""Models of well-known shapes with random weights, for speed and memory where no weights are."""

from __future__ import annotations

from typing import Any

import torch

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),
    "gpt2-xl": ("gpt2", {"n_embd": 1600, "n_layer": 48, "n_head": 25}),
    "gpt-j-6b": ("gptj", {"n_embd": 4096, "n_layer": 28, "n_head": 16, "rotary_dim": 64}),
    "llama-7b": (
        "llama",
        {
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "tie_word_embeddings": False,
        },
    ),
}
"""Hugging Face model type, and what differs from its defaults."""


def random_model(shape: str, tokenizer_folder: str, device: str, dtype: torch.dtype) -> Any:
    """A TransformerBridge of that shape; the vocabulary is the tokenizer's."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    model_type, fields = SHAPES[shape]
    config = AutoConfig.for_model(model_type, vocab_size=len(tokenizer), **fields)
    with torch.random.fork_rng(), torch.device(device):
        torch.random.manual_seed(0)
        hf_model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    hf_model.config.architectures = [type(hf_model).__name__]
    return TransformerBridge.boot_transformers(
        f"random-{shape}", hf_model=hf_model, tokenizer=tokenizer, device=device, dtype=dtype
    ).eval()
