"""Reject models, layers and weights that cannot be edited or traced, before any work."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from transformer_lens_rome.model import adapter, passes
from transformer_lens_rome.model.adapter import Weight
from transformer_lens_rome.model.protocol import Model


def check_model(model: Model) -> None:
    """Check that a model is a TransformerLens language model whose passes are deterministic.

    Raises:
        ValueError: It is not a TransformerLens model, or in each pass a module draws random numbers
            or updates running statistics. A training flag without such an effect is accepted.
        NotImplementedError: It does not read tokens from left to right in one stack of blocks, or
            it was compiled.
    """
    adapter.model_class(model)
    if reason := _reason_not_causal(model):
        raise NotImplementedError(
            f"{adapter.architecture(model)} {reason}; editing and tracing are for models that read "
            "tokens from left to right in one stack of blocks with a norm after it"
        )
    reason = next(_running_statistics(model), "")  # without a pass, which would update them
    if not reason and (suspect := next(_random_modules(model), "")) and _passes_are_random(model):
        reason = suspect
    if reason:
        raise ValueError(
            f"passes of this model are not deterministic: {reason}. Call model.eval() first, also "
            "on the Hugging Face model inside a bridge (model.original_model.eval())"
        )
    if any(module._compiled_call_impl is not None for _, module in adapter.every_module(model)):
        raise NotImplementedError(
            "the model was compiled, and a compiled module may skip hooks that are set later; load "
            "the model again without calling model.compile()"
        )


def _running_statistics(model: Model) -> Iterator[str]:
    """Describe each module that updates running statistics in every pass."""
    for name, module in adapter.every_module(model):
        tracks = isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats
        if tracks and module.training:
            kind = type(module).__name__
            yield f"{adapter.plain_name(name)} ({kind}) updates its running statistics"


_RATE = re.compile("drop|jitter|noise")


def _random_modules(model: Model) -> Iterator[str]:
    """Describe each module whose present flags and rates may make a pass random."""
    for name, module in adapter.every_module(model):
        if not module.training:
            continue
        where = f"{adapter.plain_name(name) or 'the model'} ({type(module).__name__})"
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            yield f"{where} has dropout on with p={module.p}"
        elif isinstance(module, nn.RReLU):
            yield f"{where} draws its slopes"
        inside = getattr(module, "original_component", None)  # may have a rate too
        for part in (module, inside):
            for key, rate in vars(part).items() if isinstance(part, nn.Module) else ():
                if isinstance(rate, float) and rate > 0 and _RATE.search(key):
                    yield f"{where} is in training mode with {key}={rate}"


@torch.no_grad()
def _passes_are_random(model: Model) -> bool:
    """Return whether a short pass draws random numbers or two passes give different results.

    The global random state is restored.
    """
    tokens = torch.arange(1, 9)[None] % model.cfg.d_vocab
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        before = torch.random.get_rng_state()
        one, other = (passes.final_residual(model, tokens) for _ in range(2))
        drawn = not torch.equal(before, torch.random.get_rng_state())
    return drawn or not torch.equal(one, other)


def _reason_not_causal(model: Model) -> str:
    """Return why a model is not one causal stack of blocks that reads text; empty if it is one."""
    if getattr(model.cfg, "is_audio_model", False):
        return "reads audio, not tokens"
    if getattr(model.cfg, "is_visual_model", False):
        return "reads images, not tokens"
    if not hasattr(model, "blocks"):
        return "has no single stack of blocks (an encoder and a decoder, or stacks in a loop)"
    bidirectional = getattr(model.cfg, "attention_dir", "causal") != "causal"
    if bidirectional or adapter.architecture(model).startswith(
        "Bert"
    ):  # "causal" in 3.x bridges of BERT
        return "attends to later tokens too"
    if not hasattr(model, "ln_final"):
        return "has no norm after its last block"
    return ""


def check_editable(model: Model, layers: Sequence[int]) -> None:
    """Check that the W_out of each layer can be read and written in place.

    Raises:
        ValueError: As `check_model`; a layer is out of range; a weight contains NaN or infinity; or
            weights were made inside `torch.inference_mode()`, so torch does not allow changing them
            or differentiating through them.
        NotImplementedError: As `check_model`; a layer has no dense W_out (mixture of experts, state
            space); or a weight is quantised or offloaded.
    """
    check_model(model)
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ValueError(
            "the model's weights were made inside torch.inference_mode(), so they cannot be edited "
            "or differentiated through; load the model outside of it"
        )
    for layer in layers:
        if type(layer) is not int or not 0 <= layer < model.cfg.n_layers:
            raise ValueError(
                f"layer {layer!r} is out of range; this model has layers 0 to "
                f"{model.cfg.n_layers - 1} (give a plain int)"
            )
        check_weight(adapter.w_out(model, layer), Weight("W_out", layer))


def check_weight(weight: Tensor, where: Weight) -> None:
    """Check that a weight is a dense matrix of finite numbers.

    Raises:
        NotImplementedError: The weight is quantised or offloaded.
        ValueError: The weight contains NaN or infinity.
    """
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
        raise ValueError(
            f"{name} contains NaN or infinity; reload the checkpoint before editing it"
        )
