"""Benchmarks of editing methods: records, metrics, and the evaluation of methods on them.

A module registers its benchmark when it is imported.
"""

from transformer_lens_rome.evaluation.benchmarks import (
    Benchmark,
    benchmark_names,
    get_benchmark,
    register_benchmark,
)
from transformer_lens_rome.evaluation.evaluate import (
    evaluate_benchmark,
    evaluate_counterfact,
    evaluate_reversal,
    evaluate_zsre,
)
from transformer_lens_rome.evaluation.generation import References, TfIdf
from transformer_lens_rome.evaluation.metrics import AnswerScore, PromptScore
from transformer_lens_rome.evaluation.mquake import HopScore, Mquake, MquakeRecord
from transformer_lens_rome.evaluation.qualitative import Generations, compare_generations
from transformer_lens_rome.evaluation.records import CounterFact, CounterFactRecord
from transformer_lens_rome.evaluation.results import Results, comparison, latex, markdown
from transformer_lens_rome.evaluation.reversal import Reversal, ReversalRecord
from transformer_lens_rome.evaluation.ripple import RippleEdits, RippleRecord
from transformer_lens_rome.evaluation.rows import GeneratedText, RecordRow
from transformer_lens_rome.evaluation.scoring import Scoring
from transformer_lens_rome.evaluation.written import Ask, WrittenScore
from transformer_lens_rome.evaluation.zsre import Zsre, ZsreRecord

__all__ = [
    "AnswerScore",
    "Ask",
    "Benchmark",
    "CounterFact",
    "CounterFactRecord",
    "GeneratedText",
    "Generations",
    "HopScore",
    "Mquake",
    "MquakeRecord",
    "PromptScore",
    "RecordRow",
    "References",
    "Results",
    "Reversal",
    "ReversalRecord",
    "RippleEdits",
    "RippleRecord",
    "Scoring",
    "TfIdf",
    "WrittenScore",
    "Zsre",
    "ZsreRecord",
    "benchmark_names",
    "compare_generations",
    "comparison",
    "evaluate_benchmark",
    "evaluate_counterfact",
    "evaluate_reversal",
    "evaluate_zsre",
    "get_benchmark",
    "latex",
    "markdown",
    "register_benchmark",
]
