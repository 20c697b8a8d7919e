"""Write the edited model as a plain Hugging Face checkpoint, for use without TransformerLens."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from transformer_lens_rome.edits.ledger import base_weight, edited_weights
from transformer_lens_rome.model import adapter
from transformer_lens_rome.model.adapter import Weight
from transformer_lens_rome.model.calls import weights_call
from transformer_lens_rome.prompts.encoder import checkpoint_tokenizer


@weights_call
def export_hf(model: Any, folder: Any, *, hf_model: Any = None) -> Path:
    """Write weights, configuration and tokenizer that `AutoModelForCausalLM` loads.

    The tokenizer is the checkpoint's, with the tokens and the chat template that were added since.

    Args:
        model: The model with its edits on.
        folder: Where to write; made if it is not there.
        hf_model: For a HookedTransformer, which holds only converted copies of the weights: the
            Hugging Face model that it was loaded from. It is left as it is.

    Raises:
        ValueError: no Hugging Face model to start from, one with other weights, or a bridge whose
            weights were processed; or an edit of a matrix that the checkpoint keeps fused with
            another.
    """
    inside = adapter.hf_model(model)
    if inside is None and hf_model is None:
        raise ValueError(
            "a HookedTransformer keeps no Hugging Face model; pass the one that it was loaded from "
            "as hf_model=AutoModelForCausalLM.from_pretrained(name)"
        )
    source = hf_model if inside is None else inside
    state = _state_dict(source)
    edited = [where for where in edited_weights(model) if _differs(model, where)]
    if inside is None:
        every = [Weight("W_out", layer) for layer in range(model.cfg.n_layers)]
        for where in dict.fromkeys(every + edited):
            _replace(state, model, where)
    else:  # its state dict holds the edited weights, unless it holds a copy from before the split
        for where in edited:
            _find(state, adapter.parameter(model, where), where, "after")
    folder = Path(folder)
    whole = {name: tensor.cpu().contiguous() for name, tensor in state.items()}
    source.save_pretrained(folder, state_dict=whole)
    if getattr(model, "tokenizer", None) is not None:
        _tokenizer(model.tokenizer).save_pretrained(folder)
    return folder


def _tokenizer(tokenizer: Any) -> Any:
    """The checkpoint's tokenizer, with the tokens and the chat template that were added since.

    Not the model's own: TransformerLens loads that one anew, with BOS switched on.
    """
    own = checkpoint_tokenizer(tokenizer)
    if own is tokenizer:
        return tokenizer
    own, known = copy.deepcopy(own), own.added_tokens_decoder
    added = {i: t for i, t in sorted(tokenizer.added_tokens_decoder.items()) if i not in known}
    for token in added.values():
        own.add_tokens([token], special_tokens=token.special)
    by_host = {tokenizer.eos_token, tokenizer.bos_token}  # what it puts where there is none
    for name, token in tokenizer.special_tokens_map.items():
        was = own.special_tokens_map.get(name)
        if token != was and not (was is None and token in by_host):
            own.add_special_tokens({name: token})
    own.chat_template = tokenizer.chat_template
    text = "".join(
        ["Ａ text — “with” ﬁ, e\u0301 and every added token: ", *map(str, added.values())]
    )
    if own(text, add_special_tokens=False).input_ids != (
        tokenizer(text, add_special_tokens=False).input_ids
    ):
        raise ValueError(
            "the model's tokenizer gives other ids than its files do, even with the added tokens "
            "in place; take the change back, export, and make it anew on the exported tokenizer"
        )
    return own


def _differs(model: Any, where: Weight) -> bool:
    """Whether the edits on a weight change it."""
    weight = adapter.parameter(model, where)
    return not torch.equal(base_weight(model, where).to(weight), weight)


def _replace(state: dict[str, Tensor], model: Any, where: Weight) -> None:
    """Put an edited weight in place of the tensor whose bytes are its base's, in either layout."""
    name, turned = _find(state, base_weight(model, where), where, "before")
    edited = adapter.parameter(model, where).detach()
    state[name] = (edited.T if turned else edited).to(state[name])


def _find(
    state: dict[str, Tensor], weight: Tensor, where: Weight, when: Literal["before", "after"]
) -> tuple[str, bool]:
    """The tensor with the bytes of a weight, and whether it is stored the other way round."""
    for name, tensor in state.items():
        for turned in (False, True) if tensor.ndim == 2 else (False,):
            stored = tensor.T if turned else tensor
            if stored.shape == weight.shape and torch.equal(stored.to(weight), weight):
                return name, turned
    raise ValueError(
        f"hf_model holds no tensor equal to {where.name} of layer {where.layer} {when} its edits; "
        "pass the model that this HookedTransformer was loaded from (without weight processing), "
        "and undo changes that were not made by apply_edit; a matrix that the checkpoint keeps "
        "fused with another (Phi-3's W_in and W_gate) cannot be exported"
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
