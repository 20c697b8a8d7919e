"""Files: safetensors with JSON metadata, the cache folder, downloads.

What is written is written whole or not at all, and a pickle is never read. The cache folder is
`$TRANSFORMER_LENS_ROME_CACHE`, else `transformer_lens_rome` in `$XDG_CACHE_HOME` or `~/.cache`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

logger = logging.getLogger(__name__)


def write_tensors(path: Any, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """Write tensors and JSON-able information; an old file stays whole until the new one is."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        save_file(plain, temporary, metadata={"transformer_lens_rome": json.dumps(info)})
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, SafetensorError):  # disk full, no permission
            raise OSError(f"cannot write {path}: {error}") from error
        raise


def read_tensors(path: Any, expected_format: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not safetensors, truncated, or another kind of file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, ValueError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error})") from error
    try:
        info = json.loads(metadata.get("transformer_lens_rome", "{}"))
        found = info.get("format", "safetensors file of another program")
    except (AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} holds no JSON object that describes it ({error!r})") from error
    if found != expected_format:
        raise ValueError(f"{path} is a {found}, not a {expected_format}")
    return tensors, info


def cache_folder() -> Path:
    """Where statistics and downloads are kept between runs."""
    if own := os.environ.get("TRANSFORMER_LENS_ROME_CACHE"):
        return Path(own).expanduser()
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "transformer_lens_rome"


def checked(url: str, size: int, sha256: str) -> Callable[[Path], None]:
    """A check for `download`: that a file has its published size and sha256."""

    def check(path: Path) -> None:
        state = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                state.update(block)
        found = state.hexdigest()
        if path.stat().st_size != size or found != sha256:
            raise ValueError(
                f"{url} gave {path.stat().st_size} bytes with sha256 {found}, not the published "
                "file; nothing was kept"
            )

    return check


def download(url: str, path: Path, check: Callable[[Path], None] | None = None) -> None:
    """Download one file, with a progress bar; it is kept only if it is whole and passes a check.

    A download that broke off goes on where it was at the next call, if the server can do that and
    a check will tell whether the parts belong together.

    Raises:
        OSError: it cannot be had, ends early, or another process is downloading it.
        What the check raises.
    """
    logger.info("downloading %s", url)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with part.open("ab") as file:
        lock(file, OSError(f"another process is downloading {path.name}; wait for it"))
        if check is None:
            file.truncate(0)
        size = _fetch(url, file)
        file.flush()
        if size and (have := part.stat().st_size) != size:
            if check is None:
                part.unlink()
            raise OSError(f"{url} ended after {have} of {size} bytes; call again to go on")
        try:
            if check is not None:
                check(part)
        except ValueError:
            part.unlink()
            raise
        if os.name != "nt":
            os.replace(part, path)
    if os.name == "nt":  # where an open file cannot be moved
        os.replace(part, path)


def _fetch(url: str, file: BinaryIO) -> int:
    """Append what a file still lacks; its whole size, or 0 if the server does not say."""
    have = file.seek(0, os.SEEK_END)
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        source = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:  # 416: there is nothing after what we have
            raise
        return have
    with source:
        if have and source.status != 206:  # the server sends it from the start
            file.truncate(0)
            have = 0
        size = have + int(source.headers.get("Content-Length", 0) or -have)
        with tqdm(total=size, initial=have, unit="B", unit_scale=True, desc=url[-30:]) as bar:
            while block := source.read(1 << 20):
                file.write(block)
                bar.update(len(block))
    return size


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
