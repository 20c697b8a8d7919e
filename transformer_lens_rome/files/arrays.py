"""Read NumPy's `.npy` and `.npz` files; only plain arrays of numbers are accepted.

NumPy evaluates the header as a Python expression and allocates as much memory as it asks for. Here
the header must have the exact form that NumPy writes, and it must agree with the size of the data.
"""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Literal

import numpy as np

_HEADER = re.compile(
    rb"\{'descr': '([<|]?[fi][1248])', 'fortran_order': (False|True), "
    rb"'shape': \(((?:\d{1,12},? ?){0,4})\), \} *\n"
)
_MAX_HEADER = 1024
"""Largest header, in bytes; the headers of the arrays used here have 118 or 128."""
_PIECE = 2**20  # bytes


def read_npy(path: Path) -> np.ndarray:
    """Return the array in a `.npy` file.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is not a complete array of numbers.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    with path.open("rb") as file:
        return _array(file, path.stat().st_size, str(path))


def read_npz(path: Path, names: Sequence[str]) -> list[np.ndarray]:
    """Return the named arrays of an uncompressed `.npz` file, as written by `np.savez`.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is incomplete or compressed, or a named array is missing.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        with zipfile.ZipFile(path) as file:
            return [_member(file, f"{name}.npy", str(path)) for name in names]
    except (zipfile.BadZipFile, EOFError, NotImplementedError, OSError, RuntimeError) as error:
        raise ValueError(f"{path} is not a complete .npz file ({error})") from error


def _member(file: zipfile.ZipFile, name: str, path: str) -> np.ndarray:
    """Return one array of an open `.npz` file; `path` is used in messages."""
    members = [part for part in file.infolist() if part.filename == name]
    if len(members) != 1:
        raise ValueError(f"{path} contains {len(members)} arrays named {name[:-4]}, expected 1")
    (part,) = members
    size = part.file_size
    if part.compress_type != zipfile.ZIP_STORED or part.compress_size != size:
        raise ValueError(f"{path}: {name} is compressed; write the file with np.savez")
    if part.header_offset + size > Path(path).stat().st_size:
        raise ValueError(f"{path}: {name} is larger than the file")
    with file.open(part) as member:
        return _array(member, size, f"{path}: {name}")


def _array(file: IO[bytes], size: int, name: str) -> np.ndarray:
    """Read one array; its header and its numbers take `size` bytes together."""
    start = file.read(10)
    if len(start) < 10 or start[:8] != b"\x93NUMPY\x01\x00":
        raise ValueError(f"{name} is not an array in NumPy's format 1.0")
    length = int.from_bytes(start[8:], "little")
    header = file.read(length) if length <= _MAX_HEADER else b""
    if (fields := _HEADER.fullmatch(header)) is None:
        raise ValueError(
            f"{name} is not an array of floats or signed integers with at most four axes; no "
            "other array is read (an array of objects would need allow_pickle)"
        )
    dtype = np.dtype(fields[1].decode())
    shape = tuple(int(n) for n in re.findall(rb"\d+", fields[3]))
    if (n_bytes := dtype.itemsize * math.prod(shape)) != size - 10 - length:
        raise ValueError(
            f"{name}: an array of shape {shape} needs {n_bytes} bytes, but the file has "
            f"{size - 10 - length}"
        )
    data, done = bytearray(n_bytes), 0
    while done < n_bytes:  # piece by piece: each read makes a second copy of its bytes
        if not (piece := file.read(min(_PIECE, n_bytes - done))):
            raise ValueError(f"{name} is truncated")
        data[done : done + len(piece)] = piece
        done += len(piece)
    order: Literal["C", "F"] = "F" if fields[2] == b"True" else "C"
    return np.frombuffer(data, dtype).reshape(shape, order=order)
