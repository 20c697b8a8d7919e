"""The ledger of an edited weight: a copy of its base bytes, and the edits written on top of it.

A weight always equals its base plus its active edits, added in the order they were applied. The
first edit of a weight copies its bytes into a ledger. Each apply or undo writes base and active
edits anew. So undoing one of several edits gives what the others alone would give, and undoing all
of them, in any order, restores the bytes of the base.

The ledger is stored on the module that holds the parameter. It is therefore copied and pickled with
the model, and it survives when the parameter object is replaced. The bytes of the weight decide
whether the ledger still describes it.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens_rome.edits.kinds import Edit
from transformer_lens_rome.model import adapter, refusals
from transformer_lens_rome.model.adapter import Weight
from transformer_lens_rome.model.protocol import Model


@dataclass(eq=False)
class Ledger:
    """The base bytes of a weight, its active edits, and the hash of their sum.

    Attributes:
        where: The weight.
        base: A copy of the weight before its first edit.
        base_hash: sha256 of the base.
        active: The edits on the weight, in the order they were applied.
        written_hash: sha256 of base and active edits, as last written.
        processing: The form of the model's weights. The base bytes are valid only in this form.
    """

    where: Weight
    base: Float[Tensor, "..."]
    base_hash: str
    active: list[Edit]
    written_hash: str
    processing: str


def live_weight(model: Model, where: Weight) -> Tensor:
    """Return the live parameter of a weight that the model is known to have."""
    weight = adapter.parameter(model, where)
    assert weight is not None, f"the model has no {where.name} at layer {where.layer}"
    return weight


def ledger_of(model: Model, where: Weight) -> Ledger | None:
    """Return the ledger of a weight, or None if the weight has none."""
    if adapter.parameter(model, where) is None:
        return None
    holder = adapter.holder(model, where)
    return None if holder is None else vars(holder).get("_rome_ledgers", {}).get(where.name)


def every_ledger(model: Model) -> list[Ledger]:
    """Return the ledgers of all edited weights of a model."""
    modules = (module for _, module in adapter.every_module(model))
    return [ledger for m in modules for ledger in vars(m).get("_rome_ledgers", {}).values()]


def ledgers_for(model: Model, edit: Edit, *, force: bool = False) -> list[Ledger]:
    """Return a ledger for each weight that an edit changes, after a check that the edit fits.

    New ledgers are not stored, so the model stays as it is.

    Raises:
        ValueError: see `ledger.apply_edit`; an edit that is on the model fits.
    """
    if not isinstance(edit, Edit):
        raise ValueError(f"expected an edit, got a {type(edit).__name__}; pass edits one by one")
    sizes, made_on = edit.sizes(), edit.made_on()
    refusals.check_editable(model, sorted({where.layer for where in sizes}))
    ledgers = [ledger_to_edit(model, where, size, edit) for where, size in sizes.items()]
    if force or is_on(edit, ledgers):
        return ledgers
    for ledger in ledgers:
        made = made_on.get(ledger.where)
        if made not in (None, ledger.written_hash, ledger.base_hash):
            raise ValueError(
                f"{named(ledger.where)} is not the weight that this edit was made on (sha256 "
                f"{ledger.written_hash[:12]}, the edit's {made[:12]}): another model, other edits "
                "on it, or processed weights; pass force=True to apply it anyway"
            )
    return ledgers


def is_on(edit: Edit, ledgers: Iterable[Ledger]) -> bool:
    """Return whether an edit is active on any of the weights."""
    return edit.digest in {other.digest for ledger in ledgers for other in ledger.active}


def ledger_to_edit(model: Model, where: Weight, shape: tuple[int, ...], edit: Edit) -> Ledger:
    """Return the ledger of a weight that an edit will change, or a new one if there is none."""
    weight = adapter.parameter(model, where)
    if weight is None or shape != tuple(weight.shape):
        raise _misfit(where, shape, weight, edit)
    refusals.check_weight(weight, where)
    if adapter.holder(model, where) is None:
        raise NotImplementedError(
            f"{named(where)} is computed from other tensors at each pass "
            "(torch.nn.utils.prune, weight_norm), so a change of it would be lost; make it a plain "
            "parameter first, for instance with torch.nn.utils.prune.remove"
        )
    ledger, digest = ledger_of(model, where), adapter.weight_hash(weight)
    # the second case: other code, for instance loading a checkpoint, removed the edits
    if ledger is None or digest == ledger.base_hash != ledger.written_hash:
        form = adapter.processing(model)
        return Ledger(where, weight.detach().clone(), digest, [], digest, form)
    if digest != ledger.written_hash:
        raise changed_by_others(where, "revert the edits on it with force=True")
    if ledger.where != where:
        raise NotImplementedError(
            f"{named(where)} and {named(ledger.where)} are the same parameter, and there are "
            "edits of the latter on it; give both edits the same layer"
        )
    return ledger


def has_its_edits(model: Model, ledger: Ledger, force: bool) -> bool:
    """Return whether the weight still contains the edits of its ledger.

    Raises:
        ValueError: removing the edits would overwrite a change that the ledger does not record.
    """
    if ledger_of(model, ledger.where) is not ledger:
        raise ValueError(
            f"the parameter that held this edit of layer {ledger.where.layer} is not in the model "
            "any more (its module was replaced, or computes it at each pass now); reload the model"
        )
    digest = adapter.weight_hash(live_weight(model, ledger.where))
    if digest in (ledger.written_hash, ledger.base_hash):  # base: a checkpoint was loaded
        return digest == ledger.written_hash
    if adapter.processing(model) != ledger.processing:
        raise ValueError(
            "the model's weights were processed (enable_compatibility_mode, process_weights_) with "
            f"an edit of {named(ledger.where)} on, which cannot be taken off any more; reload the "
            "model, and process it before it is edited"
        )
    if not force:
        raise changed_by_others(ledger.where, "revert(force=True) discards that change")
    return True


def write_all(model: Model, writes: list[tuple[Ledger, list[Edit]]]) -> None:
    """Write base + edits into all of the weights, or on an error into none of them."""
    with ExitStack() as undo:
        for ledger, edits in writes:
            undo.callback(write, model, ledger, list(ledger.active))
            write(model, ledger, edits)
        undo.pop_all()


@torch.no_grad()
def write(model: Model, ledger: Ledger, edits: list[Edit]) -> None:
    """Write base + edits into a weight and store or drop its ledger; an error changes nothing."""
    weight, where = live_weight(model, ledger.where), ledger.where
    holder = adapter.holder(model, where)
    assert holder is not None  # checked by `ledger_to_edit` and `has_its_edits`
    ledgers = vars(holder).setdefault("_rome_ledgers", {})
    new = _finite(where, _sum(ledger, weight, edits))
    old, state = weight.detach().clone(), (ledger.active, ledger.written_hash)
    try:
        ledger.active, ledger.written_hash = edits, adapter.weight_hash(new)
        ledgers[where.name] = ledger
        weight.copy_(new)
        if not torch.equal(live_weight(model, where), new):
            raise NotImplementedError(
                f"{named(where)} does not keep what is written into it, as it is computed from "
                "something else (torch.nn.utils.parametrize, prune); make it a plain parameter"
            )
    except BaseException:
        ledger.active, ledger.written_hash = state
        weight.copy_(old)
        raise
    finally:
        torch.clear_autocast_cache()  # an outer autocast may cache a copy of the weight
        if not ledger.active:
            ledgers.pop(where.name, None)


def _sum(ledger: Ledger, weight: Tensor, edits: list[Edit]) -> Tensor:
    """Return base + edits, summed in float32 or wider and rounded to the weight's dtype once."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    n_active = len(ledger.active)
    more = n_active and edits[:n_active] == ledger.active and weight.dtype == wide
    if more and adapter.weight_hash(weight) == ledger.written_hash:
        total, edits = weight.detach().clone(), edits[n_active:]  # add only the new edits
    else:
        total = ledger.base.to(weight.device, wide, copy=True)
    for edit in edits:
        total += edit.change(ledger.where).to(total)
    return total.to(weight.dtype)


