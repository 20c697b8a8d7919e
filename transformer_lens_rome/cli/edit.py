"""Two commands: `edit` writes one fact, `edit-many` the facts of a file; both undo the edit."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import fmean
from typing import Any

from transformer_lens_rome.cli.load_model import load_model
from transformer_lens_rome.edits.export_hf import export_hf
from transformer_lens_rome.edits.kinds import EditRequest, FactoredEdit, RankOneEdit, load_edit
from transformer_lens_rome.edits.ledger import applied
from transformer_lens_rome.files.strict_json import read_json
from transformer_lens_rome.methods import get_method
from transformer_lens_rome.methods.rome import RomeConfig, compute_rome_edit
from transformer_lens_rome.model import adapter
from transformer_lens_rome.model.protocol import Model
from transformer_lens_rome.prompts.continuations import greedy_continuations
from transformer_lens_rome.prompts.encoder import Encoder
from transformer_lens_rome.prompts.scores import target_log_probs, top_tokens
from transformer_lens_rome.statistics.second_moment import SecondMoment


def add_edit_parsers(
    commands: Any, shared: argparse.ArgumentParser, layer: argparse.ArgumentParser
) -> None:
    """Add both commands to the parser of the command line."""
    edit = commands.add_parser("edit", parents=[shared, layer], help="edit a fact in any model")
    edit.add_argument("model", help="hub name, folder, or 'demo'")
    edit.add_argument("prompt", help="the prompt, with {} in place of the subject")
    edit.add_argument("subject")
    edit.add_argument("target")
    edit.add_argument("--ask", action="append", default=[], help="another prompt to compare")
    edit.add_argument(
        "--statistics", help="a second-moment file (default: cached, downloaded or collected)"
    )
    edit.add_argument("--released", action="store_true", help="the released code's configuration")
    edit.add_argument("--seed", type=int, default=0)
    edit.add_argument(
        "--diff", action="store_true", help="compare 30 generated tokens, with equal words aligned"
    )
    edit.add_argument("--save", help="file to write the edit to (safetensors)")
    edit.add_argument("--export", help="folder to write the edited checkpoint to")
    edit.set_defaults(run=run_edit)

    many = commands.add_parser("edit-many", parents=[shared], help="write many facts by one edit")
    many.add_argument("model", help="hub name, folder, or 'demo'")
    many.add_argument(
        "facts", help="JSON list of objects with prompt ({} for the subject), subject, target_new"
    )
    many.add_argument("--method", choices=("memit", "emmet", "alphaedit"), default="memit")
    many.add_argument("--layers", type=int, nargs="+", help="blocks to edit, from 0")
    many.add_argument(
        "--statistics", nargs="+", help="second-moment files, one for each layer (see `edit`)"
    )
    many.add_argument("--skip-failed", action="store_true", help="leave out facts that fail")
    many.add_argument("--seed", type=int, default=0)
    many.add_argument("--save", help="file to write the edit to (safetensors)")
    many.add_argument("--export", help="folder to write the edited checkpoint to")
    many.set_defaults(run=run_edit_many)


def run_edit(options: argparse.Namespace) -> dict[str, Any]:
    """Edit one fact in any model, save or export the edit, undo it."""
    request = EditRequest(options.prompt, options.subject, options.target)
    _check_export(options)
    model = load_model(options.model, options.model_class, device=options.device)
    moment = SecondMoment.load(options.statistics) if options.statistics else None
    ask = [("asked", prompt) for prompt in options.ask]
    return edit_and_undo(model, request, options.layer, moment, ask, options, options.save)


def run_edit_many(options: argparse.Namespace) -> dict[str, Any]:
    """Write the facts of a file by one edit, save or export the edit, undo it."""
    _check_export(options)
    items = read_json(options.facts)
    if not isinstance(items, list):
        raise ValueError(f"{options.facts} contains no list of facts")
    requests = [EditRequest.of(item) for item in items]
    model = load_model(options.model, options.model_class, device=options.device)
    known: dict[str, Any] = {"layers": options.layers, "skip_failed": options.skip_failed}
    if options.statistics:
        moments = [SecondMoment.load(path) for path in options.statistics]
        known["second_moments"] = {moment.layer: moment for moment in moments}
    method: Any = get_method(options.method, progress=not options.json, **known)
    started = time.perf_counter()
    edit = method.compute_many(model, requests, seed=options.seed)
    seconds = time.perf_counter() - started
    if options.save:
        edit.save(options.save)
    hashes = {
        where: adapter.weight_hash(adapter.w_out(model, where.layer)) for where in edit.hashes
    }
    with applied(model, edit):
        if options.export:
            export_hf(model, options.export)
    undone = {
        where: adapter.weight_hash(adapter.w_out(model, where.layer)) for where in edit.hashes
    }
    facts = edit.health.facts
    report = {
        "model": adapter.model_name(model),
        "model_class": adapter.model_class(model),
        "method": options.method,
        "layers": [where.layer for where in edit.hashes],
        "written": len(edit.requests),
        "left out": edit.provenance["failed"],
        "P(target)": {
            "before": fmean(fact.p_before for fact in facts),
            "after": fmean(fact.p_after for fact in facts),
        },
        "health": {name: x for name, x in edit.health.to_dict().items() if name != "facts"},
        "byte_identical": hashes == undone,
        "seconds": {"edit": round(seconds, 1)},
    }
    if options.save:
        same = load_edit(options.save).digest == edit.digest
        report["file"] = {"bytes": Path(options.save).stat().st_size, "reloads_equal": same}
    return report


def _hashes(model: Model, edit: FactoredEdit) -> list[str]:
    """Return the sha256 of every matrix that an edit changes."""
    return [adapter.weight_hash(adapter.w_out(model, where.layer)) for where in edit.factors]


def _check_export(options: argparse.Namespace) -> None:
    """Raise ValueError if a model of this class cannot be exported."""
    if options.export and options.model_class == "hooked":
        raise ValueError(
            "a HookedTransformer has no Hugging Face model to export; use --model-class bridge, "
            "or export_hf(model, folder, hf_model=...) in Python"
        )


def edit_and_undo(
    model: Model,
    request: EditRequest,
    layer: int | None,
    moment: SecondMoment | None,
    ask: list[tuple[str, str]],
    options: argparse.Namespace,
    save: Any,
) -> dict[str, Any]:
    """Compute, save, apply, compare and undo one edit; return a report of plain values."""
    config = RomeConfig.released() if getattr(options, "released", False) else RomeConfig()
    started = time.perf_counter()
    edit = compute_rome_edit(
        model,
        request,
        layer=layer,
        second_moment=moment,
        config=config,
        seed=getattr(options, "seed", 0),
        progress=not options.json,
    )
    seconds = time.perf_counter() - started
    ask = [("edited prompt", request.text), *ask]
    if save is not None:
        edit.save(save)
    hash_before = adapter.weight_hash(adapter.w_out(model, edit.layer))
    diff = bool(getattr(options, "diff", False))
    before = _answers(model, request, ask, diff)
    with applied(model, edit):
        after = _answers(model, request, ask, diff)
        if getattr(options, "export", None):
            export_hf(model, options.export)
    hash_undone = adapter.weight_hash(adapter.w_out(model, edit.layer))
    report = {
        "model": adapter.model_name(model),
        "model_class": adapter.model_class(model),
        "layer": edit.layer,
        "request": f"{request.text} -> {request.target_new}",
        "answers": [b | {"after": a["before"]} for b, a in zip(before, after, strict=True)],
        "health": edit.health.to_dict(),
        "undo": {"sha256_before": hash_before, "sha256_after_undo": hash_undone},
        "byte_identical": hash_before == hash_undone,
        "seconds": {"edit": round(seconds, 1)},
    }
    if save is not None:
        same = RankOneEdit.load(save).digest == edit.digest
        report["file"] = {"bytes": Path(save).stat().st_size, "reloads_equal": same}
    return report


def _answers(
    model: Model, request: EditRequest, ask: list[tuple[str, str]], diff: bool
) -> list[dict[str, Any]]:
    """Return the top next token, P(target) and the greedy continuation for each prompt."""
    encoder = Encoder.of(model)
    prompts = [prompt for _, prompt in ask]
    targets = [request.target_new] * len(ask)
    scores = target_log_probs(model, prompts, targets, encoder=encoder)
    texts = greedy_continuations(model, prompts, 30 if diff else 12, encoder=encoder)
    answers = []
    for (label, prompt), score, text in zip(ask, scores, texts, strict=True):
        (token, p), *_ = top_tokens(model, prompt, 1, encoder=encoder)
        numbers = {"top": token, "p_top": p, "p_target": score.sum().exp().item(), "text": text}
        known = {"label": label, "prompt": prompt} | ({"diff": True} if diff else {})
        answers.append(known | {"before": numbers})
    return answers
