"""The measurements on one record: pure functions of a model, a record and a method.

Records are independent of each other, so they may be scored in any order and on any machine.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import torch

from transformer_lens_rome.edits.ledger import applied
from transformer_lens_rome.evaluation.generation import References, cleaned, fluency
from transformer_lens_rome.evaluation.metrics import AnswerScore, PromptScore
from transformer_lens_rome.evaluation.records import CounterFactRecord
from transformer_lens_rome.evaluation.rows import (
    GeneratedText,
    Record,
    RecordRow,
    Scores,
    record_digest,
)
from transformer_lens_rome.evaluation.zsre import ZsreRecord
from transformer_lens_rome.files.fields import as_read
from transformer_lens_rome.methods.base import EditMethod
from transformer_lens_rome.model.fingerprint import Fingerprint
from transformer_lens_rome.model.protocol import Model
from transformer_lens_rome.prompts.encoder import Encoder
from transformer_lens_rome.prompts.sampling import sample_continuations
from transformer_lens_rome.prompts.scores import score_rows

logger = logging.getLogger(__name__)

S = TypeVar("S", PromptScore, AnswerScore)


class Scored(NamedTuple):
    """The raw numbers of a record with the model as it is.

    Attributes:
        scores: By kind of prompt, the score of each prompt.
        generation: The generated text, if text was asked for.
    """

    scores: Scores
    generation: GeneratedText | None = None


class Scoring(Protocol):
    """A function that scores the records of one data set.

    Attributes:
        protocol: The data set's name; it selects the metrics of the results.
    """

    protocol: ClassVar[str]

    @property
    def setting(self) -> dict[str, Any]:
        """Everything else that the numbers depend on, as plain values."""
        ...

    def __call__(self, model: Model, encoder: Encoder, record: Any) -> Scored:
        """Return the raw numbers of a record with the model as it is now."""
        ...


@dataclass(frozen=True)
class CounterFactScoring:
    """Score both targets after every prompt of a record, and optionally generated text.

    Attributes:
        attributes: Score the attribute prompts too.
        generate: Also generate text about the subject, for GE, and for RS if there are references.
        references: The reference texts of RS.
        seed: The seed of sampling; the draws of a record depend on it and on `case_id` only.
    """

    protocol: ClassVar[str] = "counterfact"
    attributes: bool = False
    generate: bool = False
    references: References | None = None
    seed: int = 0

    @property
    def setting(self) -> dict[str, Any]:
        """The options, and what generated text depends on."""
        setting: dict[str, Any] = {"attributes": self.attributes, "generate": self.generate}
        if self.generate:
            setting["references"] = self.references.digest if self.references else None
            setting["generation_seed"] = self.seed
        return setting

    def __call__(self, model: Model, encoder: Encoder, record: CounterFactRecord) -> Scored:
        """Return the score of every prompt, by kind, and optionally generated text.

        Raises:
            ValueError: The record has no true target, a log-probability is not a number, or a
                prompt is longer than the context.
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
            "neighborhood": record.neighborhood_prompts,
        }
        if self.attributes:
            kinds["attribute"] = record.attribute_prompts
        targets = (request.target_new, request.target_true)
        asked = {kind: [(prompt, targets) for prompt in kinds[kind]] for kind in kinds}
        scores = score_prompts(model, encoder, asked, PromptScore)
        return Scored(scores, self._generated(model, encoder, record) if self.generate else None)

    def _generated(
        self, model: Model, encoder: Encoder, record: CounterFactRecord
    ) -> GeneratedText:
        """Return generated texts with their GE and RS."""
        prompts = record.generation_prompts or (record.request.text, *record.paraphrase_prompts)
        seed = (self.seed << 32) + record.case_id
        texts = sample_continuations(model, prompts, seed=seed, encoder=encoder)
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

    def __call__(self, model: Model, encoder: Encoder, record: ZsreRecord) -> Scored:
        """Return log-probabilities and correctness of every answer's tokens, by kind.

        Raises:
            ValueError: A log-probability is not a number, or a prompt is longer than the context.
        """
        new = (record.request.target_new,)
        asked = {
            "rewrite": [(record.request.text, new)],
            "paraphrase": [(record.rephrase, new)],
            "neighborhood": [(record.locality_prompt, (record.locality_answer,))],
        }
        return Scored(score_prompts(model, encoder, asked, AnswerScore))


