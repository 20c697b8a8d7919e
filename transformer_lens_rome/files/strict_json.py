"""Read JSON files of unknown origin, and check their texts.

Python's reader accepts the following, and this module refuses it, because runs and edits are passed
on between people: a key that occurs twice in an object, lone surrogates, deep nesting, very long
texts, and encodings other than UTF-8.
"""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

MAX_DATA = 256 * 2**20
"""Largest JSON file in bytes: five times the largest published one (CounterFact, 45 MB). Python
objects can take about 25 times the size of their JSON."""
MAX_DEPTH = 32
"""Deepest nesting of lists and objects; the deepest file of this package has 8 levels."""
MAX_TEXT = 1_000_000
"""Longest text, in characters; prompts have hundreds."""


def read_bytes(path: Any, most: int = MAX_DATA) -> bytes:
    """Return the content of a regular file of at most `most` bytes.

    Raises:
        FileNotFoundError: The file does not exist, or is a folder, a pipe or a device.
        ValueError: The file is larger.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    with path.open("rb") as file:
        data = file.read(most + 1) if path.stat().st_size <= most else None
    if data is None or len(data) > most:
        raise ValueError(f"{path} is larger than {most:,} bytes, the largest size for its kind")
    return data


def read_json(path: Any) -> Any:
    """Return the content of a JSON file.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: `read_bytes` or `parse` refuses the file.
    """
    return parse(read_bytes(path), str(path))


def parse(text: str | bytes, name: str) -> Any:
    """Parse JSON; bytes must be UTF-8.

    NaN and infinity are accepted, because Python writes them for measured numbers. An integer
    beyond 64 bits becomes a float.

    Args:
        text: The JSON text.
        name: The name of the text, for messages.

    Raises:
        ValueError: The text is not JSON, or exceeds a limit above.
    """
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        value = json.loads(text, object_pairs_hook=_object, parse_int=_whole)
        _check(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON that can be read ({str(error):.300})") from error
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object as a dictionary; Python would keep the last of two values of a key.

    Raises:
        ValueError: A key occurs twice.
    """
    value = dict(pairs)
    if len(value) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = next(name for name, n in counts.items() if n > 1)
        raise ValueError(f"the key {twice[:60]!r} occurs twice in an object")
    return value


def _whole(digits: str) -> int | float:
    """Return a number without fraction: an int if it fits into 64 bits, else a float.

    A longer int would overflow as soon as a tensor is made of it.
    """
    short = len(digits) <= 20 and -(2**63) <= int(digits) < 2**64
    return int(digits) if short else float(digits)


def _check(value: Any) -> None:
    """Raise ValueError if a value is nested too deeply or contains a text that is not allowed.

    Values nested deeper than Python's stack could be read but not written or compared.
    """
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        below: list[Any] = []
        for one in level:
            if isinstance(one, str):
                check_text(one)
            elif isinstance(one, dict):
                below += one
                below += one.values()
            elif isinstance(one, list):
                below += one
        if not below:
            return
        level = below
    raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")


def check_text(text: str) -> None:
    """Check that a text is not too long and can be encoded in UTF-8.

    Raises:
        ValueError: The text is too long, or contains a lone surrogate.
    """
    if len(text) > MAX_TEXT:
        raise ValueError(
            f"a text has {len(text):,} characters, at most {MAX_TEXT:,} are allowed; it begins "
            f"{text[:40]!r}"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"lone surrogate in a text that begins {text[:40]!a}") from error


def stripped(target: str) -> str:
    """Return a text without white space and invisible characters at its start and end."""
    start, end = 0, len(target)
    while start < end and _is_invisible(target[start]):
        start += 1
    while start < end and _is_invisible(target[end - 1]):
        end -= 1
    return target[start:end]


def _is_invisible(character: str) -> bool:
    """Return whether a character is white space or a format character, which is invisible."""
    return character.isspace() or unicodedata.category(character) == "Cf" or character == "\u3164"


def check_edges(subject: str) -> None:
    """Check that a subject does not start or end with an invisible character.

    The token of that character would count as the first or last token of the subject.

    Raises:
        ValueError: The subject starts or ends with an invisible character.
    """
    text, visible = subject.strip(), stripped(subject)
    if text != visible:
        names = ", ".join(f"U+{ord(c):04X}" for c in text if _is_invisible(c) and not c.isspace())
        raise ValueError(
            f"the subject {subject!r:.60} starts or ends with invisible characters ({names}); pass "
            f"{visible!r:.60}, also in the prompt"
        )
