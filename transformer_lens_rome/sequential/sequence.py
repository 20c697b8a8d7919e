"""Sequential editing: many facts, one after another, with a guard against model collapse.

Each edit is made on the model with the earlier edits on it; it writes one fact, or a batch of them
by a method for many facts at once. After each edit, the mean negative
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

from transformer_lens_rome.edits.kinds import Edit, EditRequest, load_edit
from transformer_lens_rome.edits.ledger import AppliedEdit, apply_edit, check_unedited, revert_all
from transformer_lens_rome.files.run_file import RunFile
from transformer_lens_rome.methods.base import EditMethod, get_method
from transformer_lens_rome.model.calls import model_call
from transformer_lens_rome.model.protocol import Model
from transformer_lens_rome.prompts.encoder import Encoder, Row
from transformer_lens_rome.prompts.held_out import held_out_nll, held_out_rows
from transformer_lens_rome.sequential.guard import Guard, Refusal, refusal
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
    batch_size: int = 1,
    history: bool = True,
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
        batch_size: The number of facts that are written by one edit, which the guard keeps or
            undoes as a whole. More than 1 needs a method with `compute_many`, such as MEMIT.
        history: Let a method preserve the facts of the edits that were kept, if it can (`after`).
        seed: The seed of the method's draws.
        prepend_bos: Overrides the checkpoint's BOS rule, for the held-out texts.
        progress: Show a progress bar.

    Raises:
        ValueError: There are no requests, the texts have fewer than two tokens, there are edits on
            the model, the folder belongs to another sequence, the method writes single facts only
            but `batch_size` is more than 1, or the method rejects the first batch. If it rejects a
            later one, its steps record the reason and the next one is tried. On an error the model
            is left as it was.
    """
    parsed = [EditRequest.of(request) for request in requests]
    if not parsed:
        raise ValueError("the list of requests is empty; give at least one EditRequest")
    check_unedited(model)
    encoder = Encoder.of(model, prepend_bos)
    rows = held_out_rows(encoder, texts)
    editor: Any = get_method(method) if isinstance(method, str) else method
    if batch_size < 1 or (batch_size > 1 and not hasattr(editor, "compute_many")):
        raise ValueError(
            f"batch_size={batch_size} needs a method that writes many facts at once, such as "
            f"'memit', got {getattr(editor, 'name', editor)!r}"
        )
    if prepared := getattr(editor, "prepared", None):
        editor = prepared(model, seed=seed)
    known = {"batch_size": batch_size} if batch_size > 1 else {}
    known |= {"history": history} if hasattr(editor, "after") else {}
    with sequence_file(model, encoder, editor, guard, rows, seed, folder, known) as file:
        run = _Run(model, editor, guard, rows, seed, file, batch_size, history)
        return run.edit_all(parsed, progress)


# ---------------------------------------------------------------- the run

_OTHER = "give another folder"


class _Outcome(NamedTuple):
    """The steps of a batch, its edit if it is on the model, and whether the sequence ends here."""

    steps: list[Step]
    done: AppliedEdit | None = None
    ends: bool = False


