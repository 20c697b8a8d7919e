"""The commands of `python -m transformer_lens_rome`."""
