"""What an editing method is, and the methods by name. A new method is a new file that registers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from transformer_lens_rome.edits import Edit, EditRequest


class EditMethod(Protocol):
    """A way to turn a request into an edit, leaving the model as it was."""

    def compute(self, model: Any, request: EditRequest, *, seed: int = 0) -> Edit:
        """The edit that writes the request; the same seed gives the same edit."""
        ...


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
