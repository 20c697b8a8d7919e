"""Models, layers and weights that cannot be edited or traced: refused before any work, and why."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from transformer_lens_rome.model import adapter, passes
from transformer_lens_rome.model.adapter import Weight


def check_model(model: Any) -> None:
    """Refuse what is no TransformerLens model of text, and a model in which a pass is random now.

    Raises:
        ValueError: not a TransformerLens model; or a module draws random numbers, or changes its
            own statistics, in each pass. A training flag without such an effect is no reason.
        NotImplementedError: it does not read tokens from left to right in one stack of blocks, or
            it was compiled.
    """
    adapter.model_class(model)
    if reason := _not_left_to_right(model):
        raise NotImplementedError(
            f"{adapter.architecture(model)} {reason}; editing and tracing are for models that read "
            "tokens from left to right in one stack of blocks with a norm after it"
        )
    reason = next(_running_statistics(model), "")  # no pass is run here, as it would change them
    if not reason and (suspect := next(_random_modules(model), "")) and _passes_are_random(model):
        reason = suspect
    if reason:
        raise ValueError(
            f"passes of this model are random now: {reason}. Call model.eval() first, also on the "
            "Hugging Face model inside a bridge (model.original_model.eval())"
        )
    if any(module._compiled_call_impl is not None for _, module in adapter.every_module(model)):
        raise NotImplementedError(
            "the model was compiled, and a compiled module may skip hooks that are set later; load "
            "the model again and leave model.compile() away"
        )


def _running_statistics(model: Any) -> Iterator[str]:
    """Each module that updates running statistics in every pass."""
    for name, module in adapter.every_module(model):
        kept = isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats
        if kept and module.training:
            kind = type(module).__name__
            yield f"{adapter.plain_name(name)} ({kind}) updates its running statistics"


_RATE = re.compile("drop|jitter|noise")


def _random_modules(model: Any) -> Iterator[str]:
    """Each module whose flags and rates may make a pass random as they are now."""
    for name, module in adapter.every_module(model):
        if not module.training:
            continue
        where = f"{adapter.plain_name(name) or 'the model'} ({type(module).__name__})"
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            yield f"{where} has dropout on with p={module.p}"
        elif isinstance(module, nn.RReLU):
            yield f"{where} draws its slopes"
        inside = getattr(module, "original_component", None)  # a bridge's may use the other's rate
        for part in (module, inside):
            for key, rate in vars(part).items() if isinstance(part, nn.Module) else ():
                if isinstance(rate, float) and rate > 0 and _RATE.search(key):
                    yield f"{where} is in training mode with {key}={rate}"


@torch.no_grad()
def _passes_are_random(model: Any) -> bool:
    """Whether a short pass draws random numbers, or another one gives other results.

    The global random state is left as it was.
    """
    tokens = torch.arange(1, 9)[None] % model.cfg.d_vocab
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        before = torch.random.get_rng_state()
        one, other = (passes.final_residual(model, tokens) for _ in range(2))
        drawn = not torch.equal(before, torch.random.get_rng_state())
    return drawn or not torch.equal(one, other)


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
        ValueError: as `check_model`, a layer out of range, or weights that were made inside
            `torch.inference_mode()`, which torch lets nobody change or differentiate through.
        NotImplementedError: as `check_model`; no dense W_out there (mixture of experts, state
            space); or a weight that is quantised or offloaded.
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
