"""The methods that ROME is compared with; each registers itself by name."""

from transformer_lens_rome.baselines.fine_tuning import FineTuning

__all__ = ["FineTuning"]
