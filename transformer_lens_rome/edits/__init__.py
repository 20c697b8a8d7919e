"""Edits as values: their kinds and files, how to apply and undo them, and how to export them."""
