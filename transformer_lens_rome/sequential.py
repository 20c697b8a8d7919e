"""Many facts written one after another, while the model is watched and held back from collapse.

Every edit is made on the model with those before it. After each, the mean negative log-likelihood
of held-out text, in nats a token (its exponential is the perplexity), is compared with what it was:

    rise by one edit       NLL(after this edit) - NLL(before it)
    rise by all of them    NLL(after this edit) - NLL(of the unedited model)

A `Guard` says how large each may be. An edit above the first limit is taken off again, and the
sequence goes on without it; where all together come above the second, the last is taken off, and
the sequence ends. Both undo exactly. Single edits that disable a model (Gupta et al. 2024,
arXiv:2403.07175) show in the first, the slow drift of many sound edits in the second.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
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
    """How far a sequence of edits may move a model.

    Attributes:
        one_edit: Largest rise of the held-out NLL by one edit, nats a token.
        all_edits: Largest rise over the unedited model, nats a token.
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
        number: Its place, from 1.
        request: What was asked for.
        nll: Held-out NLL with this edit on the model, nats a token; None where none was made.
        kept: Whether the edit is on the model.
        reason: Why it is not.
        p_after: Probability of its target just after it; None if the method does not measure it.
        relative_norm: ||delta W|| / ||W||; None likewise.
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
    """A sequence of edits on a model; leaving a `with` block, or `revert()`, takes them off.

    Attributes:
        model: The model that was changed.
        nll: Held-out NLL of the unedited model, nats a token.
        steps: What was done, one for each request that was reached.
        applied: The edits that were kept, on the model, in order.
        stopped: Why the sequence ended before its last request; empty if it did not.
    """

    model: Any = field(repr=False)
    nll: float
    steps: tuple[Step, ...] = field(repr=False)
    applied: AppliedEdit = field(repr=False)
    stopped: str = ""

    def revert(self) -> None:
        """Take all of them off again; the weights are the old bytes."""
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
    """Write facts one after another; each edit that does too much damage is taken off again.

    Args:
        model: A HookedTransformer or TransformerBridge without edits on it.
        requests: What to write.
        method: A method or its registered name.
        texts: Held-out texts, on which damage is measured: a few hundred tokens are enough.
        guard: The limits. None: every edit is kept after which the NLL is a number.
        folder: Gets every edit as it is made, and `steps.jsonl`. A sequence that was killed, or is
            given more requests, goes on where it was.
        seed: For what a method draws.
        prepend_bos: Overrides the checkpoint's own rule, for the held-out texts.
        progress: Show a progress bar.

    Raises:
        ValueError: no requests, texts with less than two tokens, edits on the model, a folder of
            another sequence, or what the method says of the first request: of a later one it is
            noted, and the next is tried. The model is then as it was.
    """
    requests = [_as_request(request) for request in requests]
    if not requests:
        raise ValueError("the list of requests is empty; give at least one EditRequest")
    check_unedited(model)
    encoder = Encoder.of(model, prepend_bos)
    rows = held_out_rows(encoder, texts)
    method = get_method(method) if isinstance(method, str) else method
    if prepared := getattr(method, "prepared", None):
        method = prepared(model, seed=seed)
    with _steps_file(model, encoder, method, guard, rows, seed, folder) as file:
        run = _Run(model, method, guard, rows, seed, file)
        return run.through(requests, progress)


def _as_request(request: EditRequest | Mapping[str, Any]) -> EditRequest:
    return request if isinstance(request, EditRequest) else EditRequest.from_dict(request)


# ---------------------------------------------------------------- the run


@dataclass
class _Run:
    """What every step of a sequence needs."""

    model: Any
    method: EditMethod
    guard: Guard | None
    rows: list[Row]
    seed: int
    file: RunFile | None

    def through(self, requests: list[EditRequest], progress: bool) -> EditSequence:
        """All steps; on an error every edit is off again."""
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
                    kept.append(done)
                    last = step.nll
                elif self.guard and step.nll is not None and step.nll - last <= self.guard.one_edit:
                    stopped = f"request {number}: {step.reason}"
                    break
        except BaseException:
            revert_all(self.model)  # there were no others on it
            raise
        together = AppliedEdit.of(self.model, kept)
        return EditSequence(self.model, first, tuple(steps), together, stopped)

    def _step(
        self, number: int, request: EditRequest, first: float, last: float
    ) -> tuple[Step, AppliedEdit | None]:
        """One edit made, or read from the folder, and kept or taken off."""
        known = self.file.rows.get(number) if self.file else None
        if known is not None:
            step = _as_step(known)
            if step.request != request:
                raise ValueError(f"{self.file.path} holds another request {number}; {_OTHER}")
            return step, self._again(step) if step.kept else None
        try:
            edit = self.method.compute(self.model, request, seed=self.seed)
        except ValueError as error:  # of the request, unless it is the first: the next one may do
            if number == 1:
                raise
            logger.warning("request %d gives no edit: %s", number, error)
            return self._noted(Step(number, request, None, False, f"no edit: {error}")), None
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
                edit.save(self._path(number))
            self._noted(step)
            if step.kept:
                undo.pop_all()
                return step, done
        logger.warning("request %d: %s; its edit is off again", number, reason)
        return step, None

    def _again(self, step: Step) -> AppliedEdit:
        return apply_edit(self.model, load_edit(self._path(step.number)))

    def _path(self, number: int) -> Path:
        return self.file.path.parent / f"{number:05d}.safetensors"

    def _noted(self, step: Step) -> Step:
        if self.file:
            self.file.append(dataclasses.asdict(step))
        return step


_OTHER = "give another folder"


def _refusal(guard: Guard | None, nll: float, last: float, first: float) -> str:
    """Why an edit after which the held-out NLL is this is taken off; empty if it is not."""
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
) -> Any:
    """The file of a sequence's steps, refused where it is another one's."""
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
    """The file of a sequence's steps, each of which is a `Step`."""
    return RunFile(path, setting, {}, lambda _first: _as_step, key="number")


def _as_step(row: Mapping[str, Any]) -> Step:
    request = row.get("request")
    request = make(EditRequest, request) if isinstance(request, Mapping) else request
    return make(Step, {**row, "request": request})
