"""Put edits on a model, and take them off again to the byte.

A weight is always its base plus its active edits, in the order they were applied. The first edit
applied to a weight keeps a copy of its bytes in a ledger, on the parameter itself; each apply or
undo writes base and active edits anew. So undoing one of several leaves what the others alone
would have given, and undoing all, in any order, gives back the very bytes of the base.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens_rome import adapter
from transformer_lens_rome.edits import Edit, EditHealth


@dataclass(eq=False)
class _Ledger:
    """A weight's base bytes, the edits on it, and the hash of what they wrote together."""

    base: Float[Tensor, "d_mlp d_model"]
    base_hash: str
    active: list[Edit]
    written_hash: str


def _ledger(model: Any, layer: int) -> _Ledger | None:
    return getattr(adapter.weight_owner(model, layer), "_rome_ledger", None)


def active_edits(model: Any, layer: int) -> tuple[Edit, ...]:
    """The edits that are on a layer's W_out now, in the order they were applied."""
    ledger = _ledger(model, layer)
    return tuple(ledger.active) if ledger else ()


def base_weight(model: Any, layer: int) -> Float[Tensor, "d_mlp d_model"]:
    """A layer's W_out as it would be without the edits that are on it now."""
    ledger = _ledger(model, layer)
    return ledger.base if ledger else adapter.w_out(model, layer).detach()


@dataclass(frozen=True)
class AppliedEdit:
    """Edits that were put on a model; leaving a `with` block, or `revert()`, takes them off.

    Iterating over it gives each edit on its own, to be reverted in any order.

    Attributes:
        model: The model that was changed.
        edits: What was applied, in order.
    """

    model: Any = field(repr=False)
    edits: tuple[Edit, ...]
    ledgers: tuple[_Ledger, ...] = field(repr=False, compare=False)

    @property
    def edit(self) -> Edit:
        """The edit, where there is just one."""
        if len(self.edits) != 1:
            raise ValueError(f"{len(self.edits)} edits were applied together; see .edits")
        return self.edits[0]

    @property
    def health(self) -> EditHealth:
        """The edit's health, where there is just one."""
        return self.edit.health

    @property
    def active(self) -> bool:
        """Whether any of them is still on the model."""
        return any(
            edit is other
            for edit, ledger in zip(self.edits, self.ledgers, strict=True)
            for other in ledger.active
        )

    def revert(self, *, force: bool = False) -> None:
        """Take the edits off again; nothing happens to those that are off already.

        Raises:
            ValueError: something else changed the weight since. `force=True` writes base and
                remaining edits anyway, and that other change is lost.
        """
        with ExitStack() as every:  # a failure at one layer does not keep the others from undoing
            for edit, ledger in zip(self.edits, self.ledgers, strict=True):
                if any(edit is other for other in ledger.active):
                    every.callback(_remove, self.model, edit, ledger, force)

    def __iter__(self) -> Iterator[AppliedEdit]:
        for edit, ledger in zip(self.edits, self.ledgers, strict=True):
            yield AppliedEdit(self.model, (edit,), (ledger,))

    def __enter__(self) -> AppliedEdit:
        return self

    def __exit__(self, *_: object) -> None:
        self.revert()


def revert_all(model: Any, *, force: bool = False) -> None:
    """Take every edit off a model, also those whose `AppliedEdit` is lost."""
    for layer in range(model.cfg.n_layers):
        if active_edits(model, layer):
            ledger = _ledger(model, layer)
            edits = tuple(ledger.active)
            AppliedEdit(model, edits, (ledger,) * len(edits)).revert(force=force)


