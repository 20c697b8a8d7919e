"""Sequential editing: many facts, one after another, with a guard against model collapse.

Each edit is made on the model with the earlier edits on it. After each edit, the mean negative
log-likelihood (NLL) of held-out text, in nats a token, is measured; its exponential is the
perplexity. Two rises are computed:

    rise by one edit     NLL(after this edit) - NLL(before this edit)
    rise by all edits    NLL(after this edit) - NLL(of the unedited model)

A `Guard` sets a limit for each. An edit above the first limit is undone, and the sequence continues
without it. An edit above the second limit is undone, and the sequence ends. Both undo exactly. The
first limit detects single edits that disable a model (Gupta et al. 2024, arXiv:2403.07175). The
second detects the slow drift caused by many good edits.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from transformer_lens_rome.edits.kinds import EditRequest, load_edit
from transformer_lens_rome.edits.ledger import AppliedEdit, apply_edit, check_unedited, revert_all
from transformer_lens_rome.files.fields import make
from transformer_lens_rome.files.run_file import RunFile
from transformer_lens_rome.methods.base import EditMethod, described, get_method
from transformer_lens_rome.model import adapter
from transformer_lens_rome.model.calls import model_call
from transformer_lens_rome.model.fingerprint import Fingerprint
from transformer_lens_rome.prompts.encoder import Encoder, Row
from transformer_lens_rome.prompts.held_out import held_out_nll, held_out_rows

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Guard:
    """Limits on the damage that a sequence of edits may do to a model.

    Attributes:
        one_edit: Largest rise of the held-out NLL by one edit, nats a token.
        all_edits: Largest rise by all edits, over the unedited model, nats a token.
    """

    one_edit: float = 0.05
    all_edits: float = 0.2

    def __post_init__(self) -> None:
        if not (self.one_edit > 0 and self.all_edits > 0):
            raise ValueError(f"a guard's limits must be positive, got {self}")


@dataclass(frozen=True)
class Step:
    """One request of a sequence.

    Attributes:
        number: The request's number, from 1.
        request: The request.
        nll: Held-out NLL with this edit on the model, nats a token; None if no edit was made or
            the NLL was not finite.
        kept: Whether the edit was kept on the model.
        reason: The reason why it was not kept.
        p_after: Probability of the target just after the edit; None if the method does not measure
            it.
        relative_norm: ||delta W|| / ||W||; None if the method does not measure it.
    """

    number: int
    request: EditRequest
    nll: float | None
    kept: bool
    reason: str = ""
    p_after: float | None = None
    relative_norm: float | None = None


@dataclass(frozen=True)
class EditSequence:
    """A sequence of edits on a model; `revert()`, or the end of a `with` block, undoes them.

    Attributes:
        model: The edited model.
        nll: Held-out NLL of the unedited model, nats a token.
        steps: The steps in order, one for each request that was tried.
        applied: The edits that were kept on the model, in order.
        stopped: The reason why the sequence ended before its last request; empty if it did not.
    """

    model: Any = field(repr=False)
    nll: float
    steps: tuple[Step, ...] = field(repr=False)
    applied: AppliedEdit = field(repr=False)
    stopped: str = ""

    def revert(self) -> None:
        """Undo all edits; the weights are restored byte by byte."""
        self.applied.revert()

    def __enter__(self) -> EditSequence:
        return self

    def __exit__(self, *_: object) -> None:
        self.revert()


@model_call
def edit_in_sequence(
    model: Any,
    requests: Sequence[EditRequest | Mapping[str, Any]],
    method: str | EditMethod = "rome",
    *,
    texts: Sequence[str],
    guard: Guard | None = Guard(),
    folder: Any = None,
    seed: int = 0,
    prepend_bos: bool | None = None,
    progress: bool = True,
) -> EditSequence:
    """Write facts one after another, and undo each edit that does too much damage.

    Args:
        model: A HookedTransformer or TransformerBridge without edits on it.
        requests: The facts to write.
        method: A method or its registered name.
        texts: Held-out texts on which damage is measured; a few hundred tokens are enough.
        guard: The limits. None: keep every edit after which the NLL is finite.
        folder: A folder for the kept edits and `steps.jsonl`. A sequence that was stopped, or gets
            more requests, continues from this folder.
        seed: The seed of the method's draws.
        prepend_bos: Overrides the checkpoint's BOS rule, for the held-out texts.
        progress: Show a progress bar.

    Raises:
        ValueError: There are no requests, the texts have fewer than two tokens, there are edits on
            the model, the folder belongs to another sequence, or the method rejects the first
            request. If it rejects a later request, the step records the reason and the next
            request is tried. On an error the model is left as it was.
    """
    parsed = [_as_request(request) for request in requests]
    if not parsed:
        raise ValueError("the list of requests is empty; give at least one EditRequest")
    check_unedited(model)
    encoder = Encoder.of(model, prepend_bos)
    rows = held_out_rows(encoder, texts)
    editor = get_method(method) if isinstance(method, str) else method
    if prepared := getattr(editor, "prepared", None):
        editor = prepared(model, seed=seed)
    with _steps_file(model, encoder, editor, guard, rows, seed, folder) as file:
        run = _Run(model, editor, guard, rows, seed, file)
        return run.edit_all(parsed, progress)


def _as_request(request: EditRequest | Mapping[str, Any]) -> EditRequest:
    return request if isinstance(request, EditRequest) else EditRequest.from_dict(request)


# ---------------------------------------------------------------- the run


@dataclass
class _Run:
    """The data that all steps of a sequence share."""

    model: Any
    method: EditMethod
    guard: Guard | None
    rows: list[Row]
    seed: int
    file: RunFile | None

    def edit_all(self, requests: list[EditRequest], progress: bool) -> EditSequence:
        """Do all steps; on an error undo every edit."""
        first = last = held_out_nll(self.model, self.rows)
        steps: list[Step] = []
        kept: list[AppliedEdit] = []
        stopped = ""
        try:
            bar = tqdm(requests, desc="edits", disable=not progress)
            for number, request in enumerate(bar, 1):
                step, done = self._step(number, request, first, last)
                steps.append(step)
                if done is not None:
                    if step.nll is None:
                        raise ValueError(f"step {number} is kept without an NLL; {_OTHER}")
                    kept.append(done)
                    last = step.nll
                elif self.guard and step.nll is not None and step.nll - last <= self.guard.one_edit:
                    stopped = f"request {number}: {step.reason}"
                    break
        except BaseException:
            revert_all(self.model)  # no other edits were on the model
            raise
        together = AppliedEdit.of(self.model, kept)
        return EditSequence(self.model, first, tuple(steps), together, stopped)

    def _step(
        self, number: int, request: EditRequest, first: float, last: float
    ) -> tuple[Step, AppliedEdit | None]:
        """Make one edit, or read it from the folder, then keep or undo it."""
        if self.file and (row := self.file.rows.get(number)) is not None:
            return self._read_step(self.file, row, request)
        try:
            edit = self.method.compute(self.model, request, seed=self.seed)
        except ValueError as error:  # the next request may still work, unless this is the first
            if number == 1:
                raise
            logger.warning("request %d gives no edit: %s", number, error)
            return self._write_step(Step(number, request, None, False, f"no edit: {error}")), None
        done = apply_edit(self.model, edit)
        with ExitStack() as undo:
            undo.enter_context(done)
            nll = held_out_nll(self.model, self.rows)
            reason = _refusal(self.guard, nll, last, first)
            step = Step(
                number,
                request,
                nll if math.isfinite(nll) else None,
                not reason,
                reason,
                edit.health.p_after,
                edit.health.relative_norm,
            )
            if step.kept and self.file:
                edit.save(_edit_path(self.file, number))
            self._write_step(step)
            if step.kept:
                undo.pop_all()
                return step, done
        logger.warning("request %d: %s; its edit was undone", number, reason)
        return step, None

    def _read_step(
        self, file: RunFile, row: Mapping[str, Any], request: EditRequest
    ) -> tuple[Step, AppliedEdit | None]:
        """Return a step of an earlier run, and apply its saved edit if it was kept."""
        step = _as_step(row)
        if step.request != request:
            raise ValueError(f"{file.path} contains another request {step.number}; {_OTHER}")
        if not step.kept:
            return step, None
        return step, apply_edit(self.model, load_edit(_edit_path(file, step.number)))

    def _write_step(self, step: Step) -> Step:
        """Append a step to the file, if there is one."""
        if self.file:
            self.file.append(dataclasses.asdict(step))
        return step


def _edit_path(file: RunFile, number: int) -> Path:
    return file.path.parent / f"{number:05d}.safetensors"


_OTHER = "give another folder"


def _refusal(guard: Guard | None, nll: float, last: float, first: float) -> str:
    """Return the reason to undo an edit, from the held-out NLL after it; "" to keep it."""
    if not math.isfinite(nll):
        return f"held-out NLL is {nll}"
    if guard and nll - last > guard.one_edit:
        return f"held-out NLL rose by {nll - last:.3f} nats at once, more than {guard.one_edit}"
    if guard and nll - first > guard.all_edits:
        return f"held-out NLL rose by {nll - first:.3f} nats in all, more than {guard.all_edits}"
    return ""


def _steps_file(
    model: Any,
    encoder: Encoder,
    method: EditMethod,
    guard: Guard | None,
    rows: list[Row],
    seed: int,
    folder: Any,
) -> AbstractContextManager[RunFile | None]:
    """Open the file of a sequence's steps; raise ValueError if it belongs to another sequence."""
    if folder is None:
        return nullcontext()
    ids = json.dumps([row.ids for row in rows]).encode()
    setting = {
        "model": adapter.model_name(model),
        "model_hash": Fingerprint.of(model).digest,
        "prepend_bos": encoder.prepends_bos,
        "method": described(method),
        "guard": dataclasses.asdict(guard) if guard else None,
        "texts": hashlib.sha256(ids).hexdigest(),
        "seed": seed,
    }
    return _steps(Path(folder) / "steps.jsonl", setting)


def _steps(path: Any, setting: Mapping[str, Any]) -> RunFile:
    """Open a file whose rows are `Step` values."""
    return RunFile(path, setting, {}, lambda _first: _as_step, key="number")


def _as_step(row: Mapping[str, Any]) -> Step:
    request = row.get("request")
    request = make(EditRequest, request) if isinstance(request, Mapping) else request
    return make(Step, {**row, "request": request})
