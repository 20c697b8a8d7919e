"""JSON that anybody may have written: limited, unambiguous, and text that can be encoded.

What Python's reader lets pass and this one refuses: keys that stand twice in an object, halves of
characters (lone surrogates), deep nesting, very long texts, and other encodings than UTF-8.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MAX_DATA = 256 * 2**20
"""Bytes of a JSON file: five times the largest that is published (CounterFact, 45 MB). As Python
objects JSON can take some 25 times its size."""
MAX_DEPTH = 32
"""Lists and objects within each other; the deepest of our files has 8."""
MAX_TEXT = 1_000_000
"""Characters of one text; prompts have hundreds."""


def read_bytes(path: Any, most: int = MAX_DATA) -> bytes:
    """A file's content, if it is a plain file of no more than so many bytes.

    Raises:
        FileNotFoundError: no such file, or no plain one: a folder, a pipe, a device.
        ValueError: a larger one.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    with path.open("rb") as file:
        data = file.read(most + 1) if path.stat().st_size <= most else None
    if data is None or len(data) > most:
        raise ValueError(f"{path} is larger than {most:,} bytes; no file of its kind is")
    return data


def read_json(path: Any) -> Any:
    """What a file of JSON data holds.

    Raises:
        FileNotFoundError, ValueError: no such file, or one that `parse` or `read_bytes` refuses.
    """
    return parse(read_bytes(path), str(path))


def parse(text: str | bytes, name: str, *, longest: int = MAX_TEXT) -> Any:
    """Read JSON; bytes are UTF-8.

    NaN and infinity are read, since Python writes them where a measured number is one; a whole
    number beyond 64 bits is read as a float.

    Args:
        text: What to read.
        name: What it is, for the message.
        longest: Characters of its longest text.

    Raises:
        ValueError: not JSON, or beyond the limits above.
    """
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        found = json.loads(text, object_pairs_hook=_object, parse_int=_whole)
        _check(found, longest)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON that can be read ({str(error):.300})") from error
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"{twice[:60]!r} stands twice in an object")
    return found


def _whole(digits: str) -> int | float:
    short = len(digits) <= 20 and -(2**63) <= int(digits) < 2**64
    return int(digits) if short else float(digits)


def _check(found: Any, longest: int) -> None:
    """Refuse what is too deep or too long, and text that cannot be encoded; level by level."""
    level = [found]
    for _ in range(MAX_DEPTH + 1):
        below: list[Any] = []
        for one in level:
            if isinstance(one, str):
                check_text(one, longest)
            elif isinstance(one, dict):
                below += one
                below += one.values()
            elif isinstance(one, list):
                below += one
        if not below:
            return
        level = below
    raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")


def check_text(text: str, longest: int = MAX_TEXT) -> None:
    """Refuse text that is too long, or that no file can hold.

    Raises:
        ValueError: too long, or with half of a pair of surrogates in it.
    """
    if len(text) > longest:
        raise ValueError(f"a text of {len(text):,} characters, which begins {text[:40]!r}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half a character in a text that begins {text[:40]!a}") from error
