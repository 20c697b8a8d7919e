"""Tiny random models of every shape that matters, offline, for Hugging Face and TransformerLens.

One shape and one seed give the same weights in all three classes, so a test can compare them:
``tiny_hf`` is the ground truth, ``tiny_bridge`` wraps it (TransformerLens 3 and 4) and
``tiny_hooked`` copies it into a ``HookedTransformer`` (TransformerLens 2 and 3).

Every parameter is redrawn, biases and norm weights too, at a scale where each of them matters:
logits have a standard deviation near 2, an MLP moves the residual stream about as much as the
embedding does, sliding windows are 6 tokens and soft caps bend. No model has ``d_mlp == d_model``,
so a transposed ``W_out`` cannot go unnoticed.
"""

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

N_LAYERS, D_MODEL, D_MLP, N_HEADS, N_KV_HEADS, D_HEAD_WIDE = 3, 32, 120, 4, 2, 16
N_CTX, WINDOW = 128, 6
LAYER_TYPES = ("sliding_attention", "full_attention", "sliding_attention")

_SIZES = {
    "hidden_size": D_MODEL,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": N_HEADS,
    "max_position_embeddings": N_CTX,
}
_NEOX = _SIZES | {"intermediate_size": D_MLP, "tie_word_embeddings": False}
_LLAMA = _NEOX | {"num_key_value_heads": N_KV_HEADS}
_GEMMA = _LLAMA | {
    "head_dim": D_HEAD_WIDE,
    "query_pre_attn_scalar": D_HEAD_WIDE,
    "sliding_window": WINDOW,
    "layer_types": list(LAYER_TYPES),
    "tie_word_embeddings": True,
}
_GPT = {"n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": N_HEADS, "n_positions": N_CTX}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

# shape -> (Hugging Face model type, configuration)
_HF: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", _GPT),
    "gptj": ("gptj", _GPT | {"rotary_dim": 4}),
    "neox": ("gpt_neox", _NEOX),
    "llama": ("llama", _LLAMA),
    "qwen2": ("qwen2", _LLAMA),
    "qwen3": ("qwen3", _LLAMA | {"head_dim": D_HEAD_WIDE}),
    "mistral": ("mistral", _LLAMA | {"sliding_window": WINDOW}),
    "phi": ("phi", _NEOX),
    "phi3": ("phi3", _LLAMA),
    "opt": ("opt", _SIZES | {"ffn_dim": D_MLP, "word_embed_proj_dim": D_MODEL}),
    "gemma2": (
        "gemma2",
        _GEMMA | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 8.0},
    ),
    "gemma3": ("gemma3_text", _GEMMA | {"num_key_value_heads": 1}),
    "bloom": ("bloom", {"hidden_size": D_MODEL, "n_layer": N_LAYERS, "n_head": N_HEADS}),
    "mixtral": ("mixtral", _LLAMA | _EXPERTS),
}
MOE_SHAPES: tuple[str, ...] = ("mixtral",)
SHAPES: tuple[str, ...] = tuple(shape for shape in _HF if shape not in MOE_SHAPES)

_LN = {"normalization_type": "LN"}
_ROTARY_LN = _LN | {"positional_embedding_type": "rotary", "parallel_attn_mlp": True}
_RMS = {
    "normalization_type": "RMS",
    "positional_embedding_type": "rotary",
    "final_rms": True,
    "gated_mlp": True,
    "act_fn": "silu",
    "n_key_value_heads": N_KV_HEADS,
}
_LOCAL = {"use_local_attn": True, "window_size": WINDOW}
_HOOKED_GEMMA = (
    _RMS
    | _LOCAL
    | {
        "act_fn": "gelu_pytorch_tanh",
        "attn_types": ["local" if t == "sliding_attention" else "global" for t in LAYER_TYPES],
        "use_normalization_before_and_after": True,
        "d_head": D_HEAD_WIDE,
    }
)

# shape -> HookedTransformerConfig fields; the converter is named after the shape
_HOOKED: dict[str, dict[str, Any]] = {
    "gpt2": _LN | {"act_fn": "gelu_new"},
    "gptj": _ROTARY_LN | {"act_fn": "gelu_new", "rotary_dim": 4, "rotary_adjacent_pairs": True},
    "neox": _ROTARY_LN | {"act_fn": "gelu", "rotary_dim": 2},
    "llama": _RMS,
    "qwen2": _RMS,
    "qwen3": _RMS | {"d_head": D_HEAD_WIDE, "use_qk_norm": True},
    "mistral": _RMS | _LOCAL | {"attn_types": ["local"] * N_LAYERS},
    "phi": _ROTARY_LN | {"act_fn": "gelu_new", "rotary_dim": 4},
    "phi3": _RMS,
    "opt": _LN | {"act_fn": "relu"},
    "gemma2": _HOOKED_GEMMA | {"attn_scores_soft_cap": 3.0, "output_logits_soft_cap": 8.0},
    "gemma3": _HOOKED_GEMMA
    | {
        "use_qk_norm": True,
        "n_key_value_heads": 1,
        "rotary_base": 1_000_000,
        "rotary_base_local": 10_000,
    },
    "bloom": _LN
    | {"act_fn": "gelu_fast", "post_embedding_ln": True, "positional_embedding_type": "alibi"},
    "mixtral": _RMS | {"num_experts": 4, "experts_per_token": 2, "rotary_base": 1_000_000},
}


