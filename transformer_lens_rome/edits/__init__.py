"""An edit is a value: what it changes, how it is put on a model and taken off, and files of it."""
