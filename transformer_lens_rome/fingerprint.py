"""Is a model what it was? Hashes of its parameters, and a faster check between two records.

torch counts writes to a tensor, but not those through `.data`, so what counts is the content. A
checksum reads a parameter at the speed of memory: sums of its 64-bit words, over rows and over
columns of a table of them. Any single change is seen, and so are rows or words that change places.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from transformer_lens_rome import adapter
from transformer_lens_rome.adapter import weight_hash

_COLUMNS = 1024  # of the table, 64-bit words


@dataclass(frozen=True)
class Fingerprint:
    """What a model was: its parameters, and what is set on its modules.

    Attributes:
        hashes: sha256 of each parameter, by name.
        checksums: Its checksum, by name.
        modules: For each module, the number of the user's hooks and its training flag.
    """

    hashes: Mapping[str, str]
    checksums: Mapping[str, str]
    modules: Mapping[str, tuple[int, bool]]

    @classmethod
    def of(cls, model: Any) -> Fingerprint:
        """Hash every parameter, about a second a gigabyte."""
        hashes = {name: weight_hash(tensor) for name, tensor in model.named_parameters()}
        return cls(hashes, _checksums(model), _modules(model))

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
            RuntimeError: a parameter, a training flag or the number of hooks is not what it was.
        """
        for kind, before, now in (
            ("", self.checksums, _checksums(model)),
            ("the hooks or the training flag of ", self.modules, _modules(model)),
        ):
            changed = [n for n in {**before, **now} if before.get(n) != now.get(n)]
            if changed:
                name = adapter.plain_name(changed[0])
                raise RuntimeError(f"{kind}{name} is not what it was, after {after}")


def _checksums(model: Any) -> dict[str, str]:
    return {name: checksum(tensor) for name, tensor in model.named_parameters()}


def _modules(model: Any) -> dict[str, tuple[int, bool]]:
    return {
        name: (len(adapter.users_hooks(module)), module.training)
        for name, module in adapter.every_module(model)
    }


@torch.no_grad()
def checksum(tensor: Tensor) -> str:
    """A digest of a tensor's bytes, fast rather than safe against intent."""
    flat = tensor.detach().contiguous().flatten()
    if flat.storage_offset() * flat.itemsize % 8:  # words have to be aligned
        flat = flat.clone()
    data = flat.view(torch.uint8)
    whole = len(data) // (8 * _COLUMNS) * 8 * _COLUMNS
    table = data[:whole].view(torch.int64).unflatten(0, (-1, _COLUMNS))
    state = hashlib.sha256(str(tensor.dtype).encode())
    for part in (table.sum(0), table.sum(1), data[whole:]):
        state.update(part.cpu().contiguous().view(torch.uint8).numpy().data)
    return state.hexdigest()
