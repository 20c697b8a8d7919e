"""Find the hooks that the user has set on a model or on the whole process."""

from __future__ import annotations

from typing import Any

from torch import nn

from transformer_lens_rome.model import adapter
from transformer_lens_rome.model.protocol import Model


def has_hooks(model: Model) -> bool:
    """Return whether the user has set hooks on the model, at hook points or on plain modules.

    Hooks that TransformerLens and transformers set do not count. Both a user's hook and a library's
    hook may be permanent, so this does not tell them apart.
    """
    return bool(global_hooks()) or any(
        users_hooks(module) for _, module in adapter.every_module(model)
    )


def global_hooks() -> int:
    """Return the number of hooks that torch calls for every module of the process."""
    torch_wide = nn.modules.module
    kinds = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
    return sum(len(getattr(torch_wide, f"_global_{kind}")) for kind in kinds)


def users_hooks(module: nn.Module) -> list[Any]:
    """Return the functions that the user has set on a module: hooks, or another `forward`."""
    forward = (module._forward_hooks, module._forward_pre_hooks)
    backward = (module._backward_hooks, module._backward_pre_hooks)
    functions = [hook for hooks in (*forward, *backward) for hook in hooks.values()]
    functions += [vars(module)["forward"]] if "forward" in vars(module) else []
    users = [hook for hook in functions if _package_of(hook).split(".")[0] not in _LIBRARIES]
    handles = (*getattr(module, "fwd_hooks", ()), *getattr(module, "bwd_hooks", ()))
    return users + [h for h in handles if not (h.is_permanent and _set_by_a_bridge(h))]


_LIBRARIES = ("transformer_lens", "transformers", "accelerate")


def _set_by_a_bridge(handle: Any) -> bool:
    """Return whether a bridge set this hook at a hook point when the bridge was made."""
    hook = getattr(handle, "user_hook", None)
    return _package_of(hook).startswith("transformer_lens.model_bridge")


def _package_of(hook: Any) -> str:
    """Return the name of the module that contains a hook's code; empty for a partial.

    The hook's `__module__` is not used, as it can be set to another name.
    """
    function = getattr(hook, "__func__", hook)
    return str(getattr(function, "__globals__", {}).get("__name__", ""))
