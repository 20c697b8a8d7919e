"""The 1,209 facts that the paper traces: prompts that GPT-2 XL completes rightly.

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
_MOST = 10_000_000  # bytes; it has 0.3 million, and fields may be added
_SHA256 = "e4e8bd3266817799112b8c15cd84db5f6c5c6043e33459ad9cc506104cede96c"


class KnownFact(NamedTuple):
    """A fact: after `prompt`, in which `subject` stands, comes `attribute`."""

    known_id: int
    subject: str
    attribute: str
    prompt: str
    relation_id: str


def load_known_facts(path: Any = None) -> list[KnownFact]:
    """Read the facts from a file; without one, download it once, to the cache folder.

    A download is taken only if what it holds is what was published (sha256 of its fields).

    Raises:
        ValueError: not JSON, a record that lacks a field or whose subject is not in its prompt, or
            a download of other content.
        OSError: no such file, or no network.
    """
    if path is not None:
        return _parse(Path(path))
    kept = cache_folder() / "known_1000.json"
    if not kept.is_file():
        download(Published(URL, _MOST, same=_check), kept)
    return _parse(kept)


def _parse(path: Path) -> list[KnownFact]:
    facts = []
    for i, record in enumerate(_records(path)):
        for name in KnownFact._fields:
            kind = int if name == "known_id" else str
            if not fits(found := record.get(name), kind):
                raise ValueError(
                    f"{path}: record {i}: {name} should be {kind.__name__}, it is {found!r:.60}"
                )
        facts.append(KnownFact(*(record[name] for name in KnownFact._fields)))
        if not facts[-1].subject.strip() or facts[-1].subject not in facts[-1].prompt:
            raise ValueError(f"{path}: record {i}: its subject is not in its prompt")
    return facts


def _records(path: Path) -> list[dict[str, Any]]:
    records = read_json(path)
    if not fits(records, list[dict]):
        raise ValueError(f"{path} holds no list of facts")
    return records


def _check(path: Path) -> None:
    """Compare the fields' sha256 with the published file's; added fields do not matter."""
    records = _records(path)
    content = [[record.get(name) for name in _FIELDS] for record in records]
    found = hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()
    if found != _SHA256:
        raise ValueError(
            f"{URL} gave other facts than were published (sha256 {found}); nothing was kept"
        )
