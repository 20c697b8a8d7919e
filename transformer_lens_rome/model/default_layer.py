"""The default layer of an edit.

A table lists models whose layer was chosen by an experiment. For other models, the layer follows
from the model's shape.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from transformer_lens_rome.model import adapter, passes, refusals
from transformer_lens_rome.model.adapter import Point, short_name
from transformer_lens_rome.model.calls import model_call
from transformer_lens_rome.model.protocol import Model
from transformer_lens_rome.model.self_check import trials_of

logger = logging.getLogger(__name__)

LAYERS = {
    "gpt2-medium": 8,
    "gpt2-large": 12,
    "gpt2-xl": 17,
    "gpt-j-6b": 5,
    "gpt-neox-20b": 15,
    "gemma-3-270m": 0,
    "smollm2-135m-instruct": 1,
}
"""Released configurations (Meng et al. 2022; MEMIT's repository for NeoX); Gemma's and SmolLM2's
are from test edits on records with true paraphrases (examples/guide/which_layer.md)."""


@model_call
def default_layer(model: Model) -> int:
    """Return the layer to edit, from the table or else from the model's shape.

    The rule is a third of the depth, as the released layers are at 0.18 (GPT-J) to 0.35 (GPT-2 XL)
    of the depth. If a norm follows the MLP, it is an eighteenth. The only evidence for this is
    Gemma-3-270M: layer 0 of 18 was best, and deeper ones leaked more. On SmolLM2-135M, which has no
    such norm, layers 1 to 6 of 30 were alike and layer 8 was worse, so a third may be too deep.
    """
    name = short_name(model)
    if name in LAYERS and LAYERS[name] < model.cfg.n_layers:
        logger.info("layer %d, the default of %s", LAYERS[name], name)
        return LAYERS[name]
    third = model.cfg.n_layers // 3
    refusals.check_editable(model, [third])
    layer = model.cfg.n_layers // 18 if norm_follows_mlp(model, third) else third
    logger.warning(
        "no layer is known to be good for %s: using layer %d of %d, chosen from the model's shape; "
        "sweep_layers(model, records, layers) finds a better one",
        name,
        layer,
        model.cfg.n_layers,
    )
    return layer


@model_call
@torch.no_grad()
def norm_follows_mlp(model: Model, layer: int) -> bool:
    """Return whether a norm follows the MLP in its block, as in Gemma 2 and 3 and OLMo 2.

    This is tested by scaling the value by 0, 2 and 4. In a plain block the output moves as far from
    2 to 4 as from 0 to 2. With a norm after the MLP it hardly moves from 2 to 4. The result is kept
    on the model.
    """
    known, key = trials_of(model), f"a norm follows the MLP of layer {layer}"
    if key not in known:
        known[key] = _saturates(model, layer)
    return bool(known[key])


def _saturates(model: Model, layer: int) -> bool:
    """Return whether a block's output hardly moves if a large value grows."""
    value, resid = Point("value", layer), Point("resid_post", layer)
    tokens = torch.arange(1, 9)[None] % model.cfg.d_vocab

    def output(factor: float) -> Tensor:
        with adapter.hooks(model, [(value, lambda tensor: factor * tensor)]):
            return passes.read(model, tokens, [resid])[resid].float()

    none, two, four = output(0.0), output(2.0), output(4.0)
    return bool((four - two).norm() < 0.5 * (two - none).norm())
