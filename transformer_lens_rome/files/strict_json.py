"""JSON that anybody may have written: limited, unambiguous, and text that can be encoded.

What Python's reader lets pass and this one refuses: keys that stand twice in an object, halves of
characters (lone surrogates), deep nesting, very long texts, and other encodings than UTF-8.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

MAX_DATA = 256 * 2**20
"""Bytes of a JSON file: five times the largest that is published (CounterFact, 45 MB). As Python
objects JSON can take some 25 times its size."""
MAX_ITEM = 2**26
"""Characters of an item of a list that is read item by item."""
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


def read_list(path: Path) -> Iterator[Any]:
    """The items of a list in a file that is too large to be read at once, each as `parse` gives it.

    Raises:
        FileNotFoundError: no such file, or no plain one.
        ValueError: not a list in JSON, or an item that `parse` refuses or of over `MAX_ITEM`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            yield from _items(file)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not a JSON list to be read ({str(error):.300})") from error


def _items(file: TextIO) -> Iterator[Any]:
    """Items from a window on a file, which grows where an item does not end in it."""
    text, at = _gap(file, "", 0)
    mark = "["
    while text.startswith(mark, at):
        text, at = _gap(file, text, at + 1)
        if mark == "[" and text.startswith("]", at):
            break
        item, text, at = _item(file, text, at)
        yield item
        text, at = _gap(file, text, at)
        mark = ","
    if not text.startswith("]", at):
        raise ValueError(f"{text[at : at + 20]!r} stands where {mark!r} or its end should")
    text, at = _gap(file, text, at + 1)
    if text[at:]:
        raise ValueError(f"{text[at : at + 20]!r} stands after its end")


def _gap(file: TextIO, text: str, at: int) -> tuple[str, int]:
    """The window and the place of the next character that is no space."""
    while (at := _SPACE.match(text, at).end()) == len(text) and (more := file.read(_WINDOW)):
        text, at = more, 0
    return text, at


def _item(file: TextIO, text: str, at: int) -> tuple[Any, str, int]:
    """One item, the window, and the place after the item."""
    while True:
        try:
            item, end = _DECODER.raw_decode(text, at)
        except json.JSONDecodeError:
            item, end = None, len(text)
        if end > len(text) - _MARGIN:  # a number might go on
            if len(text) - at > MAX_ITEM:
                raise ValueError(f"an item of more than {MAX_ITEM:,} characters")
            if more := file.read(max(_WINDOW, len(text) - at)):
                text, at = text[at:] + more, 0
                continue
            item, end = _DECODER.raw_decode(text, at)
        _check(item, MAX_TEXT)
        return item, text, end


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


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_whole)
_SPACE = re.compile(r"[ \t\n\r]*")
_WINDOW, _MARGIN = 2**20, 8  # characters


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


def stripped(target: str) -> str:
    """A text without white space, or invisible characters that pasting adds, around it."""
    start, end = 0, len(target)
    while start < end and _is_invisible(target[start]):
        start += 1
    while start < end and _is_invisible(target[end - 1]):
        end -= 1
    return target[start:end]


def _is_invisible(character: str) -> bool:
    """White space, a format character such as a zero-width space or a mark of direction."""
    return character.isspace() or unicodedata.category(character) == "Cf" or character == "\u3164"


def check_edges(subject: str) -> None:
    """Refuse a subject with an invisible character at its edge, whose token would be taken for it.

    Raises:
        ValueError: it has one.
    """
    own, visible = subject.strip(), stripped(subject)
    if own != visible:
        names = ", ".join(f"U+{ord(c):04X}" for c in own if _is_invisible(c) and not c.isspace())
        raise ValueError(
            f"the subject {subject!r:.60} has invisible characters at its edge ({names}); pass "
            f"{visible!r:.60}, also in the prompt"
        )
