"""An edit that changes no weight: a text that stands before every prompt."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import NoReturn

from torch import Tensor

from transformer_lens_rome.edits.base import Edit
from transformer_lens_rome.edits.request import EditRequest
from transformer_lens_rome.model.adapter import Weight


@dataclass(frozen=True, eq=False, kw_only=True)
class ContextEdit(Edit):
    """A text to put before prompts, such as the new fact itself.

    An evaluation does so. It cannot be applied to a model, exported or saved.

    Attributes:
        layer: -1, since no block changes.
        text: The text; it ends with a space.
        facts: All facts that the text states; the first one is `request`.
    """

    layer: int = -1
    text: str
    facts: tuple[EditRequest, ...] = ()

    @property
    def requests(self) -> tuple[EditRequest, ...]:
        """All facts that the text states."""
        return self.facts or (self.request,)

    @property
    def digest(self) -> str:
        """sha256 of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def changes(self) -> dict[Weight, Tensor]:
        """Raise ValueError: no weight changes."""
        self._refuse()

    def sizes(self) -> dict[Weight, tuple[int, ...]]:
        """Raise ValueError: no weight changes."""
        self._refuse()

    def scale(self, alpha: float) -> ContextEdit:
        """Raise ValueError: a text has no strength."""
        self._refuse()

    def tensors(self) -> dict[str, Tensor]:
        """Raise ValueError: there are no tensors to save or export."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise ValueError(
            "an in-context edit changes no weight, so it cannot be applied, scaled, saved, "
            "exported or made in a sequence; put its .text before your prompts, or pass the "
            "method to an evaluation, which does so"
        )
