"""The tiny GPT-2 that knows facts, of the reference data, in each model class."""

from __future__ import annotations

import torch


def tiny_gpt2(folder, model_class):
    """Load it from the folder of the reference numbers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = folder / "tiny_gpt2"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if model_class == "bridge":
        from transformer_lens.model_bridge import TransformerBridge

        return TransformerBridge.boot_transformers("gpt2", hf_model=hf, tokenizer=tokenizer).eval()
    return _hooked_gpt2(hf, tokenizer)


def _hooked_gpt2(hf, tokenizer):
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens import loading_from_pretrained as loading

    config = hf.config
    cfg = HookedTransformerConfig(
        n_layers=config.n_layer,
        d_model=config.n_embd,
        d_mlp=4 * config.n_embd,
        n_ctx=config.n_positions,
        n_heads=config.n_head,
        d_head=config.n_embd // config.n_head,
        d_vocab=config.vocab_size,
        act_fn="gelu_new",
        normalization_type="LN",
        original_architecture="GPT2LMHeadModel",
        device="cpu",
    )
    model = HookedTransformer(cfg, tokenizer=tokenizer)
    state = loading.convert_gpt2_weights(hf, cfg)
    off = dict.fromkeys(
        ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), False
    )
    model.load_and_process_state_dict(state, **off)
    return model.eval()
