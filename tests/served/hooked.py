"""A tiny HookedTransformer of every architecture that TransformerLens 3 converts weights from."""

from __future__ import annotations

import inspect
import re
import tempfile
from typing import Any

import torch
import transformers
from served.bridges import OWN, NotBootable
from served.tiny_configs import D_MLP, D_MODEL, N_HEADS, N_LAYERS, redraw, tiny_hf

_SIZES = {
    "d_model": D_MODEL,
    "d_head": 8,
    "n_heads": N_HEADS,
    "n_layers": N_LAYERS,
    "d_mlp": D_MLP,
    "n_ctx": 128,
    "device": "cpu",
}
_ROTARY = {"positional_embedding_type": "rotary", "rotary_dim": 8, "gated_mlp": True}
_RMS = _ROTARY | {"normalization_type": "RMS", "final_rms": True, "eps": 1e-6}
_GEMMA = _RMS | {"n_key_value_heads": 2, "act_fn": "gelu_pytorch_tanh"}
_TYPES = ["local", "global"] * 2
_GEMMA2 = _GEMMA | {
    "use_normalization_before_and_after": True,
    "use_local_attn": True,
    "window_size": 6,
    "attn_types": _TYPES,
}
_GEMMA3 = _GEMMA2 | {"use_qk_norm": True, "rotary_base": 1_000_000, "rotary_base_local": 10_000}
_OLMO = _ROTARY | {"act_fn": "silu", "attn_types": ["global"] * 4}

BY_HAND: dict[str, dict[str, Any]] = {
    "GemmaForCausalLM": _GEMMA,
    "Gemma2ForCausalLM": _GEMMA2 | {"attn_scores_soft_cap": 50.0, "output_logits_soft_cap": 30.0},
    "Gemma3ForCausalLM": _GEMMA3,
    "Gemma3ForConditionalGeneration": _GEMMA3,
    "OlmoForCausalLM": _OLMO | {"normalization_type": "LN"},
    "Olmo2ForCausalLM": _OLMO | {"normalization_type": "RMS", "eps": 1e-6},
    "PhiForCausalLM": {
        "act_fn": "gelu_new",
        "normalization_type": "LN",
        "positional_embedding_type": "rotary",
        "rotary_dim": 4,
        "parallel_attn_mlp": True,
    },
    "neel": {"act_fn": "gelu", "normalization_type": "LNPre"},
    "neel, attention only": {"attn_only": True, "normalization_type": "LNPre"},
    "neel-solu-old": {"act_fn": "solu_ln", "normalization_type": "LNPre"},
    "mingpt": {"act_fn": "gelu", "normalization_type": "LN"},
}
"""Where TransformerLens knows the sizes by the checkpoint's name, the configuration is our own."""

OWN_MODELS = ("neel", "neel, attention only")
"""TransformerLens's own models, of which no weights are converted."""

_LAYERS = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "query_pre_attn_scalar": 8,
}
_ALL_HEADS = {"num_key_value_heads": N_HEADS}
HF_OWN = {name: _LAYERS for name in BY_HAND if name.startswith(("Gemma2", "Gemma3ForCausal"))}
HF_OWN |= {
    "Gemma3ForConditionalGeneration": {"text_config": _LAYERS},
    "GPT2LMHeadModel": {"n_ctx": 128},
    "PhiForCausalLM": _ALL_HEADS,
    "OlmoForCausalLM": _ALL_HEADS,
    "Olmo2ForCausalLM": _ALL_HEADS,
}

_ENCODER = {
    "act_fn": "gelu",
    "attention_dir": "bidirectional",
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "seed": 0,
}
OTHER_CLASS = {
    "BertForMaskedLM": "HookedEncoder",
    "HubertForCTC": "HookedAudioEncoder",
    "HubertModel": "HookedAudioEncoder",
    "T5ForConditionalGeneration": "HookedEncoderDecoder",
    "Wav2Vec2ForPreTraining": "HookedAudioEncoder",
    "Wav2Vec2Model": "HookedAudioEncoder",
}
"""Architectures that TransformerLens puts in another class than HookedTransformer."""


def families() -> list[str]:
    """Every architecture that weights are converted from, and TransformerLens's own models."""
    from transformer_lens import loading_from_pretrained as loading

    source = inspect.getsource(loading.get_pretrained_state_dict)
    names = re.findall(r'original_architecture == "([^"]+)"', source)
    return [*dict.fromkeys(names), *OWN_MODELS]


def build(name: str, tokenizer: Any) -> Any:
    """A tiny random HookedTransformer, or what TransformerLens has in its place.

    Raises:
        NotBootable: transformers has no class for it.
    """
    import transformer_lens
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    kept = {"d_vocab": len(tokenizer), "original_architecture": name, "model_name": f"tiny-{name}"}
    own = name.startswith(("neel", "mingpt"))
    if not own and not hasattr(transformers, name):
        raise NotBootable("needs remote code: transformers has no class of this name")
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory(prefix="tiny") as folder:
        if name in OTHER_CLASS:
            cfg = HookedTransformerConfig(**_SIZES, **kept, **_ENCODER)
            return getattr(transformer_lens, OTHER_CLASS[name])(cfg).eval()
        if own:
            model = HookedTransformer(
                HookedTransformerConfig(**_SIZES, **kept, **BY_HAND[name]), tokenizer=tokenizer
            )
            redraw(model, torch.Generator().manual_seed(0))
        else:
            hf_model = tiny_hf(name, tokenizer, **(HF_OWN.get(name) or OWN.get(name, {})))
            model = _converted(name, hf_model, tokenizer, folder, kept)
    model.cfg.default_prepend_bos = False
    return model.eval()


@torch.no_grad()
def _converted(name: str, hf_model: Any, tokenizer: Any, folder: str, kept: dict[str, Any]) -> Any:
    """A HookedTransformer with a Hugging Face model's weights, as TransformerLens converts them."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens import loading_from_pretrained as loading

    hf_model.config.architectures = [name]
    hf_model.config.save_pretrained(folder)
    if name in BY_HAND:
        cfg = HookedTransformerConfig(**_SIZES, **kept, **BY_HAND[name])
    else:
        cfg = loading.get_pretrained_model_config(folder, device="cpu")
    cfg.init_weights, cfg.dtype = False, torch.float32
    weights = loading.get_pretrained_state_dict(folder, cfg, hf_model=hf_model, dtype=torch.float32)
    model = HookedTransformer(cfg, tokenizer=tokenizer)
    plain = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
    model.load_and_process_state_dict(weights, **dict.fromkeys(plain, False))
    return model
