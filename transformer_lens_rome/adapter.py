"""The one place that knows `HookedTransformer` from `TransformerBridge`, and module paths.

Everything else asks here for the points that editing and tracing touch:

    embed        output of the token embedding, before positions are added   [batch, pos, d_model]
    resid_pre    residual stream before block l                               [batch, pos, d_model]
    pattern      attention weights                                    [batch, head, dest, src]
    attn_out     what attention adds to it                                    [batch, pos, d_model]
    mlp_in       input of the MLP of block l, after the norm before it        [batch, pos, d_model]
    pre          what goes into its activation (the gate's side, where gated) [batch, pos, d_mlp]
    pre_linear   the other side, where gated                                  [batch, pos, d_mlp]
    key          input of W_out at layer l (after the activation)             [batch, pos, d_mlp]
    value        output of W_out, bias included, before any norm after it     [batch, pos, d_model]
    mlp_out      what the MLP adds to the residual: after any such norm       [batch, pos, d_model]
    resid_post   residual stream after block l                                [batch, pos, d_model]

and for the MLP's matrices, always `[d_in, d_out]`, so that `value = key @ W_out + b_out`,
`pre = mlp_in @ W_in + b_in`, and where gated `pre = mlp_in @ W_gate`, `pre_linear = mlp_in @ W_in`.
Neither model class is imported: TransformerLens 4 removed one of them, and 2.x lacks the other.

Its other half, `passes`, runs the models; `refusals` says which it will not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


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


_OF_MLP = ("mlp_in", "pre", "pre_linear", "key", "value", "mlp_out")


class Weight(NamedTuple):
    """A parameter that edits may change."""

    name: Literal["W_in", "W_gate", "W_out", "b_out"]
    layer: int


WEIGHTS = ("W_in", "W_gate", "W_out", "b_out")


Hook = Callable[[Tensor], "Tensor | None"]


# ---------------------------------------------------------------- which model, and its weights


def model_class(model: Any) -> Literal["hooked", "bridge"]:
    """`"hooked"` for a HookedTransformer, `"bridge"` for a TransformerBridge, subclasses too."""
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


def model_name(model: Any) -> str:
    """The checkpoint's name as TransformerLens knows it."""
    return str(getattr(model.cfg, "model_name", "") or "unnamed")


def shared_part(model: Any) -> Any:
    """What holds the weights: the Hugging Face model, which bridges may share, or the model."""
    return model.original_model if model_class(model) == "bridge" else model


