"""C, the second moment of keys: collected from texts, or found."""
