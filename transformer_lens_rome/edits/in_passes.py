"""Score edited models without writing a weight: each edit acts on its own texts of a pass.

An edit adds x @ delta W to the output of a matrix W with input x, so one pass can score many edited
models: the texts of each get the delta W of their edit, and no other text does:

    texts       a  a  a | b  b | c  c  c
    output  +=  x @ dW  | x @  | x @ dW
                of edit | dW of| of edit
                a       | b    | c

delta W is what `apply_edit` would add: it is rounded as the written weight is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from transformer_lens_rome.edits.base_bytes import live_weight, named, written_with
from transformer_lens_rome.edits.kinds import Edit, EditRequest, FactoredEdit
from transformer_lens_rome.edits.ledger import applied
from transformer_lens_rome.model import adapter, passes
from transformer_lens_rome.model.adapter import Hook, Point, Weight
from transformer_lens_rome.model.calls import model_call
from transformer_lens_rome.model.protocol import Model
from transformer_lens_rome.model.self_check import difference, has_users_hooks, holds
from transformer_lens_rome.prompts.encoder import Row
from transformer_lens_rome.prompts.scores import Context, TargetScore, score_rows

Additions = Mapping[Weight, Float[Tensor, "..."]]
"""The change of each weight that writing an edit would make, in float32 or wider."""


@torch.no_grad()
def additions(model: Model, edit: Edit) -> Additions:
    """Return the change of every weight that writing an edit would make.

    Raises:
        ValueError: The edit does not fit, or would put NaN or infinity into a weight.
    """
    changes = {}
    for where in edit.sizes():
        new, old = written_with(model, where, edit), live_weight(model, where).detach()
        wide = torch.promote_types(old.dtype, torch.float32)
        changes[where] = new.to(wide) - old.to(wide)
    return changes


@contextmanager
def acting(model: Model, texts: Sequence[Additions]) -> Iterator[None]:
    """Within this context, text i of every pass runs as if its edit were on the model.

    Args:
        model: The model; its weights stay as they are.
        texts: For each text of the batch, the additions of its edit; empty for no edit.
    """
    of: dict[Weight, dict[int, tuple[Tensor, list[int]]]] = {}  # texts of one edit together
    for i, added in enumerate(texts):
        for where, delta in added.items():
            of.setdefault(where, {}).setdefault(id(delta), (delta, []))[1].append(i)
    hooks: list[tuple[Point, Hook]] = []
    for where, groups in of.items():
        hooks += _matrix_hooks(model, where, list(groups.values()))
    with adapter.hooks(model, hooks):
        yield


def _matrix_hooks(
    model: Model, where: Weight, groups: Sequence[tuple[Tensor, list[int]]]
) -> list[tuple[Point, Hook]]:
    """Return the hooks that remember a matrix's input, and add to its output."""
    if where.name == "b_out":
        return [(Point("value", where.layer), _adder(groups, lambda delta, rows: delta))]
    inputs: list[Tensor] = []

    def remember(activation: Tensor) -> None:
        inputs[:] = [activation]

    def product(delta: Tensor, rows: list[int]) -> Tensor:
        return inputs[0][rows].to(delta) @ delta

    source, output = adapter.ends(model, where)
    return [(source, remember), (output, _adder(groups, product))]


def _adder(
    groups: Sequence[tuple[Tensor, list[int]]], product: Callable[[Tensor, list[int]], Tensor]
) -> Hook:
    """Return a hook that adds each group's product to the activations of its texts."""

    def add(activation: Tensor) -> Tensor:
        activation = activation.clone()
        for delta, rows in groups:
            more = product(delta, rows)
            activation[rows] = (activation[rows].to(more) + more).to(activation)
        return activation

    return add


@model_call
def score_edited(
    model: Model, rows: Sequence[Row], edits: Sequence[Edit], owners: Sequence[int]
) -> list[TargetScore]:
    """Score the target of every row as with one of the edits on the model.

    Args:
        model: The model.
        rows: The rows.
        edits: Independent edits. They act in shared passes if there are several and the model
            allows it; otherwise each is written and undone.
        owners: For each row, the index of its edit.
    """
    if can_share_passes(model, edits):
        return score_rows(model, rows, owners=owners, context=acting_each(model, edits))
    scores: dict[int, TargetScore] = {}
    for i, edit in enumerate(edits):
        mine = [j for j, owner in enumerate(owners) if owner == i]
        with applied(model, edit):
            scores.update(zip(mine, score_rows(model, [rows[j] for j in mine]), strict=True))
    return [scores[j] for j in range(len(rows))]


def can_share_passes(model: Model, edits: Sequence[Edit]) -> bool:
    """Return whether there are several edits, and each can act in a pass; see `can_act`."""
    return len(edits) > 1 and all(can_act(model, where) for edit in edits for where in edit.sizes())


def acting_each(model: Model, edits: Sequence[Edit]) -> Context:
    """Return a function from the owners of a pass's texts to the context in which edits act."""
    each = {id(edit): edit for edit in edits}  # one edit may have several owners
    added = {known: additions(model, edit) for known, edit in each.items()}
    return lambda owners: acting(model, [added[id(edits[owner])] for owner in owners])


def can_act(model: Model, where: Weight) -> bool:
    """Return whether edits of a weight give in a pass what they give when written.

    This is tried once per model and weight, with a random edit on a few tokens. On a model with the
    user's hooks, which may depend on the texts of a batch, edits are written.
    """
    if has_users_hooks(model):
        return False
    matrix = where if where.name != "b_out" else Weight("W_out", where.layer)  # the same output
    instead = f"edits of {named(matrix)} are written one by one"
    return holds(model, instead, lambda: _error_of_acting(model, matrix))


def _error_of_acting(model: Model, where: Weight) -> float:
    """Return how much logits differ between acting and written edits, on two of three texts."""
    trial = _trial(model, where)
    tokens = (7 * torch.arange(27).unflatten(0, (3, 9)) + 1) % model.cfg.d_vocab
    rows, last = torch.arange(3), torch.full((3,), 8)
    before = passes.logits_at(model, tokens, rows, last)
    with applied(model, trial, force=True):
        after = passes.logits_at(model, tokens, rows, last)
    added = additions(model, trial)
    with acting(model, [added, {}, added]):
        acted = passes.logits_at(model, tokens, rows, last)
    return difference(acted, torch.stack([after[0], before[1], after[2]]))


def _trial(model: Model, where: Weight) -> FactoredEdit:
    """Return a random edit of rank one of a matrix, half as large as the matrix."""
    matrix, generator = live_weight(model, where).detach(), torch.Generator().manual_seed(0)
    left, right = (normalize(torch.randn(n, generator=generator), dim=0) for n in matrix.shape)
    factors = {where: (left[:, None], matrix.float().norm().cpu() / 2 * right[None])}
    return FactoredEdit.of(factors, {where: ""}, request=EditRequest("{} is", "it", "so"))
