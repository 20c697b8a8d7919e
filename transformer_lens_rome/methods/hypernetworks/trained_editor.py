"""A trained editor: a network's tensors, and what they are for, in one safetensors file."""

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
    """What was trained for which model and on what; data are for training and for validation."""
    texts = "\n".join([*others[0], "", *others[1]])
    return {
        "matrices": [[*where] for where in matrices],
        "hashes": [adapter.weight_hash(adapter.parameter(model, where)) for where in matrices],
        "d_model": model.cfg.d_model,
        "model": adapter.model_name(model),
        "train": [fact_digest(fact) for fact in facts[0]],
        "validation": [fact_digest(fact) for fact in facts[1]],
        "locality": hashlib.sha256(texts.encode()).hexdigest(),
    }


class TrainedEditor:
    """A network's tensors and what is known of them.

    Attributes:
        tensors: The network's state.
        info: Plain values: `kind`, `counterfact`, `matrices` and their `hashes`, `d_model`,
            `prepend_bos`, `settings`, `train` and `validation` (digests of the facts), `curve`.
    """

    def __init__(self, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
        """Keep both; see `load` for one from a file."""
        self.tensors, self.info = dict(tensors), dict(info)
        state = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            state.update(f"{name} {adapter.weight_hash(tensor)}".encode())
        self.digest = state.hexdigest()
        self._seen = {*self.info.get("train", ()), *self.info.get("validation", ())}

    def __repr__(self) -> str:
        """Name and sha256, by which runs that used it are told apart."""
        return f"{self.info['kind']} editor, sha256 {self.digest}"

    @property
    def matrices(self) -> list[Weight]:
        """What it edits."""
        return [Weight(name, layer) for name, layer in self.info["matrices"]]

    def has_seen(self, fact: Fact) -> bool:
        """Whether a fact was among those that it was trained or validated on."""
        return fact_digest(fact) in self._seen

    def check(self, model: Any) -> None:
        """Refuse a model that it was not trained for; edits that are on the model do not matter.

        Raises:
            ValueError: another model.
        """
        if (width := self.info["d_model"]) != model.cfg.d_model:
            raise ValueError(
                f"this editor was trained for a model of width {width} ({self.info['model']}), "
                f"this one's is {model.cfg.d_model}; call fit(model, ...) for another"
            )
        for where, digest in zip(self.matrices, self.info["hashes"], strict=True):
            known = where.layer < model.cfg.n_layers
            weight = base_weight(model, where) if known else None
            if weight is None or adapter.weight_hash(weight) != digest:
                raise ValueError(
                    f"{where.name} of layer {where.layer} is not the one that this editor was "
                    f"trained for ({self.info['model']}); call fit(model, ...) for another"
                )

    def save(self, path: Any) -> None:
        """Write it."""
        copies = {name: tensor.clone() for name, tensor in self.tensors.items()}
        write_tensors(path, copies, {"format": _FORMAT, **self.info})

    @classmethod
    @torch_defaults()
    def load(cls, path: Any) -> TrainedEditor:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a whole editor file.
        """
        tensors, info = read_tensors(path, _FORMAT)
        wrong = [name for name, kind in _NEEDED.items() if not fits(info.get(name), kind)]
        if wrong:
            raise ValueError(f"{path} is an incomplete editor file: {wrong} are missing or damaged")
        try:
            editor = cls(tensors, info)
            if info["kind"] not in ("ke", "mend"):
                raise ValueError(f"there is no editor of the kind {info['kind']!r:.40}")
            _check_matrices(editor.matrices, info["hashes"])
            check_finite(tensors)
            for name, tensor in tensors.items():  # MEND's sums of squares, and how many there are
                if name.endswith((".squares", ".n")) and (tensor < 0).any():
                    raise ValueError(f"{name[:60]} is below zero")
            tokens = tensors.get("condition.tokens", torch.zeros(0, dtype=torch.long))
            if tokens.ndim != 1 or tokens.dtype != torch.long or (tokens.diff() <= 0).any():
                raise ValueError("condition.tokens are no token ids in order")
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is an incomplete editor file ({error!r:.400})") from error
        return editor


def _check_matrices(matrices: Sequence[Weight], hashes: Sequence[str]) -> None:
    """Refuse what are no matrices of a model, or not one with each hash."""
    for name, layer in matrices:
        if name not in adapter.WEIGHTS or type(layer) is not int or not 0 <= layer < MAX_LAYERS:
            raise ValueError(f"{name!r:.40} of layer {layer!r:.40} is no matrix")
    if not matrices or not len(set(matrices)) == len(matrices) == len(hashes):
        raise ValueError("one hash is needed for each matrix")
