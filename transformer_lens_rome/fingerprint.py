"""Is a model what it was? Hashes of all its parameters, and which of them were written to."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformer_lens_rome.adapter import weight_hash

Writes = Mapping[str, Any]


@dataclass(frozen=True)
class Fingerprint:
    """What the parameters of a model were.

    Attributes:
        hashes: sha256 of each, by name.
    """

    hashes: Mapping[str, str]

    @classmethod
    def of(cls, model: Any) -> Fingerprint:
        """Hash every parameter, about a second a gigabyte."""
        return cls({name: weight_hash(tensor) for name, tensor in model.named_parameters()})

    @property
    def digest(self) -> str:
        """sha256 of all of them together."""
        text = "".join(f"{name} {value}\n" for name, value in sorted(self.hashes.items()))
        return hashlib.sha256(text.encode()).hexdigest()

    def check(self, model: Any, after: str, since: Writes | None = None) -> None:
        """Refuse a model that is not what it was.

        Args:
            model: The model.
            after: What may have changed it, for the message.
            since: From `writes`, before that: only what was written to since then is hashed.

        Raises:
            RuntimeError: a parameter is not what it was.
        """
        now = writes(model)
        for name, tensor in model.named_parameters():
            if since is not None and now[name] is not None and since.get(name) == now[name]:
                continue
            if self.hashes.get(name) != weight_hash(tensor):
                short = name.replace("._original_component", "")  # as a checkpoint has it
                raise RuntimeError(f"{short} is not what it was, after {after}")


def writes(model: Any) -> Writes:
    """Where each parameter is, and how often it was written to; None where torch does not count."""
    return {
        name: None if tensor.is_inference() else (tensor.data_ptr(), tensor._version)
        for name, tensor in model.named_parameters()
    }
