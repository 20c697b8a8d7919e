"""Write the edited model as a plain Hugging Face checkpoint, for use without TransformerLens."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from transformer_lens_rome.edits.base_bytes import live_weight
from transformer_lens_rome.edits.checkpoint import Checkpoint
from transformer_lens_rome.edits.ledger import base_weight, edited_weights
from transformer_lens_rome.model.adapter import Weight
from transformer_lens_rome.model.calls import weights_call
from transformer_lens_rome.model.protocol import Model
from transformer_lens_rome.prompts.encoder import checkpoint_tokenizer


@weights_call
def export_hf(model: Model, folder: Any, *, hf_model: Any = None) -> Path:
    """Write weights, configuration and tokenizer in a format that `AutoModelForCausalLM` loads.

    The tokenizer is the checkpoint's, plus the tokens and the chat template that were added later.

    Args:
        model: The edited model.
        folder: The output folder; created if it does not exist.
        hf_model: Needed for a HookedTransformer, which has only converted copies of the weights:
            the Hugging Face model that it was loaded from. It is not changed.

    Raises:
        ValueError: there is no Hugging Face model to start from, its weights differ, the weights
            of a bridge were processed, or an edited matrix is fused with another one in the
            checkpoint.
    """
    checkpoint = Checkpoint.of(model, hf_model)
    state = dict(checkpoint.tensors)
    edited = [where for where in edited_weights(model) if _differs(model, where)]
    every = [Weight("W_out", layer) for layer in range(model.cfg.n_layers)]
    for where in dict.fromkeys(every + edited if checkpoint.converted else edited):
        name, turned = checkpoint.stored(model, where)  # also a check that the edits are in it
        weight = live_weight(model, where).detach()
        state[name] = (weight.T if turned else weight).to(state[name])
    folder = Path(folder)
    whole = {name: tensor.cpu().contiguous() for name, tensor in state.items()}
    checkpoint.model.save_pretrained(folder, state_dict=whole)
    if getattr(model, "tokenizer", None) is not None:
        _tokenizer(model.tokenizer).save_pretrained(folder)
    return folder


def _tokenizer(tokenizer: Any) -> Any:
    """Return the checkpoint's tokenizer, plus tokens and chat template that were added later.

    The model's tokenizer is not used: TransformerLens loads it again, with BOS switched on.
    """
    original = checkpoint_tokenizer(tokenizer)
    if original is tokenizer:
        return tokenizer
    exported, known = copy.deepcopy(original), original.added_tokens_decoder
    added = {i: t for i, t in sorted(tokenizer.added_tokens_decoder.items()) if i not in known}
    for token in added.values():
        exported.add_tokens([token], special_tokens=token.special)
    # TransformerLens fills missing special tokens with these
    by_host = {tokenizer.eos_token, tokenizer.bos_token}
    for name, token in tokenizer.special_tokens_map.items():
        was = exported.special_tokens_map.get(name)
        if token != was and not (was is None and token in by_host):
            exported.add_special_tokens({name: token})
    exported.chat_template = tokenizer.chat_template
    text = "".join(
        ["Ａ text — “with” ﬁ, e\u0301 and every added token: ", *map(str, added.values())]
    )
    if exported(text, add_special_tokens=False).input_ids != (
        tokenizer(text, add_special_tokens=False).input_ids
    ):
        raise ValueError(
            "the model's tokenizer gives other ids than its files do, even with the added tokens; "
            "undo the change, export, and repeat the change on the exported tokenizer"
        )
    return exported


def _differs(model: Model, where: Weight) -> bool:
    """Return whether the edits on a weight change its values."""
    weight = live_weight(model, where)
    base = base_weight(model, where)
    assert base is not None  # an edited weight
    return not torch.equal(base.to(weight), weight)