def every_module(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """Each module once, by name; a bridge does not list its Hugging Face model's containers."""
    seen: set[int] = set()
    for prefix, part in (("", model), ("original_model.", shared_part(model))):
        for name, module in part.named_modules():
            if id(module) not in seen:
                seen.add(id(module))
                yield prefix + name, module


def plain_name(name: str) -> str:
    """A parameter's or module's name as a checkpoint has it."""
    return name.replace("._original_component", "")


def processing(model: Any) -> str:
    """Which form the weights are in: a checkpoint's, or folded and centred by TransformerLens."""
    folded = bool(getattr(model, "_weights_processed", False))
    return f"{getattr(model.cfg, 'normalization_type', None)} {folded}"


def rotation_limit(model: Any) -> int | None:
    """The length of a pass above which all its tokens are rotated otherwise (LongRoPE); or None."""
    config = getattr(shared_part(model), "config", None)
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for rope in (found, *found.values()):  # one for all layers, or one for each type of layer
        if isinstance(rope, Mapping) and "longrope" in (rope.get("rope_type"), rope.get("type")):
            length = rope.get("original_max_position_embeddings")
            return length or getattr(config, "original_max_position_embeddings", None)
    return None


def follows_length(name: str) -> bool:
    """Whether a buffer of this name is filled anew for longer passes: tables of rotations."""
    return any(part in name for part in ("inv_freq", "rotary_", "long_"))


def architecture(model: Any) -> str:
    """The architecture's name, for messages."""
    found = getattr(model.cfg, "original_architecture", None) or getattr(
        model.cfg, "architecture", None
    )
    return str(found or model_name(model))


def w_out(model: Any, layer: int) -> Float[Tensor, "d_mlp d_model"]:
    """The live W_out of one block. Write to it in place only, under `torch.no_grad()`."""
    mlp = getattr(model.blocks[layer], "mlp", None)
    try:
        weight = getattr(mlp, "W_out", None)
    except NotImplementedError as error:  # TransformerLens 4 says so itself for offloaded weights
        raise NotImplementedError(f"W_out of layer {layer} cannot be read: {error}") from error
    if not isinstance(weight, Tensor) or weight.ndim != 2 or _output_module(model, layer) is None:
        raise NotImplementedError(
            f"{architecture(model)} has no single dense W_out at layer {layer} "
            f"({type(mlp).__name__}): mixtures of experts, state-space blocks and blocks in which "
            "TransformerLens shows no MLP cannot be edited"
        )
    return weight


def b_out(model: Any, layer: int) -> Float[Tensor, "d_model"]:
    """The bias added after W_out, zeros where the model has none."""
    weight = w_out(model, layer)
    bias = getattr(model.blocks[layer].mlp, "b_out", None)
    return torch.zeros_like(weight[0]) if bias is None else bias.detach()


def parameter(model: Any, where: Weight) -> Tensor | None:
    """The live weight of one block's MLP; None for a b_out or W_gate that the model has not."""
    if where.name == "W_out":
        return w_out(model, where.layer)
    found = getattr(getattr(model.blocks[where.layer], "mlp", None), where.name, None)
    return found if isinstance(found, Tensor) else None


def ends(model: Any, where: Weight) -> tuple[Point, Point]:
    """Where the input and output of W_in, W_gate or W_out can be read and changed."""
    if where.name == "W_out":
        return Point("key", where.layer), Point("value", where.layer)
    gated = parameter(model, Weight("W_gate", where.layer)) is not None
    output = "pre_linear" if gated and where.name == "W_in" else "pre"
    return Point("mlp_in", where.layer), Point(output, where.layer)


def embeddings(model: Any, ids: Int[Tensor, "n"]) -> Float[Tensor, "n d_model"]:
    """Rows of the embedding matrix, in float32, before the model scales them.

    They are the checkpoint's; centred, if weight processing centred them.
    """
    found = model.W_E.detach()[ids.to(model.W_E.device)].float()
    if model_class(model) == "hooked" and "gemma" in architecture(model).lower():
        # a HookedTransformer holds Gemma's embedding multiplied by this already, in its own dtype
        found = found / torch.tensor(model.cfg.d_model**0.5, dtype=model.W_E.dtype).to(found)
    return found


def owner(weight: Tensor) -> Tensor:
    """The parameter whose storage a weight shares; the same object at each call."""
    return weight if weight._base is None else weight._base


def holder(model: Any, where: Weight) -> nn.Module | None:
    """The module that a weight is registered in; None for one that is computed at each pass.

    It stays when the parameter is replaced, and is copied and pickled with the model.
    """
    own = owner(parameter(model, where))
    for module in model.blocks[where.layer].modules():
        if any(own is found for found in module._parameters.values()):
            return module
    return None


def weight_hash(weight: Float[Tensor, "..."]) -> str:
    """sha256 of a tensor's bytes; as W_out is `[d_mlp, d_model]`, equal for both model classes."""
    flat = weight.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


# ---------------------------------------------------------------- hooks


def _output_module(model: Any, layer: int) -> Any:
    """The module whose output is the value: a bridge's W_out component, else the whole MLP."""
    mlp = model.blocks[layer].mlp
    if model_class(model) == "hooked":
        return mlp
    found = getattr(mlp, "out", None) or getattr(mlp, "dense_out", None)
    return found if hasattr(found, "hook_out") else None


def _hook_name(model: Any, point: Point) -> str | None:
    """The hook point's name, or None where only a module hook will do (in a HookedTransformer).

    `hook_mlp_out` is not the value: models of Gemma's kind fire it after their second norm.
    """
    if point.name in _OF_MLP and getattr(model.cfg, "attn_only", False):
        raise NotImplementedError(f"{architecture(model)} has attention only, no MLPs")
    if point.name == "embed":
        return "hook_embed"
    if point.name == "pattern":
        return f"blocks.{point.layer}.attn.hook_pattern"
    if point.name in ("key", "pre", "pre_linear"):
        return f"blocks.{point.layer}.mlp.hook_{point.name.replace('key', 'post')}"
    if point.name == "mlp_in":
        if model_class(model) == "hooked":
            return None
        # gated: two matrices read it; else, in 3.9, OPT's MLP is no module that runs
        gated = getattr(model.blocks[point.layer].mlp, "gate", None) is not None
        return f"blocks.{point.layer}.mlp.{'' if gated else 'in.'}hook_in"
    if point.name != "value":
        return f"blocks.{point.layer}.hook_{point.name}"
    module = _output_module(model, point.layer)
    return module.hook_out.name if model_class(model) == "bridge" else None


@contextmanager
def hooks(model: Any, points: Sequence[tuple[Point, Hook]]) -> Iterator[None]:
    """Call `fn(activation)` whenever a forward pass reaches a point; a returned tensor replaces it.

    All hooks are gone at exit, also after an exception; hooks that were there before stay.

    Raises:
        RuntimeError: a pass ended and some hook never fired (3.x bridges ignore unknown names).
    """
    fired: set[Point] = set()
    named, handles = [], []

    def wrap(point: Point, fn: Hook) -> Callable:
        def on_activation(tensor: Tensor, hook: Any = None) -> Tensor | None:
            fired.add(point)
            return fn(tensor)

        return on_activation

    try:
        for point, fn in points:
            name, call = _hook_name(model, point), wrap(point, fn)
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


def has_hooks(model: Any) -> bool:
    """Whether hooks of the user's own are on the model, at hook points or on plain modules.

    What TransformerLens and transformers set themselves does not count; whether a hook is permanent
    says nothing of whose it is.
    """
    return bool(global_hooks()) or any(users_hooks(module) for _, module in every_module(model))


def global_hooks() -> int:
    """How many hooks torch calls for every module of the process."""
    torch_wide = nn.modules.module
    kinds = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
    return sum(len(getattr(torch_wide, f"_global_{kind}")) for kind in kinds)


def users_hooks(module: nn.Module) -> list[Any]:
    """What the user has set to be called in passes of a module: hooks, or another `forward`."""
    kinds = (module._forward_hooks, module._forward_pre_hooks)
    kinds += (module._backward_hooks, module._backward_pre_hooks)
    found = [hook for hooks in kinds for hook in hooks.values()]
    found += [vars(module)["forward"]] if "forward" in vars(module) else []
    mine = [hook for hook in found if _package_of(hook).split(".")[0] not in _HOSTS]
    handles = (*getattr(module, "fwd_hooks", ()), *getattr(module, "bwd_hooks", ()))
    return mine + [h for h in handles if not (h.is_permanent and _is_a_bridges(h))]


_HOSTS = ("transformer_lens", "transformers", "accelerate")


def _is_a_bridges(handle: Any) -> bool:
    """Whether a bridge set this hook of a hook point when it was made."""
    hook = getattr(handle, "user_hook", None)
    return _package_of(hook).startswith("transformer_lens.model_bridge")


def _package_of(hook: Any) -> str:
    """The module in which a hook's code stands, whatever it says of itself; empty for a partial."""
    function = getattr(hook, "__func__", hook)
    return str(getattr(function, "__globals__", {}).get("__name__", ""))


@contextmanager
def gradients_for(model: Any) -> Iterator[None]:
    """Gradients on, also inside a caller's `no_grad`, with every parameter frozen until exit."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            with suppress(RuntimeError):  # they are switched off, so there are no others either
                keep = torch.autograd.graph.saved_tensors_hooks(Tensor.detach, _as_it_is)
                stack.enter_context(keep)  # in place of a caller's, which may round
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _as_it_is(tensor: Tensor) -> Tensor:
    """What was packed; what is packed is detached, as a result that is kept whole keeps itself."""
    return tensor


# ---------------------------------------------------------------- Hugging Face side


def hf_model(model: Any) -> Any:
    """The Hugging Face model inside a bridge; None for a HookedTransformer, which has only copies.

    Raises:
        ValueError: the bridge's weights were processed (`enable_compatibility_mode()`), so that
            the Hugging Face layout no longer describes them.
    """
    if model_class(model) == "hooked":
        return None
    if getattr(model, "_weights_processed", False):
        raise ValueError(
            "this bridge's weights were folded and centred by enable_compatibility_mode(), which a "
            "Hugging Face checkpoint cannot hold; apply the edit to a bridge without processing "
            "(edits carry over as long as force=True is given) and export that one"
        )
    return model.original_model
