"""Download files of the paper's authors over https, and check each one before it is kept."""

from __future__ import annotations

import hashlib
import logging
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import urlsplit

from tqdm.auto import tqdm

from transformer_lens_rome.files.cache import lock

logger = logging.getLogger(__name__)

_ORIGINS = frozenset({"https://rome.baulab.info"})
"""Allowed sources of downloads and redirects; scheme, host and port must match exactly."""


class Published(NamedTuple):
    """A published file, and how to recognise it.

    Attributes:
        url: The address of the file.
        size: The size in bytes; with `same`, the largest size allowed.
        sha256: The checksum of the file; empty with `same`.
        same: A check of the content, which raises a ValueError if it is not the published one.
            None: `size` and `sha256` are compared.
    """

    url: str
    size: int
    sha256: str = ""
    same: Callable[[Path], None] | None = None

    def check(self, path: Path) -> None:
        """Compare a downloaded file with the published one.

        Raises:
            ValueError: The file is not the published one.
        """
        if self.same is not None:
            return self.same(path)
        digest, size = sha256(path), path.stat().st_size
        if size != self.size or digest != self.sha256:
            raise ValueError(
                f"{self.url} gave {size} bytes with sha256 {digest}, not the published file; "
                "nothing was kept"
            )


def sha256(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal digits."""
    state = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            state.update(block)
    return state.hexdigest()


def download(published: Published, path: Path) -> None:
    """Download one file with a progress bar; keep it only if it is the published file.

    After an interrupted download the next call continues it, if the server supports ranges.

    Raises:
        OSError: The download fails or is incomplete, or another process is downloading the file.
        ValueError: The file is not the published one, or its source is not allowed.
    """
    _check_origin(published.url)
    logger.info("downloading %s", published.url)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with part.open("ab") as file:
        lock(file, OSError(f"another process is downloading {path.name}; wait for it"))
        try:
            size = _fetch(published, file)
            file.flush()
            if size and (received := part.stat().st_size) != size:
                raise OSError(
                    f"{published.url} ended after {received} of {size} bytes; "
                    "call again to continue"
                )
            published.check(part)
        except ValueError:
            part.unlink()
            raise
        if os.name != "nt":
            os.replace(part, path)
    if os.name == "nt":  # Windows cannot move an open file
        os.replace(part, path)


def _block(source: Any) -> bytes:
    """Read the next block of a response, at most 1 MiB."""
    try:
        return source.read(1 << 20)
    except HTTPException as error:  # a chunked response was cut off
        raise OSError(f"the download was cut off ({error!r}); call again to continue") from error


def _fetch(published: Published, file: BinaryIO) -> int:
    """Append the missing bytes to a file; return its full size, or 0 if it is not known."""
    have = file.seek(0, os.SEEK_END)
    headers = {"Range": f"bytes={have}-"} if have else {}
    try:
        source = _open(urllib.request.Request(published.url, headers=headers))
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:  # 416: no bytes are missing
            raise
        return have
    with source:
        if have and source.status != 206:  # the server sends the whole file
            file.truncate(0)
            have = 0
        length = str(source.headers.get("Content-Length", ""))
        size = have + int(length) if length.isdecimal() and len(length) < 20 else 0
        name = published.url[-30:]
        with tqdm(total=size, initial=have, unit="B", unit_scale=True, desc=name) as bar:
            while block := _block(source):
                have += len(block)
                if have > published.size:
                    raise ValueError(
                        f"{published.url} is larger than the {published.size} bytes that were "
                        "published; nothing was kept"
                    )
                file.write(block)
                bar.update(len(block))
    return size


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects only to allowed sources."""

    def redirect_request(
        self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: str
    ) -> Any:
        """Return the request that follows a redirect, after a check of its address."""
        _check_origin(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _open(request: urllib.request.Request) -> Any:
    """Send a request and return the open response."""
    return urllib.request.build_opener(_Redirects).open(request, timeout=30)


def _check_origin(url: str) -> None:
    """Raise ValueError if an address is not an allowed source."""
    parts = urlsplit(url)
    if f"{parts.scheme}://{parts.netloc}" not in _ORIGINS:
        raise ValueError(
            f"{url} is not an allowed source of downloads ({', '.join(sorted(_ORIGINS))}); "
            "download the file yourself and pass its path"
        )
