"""Models, layers and weights that cannot be edited or traced: refused before any work, and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from transformer_lens_rome import adapter
from transformer_lens_rome.adapter import Weight


def check_evaluating(model: Any) -> None:
    """Refuse what is no TransformerLens model of text, or in training mode.

    Raises:
        ValueError: not a TransformerLens model, or in training mode.
        NotImplementedError: it does not read tokens from left to right in one stack of blocks.
    """
    adapter.model_class(model)
    if reason := _not_left_to_right(model):
        raise NotImplementedError(
            f"{adapter.architecture(model)} {reason}; editing and tracing are for models that read "
            "tokens from left to right in one stack of blocks with a norm after it"
        )
    if model.training:
        raise ValueError("the model is in training mode (dropout is on); call model.eval() first")


def _not_left_to_right(model: Any) -> str:
    """What keeps a model from being one stack of blocks that reads text; empty if nothing does."""
    if getattr(model.cfg, "is_audio_model", False):
        return "reads audio, not tokens"
    if getattr(model.cfg, "is_visual_model", False):
        return "reads images, not tokens"
    if not hasattr(model, "blocks"):
        return "has no single stack of blocks (an encoder and a decoder, or stacks in a loop)"
    both = getattr(model.cfg, "attention_dir", "causal") != "causal"
    if both or adapter.architecture(model).startswith("Bert"):  # 3.x bridges say "causal" of BERT
        return "attends to later tokens too"
    if not hasattr(model, "ln_final"):
        return "has no norm after its last block"
    return ""


def check_editable(model: Any, layers: Sequence[int]) -> None:
    """Refuse, before any work, a model or layer whose W_out cannot be read and written in place.

    Raises:
        ValueError: not a TransformerLens model, in training mode, or a layer out of range.
        NotImplementedError: no dense W_out there (mixture of experts, state space), or a weight
            that is quantised or offloaded.
    """
    check_evaluating(model)
    for layer in layers:
        if type(layer) is not int or not 0 <= layer < model.cfg.n_layers:
            raise ValueError(
                f"layer {layer!r} is out of range; this model has layers 0 to "
                f"{model.cfg.n_layers - 1} (give a plain int)"
            )
        check_weight(adapter.w_out(model, layer), Weight("W_out", layer))


def check_weight(weight: Tensor, where: Weight) -> None:
    """Refuse a weight that is quantised, offloaded or broken; raises as `check_editable` does."""
    name = f"{where.name} of layer {where.layer}"
    if weight.is_meta:
        raise NotImplementedError(
            f"{name} is offloaded (meta device); load the model without offload"
        )
    if not weight.is_floating_point():
        raise NotImplementedError(
            f"{name} is quantised ({weight.dtype}); load the model in float32, bfloat16 or float16"
        )
    if not torch.isfinite(weight).all():
        raise ValueError(f"{name} holds NaN or infinity; reload the checkpoint before editing it")
