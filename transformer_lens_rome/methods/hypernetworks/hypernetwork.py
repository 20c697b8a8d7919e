"""Shared by KE and MEND: gradient factors, and forward passes with a change of several matrices.

The gradient of an edit's loss for a matrix with inputs x_t and outputs y_t = x_t W is

    dL/dW = sum over tokens t of x_tᵀ delta_t,    delta_t = dL/dy_t

(Mitchell et al. 2022, section 3.1). `gradient_factors` computes x and delta of every matrix. A
network turns them into factors of a change. `running_with` runs the model with that change,
differentiably and without writing to a parameter: y_t + x_t (left right) at the hook points.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from transformer_lens_rome.edits.kinds import Factors
from transformer_lens_rome.edits.ledger import base_weight
from transformer_lens_rome.model import adapter, refusals
from transformer_lens_rome.model.adapter import Hook, Point, Weight
from transformer_lens_rome.model.partial_forward import PartialForward
from transformer_lens_rome.model.protocol import Model

MatrixName = Literal["W_in", "W_gate", "W_out"]

Shapes = Mapping[Weight, tuple[int, int]]
"""`[d_in, d_out]` of each matrix."""


class Sample(NamedTuple):
    """A text to write into the model.

    Attributes:
        ids: Its token ids, including BOS if the model has one.
        n_labels: The number of last tokens that the model should predict.
    """

    ids: tuple[int, ...]
    n_labels: int

    @property
    def inputs(self) -> tuple[int, ...]:
        """Return all tokens but the last, which predicts nothing."""
        return self.ids[:-1]

    @property
    def at(self) -> Int[Tensor, "n_labels"]:
        """Return the positions that predict the labels."""
        return torch.arange(len(self.ids) - 1 - self.n_labels, len(self.ids) - 1)

    @property
    def labels(self) -> Int[Tensor, "n_labels"]:
        """Return the last `n_labels` tokens."""
        return torch.tensor(self.ids[-self.n_labels :])


class TokenFactors(NamedTuple):
    """The gradient of one matrix as factors with one row per token: xᵀ delta.

    Attributes:
        x: The inputs of the matrix, `[n, d_in]`.
        delta: The gradients of the loss for its outputs, `[n, d_out]`.
    """

    x: Float[Tensor, "n d_in"]
    delta: Float[Tensor, "n d_out"]


class Text(NamedTuple):
    """The text that an edit writes, prompt and target, for networks that read it.

    Attributes:
        ids: Its token ids.
        embeddings: The model's embeddings of these tokens, before any scaling.
    """

    ids: Int[Tensor, "pos"]
    embeddings: Float[Tensor, "pos d_model"]

    @classmethod
    def of(cls, model: Model, sample: Sample) -> Text:
        """Construct the text of a sample."""
        ids = torch.tensor(sample.ids)
        embeddings = adapter.embeddings(model, ids)
        return cls(ids.to(embeddings.device), embeddings)


class EditorNetwork(nn.Module):
    """A network that turns gradient factors into the factors of a change of each matrix.

    Attributes:
        shapes: `[d_in, d_out]` of each matrix that it edits.
    """

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.shapes = dict(shapes)


def matrix(model: Model, where: Weight) -> Float[Tensor, "d_in d_out"]:
    """Return the live weight of a matrix that the model has."""
    weight = adapter.parameter(model, where)
    assert weight is not None, f"no {where.name} at layer {where.layer}"
    return weight


def base_matrix(model: Model, where: Weight) -> Float[Tensor, "d_in d_out"]:
    """Return a matrix that the model has, without the edits on it."""
    weight = base_weight(model, where)
    assert weight is not None, f"no {where.name} at layer {where.layer}"
    return weight


def matrix_shapes(model: Model, matrices: Iterable[Weight]) -> dict[Weight, tuple[int, int]]:
    """Return `[d_in, d_out]` of each matrix."""
    weights = {where: matrix(model, where) for where in matrices}
    return {where: (weight.shape[0], weight.shape[1]) for where, weight in weights.items()}


def mlp_matrices(
    model: Model,
    layers: Sequence[int] | None = None,
    names: Sequence[MatrixName] | None = None,
) -> list[Weight]:
    """Return the MLPs' matrices in the given blocks: W_out, W_in and, if gated, W_gate.

    Without `layers`, the blocks are the last three.

    Raises:
        ValueError, NotImplementedError: a layer cannot be edited, or there is no such matrix.
    """
    if layers is None:
        layers = range(max(0, model.cfg.n_layers - 3), model.cfg.n_layers)
    refusals.check_editable(model, list(layers))
    every: Sequence[MatrixName] = names or ("W_out", "W_in", "W_gate")
    matrices = []
    for layer in layers:
        for name in every:
            weight = adapter.parameter(model, Weight(name, layer))
            if weight is not None and weight.ndim == 2:
                matrices.append(Weight(name, layer))
            elif names or name == "W_in":
                raise NotImplementedError(
                    f"{adapter.architecture(model)} has no matrix {name} at layer {layer}; "
                    "choose others with matrices=('W_out',)"
                )
    return matrices


def gradient_factors(
    model: Model, sample: Sample, matrices: Sequence[Weight]
) -> tuple[float, dict[Weight, TokenFactors]]:
    """Compute the loss of a sample and its gradient for each matrix.

    The loss is the mean NLL of the sample's labels, in nats. The factors omit tokens that do not
    affect the loss and tokens whose input is all zeros.
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
        with adapter.hooks(model, _input_output_hooks(model, matrices, inputs, probe)):
            loss = edit_loss(forward, 0, sample)
        deltas = torch.autograd.grad(loss, [zeros[where] for where in matrices])
    factors = {}
    for where, gradient in zip(matrices, deltas, strict=True):
        tensors = (inputs[where].detach(), outputs[where], gradient)
        x, y, delta = (tensor.float().flatten(0, -2) for tensor in tensors)
        _check_product(model, where, x, y)
        used = x.any(-1) & delta.any(-1)
        factors[where] = TokenFactors(x[used], delta[used])
    return loss.item(), factors


