"""The base class of edits: a change of some weights of a model, and the fact that it writes."""

from __future__ import annotations

import dataclasses
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from jaxtyping import Float
from torch import Tensor

from transformer_lens_rome.edits.card import Answers, Known
from transformer_lens_rome.edits.edit_files import edit_from, read_edit, write_edit
from transformer_lens_rome.edits.health import EditHealth
from transformer_lens_rome.edits.hub_folder import push_folder, save_folder
from transformer_lens_rome.edits.request import EditRequest
from transformer_lens_rome.files.fields import as_read
from transformer_lens_rome.model.adapter import Weight, weight_hash
from transformer_lens_rome.showing import Shown

E = TypeVar("E", bound="Edit")


@dataclass(frozen=True, eq=False, kw_only=True)
class Edit(Shown, ABC):
    """A change of some weights; a kind of edit defines `changes` and `scale`.

    Attributes:
        layer: The block that it changes, from 0; the first one if it changes several.
        request: The requested fact.
        config: The method's settings, as plain values.
        model_hash: sha256 of the W_out that the edit was made on (`adapter.weight_hash`). If the
            edit changes more than one W_out: sha256 of the hashes of all weights that it changes.
        health: See `EditHealth`.
        provenance: How it was made: model, prefixes, statistics, seed, BOS rule, versions.
    """

    layer: int
    request: EditRequest
    config: Mapping[str, Any] = field(default_factory=dict)
    model_hash: str = ""
    health: EditHealth = field(default_factory=EditHealth)
    provenance: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for name in ("config", "provenance"):  # as read from a file: no tuples
            object.__setattr__(self, name, as_read(dict(getattr(self, name))))

    @property
    def requests(self) -> tuple[EditRequest, ...]:
        """All facts that the edit writes."""
        return (self.request,)

    # ------------------------------------------------------------ what it changes

    @abstractmethod
    def changes(self) -> dict[Weight, Tensor]:
        """Return the change of every weight that the edit changes."""

    @abstractmethod
    def scale(self: E, alpha: float) -> E:
        """Return the edit, alpha times as strong; 0 changes nothing, -1 is the opposite."""

    def change(self, where: Weight) -> Tensor:
        """Return the change of one weight; a kind may do it without computing the others."""
        return self.changes()[where]

    def sizes(self) -> dict[Weight, tuple[int, ...]]:
        """Return the shape of every changed weight; a kind may do it without computing changes."""
        return {where: tuple(change.shape) for where, change in self.changes().items()}

    def delta(self) -> Float[Tensor, "d_mlp d_model"]:
        """Return the change of W_out, if the edit changes one W_out and no other matrix.

        Raises:
            ValueError: the edit changes other matrices, or none.
        """
        matrices = [where for where in self.sizes() if where.name != "b_out"]
        if [where.name for where in matrices] != ["W_out"]:
            names = ", ".join(f"{where.name} of layer {where.layer}" for where in matrices)
            raise ValueError(
                f"this edit changes {names or 'nothing'}, not one W_out alone; see changes()"
            )
        return self.change(matrices[0])

    def made_on(self) -> dict[Weight, str]:
        """Return the sha256 of each weight that the edit was made on, as far as it is known."""
        return {Weight("W_out", self.layer): self.model_hash}

    def __mul__(self: E, alpha: float) -> E:
        return self.scale(alpha)

    __rmul__ = __mul__

    def __neg__(self: E) -> E:
        return self.scale(-1.0)

    # ------------------------------------------------------------ what defines it, and its file

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that define the change, by name: those that a file contains."""
        return {
            f.name: value
            for f in dataclasses.fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }

    @property
    def digest(self) -> str:
        """sha256 of the layer and the tensors; saving and loading an edit does not change it."""
        state = hashlib.sha256(str(self.layer).encode())
        for tensor in self.tensors().values():
            state.update(weight_hash(tensor).encode())
        return state.hexdigest()

    def save(self, path: Any) -> None:
        """Write the edit as safetensors with JSON metadata (kilobytes for a rank-one edit)."""
        write_edit(path, self)

    def save_pretrained(
        self,
        folder: Any,
        *,
        base_model: str | None = None,
        revision: str | None = None,
        license: str | None = None,
        answers: Sequence[Answers] = (),
    ) -> Path:
        """Write the edit and a card (README.md) into a new folder, and return its path.

        `load_edit(folder)` reads the folder. The card says which fact was written, where C came
        from, the edit's health, and how to load and undo it.

        Args:
            folder: The folder; its parents are created.
            base_model: The model on the Hub, `owner/name`; None: as the provenance has it.
            revision: A branch, a tag or a commit of it; None: as the provenance has it.
            license: The licence's identifier on the Hub, such as "apache-2.0".
            answers: Prompts with the answers before and after, as `show_edit(...).prompts`.

        Raises:
            FileExistsError: the folder exists; nothing is written over it.
            ValueError: `base_model`, `revision` or `license` cannot be one.
        """
        known = Known.of(self, base_model, revision, license=license, answers=answers)
        return save_folder(self, folder, known)

    def push_to_hub(
        self,
        name: str,
        *,
        private: bool | None = None,
        token: Any = None,
        base_model: str | None = None,
        revision: str | None = None,
        license: str | None = None,
        answers: Sequence[Answers] = (),
    ) -> str:
        """Upload what `save_pretrained` writes to the Hub, and return the commit's address.

        `load_edit(name)` reads it. Files of an earlier edit in the same repository are replaced in
        a new commit.

        Args:
            name: The repository, `owner/name`; it is created if it does not exist.
            private: The visibility of a new repository; None: the Hub's default for the owner.
            token: A token with write access; None: that of `hf auth login`.
            base_model: See `save_pretrained`; so are `revision`, `license` and `answers`.
            revision: A revision of the base model.
            license: A licence's identifier.
            answers: Answers before and after.

        Raises:
            ValueError: `name` is no `owner/name`, or see `save_pretrained`; nothing is sent.
            ImportError: huggingface_hub is not installed (the `share` extra).
            OSError: the Hub refuses the upload, or cannot be reached.
        """
        known = Known.of(self, base_model, revision, license=license, answers=answers)
        return push_folder(self, name, known, private=private, token=token)

    @classmethod
    def load(cls: type[E], path: Any) -> E:
        """Read an edit that `save` wrote.

        Raises:
            ValueError: the file is not safetensors, is truncated, or has no edit of this kind.
        """
        tensors, info = read_edit(path)
        if (kind := info.get("kind")) != cls.__name__:
            raise ValueError(f"{path} contains a {kind!s:.40}; read it with {kind!s:.40}.load")
        return edit_from(cls, path, tensors, info)

    def _metadata(self) -> dict[str, Any]:
        """Return what the file of this kind of edit says, beyond tensors and common fields."""
        return {}

    @classmethod
    def _fields_from(cls, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> dict[str, Any]:
        """Return this kind's own fields from what `tensors` and `_metadata` gave to a file."""
        return dict(tensors)
