"""The cache folder, safe file names, and file locks between processes.

The cache folder is `$TRANSFORMER_LENS_ROME_CACHE` if it is set; otherwise it is
`transformer_lens_rome` in `$XDG_CACHE_HOME` or `~/.cache`.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import BinaryIO


def cache_folder() -> Path:
    """Return the folder in which statistics and downloads are kept between runs."""
    if folder := os.environ.get("TRANSFORMER_LENS_ROME_CACHE"):
        return Path(folder).expanduser()
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "transformer_lens_rome"


def safe_name(text: str, longest: int = 100) -> str:
    """Return a text as a plain file name of at most `longest` characters.

    The name has no separators and no leading dot. A name that is cut ends in some digits
    of the text's sha256, so different texts get different names.
    """
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", text).lstrip(".") or "_"
    if len(name) <= longest:
        return name
    digits = hashlib.sha256(text.encode(errors="replace")).hexdigest()[:12]
    return f"{name[: longest - 13]}-{digits}"


def lock(file: BinaryIO, refusal: Exception) -> None:
    """Lock an open file for this process until the file is closed or the process ends.

    Args:
        file: The open file.
        refusal: The exception to raise if another process holds the lock.

    Raises:
        Exception: `refusal`, if another process holds the lock.
    """
    try:
        import fcntl
    except ImportError:  # Windows has no fcntl locks
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise refusal from error
