"""Integrated gradients of a probability, for every MLP neuron at a prompt's last token.

    Attr = a · integral over alpha from 0 to 1 of dP(alpha a)/dw  ~  a / S · sum of dP(alpha_k a)/dw

a is one layer's clean activation there, P(w) the mean probability of some tokens with that
activation set to w, and S the number of alphas. Only the last token is run again, from that layer
on. What takes the time is the unembedding, forward and backward, at each point of each path.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from transformer_lens_rome.model import adapter
from transformer_lens_rome.model.adapter import Point
from transformer_lens_rome.model.changes import Change
from transformer_lens_rome.model.keys import check_value
from transformer_lens_rome.model.partial_forward import PartialForward


def attribution(
    model: Any,
    ids: Sequence[int],
    labels: Sequence[int],
    name: Literal["pre", "key"],
    alphas: Float[Tensor, "point"],
    *,
    batch_size: int = 60,
    progress: bool = False,
) -> Float[Tensor, "layer d_mlp"]:
    """Attr of every neuron, for the mean probability of some tokens after a prompt.

    Args:
        model: A HookedTransformer or TransformerBridge.
        ids: The prompt's tokens.
        labels: The tokens that may follow it.
        name: Which activation.
        alphas: The points on the path from nothing to the clean activation.
        batch_size: How many points, of one or several layers, are run at once.
        progress: Show a progress bar.

    Raises:
        ValueError: numbers that are not finite.
        NotImplementedError: an MLP whose value is not key @ W_out + b_out.
    """
    rows, together = min(batch_size, len(alphas)), max(1, batch_size // len(alphas))
    forward = PartialForward(model, 0, [ids] * rows, [len(ids) - 1] * rows)
    paths = [(Point(name, i), a) for i, a in enumerate(_clean(forward, name))]
    groups = [paths[i : i + together] for i in range(0, len(paths), together)]
    with adapter.gradients_for(model):
        found = [
            gradient
            for group in tqdm(groups, desc="kn", disable=not progress)
            for gradient in _mean_gradients(forward, group, alphas, labels)
        ]
    every = torch.stack([(a * mean).cpu() for (_, a), mean in zip(paths, found, strict=True)])
    if not torch.isfinite(every).all():
        raise ValueError("the attributions are not finite; load the model in float32 or bfloat16")
    return every


def _clean(forward: PartialForward, name: str) -> list[Float[Tensor, "d_mlp"]]:
    """The activation at the last token in every layer, in float32."""
    layers = range(forward.model.cfg.n_layers)
    points = [Point(kind, layer) for layer in layers for kind in ("key", "value", name)]
    found = [activation[:1] for activation in forward.read(points)]
    for layer in layers:
        check_value(forward.model, layer, *found[3 * layer : 3 * layer + 2])
    return [activation[0].float() for activation in found[2::3]]


def _mean_gradients(
    forward: PartialForward,
    paths: Sequence[tuple[Point, Float[Tensor, "d_mlp"]]],
    alphas: Float[Tensor, "point"],
    labels: Sequence[int],
) -> list[Float[Tensor, "d_mlp"]]:
    """The mean of dP/dw over the points of each path.

    The rows of a pass are points, as many as there are rows; its variants are paths.
    """
    sums = [torch.zeros_like(a) for _, a in paths]
    for part in alphas.split(len(forward.starts)):
        rows, last = torch.arange(len(part)), forward.starts[: len(part)]
        w = [(part.to(a)[:, None] * a).requires_grad_() for _, a in paths]
        changes = [
            [Change(point, rows, last, partial(_instead, new))]
            for (point, _), new in zip(paths, w, strict=True)
        ]
        logits = forward.variants(changes, rows, last).float()
        P = logits.softmax(-1)[..., list(labels)].mean(-1)
        for total, gradient in zip(sums, torch.autograd.grad(P.sum(), w), strict=True):
            total += gradient.sum(0)
    return [total / len(alphas) for total in sums]


def _instead(new: Tensor, old: Tensor) -> Tensor:
    return new.to(old)
