"""Hide the differences between `HookedTransformer` and `TransformerBridge`, and all module paths.

This module names the points that editing and tracing read or change:

    embed        output of the token embedding, before positions are added   [batch, pos, d_model]
    resid_pre    residual stream before block l                               [batch, pos, d_model]
    pattern      attention weights                                    [batch, head, dest, src]
    attn_out     output of attention, added to the residual stream            [batch, pos, d_model]
    mlp_in       input of the MLP of block l, after the norm before it        [batch, pos, d_model]
    pre          input of the activation (output of W_gate in a gated MLP)    [batch, pos, d_mlp]
    pre_linear   output of W_in in a gated MLP                                [batch, pos, d_mlp]
    key          input of W_out at layer l (after the activation)             [batch, pos, d_mlp]
    value        output of W_out, bias included, before any norm after it     [batch, pos, d_model]
    mlp_out      value after any such norm, added to the residual stream      [batch, pos, d_model]
    resid_post   residual stream after block l                                [batch, pos, d_model]

The MLP's matrices are always `[d_in, d_out]`: `value = key @ W_out + b_out`. Without a gate,
`pre = mlp_in @ W_in + b_in`. With a gate, `pre = mlp_in @ W_gate`, `pre_linear = mlp_in @ W_in`.
Neither model class is imported: TransformerLens 4 removed one of them, and 2.x lacks the other.

`passes` runs the models; `refusals` rejects models that are not supported.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from transformer_lens_rome.model.protocol import Model


class Point(NamedTuple):
    """A place in the model where an activation can be read or replaced."""

    name: Literal[
        "embed",
        "resid_pre",
        "pattern",
        "attn_out",
        "mlp_in",
        "pre",
        "pre_linear",
        "key",
        "value",
        "mlp_out",
        "resid_post",
    ]
    layer: int = 0


_MLP_POINTS = ("mlp_in", "pre", "pre_linear", "key", "value", "mlp_out")


class Weight(NamedTuple):
    """A parameter that edits may change."""

    name: Literal["W_in", "W_gate", "W_out", "b_out"]
    layer: int


WEIGHTS = ("W_in", "W_gate", "W_out", "b_out")


Hook = Callable[[Tensor], "Tensor | None"]


# ---------------------------------------------------------------- which model, and its weights


def model_class(model: Model) -> Literal["hooked", "bridge"]:
    """Return `"hooked"` for a HookedTransformer or a subclass, `"bridge"` for a TransformerBridge.

    Raises:
        ValueError: The model is neither.
    """
    for base in type(model).__mro__:
        if base.__module__.split(".")[0] == "transformer_lens":
            if base.__name__ == "TransformerBridge":
                return "bridge"
            if base.__name__ == "HookedTransformer":
                return "hooked"
    raise ValueError(
        f"expected a TransformerLens HookedTransformer or TransformerBridge, got {type(model)}; "
        "wrap a Hugging Face model with TransformerBridge.boot_transformers(name, hf_model=...)"
    )


def model_name(model: Model) -> str:
    """Return the name of the checkpoint in TransformerLens."""
    return str(getattr(model.cfg, "model_name", "") or "unnamed")


def shared_part(model: Model) -> Any:
    """Return the module with the weights: for a bridge its Hugging Face model, perhaps shared."""
    return getattr(model, "original_model") if model_class(model) == "bridge" else model


def every_module(model: Model) -> Iterator[tuple[str, nn.Module]]:
    """Yield each module once, with its name; for a bridge, also those of its Hugging Face model."""
    seen: set[int] = set()
    for prefix, part in (("", model), ("original_model.", shared_part(model))):
        for name, module in part.named_modules():
            if id(module) not in seen:
                seen.add(id(module))
                yield prefix + name, module


def plain_name(name: str) -> str:
    """Return the name of a parameter or module as in a checkpoint."""
    return name.replace("._original_component", "")


def processing(model: Model) -> str:
    """Describe whether TransformerLens has folded and centred the weights."""
    folded = bool(getattr(model, "_weights_processed", False))
    return f"{getattr(model.cfg, 'normalization_type', None)} {folded}"


def rotation_limit(model: Model) -> int | None:
    """Return the longest pass with the usual rotations, in tokens; None if there is no limit.

    With LongRoPE, a longer pass uses other rotations for all of its tokens.
    """
    config = getattr(shared_part(model), "config", None)
    ropes = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for rope in (ropes, *ropes.values()):  # one for all layers, or one for each type of layer
        if isinstance(rope, Mapping) and "longrope" in (rope.get("rope_type"), rope.get("type")):
            length = rope.get("original_max_position_embeddings")
            return length or getattr(config, "original_max_position_embeddings", None)
    return None


def follows_length(name: str) -> bool:
    """Return whether the name is that of a table of rotations, which longer passes recompute."""
    return any(part in name for part in ("inv_freq", "rotary_", "long_"))


def architecture(model: Model) -> str:
    """Return the name of the architecture, for messages."""
    name = getattr(model.cfg, "original_architecture", None) or getattr(
        model.cfg, "architecture", None
    )
    return str(name or model_name(model))


def w_out(model: Model, layer: int) -> Float[Tensor, "d_mlp d_model"]:
    """Return the W_out of one block, not a copy.

    Change it in place only, under `torch.no_grad()`.

    Raises:
        NotImplementedError: The block has no single dense W_out, or it cannot be read.
    """
    mlp = getattr(model.blocks[layer], "mlp", None)
    try:
        weight = getattr(mlp, "W_out", None)
    except NotImplementedError as error:  # from TransformerLens 4 for offloaded weights
        raise NotImplementedError(f"W_out of layer {layer} cannot be read: {error}") from error
    if not isinstance(weight, Tensor) or weight.ndim != 2 or _output_module(model, layer) is None:
        raise NotImplementedError(
            f"{architecture(model)} has no single dense W_out at layer {layer} "
            f"({type(mlp).__name__}): mixtures of experts, state-space blocks and blocks in which "
            "TransformerLens shows no MLP cannot be edited"
        )
    return weight


def b_out(model: Model, layer: int) -> Float[Tensor, "d_model"]:
    """Return the bias that is added after W_out; zeros if the model has none."""
    weight = w_out(model, layer)
    bias = getattr(model.blocks[layer].mlp, "b_out", None)
    return torch.zeros_like(weight[0]) if bias is None else bias.detach()


def parameter(model: Model, where: Weight) -> Tensor | None:
    """Return a weight of one block's MLP, not a copy; None if the model does not have it."""
    if where.name == "W_out":
        return w_out(model, where.layer)
    weight = getattr(getattr(model.blocks[where.layer], "mlp", None), where.name, None)
    return weight if isinstance(weight, Tensor) else None


