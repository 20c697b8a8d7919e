"""A trained editor: a network's tensors and their description, in one safetensors file.

Each edit constructs the network from the tensors, so an editor is a plain value: it can be copied,
and pickled for Ray's workers. That costs a copy of the tensors, little beside the edit's passes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from transformer_lens_rome.edits.kinds import EditRequest, FactoredEdit
from transformer_lens_rome.edits.measure import measured
from transformer_lens_rome.files.fields import fits
from transformer_lens_rome.files.tensors import (
    MAX_LAYERS,
    check_finite,
    read_tensors,
    write_tensors,
)
from transformer_lens_rome.methods.base import provenance
from transformer_lens_rome.methods.hypernetworks.hypernetwork import (
    EditorNetwork,
    Text,
    base_matrix,
    gradient_factors,
    matrix,
    matrix_shapes,
)
from transformer_lens_rome.methods.hypernetworks.training_data import (
    Fact,
    fact_digest,
    to_sample,
)
from transformer_lens_rome.model import adapter
from transformer_lens_rome.model.adapter import Weight
from transformer_lens_rome.model.calls import model_call
from transformer_lens_rome.model.protocol import Model
from transformer_lens_rome.prompts.encoder import Encoder
from transformer_lens_rome.torch_states import torch_defaults

if TYPE_CHECKING:
    from transformer_lens_rome.methods.hypernetworks.recipe import Recipe

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
    model: Model,
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


@dataclass(frozen=True, eq=False, repr=False)
class TrainedEditor:
    """A recipe's trained network, as an `EditMethod`.

    Attributes:
        recipe: The recipe, whose options also say how it edits.
        tensors: The state of the network, on the CPU.
        info: Plain values: `kind`, `counterfact`, `matrices` and their `hashes`, `d_model`,
            `prepend_bos`, `settings`, `train` and `validation` (digests of the facts), `curve`.
    """

    recipe: Recipe
    tensors: Mapping[str, Tensor]
    info: Mapping[str, Any]

    def __repr__(self) -> str:
        """Return kind and sha256, which identify the editor in the settings of a run."""
        return f"{self.info['kind']} editor, sha256 {self.digest}"

    @property
    def name(self) -> str:
        """Return the method's name in tables."""
        return self.recipe.name

    @property
    def options(self) -> dict[str, Any]:
        """Return the recipe's options and the sha256 of the tensors, which identify a run."""
        return {"editor": repr(self), **asdict(self.recipe)}

    @cached_property
    def digest(self) -> str:
        """The sha256 of the tensors."""
        state = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            state.update(f"{name} {adapter.weight_hash(tensor)}".encode())
        return state.hexdigest()

    @property
    def matrices(self) -> list[Weight]:
        """Return the matrices that it edits."""
        return [Weight(name, layer) for name, layer in self.info["matrices"]]

    def has_seen(self, fact: Fact) -> bool:
        """Return whether the editor was trained or validated on a fact."""
        digest = fact_digest(fact)
        return digest in self.info["train"] or digest in self.info["validation"]

    def save(self, path: Any) -> None:
        """Write the editor as safetensors with JSON metadata; the recipe's `load` reads it."""
        copies = {name: tensor.clone() for name, tensor in self.tensors.items()}
        write_tensors(path, copies, {"format": _FORMAT, **self.info})

    # ------------------------------------------------------------ editing

    @model_call
    def prepared(self, model: Model, *, seed: int = 0) -> TrainedEditor:
        """Return the editor itself, after a check that it fits the model.

        Raises:
            ValueError: the editor was trained for another model, or its tensors are damaged.
        """
        self._hashes(model)
        self._network(model)
        return self

    @model_call
    def compute(self, model: Model, request: EditRequest, *, seed: int = 0) -> FactoredEdit:
        """Compute the edit with the network from the request's gradient; no step is random.

        Raises:
            ValueError: the editor was trained for another model, or its tensors are damaged.
        """
        hashes, network = self._hashes(model), self._network(model)
        encoder = Encoder.of(model, self.info["prepend_bos"])
        sample = to_sample(encoder, request, None)
        before, factors = gradient_factors(model, sample, self.matrices)
        with torch.no_grad():
            changes = network(factors, Text.of(model, sample))
        scale = self.recipe.scale
        edit = FactoredEdit.of(
            {w: (left.cpu(), scale * right.cpu()) for w, (left, right) in changes.items()},
            hashes,
            request=request,
            config=self.options,
            provenance=provenance(model, encoder.prepends_bos),
        )
        health = replace(measured(model, encoder, edit), losses=(before,))
        return replace(edit, health=health)

    def _hashes(self, model: Model) -> dict[Weight, str]:
        """Return the hash of each matrix as it is now.

        Raises:
            ValueError: without the edits on it, a matrix is not the one of the training.
        """
        own, advice = self.info["model"], "call fit(model, ...) for another editor"
        if (width := self.info["d_model"]) != model.cfg.d_model:
            raise ValueError(
                f"this editor was trained for a model of width {width} ({own}), got a model of "
                f"width {model.cfg.d_model}; {advice}"
            )
        hashes = {}
        for where, digest in zip(self.matrices, self.info["hashes"], strict=True):
            exists = where.layer < model.cfg.n_layers
            weight = adapter.parameter(model, where) if exists else None
            if weight is None:
                raise ValueError(
                    f"this model has no {where.name} of layer {where.layer}, which this editor was "
                    f"trained for ({own}); {advice}"
                )
            hashes[where] = found = adapter.weight_hash(weight.detach())
            if found != digest and adapter.weight_hash(base_matrix(model, where)) != digest:
                raise ValueError(
                    f"{where.name} of layer {where.layer} is not the one that this editor was "
                    f"trained for ({own}); {advice}"
                )
        return hashes

    def _network(self, model: Model) -> EditorNetwork:
        """Construct the network for the model's matrices, on their device.

        Raises:
            ValueError: the tensors do not fit.
        """
        shapes = matrix_shapes(model, self.matrices)
        tokens = self.tensors.get("condition.tokens", torch.zeros(0, dtype=torch.long))
        with torch.device("meta"):  # no memory and no random numbers for what is replaced below
            rows = torch.zeros(len(tokens), self.info["d_model"])
            network = self.recipe.new_network(shapes, rows, tokens)
        network.to_empty(device=matrix(model, self.matrices[0]).device)
        try:
            network.load_state_dict(self.tensors)
        except RuntimeError as error:
            name = self.recipe.name
            raise ValueError(f"the editor's tensors do not fit {name}: {error}") from error
        return self.recipe.for_editing(network.eval().requires_grad_(False))


