"""The bundled models, and what only they need."""

from transformer_lens_rome.demo.gemma import ASK, NAME, REQUEST, load_demo_hf, load_demo_model

__all__ = ["ASK", "NAME", "REQUEST", "load_demo_hf", "load_demo_model"]
