"""Changes to a forward pass: new activations at some tokens, or noise on embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens_rome.model.adapter import Hook, Point


class Change(NamedTuple):
    """New activations at some tokens.

    Attributes:
        point: The point in the model.
        rows: The row of each token.
        positions: The position of each token in its row.
        fn: Function from the old activations, `[n, d_model]`, to new ones of the same shape.
    """

    point: Point
    rows: Int[Tensor, "n"]
    positions: Int[Tensor, "n"]
    fn: Callable[[Tensor], Tensor]


class Noise(NamedTuple):
    """A change of embeddings, before positions are added.

    Attributes:
        rows: The row of each token.
        positions: The position of each token in its row.
        values: The vectors that are added to the embeddings, or replace them.
        replace: Replace the embeddings instead of adding to them.
    """

    rows: Int[Tensor, "n"]
    positions: Int[Tensor, "n"]
    values: Float[Tensor, "n d_model"]
    replace: bool = False


def replacement(new: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the `fn` of a change to `new`, which gets the old activations' dtype and device."""
    return lambda old: new.to(old)


def replace(
    changes: Sequence[tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]],
    activation: Float[Tensor, "row column d"],
) -> Float[Tensor, "row column d"]:
    """Replace the activations at some (row, column) pairs by functions of them."""
    for rows, columns, fn in changes:
        index = (rows.to(activation.device), columns.to(activation.device))
        activation = activation.index_put(index, fn(activation[index]).to(activation))
    return activation


def embedded(
    noise: Noise | None, first: Int[Tensor, "row"], width: float = torch.inf
) -> list[tuple[Point, Hook]]:
    """Return hooks that apply the noise to embeddings, one or none.

    Args:
        noise: The noise; None for none.
        first: The position in each row of the first column of the pass.
        width: The number of columns of the pass.
    """
    if noise is None:
        return []
    columns = noise.positions - first[noise.rows]
    inside = (columns >= 0) & (columns < width)
    values = noise.values[inside]

    def corrupt(activation: Float[Tensor, "row column d"]) -> Float[Tensor, "row column d"]:
        index = tuple(i[inside].to(activation.device) for i in (noise.rows, columns))
        return activation.index_put(index, values.to(activation), accumulate=not noise.replace)

    return [(Point("embed"), corrupt)]
