"""CounterFact and zsRE: records, metrics, and the evaluation of editing methods on them."""

from transformer_lens_rome.counterfact.evaluate import evaluate_counterfact, evaluate_zsre
from transformer_lens_rome.counterfact.generation import References, TfIdf
from transformer_lens_rome.counterfact.qualitative import Generations, compare_generations
from transformer_lens_rome.counterfact.records import CounterFact, CounterFactRecord
from transformer_lens_rome.counterfact.results import Results, comparison, latex, markdown
from transformer_lens_rome.counterfact.zsre import Zsre, ZsreRecord

__all__ = [
    "CounterFact",
    "CounterFactRecord",
    "Generations",
    "References",
    "Results",
    "TfIdf",
    "Zsre",
    "ZsreRecord",
    "compare_generations",
    "comparison",
    "evaluate_counterfact",
    "evaluate_zsre",
    "latex",
    "markdown",
]
