"""What is changed in a forward pass: activations at some tokens, or embeddings."""

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
        point: Where in the model.
        rows: The row of each token.
        positions: Its position in that row.
        fn: From the activations there, `[n, d_model]`, to new ones of the same shape.
    """

    point: Point
    rows: Int[Tensor, "n"]
    positions: Int[Tensor, "n"]
    fn: Callable[[Tensor], Tensor]


class Noise(NamedTuple):
    """A change of embeddings, before positions are added.

    Attributes:
        rows: The row of each token.
        positions: Its position in that row.
        values: What is added to each embedding, or put in its place.
        replace: Put in its place.
    """

    rows: Int[Tensor, "n"]
    positions: Int[Tensor, "n"]
    values: Float[Tensor, "n d_model"]
    replace: bool = False


def replace(
    changes: Sequence[tuple[Tensor, Tensor, Callable]], activation: Float[Tensor, "row column d"]
) -> Float[Tensor, "row column d"]:
    """Put new activations at (rows, columns) of some old ones."""
    for rows, columns, fn in changes:
        index = (rows.to(activation.device), columns.to(activation.device))
        activation = activation.index_put(index, fn(activation[index]).to(activation))
    return activation


def embedded(
    noise: Noise | None, first: Int[Tensor, "row"], width: float = torch.inf
) -> list[tuple[Point, Hook]]:
    """A hook for the noise in a pass over `width` columns that starts at these positions."""
    if noise is None:
        return []
    columns = noise.positions - first[noise.rows]
    there = (columns >= 0) & (columns < width)
    values = noise.values[there]

    def corrupt(activation: Float[Tensor, "row column d"]) -> Float[Tensor, "row column d"]:
        index = tuple(i[there].to(activation.device) for i in (noise.rows, columns))
        return activation.index_put(index, values.to(activation), accumulate=not noise.replace)

    return [(Point("embed"), corrupt)]
