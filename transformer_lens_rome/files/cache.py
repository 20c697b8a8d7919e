"""The cache folder, names of files, and locks that keep a second process out of a file.

The cache folder is `$TRANSFORMER_LENS_ROME_CACHE`, else `transformer_lens_rome` in
`$XDG_CACHE_HOME` or `~/.cache`.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import BinaryIO


def cache_folder() -> Path:
    """Where statistics and downloads are kept between runs."""
    if own := os.environ.get("TRANSFORMER_LENS_ROME_CACHE"):
        return Path(own).expanduser()
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "transformer_lens_rome"


def safe_name(text: str, longest: int = 100) -> str:
    """A text as one plain name of a file: no separators, no leading dot, and not too long.

    What had to be cut keeps some digits of its sha256, so that two texts stay two names.
    """
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", text).lstrip(".") or "_"
    if len(name) <= longest:
        return name
    digits = hashlib.sha256(text.encode(errors="replace")).hexdigest()[:12]
    return f"{name[: longest - 13]}-{digits}"


def lock(file: BinaryIO, refusal: Exception) -> None:
    """Keep other processes out until the file is closed, or this process is gone.

    Raises:
        The refusal: another process has it.
    """
    try:
        import fcntl
    except ImportError:  # Windows has no such locks
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise refusal from error
