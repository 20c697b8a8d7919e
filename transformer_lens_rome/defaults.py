"""What an edit uses when its caller does not say: the layer, and how far the value may move.

A table for models whose layer was chosen by an experiment, and a rule from the model's shape for
all others.
"""

from __future__ import annotations

import logging
from typing import Any

from transformer_lens_rome import adapter

logger = logging.getLogger(__name__)

LAYERS = {
    "gpt2-medium": 8,
    "gpt2-large": 12,
    "gpt2-xl": 17,
    "gpt-j-6b": 5,
    "gpt-neox-20b": 15,
    "gemma-3-270m": 5,
}
"""Released configurations (Meng et al. 2022; MEMIT's repository for NeoX), and our own sweep."""

CLAMPS = {"gpt2-medium": 3.0}
"""Released configurations that differ from 4."""


def short_name(model: Any) -> str:
    """A checkpoint's name without its owner, in lower case: `EleutherAI/gpt-j-6B` -> `gpt-j-6b`."""
    return adapter.model_name(model).split("/")[-1].lower()


def default_layer(model: Any) -> int:
    """The layer to edit: from the table, else a third of the way up.

    The released layers stand at 0.18 (GPT-J) to 0.35 (GPT-2 XL) of the depth.
    """
    name = short_name(model)
    if name in LAYERS and LAYERS[name] < model.cfg.n_layers:
        logger.info("layer %d, the default of %s", LAYERS[name], name)
        return LAYERS[name]
    layer = model.cfg.n_layers // 3
    logger.warning(
        "no layer is known to be good for %s: using layer %d of %d, a third of the way up; "
        "sweep_layers(model, records, layers) finds a better one",
        name,
        layer,
        model.cfg.n_layers,
    )
    return layer


def default_clamp(model: Any, layer: int) -> float:
    """How far the value may move, in units of its norm.

    The released 4 (3 for GPT-2 medium); 1 where a norm follows the MLP. That norm makes the
    effect of a larger value saturate, while the weight's change at every other key keeps growing.
    """
    if adapter.norm_follows_mlp(model, layer):
        return 1.0
    return CLAMPS.get(short_name(model), 4.0)
