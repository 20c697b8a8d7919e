"""CounterFact: records, metrics, and the evaluation of editing methods on them."""

from transformer_lens_rome.counterfact.records import CounterFact, CounterFactRecord

__all__ = ["CounterFact", "CounterFactRecord"]
