"""Wrap a Hugging Face model as a TransformerLens model of either class."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from transformer_lens_rome.torch_states import torch_defaults

ModelClass = Literal["bridge", "hooked"]


@torch_defaults()
def wrap(
    name: str,
    hf: Any,
    tokenizer: Any,
    model_class: ModelClass | None = None,
    device: Any = "cpu",
) -> Any:
    """Return a Hugging Face model as a TransformerLens model of either class, in eval mode.

    The device is set for both. By default, TransformerLens puts tokens on a GPU if there is one,
    but does not move the weights of a model that is passed to it.
    """
    hf = hf.to(device)
    options: dict[str, Any] = {"tokenizer": tokenizer, "device": str(device)}
    if (model_class or default_class()) == "bridge":
        from transformer_lens.model_bridge import TransformerBridge

        return TransformerBridge.boot_transformers(name, hf_model=hf, **options).eval()
    if Path(name).is_dir():
        raise ValueError(
            f"a HookedTransformer is loaded by a name from TransformerLens, not from {name}; "
            "use model_class='bridge' (TransformerLens 3.8 or later)"
        )
    from transformer_lens import HookedTransformer

    return HookedTransformer.from_pretrained_no_processing(
        name, hf_model=hf, dtype=hf.dtype, **options
    ).eval()


def default_class() -> ModelClass:
    """Return the default class to load: a bridge, unless TransformerLens (2.x) has none."""
    return "bridge" if find_spec("transformer_lens.model_bridge") else "hooked"
