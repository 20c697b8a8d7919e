"""What every edit carries and can do, whatever it changes; and how it is kept in a file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor

from transformer_lens_rome.edits.health import EditHealth
from transformer_lens_rome.edits.request import EditRequest
from transformer_lens_rome.files.fields import make
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
"""Numbers in an edited matrix: twice those of a model with 405 billion parameters. Without a limit
two vectors could ask for a matrix that no memory holds."""


@dataclass(frozen=True, eq=False, kw_only=True)
class BaseEdit(Shown):
    """What every edit carries.

    Attributes:
        layer: The block that it changes, from 0; the first of them where there are several.
        request: What was asked for.
        config: The method's settings, as plain values.
        model_hash: sha256 of the W_out that the edit was made on (`adapter.weight_hash`); of the
            hashes of all weights that it changes, where that is more than one W_out.
        health: See `EditHealth`.
        provenance: Where it came from: model, prefixes, statistics, seed, BOS rule, versions.
    """

    layer: int
    request: EditRequest
    config: Mapping[str, Any] = field(default_factory=dict)
    model_hash: str = ""
    health: EditHealth = field(default_factory=EditHealth)
    provenance: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for name in ("config", "provenance"):  # as they will be when read from a file: no tuples
            object.__setattr__(self, name, json.loads(json.dumps(dict(getattr(self, name)))))

    def delta(self) -> Float[Tensor, "d_mlp d_model"]:
        """The change of W_out."""
        raise NotImplementedError

    def changes(self) -> dict[Weight, Tensor]:
        """The change of every parameter that is changed."""
        return {Weight("W_out", self.layer): self.delta()}

    def change(self, where: Weight) -> Tensor:
        """The change of one of those parameters."""
        return self.changes()[where]

    def sizes(self) -> dict[Weight, tuple[int, ...]]:
        """The shape of every parameter that is changed, without making a change."""
        raise NotImplementedError

    def made_on(self) -> dict[Weight, str]:
        """sha256 of the weights that it was made on."""
        return {Weight("W_out", self.layer): self.model_hash}

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that define the change, by field name."""
        return {
            f.name: value
            for f in dataclasses.fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }

    @property
    def digest(self) -> str:
        """sha256 of the layer and the tensors: equal for an edit and its saved and loaded self."""
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
        own = {name: tensor.clone() for name, tensor in self.tensors().items()}
        write_tensors(path, own, info)  # safetensors refuses tensors that share memory

    def extra(self) -> dict[str, Any]:
        """What its file says beside what every edit's does."""
        return {}

    @classmethod
    def parts(cls, info: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """The fields that `tensors` and `extra` wrote."""
        return dict(tensors)

    @classmethod
    def load(cls, path: Any) -> Any:
        """Read an edit that `save` wrote.

        Raises:
            ValueError: not safetensors, truncated, not an edit, or an edit of another kind.
        """
        tensors, info = read_edit(path)
        if (kind := info.get("kind")) != cls.__name__:
            raise ValueError(f"{path} holds a {kind!s:.40}; read it with {kind!s:.40}.load")
        return cls.made_of(path, tensors, info)

    @classmethod
    def made_of(cls, path: Any, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> Any:
        """The edit of this kind that a file holds.

        Raises:
            ValueError: a part of it is missing, of another type, or does not fit.
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
        """Refuse an edit of matrices that no model has, before any is made."""
        for where, size in self.sizes().items():
            if not 0 <= where.layer < MAX_LAYERS or math.prod(size) > MAX_MATRIX:
                raise ValueError(f"no model has a matrix of {size} at layer {where.layer}")

    def _check_fit(self, shapes: bool) -> None:
        """Refuse tensors whose shapes, as just compared, or dtypes do not fit together."""
        if not shapes or len({tensor.dtype for tensor in self.tensors().values()}) > 1:
            own = self.tensors().items()
            found = ", ".join(f"{name} {tuple(x.shape)} {x.dtype}" for name, x in own)
            raise ValueError(f"the edit's tensors do not fit together: {found}")


def read_edit(path: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the description of an edit's file.

    Raises:
        ValueError: not safetensors, truncated, or no edit.
    """
    return read_tensors(path, _FORMAT)
