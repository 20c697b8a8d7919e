"""The folder of an edit that is shared: its file and its card, on disk and on the Hub."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformer_lens_rome.edits.card import Known, edit_card
from transformer_lens_rome.files.hub import check_hub_name, fetch, is_hub_name, push
from transformer_lens_rome.files.new_folder import new_folder

if TYPE_CHECKING:
    from transformer_lens_rome.edits.base import Edit

EDIT_FILE = "edit.safetensors"
"""The name of an edit's file in a folder or repository."""


def save_folder(edit: Edit, folder: Any, known: Known, name: str | None = None) -> Path:
    """Write an edit's file and card into a new folder; `name` is the repository, for the card.

    Raises:
        FileExistsError: the folder exists.
    """
    folder = Path(folder)
    with new_folder(folder) as part:
        edit.save(part / EDIT_FILE)
        card = edit_card(edit, known, name or folder.name)
        (part / "README.md").write_text(card, encoding="utf-8")
    return folder


def push_folder(edit: Edit, name: str, known: Known, *, private: bool | None, token: Any) -> str:
    """Upload an edit's file and card as one commit, and return the address of the commit.

    Raises:
        ValueError: `name` is no `owner/name`; the network is not used.
        ImportError: huggingface_hub is not installed (the `share` extra).
        OSError: the Hub refuses the upload, or cannot be reached.
    """
    check_hub_name(name, owned=True)
    with tempfile.TemporaryDirectory() as parent:
        folder = save_folder(edit, Path(parent) / "edit", known, name)
        message = "Upload an edit with transformer-lens-rome"
        return push(folder, name, private=private, token=token, message=message)


def edit_path(path: Any, revision: str | None = None) -> Path:
    """Return the path of an edit's file: of a file, of a folder, or of a repository on the Hub.

    What exists here comes first. A text that ends in `.safetensors` is always a path.

    Raises:
        FileNotFoundError: there is none, and `path` is no `owner/name`; the network is not used.
        OSError: there is no such repository, or the Hub cannot be reached.
    """
    local = Path(path)
    if local.is_dir():
        return local / EDIT_FILE
    if os.path.lexists(local) or local.suffix == ".safetensors":
        return local
    if not is_hub_name(path, owned=True):
        raise FileNotFoundError(
            f"no file or folder {path!s:.300}, and it is no name of a repository on the Hugging "
            "Face Hub, which is written owner/name"
        )
    return fetch(path, EDIT_FILE, revision)
