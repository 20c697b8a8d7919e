"""NumPy's `.npy` and `.npz` files, of which only plain arrays of numbers are read.

NumPy takes a header for an expression of Python, and its word for how much memory to ask for. Here
it has to be of the one form that NumPy writes, and to agree with the size of what follows it.
"""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

_HEADER = re.compile(
    rb"\{'descr': '([<|]?[fi][1248])', 'fortran_order': (False|True), "
    rb"'shape': \(((?:\d{1,12},? ?){0,4})\), \} *\n"
)
_MAX_HEADER = 1024
"""Bytes of a header; NumPy's have 118 or 128 for the arrays at hand."""
_PIECE = 2**20


def read_npy(path: Path) -> np.ndarray:
    """The array in a `.npy` file.

    Raises:
        FileNotFoundError, ValueError: no such file, or not a whole one of numbers.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    with path.open("rb") as file:
        return _array(file, path.stat().st_size, str(path))


def read_npz(path: Path, names: Sequence[str]) -> list[np.ndarray]:
    """Some arrays of a `.npz` file, which has to be uncompressed, as `np.savez` writes it.

    Raises:
        FileNotFoundError, ValueError: no such file, not a whole one, or one without these arrays.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        with zipfile.ZipFile(path) as file:
            return [_member(file, f"{name}.npy", str(path)) for name in names]
    except (zipfile.BadZipFile, EOFError, NotImplementedError, OSError, RuntimeError) as error:
        raise ValueError(f"{path} is not a whole .npz file ({error})") from error


def _member(file: zipfile.ZipFile, name: str, path: str) -> np.ndarray:
    found = [part for part in file.infolist() if part.filename == name]
    if len(found) != 1:
        raise ValueError(f"{path} holds {len(found)} arrays {name[:-4]}")
    (part,) = found
    size = part.file_size
    if part.compress_type != zipfile.ZIP_STORED or part.compress_size != size:
        raise ValueError(f"{path}: {name} is compressed; write the file with np.savez")
    if part.header_offset + size > Path(path).stat().st_size:
        raise ValueError(f"{path}: {name} is larger than the file")
    with file.open(part) as member:
        return _array(member, size, f"{path}: {name}")


def _array(file: BinaryIO, size: int, name: str) -> np.ndarray:
    """Read one array of which header and numbers have so many bytes."""
    start = file.read(10)
    if len(start) < 10 or start[:8] != b"\x93NUMPY\x01\x00":
        raise ValueError(f"{name} is not an array in NumPy's format 1.0")
    length = int.from_bytes(start[8:], "little")
    header = file.read(length) if length <= _MAX_HEADER else b""
    if (said := _HEADER.fullmatch(header)) is None:
        raise ValueError(
            f"{name} is not an array of floats or signed integers, of at most four axes; nothing "
            "else is read (an array of objects would need allow_pickle)"
        )
    dtype = np.dtype(said[1].decode())
    shape = tuple(int(n) for n in re.findall(rb"\d+", said[3]))
    if (wanted := dtype.itemsize * math.prod(shape)) != size - 10 - length:
        raise ValueError(
            f"{name}: an array of shape {shape} needs {wanted} bytes, there are "
            f"{size - 10 - length}"
        )
    data, have = bytearray(wanted), 0
    while have < wanted:  # in pieces: zipfile holds what it is asked for once more
        if not (read := file.readinto(memoryview(data)[have : have + _PIECE])):
            raise ValueError(f"{name} is truncated")
        have += read
    order = "F" if said[2] == b"True" else "C"
    return np.frombuffer(data, dtype).reshape(shape, order=order)
