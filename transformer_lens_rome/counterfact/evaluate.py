"""Edit, score, undo, record by record (Meng et al. 2022, section 3.4).

Every record is by itself: its edit is made on the unedited model, all its prompts are scored before
and after with both targets, and the weights are the old bytes again before the next record. What is
kept are the raw log-probabilities, so every metric can be computed again without a run.

Where the released code leaves a choice: probabilities are geometric means over target tokens, as
there; prompt and target are told apart by character offsets in the tokens of the whole text;
attribute prompts are scored with `attributes=True` only; intervals take the real number of records,
and S has a bootstrap's; a record whose edit fails is kept with the reason, counted, and in no
average; the unedited model is scored once, for all methods.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from transformer_lens_rome import adapter
from transformer_lens_rome.counterfact.records import CounterFactRecord
from transformer_lens_rome.counterfact.results import Results
from transformer_lens_rome.counterfact.run_file import RunFile
from transformer_lens_rome.ledger import active_edits, applied
from transformer_lens_rome.methods import EditMethod, described, get_method
from transformer_lens_rome.prompts import Encoder, score_rows

logger = logging.getLogger(__name__)


def evaluate_counterfact(
    model: Any,
    records: Sequence[CounterFactRecord],
    method: str | EditMethod | None,
    *,
    out: Any = None,
    seed: int = 0,
    attributes: bool = False,
    prepend_bos: bool | None = None,
    progress: bool = True,
) -> Results:
    """Score a method on CounterFact; the model is afterwards what it was.

    Args:
        model: A HookedTransformer or TransformerBridge in eval mode, without edits on it.
        records: From `CounterFact.load`.
        method: A method or its registered name; None: the unedited model.
        out: A file (`.jsonl`) that gets every record's numbers as they come. A run that was stopped
            goes on where it was, with these or more records. Scores of the unedited model are
            kept beside it, in `unedited.jsonl`, for all methods.
        seed: For what a method draws.
        attributes: Also score the attribute prompts.
        prepend_bos: Overrides the checkpoint's own rule, for scoring.
        progress: Show a progress bar.

    Raises:
        ValueError: no records, edits on the model, or `out` holds another run.
        RuntimeError: a weight is not what it was after a record; the run stops there.
    """
    if not records:
        raise ValueError("there are no records to evaluate; see CounterFact.load")
    if isinstance(method, str):
        method = get_method(method)
    _check_model(model)
    encoder, hashes = Encoder.of(model, prepend_bos), weight_hashes(model)
    shared = {
        "model": adapter.model_name(model),
        "model_hash": hashlib.sha256("".join(hashes).encode()).hexdigest(),
        "prepend_bos": encoder.prepends_bos,
        "attributes": attributes,
    }

    def score(record: CounterFactRecord) -> dict[str, Any]:
        started = time.perf_counter()
        try:
            found = score_record(model, encoder, record, attributes=attributes)
        except ValueError as error:  # it cannot be scored, so its edit cannot be either
            return {"failed": f"ValueError: {error}"}
        return {"scores": found, "seconds": round(time.perf_counter() - started, 3)}

    beside = None if out is None else Path(out).with_name("unedited.jsonl")
    before = _run(records, score, shared, beside, "unedited", progress)
    if method is None:
        return Results("unedited", shared, before, {})
    if prepared := getattr(method, "prepared", None):
        method = prepared(model, seed=seed)
    setting = shared | {"seed": seed, "method": described(method)}
    chosen = method

    def edit(record: CounterFactRecord) -> dict[str, Any]:
        options = {"seed": seed, "attributes": attributes}
        return edit_record(model, encoder, record, chosen, hashes, **options)

    name = setting["method"]["name"]
    after = _run(records, edit, setting, out, name, progress)
    check_untouched(model, hashes, "the run")
    return Results(name, setting, before, after)


def edit_record(
    model: Any,
    encoder: Encoder,
    record: CounterFactRecord,
    method: EditMethod,
    hashes: Sequence[str],
    *,
    seed: int = 0,
    attributes: bool = False,
) -> dict[str, Any]:
    """One record's scores with its edit on the model; a failed edit is reported, not raised.

    Raises:
        RuntimeError: the weights are not those of the hashes afterwards.
    """
    what = f"record {record.case_id}"
    started = time.perf_counter()
    try:
        edit = method.compute(model, record.request, seed=seed)
        seconds = time.perf_counter() - started
        with applied(model, edit):
            scores = score_record(model, encoder, record, attributes=attributes)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        logger.warning("%s: %s: %s", what, type(error).__name__, error)
        check_untouched(model, hashes, what)
        return {"failed": f"{type(error).__name__}: {error}"}
    check_untouched(model, hashes, what, [edit.layer])
    health = {k: v for k, v in edit.health.to_dict().items() if k != "losses"}
    total = time.perf_counter() - started
    return {
        "scores": scores,
        "seconds": round(total, 3),
        "edit_seconds": round(seconds, 3),
        "health": health,
    }


def score_record(
    model: Any, encoder: Encoder, record: CounterFactRecord, *, attributes: bool = False
) -> dict[str, list[list[Any]]]:
    """`metrics.PromptScore` of every prompt, by kind, as the model is now.

    Raises:
        ValueError: a log-probability is not a number, or a prompt is longer than the context.
    """
    request = record.request
    kinds = {
        "rewrite": (request.text,),
        "paraphrase": record.paraphrase_prompts,
        "neighborhood": record.neighborhood_prompts,
    }
    if attributes:
        kinds["attribute"] = record.attribute_prompts
    rows = [
        encoder.row(prompt, target=target)
        for prompts in kinds.values()
        for prompt in prompts
        for target in (request.target_new, request.target_true)
    ]
    found = iter(score_rows(model, rows))
    scores = {}
    for kind, prompts in kinds.items():
        scores[kind] = []
        for _ in prompts:
            new, true = next(found), next(found)
            if not (torch.isfinite(new.log_probs).all() and torch.isfinite(true.log_probs).all()):
                raise ValueError("the model gives log-probabilities that are not numbers")
            pairs = (new.log_probs, true.log_probs, new.correct, true.correct)
            scores[kind].append([values.tolist() for values in pairs])
    return scores


def _run(
    records: Sequence[CounterFactRecord],
    work: Callable[[CounterFactRecord], dict[str, Any]],
    setting: Mapping[str, Any],
    out: Any,
    name: str,
    progress: bool,
) -> dict[int, dict[str, Any]]:
    """Every record's row, read from the run's file or made and written to it."""
    with ExitStack() as stack:
        file = None
        if out is not None:
            file = stack.enter_context(RunFile(out, setting, _versions()))
        done = dict(file.rows) if file else {}
        for record in tqdm(records, desc=name, disable=not progress):
            digest = record_digest(record)
            if (row := done.get(record.case_id)) is not None:
                if row.get("record") != digest:
                    raise ValueError(
                        f"{out} holds another record {record.case_id}; give another file"
                    )
                continue
            row = {"case_id": record.case_id, "record": digest, **work(record)}
            row = json.loads(json.dumps(row))  # as it will be when it is read
            done[record.case_id] = row
            if file:
                file.append(row)
        return {record.case_id: done[record.case_id] for record in records}


def record_digest(record: CounterFactRecord) -> str:
    """Sixteen digits of the sha256 of all that a record holds."""
    text = json.dumps(dataclasses.asdict(record), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _check_model(model: Any) -> None:
    adapter.check_evaluating(model)
    for layer in range(model.cfg.n_layers):
        if active_edits(model, layer):
            raise ValueError("there are edits on the model; take them off with revert_all(model)")


def weight_hashes(model: Any) -> list[str]:
    """sha256 of each layer's W_out."""
    return [adapter.weight_hash(adapter.w_out(model, i)) for i in range(model.cfg.n_layers)]


def check_untouched(
    model: Any, hashes: Sequence[str], after: str, layers: Sequence[int] | None = None
) -> None:
    """Raise a RuntimeError if a W_out is not what it was."""
    for layer in range(len(hashes)) if layers is None else layers:
        if adapter.weight_hash(adapter.w_out(model, layer)) != hashes[layer]:
            raise RuntimeError(f"W_out of layer {layer} is not what it was, after {after}")


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformer-lens", "transformers")}
