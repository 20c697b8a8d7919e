"""RippleEdits as a benchmark (Cohen et al. 2024, arXiv:2307.12976), as its released code scores it.

    condition   a test counts if the unedited model answers all of its condition queries
    answered    the prompt and its greedy continuation, as many tokens as the prompt has characters
                and 30 more, contain every answer or one of its aliases
    passed      one query of the test is answered, or all of them ("AND")
    a record    the share of the tests that pass, by criterion, if the edit took: the model
                continues the edited prompt with the new target

Since the prompt is searched too, a test whose prompt contains the answer always passes;
`in_prompt=False` searches the continuation alone. Forgetfulness is not in every file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, ClassVar

from transformer_lens_rome.evaluation.benchmarks import Benchmark, Scores, register_benchmark
from transformer_lens_rome.evaluation.ripple_records import (
    CRITERIA,
    Query,
    RippleEdits,
    RippleRecord,
    RippleTest,
)
from transformer_lens_rome.evaluation.scoring import Scoring
from transformer_lens_rome.evaluation.written import Ask, WrittenScore

LEGEND = (
    "RippleEdits, in percent, half of the 95% interval in brackets. EA: the edit took: the model's "
    "greedy text after the edited prompt has the new target. Shares of the tests that pass, over "
    "records whose edit took (unedited: over all that count), of those tests whose condition the "
    "unedited model meets: LG: logical generalization; CI, CII: compositionality; SA: other names "
    "of the subject; PV: other objects of the relation; RS: other relations of the subject. met: "
    "the share of tests whose condition is met."
)
_MORE = 30  # tokens


def _condition(criterion: str) -> str:
    """Return the kind of the condition queries of a criterion."""
    return f"{criterion}, condition"


@dataclass(frozen=True)
class RippleScoring(Scoring):
    """Ask the queries of all tests of a record, and on the unedited model their conditions.

    Attributes:
        in_prompt: Look for answers in the prompt too, as released.
        n_tokens: The number of tokens of an answer. None: as released.
    """

    protocol: ClassVar[str] = "rippleedits"
    in_prompt: bool = True
    n_tokens: int | None = None
    _first: bool = field(default=False, repr=False)

    @property
    def first(self) -> RippleScoring:
        """A scoring of the conditions, and of the edited prompt."""
        return replace(self, _first=True)

    @property
    def setting(self) -> dict[str, Any]:
        """The options."""
        return {"in_prompt": self.in_prompt, "n_tokens": self.n_tokens}

    def written(self, record: RippleRecord, edited: bool) -> list[Ask]:
        """Return the prompts of all queries."""
        return [
            Ask(query.prompt, len(query.prompt) + _MORE, whole=True)
            if self.n_tokens is None
            else Ask(query.prompt, self.n_tokens)
            for _, test in self._tests(record, edited)
            for query in test.queries
        ]

    def judged(self, record: RippleRecord, edited: bool, texts: Sequence[str]) -> Scores:
        """Return for each test, by criterion, what was written and whether it passes."""
        rest = iter(texts)
        scores: dict[str, list[WrittenScore]] = {}
        for kind, test in self._tests(record, edited):
            some = [next(rest) for _ in test.queries]
            passes = [
                query.answered_by(query.prompt + text if self.in_prompt else text)
                for query, text in zip(test.queries, some, strict=True)
            ]
            passed = all(passes) if test.all_of else any(passes)
            scores.setdefault(kind, []).append(WrittenScore(some, passed))
        return scores

    def _tests(self, record: RippleRecord, edited: bool) -> Iterator[tuple[str, RippleTest]]:
        """Yield the tests of a record with their kinds: did the edit take, and the others."""
        request = record.request
        yield "rewrite", RippleTest((Query(request.text, ((request.target_new,),)),))
        for criterion, tests in record.tests.items():
            for test in tests:
                if not self._first:
                    yield criterion, test
                if not edited:  # a test without conditions has none to meet
                    yield _condition(criterion), RippleTest(test.conditions, all_of=True)


def ripple_metrics(scores: Scores, before: Scores) -> dict[str, float]:
    """Return EA, met, and the share of tests that pass, by criterion, if the edit took."""
    took = scores["rewrite"][0].passed
    metrics = {"EA": float(took)}
    met: list[bool] = []
    for criterion, name in CRITERIA.items():
        conditions = [one.passed for one in before.get(_condition(criterion), ())]
        met += conditions
        passed = [
            test.passed for test, known in zip(scores.get(criterion, ()), conditions) if known
        ]
        if passed and (took or scores is before):
            metrics[name] = fmean(passed)
    return metrics | {"met": fmean(met)}


def has_condition_met(scores: Scores) -> bool:
    """Return whether the condition of a test of a record is met."""
    return any(one.passed for kind in CRITERIA for one in scores.get(_condition(kind), ()))


register_benchmark(
    Benchmark(
        name="rippleedits",
        load=RippleEdits.load,
        scoring=RippleScoring,
        kinds=dict.fromkeys(
            ("rewrite", *CRITERIA, *(_condition(criterion) for criterion in CRITERIA)), WrittenScore
        ),
        metrics=ripple_metrics,
        columns=("EA", *CRITERIA.values(), "met"),
        legend=LEGEND,
        panels={"EA": "efficacy"} | {name: kind for kind, name in CRITERIA.items()},
        counts=has_condition_met,
        condition="the unedited model meets the condition of a test",
    )
)
