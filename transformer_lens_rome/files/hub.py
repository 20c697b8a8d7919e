"""Names on the Hugging Face Hub; a file from it, a folder to it, through `huggingface_hub`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from transformer_lens_rome.extras import needed

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_NAME = re.compile(rf"(?P<owner>{_PART}/)?{_PART}")
_LONGEST = 96
"""The Hub's limit for the name of an owner and for the name of a repository, in characters."""


def is_hub_name(text: Any, *, owned: bool = False) -> bool:
    """Return whether a text can be a repository of the Hub: `owner/name`, or `name` alone.

    Args:
        text: Any value; what is no text is no name.
        owned: Accept only names with an owner. Edits have one; some old models have none.
    """
    match = _NAME.fullmatch(text) if isinstance(text, str) else None
    if match is None or (owned and match["owner"] is None):
        return False
    too_long = any(len(part) > _LONGEST for part in text.split("/"))
    return not too_long and "--" not in text and ".." not in text and not text.endswith(".git")


def check_hub_name(text: Any, *, owned: bool = False) -> None:
    """Check that a text can be a repository of the Hub; the network is not used.

    Raises:
        ValueError: It cannot.
    """
    if not is_hub_name(text, owned=owned):
        raise ValueError(
            f"{text!r:.200} is no name of a repository on the Hugging Face Hub; write for instance "
            "'google/gemma-3-270m', with letters, digits and single '-', '_' or '.' only"
        )


def fetch(name: str, file: str, revision: str | None = None) -> Path:
    """Download one file of a repository into huggingface_hub's cache, and return its path.

    Args:
        name: The repository, `owner/name`.
        file: The name of the file in it.
        revision: A branch, a tag or a commit; None: the newest state.

    Raises:
        ImportError: huggingface_hub is not installed (the `share` extra).
        OSError: There is no such repository or file, or the Hub cannot be reached.
    """
    hub = needed("huggingface_hub", "share")
    try:
        return Path(hub.hf_hub_download(name, file, revision=revision))
    except Exception as error:  # its errors have no base class of their own
        raise OSError(
            f"there is no file or folder {name} here, and {file} of {name} cannot be read from the "
            f"Hugging Face Hub: {_said(error)}"
        ) from error


def push(folder: Path, name: str, *, private: bool | None, token: Any, message: str) -> str:
    """Upload the files of a folder as one commit, and return the address of the commit.

    Args:
        folder: The folder.
        name: The repository, `owner/name`; it is created if it does not exist.
        private: The visibility of a new repository; None: the Hub's default for the owner.
        token: A token with write access; None: that of `hf auth login`.
        message: The message of the commit.

    Raises:
        ImportError: huggingface_hub is not installed (the `share` extra).
        OSError: The Hub refuses the upload, or cannot be reached.
    """
    api = needed("huggingface_hub", "share").HfApi(token=token)
    try:
        api.create_repo(name, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=name, folder_path=folder, commit_message=message)
    except Exception as error:  # as above
        raise OSError(
            f"the upload to {name} failed: {_said(error)}; for a missing permission, log in with "
            "'hf auth login' or pass token="
        ) from error
    return str(commit.commit_url)


def _said(error: Exception) -> str:
    """Return the message of an error of huggingface_hub, which has several lines, on one line."""
    return " ".join(str(error).split())[:400] or type(error).__name__
