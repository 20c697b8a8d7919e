"""A run: some records at a time are edited and scored, and their rows are written.

The edit of a record is made on the unedited model, so records are independent of each other. With
`together`, a batch of records has one edit, made on the unedited model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from transformer_lens_rome.distributed import in_order, on_workers
from transformer_lens_rome.edits.ledger import check_unedited
from transformer_lens_rome.evaluation.benchmarks import Record, get_benchmark
from transformer_lens_rome.evaluation.results import UNEDITED, Results
from transformer_lens_rome.evaluation.rows import RecordRow, record_digest, row_reader
from transformer_lens_rome.evaluation.scoring import Scoring
from transformer_lens_rome.evaluation.work import ScoreEdited, ScoreTogether, ScoreUnedited
from transformer_lens_rome.files.run_file import RunFile
from transformer_lens_rome.methods.base import EditMethod, described, get_method
from transformer_lens_rome.methods.batches import free_memory
from transformer_lens_rome.model import adapter
from transformer_lens_rome.model.fingerprint import Fingerprint
from transformer_lens_rome.model.protocol import Model
from transformer_lens_rome.prompts.encoder import Encoder

Work = Callable[[Any, Sequence[Record]], list[RecordRow]]
"""Makes the rows of some records with a model."""
File = RunFile[RecordRow]


@dataclass(frozen=True)
class Run:
    """One method on the records of one data set; `evaluate_counterfact` describes the fields."""

    model: Model
    records: Sequence[Record]
    method: str | EditMethod | None
    scoring: Scoring
    out: Any = None
    seed: int = 0
    prepend_bos: bool | None = None
    workers: int = 1
    ray_address: str | None = None
    progress: bool = True
    batch_size: int | None = None
    together: int | None = None

    def results(self) -> Results:
        """Score every record with the unedited model, then with its edit on the model."""
        self._check()
        encoder, fingerprint = Encoder.of(self.model, self.prepend_bos), Fingerprint.of(self.model)
        method = self._prepared_method(fingerprint)
        unedited = {
            "protocol": self.scoring.protocol,
            "model": adapter.model_name(self.model),
            "model_hash": fingerprint.digest,
            "prepend_bos": encoder.prepends_bos,
            **self.scoring.setting,
        }
        if method is None:
            before = self._before(encoder, unedited)
            return Results("unedited", unedited, before, {}, self._data())
        edited = unedited | {"seed": self.seed, "method": described(method)} | self._batches()
        edited |= self.scoring.edit_setting
        name = edited["method"]["name"]
        known = self.scoring, encoder, method, fingerprint, self.seed
        work: Work = ScoreEdited(*known, self.batch_size)
        if self.together is not None:
            work = ScoreTogether(*known)
        with _opened(
            self.out, edited, self._data()
        ) as file:  # first: a wrong file is rejected before any work
            before = self._before(encoder, unedited)
            after = self._rows(work, file, name, self._without_edit(before))
        fingerprint.check(self.model, "the run")
        return Results(name, edited, before, after, self._data())

    def _batches(self) -> dict[str, Any]:
        """Return what identifies the batches of facts that are written together, if any are.

        The scores of a record depend on the others of its batch.
        """
        if self.together is None:
            return {}
        digests = "".join(record_digest(record) for record in self.records)
        every = hashlib.sha256(digests.encode()).hexdigest()
        return {"together": self.together, "records": every}

    def _data(self) -> dict[str, str]:
        """Return the sha256 of the file of records, if it is known, and their schema."""
        known = {name: getattr(self.records, name, "") for name in ("digest", "schema")}
        if not known["schema"] and self.scoring.protocol == "counterfact":
            flat = any(getattr(record, "continuation_prompts", ()) for record in self.records)
            known["schema"] = "flat" if flat else "published"
        return {"sha256": known["digest"], "schema": known["schema"]}

    def _check(self) -> None:
        """Raise ValueError if the arguments do not go together, before any work."""
        if not self.records:
            raise ValueError("there are no records to evaluate; see CounterFact.load")
        if len({record.case_id for record in self.records}) != len(self.records):
            raise ValueError("two records have the same case_id; give each record another one")
        for name in ("workers", "batch_size", "together"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise ValueError(f"{name} must be 1 or more, got {number}")
        if self.method is None and self.out is not None and Path(self.out).name != UNEDITED:
            raise ValueError(
                f"scores of the unedited model need a file with the name {UNEDITED}, where the "
                f"runs of all methods in its folder look for them; pass "
                f"{Path(self.out).with_name(UNEDITED)}, got {self.out}"
            )
        check_unedited(self.model)

    def _prepared_method(self, fingerprint: Fingerprint) -> EditMethod | None:
        """Return the method with all that its edits share; reject records it was trained on."""
        method = get_method(self.method) if isinstance(self.method, str) else self.method
        if self.together is not None and not hasattr(method, "compute_many"):
            raise ValueError(
                f"together={self.together} needs a method that writes many facts at once, such as "
                f"'memit', got {getattr(method, 'name', method)!r}"
            )
        if prepared := getattr(method, "prepared", None):
            method = prepared(self.model, seed=self.seed)
            fingerprint.check(self.model, "the method was prepared")
        if has_seen := getattr(method, "has_seen", None):
            if seen := [record.case_id for record in self.records if has_seen(record)]:
                raise ValueError(
                    f"the editor was trained on {len(seen)} of these records (case_id "
                    f"{seen[:5]}...); evaluate it on other records"
                )
        return method

    def _before(self, encoder: Encoder, setting: Mapping[str, Any]) -> dict[int, RecordRow]:
        """Score every record with the unedited model; all methods of a folder share its file."""
        path = None if self.out is None else Path(self.out).with_name(UNEDITED)
        with _opened(path, setting, self._data()) as file:
            counts = get_benchmark(self.scoring.protocol).counts
            return self._rows(ScoreUnedited(self.scoring, encoder, counts), file, "unedited")

    def _without_edit(self, before: Mapping[int, RecordRow]) -> list[RecordRow]:
        """Return the rows of records that are not edited, because they do not count."""
        counts = get_benchmark(self.scoring.protocol).counts
        if counts is None:
            return []
        rows = []
        for row in before.values():
            if row.scores is None:
                reason = f"the unedited model cannot be scored: {row.failed}"
                rows.append(RecordRow(row.case_id, row.record, failed=reason))
            elif not counts(row.scores):
                rows.append(RecordRow(row.case_id, row.record, unmet=True))
        return rows

    def _rows(
        self, work: Work, file: File | None, name: str, known: Sequence[RecordRow] = ()
    ) -> dict[int, RecordRow]:
        """Return every record's row: from the run's file, of those known, or computed."""
        rows = self._written_rows(file) if file else {}
        given = {row.case_id for row in known}
        missing = [one for one in self.records if one.case_id not in rows.keys() | given]
        counts = {"total": len(self.records), "initial": len(rows)}
        counted = [record for record in self.records if record.case_id not in given]
        with tqdm(desc=name, disable=not self.progress, **counts) as bar:
            for row in chain(known, self._computed_rows(work, missing, counted)):
                if row.case_id in rows:  # written before its batch was stopped half-way
                    continue
                rows[row.case_id] = row
                if file:
                    file.append(row)
                bar.update()
        return {record.case_id: rows[record.case_id] for record in self.records}

    def _written_rows(self, file: File) -> dict[int, RecordRow]:
        """Return the rows of these records that the file contains; reject rows of others."""
        rows = {}
        for record in self.records:
            if row := file.rows.get(record.case_id):
                if row.record != record_digest(record):
                    raise ValueError(
                        f"{file.path} contains another record {record.case_id}; give another file"
                    )
                rows[record.case_id] = row
        return rows

    def _computed_rows(
        self, work: Work, records: Sequence[Record], counted: Sequence[Record]
    ) -> Iterator[RecordRow]:
        """Yield the row of each record as soon as it is known, in any order.

        `counted` are all records that are edited, of which batches are made with `together`.
        """
        size = max(1, min(self._size(work), -(-len(records) // self.workers)))
        chunks = [records[i : i + size] for i in range(0, len(records), size)]
        if isinstance(work, ScoreTogether) and self.together is not None:  # the same in every run
            starts = range(0, len(counted), self.together)
            whole = [counted[i : i + self.together] for i in starts]
            ids = {record.case_id for record in records}
            chunks = [some for some in whole if any(one.case_id in ids for one in some)]
        if self.workers > 1 or self.ray_address is not None:
            pairs = on_workers(self.workers, self.ray_address, self.model, work, chunks)
        else:
            pairs = in_order(self.model, work, chunks)
        return (row for _, rows in pairs for row in rows)

    def _size(self, work: Work) -> int:
        """Return the number of records that are processed together.

        The default for a method that computes single edits is one, since a stopped run computes
        the edits of the records that were not written again. Others have as many as leave room
        for edits of the size of their matrix.
        """
        if self.batch_size is not None:
            return self.batch_size
        if isinstance(work, ScoreEdited) and not hasattr(work.method, "compute_each"):
            return 1
        cfg = self.model.cfg
        edit_bytes = 4 * (cfg.d_mlp or 4 * cfg.d_model) * cfg.d_model
        room = int(free_memory(self.model) / (8 * edit_bytes))
        most = 16 if next(self.model.parameters()).device.type == "cpu" else 64
        return max(1, min(most, room))


def _opened(
    path: Any, setting: Mapping[str, Any], data: Mapping[str, str]
) -> AbstractContextManager[File | None]:
    """Open the file of a run, if there is one."""
    if path is None:
        return nullcontext()
    versions = {name: version(name) for name in ("torch", "transformer-lens", "transformers")}
    return RunFile(path, setting, versions | {"data": dict(data)}, row_reader)
