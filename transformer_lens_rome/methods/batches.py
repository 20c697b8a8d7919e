"""Work on many requests in batches, with the results of one request after another.

A request that fails does so alone: if a whole batch fails, its requests are tried one by one. A
batch that does not fit into memory is halved.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch

from transformer_lens_rome.model import passes
from transformer_lens_rome.model.faults import is_device_fault, is_out_of_memory
from transformer_lens_rome.model.protocol import Model

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")
_MOST = 64
"""Largest batch that is chosen by itself."""
_PADDING = 1.25
"""Largest ratio of the tokens of a batch, padding included, to its own tokens, on a CPU."""


class Shape(NamedTuple):
    """The size of an item's passes.

    Attributes:
        rows: The number of rows.
        longest: The number of tokens of the longest row.
        recomputed: The largest number of tokens of a row that each pass runs again.
        beside: The number of values that are held beside the passes.
    """

    rows: int
    longest: int
    recomputed: int
    beside: int = 0


def in_batches(
    model: Model,
    items: Sequence[T],
    shape: Callable[[T], Shape],
    work: Callable[[Sequence[T]], Sequence[R]],
    *,
    batch_size: int | None = None,
) -> list[R | Exception]:
    """Return the result of each item, or its ValueError, in the order of the items.

    Args:
        model: The model, for its size and memory.
        items: The items.
        shape: A function from an item to its shape, by which items of like lengths are batched.
        work: A function from some items to their results.
        batch_size: The largest number of items in a batch. None: as many as fit into memory.

    Raises:
        ValueError: `batch_size` is below 1.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
    each: dict[int, R | Exception] = {}
    shapes: dict[int, Shape] = {}
    for i, item in enumerate(items):
        try:
            shapes[i] = shape(item)
        except ValueError as error:
            each[i] = error
    for batch in _batches(model, shapes, batch_size):
        each.update(zip(batch, tried(work, [items[i] for i in batch]), strict=True))
    return [each[i] for i in range(len(items))]


def tried(
    work: Callable[[Sequence[T]], Sequence[R]],
    items: Sequence[T],
    failures: tuple[type[Exception], ...] = (ValueError,),
) -> list[R | Exception]:
    """Return the results of a batch, from smaller batches if it fails as a whole.

    An item that fails by itself gives its exception, if it is one of `failures`. A model that
    cannot be edited and a fault of the device fail all items, so their exceptions are raised.
    """
    try:
        return list(work(items))
    except Exception as error:
        if is_out_of_memory(error) and len(items) > 1:
            size = -(-len(items) // 2)
            logger.warning("a batch of %d does not fit into memory; it is halved", len(items))
        elif not isinstance(error, failures) or isinstance(error, NotImplementedError):
            raise
        elif is_device_fault(error):
            raise
        elif len(items) == 1:
            return [error]
        else:
            size = 1
    pieces = [items[i : i + size] for i in range(0, len(items), size)]
    return [result for piece in pieces for result in tried(work, piece, failures)]


def _batches(model: Model, shapes: dict[int, Shape], batch_size: int | None) -> Iterator[list[int]]:
    """Yield batches of items of like lengths that may share a pass.

    On a CPU, time goes with the number of tokens, so little of a batch may be padding.
    """
    order = sorted(shapes, key=lambda i: (shapes[i].recomputed, shapes[i].longest))
    room = free_memory(model) / 4
    on_cpu = next(model.parameters()).device.type == "cpu"
    for group in passes.apart(model, [shapes[i].longest for i in order]):
        batch: list[int] = []
        for i in (order[at] for at in group):
            some = [shapes[j] for j in (*batch, i)]
            fits = len(batch) < _MOST and _bytes(model, some) < room
            full = not fits if batch_size is None else len(batch) == batch_size
            if batch and (full or (on_cpu and _padding(some) > _PADDING)):
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch


def _padding(shapes: Sequence[Shape]) -> float:
    """Return the ratio of the tokens that a pass runs again to those that are no padding."""
    longest = max(shape.recomputed for shape in shapes)
    own = sum(shape.rows * shape.recomputed for shape in shapes)
    return longest * sum(shape.rows for shape in shapes) / own


def _bytes(model: Model, shapes: Sequence[Shape]) -> float:
    """Estimate the memory of a pass with gradients: activations, kept keys and values, two P."""
    cfg, n_rows = model.cfg, sum(shape.rows for shape in shapes)
    longest = max(shape.longest for shape in shapes)
    recomputed = max(shape.recomputed for shape in shapes)
    token = 12 * cfg.d_model + 6 * (cfg.d_mlp or 4 * cfg.d_model) + 3 * cfg.n_heads * longest
    row = cfg.n_layers * (recomputed * token + 2 * longest * cfg.d_model)
    beside = sum(2 * cfg.d_vocab + shape.beside for shape in shapes)
    return 4.0 * (n_rows * row + beside)


def free_memory(model: Model) -> float:
    """Return the free memory of the model's device in bytes; 4 GB if it is not known."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):  # not on this system
        return 4e9