def written_with(model: Model, where: Weight, edit: Edit) -> Tensor:
    """Return the weight that applying an edit would write; nothing is written.

    Raises:
        ValueError: The edit does not fit, or would put NaN or infinity into the weight.
    """
    weight, delta = adapter.parameter(model, where), edit.change(where)
    if weight is None or delta.shape != weight.shape:
        raise _misfit(where, tuple(delta.shape), weight, edit)
    ledger = ledger_of(model, where) or Ledger(where, weight.detach(), "", [], "", "")
    return _finite(where, _sum(ledger, weight, [*ledger.active, edit]))


def _finite(where: Weight, new: Tensor) -> Tensor:
    """Return a new weight; raise ValueError if it contains NaN or infinity."""
    if not torch.isfinite(new).all():
        raise ValueError(f"the edit would put NaN or infinity into {named(where)}")
    return new


def _misfit(where: Weight, shape: tuple[int, ...], weight: Tensor | None, edit: Edit) -> ValueError:
    """Return the error for an edit whose shape is not that of the weight."""
    has = "none" if weight is None else tuple(weight.shape)
    return ValueError(
        f"the edit changes a {where.name} of shape {shape}, but layer {where.layer} of this "
        f"model has {has}; it was made on {edit.provenance.get('model', 'another model')}"
    )


def named(where: Weight) -> str:
    """Return the name of a weight for messages."""
    return f"{where.name} of layer {where.layer}"


def changed_by_others(where: Weight, remedy: str) -> ValueError:
    """Return the error for a weight that changed after it was edited."""
    return ValueError(
        f"{named(where)}, or its dtype, was changed by something else since it was edited; {remedy}"
    )
