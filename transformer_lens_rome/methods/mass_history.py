"""The keys of earlier batches, which later batches preserve: a value to pass on, save and load.

With H = sum of k kᵀ over all facts so far, a batch also minimises how much it changes the values at
these keys. arXiv:2605.26670 shows that this term makes edits in sequence equal one joint edit. That
is exact for one layer, the same targets, keys and residuals of the same prefixes, and constant C
and weights. Several layers, or targets searched anew on the edited model, make it approximate.

The published programs store H, `[d_mlp, d_mlp]`. Here the keys are stored; once there are more
than d_mlp of them, they become d_mlp columns with the same H.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens_rome.edits.kinds import Edit, FactoredEdit
from transformer_lens_rome.edits.ledger import active_edits, applied, without
from transformer_lens_rome.files.fields import make
from transformer_lens_rome.files.tensors import (
    MAX_LAYERS,
    check_finite,
    read_tensors,
    write_tensors,
)
from transformer_lens_rome.methods.mass_targets import key_weights, read_at_subject
from transformer_lens_rome.model import adapter
from transformer_lens_rome.model.adapter import Point
from transformer_lens_rome.model.calls import model_call
from transformer_lens_rome.model.protocol import Model
from transformer_lens_rome.prompts.encoder import Encoder, Row
from transformer_lens_rome.statistics.second_moment import probe_keys, same_probe
from transformer_lens_rome.torch_states import torch_defaults

_FORMAT = "transformer_lens_rome.history.1"


@dataclass(frozen=True, eq=False)
class History:
    """The keys of all facts written so far, by layer.

    Attributes:
        keys: For each edited layer, `[d_mlp, columns]`: H = keys @ keys.T.
        n_facts: The number of facts.
        probe: The keys of some fixed tokens at the first edited layer, flattened. They identify the
            model, and no edit of the history changes them.
        model: The model's name.
        prepend_bos: Whether the texts started with BOS.
    """

    keys: Mapping[int, Float[Tensor, "d_mlp columns"]] = field(repr=False)
    n_facts: int
    probe: Float[Tensor, "probe"] = field(repr=False)
    model: str
    prepend_bos: bool

    def __post_init__(self) -> None:
        sizes = {layer: tuple(keys.shape) for layer, keys in self.keys.items()}
        whole = all(type(layer) is int and 0 <= layer < MAX_LAYERS for layer in sizes)
        if not sizes or not whole or self.n_facts < 1 or len(set(sizes.values())) > 1:
            raise ValueError(f"a history needs facts, and keys of one size a layer; it has {sizes}")
        if any(keys.ndim != 2 or not keys.is_floating_point() for keys in self.keys.values()):
            raise ValueError(f"keys are [d_mlp, columns] of floats; they are {sizes}")

    @model_call
    def check_fits(self, model: Model, layers: Sequence[int], prepend_bos: bool) -> None:
        """Check that the history is of a model and of the layers to edit.

        Raises:
            ValueError: It is of another model, of other layers, or of another BOS rule.
        """
        if list(self.keys) != list(layers):
            raise ValueError(
                f"this history is of the layers {list(self.keys)}, the edit changes "
                f"{list(layers)}; pass layers={list(self.keys)}, or no history"
            )
        if self.prepend_bos != prepend_bos:
            raise ValueError(f"this history is of texts with prepend_bos={self.prepend_bos}")
        widths = {layer: len(adapter.w_out(model, layer)) for layer in layers}
        fits = all(len(self.keys[layer]) == width for layer, width in widths.items())
        if not fits or not same_probe(self.probe, probe_keys(model, [layers[0]])[layers[0]]):
            raise ValueError(
                f"this history is of {self.model}, and this model has other keys at layer "
                f"{layers[0]}; pass the history of edits of this model, or none"
            )

    @torch_defaults()
    def extended(self, keys: Mapping[int, Float[Tensor, "d_mlp n"]], n_facts: int) -> History:
        """Return the history with the keys of more facts."""
        together = {
            layer: _narrowed(torch.cat([earlier, keys[layer].to(earlier)], 1))
            for layer, earlier in self.keys.items()
        }
        return dataclasses.replace(self, keys=together, n_facts=self.n_facts + n_facts)

    def save(self, path: Any) -> None:
        """Write a safetensors file."""
        tensors = {f"keys.{layer}": keys for layer, keys in self.keys.items()}
        info = {"n_facts": self.n_facts, "model": self.model, "prepend_bos": self.prepend_bos}
        info |= {"format": _FORMAT, "layers": list(self.keys)}
        write_tensors(path, {**tensors, "probe": self.probe}, info)

    @classmethod
    @torch_defaults()
    def load(cls, path: Any) -> History:
        """Read a file written by `save`.

        Raises:
            FileNotFoundError: The file does not exist.
            ValueError: The file is not safetensors, is truncated, or contains no history.
        """
        tensors, info = read_tensors(path, _FORMAT)
        try:
            check_finite(tensors)
            layers = info.pop("layers")
            keys = {layer: tensors[f"keys.{layer}"] for layer in layers}
            if set(tensors) != {"probe", *(f"keys.{layer}" for layer in layers)}:
                raise ValueError(f"it has the tensors {sorted(tensors)!r:.200}")
            info.pop("format")
            return make(cls, {**info, "keys": keys, "probe": tensors["probe"]})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} contains no complete history ({error!r:.400})") from error


@torch.no_grad()
def _narrowed(keys: Float[Tensor, "d_mlp n"]) -> Float[Tensor, "d_mlp columns"]:
    """Return at most d_mlp columns with the same sum of k kᵀ."""
    if keys.shape[1] <= len(keys):
        return keys
    values, vectors = torch.linalg.eigh(keys.double() @ keys.double().T)
    return (vectors * values.clamp(min=0).sqrt()).to(keys)


@model_call
def extended_history(model: Model, edit: Edit, history: History | None = None) -> History:
    """Return the history with the facts of an edit of many facts, to pass to the next batch.

    Args:
        model: The model that the edit was made on, with the edit on it or without.
        edit: An edit by MEMIT, EMMET or AlphaEdit.
        history: The history that the edit was made with; None if it was the first batch.

    Raises:
        ValueError: The edit is of another method, or the history is of another model or of other
            layers.
    """
    known = edit.provenance
    if not isinstance(edit, FactoredEdit) or "history_keys" not in edit.config:
        raise ValueError("a history needs an edit by memit, emmet or alphaedit")
    encoder = Encoder.of(model, known["prepend_bos"])
    layers = [where.layer for where in edit.factors]
    if history is not None:
        history.check_fits(model, layers, encoder.prepends_bos)
    rows = fact_rows(encoder, edit.requests, known["prefixes"])
    keys = _keys_after(model, edit, rows)
    if history is not None:
        return history.extended(keys, len(edit.requests))
    probe = probe_keys(model, layers[:1])[layers[0]]
    keys = {layer: _narrowed(some) for layer, some in keys.items()}
    return History(keys, len(edit.requests), probe, adapter.model_name(model), encoder.prepends_bos)


def fact_rows(
    encoder: Encoder, requests: Sequence[Any], prefixes: Sequence[str]
) -> list[list[Row]]:
    """Return the rows of each fact, one for each prefix, without its target."""
    return [
        [encoder.templated_row(one.prompt, one.subject, text) for text in prefixes]
        for one in requests
    ]


def mean_over(
    weights: Float[Tensor, "prefix"], activation: Float[Tensor, "n_times_prefix d"]
) -> Float[Tensor, "n d"]:
    """Return the weighted mean over the prefixes of each fact, in float32."""
    each = activation.float().unflatten(0, (-1, len(weights)))
    return (weights.to(each)[:, None] * each).sum(1)


def _keys_after(
    model: Model, edit: FactoredEdit, rows: Sequence[Sequence[Row]]
) -> dict[int, Float[Tensor, "d_mlp n"]]:
    """Return the keys that later batches preserve, of the edited model; see `history_keys`."""
    layers = [where.layer for where in edit.factors]
    flat, weights = [row for some in rows for row in some], key_weights(len(rows[0]))

    def read(some: Sequence[int]) -> dict[int, Tensor]:
        found = read_at_subject(model, flat, [Point("key", layer) for layer in some])
        return {n: mean_over(weights, one).T.cpu() for n, one in zip(some, found, strict=True)}

    on = any(edit.digest == other.digest for other in active_edits(model, layers[0]))
    if edit.config["history_keys"] == "after":
        with ExitStack() as stack:
            if not on:
                stack.enter_context(applied(model, edit))
            return read(layers)
    keys: dict[int, Tensor] = {}
    with without(model, edit), ExitStack() as stack:
        for layer in layers:
            keys |= read([layer])
            stack.enter_context(applied(model, part_of(edit, layer)))
    return keys


def part_of(edit: FactoredEdit, layer: int) -> FactoredEdit:
    """Return the part of an edit that changes one layer."""
    factors = {where: both for where, both in edit.factors.items() if where.layer == layer}
    hashes = {where: edit.hashes[where] for where in factors}
    return FactoredEdit.of(factors, hashes, request=edit.request)
