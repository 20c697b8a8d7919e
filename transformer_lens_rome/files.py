"""Tensors on disk: safetensors with JSON metadata, written whole or not at all; never a pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def write_tensors(path: Any, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """Write tensors and JSON-able information; an old file stays whole until the new one is."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        save_file(plain, temporary, metadata={"transformer_lens_rome": json.dumps(info)})
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, SafetensorError):  # disk full, no permission
            raise OSError(f"cannot write {path}: {error}") from error
        raise


def read_tensors(path: Any, expected_format: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not safetensors, truncated, or another kind of file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, ValueError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error})") from error
    info = json.loads(metadata.get("transformer_lens_rome", "{}"))
    if info.get("format") != expected_format:
        raise ValueError(
            f"{path} is a {info.get('format', 'safetensors file of another program')}, "
            f"not a {expected_format}"
        )
    return tensors, info