def ends(model: Model, where: Weight) -> tuple[Point, Point]:
    """Return the points of the input and the output of W_in, W_gate or W_out."""
    if where.name == "W_out":
        return Point("key", where.layer), Point("value", where.layer)
    gated = parameter(model, Weight("W_gate", where.layer)) is not None
    output: Literal["pre_linear", "pre"]
    output = "pre_linear" if gated and where.name == "W_in" else "pre"
    return Point("mlp_in", where.layer), Point(output, where.layer)


def embeddings(model: Model, ids: Int[Tensor, "n"]) -> Float[Tensor, "n d_model"]:
    """Return rows of the embedding matrix, in float32, before the model scales them.

    The rows are those of the checkpoint, or centred ones if weight processing centred them.
    """
    rows = model.W_E.detach()[ids.to(model.W_E.device)].float()
    if model_class(model) == "hooked" and "gemma" in architecture(model).lower():
        # a HookedTransformer stores Gemma's embedding already multiplied by this, in W_E's dtype
        rows = rows / torch.tensor(model.cfg.d_model**0.5, dtype=model.W_E.dtype).to(rows)
    return rows


def owner(weight: Tensor) -> Tensor:
    """Return the parameter whose storage a weight shares; the same object at each call."""
    return weight if weight._base is None else weight._base


def holder(model: Model, where: Weight) -> nn.Module | None:
    """Return the module in which a weight is registered; None if each pass computes the weight.

    The module remains when the parameter is replaced, and is copied and pickled with the model.
    """
    weight = parameter(model, where)
    assert weight is not None
    registered = owner(weight)
    for module in model.blocks[where.layer].modules():
        if any(registered is entry for entry in module._parameters.values()):
            return module
    return None


def weight_hash(weight: Float[Tensor, "..."]) -> str:
    """Return the sha256 of a tensor's bytes; for W_out, both model classes give the same hash."""
    flat = weight.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


# ---------------------------------------------------------------- hooks


def _output_module(model: Model, layer: int) -> Any:
    """Return the module whose output is the value: a bridge's W_out component, else the MLP."""
    mlp = model.blocks[layer].mlp
    if model_class(model) == "hooked":
        return mlp
    component = getattr(mlp, "out", None) or getattr(mlp, "dense_out", None)
    return component if hasattr(component, "hook_out") else None


