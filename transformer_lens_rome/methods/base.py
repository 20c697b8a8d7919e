"""The protocol of editing methods and the registry of them. A new method is one new file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from importlib.metadata import version
from inspect import signature
from typing import Any, Protocol

from torch import Tensor

from transformer_lens_rome.edits.kinds import Edit, EditRequest
from transformer_lens_rome.model import adapter
from transformer_lens_rome.model.adapter import weight_hash
from transformer_lens_rome.model.protocol import Model


class EditMethod(Protocol):
    """A way to turn a request into an edit, leaving the model as it was.

    Six members are optional. `compute_each(model, requests, *, seed, batch_size)` computes
    independent edits together and returns, for each request, its edit or the ValueError.
    `compute_many(model, requests, *, seed)` computes one edit that writes all facts; its `requests`
    are those that it writes. `after(model, edit)` returns the method for the next batch, which may
    preserve the facts of that edit; without it, batches do not know of each other.
    `prepared(model, *, seed)` checks the model and returns a copy of the method that stores
    everything that all edits of a run share, such as statistics. `name` is the method's name in
    tables. `options` is a mapping of what identifies a run, if that is not the dataclass fields.

    A method that has to be trained is two types. Its recipe has the settings: `fit(model, data)`
    trains an editor, `load(path)` reads one, and both `prepared` and `compute` raise a ValueError
    that says so. The trained editor is the `EditMethod`. It also has `save(path)`, and
    `has_seen(record)`: whether it was trained on a record, in which case an evaluation on that
    record raises an error.
    """

    def compute(self, model: Model, request: EditRequest, *, seed: int = 0) -> Edit:
        """Compute the edit that writes the request; the same seed gives the same edit."""
        ...


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


def methods_with(option: str) -> list[str]:
    """Return the names of the registered methods that have an option of this name."""
    return [name for name in sorted(_REGISTRY) if option in signature(_REGISTRY[name]).parameters]


def described(method: EditMethod) -> dict[str, Any]:
    """Return a method's name and options as plain values, which identify a run.

    Tensors and objects that contain them are represented by a sha256. A dataclass field with
    `metadata={"identifies": False}`, such as a progress bar's, is left out.
    """
    name = getattr(method, "name", type(method).__name__)
    options = method if dataclasses.is_dataclass(method) else getattr(method, "__dict__", {})
    return {"name": name, "options": _plain(getattr(method, "options", options))}


def provenance(model: Model, prepend_bos: bool) -> dict[str, Any]:
    """Return the model, its class, the BOS rule and the library versions, for `Edit.provenance`.

    The revision is the commit on the Hub; a HookedTransformer does not keep it.
    """
    return {
        "model": adapter.model_name(model),
        "revision": adapter.hub_commit(adapter.shared_part(model)),
        "model_class": adapter.model_class(model),
        "prepend_bos": prepend_bos,
        "versions": {name: version(name) for name in ("transformer-lens", "torch")},
    }


def _plain(value: Any) -> Any:
    """Convert a value to plain JSON types; a tensor becomes its sha256."""
    if isinstance(value, Tensor):
        return f"sha256 {weight_hash(value)}"
    if dataclasses.is_dataclass(value):
        fields = [f for f in dataclasses.fields(value) if f.init and not f.name.startswith("_")]
        fields = [f for f in fields if f.metadata.get("identifies", True)]
        return {f.name: _plain(getattr(value, f.name)) for f in fields}
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else repr(value)
