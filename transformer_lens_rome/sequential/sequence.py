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

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from transformer_lens_rome.edits.kinds import EditRequest, load_edit
from transformer_lens_rome.edits.ledger import AppliedEdit, apply_edit, check_unedited, revert_all
from transformer_lens_rome.files.run_file import RunFile
from transformer_lens_rome.methods.base import EditMethod, get_method
from transformer_lens_rome.model.calls import model_call
from transformer_lens_rome.model.protocol import Model
from transformer_lens_rome.prompts.encoder import Encoder, Row
from transformer_lens_rome.prompts.held_out import held_out_nll, held_out_rows
from transformer_lens_rome.sequential.guard import Guard, refusal
from transformer_lens_rome.sequential.steps import Step, edit_path, sequence_file

logger = logging.getLogger(__name__)


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

    model: Model = field(repr=False)
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
    model: Model,
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
    parsed = [EditRequest.of(request) for request in requests]
    if not parsed:
        raise ValueError("the list of requests is empty; give at least one EditRequest")
    check_unedited(model)
    encoder = Encoder.of(model, prepend_bos)
    rows = held_out_rows(encoder, texts)
    editor = get_method(method) if isinstance(method, str) else method
    if prepared := getattr(editor, "prepared", None):
        editor = prepared(model, seed=seed)
    with sequence_file(model, encoder, editor, guard, rows, seed, folder) as file:
        run = _Run(model, editor, guard, rows, seed, file)
        return run.edit_all(parsed, progress)


# ---------------------------------------------------------------- the run

_OTHER = "give another folder"


class _Outcome(NamedTuple):
    """A step, its edit if it is on the model, and whether the sequence ends with it."""

    step: Step
    done: AppliedEdit | None = None
    ends: bool = False


@dataclass
class _Run:
    """The data that all steps of a sequence share."""

    model: Model
    method: EditMethod
    guard: Guard | None
    rows: list[Row]
    seed: int
    file: RunFile[Step] | None

    def edit_all(self, requests: list[EditRequest], progress: bool) -> EditSequence:
        """Do all steps; on an error undo every edit."""
        first = last = held_out_nll(self.model, self.rows)
        steps: list[Step] = []
        kept: list[AppliedEdit] = []
        stopped = ""
        try:
            bar = tqdm(requests, desc="edits", disable=not progress)
            for number, request in enumerate(bar, 1):
                step, done, ends = self._step(number, request, first, last)
                steps.append(step)
                if done is not None:
                    if step.nll is None:
                        raise ValueError(f"step {number} is kept without an NLL; {_OTHER}")
                    kept.append(done)
                    last = step.nll
                if ends:
                    stopped = f"request {number}: {step.reason}"
                    break
        except BaseException:
            revert_all(self.model)  # no other edits were on the model
            raise
        together = AppliedEdit.of(self.model, kept)
        return EditSequence(self.model, first, tuple(steps), together, stopped)

    def _step(self, number: int, request: EditRequest, first: float, last: float) -> _Outcome:
        """Make one edit, or read it from the folder, then keep or undo it."""
        if self.file and (step := self.file.rows.get(number)) is not None:
            return self._earlier_step(self.file, step, request, last)
        try:
            edit = self.method.compute(self.model, request, seed=self.seed)
        except ValueError as error:  # the next request may still work, unless this is the first
            if number == 1:
                raise
            logger.warning("request %d gives no edit: %s", number, error)
            return _Outcome(self._written(Step(number, request, None, False, f"no edit: {error}")))
        done = apply_edit(self.model, edit)
        with ExitStack() as undo:
            undo.enter_context(done)
            nll = held_out_nll(self.model, self.rows)
            refused = refusal(self.guard, nll, last, first)
            step = Step(
                number,
                request,
                nll if math.isfinite(nll) else None,
                refused is None,
                refused.reason if refused else "",
                edit.health.p_after,
                edit.health.relative_norm,
            )
            if refused is None and self.file:
                edit.save(edit_path(self.file, number))
            self._written(step)
            if refused is None:
                undo.pop_all()
                return _Outcome(step, done)
        logger.warning("request %d: %s; its edit was undone", number, refused.reason)
        return _Outcome(step, ends=refused.limit == "all_edits")

    def _earlier_step(
        self, file: RunFile[Step], step: Step, request: EditRequest, last: float
    ) -> _Outcome:
        """Return a step of an earlier run, with its saved edit on the model if it was kept."""
        if step.request != request:
            raise ValueError(f"{file.path} contains another request {step.number}; {_OTHER}")
        if step.kept:
            return _Outcome(step, apply_edit(self.model, load_edit(edit_path(file, step.number))))
        if self.guard is None or step.nll is None:
            return _Outcome(step)
        # an undone edit exceeded one of two limits
        return _Outcome(step, ends=step.nll - last <= self.guard.one_edit)

    def _written(self, step: Step) -> Step:
        """Append a step to the file, if there is one, and return it."""
        if self.file:
            self.file.append(step)
        return step
