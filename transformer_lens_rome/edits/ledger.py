"""Put edits on a model, and take them off again to the byte.

A weight is always its base plus its active edits, in the order they were applied. The first edit
applied to a weight keeps a copy of its bytes in a ledger; each apply or undo writes base and active
edits anew. So undoing one of several leaves what the others alone would have given, and undoing
all, in any order, gives back the very bytes of the base.

The ledger is kept on the module that holds the parameter. So it is there in copies of an edited
model and after pickling, and it stays when the parameter object is replaced; whether the weight is
still what the ledger says is judged by its bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens_rome.edits.kinds import Edit, EditHealth
from transformer_lens_rome.model import adapter, refusals
from transformer_lens_rome.model.adapter import Weight
from transformer_lens_rome.model.calls import weights_call
from transformer_lens_rome.torch_states import torch_defaults


@dataclass(eq=False)
class _Ledger:
    """A weight's base bytes, the edits on it, and the hash of what they wrote together.

    Attributes:
        processing: The form of the model's weights, in which alone the base bytes make sense.
    """

    where: Weight
    base: Float[Tensor, "..."]
    base_hash: str
    active: list[Edit]
    written_hash: str
    processing: str


def _ledger(model: Any, where: Weight) -> _Ledger | None:
    if adapter.parameter(model, where) is None:
        return None
    holder = adapter.holder(model, where)
    return None if holder is None else vars(holder).get("_rome_ledgers", {}).get(where.name)


def _every_ledger(model: Any) -> list[_Ledger]:
    modules = (module for _, module in adapter.every_module(model))
    return [one for m in modules for one in vars(m).get("_rome_ledgers", {}).values()]


def _on(ledgers: Iterable[_Ledger]) -> tuple[Edit, ...]:
    """The edits on some weights, each of them once."""
    found = {id(edit): edit for ledger in ledgers for edit in ledger.active}
    return tuple(found.values())


def active_edits(model: Any, layer: int) -> tuple[Edit, ...]:
    """The edits that are on a layer's MLP now, in the order they were applied to each weight."""
    return _on(ledger for ledger in _every_ledger(model) if ledger.where.layer == layer)


def edited_weights(model: Any) -> list[Weight]:
    """The weights that have edits on them now."""
    return [ledger.where for ledger in _every_ledger(model)]


def check_unedited(model: Any) -> None:
    """Refuse a model that has edits on it.

    Raises:
        ValueError: there are some.
    """
    if edited_weights(model):
        raise ValueError("there are edits on the model; take them off with revert_all(model)")


def base_weight(model: Any, where: Weight) -> Float[Tensor, "..."] | None:
    """A weight as it would be without the edits that are on it now; None if there is none."""
    if ledger := _ledger(model, where):
        return ledger.base
    weight = adapter.parameter(model, where)
    return None if weight is None else weight.detach()


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
    ledgers: tuple[tuple[_Ledger, ...], ...] = field(repr=False, compare=False)

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
            for edit, ledgers in zip(self.edits, self.ledgers, strict=True)
            for ledger in ledgers
            for other in ledger.active
        )

    def revert(self, *, force: bool = False) -> None:
        """Take the edits off again; nothing happens to those that are off already.

        Raises:
            ValueError: something else changed the weight since. `force=True` writes base and
                remaining edits anyway, and that other change is lost; but not if the model's
                weights were processed since, as then the base bytes belong to another model.
        """
        with torch_defaults():
            self._revert(force)

    def _revert(self, force: bool) -> None:
        on = [
            (edit, [ledger for ledger in ledgers if any(edit is other for other in ledger.active)])
            for edit, ledgers in zip(self.edits, self.ledgers, strict=True)
        ]
        try:
            _remove(self.model, on, force)
        except Exception:
            if len(on) == 1:
                raise
            with ExitStack() as every:  # what one of them fails on does not keep the others
                for one in on:
                    every.callback(_remove, self.model, [one], force)

    @classmethod
    def of(cls, model: Any, parts: Sequence[AppliedEdit]) -> AppliedEdit:
        """Several as one."""
        edits = tuple(edit for part in parts for edit in part.edits)
        return cls(model, edits, tuple(ledgers for part in parts for ledgers in part.ledgers))

    def __iter__(self) -> Iterator[AppliedEdit]:
        for edit, ledgers in zip(self.edits, self.ledgers, strict=True):
            yield AppliedEdit(self.model, (edit,), (ledgers,))

    def __enter__(self) -> AppliedEdit:
        return self

    def __exit__(self, *_: object) -> None:
        self.revert()


