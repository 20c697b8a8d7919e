"""What an edit uses when its caller does not say: the layer, and how far the value may move.

A table for models whose layer was chosen by an experiment, and a rule from the model's shape for
all others.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from transformer_lens_rome.model import adapter, passes, refusals
from transformer_lens_rome.model.adapter import Point, short_name
from transformer_lens_rome.model.calls import model_call

logger = logging.getLogger(__name__)

LAYERS = {
    "gpt2-medium": 8,
    "gpt2-large": 12,
    "gpt2-xl": 17,
    "gpt-j-6b": 5,
    "gpt-neox-20b": 15,
    "gemma-3-270m": 0,
}
"""Released configurations (Meng et al. 2022; MEMIT's repository for NeoX); our sweep for Gemma."""


@model_call
def default_layer(model: Any) -> int:
    """The layer to edit: from the table, else from the model's shape.

    A third of the way up, as the released layers stand at 0.18 (GPT-J) to 0.35 (GPT-2 XL) of the
    depth; an eighteenth where a norm follows the MLP, for which Gemma-3-270M is the only evidence:
    there layers 0 and 1 of 18 were best, and deeper ones leaked more and generalised less.
    """
    name = short_name(model)
    if name in LAYERS and LAYERS[name] < model.cfg.n_layers:
        logger.info("layer %d, the default of %s", LAYERS[name], name)
        return LAYERS[name]
    third = model.cfg.n_layers // 3
    refusals.check_editable(model, [third])
    layer = model.cfg.n_layers // 18 if norm_follows_mlp(model, third) else third
    logger.warning(
        "no layer is known to be good for %s: using layer %d of %d, from the shape of the model; "
        "sweep_layers(model, records, layers) finds a better one",
        name,
        layer,
        model.cfg.n_layers,
    )
    return layer


@model_call
@torch.no_grad()
def norm_follows_mlp(model: Any, layer: int) -> bool:
    """Whether the block normalises the MLP's output before adding it (Gemma 2 and 3, OLMo 2).

    Found by doing: from two to four times the value, a plain block's output moves by as much as
    from none to two times, while behind a norm it hardly moves.
    """
    value, resid = Point("value", layer), Point("resid_post", layer)
    tokens = torch.arange(1, 9)[None] % model.cfg.d_vocab

    def output(times: float) -> Tensor:
        with adapter.hooks(model, [(value, lambda tensor: times * tensor)]):
            return passes.read(model, tokens, [resid])[resid].float()

    none, two, four = output(0.0), output(2.0), output(4.0)
    return bool((four - two).norm() < 0.5 * (two - none).norm())
