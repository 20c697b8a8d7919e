"""The bundled demo model and its tokenizer."""

from transformer_lens_rome.demo.gemma import ASK, NAME, REQUEST, load_demo_hf, load_demo_model

__all__ = ["ASK", "NAME", "REQUEST", "load_demo_hf", "load_demo_model"]
