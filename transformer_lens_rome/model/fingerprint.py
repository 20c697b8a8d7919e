"""Detect changes of a model: hashes of its parameters, and a faster check between two records.

torch counts writes to a tensor, but not writes through `.data`, so the content is compared. A
checksum is as fast as reading the tensor. It arranges the tensor's 64-bit words in a table and sums
each row. The table is narrower than the rows of matrices, so it detects swapped rows. Its width is
odd, so its rows start at varying columns, and an even number of flipped signs in one sum is an odd
number in another. The checksum is fast, but not secure against deliberate manipulation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from transformer_lens_rome.model import adapter
from transformer_lens_rome.model.adapter import weight_hash
from transformer_lens_rome.model.protocol import Model
from transformer_lens_rome.model.state import described

_WIDTH = 61  # width of the table, in words
_SMALL = 2**17  # up to so many words, the columns of the table are summed too


@dataclass(frozen=True)
class Fingerprint:
    """A record of a model's tensors and of all else that determines its computations.

    Attributes:
        hashes: The sha256 of each parameter, by name.
        checksums: The checksum of each parameter and buffer, by name.
        state: The description by `state.described`, and the names of edited modules.
    """

    hashes: Mapping[str, str]
    checksums: Mapping[str, str]
    state: Mapping[str, str]

    @classmethod
    def of(cls, model: Model) -> Fingerprint:
        """Hash every parameter; this takes about a second per gigabyte."""
        hashes = {name: weight_hash(tensor) for name, tensor in model.named_parameters()}
        return cls(hashes, _checksums(model), _state(model))

    @property
    def digest(self) -> str:
        """The sha256 of all hashes together."""
        text = "".join(f"{name} {value}\n" for name, value in sorted(self.hashes.items()))
        return hashlib.sha256(text.encode()).hexdigest()

    def check(self, model: Model, after: str) -> None:
        """Check that the model has not changed.

        Args:
            model: The model.
            after: The step that may have changed it, for the message.

        Raises:
            RuntimeError: A tensor, an option, a hook or a training flag has changed.
        """
        for before, now in ((self.checksums, _checksums(model)), (self.state, _state(model))):
            changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
            if changed:
                name = adapter.plain_name(changed[0]) or "the model"
                raise RuntimeError(f"{name} has changed after {after}")


def weights_digest(model: Model) -> str:
    """Return a digest of the content of all parameters and buffers, by their checksums."""
    text = "".join(f"{name} {value}\n" for name, value in sorted(_checksums(model).items()))
    return hashlib.sha256(text.encode()).hexdigest()


def _state(model: Model) -> dict[str, str]:
    """Describe the model's state, and list the modules with edits."""
    modules = adapter.every_module(model)
    edited = {f"the edits of {name}": "on" for name, m in modules if vars(m).get("_rome_ledgers")}
    return {**described(model), **edited}


def _checksums(model: Model) -> dict[str, str]:
    """Compute the checksum of each parameter and buffer, except for tables of rotations."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    fixed = {name: tensor for name, tensor in tensors.items() if not adapter.follows_length(name)}
    return {name: checksum(tensor) for name, tensor in fixed.items()}


@torch.no_grad()
def checksum(tensor: Tensor) -> str:
    """Return a digest of a tensor's bytes."""
    flat = tensor.detach().contiguous().flatten()
    if flat.storage_offset() * flat.itemsize % 8:  # 64-bit words must be aligned
        flat = flat.clone()
    data = flat.view(torch.uint8)
    whole = len(data) // (8 * _WIDTH) * 8 * _WIDTH
    table = data[:whole].view(torch.int64).unflatten(0, (-1, _WIDTH))
    columns = [table.sum(0)] if table.numel() <= _SMALL else []
    state = hashlib.sha256(str(tensor.dtype).encode())
    for part in (table.sum(1), *columns, data[whole:]):
        state.update(part.cpu().contiguous().view(torch.uint8).numpy().data)
    return state.hexdigest()
