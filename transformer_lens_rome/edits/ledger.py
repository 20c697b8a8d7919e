"""Apply edits to a model, and undo them byte for byte.

Edits can be undone in any order: see `base_bytes`, which stores the original bytes of each edited
weight and writes base and edits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor

from transformer_lens_rome.edits.base_bytes import (
    Ledger,
    changed_by_others,
    every_ledger,
    has_its_edits,
    is_on,
    ledger_of,
    ledgers_for,
    live_weight,
    write,
    write_all,
)
from transformer_lens_rome.edits.kinds import Edit, EditHealth
from transformer_lens_rome.model import adapter
from transformer_lens_rome.model.adapter import Weight
from transformer_lens_rome.model.calls import weights_call
from transformer_lens_rome.model.protocol import Model
from transformer_lens_rome.torch_states import torch_defaults


def _edits_on(ledgers: Iterable[Ledger]) -> tuple[Edit, ...]:
    """Return the edits on some weights, each of them once."""
    by_id = {id(edit): edit for ledger in ledgers for edit in ledger.active}
    return tuple(by_id.values())


def active_edits(model: Model, layer: int) -> tuple[Edit, ...]:
    """Return the active edits of a layer's MLP, in the order they were applied to each weight."""
    return _edits_on(ledger for ledger in every_ledger(model) if ledger.where.layer == layer)


def edited_weights(model: Model) -> list[Weight]:
    """Return the weights that have active edits."""
    return [ledger.where for ledger in every_ledger(model)]


def check_unedited(model: Model) -> None:
    """Check that a model has no edits on it.

    Raises:
        ValueError: the model has edits.
    """
    if edited_weights(model):
        raise ValueError("there are edits on the model; take them off with revert_all(model)")


def base_weight(model: Model, where: Weight) -> Float[Tensor, "..."] | None:
    """Return a weight without its active edits, or None if the model has no such weight."""
    if ledger := ledger_of(model, where):
        return ledger.base
    weight = adapter.parameter(model, where)
    return None if weight is None else weight.detach()


@dataclass(frozen=True)
class AppliedEdit:
    """Edits applied to a model; `revert()`, or the end of a `with` block, undoes them.

    Iteration yields each edit as a separate `AppliedEdit`. They can be reverted in any order.

    Attributes:
        model: The model that was changed.
        edits: The edits, in the order they were applied.
    """

    model: Model = field(repr=False)
    edits: tuple[Edit, ...]
    _ledgers: tuple[tuple[Ledger, ...], ...] = field(repr=False, compare=False)

    @property
    def edit(self) -> Edit:
        """The edit, if only one was applied."""
        if len(self.edits) != 1:
            raise ValueError(f"{len(self.edits)} edits were applied together; see .edits")
        return self.edits[0]

    @property
    def health(self) -> EditHealth:
        """The edit's health, if only one edit was applied."""
        return self.edit.health

    @property
    def active(self) -> bool:
        """True if any of the edits is still on the model."""
        return any(
            edit is other
            for edit, ledgers in zip(self.edits, self._ledgers, strict=True)
            for ledger in ledgers
            for other in ledger.active
        )

    def revert(self, *, force: bool = False) -> None:
        """Undo the edits; those that are already undone are skipped.

        Raises:
            ValueError: other code changed the weight since. `force=True` writes base and
                remaining edits anyway and discards that change. It does not help if the model's
                weights were processed since, because the base bytes no longer describe them.
        """
        with torch_defaults():
            self._revert(force)

    def _revert(self, force: bool) -> None:
        on = [
            (edit, [ledger for ledger in ledgers if any(edit is other for other in ledger.active)])
            for edit, ledgers in zip(self.edits, self._ledgers, strict=True)
        ]
        try:
            _remove(self.model, on, force)
        except Exception:
            if len(on) == 1:
                raise
            with ExitStack() as every:  # an error of one edit does not stop the others
                for pair in on:
                    every.callback(_remove, self.model, [pair], force)

    @classmethod
    def of(cls, model: Model, parts: Sequence[AppliedEdit]) -> AppliedEdit:
        """Return several applied edits as one."""
        edits = tuple(edit for part in parts for edit in part.edits)
        return cls(model, edits, tuple(ledgers for part in parts for ledgers in part._ledgers))

    def __iter__(self) -> Iterator[AppliedEdit]:
        for edit, ledgers in zip(self.edits, self._ledgers, strict=True):
            yield AppliedEdit(self.model, (edit,), (ledgers,))

    def __enter__(self) -> AppliedEdit:
        return self

    def __exit__(self, *_: object) -> None:
        self.revert()


@weights_call
def revert_all(model: Model, *, force: bool = False) -> None:
    """Undo every edit on a model, including those whose `AppliedEdit` is lost.

    Raises:
        ValueError: other code changed an edited weight since, see `AppliedEdit.revert`. The edits
            on other weights are undone.
    """
    every = every_ledger(model)
    edits = _edits_on(every)
    ledgers = tuple(
        tuple(one for one in every if any(edit is other for other in one.active)) for edit in edits
    )
    AppliedEdit(model, edits, ledgers).revert(force=force)


@weights_call
def apply_edit(model: Model, edit: Edit, *, force: bool = False) -> AppliedEdit:
    """Add an edit to every weight that it changes, in place.

    Raises:
        ValueError: the edit's shape does not fit; it is on the model already; or a matrix is not
            the one that it was made on, with or without known edits on top.
            `force=True` applies it to any weights of the right shapes.
    """
    ledgers = ledgers_for(model, edit, force=force)
    if is_on(edit, ledgers) and any(edit.change(ledger.where).any() for ledger in ledgers):
        raise ValueError(
            "this edit is on the model already; apply edit.scale(alpha) for a stronger one"
        )
    write_all(model, [(ledger, [*ledger.active, edit]) for ledger in ledgers])
    return AppliedEdit(model, (edit,), (tuple(ledgers),))


@contextmanager
def applied(model: Model, *edits: Edit, force: bool = False) -> Iterator[Any]:
    """Yield the model with some edits on it; restore the exact old weights at exit or on error."""
    with ExitStack() as undo:
        for edit in edits:
            undo.callback(apply_edit(model, edit, force=force).revert)
        yield model


@contextmanager
def without(model: Model, edit: Edit) -> Iterator[Any]:
    """Yield the model without an edit, if it has it; restore the edit at exit or on error.

    Raises:
        ValueError: other code changed the weight since it was edited.
    """
    on = [
        ledger
        for where in edit.sizes()
        if (ledger := ledger_of(model, where))
        and any(edit.digest == other.digest for other in ledger.active)
    ]
    for ledger in on:
        if adapter.weight_hash(live_weight(model, ledger.where)) != ledger.written_hash:
            raise changed_by_others(ledger.where, "revert the edits on it with force=True")
    with ExitStack() as undo:
        for ledger in on:
            every = list(ledger.active)
            undo.callback(write, model, ledger, every)
            write(model, ledger, [one for one in every if one.digest != edit.digest])
        yield model


def _remove(model: Model, on: list[tuple[Edit, list[Ledger]]], force: bool) -> None:
    """Remove edits from all of their weights, or on an error from none of them."""
    to_remove: dict[int, tuple[Ledger, set[int]]] = {}
    for edit, ledgers in on:
        for ledger in ledgers:
            to_remove.setdefault(id(ledger), (ledger, set()))[1].add(id(edit))
    writes = []
    for ledger, ids in to_remove.values():
        edited = has_its_edits(model, ledger, force)
        writes.append((ledger, [e for e in ledger.active if edited and id(e) not in ids]))
    write_all(model, writes)