@weights_call
def revert_all(model: Any, *, force: bool = False) -> None:
    """Take every edit off a model, also those whose `AppliedEdit` is lost.

    Raises:
        ValueError: something else changed an edited weight since, see `AppliedEdit.revert`; the
            edits on other weights are off.
    """
    every = _every_ledger(model)
    edits = _on(every)
    ledgers = tuple(
        tuple(one for one in every if any(edit is other for other in one.active)) for edit in edits
    )
    AppliedEdit(model, edits, ledgers).revert(force=force)


def _ledgers(model: Any, edit: Edit) -> Iterator[_Ledger]:
    """The ledgers of the weights that an edit changes, where there are any."""
    return filter(None, (_ledger(model, where) for where in edit.sizes()))


@weights_call
def apply_edit(model: Any, edit: Edit, *, force: bool = False) -> AppliedEdit:
    """Add an edit to every weight that it changes, in place.

    Raises:
        ValueError: the edit's shape does not fit; it is on the model already; or a matrix is
            neither the one that it was made on nor that one with known edits on top.
            `force=True` applies it to any weights of the right shapes.
    """
    if not isinstance(edit, Edit):
        raise ValueError(f"expected an edit, got a {type(edit).__name__}; pass edits one by one")
    sizes, made_on = edit.sizes(), edit.made_on()
    refusals.check_editable(model, sorted({where.layer for where in sizes}))
    ledgers = [_ready(model, where, size, edit) for where, size in sizes.items()]
    on = {other.digest for ledger in ledgers for other in ledger.active}
    if edit.digest in on and any(edit.change(where).any() for where in sizes):
        raise ValueError(
            "this edit is on the model already; apply edit.scale(alpha) for a stronger one"
        )
    for ledger in ledgers:
        made = made_on.get(ledger.where)
        if made not in (None, ledger.written_hash, ledger.base_hash) and not force:
            raise ValueError(
                f"{_named(ledger.where)} is not the weight that this edit was made on (sha256 "
                f"{ledger.written_hash[:12]}, the edit's {made[:12]}): another model, other edits "
                "on it, or processed weights; force=True applies it all the same"
            )
    _write_all(model, [(ledger, [*ledger.active, edit]) for ledger in ledgers])
    return AppliedEdit(model, (edit,), (tuple(ledgers),))


def _ready(model: Any, where: Weight, shape: tuple[int, ...], edit: Edit) -> _Ledger:
    """The ledger of a weight that an edit is about to change, a new one if there is none."""
    weight = adapter.parameter(model, where)
    if weight is None or shape != tuple(weight.shape):
        found = "none" if weight is None else tuple(weight.shape)
        raise ValueError(
            f"the edit changes a {where.name} of shape {shape}, but layer {where.layer} of this "
            f"model has {found}; it was made on {edit.provenance.get('model', 'another model')}"
        )
    refusals.check_weight(weight, where)
    if adapter.holder(model, where) is None:
        raise NotImplementedError(
            f"{_named(where)} is computed from other tensors at each pass "
            "(torch.nn.utils.prune, weight_norm), so a change of it would be lost; make it a plain "
            "parameter first, for instance with torch.nn.utils.prune.remove"
        )
    ledger, found = _ledger(model, where), adapter.weight_hash(weight)
    if ledger is None or found == ledger.base_hash != ledger.written_hash:  # others took edits off
        form = adapter.processing(model)
        return _Ledger(where, weight.detach().clone(), found, [], found, form)
    if found != ledger.written_hash:
        raise ValueError(_changed_by_others(where, "revert the edits on it with force=True"))
    if ledger.where != where:
        raise NotImplementedError(
            f"{_named(where)} and {_named(ledger.where)} are the same parameter, and there are "
            "edits of the latter on it; give both edits the same layer"
        )
    return ledger


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
    on = [
        ledger
        for ledger in _ledgers(model, edit)
        if any(edit.digest == other.digest for other in ledger.active)
    ]
    for ledger in on:
        if adapter.weight_hash(adapter.parameter(model, ledger.where)) != ledger.written_hash:
            raise ValueError(
                _changed_by_others(ledger.where, "revert the edits on it with force=True")
            )
    with ExitStack() as undo:
        for ledger in on:
            every = list(ledger.active)
            undo.callback(_write, model, ledger, every)
            _write(model, ledger, [one for one in every if one.digest != edit.digest])
        yield model


