"""The 1,209 facts that the paper traces: prompts that GPT-2 XL completes correctly.

https://rome.baulab.info/data/dsets/known_1000.json
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from transformer_lens_rome.files.cache import cache_folder
from transformer_lens_rome.files.download import Published, download
from transformer_lens_rome.files.fields import fits
from transformer_lens_rome.files.strict_json import read_json

URL = "https://rome.baulab.info/data/dsets/known_1000.json"
_FIELDS = ("known_id", "subject", "attribute", "template", "prediction", "prompt", "relation_id")
_MOST = 10_000_000  # bytes; the file has 0.3 million, and fields may be added
_SHA256 = "e4e8bd3266817799112b8c15cd84db5f6c5c6043e33459ad9cc506104cede96c"


class KnownFact(NamedTuple):
    """A fact: `attribute` follows `prompt`, which contains `subject`."""

    known_id: int
    subject: str
    attribute: str
    prompt: str
    relation_id: str


def load_known_facts(path: Any = None) -> list[KnownFact]:
    """Read the facts from a file; without a path, download them once into the cache folder.

    A download is accepted only if its fields are the published ones (by their sha256).

    Raises:
        ValueError: the file is not JSON, a record lacks a field, the subject of a record is not in
            its prompt, or the download has other content.
        OSError: there is no such file, or no network.
    """
    if path is not None:
        return _parse(Path(path))
    cached = cache_folder() / "known_1000.json"
    if not cached.is_file():
        download(Published(URL, _MOST, same=_check), cached)
    return _parse(cached)


def _parse(path: Path) -> list[KnownFact]:
    facts: list[KnownFact] = []
    for i, record in enumerate(_records(path)):
        for name in KnownFact._fields:
            kind = int if name == "known_id" else str
            if not fits(value := record.get(name), kind):
                raise ValueError(
                    f"{path}: record {i}: {name} should be {kind.__name__}, it is {value!r:.60}"
                )
        facts.append(KnownFact(*(record[name] for name in KnownFact._fields)))
        if not facts[-1].subject.strip() or facts[-1].subject not in facts[-1].prompt:
            raise ValueError(f"{path}: record {i}: its subject is not in its prompt")
    return facts


def _records(path: Path) -> list[dict[str, Any]]:
    records = read_json(path)
    if not fits(records, list[dict]):
        raise ValueError(f"{path} contains no list of facts")
    return records


def _check(path: Path) -> None:
    """Raise ValueError if the fields are not the published ones; added fields are ignored."""
    records = _records(path)
    content = [[record.get(name) for name in _FIELDS] for record in records]
    digest = hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()
    if digest != _SHA256:
        raise ValueError(
            f"{URL} gave other facts than were published (sha256 {digest}); nothing was kept"
        )
