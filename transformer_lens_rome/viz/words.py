"""Text in pictures: tokens with characters that nobody sees, and names of layers."""

from __future__ import annotations

from collections.abc import Sequence


def readable(text: str) -> str:
    r"""Return text on one line, with an escape such as "\n" for each character that is not seen.

    Control characters, and marks that would turn the direction of other text, are not seen.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def token_labels(tokens: Sequence[str], subject_positions: Sequence[int]) -> list[str]:
    """Return the labels of tokens in a picture; subject tokens get a star."""
    return [readable(text) + "*" * (i in subject_positions) for i, text in enumerate(tokens)]


def layer_names(layers: Sequence[int]) -> str:
    """Return "layer 3" for one layer and "layers 3, 4" for several."""
    return f"layer{'s' * (len(layers) != 1)} {', '.join(map(str, layers))}"