def _remove(model: Any, on: list[tuple[Edit, list[_Ledger]]], force: bool) -> None:
    """Take edits off all their weights, or off none of them."""
    gone: dict[int, tuple[_Ledger, set[int]]] = {}
    for edit, ledgers in on:
        for ledger in ledgers:
            gone.setdefault(id(ledger), (ledger, set()))[1].add(id(edit))
    left = []
    for ledger, off in gone.values():
        there = _removable(model, ledger, force)
        left.append((ledger, [e for e in ledger.active if there and id(e) not in off]))
    _write_all(model, left)


def _removable(model: Any, ledger: _Ledger, force: bool) -> bool:
    """Whether edits are still in a weight; refuses to write over what its ledger does not know."""
    if _ledger(model, ledger.where) is not ledger:
        raise ValueError(
            f"the parameter that held this edit of layer {ledger.where.layer} is not in the model "
            "any more (its module was replaced, or computes it at each pass now); reload the model"
        )
    found = adapter.weight_hash(adapter.parameter(model, ledger.where))
    if found in (ledger.written_hash, ledger.base_hash):  # base: a checkpoint was loaded over it
        return found == ledger.written_hash
    if adapter.processing(model) != ledger.processing:
        raise ValueError(
            "the model's weights were processed (enable_compatibility_mode, process_weights_) with "
            f"an edit of {_named(ledger.where)} on, which cannot be taken off any more; reload the "
            "model, and process it before it is edited"
        )
    if not force:
        raise ValueError(
            _changed_by_others(ledger.where, "revert(force=True) discards that change")
        )
    return True


def _write_all(model: Any, writes: list[tuple[_Ledger, list[Edit]]]) -> None:
    """Write base + edits into some weights, or on an error into none of them."""
    with ExitStack() as undo:
        for ledger, edits in writes:
            undo.callback(_write, model, ledger, list(ledger.active))
            _write(model, ledger, edits)
        undo.pop_all()


@torch.no_grad()
def _write(model: Any, ledger: _Ledger, edits: list[Edit]) -> None:
    """Write base + edits into a weight and keep or drop its ledger; on an error nothing changes."""
    weight, where = adapter.parameter(model, ledger.where), ledger.where
    holder = adapter.holder(model, where)
    assert holder is not None  # `_ready` and `_removable` have looked
    ledgers = vars(holder).setdefault("_rome_ledgers", {})
    new = _sum(ledger, weight, edits)
    if not torch.isfinite(new).all():
        raise ValueError(f"the edit would put NaN or infinity into {_named(where)}")
    old, state = weight.detach().clone(), (ledger.active, ledger.written_hash)
    try:
        ledger.active, ledger.written_hash = edits, adapter.weight_hash(new)
        ledgers[where.name] = ledger
        weight.copy_(new)
        if not torch.equal(adapter.parameter(model, where), new):
            raise NotImplementedError(
                f"{_named(where)} does not keep what is written into it, as it is computed from "
                "something else (torch.nn.utils.parametrize, prune); make it a plain parameter"
            )
    except BaseException:
        ledger.active, ledger.written_hash = state
        weight.copy_(old)
        raise
    finally:
        torch.clear_autocast_cache()  # an autocast that is on outside holds a copy of the weight
        if not ledger.active:
            ledgers.pop(where.name, None)


def _sum(ledger: _Ledger, weight: Tensor, edits: list[Edit]) -> Tensor:
    """Base + edits, added up in float32 or wider and rounded to the weight's dtype once."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    known = len(ledger.active)
    more = known and edits[:known] == ledger.active and weight.dtype == wide
    if more and adapter.weight_hash(weight) == ledger.written_hash:
        total, edits = weight.detach().clone(), edits[known:]  # the sum has come this far
    else:
        total = ledger.base.to(weight.device, wide, copy=True)
    for edit in edits:
        total += edit.change(ledger.where).to(total)
    return total.to(weight.dtype)


def _named(where: Weight) -> str:
    return f"{where.name} of layer {where.layer}"


def _changed_by_others(where: Weight, remedy: str) -> str:
    return (
        f"{_named(where)}, or its dtype, was changed by something else since it was edited; "
        f"{remedy}"
    )
