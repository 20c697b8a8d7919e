"""What KE and MEND share: from a gradient, by a trained network, to a change of several matrices.

The gradient of an edit's loss for a matrix with inputs x_t and outputs y_t = x_t W is

    dL/dW = sum over tokens t of x_tᵀ delta_t,    delta_t = dL/dy_t

(Mitchell et al. 2022, section 3.1). `gradient_factors` gives x and delta of every matrix; a network
turns them into factors of a change; `running_with` runs the model with that change, differentiably
and without a write to any parameter: y_t + x_t (left right) at the hook points.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from transformer_lens_rome.edits.kinds import Factors
from transformer_lens_rome.model import adapter, refusals
from transformer_lens_rome.model.adapter import Hook, Point, Weight
from transformer_lens_rome.model.partial_forward import PartialForward


class Sample(NamedTuple):
    """A text to write into the model.

    Attributes:
        ids: Its token ids, BOS included where the model has one.
        n_labels: How many of its last tokens the model should say.
    """

    ids: tuple[int, ...]
    n_labels: int

    @property
    def inputs(self) -> tuple[int, ...]:
        """All tokens but the last, from which nothing is predicted."""
        return self.ids[:-1]

    @property
    def at(self) -> Int[Tensor, "n_labels"]:
        """The positions from which the labels are predicted."""
        return torch.arange(len(self.ids) - 1 - self.n_labels, len(self.ids) - 1)

    @property
    def labels(self) -> Int[Tensor, "n_labels"]:
        """The last tokens."""
        return torch.tensor(self.ids[-self.n_labels :])


class TokenFactors(NamedTuple):
    """The gradient of one matrix, token by token: xᵀ delta.

    Attributes:
        x: The matrix's inputs, `[n, d_in]`.
        delta: The loss's gradients for its outputs, `[n, d_out]`.
    """

    x: Float[Tensor, "n d_in"]
    delta: Float[Tensor, "n d_out"]


class Text(NamedTuple):
    """What an edit writes, prompt and target, for networks that read it.

    Attributes:
        ids: Its token ids.
        embeddings: The model's embeddings of them, before any scaling.
    """

    ids: Int[Tensor, "pos"]
    embeddings: Float[Tensor, "pos d_model"]

    @classmethod
    def of(cls, model: Any, sample: Sample) -> Text:
        """A sample's text."""
        ids = torch.tensor(sample.ids)
        embeddings = adapter.embeddings(model, ids)
        return cls(ids.to(embeddings.device), embeddings)


def mlp_matrices(
    model: Any, layers: Sequence[int] | None = None, names: Sequence[str] | None = None
) -> list[Weight]:
    """The MLPs' matrices of the last three blocks, or of others: W_out, W_in, W_gate if gated.

    Raises:
        ValueError, NotImplementedError: a layer that cannot be edited, or no such matrix.
    """
    if layers is None:
        layers = range(max(0, model.cfg.n_layers - 3), model.cfg.n_layers)
    refusals.check_editable(model, list(layers))
    found = []
    for layer in layers:
        for name in names or ("W_out", "W_in", "W_gate"):
            weight = adapter.parameter(model, Weight(name, layer))
            if weight is not None and weight.ndim == 2:
                found.append(Weight(name, layer))
            elif names or name == "W_in":
                raise NotImplementedError(
                    f"{adapter.architecture(model)} has no matrix {name} at layer {layer}; "
                    "choose others with matrices=('W_out',)"
                )
    return found


def gradient_factors(
    model: Any, sample: Sample, matrices: Sequence[Weight]
) -> tuple[float, dict[Weight, TokenFactors]]:
    """The loss of a sample, the mean NLL of its labels in nats, and its gradient for each matrix.

    Tokens on which the loss does not depend, or whose input is all zeros, are left out.
    """
    first = min(where.layer for where in matrices)
    forward = PartialForward(model, first, [sample.inputs], [0])
    inputs: dict[Weight, Tensor] = {}
    outputs: dict[Weight, Tensor] = {}
    zeros: dict[Weight, Tensor] = {}

    def probe(where: Weight, output: Tensor) -> Tensor:
        outputs[where] = output.detach()
        zeros[where] = torch.zeros_like(output, requires_grad=True)
        return output + zeros[where]

    with adapter.gradients_for(model):
        with adapter.hooks(model, _at_ends(model, matrices, inputs, probe)):
            loss = edit_loss(forward, 0, sample)
        deltas = torch.autograd.grad(loss, [zeros[where] for where in matrices])
    found = {}
    for where, delta in zip(matrices, deltas, strict=True):
        every = (inputs[where].detach(), outputs[where], delta)
        x, y, delta = (tensor.float().flatten(0, -2) for tensor in every)
        _check_product(model, where, x, y)
        used = x.any(-1) & delta.any(-1)
        found[where] = TokenFactors(x[used], delta[used])
    return loss.item(), found


