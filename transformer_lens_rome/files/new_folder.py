"""Write a folder completely or not at all; an existing one is never changed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def new_folder(path: Any) -> Iterator[Path]:
    """Yield an empty folder to write into; at exit it becomes `path`, on an error it is removed.

    Raises:
        FileExistsError: Something has this name already, an empty folder included.
    """
    path = Path(path)
    _check_free(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # beside `path`, so that the move is one step; within a folder that no one else can open
    with tempfile.TemporaryDirectory(prefix=".part-", dir=path.parent) as closed:
        folder = Path(closed) / path.name
        folder.mkdir()
        yield folder
        _check_free(path)  # again: the system would replace an empty folder
        os.rename(folder, path)


def _check_free(path: Path) -> None:
    """Raise FileExistsError if something has this name, also a link that leads nowhere."""
    if os.path.lexists(path):
        raise FileExistsError(
            f"{path} exists, and nothing is written over it; remove it first, or give another name"
        )
