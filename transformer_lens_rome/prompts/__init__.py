"""Tokenise texts, score them with a model, and sample text from it."""