def edit_loss(forward: PartialForward, row: int, sample: Sample) -> Float[Tensor, ""]:
    """Mean NLL of a sample's labels, in nats, where it is a row of a forward pass."""
    logits = forward.logits([], torch.full_like(sample.at, row), sample.at).float()
    return cross_entropy(logits, sample.labels.to(logits.device))


@contextmanager
def running_with(model: Any, changes: Mapping[Weight, Factors]) -> Iterator[None]:
    """While this is open, passes run as if `left @ right` were added to each matrix."""
    inputs: dict[Weight, Tensor] = {}

    def add(where: Weight, output: Tensor) -> Tensor:
        left, right = (factor.to(output.device) for factor in changes[where])
        return output + (inputs[where].float() @ left @ right).to(output)

    with adapter.hooks(model, _at_ends(model, changes, inputs, add)):
        yield


def _at_ends(
    model: Any, matrices: Any, inputs: dict[Weight, Tensor], change: Any
) -> list[tuple[Point, Hook]]:
    """Hooks that keep each matrix's input, and change its output."""

    def keep(where: Weight) -> Hook:
        def hook(tensor: Tensor) -> None:
            inputs[where] = tensor

        return hook

    hooks: list[tuple[Point, Hook]] = []
    for where in matrices:
        source, target = adapter.ends(model, where)
        hooks += [(source, keep(where)), (target, lambda y, where=where: change(where, y))]
    return hooks


def _check_product(
    model: Any, where: Weight, x: Float[Tensor, "n d_in"], y: Float[Tensor, "n d_out"]
) -> None:
    """Refuse a model in which a matrix's output is not x @ W plus a bias."""
    weight = adapter.parameter(model, where).detach()
    bias = y - x @ weight.float()
    error = (bias - bias.mean(0)).norm() / y.norm()
    if not error < max(1e-3, 16 * torch.finfo(weight.dtype).eps):
        raise NotImplementedError(
            f"{adapter.architecture(model)}: what {where.name} of layer {where.layer} gives is not "
            f"its input times it (relative error {error:.1e}), so it cannot be edited this way"
        )


class Outcome(NamedTuple):
    """What a change does.

    Attributes:
        edit: Mean NLL of the sample's labels, in nats.
        locality: Mean KL(before || after) over all positions of other texts, in nats.
    """

    edit: Float[Tensor, ""]
    locality: Float[Tensor, ""]


def outcome(
    model: Any,
    changes: Mapping[Weight, Factors],
    sample: Sample,
    others: Sequence[Sequence[int]],
) -> Outcome:
    """Score a change on a sample and on other texts, differentiably (Mitchell et al., Eq. 4)."""
    first = min(where.layer for where in changes)
    rows = [sample.inputs, *others]
    forward = PartialForward(model, first, rows, [0] * len(rows))
    where = torch.tensor([i for i, ids in enumerate(others, start=1) for _ in ids])
    at = torch.cat([torch.arange(len(ids)) for ids in others])
    with torch.no_grad():
        before = forward.logits([], where, at).float().log_softmax(-1)
    scored = torch.cat([torch.zeros_like(sample.at), where]), torch.cat([sample.at, at])
    with adapter.gradients_for(model), running_with(model, changes):
        logits = forward.logits([], *scored).float()
    edited, after = logits.split([sample.n_labels, len(at)])
    kl = (before.exp() * (before - after.log_softmax(-1))).sum(-1)
    return Outcome(cross_entropy(edited, sample.labels.to(edited.device)), kl.mean())
