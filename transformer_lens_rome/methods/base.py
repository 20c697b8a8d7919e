"""The protocol of editing methods and the registry of them. A new method is one new file."""

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

    Three members are optional. `prepared(model, *, seed)` returns a copy of the method that stores
    everything that all edits of a run share, such as statistics. `has_seen(record)` returns whether
    a trained method was trained on a record; an evaluation on such records raises an error. `name`
    is the method's name in tables.
    """

    def compute(self, model: Any, request: EditRequest, *, seed: int = 0) -> Edit:
        """Compute the edit that writes the request; the same seed gives the same edit."""
        ...


_SILENT = {"progress", "half_agreement"}
"""Names of fields that change no edit."""

_REGISTRY: dict[str, Callable[..., EditMethod]] = {}


def register_method(name: str, factory: Callable[..., EditMethod]) -> None:
    """Register a method by name; `factory(**options)` must return an `EditMethod`.

    Raises:
        ValueError: another factory is registered under this name.
    """
    if _REGISTRY.get(name, factory) is not factory:
        raise ValueError(f"the method {name!r} is registered already; choose another name")
    _REGISTRY[name] = factory


def get_method(name: str, **options: Any) -> EditMethod:
    """Construct the method of this name with these options.

    Raises:
        ValueError: no method has this name.
    """
    if name not in _REGISTRY:
        raise ValueError(f"no method {name!r}; there are {sorted(_REGISTRY)}")
    return _REGISTRY[name](**options)


def described(method: EditMethod) -> dict[str, Any]:
    """Return a method's name and options as plain values, which identify a run.

    Tensors and objects that contain them are represented by a sha256.
    """
    name = getattr(method, "name", type(method).__name__)
    options = method if dataclasses.is_dataclass(method) else getattr(method, "__dict__", {})
    return {"name": name, "options": _plain(options)}


def provenance(model: Any, prepend_bos: bool) -> dict[str, Any]:
    """Return the model, its class, the BOS rule and the library versions, for `Edit.provenance`."""
    return {
        "model": adapter.model_name(model),
        "model_class": adapter.model_class(model),
        "prepend_bos": prepend_bos,
        "versions": {name: version(name) for name in ("transformer-lens", "torch")},
    }


def _plain(value: Any) -> Any:
    """Convert a value to plain JSON types; a tensor becomes its sha256."""
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
