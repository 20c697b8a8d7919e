"""Build dataclasses from the values of a JSON file, with a type check of every field."""

from __future__ import annotations

import dataclasses
import json
import types
from collections.abc import Hashable, Mapping
from functools import cache
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")


def make(kind: type[T], values: Mapping[str, Any]) -> T:
    """Return an instance of the dataclass `kind`; private fields cannot be given.

    The value of a dataclass field may be a JSON object, and that of a tuple field a JSON list.

    Raises:
        ValueError: A field is missing, unknown, or has the wrong type.
    """
    fields, hints = _fields(cast(Hashable, kind))  # every class has a hash; mypy misses it
    if unknown := sorted(set(values) - set(fields)):
        raise ValueError(f"{kind.__name__} has no field {', '.join(unknown):.80}")
    if missing := [name for name, required in fields.items() if required and name not in values]:
        raise ValueError(f"{', '.join(missing)} of {kind.__name__} is missing")
    values = {name: _shaped(value, hints[name]) for name, value in values.items()}
    for name, value in values.items():
        if not fits(value, hints[name]):
            shape = getattr(value, "shape", None)
            received = f"{value!r:.40}" if shape is None else f"of shape {tuple(shape)}"
            raise ValueError(f"{name} should be {_named(hints[name])}, it is {received}")
    return kind(**values)


def as_read(value: Any) -> Any:
    """Return a value as a JSON file gives it back: tuples become lists, and keys become texts."""
    return json.loads(json.dumps(value))


def _shaped(value: Any, hint: Any) -> Any:
    """Convert a JSON object to the dataclass, or a JSON list to the tuple, that `hint` names."""
    if get_origin(hint) in (Union, types.UnionType):  # of such a type and None
        for one in get_args(hint):
            value = _shaped(value, one)
        return value
    if isinstance(hint, type) and dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return make(hint, value)
    if get_origin(hint) is tuple and isinstance(value, (list, tuple)):
        inner = get_args(hint)
        if len(inner) == 2 and inner[1] is Ellipsis:
            return tuple(_shaped(one, inner[0]) for one in value)
        if len(inner) == len(value):
            return tuple(map(_shaped, value, inner))
    return value


@cache
def _fields(kind: Any) -> tuple[dict[str, bool], dict[str, Any]]:
    """Return the public fields, with True for each required one, and the types of all fields."""
    missing = dataclasses.MISSING
    fields = {
        f.name: f.default is missing and f.default_factory is missing
        for f in dataclasses.fields(kind)
        if f.init and not f.name.startswith("_")
    }
    return fields, get_type_hints(kind)


def fits(value: Any, hint: Any) -> bool:
    """Return whether a value has an annotated type; an int is accepted as a float."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(fits(value, one) for one in args)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in args)
    if origin is tuple and args[1:] != (Ellipsis,):  # one type for each item
        whole = isinstance(value, tuple) and len(value) == len(args)
        return whole and all(map(fits, value, args))
    if origin in (tuple, list):  # any length, one type
        return isinstance(value, origin) and all(fits(one, args[0]) for one in value)
    if hint is float:
        return type(value) in (int, float)
    if hint in (int, bool, str):
        return type(value) is hint
    return isinstance(value, origin or hint)


def _named(hint: Any) -> str:
    """Return the name of a type, for messages."""
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
