"""Intervals of means."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

Deviation = TypeVar("Deviation", float, Tensor)


def half_width(deviation: Deviation, n: int) -> Deviation:
    """Return half of the 95% interval of the mean of n items: 1.96 standard errors.

    Args:
        deviation: The standard deviation of the items.
        n: The number of items, 2 or more.
    """
    return 1.96 * deviation / n**0.5
