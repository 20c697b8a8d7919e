"""The plain way to run a model, as the released code does; what the engine is compared with."""

from __future__ import annotations

from typing import Any

import torch

from transformer_lens_rome.model import passes
from transformer_lens_rome.model.partial_forward import PartialForward


class PlainForward(PartialForward):
    """Whole rows through all layers, and log-probabilities at every position."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options, cut=False)

    def _whole(self, changes: Any, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Normalised over the vocabulary already, which changes no result."""
        with self.changed([changes]):
            final = passes.final_residual(self.model, self.tokens)
        if final.shape[-1] == self.model.cfg.d_model:  # a HookedTransformer's last residual
            final = passes.unembed(self.model, final.flatten(0, 1)).unflatten(0, final.shape[:2])
        return final.log_softmax(-1)[rows, positions]

    def variants(self, variants: Any, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """One pass a variant."""
        return torch.stack([self._whole(changes, rows, positions) for changes in variants])
