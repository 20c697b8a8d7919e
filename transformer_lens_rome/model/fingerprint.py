"""Is a model what it was? Hashes of its parameters, and a faster check between two records.

torch counts writes to a tensor, but not those through `.data`, so what counts is the content. A
checksum reads a tensor at the speed of memory: it sums the 64-bit words of every row of a table.
The table is narrower than rows of matrices are, so that rows which change places are seen; its
width is odd, so that its rows begin at ever other columns, and an even number of flipped signs in
one sum is odd in another. It is fast rather than safe against intent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from transformer_lens_rome.model import adapter
from transformer_lens_rome.model.adapter import weight_hash
from transformer_lens_rome.model.state import described

_WIDTH = 61  # of the table, in words
_SMALL = 2**17  # words; a matrix of no more is summed over the table's columns, too


@dataclass(frozen=True)
class Fingerprint:
    """What a model was: its tensors, and what else decides what it computes.

    Attributes:
        hashes: sha256 of each parameter, by name.
        checksums: Checksum of each parameter and buffer, by name.
        state: See `model_state`.
    """

    hashes: Mapping[str, str]
    checksums: Mapping[str, str]
    state: Mapping[str, str]

    @classmethod
    def of(cls, model: Any) -> Fingerprint:
        """Hash every parameter, about a second a gigabyte."""
        hashes = {name: weight_hash(tensor) for name, tensor in model.named_parameters()}
        return cls(hashes, _checksums(model), _state(model))

    @property
    def digest(self) -> str:
        """sha256 of all hashes together."""
        text = "".join(f"{name} {value}\n" for name, value in sorted(self.hashes.items()))
        return hashlib.sha256(text.encode()).hexdigest()

    def check(self, model: Any, after: str) -> None:
        """Refuse a model that is not what it was.

        Args:
            model: The model.
            after: What may have changed it, for the message.

        Raises:
            RuntimeError: a tensor, an option, a hook or a training flag is not what it was.
        """
        for before, now in (
            (self.checksums, _checksums(model)),
            (self.state, _state(model)),
        ):
            changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
            if changed:
                name = adapter.plain_name(changed[0]) or "the model"
                raise RuntimeError(f"{name} is not what it was, after {after}")


def _state(model: Any) -> dict[str, str]:
    modules = adapter.every_module(model)
    edited = {f"the edits of {name}": "on" for name, m in modules if vars(m).get("_rome_ledgers")}
    return {**described(model), **edited}


def _checksums(model: Any) -> dict[str, str]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    fixed = {name: tensor for name, tensor in tensors.items() if not adapter.follows_length(name)}
    return {name: checksum(tensor) for name, tensor in fixed.items()}


@torch.no_grad()
def checksum(tensor: Tensor) -> str:
    """A digest of a tensor's bytes."""
    flat = tensor.detach().contiguous().flatten()
    if flat.storage_offset() * flat.itemsize % 8:  # words have to be aligned
        flat = flat.clone()
    data = flat.view(torch.uint8)
    whole = len(data) // (8 * _WIDTH) * 8 * _WIDTH
    table = data[:whole].view(torch.int64).unflatten(0, (-1, _WIDTH))
    columns = [table.sum(0)] if table.numel() <= _SMALL else []
    state = hashlib.sha256(str(tensor.dtype).encode())
    for part in (table.sum(1), *columns, data[whole:]):
        state.update(part.cpu().contiguous().view(torch.uint8).numpy().data)
    return state.hexdigest()
