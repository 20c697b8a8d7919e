"""Hugging Face models of any architecture at a tiny size, with random weights, from a config alone.

A configuration class is asked for its own default; every field of it whose name is known here is
made small, also in nested configurations. What a family needs beyond that stands in `OWN`.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

N_LAYERS, D_MODEL, D_MLP, N_HEADS = 4, 32, 120, 4

_NAMES = (
    (D_MODEL, "hidden_size n_embd d_model word_embed_proj_dim embedding_size dim"),
    (D_MLP, "intermediate_size ffn_dim n_inner ffn_hidden_size d_ff"),
    (D_MLP, "encoder_ffn_dim decoder_ffn_dim mlp_hidden_size intermediate_size_mlp"),
    (N_LAYERS, "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers"),
    (N_LAYERS, "num_decoder_layers depth"),
    (N_HEADS, "num_attention_heads n_head n_heads num_heads encoder_attention_heads"),
    (N_HEADS, "decoder_attention_heads"),
    (2, "num_key_value_heads num_kv_heads num_experts_per_tok"),
    (4, "num_local_experts num_experts n_routed_experts moe_num_experts"),
    (24, "moe_intermediate_size shared_expert_intermediate_size"),
    (8, "head_dim"),
    (128, "max_position_embeddings n_positions n_ctx max_seq_len max_seq_length"),
    (6, "sliding_window"),
)
SIZES = {name: size for size, names in _NAMES for name in names.split()}


def config_of(kind: type, tokenizer: Any, **own: Any) -> Any:
    """A small configuration of a class, with a family's own fields put last."""
    default = kind()
    fields: dict[str, Any] = {}
    for name, part in (getattr(kind, "sub_configs", None) or {}).items():
        if isinstance(nested := getattr(default, name, None), transformers.PretrainedConfig):
            given = own.pop(name, {})
            fields[name] = config_of(type(nested), tokenizer, **given).to_dict()
        elif isinstance(own.get(name), dict):
            fields[name] = config_of(part, tokenizer, **own.pop(name)).to_dict()
    known = default.to_dict()
    fields |= {name: size for name, size in SIZES.items() if type(known.get(name)) is int}
    if "vocab_size" in known:
        fields["vocab_size"] = len(tokenizer)
    for name in ("bos", "eos", "pad"):
        if f"{name}_token_id" in known or hasattr(default, f"{name}_token_id"):
            fields[f"{name}_token_id"] = getattr(tokenizer, f"{name}_token_id")
    return kind(**(fields | own))


def tiny_hf(name: str, tokenizer: Any, **own: Any) -> Any:
    """A Hugging Face model class at a tiny size: float32, CPU, eval mode."""
    kind = getattr(transformers, name)
    config = config_of(kind.config_class, tokenizer, **own)
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(0)
        try:
            model = kind._from_config(config, attn_implementation="eager")
        except ValueError:
            model = kind._from_config(config)
    redraw(model, torch.Generator().manual_seed(0))
    return model.float().eval()


@torch.no_grad()
def redraw(model: nn.Module, generator: torch.Generator) -> None:
    """Draw every matrix anew, at a scale where it matters, and shake every vector."""
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if not parameter.is_floating_point():
                continue
            draw = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim < 2:
                parameter.add_(0.2 * draw)
            elif isinstance(module, nn.Embedding):
                parameter.copy_(0.4 * draw)
            else:  # [out, in], but Conv1D (GPT-2) is [in, out]
                fan_in = parameter.shape[0 if type(module).__name__ == "Conv1D" else -1]
                parameter.copy_(draw * fan_in**-0.5)
