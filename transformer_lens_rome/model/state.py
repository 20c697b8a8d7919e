"""All that decides what a pass of a model computes, beside the values of its parameters.

Classes and their code, options on modules and in configurations, dtypes, devices, hooks, training
flags, the tokenizer. What was found out about a model holds for as long as this is the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from torch import nn

from transformer_lens_rome.model import adapter

_PLAIN = (bool, int, float, str)
_MOVES = frozenset({"max_seq_len_cached"})
"""Attributes that passes themselves change: how far a rotary table was filled."""


def described(model: Any) -> dict[str, str]:
    """What each module, the configurations, the tokenizer and torch's own hooks are, in words."""
    found = {
        name: "; ".join(_of_module(module))
        for name, module in adapter.every_module(model)
        if not _is_plain_point(module)
    }
    inner = getattr(adapter.shared_part(model), "config", None)
    for name, config in (("cfg", model.cfg), ("config", inner)):
        fields = config.to_dict() if hasattr(config, "to_dict") else getattr(config, "__dict__", {})
        found[f"{name} of the model"] = json.dumps(fields, sort_keys=True, default=_name)
        found[f"attention of the {name}"] = str(getattr(config, "_attn_implementation", None))
    found["the tokenizer"] = "; ".join(_of_tokenizer(getattr(model, "tokenizer", None)))
    found["hooks that torch calls for all modules"] = str(adapter.global_hooks())
    found["weight processing"] = adapter.processing(model)
    return found


def state_digest(model: Any) -> str:
    """Sixteen digits of the sha256 of all of that."""
    text = "".join(f"{name}: {words}\n" for name, words in sorted(described(model).items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _is_plain_point(module: nn.Module) -> bool:
    """Whether a module is a hook point without hooks, which hands on what it is given."""
    return hasattr(module, "fwd_hooks") and not module._forward_hooks and not module._backward_hooks


def _of_module(module: nn.Module) -> Iterator[str]:
    own = vars(module)
    yield _name(type(module)) + _name(own.get("forward", type(module).forward))
    yield f"training={module.training}"
    for key, value in own.items():
        if key.startswith("_") or key in _MOVES:
            continue
        if isinstance(value, _PLAIN):
            yield f"{key}={value}"
        elif callable(value) and not isinstance(value, nn.Module):
            yield f"{key}={_name(value)}"
    for name, weight in module._parameters.items():
        if weight is not None:
            yield f"{name}: {weight.dtype} {weight.device} {tuple(weight.shape)}"
            yield str(weight.requires_grad)
    yield from map(_name, adapter.users_hooks(module))


def _of_tokenizer(tokenizer: Any) -> Iterator[str]:
    if tokenizer is not None:
        yield f"{_name(type(tokenizer))} of {len(tokenizer)} tokens"
        yield f"{tokenizer.padding_side} {tokenizer.special_tokens_map}"


def _name(thing: Any) -> str:
    """A class or function by name, and where its code stands."""
    function = getattr(thing, "__func__", thing)
    code = getattr(function, "__code__", None)
    place = f" at {code.co_filename}:{code.co_firstlineno}" if code else ""
    return f"{getattr(thing, '__qualname__', type(thing).__qualname__)}{place}"
