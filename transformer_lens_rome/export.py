"""Write the edited model as a plain Hugging Face checkpoint, for use without TransformerLens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transformer_lens_rome import adapter
from transformer_lens_rome.adapter import Weight
from transformer_lens_rome.ledger import base_weight
from transformer_lens_rome.prompts import checkpoint_tokenizer


def export_hf(model: Any, folder: Any, *, hf_model: Any = None) -> Path:
    """Write weights, configuration and tokenizer that `AutoModelForCausalLM` loads.

    Args:
        model: The model with its edits on.
        folder: Where to write; made if it is not there.
        hf_model: For a HookedTransformer, which holds only converted copies of the weights: the
            Hugging Face model that it was loaded from. It is left as it is.

    Raises:
        ValueError: no Hugging Face model to start from, one with other weights, or a bridge whose
            weights were processed.
    """
    inside = adapter.hf_model(model)
    if inside is None and hf_model is None:
        raise ValueError(
            "a HookedTransformer keeps no Hugging Face model; pass the one that it was loaded from "
            "as hf_model=AutoModelForCausalLM.from_pretrained(name)"
        )
    source = hf_model if inside is None else inside
    state = _state_dict(source)
    if inside is None:
        for layer in range(model.cfg.n_layers):
            _replace(state, model, Weight("W_out", layer))
            bias = Weight("b_out", layer)
            if (base := base_weight(model, bias)) is not None:
                if not torch.equal(base, adapter.parameter(model, bias)):
                    _replace(state, model, bias)
    folder = Path(folder)
    whole = {name: tensor.cpu().contiguous() for name, tensor in state.items()}
    source.save_pretrained(folder, state_dict=whole)
    if getattr(model, "tokenizer", None) is not None:
        checkpoint_tokenizer(model.tokenizer).save_pretrained(folder)
    return folder


def _replace(state: dict[str, Tensor], model: Any, where: Weight) -> None:
    """Put an edited weight in place of the tensor whose bytes are its base's, in either layout."""
    base, edited = base_weight(model, where), adapter.parameter(model, where).detach()
    for name, tensor in state.items():
        for stored in (tensor, tensor.T) if tensor.ndim == 2 else (tensor,):
            if stored.shape == base.shape and torch.equal(stored.to(base), base):
                state[name] = (edited if stored is tensor else edited.T).to(tensor)
                return
    raise ValueError(
        f"hf_model holds no tensor equal to {where.name} of layer {where.layer} before its edits; "
        "pass the model that this HookedTransformer was loaded from (without weight processing), "
        "and undo changes that were not made by apply_edit"
    )


def _state_dict(hf: Any) -> dict[str, Tensor]:
    """The state dict under the checkpoint's own names; a bridge adds names of its own to it."""
    with torch.device("meta"):
        own_names = set(type(hf)(hf.config).state_dict())
    state: dict[str, Tensor] = {}
    for name, tensor in hf.state_dict().items():
        name = name.replace("._original_component", "")
        if name in own_names:
            state.setdefault(name, tensor.detach())
    return state
