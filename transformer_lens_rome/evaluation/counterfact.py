"""CounterFact as a benchmark: what is asked about its records, and what a table of it shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from transformer_lens_rome.evaluation.benchmarks import Benchmark, register_benchmark
from transformer_lens_rome.evaluation.generation import References, cleaned, fluency
from transformer_lens_rome.evaluation.metrics import (
    KINDS,
    KL_NAMES,
    NAMES,
    S_OF,
    PromptScore,
    record_metrics,
)
from transformer_lens_rome.evaluation.records import CounterFact, CounterFactRecord
from transformer_lens_rome.evaluation.rows import GeneratedText
from transformer_lens_rome.evaluation.scoring import Asked, Scoring

LEGEND = (
    "CounterFact, in percent, half of the 95% interval in brackets. ES, PS: p(new) > p(true) "
    "after the prompt and after paraphrases; NS: p(true) > p(new) at neighbours; EM, PM, NM: "
    "the mean differences; EA, PA, NA: all tokens of the new (NA: true) target are top tokens; "
    "p: the geometric mean over the target's tokens, teacher-forced; S: the harmonic mean of "
    "ES, PS and NS, with a bootstrap's interval."
)
NOTES = {
    "CS": "CS, CM, CA: as PS, PM, PA, after the flat file's rephrase_prompt, which is a paraphrase "
    "in one record of six only; so it is not PS, and S does not count it.",
    "NS+": "NS+, NM+: at neighbours, with the edited fact in front.",
    "NKL": "NKL, NKL+: KL(edited || unedited) of the next token there, in hundredths of nats.",
    "AS": "AS, AM: as ES, EM, at prompts about subjects of which the new target is true.",
    "GE": "GE: entropy of bigrams and trigrams of generated text, in hundredths of bits; RS: "
    "TF-IDF cosine with reference texts.",
}
"""The sentences that a legend adds for a column, by the column's name."""


@dataclass(frozen=True)
class CounterFactScoring(Scoring):
    """Score both targets after every prompt of a record, and optionally generated text.

    Attributes:
        attributes: Score the attribute prompts too.
        counterfact_plus: Score the neighbours with the edited fact in front of them too, and
            compare the next token's distributions (CounterFact+, arXiv:2305.17553).
        generate: Also generate text about the subject, for GE, and for RS if there are references.
        references: The reference texts of RS.
        seed: The seed of sampling; the draws of a record depend on it and on `case_id` only.
    """

    protocol: ClassVar[str] = "counterfact"
    attributes: bool = False
    generate: bool = False
    references: References | None = None
    seed: int = 0
    counterfact_plus: bool = False

    @property
    def setting(self) -> dict[str, Any]:
        """The options, and what generated text depends on."""
        setting: dict[str, Any] = {"attributes": self.attributes, "generate": self.generate}
        if self.generate:
            setting["references"] = self.references.digest if self.references else None
            setting["generation_seed"] = self.seed
        return setting | ({"counterfact_plus": True} if self.counterfact_plus else {})

    @property
    def generates(self) -> bool:
        """True if the model writes text about each record."""
        return self.generate

    def asked(self, record: CounterFactRecord) -> Asked:
        """Return every prompt of a record, with both targets after it.

        Raises:
            ValueError: The record has no true target.
        """
        request = record.request
        if request.target_true is None:
            raise ValueError(
                f"record {record.case_id} has no true target; CounterFact scores both targets, so "
                "give the request target_true="
            )
        kinds = {
            "rewrite": (request.text,),
            "paraphrase": record.paraphrase_prompts,
            "continuation": record.continuation_prompts,
            "neighborhood": record.neighborhood_prompts,
        }
        if self.counterfact_plus:
            fact = f"{request.text} {request.target_new.strip()}. "
            kinds["neighborhood_plus"] = tuple(fact + text for text in record.neighborhood_prompts)
        if self.attributes:
            kinds["attribute"] = record.attribute_prompts
        targets = (request.target_new, request.target_true)
        return {
            kind: [(prompt, targets) for prompt in kinds[kind]] for kind in kinds if kinds[kind]
        }

    @property
    def kl_kinds(self) -> tuple[str, ...]:
        """The kinds of prompts at which the next token's distributions are compared."""
        return tuple(KL_NAMES) if self.counterfact_plus else ()

    def continued(self, record: CounterFactRecord) -> tuple[Sequence[str], int]:
        """Return the generation prompts; without them, the prompt and its paraphrases."""
        prompts = record.generation_prompts or (record.request.text, *record.paraphrase_prompts)
        return prompts, (self.seed << 32) + record.case_id

    def generated(self, record: CounterFactRecord, texts: Sequence[str]) -> GeneratedText:
        """Return a record's texts with their GE, and their RS if there are references."""
        texts = [cleaned(text) for text in texts]
        rs = self.references.consistency(record, texts) if self.references else None
        return GeneratedText(tuple(texts), fluency(texts), rs)


register_benchmark(
    Benchmark(
        name="counterfact",
        load=CounterFact.load,
        scoring=CounterFactScoring,
        kinds=dict.fromkeys(KINDS, PromptScore),
        metrics=lambda scores, before: record_metrics(scores),
        columns=NAMES,
        legend=LEGEND,
        notes=NOTES,
        s_of=S_OF,
        panels={
            "S": "score",
            "ES": "efficacy",
            "PS": "generalization",
            "NS": "specificity",
        },
    )
)
