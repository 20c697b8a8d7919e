"""Edit, score, undo, record by record (Meng et al. 2022, section 3.4).

Every record is by itself: its edit is made on the unedited model, all its prompts are scored before
and after with both targets, and the weights are the old bytes again before the next record. What is
kept are the raw log-probabilities, so every metric can be computed again without a run.

Where the released code leaves a choice: probabilities are geometric means over target tokens, as
there; prompt and target are told apart by character offsets in the tokens of the whole text;
attribute prompts are scored with `attributes=True` only; intervals take the real number of records,
and S has a bootstrap's; a record whose edit fails is kept with the reason, counted, and in no
average; the unedited model is scored once, for all methods; text is generated with a seed, and
after the record's prompt and paraphrases where it has no generation prompts.
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
from typing import Any

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
    """Score a method on CounterFact; the model is afterwards what it was.

    Args:
        model: A HookedTransformer or TransformerBridge without edits on it.
        records: From `CounterFact.load`.
        method: A method or its registered name; None: the unedited model.
        out: A file (`.jsonl`) that gets every record's numbers as they come. A run that was stopped
            goes on where it was, with these or more records. Scores of the unedited model are
            kept beside it, in `unedited.jsonl`, for all methods.
        seed: For what a method draws, and for generated text.
        generate: Also generate text, for GE (needs the `generation` extra).
        references: Reference texts, for RS; without them there is no RS.
        attributes: Also score the attribute prompts.
        prepend_bos: Overrides the checkpoint's own rule, for scoring.
        workers: How many copies of the model work side by side, on Ray (the `distributed` extra).
        ray_address: An existing Ray cluster's; None: the one that this process is connected to,
            else one on this machine, for this call.
        progress: Show a progress bar.

    Raises:
        ValueError: no records, records that a trained method has seen, edits on the model, or
            `out` holds another run.
        ImportError: an extra is not installed.
        RuntimeError: a weight is not what it was after a record; the run stops there.
    """
    if references is not None and not generate:
        raise ValueError("references are for generated text; pass generate=True too")
    scoring = CounterFactScoring(attributes, generate, references, seed)
    setting = {"attributes": attributes, "generate": generate}
    if generate:
        setting["references"] = references.digest if references else None
        setting["generation_seed"] = seed
    options = {"out": out, "seed": seed, "prepend_bos": prepend_bos, "progress": progress}
    options |= {"workers": workers, "ray_address": ray_address}
    return _evaluate(model, records, method, scoring, setting, **options)


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
    """The same on zsRE, with its own metrics; the arguments are those of CounterFact."""
    options = {"out": out, "seed": seed, "prepend_bos": prepend_bos, "progress": progress}
    options |= {"workers": workers, "ray_address": ray_address}
    return _evaluate(model, records, method, ZsreScoring(), {}, **options)


def _evaluate(
    model: Any,
    records: Sequence[Record],
    method: str | EditMethod | None,
    scoring: Scoring,
    setting: Mapping[str, Any],
    *,
    out: Any,
    seed: int,
    prepend_bos: bool | None,
    workers: int,
    ray_address: str | None,
    progress: bool,
) -> Results:
    """Both runs: the unedited model's, and the method's."""
    _check(model, records, workers)
    encoder, fingerprint = Encoder.of(model, prepend_bos), Fingerprint.of(model)
    if isinstance(method, str):
        method = get_method(method)
    if prepared := getattr(method, "prepared", None):
        method = prepared(model, seed=seed)
        fingerprint.check(model, "the method was prepared")
    _check_unseen(method, records)
    shared = {
        "protocol": scoring.protocol,
        "model": adapter.model_name(model),
        "model_hash": fingerprint.digest,
        "prepend_bos": encoder.prepends_bos,
        **setting,
    }
    several = workers > 1 or ray_address is not None
    each = partial(on_workers, workers, ray_address, model) if several else partial(in_order, model)
    run = partial(_run, records, each, progress)
    known = {"encoder": encoder, "scoring": scoring}
    beside = None if out is None else Path(out).with_name(UNEDITED)
    if method is None:
        if out is not None and Path(out) != beside:
            raise ValueError(f"scores of the unedited model go to a file of the name {UNEDITED}")
        with _opened(beside, shared) as file:
            before = run(partial(score_unedited, **known), file)
        return Results("unedited", shared, before, {})
    edited = shared | {"seed": seed, "method": described(method)}
    with _opened(out, edited) as file:  # first, so that a wrong file is refused before any work
        with _opened(beside, shared) as other:
            before = run(partial(score_unedited, **known), other)
        known |= {"method": method, "fingerprint": fingerprint, "seed": seed}
        after = run(partial(score_edited, **known), file, edited["method"]["name"])
    fingerprint.check(model, "the run")
    return Results(edited["method"]["name"], edited, before, after)


def _check(model: Any, records: Sequence[Record], workers: int) -> None:
    if not records:
        raise ValueError("there are no records to evaluate; see CounterFact.load")
    if len({record.case_id for record in records}) != len(records):
        raise ValueError("two records have the same case_id; number them anew")
    if workers < 1:
        raise ValueError(f"workers must be 1 or more, got {workers}")
    check_unedited(model)


def _check_unseen(method: EditMethod | None, records: Sequence[Record]) -> None:
    """Refuse to score a trained method on what it was trained on."""
    if has_seen := getattr(method, "has_seen", None):
        if seen := [record.case_id for record in records if has_seen(record)]:
            raise ValueError(
                f"the editor was trained on {len(seen)} of these records (case_id {seen[:5]}...); "
                "evaluate it on others"
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
    """Every record's row, read from the run's file or made and written to it."""
    digests = {record.case_id: record_digest(record) for record in records}
    done = dict(file.rows) if file else {}
    for case, digest in digests.items():
        if case in done and done[case].get("record") != digest:
            raise ValueError(f"{file.path} holds another record {case}; give another file")
    missing = [record for record in records if record.case_id not in done]
    counts = {"total": len(records), "initial": len(records) - len(missing)}
    with tqdm(desc=name, disable=not progress, **counts) as bar:
        for record, found in each(work, missing):
            row = {"case_id": record.case_id, "record": digests[record.case_id], **found}
            row = json.loads(json.dumps(row))  # as it will be when it is read
            done[record.case_id] = row
            if file:
                file.append(row)
            bar.update()
    return {case: done[case] for case in digests}


def record_digest(record: Record) -> str:
    """Sixteen digits of the sha256 of all that a record holds."""
    text = json.dumps(asdict(record), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformer-lens", "transformers")}
