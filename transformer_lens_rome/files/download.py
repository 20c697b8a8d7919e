"""Downloads: from the paper's authors only, over https, whole, and checked before they are kept."""

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
"""What downloads may come from, redirects too: scheme, host and port, to the letter."""


class Published(NamedTuple):
    """A file that was published, and how it is known.

    Attributes:
        url: Where it is.
        size: Its bytes; where `same` decides, the most that it may have.
        sha256: Of its bytes; empty where `same` decides.
        same: Raises a ValueError unless a file holds what was published.
    """

    url: str
    size: int
    sha256: str = ""
    same: Callable[[Path], None] | None = None

    def check(self, path: Path) -> None:
        """Refuse a file that is not the published one.

        Raises:
            ValueError: it is not.
        """
        if self.same is not None:
            return self.same(path)
        found, size = sha256(path), path.stat().st_size
        if size != self.size or found != self.sha256:
            raise ValueError(
                f"{self.url} gave {size} bytes with sha256 {found}, not the published file; "
                "nothing was kept"
            )


def sha256(path: Path) -> str:
    """The sha256 of a file."""
    state = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            state.update(block)
    return state.hexdigest()


def download(published: Published, path: Path) -> None:
    """Download one file, with a progress bar; it is kept only if it is what was published.

    A download that broke off goes on where it was at the next call, if the server can do that.

    Raises:
        OSError: it cannot be had, ends early, or another process is downloading it.
        ValueError: it is another file, or comes from elsewhere than it may.
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
            if size and (have := part.stat().st_size) != size:
                raise OSError(
                    f"{published.url} ended after {have} of {size} bytes; call again to go on"
                )
            published.check(part)
        except ValueError:
            part.unlink()
            raise
        if os.name != "nt":
            os.replace(part, path)
    if os.name == "nt":  # where an open file cannot be moved
        os.replace(part, path)


def _block(source: Any) -> bytes:
    try:
        return source.read(1 << 20)
    except HTTPException as error:  # an answer in chunks that broke off
        raise OSError(f"the download broke off ({error!r}); call again to go on") from error


def _fetch(published: Published, file: BinaryIO) -> int:
    """Append what a file still lacks; its whole size, or 0 if the server does not say."""
    have = file.seek(0, os.SEEK_END)
    headers = {"Range": f"bytes={have}-"} if have else {}
    try:
        source = _open(urllib.request.Request(published.url, headers=headers))
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:  # 416: there is nothing after what we have
            raise
        return have
    with source:
        if have and source.status != 206:  # the server sends it from the start
            file.truncate(0)
            have = 0
        said = str(source.headers.get("Content-Length", ""))
        size = have + int(said) if said.isdecimal() and len(said) < 20 else 0
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
    """Redirects that stay where downloads may come from."""

    def redirect_request(
        self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: str
    ) -> Any:
        """What to ask for next."""
        _check_origin(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _open(request: urllib.request.Request) -> Any:
    return urllib.request.build_opener(_Redirects).open(request, timeout=30)


def _check_origin(url: str) -> None:
    parts = urlsplit(url)
    if f"{parts.scheme}://{parts.netloc}" not in _ORIGINS:
        raise ValueError(
            f"{url} is not among what is downloaded from, {', '.join(sorted(_ORIGINS))}; download "
            "the file yourself and give its path"
        )
