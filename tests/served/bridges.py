"""A tiny TransformerBridge of every architecture that TransformerLens registers."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from huggingface_hub import constants as hub
from served.tiny_configs import tiny_hf

_SSM = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_chunk_size": 8}
_MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}

OWN: dict[str, dict[str, Any]] = {
    "BambaForCausalLM": _SSM | {"attn_layer_indices": [1, 3]},
    "Emu3ForConditionalGeneration": {
        "vocabulary_map": {"<|extra_200|>": 5, "<image>": 6, "<|visual token 000000|>": 7},
    },
    "FalconH1ForCausalLM": _SSM | {"mamba_d_ssm": 64},
    "CodeGenForCausalLM": {"rotary_dim": 4},
    "DeepseekV2ForCausalLM": _MLA | {"num_experts_per_tok": 2},
    "DeepseekV3ForCausalLM": _MLA | {"n_group": 2, "topk_group": 1},
    "Ernie4_5_MoeForCausalLM": {"moe_k": 2},
    "GPTJForCausalLM": {"rotary_dim": 4},
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 2]], "window_size": 6},
    "GlmMoeDsaForCausalLM": _MLA
    | {"num_key_value_heads": 4, "index_head_dim": 16, "index_n_heads": 4, "index_topk": 8},
    "GraniteMoeHybridForCausalLM": _SSM
    | {"position_embedding_type": "rope", "layer_types": ["mamba", "attention"] * 2},
    "HunYuanDenseV1ForCausalLM": {"head_dim": 8},
    "Lfm2ForCausalLM": {"layer_types": ["conv", "full_attention"] * 2},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"] * 2},
    "Mamba2ForCausalLM": {"num_heads": 8},
    "JambaForCausalLM": {"attn_layer_offset": 1, "attn_layer_period": 2},
    "NemotronForCausalLM": {"num_key_value_heads": 2},
    "YoutuForCausalLM": _MLA,
    "Zamba2ForCausalLM": {
        "layer_types": ["mamba", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
        "n_mamba_heads": 8,
        "mamba_headdim": 8,
        "mamba_d_state": 16,
        "mamba_ngroups": 1,
        "num_mem_blocks": 1,
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
    },
}
"""What a family needs beyond small sizes."""

ALIASES = {
    "BloomModel": "BloomForCausalLM",
    "Gemma1ForCausalLM": "GemmaForCausalLM",
    "JetMoEForCausalLM": "JetMoeForCausalLM",
    "MPTForCausalLM": "MptForCausalLM",
    "NeoForCausalLM": "GPTNeoForCausalLM",
    "NeoXForCausalLM": "GPTNeoXForCausalLM",
    "PhiMoEForCausalLM": "PhimoeForCausalLM",
    "T5WithLMHeadModel": "T5ForConditionalGeneration",
}
"""Names that checkpoints carry, and the class of transformers that loads them."""


_LEGACY = "no model class: TransformerLens boots such checkpoints as TransformerLensNative"
OWN_MODULE = {
    "MinGPTForCausalLM": _LEGACY,
    "NeelSoluOldForCausalLM": _LEGACY,
    "NanoGPTForCausalLM": "no model class: it wraps a nanoGPT module of the user's",
    "TransformerLensPretrain": "no model class: it wraps a training module of the user's",
}
"""Adapters that no configuration makes a model for."""


def families() -> list[str]:
    """Every registered architecture."""
    from transformer_lens.factories import architecture_adapter_factory as factory

    return list(factory.SUPPORTED_ARCHITECTURES)


class NotBootable(Exception):
    """Why a family has no tiny model here."""


def build(name: str, tokenizer: Any) -> Any:
    """A tiny random bridge.

    Raises:
        NotBootable: transformers has no class for it.
    """
    from transformer_lens.model_bridge import TransformerBridge

    if name == "TransformerLensNative":
        return _native(tokenizer)
    kind = ALIASES.get(name, name)
    if name in OWN_MODULE:
        raise NotBootable(OWN_MODULE[name])
    if not hasattr(transformers, kind):
        raise NotBootable("needs remote code: transformers has no class of this name")
    hf_model = tiny_hf(kind, tokenizer, **OWN.get(kind, {}))
    hf_model.config.architectures = [name]
    with offline(), torch.random.fork_rng(devices=[]):
        model = TransformerBridge.boot_transformers(
            f"tiny-{name}",
            hf_model=hf_model,
            tokenizer=tokenizer,
            device="cpu",
            dtype=torch.float32,
        )
    model.cfg.default_prepend_bos = False
    return model.eval()


@contextmanager
def offline() -> Iterator[None]:
    """No hub is asked, and nothing is installed: TransformerLens runs pip for vision models."""

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("nothing is installed from here")

    before = subprocess.check_call, hub.HF_HUB_OFFLINE, os.environ.get("PIP_NO_INDEX")
    subprocess.check_call, hub.HF_HUB_OFFLINE, os.environ["PIP_NO_INDEX"] = refuse, True, "1"
    try:
        yield
    finally:
        subprocess.check_call, hub.HF_HUB_OFFLINE, no_index = before
        if no_index is None:
            del os.environ["PIP_NO_INDEX"]


def _native(tokenizer: Any) -> Any:
    """TransformerLens's own small model."""
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge

    cfg = TransformerBridgeConfig(
        d_model=32,
        d_head=8,
        n_heads=4,
        n_layers=4,
        n_ctx=128,
        d_vocab=len(tokenizer),
        d_mlp=120,
        act_fn="gelu",
        normalization_type="LN",
        seed=0,
    )
    return TransformerBridge.boot_native(cfg, tokenizer=tokenizer).eval()
