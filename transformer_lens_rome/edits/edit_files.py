"""The file of an edit: safetensors with JSON metadata, checked before an edit is made of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from transformer_lens_rome.edits.health import EditHealth
from transformer_lens_rome.edits.request import EditRequest
from transformer_lens_rome.files.fields import make
from transformer_lens_rome.files.tensors import (
    MAX_LAYERS,
    check_finite,
    read_tensors,
    write_tensors,
)

if TYPE_CHECKING:
    from transformer_lens_rome.edits.base import Edit

E = TypeVar("E", bound="Edit")

_FORMAT = "transformer_lens_rome.edit.1"
_MAX_MATRIX = 2**31
"""The most entries that an edited matrix may have: twice as many as in a model with 405 billion
parameters. Without a limit, a file with two vectors could ask for a matrix larger than any memory.
"""


def write_edit(path: Any, edit: Edit) -> None:
    """Write an edit; `read_edit` and `edit_from` read it."""
    info = {
        "format": _FORMAT,
        "kind": type(edit).__name__,
        "layer": edit.layer,
        "model_hash": edit.model_hash,
        "request": dataclasses.asdict(edit.request),
        "config": edit.config,
        "health": edit.health.to_dict(),
        "provenance": edit.provenance,
        **edit._metadata(),
    }
    copies = {name: tensor.clone() for name, tensor in edit.tensors().items()}
    write_tensors(path, copies, info)  # safetensors refuses tensors that share memory


def read_edit(path: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the metadata of an edit's file.

    Raises:
        ValueError: the file is not safetensors, is truncated, or contains no edit.
    """
    return read_tensors(path, _FORMAT)


def edit_from(
    kind: type[E], path: Any, tensors: Mapping[str, Tensor], info: Mapping[str, Any]
) -> E:
    """Return the edit of a kind that `read_edit` has read.

    Raises:
        ValueError: a part is missing, has the wrong type, or does not fit the others.
    """
    try:
        check_finite(tensors)
        known = {name: info[name] for name in ("layer", "model_hash", "config", "provenance")}
        known["request"] = make(EditRequest, info["request"])
        known["health"] = EditHealth.from_dict(info["health"])
        edit = make(kind, {**known, **kind._fields_from(tensors, info)})
        _check_sizes(edit)
        return edit
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is an incomplete edit file ({error!r:.400})") from error


def _check_sizes(edit: Edit) -> None:
    """Raise ValueError for layers or sizes that no model has, before a matrix is made."""
    for where, size in edit.sizes().items():
        if not 0 <= where.layer < MAX_LAYERS or math.prod(size) > _MAX_MATRIX:
            raise ValueError(f"no model has a matrix of {size} at layer {where.layer}")
