"""The measurements on one record: pure functions of a model, a record and a method.

Records are independent of each other, so they may be scored in any order and on any machine.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch

from transformer_lens_rome.edits.ledger import applied
from transformer_lens_rome.evaluation.generation import References, cleaned, fluency
from transformer_lens_rome.evaluation.records import CounterFactRecord
from transformer_lens_rome.evaluation.zsre import ZsreRecord
from transformer_lens_rome.methods.base import EditMethod
from transformer_lens_rome.model.fingerprint import Fingerprint
from transformer_lens_rome.prompts.encoder import Encoder
from transformer_lens_rome.prompts.sampling import sample_continuations
from transformer_lens_rome.prompts.scores import score_rows

logger = logging.getLogger(__name__)

Record = CounterFactRecord | ZsreRecord


class Scoring(Protocol):
    """A function that scores the records of one data set.

    Attributes:
        protocol: The data set's name; it selects the metrics of the results.
    """

    protocol: ClassVar[str]

    def __call__(self, model: Any, encoder: Encoder, record: Any) -> dict[str, Any]:
        """Return the raw numbers of a record with the model as it is now, as plain values."""
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

    def __call__(self, model: Any, encoder: Encoder, record: CounterFactRecord) -> dict[str, Any]:
        """Return `metrics.PromptScore` of every prompt, by kind, and optionally `"generation"`.

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
        numbers: dict[str, Any] = {"scores": score_prompts(model, encoder, asked)}
        if self.generate:
            numbers["generation"] = self._generation(model, encoder, record)
        return numbers

    def _generation(
        self, model: Any, encoder: Encoder, record: CounterFactRecord
    ) -> dict[str, Any]:
        """Return generated texts with their GE and RS."""
        prompts = record.generation_prompts or (record.request.text, *record.paraphrase_prompts)
        seed = (self.seed << 32) + record.case_id
        texts = sample_continuations(model, prompts, seed=seed, encoder=encoder)
        texts = [cleaned(text) for text in texts]
        numbers: dict[str, Any] = {"texts": texts, "GE": fluency(texts)}
        if self.references is not None:
            if (rs := self.references.consistency(record, texts)) is not None:
                numbers["RS"] = rs
        return numbers


@dataclass(frozen=True)
class ZsreScoring:
    """Score the answer to a question and its rephrasing, and the answer to an unrelated one."""

    protocol: ClassVar[str] = "zsre"

    def __call__(self, model: Any, encoder: Encoder, record: ZsreRecord) -> dict[str, Any]:
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
        return {"scores": score_prompts(model, encoder, asked)}


def score_prompts(
    model: Any, encoder: Encoder, asked: Mapping[str, Sequence[tuple[str, Sequence[str]]]]
) -> dict[str, list[list[Any]]]:
    """Return for every prompt the log-probabilities of each target's tokens, then correctness.

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
    scores: dict[str, list[list[Any]]] = {}
    for kind, pairs in asked.items():
        scores[kind] = []
        for _, targets in pairs:
            by_target = [next(row_scores) for _ in targets]
            if not all(torch.isfinite(score.log_probs).all() for score in by_target):
                raise ValueError("the model gives log-probabilities that are not finite numbers")
            values = [s.log_probs for s in by_target] + [s.correct for s in by_target]
            scores[kind].append([tensor.tolist() for tensor in values])
    return scores


def score_unedited(
    model: Any, encoder: Encoder, record: Record, scoring: Scoring
) -> dict[str, Any]:
    """Return one record's row for the unedited model, with the reason if scoring fails."""
    started = time.perf_counter()
    try:
        numbers = scoring(model, encoder, record)
    except ValueError as error:  # the edited model could not be scored either
        return {"failed": f"ValueError: {error}"}
    return {**numbers, "seconds": round(time.perf_counter() - started, 3)}


def score_edited(
    model: Any,
    encoder: Encoder,
    record: Record,
    scoring: Scoring,
    method: EditMethod,
    fingerprint: Fingerprint,
    seed: int = 0,
) -> dict[str, Any]:
    """Return one record's row for the edited model; a failed edit is reported, not raised.

    Raises:
        RuntimeError: The model differs afterwards, or the device failed.
        NotImplementedError: The method cannot edit this model.
    """
    label = f"record {record.case_id}"
    started = time.perf_counter()
    try:
        edit = method.compute(model, record.request, seed=seed)
        seconds = time.perf_counter() - started
        with applied(model, edit):
            numbers = scoring(model, encoder, record)
    except NotImplementedError:
        raise  # the model cannot be edited, so every record would fail
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if _is_device_fault(error):
            raise
        logger.warning("%s: %s: %s", label, type(error).__name__, error)
        numbers = {"failed": f"{type(error).__name__}: {error}"}
    fingerprint.check(model, label)
    if "failed" in numbers:
        return numbers
    health = {k: v for k, v in edit.health.to_dict().items() if k != "losses"}
    total = time.perf_counter() - started
    times = {"seconds": round(total, 3), "edit_seconds": round(seconds, 3)}
    return {**numbers, **times, "health": health}


def _is_device_fault(error: Exception) -> bool:
    """Return whether the device failed, as when out of memory; the record may succeed later."""
    kinds = (torch.cuda.OutOfMemoryError, getattr(torch, "AcceleratorError", ()), MemoryError)
    return isinstance(error, kinds) or "CUDA error" in str(error)
