"""CounterFact and zsRE: records, metrics, and the evaluation of editing methods on them."""

from transformer_lens_rome.evaluation.evaluate import evaluate_counterfact, evaluate_zsre
from transformer_lens_rome.evaluation.generation import References, TfIdf
from transformer_lens_rome.evaluation.metrics import AnswerScore, PromptScore
from transformer_lens_rome.evaluation.qualitative import Generations, compare_generations
from transformer_lens_rome.evaluation.records import CounterFact, CounterFactRecord
from transformer_lens_rome.evaluation.results import Results, comparison, latex, markdown
from transformer_lens_rome.evaluation.rows import GeneratedText, RecordRow
from transformer_lens_rome.evaluation.zsre import Zsre, ZsreRecord

__all__ = [
    "AnswerScore",
    "CounterFact",
    "CounterFactRecord",
    "GeneratedText",
    "Generations",
    "PromptScore",
    "RecordRow",
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
