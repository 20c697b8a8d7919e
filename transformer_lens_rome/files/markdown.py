"""Parts of a Markdown page: texts of unknown origin, tables, code, and the YAML above a card."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

LONGEST = 300
"""Most characters of a text that a page shows; a fact has fewer."""
_SPECIAL = re.compile(r"([\\`*_\[\]<>|~&$:]|(?<=www)\.)", re.IGNORECASE)
"""Characters with a meaning within a line, for Markdown or for code hosts: emphasis, code, links,
HTML, entities, cells of tables, formulas, bare addresses."""


def escaped(text: Any) -> str:
    """Return a text that Markdown shows as it is, on one line, shortened if it is very long.

    What would have a meaning gets a backslash (CommonMark 2.4). Line breaks, control characters and
    other invisible ones, such as those that turn the direction of text, are spelled out.
    """
    text = str(text)
    shown = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:LONGEST]
    )
    return _SPECIAL.sub(r"\\\1", shown) + ("…" if len(text) > LONGEST else "")


def quoted(text: Any) -> str:
    """Return a text as `escaped` does, in quotation marks, which show where it begins and ends."""
    return f"“{escaped(text)}”"


def front(values: Mapping[str, str | Sequence[str] | None]) -> str:
    """Return the YAML above a card; None leaves a key out. Values are written as JSON, in ASCII."""
    lines = [f"{name}: {json.dumps(value)}" for name, value in values.items() if value is not None]
    return "\n".join(["---", *lines, "---"])


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; its cells are Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def code(*lines: str) -> str:
    """Return a block of Python."""
    return "\n".join(["```python", *lines, "```"])