def edit_loss(forward: PartialForward, row: int, sample: Sample) -> Float[Tensor, ""]:
    """Compute the mean NLL, in nats, of a sample's labels; the sample is one row of the pass."""
    logits = forward.logits([], torch.full_like(sample.at, row), sample.at).float()
    return cross_entropy(logits, sample.labels.to(logits.device))


@contextmanager
def running_with(model: Model, changes: Mapping[Weight, Factors]) -> Iterator[None]:
    """Inside this context, passes run as if `left @ right` were added to each matrix."""
    inputs: dict[Weight, Tensor] = {}

    def add(where: Weight, output: Tensor) -> Tensor:
        left, right = (factor.to(output.device) for factor in changes[where])
        return output + (inputs[where].float() @ left @ right).to(output)

    with adapter.hooks(model, _input_output_hooks(model, changes, inputs, add)):
        yield


def _input_output_hooks(
    model: Model,
    matrices: Iterable[Weight],
    inputs: dict[Weight, Tensor],
    change: Callable[[Weight, Tensor], Tensor],
) -> list[tuple[Point, Hook]]:
    """Construct hooks that store the input of each matrix in `inputs` and change its output."""

    def keep(where: Weight) -> Hook:
        def hook(tensor: Tensor) -> None:
            inputs[where] = tensor

        return hook

    hooks: list[tuple[Point, Hook]] = []
    for where in matrices:
        source, target = adapter.ends(model, where)
        hooks += [(source, keep(where)), (target, partial(change, where))]
    return hooks


def _check_product(
    model: Model, where: Weight, x: Float[Tensor, "n d_in"], y: Float[Tensor, "n d_out"]
) -> None:
    """Raise NotImplementedError if the output of a matrix is not x @ W plus a bias."""
    weight = matrix(model, where).detach()
    bias = y - x @ weight.float()
    error = (bias - bias.mean(0)).norm() / y.norm()
    if not error < max(1e-3, 16 * torch.finfo(weight.dtype).eps):
        raise NotImplementedError(
            f"{adapter.architecture(model)}: the output of {where.name} of layer {where.layer} is "
            f"not its input times the matrix (relative error {error:.1e}), so this method cannot "
            "edit it"
        )


class Outcome(NamedTuple):
    """The effect of a change.

    Attributes:
        edit: Mean NLL of the sample's labels, in nats.
        locality: Mean KL(before || after) over all positions of other texts, in nats.
    """

    edit: Float[Tensor, ""]
    locality: Float[Tensor, ""]


def outcome(
    model: Model,
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
