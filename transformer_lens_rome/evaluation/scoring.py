"""The measurements on records: what is asked about each, and the scores of the answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Protocol

import torch

from transformer_lens_rome.edits.in_passes import acting_each, can_share_passes, score_edited
from transformer_lens_rome.edits.kinds import Edit
from transformer_lens_rome.edits.ledger import applied
from transformer_lens_rome.evaluation.generation import References, cleaned, fluency
from transformer_lens_rome.evaluation.metrics import KL_NAMES, AnswerScore, PromptScore
from transformer_lens_rome.evaluation.records import CounterFactRecord
from transformer_lens_rome.evaluation.rows import SCORE_OF, GeneratedText, Record, Scores
from transformer_lens_rome.evaluation.zsre import ZsreRecord
from transformer_lens_rome.model.protocol import Model
from transformer_lens_rome.prompts.continuations import continue_each
from transformer_lens_rome.prompts.encoder import Encoder, Row
from transformer_lens_rome.prompts.scores import Context, TargetScore, score_rows

Asked = Mapping[str, Sequence[tuple[str, Sequence[str]]]]
"""By kind of prompt, the prompts with the targets that are scored after each."""


_TEXTS = 64
"""The number of texts that share passes while they are written, unless one record has more."""


class Scoring(Protocol):
    """The questions about the records of one data set.

    Attributes:
        protocol: The data set's name; it selects the metrics of the results.
    """

    protocol: ClassVar[str]

    @property
    def setting(self) -> dict[str, Any]:
        """Everything else that the numbers depend on, as plain values."""
        ...

    @property
    def generates(self) -> bool:
        """True if the model writes text about each record."""
        ...

    @property
    def kl_kinds(self) -> tuple[str, ...]:
        """The kinds of prompts at which the next token's distributions are compared."""
        ...

    def asked(self, record: Any) -> Asked:
        """Return the prompts of a record, with the targets after each."""
        ...

    def continued(self, record: Any) -> tuple[Sequence[str], int]:
        """Return the prompts that the model continues, and the seed of its draws."""
        ...

    def generated(self, record: Any, texts: Sequence[str]) -> GeneratedText:
        """Return a record's texts with their GE and RS."""
        ...


@dataclass(frozen=True)
class CounterFactScoring:
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


@dataclass(frozen=True)
class ZsreScoring:
    """Score the answer to a question and its rephrasing, and the answer to an unrelated one."""

    protocol: ClassVar[str] = "zsre"

    @property
    def setting(self) -> dict[str, Any]:
        """Nothing: zsRE has no options."""
        return {}

    kl_kinds: ClassVar[tuple[str, ...]] = ()

    @property
    def generates(self) -> bool:
        """False: zsRE has no generated text."""
        return False

    def asked(self, record: ZsreRecord) -> Asked:
        """Return the three questions, each with its answer."""
        new = (record.request.target_new,)
        return {
            "rewrite": [(record.request.text, new)],
            "paraphrase": [(record.rephrase, new)],
            "neighborhood": [(record.locality_prompt, (record.locality_answer,))],
        }

    def continued(self, record: ZsreRecord) -> tuple[Sequence[str], int]:
        """Raise TypeError: zsRE has no generated text."""
        raise TypeError("zsRE has no generated text")

    def generated(self, record: ZsreRecord, texts: Sequence[str]) -> GeneratedText:
        """Raise TypeError: zsRE has no generated text."""
        raise TypeError("zsRE has no generated text")


def score_records(
    model: Model,
    encoder: Encoder,
    scoring: Scoring,
    records: Sequence[Record],
    edits: Sequence[Edit] | None = None,
) -> list[Scores]:
    """Return, for each record, the score of every prompt, by kind.

    The prompts of all records share passes. With `edits`, one for each record, a record is scored
    as with its edit on the model, and with no other; the model has no edit on it before and after.

    Raises:
        ValueError: A log-probability is not a number, or a prompt is longer than the context.
    """
    asked = [scoring.asked(record) for record in records]
    rows: list[Row] = []
    owners: list[int] = []
    for i, kinds in enumerate(asked):
        pairs = [pair for some in kinds.values() for pair in some]
        rows += [encoder.row(prompt, target=target) for prompt, all_ in pairs for target in all_]
        owners += [i] * (len(rows) - len(owners))
    if edits is None:
        row_scores = iter(score_rows(model, rows))
    else:
        row_scores = iter(score_edited(model, rows, edits, owners))
    score = SCORE_OF[scoring.protocol]
    return [_by_kind(kinds, row_scores, score) for kinds in asked]


def _by_kind(
    asked: Asked,
    row_scores: Iterator[TargetScore],
    score: type[PromptScore] | type[AnswerScore],
) -> Scores:
    """Return the scores of one record's prompts, by kind, from the scores of its rows in order."""
    scores: dict[str, list[Any]] = {}
    for kind, pairs in asked.items():
        scores[kind] = []
        for _, targets in pairs:
            by_target = [next(row_scores) for _ in targets]
            if not all(torch.isfinite(one.log_probs).all() for one in by_target):
                raise ValueError("the model gives log-probabilities that are not finite numbers")
            values = [one.log_probs for one in by_target] + [one.correct for one in by_target]
            scores[kind].append(score(*(tensor.tolist() for tensor in values)))
    return scores


def generate_texts(
    model: Model,
    encoder: Encoder,
    scoring: Scoring,
    records: Sequence[Record],
    edits: Sequence[Edit] | None = None,
) -> list[GeneratedText | None]:
    """Return the generated text of each record; None if the scoring asks for none.

    The texts of several records share passes. `edits` is as in `score_records`.
    """
    if not scoring.generates:
        return [None] * len(records)
    if edits is None or can_share_passes(model, edits):
        together = max(1, _TEXTS // max(len(scoring.continued(record)[0]) for record in records))
        acts = None if edits is None else acting_each(model, edits)
        chunks = list(torch.arange(len(records)).split(together))
        return [
            text
            for some in chunks
            for text in _generated(model, encoder, scoring, records, some.tolist(), acts)
        ]
    texts: list[GeneratedText | None] = []
    for i, edit in enumerate(edits):
        with applied(model, edit):
            texts += _generated(model, encoder, scoring, records, [i])
    return texts


def _generated(
    model: Model,
    encoder: Encoder,
    scoring: Scoring,
    records: Sequence[Record],
    some: Sequence[int],
    acts: Context | None = None,
) -> list[GeneratedText]:
    """Return the text of some records; `acts` makes the context of a pass, from owners of texts."""
    prompts, seeds = zip(*(scoring.continued(records[i]) for i in some), strict=True)
    owners = [i for i, group in zip(some, prompts, strict=True) for _ in group]
    context = nullcontext if acts is None else partial(acts, owners)
    each = continue_each(model, prompts, seeds, encoder=encoder, context=context)
    return [scoring.generated(records[i], texts) for i, texts in zip(some, each, strict=True)]
