"""The key of a rating page: which text is of which method.

It is a file of its own, so that nothing on the page tells raters. The page has a digest of the key
and of all texts; each exported file repeats it, so answers are never read with another page's key.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformer_lens_rome.files.fields import make
from transformer_lens_rome.files.strict_json import read_json, stripped

QUESTIONS = ("consistency", "fluency")
"""The questions about each item, in the order of the page."""
SAME = "no difference"
"""The answer that prefers no text."""
LETTERS = "ABCD"
"""The names of the texts of an item, from left to right."""
_FORMAT = "transformer_lens_rome rating key 1"


@dataclass(frozen=True)
class KeyItem:
    """One item of a page: texts about one record.

    Attributes:
        case_id: The record's number in the data set.
        text: Which of the record's generated texts is shown, from 0.
        order: For each place from left to right, the position of its method in `Key.methods`.
    """

    case_id: int
    text: int
    order: tuple[int, ...]


@dataclass(frozen=True)
class Key:
    """What tells the methods of a page's texts.

    Attributes:
        methods: The names of the methods, two to four.
        items: The items, in the order of the page.
        texts: The sha256 of the questions, facts and texts that the page shows.
        seed: The seed of the choice and the orders.

    Raises:
        ValueError: Names are missing or equal, or an order is no order of the methods.
    """

    methods: tuple[str, ...]
    items: tuple[KeyItem, ...]
    texts: str
    seed: int

    def __post_init__(self) -> None:
        n = len(self.methods)
        if not 2 <= n <= len(LETTERS):
            raise ValueError(f"a page compares 2 to {len(LETTERS)} methods, got {n}")
        names = {stripped(name) for name in self.methods}
        if len(names) < n or names & {"", SAME}:
            raise ValueError(
                f"the names {', '.join(map(repr, self.methods)):.200} do not tell the methods "
                f"apart; give each run another one with names=, and none {SAME!r}"
            )
        if not self.items or any(sorted(one.order) != [*range(n)] for one in self.items):
            raise ValueError(f"each item needs an order of the {n} methods, and there must be one")

    @property
    def page(self) -> str:
        """The sha256 that stands for the page: of this key, and so of all texts."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def save(self, path: Any) -> None:
        """Write the key to a JSON file."""
        content = {"format": _FORMAT, "page": self.page, **asdict(self)}
        Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Any) -> Key:
        """Read a file that `save` wrote.

        Raises:
            ValueError: It is no key of a page, or it has been changed.
            OSError: There is no such file.
        """
        content = read_json(path)
        if not isinstance(content, Mapping) or content.get("format") != _FORMAT:
            raise ValueError(f"{path} is not the key of a rating page, which rate.build writes")
        fields = {name: content[name] for name in content.keys() - {"format", "page"}}
        try:
            key = make(cls, fields)
        except ValueError as error:
            raise ValueError(f"{path} is not a complete key ({error})") from error
        if key.page != content.get("page"):
            raise ValueError(f"{path} has been changed: its content is not that of its page")
        return key
