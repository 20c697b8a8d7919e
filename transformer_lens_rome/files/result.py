"""Results are values: frozen dataclasses of tensors and plain fields, kept in safetensors files."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from transformer_lens_rome.files.fields import make
from transformer_lens_rome.files.tensors import read_tensors, write_tensors

R = TypeVar("R", bound="Result")


class Result:
    """A dataclass that is saved and loaded; a list that is read becomes a tuple.

    Its fields are tensors, plain values, and dataclasses of these.

    Attributes:
        FORMAT: The name of the file format, with its version.
    """

    FORMAT: ClassVar[str]

    def save(self, path: Any) -> None:
        """Write safetensors with JSON metadata."""
        tensors: dict[str, Tensor] = {}
        plain = _without_tensors(self, "", tensors)
        write_tensors(path, tensors, {"format": self.FORMAT, **plain})

    @classmethod
    def load(cls: type[R], path: Any) -> R:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError, ValueError: no such file, or not a whole one of this kind.
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
            raise ValueError(f"{path} does not hold a whole {cls.__name__} ({error})") from error


def _without_tensors(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A value for JSON; the tensors of dataclasses in it are put into a dictionary, by place."""
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
