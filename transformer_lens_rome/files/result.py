"""Results: frozen dataclasses of tensors and plain values, saved as safetensors files."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from transformer_lens_rome.files.fields import make
from transformer_lens_rome.files.tensors import read_tensors, write_tensors

R = TypeVar("R", bound="Result")


class Result:
    """Base of dataclasses that can be saved and loaded; a loaded list becomes a tuple.

    The fields are tensors, plain values, and dataclasses of these.

    Attributes:
        FORMAT: The name and version of the file format.
    """

    FORMAT: ClassVar[str]

    def save(self, path: Any) -> None:
        """Write a safetensors file with JSON metadata."""
        tensors: dict[str, Tensor] = {}
        plain = _without_tensors(self, "", tensors)
        write_tensors(path, tensors, {"format": self.FORMAT, **plain})

    @classmethod
    def load(cls: type[R], path: Any) -> R:
        """Read a file written by `save`.

        Raises:
            FileNotFoundError: The file does not exist.
            ValueError: The file is incomplete, or is of another kind.
        """
        tensors, info = read_tensors(path, cls.FORMAT)
        del info["format"]
        try:
            for name, tensor in tensors.items():
                *places, last = name.split(".")
                part = info
                for place in places:
                    part = part[place]
                part[last] = tensor
            return make(cls, info)
        except (TypeError, ValueError, AttributeError, LookupError) as error:
            raise ValueError(f"{path} is not a complete {cls.__name__} file ({error})") from error


def _without_tensors(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Return a value for JSON; move the tensors of its dataclasses to `tensors`, by field path."""
    if not dataclasses.is_dataclass(value):
        items = isinstance(value, (list, tuple))
        return [_without_tensors(one, name, {}) for one in value] if items else value
    plain: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        item, place = getattr(value, field.name), f"{name}{field.name}"
        if isinstance(item, Tensor):
            tensors[place] = item
        else:
            plain[field.name] = _without_tensors(item, f"{place}.", tensors)
    return plain
