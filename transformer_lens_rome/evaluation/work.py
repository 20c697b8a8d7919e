"""The work of a run on some records: edit each, score it, undo; functions of a model.

Records are independent of each other, so they may be processed in any order, on any machine, and
several at a time: their edits are searched in one batch, and scored in shared passes. A method for
many facts may instead write a batch of records by one edit; then the batches are independent.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

from transformer_lens_rome.edits.kinds import Edit
from transformer_lens_rome.edits.ledger import applied
from transformer_lens_rome.evaluation.benchmarks import Record, Scores
from transformer_lens_rome.evaluation.contexts import parted
from transformer_lens_rome.evaluation.divergence import divergences
from transformer_lens_rome.evaluation.rows import GeneratedText, RecordRow, record_digest
from transformer_lens_rome.evaluation.scoring import Scoring, generate_texts, score_records
from transformer_lens_rome.evaluation.several import edit_of
from transformer_lens_rome.files.fields import as_read
from transformer_lens_rome.methods.base import EditMethod
from transformer_lens_rome.methods.batches import tried
from transformer_lens_rome.model.fingerprint import Fingerprint
from transformer_lens_rome.model.protocol import Model
from transformer_lens_rome.prompts.encoder import Encoder

logger = logging.getLogger(__name__)

FAILURES = (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError)
"""The errors that fail one record and not the run."""


class Scored(NamedTuple):
    """The raw numbers of a record: scores by kind of prompt, and what else was asked for."""

    scores: Scores
    generation: GeneratedText | None
    kl: Mapping[str, Sequence[float]] | None = None


@dataclass(frozen=True)
class ScoreUnedited:
    """Makes the rows of records with the unedited model; it can be pickled, for workers.

    Attributes:
        scoring: What is asked about a record.
        encoder: Encodes the prompts of the scoring.
        counts: Whether a record counts, from its scores; None: all do.
    """

    scoring: Scoring
    encoder: Encoder
    counts: Callable[[Scores], bool] | None = None

    def __call__(self, model: Model, records: Sequence[Record]) -> list[RecordRow]:
        """Return the rows; a record that cannot be scored gets the reason, and fails alone."""
        started = time.perf_counter()

        each = tried(partial(self._scored, model), records)
        seconds = _seconds_each(started, records)
        return [_row(record, one, seconds=seconds) for record, one in zip(records, each)]

    def _scored(self, model: Model, records: Sequence[Record]) -> list[Scored]:
        """Score records; ask everything only about those that count."""
        scores: list[Scores] = []
        chosen = list(range(len(records)))
        if self.counts is not None and self.scoring.first is not None:
            scores = score_records(model, self.encoder, self.scoring.first, records)
            chosen = [i for i in chosen if self.counts(scores[i])]
        some = [records[i] for i in chosen]
        more = score_records(model, self.encoder, self.scoring, some)
        by_record = {**dict(enumerate(scores)), **dict(zip(chosen, more, strict=True))}
        texts = generate_texts(model, self.encoder, self.scoring, records)
        return [Scored(by_record[i], text) for i, text in enumerate(texts)]


@dataclass(frozen=True)
class ScoreEdited:
    """Edits each record and scores it as with its edit on the model; it can be pickled.

    Attributes:
        scoring: What is asked about a record.
        encoder: Encodes the prompts of the scoring.
        method: Makes the edits.
        fingerprint: The state of the model before the run.
        seed: The seed of the method's draws.
        batch_size: The largest number of searches that share passes; None: as memory allows.
    """

    scoring: Scoring
    encoder: Encoder
    method: EditMethod
    fingerprint: Fingerprint
    seed: int = 0
    batch_size: int | None = None

    def __call__(self, model: Model, records: Sequence[Record]) -> list[RecordRow]:
        """Return the rows; a failed edit is reported in its row, not raised.

        Raises:
            RuntimeError: The model differs afterwards, or the device failed.
            NotImplementedError: The method cannot edit this model.
        """
        started = time.perf_counter()
        each: list[Any] = self._edits(model, records)
        edit_seconds = _seconds_each(started, records)
        edited = {i: edit for i, edit in enumerate(each) if isinstance(edit, Edit)}

        def score(some: Sequence[int]) -> list[Scored]:
            return self._scored(model, [records[i] for i in some], [edited[i] for i in some])

        for i, one in zip(edited, tried(score, list(edited), FAILURES), strict=True):
            each[i] = one
        self.fingerprint.check(model, _label(records))
        seconds = _seconds_each(started, records)
        rows = []
        for i, (record, one) in enumerate(zip(records, each, strict=True)):
            known: dict[str, Any] = {"seconds": seconds, "edit_seconds": edit_seconds}
            if i in edited:
                health = edited[i].health.to_dict()
                known["health"] = as_read({k: v for k, v in health.items() if k != "losses"})
            rows.append(_row(record, one, **known))
        return rows

    def _edits(self, model: Model, records: Sequence[Record]) -> list[Edit | Exception]:
        """Return the edit of each record, or why there is none."""
        compute_each = getattr(self.method, "compute_each", None)
        single = all(len(self.scoring.requests(record)) == 1 for record in records)
        if compute_each is not None and single and len(records) > 1:

            def together(some: Sequence[Record]) -> list[Any]:
                requests = [request for one in some for request in self.scoring.requests(one)]
                options = {"seed": self.seed, "batch_size": self.batch_size}
                return list(compute_each(model, requests, **options))

            return tried(together, records, FAILURES)

        def one(some: Sequence[Record]) -> list[Edit]:
            (record,) = some
            return [edit_of(self.method, model, self.scoring.requests(record), seed=self.seed)]

        edits = []
        for record in records:
            edits += tried(one, [record], FAILURES)
            self.fingerprint.check(model, _label([record]))
        return edits

    def _scored(
        self, model: Model, records: Sequence[Record], edits: Sequence[Edit]
    ) -> list[Scored]:
        """Score records, and generate their text, each as with its edit on the model."""
        scores = score_records(model, self.encoder, self.scoring, records, edits)
        texts = generate_texts(model, self.encoder, self.scoring, records, edits)
        kinds = [compared(self.scoring, record) for record in records]
        kls = divergences(model, self.encoder, kinds, edits)
        parts = zip(scores, texts, kls, strict=True)
        return [Scored(one, text, kl or None) for one, text, kl in parts]


@dataclass(frozen=True)
class ScoreTogether:
    """Writes the facts of all its records by one edit, and scores each record with it on the model.

    It can be pickled, for workers. The fields are those of `ScoreEdited`.
    """

    scoring: Scoring
    encoder: Encoder
    method: Any
    fingerprint: Fingerprint
    seed: int = 0

    def __call__(self, model: Model, records: Sequence[Record]) -> list[RecordRow]:
        """Return the rows; if there is no edit, or it leaves out a record, the rows say why.

        Raises:
            RuntimeError: The model differs afterwards, or the device failed.
            NotImplementedError: The method cannot edit this model.
        """
        started = time.perf_counter()
        (edit,) = tried(partial(self._edit, model), [records], FAILURES)
        self.fingerprint.check(model, _label(records))
        seconds: dict[str, Any] = {"edit_seconds": _seconds_each(started, records)}
        each: list[Any] = [edit] * len(records)
        facts: dict[int, Any] = {}
        if isinstance(edit, Edit):
            each, facts = self._scored(model, records, edit)
            self.fingerprint.check(model, _label(records))
        seconds["seconds"] = _seconds_each(started, records)
        rows = []
        for i, (record, one) in enumerate(zip(records, each, strict=True)):
            health = {} if i not in facts else {"health": as_read(facts[i])}
            rows.append(_row(record, one, **seconds, **health))
        return rows

    def _edit(self, model: Model, some: Sequence[Sequence[Record]]) -> list[Edit]:
        """Return the edit of the only batch."""
        (records,) = some
        requests = [request for record in records for request in self.scoring.requests(record)]
        return [self.method.compute_many(model, requests, seed=self.seed)]

    def _scored(
        self, model: Model, records: Sequence[Record], edit: Edit
    ) -> tuple[list[Scored | Exception], dict[int, Any]]:
        """Return the scores of each record, or the error, and the health of those written."""
        facts_of = [self.scoring.requests(record) for record in records]
        written = [i for i, facts in enumerate(facts_of) if set(facts) <= set(edit.requests)]
        each: list[Any] = [ValueError("the edit of its batch leaves it out")] * len(records)
        whole = {k: v for k, v in edit.health.to_dict().items() if k not in ("losses", "facts")}
        healths = dict(zip(edit.requests, map(asdict, edit.health.facts)))

        def score(some: Sequence[int]) -> list[Scored]:
            chosen = [records[i] for i in some]
            _, on_weights = parted([edit], 1)
            given = None if on_weights else [edit] * len(chosen)
            known = (model, self.encoder, self.scoring, chosen, given)
            with applied(model, *(on_weights or ())):
                scores = score_records(*known, edited=True)
                texts = generate_texts(*known)
            asked = [compared(self.scoring, record) for record in chosen]
            kls = divergences(model, self.encoder, asked, [edit] * len(chosen))
            parts = zip(scores, texts, kls, strict=True)
            return [Scored(one, text, kl or None) for one, text, kl in parts]

        for i, one in zip(written, tried(score, written, FAILURES), strict=True):
            each[i] = one
        return each, {i: healths.get(facts_of[i][0], whole) for i in written}


def compared(scoring: Scoring, record: Record) -> dict[str, list[str]]:
    """Return the prompts after which the next token's distributions are compared, by kind."""
    asked = scoring.asked(record) if scoring.kl_kinds else {}
    kinds = [kind for kind in scoring.kl_kinds if kind in asked]
    return {kind: [prompt for prompt, _ in asked[kind]] for kind in kinds}


def _row(record: Record, one: Scored | Exception, **known: Any) -> RecordRow:
    """Return the row of a record from its numbers, or from the error that it failed with."""
    digest = record_digest(record)
    if isinstance(one, Exception):
        failed = f"{type(one).__name__}: {one}"
        logger.warning("%s: %s", _label([record]), failed)
        return RecordRow(record.case_id, digest, failed=failed)
    return RecordRow(record.case_id, digest, *one, **known)


def _label(records: Sequence[Record]) -> str:
    """Return the name of some records for messages."""
    cases = ", ".join(str(record.case_id) for record in records)
    return f"record{'s' if len(records) > 1 else ''} {cases}"


def _seconds_each(started: float, records: Sequence[Record]) -> float:
    """Return the seconds since a moment of the clock for each record, to the millisecond."""
    return round((time.perf_counter() - started) / len(records), 3)