def hook_name(model: Model, point: Point) -> str | None:
    """Return the name of the hook point; None if the point needs a hook on a module.

    Only a HookedTransformer needs a module hook, for `mlp_in` and `value`. `hook_mlp_out` is not
    the value: models like Gemma fire it after their second norm.
    """
    if point.name in _MLP_POINTS and getattr(model.cfg, "attn_only", False):
        raise NotImplementedError(f"{architecture(model)} has attention only and no MLPs")
    if point.name == "embed":
        return "hook_embed"
    if point.name == "pattern":
        return f"blocks.{point.layer}.attn.hook_pattern"
    if point.name in ("key", "pre", "pre_linear"):
        return f"blocks.{point.layer}.mlp.hook_{point.name.replace('key', 'post')}"
    if point.name == "mlp_in":
        if model_class(model) == "hooked":
            return None
        # In a gated MLP two matrices read `mlp_in`, so hook the MLP. Otherwise hook W_in, since in
        # 3.9 the MLP of OPT is not run as a module.
        gated = getattr(model.blocks[point.layer].mlp, "gate", None) is not None
        return f"blocks.{point.layer}.mlp.{'' if gated else 'in.'}hook_in"
    if point.name != "value":
        return f"blocks.{point.layer}.hook_{point.name}"
    module = _output_module(model, point.layer)
    return module.hook_out.name if model_class(model) == "bridge" else None


@contextmanager
def hooks(model: Model, points: Sequence[tuple[Point, Hook]]) -> Iterator[None]:
    """Call `fn(activation)` whenever a forward pass reaches a point.

    A tensor that `fn` returns replaces the activation. At exit these hooks are removed, also after
    an exception; hooks that existed before are kept.

    Raises:
        RuntimeError: A hook never fired before the exit (3.x bridges ignore unknown names).
    """
    fired: set[Point] = set()
    named: list[tuple[str, Callable[..., Tensor | None]]] = []
    handles: list[RemovableHandle] = []

    def wrap(point: Point, fn: Hook) -> Callable[..., Tensor | None]:
        def on_activation(tensor: Tensor, hook: Any = None) -> Tensor | None:
            fired.add(point)
            return fn(tensor)

        return on_activation

    try:
        for point, fn in points:
            name, call = hook_name(model, point), wrap(point, fn)
            if name is None and point.name == "mlp_in":
                module = model.blocks[point.layer].mlp
                handles.append(module.register_forward_pre_hook(lambda _m, i, call=call: call(*i)))
            elif name is None:
                module = _output_module(model, point.layer)
                handles.append(module.register_forward_hook(lambda _m, _i, o, call=call: call(o)))
            elif name in model.hook_dict:
                named.append((name, call))
            else:
                raise NotImplementedError(f"{architecture(model)} has no hook point {name}")
        with model.hooks(fwd_hooks=named):
            yield
    finally:
        for handle in handles:
            handle.remove()
    if silent := [point for point, _ in points if point not in fired]:
        raise RuntimeError(f"hooks that never fired on {architecture(model)}: {silent}")


@contextmanager
def gradients_for(model: Model) -> Iterator[None]:
    """Enable gradients, also inside a caller's `no_grad`, and freeze every parameter until exit."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            with suppress(RuntimeError):  # such hooks are disabled, so the caller has none either
                plain = torch.autograd.graph.saved_tensors_hooks(Tensor.detach, _identity)
                stack.enter_context(plain)  # override the caller's hooks, which may round
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _identity(tensor: Tensor) -> Tensor:
    """Unpack a saved tensor; it is packed detached, since a saved result would hold itself."""
    return tensor


# ---------------------------------------------------------------- Hugging Face side


def hf_model(model: Model) -> Any:
    """Return the Hugging Face model inside a bridge.

    Return None for a HookedTransformer, which has only copies of its weights.

    Raises:
        ValueError: `enable_compatibility_mode()` processed the bridge's weights, so they no longer
            have the Hugging Face layout.
    """
    if model_class(model) == "hooked":
        return None
    if getattr(model, "_weights_processed", False):
        raise ValueError(
            "this bridge's weights were folded and centred by enable_compatibility_mode(), which a "
            "Hugging Face checkpoint cannot represent; apply the edit to a bridge without "
            "processing (with force=True, since its weights differ) and export that bridge"
        )
    return shared_part(model)


def kind_of_module(hf: Any, path: str) -> str:
    """Return "Linear" for any linear module of a Hugging Face model, else the name of its class.

    GPT-2 has "Conv1D", which stores its weight transposed. A bridge may have put a component of its
    own around the module.
    """
    module = hf.get_submodule(path)
    module = getattr(module, "original_component", module)
    return "Linear" if isinstance(module, nn.Linear) else type(module).__name__


def hub_commit(hf: Any) -> str | None:
    """Return the commit on the Hub that a Hugging Face model was loaded from, if it is known."""
    return getattr(getattr(hf, "config", None), "_commit_hash", None)


def short_name(model: Model) -> str:
    """Return the lower-case model name without its owner: `EleutherAI/gpt-j-6B` -> `gpt-j-6b`."""
    return model_name(model).split("/")[-1].lower()