@dataclass
class _Run:
    """The data that all steps of a sequence share; `method` gets the history of its own edits."""

    model: Model
    method: Any
    guard: Guard | None
    rows: list[Row]
    seed: int
    file: RunFile[Step] | None
    batch_size: int = 1
    history: bool = True

    def edit_all(self, requests: list[EditRequest], progress: bool) -> EditSequence:
        """Do all steps; on an error undo every edit."""
        first = last = held_out_nll(self.model, self.rows)
        steps: list[Step] = []
        kept: list[AppliedEdit] = []
        stopped = ""
        numbered = list(enumerate(requests, 1))
        size = self.batch_size
        batches = [numbered[i : i + size] for i in range(0, len(numbered), size)]
        try:
            for batch in tqdm(batches, desc="edits", disable=not progress):
                some, done, ends = self._batch(batch, first, last)
                steps += some
                if done is not None:
                    if (nll := _measured(some).nll) is None:
                        raise ValueError(f"step {batch[0][0]} is kept without an NLL; {_OTHER}")
                    kept.append(done)
                    last = nll
                    if self.history and hasattr(self.method, "after"):
                        self.method = self.method.after(self.model, done.edit)
                if ends:
                    stopped = f"request {_measured(some).number}: {_measured(some).reason}"
                    break
        except BaseException:
            revert_all(self.model)  # no other edits were on the model
            raise
        together = AppliedEdit.of(self.model, kept)
        return EditSequence(self.model, first, tuple(steps), together, stopped)

    def _batch(
        self, batch: Sequence[tuple[int, EditRequest]], first: float, last: float
    ) -> _Outcome:
        """Make one edit, or read it from the folder, then keep or undo it."""
        rows = self.file.rows if self.file else {}
        if self.file and all(number in rows for number, _ in batch):
            return self._earlier_batch(self.file, batch, last)
        try:
            edit = self._edit([request for _, request in batch])
        except ValueError as error:  # the next batch may still work, unless this is the first
            if batch[0][0] == 1:
                raise
            logger.warning("request %d gives no edit: %s", batch[0][0], error)
            reason = f"no edit: {error}"
            steps = [Step(number, request, None, False, reason) for number, request in batch]
            return _Outcome(self._written(steps))
        done = apply_edit(self.model, edit)
        with ExitStack() as undo:
            undo.enter_context(done)
            nll = held_out_nll(self.model, self.rows)
            refused = refusal(self.guard, nll, last, first)
            steps = _steps(batch, edit, nll, refused)
            if refused is None and self.file:
                edit.save(edit_path(self.file, batch[0][0]))
            self._written(steps)
            if refused is None:
                undo.pop_all()
                return _Outcome(steps, done)
        logger.warning("request %d: %s; its edit was undone", batch[0][0], refused.reason)
        return _Outcome(steps, ends=refused.limit == "all_edits")

    def _edit(self, requests: list[EditRequest]) -> Edit:
        """Compute the edit of a batch."""
        if self.batch_size == 1:
            return self.method.compute(self.model, requests[0], seed=self.seed)
        return self.method.compute_many(self.model, requests, seed=self.seed)

    def _earlier_batch(
        self, file: RunFile[Step], batch: Sequence[tuple[int, EditRequest]], last: float
    ) -> _Outcome:
        """Return the steps of an earlier run, with their saved edit on the model if it was kept."""
        steps = [file.rows[number] for number, _ in batch]
        for step, (_, request) in zip(steps, batch, strict=True):
            if step.request != request:
                raise ValueError(f"{file.path} contains another request {step.number}; {_OTHER}")
        if any(step.kept for step in steps):
            edit = load_edit(edit_path(file, steps[0].number))
            return _Outcome(steps, apply_edit(self.model, edit))
        nll = _measured(steps).nll
        if self.guard is None or nll is None:
            return _Outcome(steps)
        # an undone edit exceeded one of two limits
        return _Outcome(steps, ends=nll - last <= self.guard.one_edit)

    def _written(self, steps: list[Step]) -> list[Step]:
        """Append steps to the file, if there is one, and return them.

        Of a batch whose writing was stopped half-way, the first steps are in the file already.

        Raises:
            ValueError: They are those of a batch of other requests.
        """
        for step in steps if self.file else ():
            assert self.file is not None
            if (earlier := self.file.rows.get(step.number)) is None:
                self.file.append(step)
            elif not _same(earlier, step):
                raise ValueError(
                    f"{self.file.path} contains step {step.number} of a smaller batch; a sequence "
                    f"in batches continues with more requests after whole batches; {_OTHER}"
                )
        return steps


def _measured(steps: Sequence[Step]) -> Step:
    """Return the first step of a batch that has an NLL, or the first one."""
    return next((step for step in steps if step.nll is not None), steps[0])


def _same(one: Step, other: Step) -> bool:
    """Return whether two steps are of the same edit, up to rounding."""
    same = (one.request, one.kept) == (other.request, other.kept)
    return same and math.isclose(one.nll or 0.0, other.nll or 0.0, rel_tol=1e-4, abs_tol=1e-5)


def _steps(
    batch: Sequence[tuple[int, EditRequest]], edit: Edit, nll: float, refused: Refusal | None
) -> list[Step]:
    """Return the step of each request of a batch; the edit may have left some of them out."""
    left_out = {request for _, request in batch if len(batch) > 1} - set(edit.requests)
    facts = iter(edit.health.facts)
    steps = []
    for number, request in batch:
        if request in left_out:
            steps.append(Step(number, request, None, False, "no edit: left out of its batch"))
            continue
        fact = next(facts, None)
        steps.append(
            Step(
                number,
                request,
                nll if math.isfinite(nll) else None,
                refused is None,
                refused.reason if refused else "",
                fact.p_after if fact else edit.health.p_after,
                edit.health.relative_norm,
            )
        )
    return steps
