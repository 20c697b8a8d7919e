"""Texts as tokens, what a model says to them, and text that it writes."""