def score_prompts(
    model: Model,
    encoder: Encoder,
    asked: Mapping[str, Sequence[tuple[str, Sequence[str]]]],
    score: type[S],
) -> dict[str, list[S]]:
    """Return the score of every prompt, by kind.

    `asked` has, by kind, prompts with the targets after each of them. `score` makes a prompt's
    score of the log-probabilities of each target, then the correctness of each.

    Raises:
        ValueError: A log-probability is not a number, or a prompt is longer than the context.
    """
    rows = [
        encoder.row(prompt, target=target)
        for pairs in asked.values()
        for prompt, targets in pairs
        for target in targets
    ]
    row_scores = iter(score_rows(model, rows))
    scores: dict[str, list[S]] = {}
    for kind, pairs in asked.items():
        scores[kind] = []
        for _, targets in pairs:
            by_target = [next(row_scores) for _ in targets]
            if not all(torch.isfinite(one.log_probs).all() for one in by_target):
                raise ValueError("the model gives log-probabilities that are not finite numbers")
            values = [one.log_probs for one in by_target] + [one.correct for one in by_target]
            scores[kind].append(score(*(tensor.tolist() for tensor in values)))
    return scores


@dataclass(frozen=True)
class ScoreUnedited:
    """Makes a record's row with the unedited model; it can be pickled, for workers."""

    scoring: Scoring
    encoder: Encoder

    def __call__(self, model: Model, record: Record) -> RecordRow:
        """Return the row, with the reason if scoring fails."""
        started = time.perf_counter()
        row = partial(RecordRow, record.case_id, record_digest(record))
        try:
            scored = self.scoring(model, self.encoder, record)
        except ValueError as error:  # the edited model could not be scored either
            return row(failed=f"ValueError: {error}")
        return row(*scored, seconds=_since(started))


@dataclass(frozen=True)
class ScoreEdited:
    """Edits the model, makes a record's row, and undoes the edit; it can be pickled, for workers.

    Attributes:
        scoring: Scores the record.
        encoder: Encodes the prompts of the scoring.
        method: Makes the edits.
        fingerprint: The state of the model before the run.
        seed: The seed of the method's draws.
    """

    scoring: Scoring
    encoder: Encoder
    method: EditMethod
    fingerprint: Fingerprint
    seed: int = 0

    def __call__(self, model: Model, record: Record) -> RecordRow:
        """Return the row; a failed edit is reported in it, not raised.

        Raises:
            RuntimeError: The model differs afterwards, or the device failed.
            NotImplementedError: The method cannot edit this model.
        """
        label = f"record {record.case_id}"
        row = partial(RecordRow, record.case_id, record_digest(record))
        failed = None
        started = time.perf_counter()
        try:
            edit = self.method.compute(model, record.request, seed=self.seed)
            edit_seconds = _since(started)
            with applied(model, edit):
                scored = self.scoring(model, self.encoder, record)
        except NotImplementedError:
            raise  # the model cannot be edited, so every record would fail
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            if _is_device_fault(error):
                raise
            failed = f"{type(error).__name__}: {error}"
            logger.warning("%s: %s", label, failed)
        self.fingerprint.check(model, label)
        if failed is not None:
            return row(failed=failed)
        health = as_read({k: v for k, v in edit.health.to_dict().items() if k != "losses"})
        return row(*scored, seconds=_since(started), edit_seconds=edit_seconds, health=health)


def _since(started: float) -> float:
    """Return the seconds since a moment of the clock, to the millisecond."""
    return round(time.perf_counter() - started, 3)


def _is_device_fault(error: Exception) -> bool:
    """Return whether the device failed, as when out of memory; the record may succeed later."""
    kinds = (torch.cuda.OutOfMemoryError, getattr(torch, "AcceleratorError", ()), MemoryError)
    return isinstance(error, kinds) or "CUDA error" in str(error)
