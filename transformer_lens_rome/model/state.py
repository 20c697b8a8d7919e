"""Describe everything that determines what a pass computes, except for the parameters' values.

This covers classes and their code, options on modules and in configurations, dtypes, devices,
hooks, training flags and the tokenizer. Results of self-checks are valid as long as the description
is the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from torch import nn

from transformer_lens_rome.model import adapter, users_hooks
from transformer_lens_rome.model.protocol import Model

_PLAIN = (bool, int, float, str)
_CHANGED_BY_PASSES = frozenset({"max_seq_len_cached"})
"""Attributes that a pass may change: the filled length of a rotary table."""


def described(model: Model) -> dict[str, str]:
    """Describe each module, the configurations, the tokenizer and torch's global hooks, by name."""
    texts = {
        name: "; ".join(_of_module(module))
        for name, module in adapter.every_module(model)
        if not _is_plain_point(module)
    }
    configs: dict[str, Any] = {"cfg": model.cfg}
    configs["config"] = getattr(adapter.shared_part(model), "config", None)
    for name, config in configs.items():
        fields = config.to_dict() if hasattr(config, "to_dict") else getattr(config, "__dict__", {})
        texts[f"{name} of the model"] = json.dumps(fields, sort_keys=True, default=_name)
        texts[f"attention of the {name}"] = str(getattr(config, "_attn_implementation", None))
    texts["the tokenizer"] = "; ".join(_of_tokenizer(getattr(model, "tokenizer", None)))
    texts["hooks that torch calls for all modules"] = str(users_hooks.global_hooks())
    texts["weight processing"] = adapter.processing(model)
    return texts


def state_digest(model: Model) -> str:
    """Return the first sixteen digits of the sha256 of the description."""
    text = "".join(f"{name}: {words}\n" for name, words in sorted(described(model).items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _is_plain_point(module: nn.Module) -> bool:
    """Return whether a module is a hook point without hooks, which returns its input."""
    return hasattr(module, "fwd_hooks") and not module._forward_hooks and not module._backward_hooks


def _of_module(module: nn.Module) -> Iterator[str]:
    """Describe a module: its class, flags, options, parameters and the user's hooks."""
    attributes = vars(module)
    yield _name(type(module)) + _name(attributes.get("forward", type(module).forward))
    yield f"training={module.training}"
    for key, value in attributes.items():
        if key.startswith("_") or key in _CHANGED_BY_PASSES:
            continue
        if isinstance(value, _PLAIN):
            yield f"{key}={value}"
        elif callable(value) and not isinstance(value, nn.Module):
            yield f"{key}={_name(value)}"
    for name, weight in module._parameters.items():
        if weight is not None:
            yield f"{name}: {weight.dtype} {weight.device} {tuple(weight.shape)}"
            yield str(weight.requires_grad)
    yield from map(_name, users_hooks.users_hooks(module))


def _of_tokenizer(tokenizer: Any) -> Iterator[str]:
    """Describe a tokenizer: its class, size, padding side and special tokens."""
    if tokenizer is not None:
        yield f"{_name(type(tokenizer))} of {len(tokenizer)} tokens"
        yield f"{tokenizer.padding_side} {tokenizer.special_tokens_map}"


def _name(thing: Any) -> str:
    """Return the name of a class or function, with the file and line of its code."""
    function = getattr(thing, "__func__", thing)
    code = getattr(function, "__code__", None)
    place = f" at {code.co_filename}:{code.co_firstlineno}" if code else ""
    return f"{getattr(thing, '__qualname__', type(thing).__qualname__)}{place}"
