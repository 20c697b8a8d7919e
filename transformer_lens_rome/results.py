"""Results are values: frozen dataclasses of tensors and plain fields, kept in safetensors files."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from transformer_lens_rome.files import read_tensors, write_tensors
from transformer_lens_rome.typed import make

R = TypeVar("R", bound="Result")


class Result:
    """A dataclass that is saved and loaded; a list that is read becomes a tuple.

    Attributes:
        FORMAT: The name of the file format, with its version.
    """

    FORMAT: ClassVar[str]

    def save(self, path: Any) -> None:
        """Write safetensors with JSON metadata."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        plain = {name: value for name, value in values.items() if name not in tensors}
        write_tensors(path, tensors, {"format": self.FORMAT, **plain})

    @classmethod
    def load(cls: type[R], path: Any) -> R:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError, ValueError: no such file, or not a whole one of this kind.
        """
        tensors, info = read_tensors(path, cls.FORMAT)
        plain = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in info.items()
            if name != "format"
        }
        try:
            return make(cls, {**plain, **tensors})
        except (TypeError, ValueError, AttributeError, IndexError) as error:
            raise ValueError(f"{path} does not hold a whole {cls.__name__} ({error})") from error
