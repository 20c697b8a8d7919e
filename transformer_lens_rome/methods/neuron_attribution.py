"""Integrated gradients of a probability, for every MLP neuron at a prompt's last token.

    Attr = a · integral over alpha from 0 to 1 of dP(alpha a)/dw  ~  a / S · sum of dP(alpha_k a)/dw

a is the clean activation of one layer at that token, P(w) the mean probability of some tokens with
that activation set to w, and S the number of alphas. Only the last token runs again, from that
layer on. Most of the time goes into the unembedding, forward and backward, at each point of each
path.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from transformer_lens_rome.model import adapter
from transformer_lens_rome.model.adapter import Point
from transformer_lens_rome.model.changes import Change, replacement
from transformer_lens_rome.model.keys import check_value
from transformer_lens_rome.model.partial_forward import PartialForward
from transformer_lens_rome.model.protocol import Model


def attribution(
    model: Model,
    ids: Sequence[int],
    labels: Sequence[int],
    name: Literal["pre", "key"],
    alphas: Float[Tensor, "point"],
    *,
    batch_size: int = 60,
    progress: bool = False,
) -> Float[Tensor, "layer d_mlp"]:
    """Compute Attr of every neuron, for the mean probability of some tokens after a prompt.

    Args:
        model: A HookedTransformer or TransformerBridge.
        ids: The prompt's tokens.
        labels: The tokens whose mean probability is attributed.
        name: The activation to scale.
        alphas: The points on the path from zero to the clean activation.
        batch_size: Number of points, of one or several layers, in one pass.
        progress: Show a progress bar.

    Raises:
        ValueError: the attributions are not finite.
        NotImplementedError: an MLP's value is not key @ W_out + b_out.
    """
    rows, together = min(batch_size, len(alphas)), max(1, batch_size // len(alphas))
    forward = PartialForward(model, 0, [ids] * rows, [len(ids) - 1] * rows)
    paths = [(Point(name, i), a) for i, a in enumerate(_clean_activations(forward, name))]
    groups = [paths[i : i + together] for i in range(0, len(paths), together)]
    with adapter.gradients_for(model):
        gradients = [
            gradient
            for group in tqdm(groups, desc="kn", disable=not progress)
            for gradient in _mean_gradients(forward, group, alphas, labels)
        ]
    attributions = torch.stack(
        [(a * gradient).cpu() for (_, a), gradient in zip(paths, gradients, strict=True)]
    )
    if not torch.isfinite(attributions).all():
        raise ValueError("the attributions are not finite; load the model in float32 or bfloat16")
    return attributions


def _clean_activations(
    forward: PartialForward, name: Literal["pre", "key"]
) -> list[Float[Tensor, "d_mlp"]]:
    """Read the activation at the last token in every layer, in float32."""
    layers = range(forward.model.cfg.n_layers)
    points = [
        point
        for layer in layers
        for point in (Point("key", layer), Point("value", layer), Point(name, layer))
    ]
    activations = [activation[:1] for activation in forward.read(points)]
    for layer in layers:
        check_value(forward.model, layer, *activations[3 * layer : 3 * layer + 2])
    return [activation[0].float() for activation in activations[2::3]]


def _mean_gradients(
    forward: PartialForward,
    paths: Sequence[tuple[Point, Float[Tensor, "d_mlp"]]],
    alphas: Float[Tensor, "point"],
    labels: Sequence[int],
) -> list[Float[Tensor, "d_mlp"]]:
    """Compute the mean of dP/dw over the points of each path.

    In one pass, each row is a point and each variant is a path.
    """
    sums = [torch.zeros_like(a) for _, a in paths]
    for part in alphas.split(len(forward.starts)):
        rows, last = torch.arange(len(part)), forward.starts[: len(part)]
        w = [(part.to(a)[:, None] * a).requires_grad_() for _, a in paths]
        changes = [
            [Change(point, rows, last, replacement(new))]
            for (point, _), new in zip(paths, w, strict=True)
        ]
        logits = forward.variants(changes, rows, last).float()
        P = logits.softmax(-1)[..., list(labels)].mean(-1)
        for total, gradient in zip(sums, torch.autograd.grad(P.sum(), w), strict=True):
            total += gradient.sum(0)
    return [total / len(alphas) for total in sums]
