"""What an editing method is, and the methods by name. A new method is a new file that registers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any, Protocol

from torch import Tensor

from transformer_lens_rome.edits.kinds import Edit, EditRequest
from transformer_lens_rome.model import adapter
from transformer_lens_rome.model.adapter import weight_hash


class EditMethod(Protocol):
    """A way to turn a request into an edit, leaving the model as it was.

    A method may also have `prepared(model, *, seed)`: itself with everything found that all edits
    of a run share, such as statistics; `has_seen(record)`, if it was trained, by which an
    evaluation on its own training data is refused; and a `name`, for tables.
    """

    def compute(self, model: Any, request: EditRequest, *, seed: int = 0) -> Edit:
        """The edit that writes the request; the same seed gives the same edit."""
        ...


_SILENT = {"progress", "half_agreement"}
"""Fields on which no edit depends."""

_REGISTRY: dict[str, Callable[..., EditMethod]] = {}


def register_method(name: str, factory: Callable[..., EditMethod]) -> None:
    """Make a method known by name; `factory(**options)` must return an `EditMethod`.

    Raises:
        ValueError: the name is taken by another factory.
    """
    if _REGISTRY.get(name, factory) is not factory:
        raise ValueError(f"there is a method {name!r} already; choose another name")
    _REGISTRY[name] = factory


def get_method(name: str, **options: Any) -> EditMethod:
    """The method of that name, made with its options.

    Raises:
        ValueError: no such method.
    """
    if name not in _REGISTRY:
        raise ValueError(f"no method {name!r}; there are {sorted(_REGISTRY)}")
    return _REGISTRY[name](**options)


def described(method: EditMethod) -> dict[str, Any]:
    """A method's name and options as plain values, by which two runs are told apart.

    Tensors, and what holds them, stand by their sha256.
    """
    name = getattr(method, "name", type(method).__name__)
    options = method if dataclasses.is_dataclass(method) else getattr(method, "__dict__", {})
    return {"name": name, "options": _plain(options)}


def provenance(model: Any, prepend_bos: bool) -> dict[str, Any]:
    """Where an edit was made, as plain values, for `Edit.provenance`."""
    return {
        "model": adapter.model_name(model),
        "model_class": adapter.model_class(model),
        "prepend_bos": prepend_bos,
        "versions": {name: version(name) for name in ("transformer-lens", "torch")},
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return f"sha256 {weight_hash(value)}"
    if dataclasses.is_dataclass(value):
        fields = [f.name for f in dataclasses.fields(value) if f.init and f.name not in _SILENT]
        fields = [name for name in fields if not name.startswith("_")]
        return {name: _plain(getattr(value, name)) for name in fields}
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else repr(value)
