"""Edits that were made one after another, as one edit: the sum of their changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from transformer_lens_rome.edits.base import Edit
from transformer_lens_rome.edits.health import EditHealth
from transformer_lens_rome.edits.request import EditRequest
from transformer_lens_rome.model.adapter import Weight
from transformer_lens_rome.torch_states import torch_defaults


@dataclass(frozen=True, eq=False, kw_only=True)
class SeveralEdits(Edit):
    """Edits of which each was made on the model with the earlier ones on it.

    Attributes:
        parts: The edits, in the order they were made.
    """

    parts: tuple[Edit, ...] = field(repr=False)

    @classmethod
    def of(cls, parts: Sequence[Edit]) -> SeveralEdits:
        """Return some edits, at least one, as one edit."""
        warnings = tuple(text for part in parts for text in part.health.warnings)
        return cls(
            layer=min(part.layer for part in parts),
            request=parts[0].request,
            health=EditHealth(warnings=warnings),
            parts=tuple(parts),
        )

    @property
    def requests(self) -> tuple[EditRequest, ...]:
        """All facts that the edits write."""
        return tuple(request for part in self.parts for request in part.requests)

    def changes(self) -> dict[Weight, Tensor]:
        """Return the sum of the changes of every weight."""
        return {where: self.change(where) for where in self.sizes()}

    @torch_defaults()
    def change(self, where: Weight) -> Tensor:
        """Return the sum of the changes of one weight."""
        first, *others = [part.change(where) for part in self.parts if where in part.sizes()]
        for other in others:
            first = first + other
        return first

    def sizes(self) -> dict[Weight, tuple[int, ...]]:
        """Return the shape of every changed weight."""
        return {where: size for part in self.parts for where, size in part.sizes().items()}

    def made_on(self) -> dict[Weight, str]:
        """Return the sha256 of each weight before the first edit of it."""
        hashes: dict[Weight, str] = {}
        for part in self.parts:
            hashes = part.made_on() | hashes
        return hashes

    def scale(self, alpha: float) -> SeveralEdits:
        """Return the edits, alpha times as strong."""
        scaled = tuple(part.scale(alpha) for part in self.parts)
        return dataclasses.replace(self, parts=scaled, health=EditHealth())

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of all edits, by the edit's place and the tensor's name."""
        return {
            f"{i}.{name}": tensor
            for i, part in enumerate(self.parts)
            for name, tensor in part.tensors().items()
        }

    def _metadata(self) -> dict[str, Any]:
        """Raise ValueError: a file contains one edit."""
        raise ValueError("edits made one after another have a file each; save each of .parts")
