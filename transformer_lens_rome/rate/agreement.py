"""Agreement of raters: Krippendorff's alpha for categories.

K. Krippendorff, "Computing Krippendorff's Alpha-Reliability", 2011: alpha is 1 - D_o / D_e, where
D_o is the share of differing pairs among the answers to the same item, and D_e the share that
chance would give, for answers drawn from all items together. Items with one answer do not count.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence


def krippendorff_alpha(answers: Sequence[Sequence[Hashable | None]]) -> float:
    """Return alpha: 1 for full agreement, 0 for agreement as by chance, below 0 for less.

    Args:
        answers: For each rater, the category of each item; None if there is no answer.

    Returns:
        Alpha; not a number if no item has two answers, or if all answers are the same category.
    """
    items = [
        counts
        for item in zip(*answers, strict=True)
        if (counts := Counter(one for one in item if one is not None)).total() > 1
    ]
    every: Counter[Hashable] = sum(items, Counter())
    observed = sum(_differing(counts) / (counts.total() - 1) for counts in items)
    expected = _differing(every) / (every.total() - 1) if items else 0.0
    return 1 - observed / expected if expected else math.nan


def _differing(counts: Counter[Hashable]) -> int:
    """Return the number of ordered pairs of answers that differ."""
    return counts.total() ** 2 - sum(n * n for n in counts.values())