def apply_edit(model: Any, edit: Edit, *, force: bool = False) -> AppliedEdit:
    """Add an edit to the model's W_out, in place.

    Raises:
        ValueError: the edit's shape does not fit; it is on the model already; or W_out is neither
            the weight that it was made on nor that weight with known edits on top.
            `force=True` applies it to any weight of the right shape.
    """
    if not isinstance(edit, Edit):
        raise ValueError(f"expected an edit, got a {type(edit).__name__}; pass edits one by one")
    adapter.check_editable(model, [edit.layer])
    weight = adapter.w_out(model, edit.layer)
    shape = tuple(edit.delta().shape)
    if shape != tuple(weight.shape):
        raise ValueError(
            f"the edit changes a W_out of shape {shape}, but layer {edit.layer} of this model has "
            f"{tuple(weight.shape)}; it was made on {edit.provenance.get('model', 'another model')}"
        )
    ledger, found = _ledger(model, edit.layer), adapter.weight_hash(weight)
    if ledger is None:
        ledger = _Ledger(weight.detach().clone(), found, [], found)
    elif found != ledger.written_hash:
        raise ValueError(_changed_by_others(edit.layer, "revert the edits on it with force=True"))
    if any(edit.digest == other.digest for other in ledger.active) and edit.delta().any():
        raise ValueError(
            "this edit is on the model already; apply edit.scale(alpha) for a stronger one"
        )
    if edit.model_hash not in (found, ledger.base_hash) and not force:
        raise ValueError(
            f"W_out of layer {edit.layer} is not the weight that this edit was made on "
            f"(sha256 {found[:12]}, the edit's {edit.model_hash[:12]}): another model, other edits "
            "on it, or processed weights; force=True applies it all the same"
        )
    _write(model, edit.layer, ledger, [*ledger.active, edit])
    return AppliedEdit(model, (edit,), (ledger,))


@contextmanager
def applied(model: Any, *edits: Edit, force: bool = False) -> Iterator[Any]:
    """The model with some edits on it; exactly the old weights again at exit, also on errors."""
    with ExitStack() as undo:
        for edit in edits:
            undo.callback(apply_edit(model, edit, force=force).revert)
        yield model


@contextmanager
def without(model: Any, edit: Edit) -> Iterator[Any]:
    """The model without an edit that may be on it; as it was again at exit, also on errors.

    Raises:
        ValueError: something else changed the weight since it was edited.
    """
    ledger = _ledger(model, edit.layer)
    if ledger is None or not any(edit.digest == other.digest for other in ledger.active):
        yield model
        return
    if adapter.weight_hash(adapter.w_out(model, edit.layer)) != ledger.written_hash:
        raise ValueError(_changed_by_others(edit.layer, "revert the edits on it with force=True"))
    every = list(ledger.active)
    _write(model, edit.layer, ledger, [one for one in every if one.digest != edit.digest])
    try:
        yield model
    finally:
        _write(model, edit.layer, ledger, every)


def _remove(model: Any, edit: Edit, ledger: _Ledger, force: bool) -> None:
    if _ledger(model, edit.layer) is not ledger:
        raise ValueError(
            f"the parameter that held this edit of layer {edit.layer} is not in the model any more "
            "(weight processing, or load_state_dict(assign=True), replaced it); reload the model"
        )
    found = adapter.weight_hash(adapter.w_out(model, edit.layer))
    if found != ledger.written_hash and not force:
        raise ValueError(_changed_by_others(edit.layer, "revert(force=True) discards that change"))
    _write(model, edit.layer, ledger, [other for other in ledger.active if other is not edit])


@torch.no_grad()
def _write(model: Any, layer: int, ledger: _Ledger, edits: list[Edit]) -> None:
    """Write base + edits into W_out and keep or drop the ledger; on an error nothing changes."""
    weight, owner = adapter.w_out(model, layer), adapter.weight_owner(model, layer)
    new = ledger.base.to(weight).clone()
    for edit in edits:
        new += edit.delta().to(new)
    if not torch.isfinite(new).all():
        raise ValueError(f"the edit would put NaN or infinity into W_out of layer {layer}")
    old, state = weight.detach().clone(), (ledger.active, ledger.written_hash)
    try:
        ledger.active, ledger.written_hash = edits, adapter.weight_hash(new)
        owner._rome_ledger = ledger
        weight.copy_(new)
    except BaseException:
        ledger.active, ledger.written_hash = state
        weight.copy_(old)
        raise
    finally:
        if not ledger.active:
            vars(owner).pop("_rome_ledger", None)


def _changed_by_others(layer: int, remedy: str) -> str:
    return (
        f"W_out of layer {layer}, or its dtype, was changed by something else since it was edited; "
        f"{remedy}"
    )