@torch_defaults()
def read_editor(path: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the description of an editor that `save` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a complete editor file.
    """
    tensors, info = read_tensors(path, _FORMAT)
    wrong = [name for name, kind in _NEEDED.items() if not fits(info.get(name), kind)]
    if wrong:
        raise ValueError(f"{path} is an incomplete editor file: {wrong} are missing or damaged")
    try:
        _check_matrices([Weight(*where) for where in info["matrices"]], info["hashes"])
        check_finite(tensors)
        for name, tensor in tensors.items():  # MEND's sums of squares and counts
            if name.endswith((".squares", ".n")) and (tensor < 0).any():
                raise ValueError(f"{name[:60]} is negative")
        tokens = tensors.get("condition.tokens", torch.zeros(0, dtype=torch.long))
        if tokens.ndim != 1 or tokens.dtype != torch.long or (tokens.diff() <= 0).any():
            raise ValueError("condition.tokens is not an increasing list of token ids")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is an incomplete editor file ({error!r:.400})") from error
    return tensors, info


def _check_matrices(matrices: Sequence[Weight], hashes: Sequence[str]) -> None:
    """Raise ValueError if these are not matrices of a model, or not one for each hash."""
    for name, layer in matrices:
        if name not in adapter.WEIGHTS or type(layer) is not int or not 0 <= layer < MAX_LAYERS:
            raise ValueError(f"{name!r:.40} of layer {layer!r:.40} is not a matrix of a model")
    if not matrices or not len(set(matrices)) == len(matrices) == len(hashes):
        raise ValueError("each matrix needs exactly one hash")
