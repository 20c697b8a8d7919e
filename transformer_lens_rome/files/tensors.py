"""Read and write safetensors files with JSON metadata.

A file is written completely or not at all, and a pickle is never read. The safetensors library maps
a file into memory; each tensor is copied from the map, so it does not change if the file changes
later, and reading allocates the size of the tensors once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from transformer_lens_rome.files.strict_json import parse
from transformer_lens_rome.torch_states import torch_defaults

_OWN = "transformer_lens_rome"
MAX_LAYERS = 10_000
"""Most blocks of a model; limits the layer that a file may name."""
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_DTYPES = (*_FLOATS, torch.int64, torch.int32)
"""The types that this package writes; torch cannot compute with some others, such as float8."""


def write_tensors(path: Any, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """Write tensors and JSON metadata; an old file is replaced once the new one is complete."""
    path, description = Path(path), json.dumps(info)
    parse(description.encode(), "its description")  # refuse what `read_tensors` could not read
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        save_file(plain, temporary, metadata={_OWN: description})
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, SafetensorError):  # the disk is full, or there is no permission
            raise OSError(f"cannot write {path}: {error}") from error
        raise


@torch_defaults()
def read_tensors(path: Any, expected_format: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file written by `write_tensors`; return its tensors and its metadata.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is not safetensors, is truncated, or has another format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            info = _description(file.metadata() or {}, path, expected_format)
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    except (SafetensorError, OSError, RuntimeError, TypeError) as error:  # the last two: torch
        raise ValueError(f"{path} is not a complete safetensors file ({error!s:.400})") from error
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{path}: tensor {name[:60]!r} has the unknown type {tensor.dtype}")
    return tensors, info


def _description(metadata: Mapping[str, str], path: Path, expected_format: str) -> dict[str, Any]:
    """Return the JSON object that describes the tensors, after a check of its format."""
    try:
        info = parse(metadata.get(_OWN, "{}"), "its description")
        file_format = info.get("format", "safetensors file of another program")
    except (AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} contains no JSON object that describes it ({error!r:.400})"
        ) from error
    if file_format != expected_format:
        raise ValueError(f"{path} is a {str(file_format):.80}, not a {expected_format}")
    return info


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Check that all numbers of the tensors are finite.

    Raises:
        ValueError: A tensor contains NaN or infinity; the message names the tensor.
    """
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name[:60]} contains NaN or infinity")
