"""Edit, score, undo, record by record (Meng et al. 2022, section 3.4).

Records are independent. The edit of a record is made on the unedited model, all its prompts are
scored before and after with both targets, and the weights are restored byte by byte before the next
record. The raw log-probabilities are saved, so every metric can be computed again without a run.

Choices that the paper and the released code leave open:

- Probabilities are geometric means over target tokens, as in the released code.
- Prompt and target are separated by character offsets in the tokens of the whole text.
- Attribute prompts are scored only with `attributes=True`.
- Intervals use the real number of records; S has a bootstrap interval.
- A record whose edit fails is saved with the reason and counted; averages leave it out.
- The unedited model is scored once, for all methods.
- Text is generated with a seed. A record without generation prompts is continued from its prompt
  and paraphrases.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from transformer_lens_rome.distributed import in_order, on_workers
from transformer_lens_rome.edits.ledger import check_unedited
from transformer_lens_rome.evaluation.generation import References
from transformer_lens_rome.evaluation.records import CounterFactRecord
from transformer_lens_rome.evaluation.results import UNEDITED, Results
from transformer_lens_rome.evaluation.rows import row_checker
from transformer_lens_rome.evaluation.scoring import (
    CounterFactScoring,
    Record,
    Scoring,
    ZsreScoring,
    score_edited,
    score_unedited,
)
from transformer_lens_rome.evaluation.zsre import ZsreRecord
from transformer_lens_rome.files.run_file import RunFile
from transformer_lens_rome.methods.base import EditMethod, described, get_method
from transformer_lens_rome.model import adapter
from transformer_lens_rome.model.calls import model_call
from transformer_lens_rome.model.fingerprint import Fingerprint
from transformer_lens_rome.prompts.encoder import Encoder


@model_call
def evaluate_counterfact(
    model: Any,
    records: Sequence[CounterFactRecord],
    method: str | EditMethod | None,
    *,
    out: Any = None,
    seed: int = 0,
    generate: bool = False,
    references: References | None = None,
    attributes: bool = False,
    prepend_bos: bool | None = None,
    workers: int = 1,
    ray_address: str | None = None,
    progress: bool = True,
) -> Results:
    """Score a method on CounterFact; the model is left as it was.

    Args:
        model: A HookedTransformer or TransformerBridge without edits on it.
        records: From `CounterFact.load`.
        method: A method or its registered name. None: the unedited model.
        out: A file (`.jsonl`) to which each record's numbers are written as soon as they are known.
            A stopped run continues from it, with the same or more records. Scores of the unedited
            model are saved in the same folder, in `unedited.jsonl`, for all methods.
        seed: The seed of the method's draws and of generated text.
        generate: Also generate text, for GE (needs the `generation` extra).
        references: Reference texts, for RS; without them there is no RS.
        attributes: Also score the attribute prompts.
        prepend_bos: Overrides the checkpoint's BOS rule, for scoring.
        workers: The number of copies of the model that run in parallel, on Ray (the `distributed`
            extra).
        ray_address: The address of an existing Ray cluster. None: the cluster that this process is
            connected to, or else a cluster on this machine for this call.
        progress: Show a progress bar.

    Raises:
        ValueError: There are no records, the method was trained on some of them, there are edits
            on the model, or `out` contains another run.
        ImportError: An extra is not installed.
        RuntimeError: A weight has changed after a record; the run stops there.
    """
    if references is not None and not generate:
        raise ValueError("references are for generated text; pass generate=True too")
    scoring = CounterFactScoring(attributes, generate, references, seed)
    setting: dict[str, Any] = {"attributes": attributes, "generate": generate}
    if generate:
        setting["references"] = references.digest if references else None
        setting["generation_seed"] = seed
    options = _Options(out, seed, prepend_bos, workers, ray_address, progress)
    return _evaluate(model, records, method, scoring, setting, options)


@model_call
def evaluate_zsre(
    model: Any,
    records: Sequence[ZsreRecord],
    method: str | EditMethod | None,
    *,
    out: Any = None,
    seed: int = 0,
    prepend_bos: bool | None = None,
    workers: int = 1,
    ray_address: str | None = None,
    progress: bool = True,
) -> Results:
    """Score a method on zsRE with its metrics; the arguments are as in `evaluate_counterfact`."""
    options = _Options(out, seed, prepend_bos, workers, ray_address, progress)
    return _evaluate(model, records, method, ZsreScoring(), {}, options)


class _Options(NamedTuple):
    """Arguments that both data sets share; see `evaluate_counterfact`."""

    out: Any
    seed: int
    prepend_bos: bool | None
    workers: int
    ray_address: str | None
    progress: bool


def _evaluate(
    model: Any,
    records: Sequence[Record],
    method: str | EditMethod | None,
    scoring: Scoring,
    setting: Mapping[str, Any],
    options: _Options,
) -> Results:
    """Score the unedited model, then the method."""
    out, seed, prepend_bos, workers, ray_address, progress = options
    _check(model, records, workers)
    encoder, fingerprint = Encoder.of(model, prepend_bos), Fingerprint.of(model)
    editor = get_method(method) if isinstance(method, str) else method
    if prepared := getattr(editor, "prepared", None):
        editor = prepared(model, seed=seed)
        fingerprint.check(model, "the method was prepared")
    _check_unseen(editor, records)
    shared: dict[str, Any] = {
        "protocol": scoring.protocol,
        "model": adapter.model_name(model),
        "model_hash": fingerprint.digest,
        "prepend_bos": encoder.prepends_bos,
        **setting,
    }
    several = workers > 1 or ray_address is not None
    each = partial(on_workers, workers, ray_address, model) if several else partial(in_order, model)
    run = partial(_run, records, each, progress)
    unedited = partial(score_unedited, encoder=encoder, scoring=scoring)
    unedited_path = None if out is None else Path(out).with_name(UNEDITED)
    if editor is None:
        if out is not None and Path(out) != unedited_path:
            raise ValueError(
                f"scores of the unedited model need a file with the name {UNEDITED}, got {out}"
            )
        with _opened(unedited_path, shared) as file:
            before = run(unedited, file)
        return Results("unedited", shared, before, {})
    edited = shared | {"seed": seed, "method": described(editor)}
    name = edited["method"]["name"]
    with _opened(out, edited) as file:  # first, so that a wrong file is rejected before any work
        with _opened(unedited_path, shared) as unedited_file:
            before = run(unedited, unedited_file)
        work = partial(
            score_edited,
            encoder=encoder,
            scoring=scoring,
            method=editor,
            fingerprint=fingerprint,
            seed=seed,
        )
        after = run(work, file, name)
    fingerprint.check(model, "the run")
    return Results(name, edited, before, after)


def _check(model: Any, records: Sequence[Record], workers: int) -> None:
    if not records:
        raise ValueError("there are no records to evaluate; see CounterFact.load")
    if len({record.case_id for record in records}) != len(records):
        raise ValueError("two records have the same case_id; give each record another one")
    if workers < 1:
        raise ValueError(f"workers must be 1 or more, got {workers}")
    check_unedited(model)


def _check_unseen(method: EditMethod | None, records: Sequence[Record]) -> None:
    """Raise ValueError if a trained method was trained on some of the records."""
    if has_seen := getattr(method, "has_seen", None):
        if seen := [record.case_id for record in records if has_seen(record)]:
            raise ValueError(
                f"the editor was trained on {len(seen)} of these records (case_id {seen[:5]}...); "
                "evaluate it on other records"
            )


def _opened(path: Any, setting: Mapping[str, Any]) -> AbstractContextManager[RunFile | None]:
    return nullcontext() if path is None else RunFile(path, setting, _versions(), row_checker)


def _run(
    records: Sequence[Record],
    each: Callable[..., Any],
    progress: bool,
    work: Callable[..., dict[str, Any]],
    file: RunFile | None,
    name: str = "unedited",
) -> dict[int, dict[str, Any]]:
    """Return every record's row, from the run's file, or computed and written to the file."""
    digests = {record.case_id: record_digest(record) for record in records}
    done = dict(file.rows) if file else {}
    for case, digest in digests.items():
        if file and case in done and done[case].get("record") != digest:
            raise ValueError(f"{file.path} contains another record {case}; give another file")
    missing = [record for record in records if record.case_id not in done]
    counts = {"total": len(records), "initial": len(records) - len(missing)}
    with tqdm(desc=name, disable=not progress, **counts) as bar:
        for record, numbers in each(work, missing):
            row = {"case_id": record.case_id, "record": digests[record.case_id], **numbers}
            row = json.loads(json.dumps(row))  # the same values as after reading the file
            done[record.case_id] = row
            if file:
                file.append(row)
            bar.update()
    return {case: done[case] for case in digests}


def record_digest(record: Record) -> str:
    """Return the first sixteen digits of the sha256 of all fields of a record."""
    text = json.dumps(asdict(record), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformer-lens", "transformers")}
