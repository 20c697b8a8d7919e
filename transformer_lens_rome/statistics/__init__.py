"""C, the second moment of keys: collect it from texts, or load it."""
