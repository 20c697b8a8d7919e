"""The 1,209 facts that the paper traces: prompts that GPT-2 XL completes rightly.

https://rome.baulab.info/data/dsets/known_1000.json
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from transformer_lens_rome.files import cache_folder, download

URL = "https://rome.baulab.info/data/dsets/known_1000.json"
_FIELDS = ("known_id", "subject", "attribute", "template", "prediction", "prompt", "relation_id")
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
        download(URL, kept, _check)
    return _parse(kept)


def _parse(path: Path) -> list[KnownFact]:
    try:
        records = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    if not isinstance(records, list):
        raise ValueError(f"{path} holds no list of facts")
    facts = []
    for i, record in enumerate(records):
        try:
            facts.append(KnownFact(*(record[name] for name in KnownFact._fields)))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: record {i} lacks {error}") from error
        if facts[-1].subject not in facts[-1].prompt:
            raise ValueError(f"{path}: record {i}: its subject is not in its prompt")
    return facts


def _check(path: Path) -> None:
    """Compare the fields' sha256 with the published file's; added fields do not matter."""
    records = json.loads(path.read_text())
    content = [[record.get(name) for name in _FIELDS] for record in records]
    found = hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()
    if found != _SHA256:
        raise ValueError(
            f"{URL} gave other facts than were published (sha256 {found}); nothing was kept"
        )
