"""The kinds of states that a trace restores: one table for tracing, pictures and the command line.

A new kind is one entry in `KINDS`, and one word in `Kind` for those who check types.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from transformer_lens_rome.model.adapter import Point

Kind = Literal["resid", "mlp", "attn"]
"""The keys of `KINDS`, for annotations."""


@dataclass(frozen=True)
class StateKind:
    """One kind of state: the activation that a trace restores, and the look of its results.

    Attributes:
        point: The restored activation; `at` sets its layer.
        name: The name in titles.
        states: The restored states in a caption.
        windowed: Whether a window of layers is restored at once; if not, one layer.
        colour: The colour of the highest effect in a view, in RGB.
        colour_map: The matplotlib colour map of a figure.
        bar: The matplotlib colour of bars.
        against: The colour of the lowest effect in a view. With `colour` it makes a pair that
            colour-blind readers tell apart (ColorBrewer's PuOr, PRGn and RdBu).
    """

    point: Point
    name: str
    states: str
    windowed: bool
    colour: tuple[int, int, int]
    colour_map: str
    bar: str
    against: tuple[int, int, int] = (127, 59, 8)

    def at(self, layer: int) -> Point:
        """Return the point in one layer."""
        return self.point._replace(layer=layer)


KINDS: dict[str, StateKind] = {
    "resid": StateKind(
        point=Point("resid_post"),
        name="state",
        states="one state",
        windowed=False,
        colour=(63, 0, 125),
        colour_map="Purples",
        bar="#7261ab",
    ),
    "mlp": StateKind(
        point=Point("mlp_out"),
        name="MLP",
        states="MLP outputs",
        windowed=True,
        colour=(0, 68, 27),
        colour_map="Greens",
        bar="#20b020",
        against=(64, 0, 75),
    ),
    "attn": StateKind(
        point=Point("attn_out"),
        name="attention",
        states="attention outputs",
        windowed=True,
        colour=(103, 0, 13),
        colour_map="Reds",
        bar="#f3201b",
        against=(5, 48, 97),
    ),
}


def check_kind(kind: str) -> None:
    """Raise ValueError if there is no such kind."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}; got {kind!r:.60}")


def layers_at_once(kind: str, window: int) -> int:
    """Return the number of layers that a cell restores: the window, or 1 for a kind without one.

    Raises:
        ValueError: The kind is unknown, or the window is below 1.
    """
    check_kind(kind)
    if window < 1:
        raise ValueError(f"window must be at least 1 layer, got {window}")
    return window if KINDS[kind].windowed else 1
