"""Dataclasses made from what a file says: each field is of the type that its annotation names."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def make(kind: type[T], values: Mapping[str, Any]) -> T:
    """An instance of a dataclass; private fields cannot be given.

    Where a field is a dataclass, or a tuple, its value may be an object or a list of JSON.

    Raises:
        ValueError: a field is missing, unknown, or of another type.
    """
    fields, hints = _fields(kind)
    if unknown := sorted(set(values) - set(fields)):
        raise ValueError(f"{kind.__name__} has no {', '.join(unknown):.80}")
    if missing := [name for name, needed in fields.items() if needed and name not in values]:
        raise ValueError(f"{', '.join(missing)} of {kind.__name__} is missing")
    values = {name: _shaped(value, hints[name]) for name, value in values.items()}
    for name, value in values.items():
        if not fits(value, hints[name]):
            found = getattr(value, "shape", None)
            found = f"{value!r:.40}" if found is None else f"of shape {tuple(found)}"
            raise ValueError(f"{name} should be {_named(hints[name])}, it is {found}")
    return kind(**values)


def _shaped(value: Any, hint: Any) -> Any:
    """What JSON says in place of a dataclass or a tuple, as what it stands for."""
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return make(hint, value)
    if get_origin(hint) is tuple and isinstance(value, (list, tuple)):
        inner = get_args(hint)
        if len(inner) == 2 and inner[1] is Ellipsis:
            return tuple(_shaped(one, inner[0]) for one in value)
        if len(inner) == len(value):
            return tuple(map(_shaped, value, inner))
    return value


@cache
def _fields(kind: type) -> tuple[dict[str, bool], dict[str, Any]]:
    """Which fields can be given, whether each has to be, and their types."""
    none = dataclasses.MISSING
    fields = {
        f.name: f.default is none and f.default_factory is none
        for f in dataclasses.fields(kind)
        if f.init and not f.name.startswith("_")
    }
    return fields, get_type_hints(kind)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type; a whole number can stand for a float."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(fits(value, one) for one in args)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in args)
    if origin is tuple and args[1:] != (Ellipsis,):  # each item of its own type
        whole = isinstance(value, tuple) and len(value) == len(args)
        return whole and all(map(fits, value, args))
    if origin in (tuple, list):  # of any length
        return isinstance(value, origin) and all(fits(one, args[0]) for one in value)
    if hint is float:
        return type(value) in (int, float)
    if hint in (int, bool, str):
        return type(value) is hint
    return isinstance(value, origin or hint)


def _named(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
