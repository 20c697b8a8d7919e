"""Wrap a Hugging Face model as a TransformerLens model of either class."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch

from transformer_lens_rome.torch_states import torch_defaults

ModelClass = Literal["bridge", "hooked"]


@torch_defaults()
def wrap(
    name: str,
    hf: Any,
    tokenizer: Any,
    model_class: ModelClass | None = None,
    device: Any = "cpu",
) -> Any:
    """Return a Hugging Face model as a TransformerLens model of either class, in eval mode.

    The device is set for both. By default, TransformerLens puts tokens on a GPU if there is one,
    but does not move the weights of a model that is passed to it.
    """
    hf = hf.to(device)
    options: dict[str, Any] = {"tokenizer": tokenizer, "device": str(device)}
    if (model_class or default_class()) == "bridge":
        from transformer_lens.model_bridge import TransformerBridge

        return TransformerBridge.boot_transformers(name, hf_model=hf, **options).eval()
    if Path(name).is_dir():
        raise ValueError(
            f"a HookedTransformer is loaded by a name from TransformerLens, not from {name}; "
            "use model_class='bridge' (TransformerLens 3.8 or later)"
        )
    from transformer_lens import HookedTransformer

    return HookedTransformer.from_pretrained_no_processing(
        name, hf_model=hf, dtype=hf.dtype, **options
    ).eval()


def hooked_llama(name: str, hf: Any, tokenizer: Any, device: Any = "cpu") -> Any:
    """Return a Llama as a HookedTransformer, for checkpoints that TransformerLens does not list.

    The context is at most 2,048 tokens, since each block stores a mask of its square.
    """
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.loading_from_pretrained import convert_llama_weights

    config, bos = hf.config, tokenizer.bos_token_id
    cfg = HookedTransformerConfig(
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        n_heads=config.num_attention_heads,
        n_key_value_heads=config.num_key_value_heads,
        d_head=config.hidden_size // config.num_attention_heads,
        d_mlp=config.intermediate_size,
        d_vocab=config.vocab_size,
        n_ctx=min(config.max_position_embeddings, 2048),
        eps=config.rms_norm_eps,
        act_fn=config.hidden_act,
        normalization_type="RMS",
        final_rms=True,
        gated_mlp=True,
        positional_embedding_type="rotary",
        rotary_base=int(_rope_theta(config)),
        rotary_dim=config.hidden_size // config.num_attention_heads,
        original_architecture="LlamaForCausalLM",
        model_name=name.split("/")[-1],
        tokenizer_name=name,
        default_prepend_bos=bos is not None and tokenizer("a").input_ids[:1] == [bos],
        dtype=torch.float32,
        init_weights=False,
        device=str(device),
    )
    with torch.no_grad():
        model = HookedTransformer(cfg, tokenizer=tokenizer, default_padding_side="right")
        model.load_and_process_state_dict(
            convert_llama_weights(hf, cfg),
            fold_ln=False,
            center_writing_weights=False,
            center_unembed=False,
            fold_value_biases=False,
        )
    return model.to(device, print_details=False).eval()


def _rope_theta(config: Any) -> float:
    """Return the base of the rotations; transformers 5 keeps it among the rope's parameters."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return parameters.get("rope_theta") or config.rope_theta


def default_class() -> ModelClass:
    """Return the default class to load: a bridge, unless TransformerLens (2.x) has none."""
    return "bridge" if find_spec("transformer_lens.model_bridge") else "hooked"
