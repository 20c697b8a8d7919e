"""A trained editor: a network's tensors and their description, in one safetensors file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from transformer_lens_rome.edits.ledger import base_weight
from transformer_lens_rome.files.fields import fits
from transformer_lens_rome.files.tensors import (
    MAX_LAYERS,
    check_finite,
    read_tensors,
    write_tensors,
)
from transformer_lens_rome.methods.hypernetworks.hypernetwork import matrix
from transformer_lens_rome.methods.hypernetworks.training_data import Fact, fact_digest
from transformer_lens_rome.model import adapter
from transformer_lens_rome.model.adapter import Weight
from transformer_lens_rome.torch_states import torch_defaults

_FORMAT = "transformer_lens_rome.editor.1"
_NEEDED = {
    "kind": str,
    "counterfact": bool,
    "matrices": list,
    "hashes": list[str],
    "d_model": int,
    "model": str,
    "prepend_bos": bool,
    "train": list[str],
    "validation": list[str],
}


def trained_on(
    model: Any,
    matrices: Sequence[Weight],
    facts: tuple[Sequence[Fact], Sequence[Fact]],
    others: tuple[Sequence[str], Sequence[str]],
) -> dict[str, Any]:
    """Return the description of an editor: its matrices, its model, and the digests of its data.

    `facts` and `others` are pairs: data for training and for validation.
    """
    texts = "\n".join([*others[0], "", *others[1]])
    return {
        "matrices": [[*where] for where in matrices],
        "hashes": [adapter.weight_hash(matrix(model, where)) for where in matrices],
        "d_model": model.cfg.d_model,
        "model": adapter.model_name(model),
        "train": [fact_digest(fact) for fact in facts[0]],
        "validation": [fact_digest(fact) for fact in facts[1]],
        "locality": hashlib.sha256(texts.encode()).hexdigest(),
    }


class TrainedEditor:
    """The tensors of a trained network and their description.

    Attributes:
        tensors: The state of the network.
        info: Plain values: `kind`, `counterfact`, `matrices` and their `hashes`, `d_model`,
            `prepend_bos`, `settings`, `train` and `validation` (digests of the facts), `curve`.
    """

    def __init__(self, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
        """Store both; `load` reads an editor from a file."""
        self.tensors, self.info = dict(tensors), dict(info)
        state = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            state.update(f"{name} {adapter.weight_hash(tensor)}".encode())
        self.digest = state.hexdigest()
        self._seen = {*self.info.get("train", ()), *self.info.get("validation", ())}

    def __repr__(self) -> str:
        """Return kind and sha256, which identify the editor in the settings of a run."""
        return f"{self.info['kind']} editor, sha256 {self.digest}"

    @property
    def matrices(self) -> list[Weight]:
        """Return the matrices that it edits."""
        return [Weight(name, layer) for name, layer in self.info["matrices"]]

    def has_seen(self, fact: Fact) -> bool:
        """Return whether the editor was trained or validated on a fact."""
        return fact_digest(fact) in self._seen

    def check(self, model: Any) -> None:
        """Raise ValueError if the editor was trained for another model.

        Edits on the model do not matter.

        Raises:
            ValueError: the model is another one.
        """
        if (width := self.info["d_model"]) != model.cfg.d_model:
            raise ValueError(
                f"this editor was trained for a model of width {width} ({self.info['model']}), got "
                f"a model of width {model.cfg.d_model}; call fit(model, ...) for another editor"
            )
        for where, digest in zip(self.matrices, self.info["hashes"], strict=True):
            exists = where.layer < model.cfg.n_layers
            weight = base_weight(model, where) if exists else None
            if weight is None or adapter.weight_hash(weight) != digest:
                raise ValueError(
                    f"{where.name} of layer {where.layer} is not the one that this editor was "
                    f"trained for ({self.info['model']}); call fit(model, ...) for another editor"
                )

    def save(self, path: Any) -> None:
        """Write the editor to a file."""
        copies = {name: tensor.clone() for name, tensor in self.tensors.items()}
        write_tensors(path, copies, {"format": _FORMAT, **self.info})

    @classmethod
    @torch_defaults()
    def load(cls, path: Any) -> TrainedEditor:
        """Read an editor that `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not a complete editor file.
        """
        tensors, info = read_tensors(path, _FORMAT)
        wrong = [name for name, kind in _NEEDED.items() if not fits(info.get(name), kind)]
        if wrong:
            raise ValueError(f"{path} is an incomplete editor file: {wrong} are missing or damaged")
        try:
            editor = cls(tensors, info)
            if info["kind"] not in ("ke", "mend"):
                raise ValueError(f"the kind must be ke or mend, got {info['kind']!r:.40}")
            _check_matrices(editor.matrices, info["hashes"])
            check_finite(tensors)
            for name, tensor in tensors.items():  # MEND's sums of squares and counts
                if name.endswith((".squares", ".n")) and (tensor < 0).any():
                    raise ValueError(f"{name[:60]} is negative")
            tokens = tensors.get("condition.tokens", torch.zeros(0, dtype=torch.long))
            if tokens.ndim != 1 or tokens.dtype != torch.long or (tokens.diff() <= 0).any():
                raise ValueError("condition.tokens is not an increasing list of token ids")
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is an incomplete editor file ({error!r:.400})") from error
        return editor


def _check_matrices(matrices: Sequence[Weight], hashes: Sequence[str]) -> None:
    """Raise ValueError if these are not matrices of a model, or not one for each hash."""
    for name, layer in matrices:
        if name not in adapter.WEIGHTS or type(layer) is not int or not 0 <= layer < MAX_LAYERS:
            raise ValueError(f"{name!r:.40} of layer {layer!r:.40} is not a matrix of a model")
    if not matrices or not len(set(matrices)) == len(matrices) == len(hashes):
        raise ValueError("each matrix needs exactly one hash")
