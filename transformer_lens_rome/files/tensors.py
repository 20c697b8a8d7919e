"""Read and write safetensors files with JSON metadata.

A file is written completely or not at all, and a pickle is never read. This module parses the file
itself, because the safetensors library maps it into memory. So the header is checked before any
memory is allocated, and the tensors do not change if the file changes later.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from transformer_lens_rome.files.strict_json import parse
from transformer_lens_rome.torch_states import torch_defaults

_OWN = "transformer_lens_rome"
MAX_HEADER = 32 * 2**20
"""Largest header in bytes: room for the two million facts that a trained editor may list."""
MAX_TENSORS = 10_000
"""Most tensors in a file; an edit of every MLP of a large model has hundreds."""
MAX_LAYERS = 10_000
"""Most blocks of a model; limits the layer that a file may name."""
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
}
_MAX_SIZE = 2**40  # of one axis or offset, and far above any real one


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
    with path.open("rb") as file:
        try:
            parts, metadata, start = _header(file, path)
        except ValueError as error:
            raise ValueError(f"{path} is not a complete safetensors file ({error})") from error
        try:
            info = parse(metadata.get(_OWN, "{}"), "its description")
            file_format = info.get("format", "safetensors file of another program")
        except (AttributeError, ValueError) as error:
            raise ValueError(
                f"{path} contains no JSON object that describes it ({error!r:.400})"
            ) from error
        if file_format != expected_format:
            raise ValueError(f"{path} is a {str(file_format):.80}, not a {expected_format}")
        return {part.name: _read(file, start, part, path) for part in parts}, info


class _Part(NamedTuple):
    """The entry of one tensor in the header: its type, its shape and its place in the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def _header(file: BinaryIO, path: Path) -> tuple[list[_Part], dict[str, str], int]:
    """Read the header; return its tensor entries, its metadata and the offset of the data."""
    size = path.stat().st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(MAX_HEADER, size - 8):
        raise ValueError(f"the header has {length} bytes, the file {size}")
    header = parse(file.read(length), "its header", longest=MAX_HEADER)
    if not isinstance(header, dict):
        raise ValueError("the header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("the metadata values are not strings")
    if len(header) > MAX_TENSORS:
        raise ValueError(f"it has {len(header)} tensors, at most {MAX_TENSORS} are allowed")
    parts = sorted((_part(*item) for item in header.items()), key=lambda part: part[3:])
    ends = [0, *(part.end for part in parts)]
    if [part.begin for part in parts] != ends[:-1] or 8 + length + ends[-1] != size:
        raise ValueError(
            "its tensors overlap, leave gaps, or do not fill the file; it may be truncated"
        )
    return parts, metadata, 8 + length


def _part(name: str, entry: Any) -> _Part:
    """Return the entry of one tensor, after a check that its type, shape and offsets agree."""
    entry = entry if isinstance(entry, dict) else {}
    dtype = _DTYPES.get(str(entry.get("dtype")))
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    for numbers, most in ((shape, 8), (offsets, 2)):
        short = isinstance(numbers, list) and len(numbers) <= most
        if not short or not all(type(n) is int and 0 <= n <= _MAX_SIZE for n in numbers):
            raise ValueError(f"tensor {name[:60]!r} has no valid shape or offsets")
    if dtype is None or len(offsets) != 2:
        raise ValueError(f"tensor {name[:60]!r} has an unknown dtype or no valid offsets")
    if math.prod(shape) * dtype.itemsize != offsets[1] - offsets[0]:
        raise ValueError(f"tensor {name[:60]!r} has a size that does not match its shape {shape}")
    return _Part(name, dtype, tuple(shape), *offsets)


def _read(file: BufferedReader, start: int, part: _Part, path: Path) -> Tensor:
    """Read one tensor into new memory."""
    if part.begin == part.end:
        return torch.empty(part.shape, dtype=part.dtype)
    data = bytearray(part.end - part.begin)
    file.seek(start + part.begin)
    if file.readinto(data) != len(data):
        raise ValueError(
            f"{path} is not a complete safetensors file (it became shorter while it was read)"
        )
    return torch.frombuffer(data, dtype=part.dtype).reshape(part.shape)


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Check that all numbers of the tensors are finite.

    Raises:
        ValueError: A tensor contains NaN or infinity; the message names the tensor.
    """
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name[:60]} contains NaN or infinity")
