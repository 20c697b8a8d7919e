"""CounterFact: records, metrics, and the evaluation of editing methods on them."""

from transformer_lens_rome.counterfact.evaluate import evaluate_counterfact
from transformer_lens_rome.counterfact.records import CounterFact, CounterFactRecord
from transformer_lens_rome.counterfact.results import Results, markdown

__all__ = ["CounterFact", "CounterFactRecord", "Results", "evaluate_counterfact", "markdown"]
