"""The files that raters export from a page, read strictly.

    {"format", "page": sha256, "rater": random digits, "kind": "person" | "simulated",
     "answers": {question: [letter of a text, "no difference" or null, for each item]}, "checksum"}

The checksum is a CRC-32 of everything else. It shows mistakes, such as a file that was edited or
cut; it is no signature, and does not show who wrote the file. The page says "simulated" when a
program drives the browser (`navigator.webdriver`), and nothing else here can tell a person from a
program: that rests with whoever hands out the page.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformer_lens_rome.files.fields import make
from transformer_lens_rome.files.strict_json import read_json
from transformer_lens_rome.rate.key import LETTERS, QUESTIONS, SAME, Key

FORMAT = "transformer_lens_rome ratings 1"
Answer = int | None
"""The position of the preferred method in `Key.methods`, or their number for "no difference"; None:
there is no answer."""


@dataclass(frozen=True)
class RatingFile:
    """The content of an exported file; the fields are those above."""

    format: str
    page: str
    rater: str
    kind: Literal["person", "simulated"]
    answers: Mapping[str, Any]
    checksum: str

    @property
    def sum(self) -> str:
        """The checksum that the content should have."""
        return checksum(self.page, self.rater, self.kind, self.answers)


@dataclass(frozen=True)
class Rater:
    """One rater's answers, by method.

    Attributes:
        name: The random digits that the page gave the rater.
        simulated: Whether a program answered.
        answers: By question, the answer to each item.
    """

    name: str
    simulated: bool
    answers: Mapping[str, tuple[Answer, ...]]

    @property
    def missing(self) -> int:
        """The number of questions without an answer."""
        return sum(answer is None for some in self.answers.values() for answer in some)


def checksum(page: str, rater: str, kind: str, answers: Mapping[str, Sequence[str | None]]) -> str:
    """Return the checksum of an exported file, as the page's program computes it."""
    content = [FORMAT, page, rater, kind, *(answers.get(name) for name in QUESTIONS)]
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False)
    return f"{zlib.crc32(text.encode()):08x}"


def read_rater(path: Any, key: Key) -> Rater:
    """Read one exported file, and tell the methods with the key of its page.

    Raises:
        ValueError: It is no such file, is of another page or version, is altered, or empty.
        OSError: There is no such file.
    """
    content = read_json(path)
    if not isinstance(content, Mapping) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is not a file that a rating page exported")
    try:
        file = make(RatingFile, content)
    except ValueError as error:
        raise ValueError(f"{path} is damaged or altered ({error})") from error
    if file.page != key.page:
        raise ValueError(
            f"{path} is of the page {file.page[:16]}, the key is of the page {key.page[:16]}: "
            "it is another page, or another version of this one; read it with the key of its page"
        )
    try:
        _check_content(file, key)
    except ValueError as error:
        raise ValueError(f"{path} is damaged or altered ({error})") from error
    answers = {name: _by_method(file.answers[name], key) for name in QUESTIONS}
    rater = Rater(file.rater, file.kind == "simulated", answers)
    if rater.missing == len(QUESTIONS) * len(key.items):
        raise ValueError(f"{path} has no answer at all; leave it out")
    return rater


def _check_content(file: RatingFile, key: Key) -> None:
    """Raise ValueError if the content is none that a page with this key exports."""
    answers = file.answers
    if not re.fullmatch("[0-9a-f]{16}", file.rater):
        raise ValueError(f"the rater is {file.rater!r:.40}")
    if answers.keys() != set(QUESTIONS):
        raise ValueError(f"it answers {', '.join(map(str, answers)):.80}")
    allowed = {*LETTERS[: len(key.methods)], SAME}
    for name, some in answers.items():
        if not isinstance(some, list) or len(some) != len(key.items):
            raise ValueError(f"{name} needs {len(key.items)} answers")
        for answer in some:
            if answer is not None and not (isinstance(answer, str) and answer in allowed):
                raise ValueError(f"{name} is answered by {answer!r:.40}")
    if file.checksum != file.sum:
        raise ValueError("its checksum is another one")


def _by_method(letters: Sequence[str | None], key: Key) -> tuple[Answer, ...]:
    """Return the method that each answer prefers."""
    same = len(key.methods)
    return tuple(
        None if one is None else same if one == SAME else item.order[LETTERS.index(one)]
        for one, item in zip(letters, key.items, strict=True)
    )
