"""The base class of edits: common fields, common methods, and the file format."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from jaxtyping import Float
from torch import Tensor

from transformer_lens_rome.edits.health import EditHealth
from transformer_lens_rome.edits.request import EditRequest
from transformer_lens_rome.files.fields import as_read, make
from transformer_lens_rome.files.tensors import (
    MAX_LAYERS,
    check_finite,
    read_tensors,
    write_tensors,
)
from transformer_lens_rome.model.adapter import Weight, weight_hash
from transformer_lens_rome.showing import Shown

_FORMAT = "transformer_lens_rome.edit.1"
MAX_MATRIX = 2**31
"""The most entries that an edited matrix may have: twice as many as in a model with 405 billion
parameters. Without a limit, a file with two vectors could ask for a matrix larger than any memory.
"""

E = TypeVar("E", bound="BaseEdit")


@dataclass(frozen=True, eq=False, kw_only=True)
class BaseEdit(Shown):
    """The fields and methods of every edit.

    Attributes:
        layer: The block that it changes, from 0; the first one if it changes several.
        request: The requested fact.
        config: The method's settings, as plain values.
        model_hash: sha256 of the W_out that the edit was made on (`adapter.weight_hash`). If the
            edit changes more than one W_out: sha256 of the hashes of all weights that it changes.
        health: See `EditHealth`.
        provenance: How it was made: model, prefixes, statistics, seed, BOS rule, versions.
    """

    layer: int
    request: EditRequest
    config: Mapping[str, Any] = field(default_factory=dict)
    model_hash: str = ""
    health: EditHealth = field(default_factory=EditHealth)
    provenance: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for name in ("config", "provenance"):  # as read from a file: no tuples
            object.__setattr__(self, name, as_read(dict(getattr(self, name))))

    def delta(self) -> Float[Tensor, "d_mlp d_model"]:
        """Return the change of W_out."""
        raise NotImplementedError

    def changes(self) -> dict[Weight, Tensor]:
        """Return the change of every parameter that the edit changes."""
        return {Weight("W_out", self.layer): self.delta()}

    def change(self, where: Weight) -> Tensor:
        """Return the change of one parameter."""
        return self.changes()[where]

    def scale(self: E, alpha: float) -> E:
        """Return the edit, alpha times as strong."""
        raise NotImplementedError

    def __mul__(self: E, alpha: float) -> E:
        return self.scale(alpha)

    __rmul__ = __mul__

    def __neg__(self: E) -> E:
        return self.scale(-1.0)

    def sizes(self) -> dict[Weight, tuple[int, ...]]:
        """Return the shape of every changed parameter, without computing the changes."""
        raise NotImplementedError

    def made_on(self) -> dict[Weight, str]:
        """Return the sha256 of each weight that the edit was made on."""
        return {Weight("W_out", self.layer): self.model_hash}

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that define the change, by field name."""
        return {
            f.name: value
            for f in dataclasses.fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }

    @property
    def digest(self) -> str:
        """sha256 of the layer and the tensors; saving and loading an edit does not change it."""
        state = hashlib.sha256(str(self.layer).encode())
        for tensor in self.tensors().values():
            state.update(weight_hash(tensor).encode())
        return state.hexdigest()

    def save(self, path: Any) -> None:
        """Write the edit as safetensors with JSON metadata (kilobytes for a rank-one edit)."""
        info = {
            "format": _FORMAT,
            "kind": type(self).__name__,
            "layer": self.layer,
            "model_hash": self.model_hash,
            "request": dataclasses.asdict(self.request),
            "config": self.config,
            "health": self.health.to_dict(),
            "provenance": self.provenance,
            **self.extra(),
        }
        copies = {name: tensor.clone() for name, tensor in self.tensors().items()}
        write_tensors(path, copies, info)  # safetensors refuses tensors that share memory

    def extra(self) -> dict[str, Any]:
        """Return the extra metadata of this kind of edit."""
        return {}

    @classmethod
    def parts(cls, info: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the fields that `tensors` and `extra` wrote to the file."""
        return dict(tensors)

    @classmethod
    def load(cls: type[E], path: Any) -> E:
        """Read an edit that `save` wrote.

        Raises:
            ValueError: the file is not safetensors, is truncated, or has no edit of this kind.
        """
        tensors, info = read_edit(path)
        if (kind := info.get("kind")) != cls.__name__:
            raise ValueError(f"{path} contains a {kind!s:.40}; read it with {kind!s:.40}.load")
        return cls.made_of(path, tensors, info)

    @classmethod
    def made_of(
        cls: type[E], path: Any, tensors: Mapping[str, Tensor], info: Mapping[str, Any]
    ) -> E:
        """Return the edit of this kind from the contents of a file.

        Raises:
            ValueError: a part is missing, has the wrong type, or does not fit the others.
        """
        try:
            check_finite(tensors)
            known = {name: info[name] for name in ("layer", "model_hash", "config", "provenance")}
            known["request"] = make(EditRequest, info["request"])
            known["health"] = EditHealth.from_dict(info["health"])
            edit = make(cls, {**known, **cls.parts(info, tensors)})
            edit._check_sizes()
            return edit
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is an incomplete edit file ({error!r:.400})") from error

    def _check_sizes(self) -> None:
        """Raise ValueError for layers or sizes that no model has, before a matrix is made."""
        for where, size in self.sizes().items():
            if not 0 <= where.layer < MAX_LAYERS or math.prod(size) > MAX_MATRIX:
                raise ValueError(f"no model has a matrix of {size} at layer {where.layer}")

    def _check_fit(self, shapes: bool) -> None:
        """Raise ValueError if `shapes` (the shapes fit) is false, or if the dtypes differ."""
        if not shapes or len({tensor.dtype for tensor in self.tensors().values()}) > 1:
            named = self.tensors().items()
            listed = ", ".join(f"{name} {tuple(x.shape)} {x.dtype}" for name, x in named)
            raise ValueError(f"the edit's tensors do not fit together: {listed}")


def read_edit(path: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the metadata of an edit's file.

    Raises:
        ValueError: the file is not safetensors, is truncated, or contains no edit.
    """
    return read_tensors(path, _FORMAT)
