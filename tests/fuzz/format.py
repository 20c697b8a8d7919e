"""What one kind of file to fuzz is, and what several of them need."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fuzz import mutations as mutate
from helpers import tiny_models
from helpers.tiny_tokenizer import tiny_tokenizer

from transformer_lens_rome import EditRequest

REQUEST = EditRequest("{} is in", "The Space Needle", "Paris", "Seattle")
TENSORS = (
    mutate.damaged_metadata,
    mutate.damaged_metadata,
    mutate.damaged_header,
    mutate.damaged_tensors,
    mutate.damaged_bytes,
)
JSON = (mutate.damaged_json, mutate.damaged_json, mutate.damaged_json, mutate.damaged_bytes)
LINES = (mutate.damaged_lines, mutate.damaged_lines, mutate.damaged_bytes)
ZIP = (mutate.damaged_zip, mutate.damaged_bytes)


@dataclass
class Format:
    """One kind of file.

    Attributes:
        seeds: Whole files.
        mutators: Ways to damage one; each is as likely.
        read: From a path to what the file holds.
        use: What users do with that.
    """

    seeds: list[bytes]
    mutators: tuple[Callable[..., bytes], ...]
    read: Callable[[Path], Any]
    use: Callable[[Any], None]


def saved(*items: Any) -> list[bytes]:
    """The files that things with a `save` write."""
    with tempfile.TemporaryDirectory() as folder:
        for i, item in enumerate(items):
            item.save(Path(folder) / str(i))
        return [(Path(folder) / str(i)).read_bytes() for i in range(len(items))]


@cache
def model() -> Any:
    """A tiny GPT-2."""
    make = tiny_models.tiny_bridge if tiny_models.has_bridge() else tiny_models.tiny_hooked
    return make("gpt2", tokenizer())


@cache
def tokenizer() -> Any:
    """Its tokenizer, in a folder that stays until the end."""
    tokenizer.folder = tempfile.TemporaryDirectory()
    return tiny_tokenizer(tokenizer.folder.name, bos=False)
