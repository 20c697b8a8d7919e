"""Two verbs with which results are looked at; `viz` teaches them each kind of result.

A result knows no picture. It says that it can be shown, and calls a verb with itself; which picture
that is, is registered in `viz`, which imports the kinds of results.
"""

from __future__ import annotations

from functools import singledispatch
from typing import Any


@singledispatch
def view(thing: Any, *others: Any, interactive: bool = True) -> Any:
    """Return a `viz.View` of something; `interactive=False` leaves out what needs a program.

    Args:
        thing: What is shown.
        others: More of its kind, to compare with it.
        interactive: Whether readers can explore it.

    Raises:
        ValueError: Nobody has said how such a thing is shown.
    """
    raise ValueError(f"a page shows text, figures, views and results, not a {type(thing).__name__}")


@singledispatch
def figure(thing: Any, *others: Any, **options: Any) -> Any:
    """Return a matplotlib figure of something (the `plot` extra).

    Raises:
        ValueError: Nobody has said how such a thing is drawn.
    """
    raise ValueError(f"there is no figure of a {type(thing).__name__}")


class Shown:
    """A result that can be looked at: as the last value of a notebook cell, and by `show()`."""

    def show(self, *others: Any) -> Any:
        """Return everything there is to see and explore, as a `viz.View`.

        Args:
            others: More results of the same kind, to choose from or to compare: traces of other
                kinds or windows, averages, runs of other methods.
        """
        return view(self, *others)

    def _repr_html_(self) -> str:
        return view(self, interactive=False)._repr_html_()
