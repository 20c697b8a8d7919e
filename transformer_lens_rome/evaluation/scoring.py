"""What is measured on one record: pure functions of a model, a record and a method.

One record knows nothing of the others, so records may be scored in any order and on any machine.
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
    """How the records of one data set are scored.

    Attributes:
        protocol: The data set's name, by which results know their metrics.
    """

    protocol: ClassVar[str]

    def __call__(self, model: Any, encoder: Encoder, record: Any) -> dict[str, Any]:
        """The raw numbers of a record, as the model is now, as plain values."""
        ...


@dataclass(frozen=True)
class CounterFactScoring:
    """Both targets after every prompt of a record; text about its subject, if asked for.

    Attributes:
        attributes: Score the attribute prompts too.
        generate: Also generate text, for GE, and RS where there are references.
        references: What RS compares with.
        seed: For sampling; each record has its own draws.
    """

    protocol: ClassVar[str] = "counterfact"
    attributes: bool = False
    generate: bool = False
    references: References | None = None
    seed: int = 0

    def __call__(self, model: Any, encoder: Encoder, record: CounterFactRecord) -> dict[str, Any]:
        """`metrics.PromptScore` of every prompt, by kind; `"generation"` if asked for.

        Raises:
            ValueError: a log-probability is not a number, or a prompt is longer than the context.
        """
        request = record.request
        kinds = {
            "rewrite": (request.text,),
            "paraphrase": record.paraphrase_prompts,
            "neighborhood": record.neighborhood_prompts,
        }
        if self.attributes:
            kinds["attribute"] = record.attribute_prompts
        targets = (request.target_new, request.target_true)
        asked = {kind: [(prompt, targets) for prompt in kinds[kind]] for kind in kinds}
        found: dict[str, Any] = {"scores": score_prompts(model, encoder, asked)}
        if self.generate:
            found["generation"] = self._generation(model, encoder, record)
        return found

    def _generation(
        self, model: Any, encoder: Encoder, record: CounterFactRecord
    ) -> dict[str, Any]:
        own = (record.request.text, *record.paraphrase_prompts)
        prompts = record.generation_prompts or own
        seed = (self.seed << 32) + record.case_id
        texts = sample_continuations(model, prompts, seed=seed, encoder=encoder)
        texts = [cleaned(text) for text in texts]
        found: dict[str, Any] = {"texts": texts, "GE": fluency(texts)}
        if self.references is not None:
            if (rs := self.references.consistency(record, texts)) is not None:
                found["RS"] = rs
        return found


@dataclass(frozen=True)
class ZsreScoring:
    """The answer after a question and its rephrasing, and the answer to an unrelated question."""

    protocol: ClassVar[str] = "zsre"

    def __call__(self, model: Any, encoder: Encoder, record: ZsreRecord) -> dict[str, Any]:
        """Log-probabilities and correctness of every answer's tokens, by kind.

        Raises:
            ValueError: as for CounterFact.
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
    """For every prompt: log-probabilities of each target's tokens, then their correctness.

    Raises:
        ValueError: a log-probability is not a number, or a prompt is longer than the context.
    """
    rows = [
        encoder.row(prompt, target=target)
        for pairs in asked.values()
        for prompt, targets in pairs
        for target in targets
    ]
    found = iter(score_rows(model, rows))
    scores: dict[str, list[list[Any]]] = {}
    for kind, pairs in asked.items():
        scores[kind] = []
        for _, targets in pairs:
            each = [next(found) for _ in targets]
            if not all(torch.isfinite(score.log_probs).all() for score in each):
                raise ValueError("the model gives log-probabilities that are not numbers")
            values = [score.log_probs for score in each] + [score.correct for score in each]
            scores[kind].append([tensor.tolist() for tensor in values])
    return scores


def score_unedited(
    model: Any, encoder: Encoder, record: Record, scoring: Scoring
) -> dict[str, Any]:
    """One record's row of the unedited model; one that cannot be scored says why."""
    started = time.perf_counter()
    try:
        found = scoring(model, encoder, record)
    except ValueError as error:  # it cannot be scored, so its edit cannot be either
        return {"failed": f"ValueError: {error}"}
    return {**found, "seconds": round(time.perf_counter() - started, 3)}


def score_edited(
    model: Any,
    encoder: Encoder,
    record: Record,
    scoring: Scoring,
    method: EditMethod,
    fingerprint: Fingerprint,
    seed: int = 0,
) -> dict[str, Any]:
    """One record's row with its edit on the model; a failed edit is reported, not raised.

    Raises:
        RuntimeError: the model is not what it was afterwards, or the device failed.
        NotImplementedError: the method cannot edit this model.
    """
    what = f"record {record.case_id}"
    started = time.perf_counter()
    try:
        edit = method.compute(model, record.request, seed=seed)
        seconds = time.perf_counter() - started
        with applied(model, edit):
            found = scoring(model, encoder, record)
    except NotImplementedError:
        raise  # of the model, so of every record
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if _is_the_devices(error):
            raise
        logger.warning("%s: %s: %s", what, type(error).__name__, error)
        found = {"failed": f"{type(error).__name__}: {error}"}
    fingerprint.check(model, what)
    if "failed" in found:
        return found
    health = {k: v for k, v in edit.health.to_dict().items() if k != "losses"}
    total = time.perf_counter() - started
    times = {"seconds": round(total, 3), "edit_seconds": round(seconds, 3)}
    return {**found, **times, "health": health}


def _is_the_devices(error: Exception) -> bool:
    """Out of memory and the like: no fault of the record, which may succeed another time."""
    kinds = (torch.cuda.OutOfMemoryError, getattr(torch, "AcceleratorError", ()), MemoryError)
    return isinstance(error, kinds) or "CUDA error" in str(error)
