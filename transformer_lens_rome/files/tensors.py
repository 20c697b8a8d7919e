"""Files: safetensors with JSON metadata, the cache folder, names of files, locks.

What is written is written whole or not at all, and a pickle is never read. A file is read here and
not by the safetensors library, which maps it into memory: so its header is judged before anything
is taken for what it promises, and what was read stays what it was.

The cache folder is `$TRANSFORMER_LENS_ROME_CACHE`, else `transformer_lens_rome` in
`$XDG_CACHE_HOME` or `~/.cache`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
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
"""Bytes of a header: a trained editor's lists its facts, and this is room for two million."""
MAX_TENSORS = 10_000
"""Tensors in a file; those of an edit of every MLP of a large model are hundreds."""
MAX_LAYERS = 10_000
"""Blocks of a model, where a file names one of them."""
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
}
_MAX_SIZE = 2**40  # of one axis: products stay far from where whole numbers end


def write_tensors(path: Any, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """Write tensors and JSON-able information; an old file stays whole until the new one is."""
    path, description = Path(path), json.dumps(info)
    parse(description.encode(), "its description")  # so that what is written can be read
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        save_file(plain, temporary, metadata={_OWN: description})
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, SafetensorError):  # disk full, no permission
            raise OSError(f"cannot write {path}: {error}") from error
        raise


@torch_defaults()
def read_tensors(path: Any, expected_format: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not safetensors, truncated, or another kind of file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    with path.open("rb") as file:
        try:
            parts, metadata, start = _header(file, path)
        except ValueError as error:
            raise ValueError(f"{path} is not a whole safetensors file ({error})") from error
        try:
            info = parse(metadata.get(_OWN, "{}"), "its description")
            found = info.get("format", "safetensors file of another program")
        except (AttributeError, ValueError) as error:
            raise ValueError(
                f"{path} holds no JSON object that describes it ({error!r:.400})"
            ) from error
        if found != expected_format:
            raise ValueError(f"{path} is a {str(found):.80}, not a {expected_format}")
        return {part.name: _read(file, start, part, path) for part in parts}, info


class _Part(NamedTuple):
    """Where a tensor is in a file, and what it is."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def _header(file: BinaryIO, path: Path) -> tuple[list[_Part], dict[str, str], int]:
    """What a file's header says of its tensors, its metadata, and where the tensors begin."""
    size = path.stat().st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(MAX_HEADER, size - 8):
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    header = parse(file.read(length), "its header", longest=MAX_HEADER)
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its metadata are not texts")
    if len(header) > MAX_TENSORS:
        raise ValueError(f"{len(header)} tensors")
    parts = sorted((_part(*item) for item in header.items()), key=lambda part: part[3:])
    ends = [0, *(part.end for part in parts)]
    if [part.begin for part in parts] != ends[:-1] or 8 + length + ends[-1] != size:
        raise ValueError("its tensors leave gaps, overlap, or do not fill it: is it truncated?")
    return parts, metadata, 8 + length


def _part(name: str, said: Any) -> _Part:
    """A tensor's entry in the header, if it agrees with itself."""
    said = said if isinstance(said, dict) else {}
    dtype = _DTYPES.get(str(said.get("dtype")))
    shape, offsets = said.get("shape"), said.get("data_offsets")
    for numbers, most in ((shape, 8), (offsets, 2)):
        known = isinstance(numbers, list) and len(numbers) <= most
        if not known or not all(type(n) is int and 0 <= n <= _MAX_SIZE for n in numbers):
            raise ValueError(f"tensor {name[:60]!r} has no shape or place")
    if dtype is None or len(offsets) != 2:
        raise ValueError(f"tensor {name[:60]!r} has no type that is used, or no place")
    if math.prod(shape) * dtype.itemsize != offsets[1] - offsets[0]:
        raise ValueError(f"tensor {name[:60]!r} has another size than its shape {shape}")
    return _Part(name, dtype, tuple(shape), *offsets)


def _read(file: BinaryIO, start: int, part: _Part, path: Path) -> Tensor:
    """One tensor, in memory of its own."""
    if part.begin == part.end:
        return torch.empty(part.shape, dtype=part.dtype)
    data = bytearray(part.end - part.begin)
    file.seek(start + part.begin)
    if file.readinto(data) != len(data):
        raise ValueError(f"{path} is not a whole safetensors file (it became shorter)")
    return torch.frombuffer(data, dtype=part.dtype).reshape(part.shape)


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Refuse NaN and infinity.

    Raises:
        ValueError: a tensor holds one; the message names it.
    """
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name[:60]} holds NaN or infinity")