def tiny_hf(shape: str, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0) -> PreTrainedModel:
    """Build a Hugging Face model with random weights: float32, CPU, eval mode, eager attention.

    Args:
        shape: one of ``SHAPES`` or ``MOE_SHAPES``.
        tokenizer: fixes the vocabulary and the special tokens.
        seed: the same seed gives the same weights; torch's own random state is left alone.
    """
    model_type, fields = _HF[shape]
    config = AutoConfig.for_model(
        model_type,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **fields,
    )
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.config.architectures = [type(model).__name__]
    _redraw(model, torch.Generator().manual_seed(seed), gemma=shape.startswith("gemma"))
    return model.float().eval()


def tiny_bridge(
    shape: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    processed: bool = False,
) -> Any:
    """Build a ``TransformerBridge`` around ``tiny_hf(shape, tokenizer, seed=seed)``.

    Args:
        shape: as for ``tiny_hf``.
        tokenizer: as for ``tiny_hf``.
        seed: as for ``tiny_hf``.
        dtype: cast the Hugging Face model to this first.
        processed: fold layer norms and centre, by ``enable_compatibility_mode()``.
    """
    from transformer_lens.model_bridge import TransformerBridge

    dtype = dtype or torch.float32
    with torch.random.fork_rng(devices=[]):
        model = TransformerBridge.boot_transformers(
            f"tiny-{shape}",
            hf_model=tiny_hf(shape, tokenizer, seed=seed).to(dtype),
            tokenizer=tokenizer,
            device="cpu",
            dtype=dtype,
        )
        model.cfg.default_prepend_bos = _adds_bos(tokenizer)
        if processed:
            model.enable_compatibility_mode(disable_warnings=True)
    return model.eval()


def tiny_hooked(
    shape: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int = 0,
    processed: bool = False,
) -> Any:
    """Build a ``HookedTransformer`` with the weights of ``tiny_hf(shape, tokenizer, seed=seed)``.

    Args:
        shape: one of ``hooked_shapes()``; others raise ``KeyError``.
        tokenizer: as for ``tiny_hf``.
        seed: as for ``tiny_hf``.
        processed: fold layer norms and value biases, and centre, as ``from_pretrained`` does.
    """
    if shape not in hooked_shapes():
        raise KeyError(f"no HookedTransformer of shape {shape!r} here; see hooked_shapes()")
    import transformer_lens.loading_from_pretrained as loading
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    hf_model = tiny_hf(shape, tokenizer, seed=seed)
    cfg = HookedTransformerConfig(**_hooked_fields(shape, hf_model, tokenizer))
    cfg.norm_topk_prob = shape in MOE_SHAPES  # a field in 3.x only; 2.18 always normalises
    converter = "gemma" if shape.startswith("gemma") else shape
    convert = getattr(loading, f"convert_{converter}_weights")
    centre = processed and cfg.normalization_type == "LN"
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model = HookedTransformer(cfg, tokenizer=tokenizer)
        model.load_and_process_state_dict(
            convert(hf_model, cfg),
            fold_ln=processed,
            center_writing_weights=centre,
            center_unembed=processed and cfg.output_logits_soft_cap <= 0,
            fold_value_biases=processed,
        )
    return model.eval()


def has_bridge() -> bool:
    """Whether the installed TransformerLens has ``TransformerBridge`` (3 and 4)."""
    return find_spec("transformer_lens.model_bridge") is not None


def has_hooked() -> bool:
    """Whether the installed TransformerLens has ``HookedTransformer`` (2 and 3)."""
    return find_spec("transformer_lens.HookedTransformer") is not None


def hooked_shapes() -> tuple[str, ...]:
    """List the shapes ``tiny_hooked`` can build with the installed TransformerLens."""
    return tuple(_HOOKED) if has_hooked() else ()


def _hooked_fields(
    shape: str, hf_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Collect the ``HookedTransformerConfig``'s fields: the shape's own and the shared ones."""
    config = hf_model.config
    eps_names = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon")
    widths = ("intermediate_size", "ffn_dim")
    shared = {
        "n_layers": N_LAYERS,
        "d_model": D_MODEL,
        "n_heads": N_HEADS,
        "d_head": D_MODEL // N_HEADS,
        "d_mlp": next((getattr(config, n) for n in widths if hasattr(config, n)), 4 * D_MODEL),
        "d_vocab": len(tokenizer),
        "n_ctx": N_CTX,
        "eps": next((getattr(config, n) for n in eps_names if hasattr(config, n)), 1e-5),
        "original_architecture": type(hf_model).__name__,
        "model_name": f"tiny-{shape}",
        "device": "cpu",
        "init_weights": False,
        "default_prepend_bos": _adds_bos(tokenizer),
    }
    return shared | _HOOKED[shape]


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether plain encoding prepends BOS."""
    return tokenizer("a").input_ids[0] == tokenizer.bos_token_id


@torch.no_grad()
def _redraw(model: nn.Module, generator: torch.Generator, *, gemma: bool) -> None:
    """Draw every parameter of ``model`` anew: mean 0, but mean 1 for norm weights.

    Gemma's norms multiply by ``1 + w``, so there the mean of ``w`` is 0. Matrices have standard
    deviation ``1 / sqrt(fan_in)``, embeddings and unembeddings 0.4, vectors 0.2.
    """
    unembed = model.get_output_embeddings()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 1:
                std = 0.2
            elif isinstance(module, nn.Embedding) or module is unembed:
                std = 0.4
            else:  # [out, in], but Conv1D (GPT-2) is [in, out]
                std = parameter.shape[0 if type(module).__name__ == "Conv1D" else -1] ** -0.5
            mean = float(parameter.ndim == 1 and name == "weight" and not gemma)
            draw = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(mean + std * draw)
