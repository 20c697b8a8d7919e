"""The measurements on records: what is asked about each, and the scores of the answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, ClassVar

import torch

from transformer_lens_rome.edits.in_passes import acting_each, can_share_passes, score_edited
from transformer_lens_rome.edits.kinds import Edit, EditRequest
from transformer_lens_rome.edits.ledger import applied
from transformer_lens_rome.evaluation.benchmarks import Record, Scores
from transformer_lens_rome.evaluation.contexts import parted
from transformer_lens_rome.evaluation.metrics import AnswerScore, PromptScore
from transformer_lens_rome.evaluation.rows import GeneratedText
from transformer_lens_rome.evaluation.written import Ask, written_answers
from transformer_lens_rome.model.protocol import Model
from transformer_lens_rome.prompts.continuations import continue_each
from transformer_lens_rome.prompts.encoder import Encoder, Row, join
from transformer_lens_rome.prompts.scores import Context, TargetScore, score_rows

Asked = Mapping[str, Sequence[tuple[str, Sequence[str]]]]
"""By kind of prompt, the prompts with the targets that are scored after each: one target gives an
`AnswerScore`, two give a `PromptScore`."""

_LENGTH = 100
"""The number of tokens of a generated text, with its prompt."""
_TEXTS = 64
"""The number of texts that share passes while they are written, unless one record has more."""


class Scoring:
    """The questions about the records of a benchmark; it can be pickled, for workers.

    A benchmark defines `asked`, or `written` and `judged`, and overrides what else it needs.

    Attributes:
        protocol: The benchmark's name.
    """

    protocol: ClassVar[str]

    @property
    def setting(self) -> dict[str, Any]:
        """Everything else that the numbers depend on, as plain values."""
        return {}

    @property
    def first(self) -> Scoring | None:
        """A scoring of what decides whether a record counts, if that is less than everything.

        The unedited model is then asked everything only about records that count.
        """
        return None

    @property
    def edit_setting(self) -> dict[str, Any]:
        """Everything that only the edits depend on, as plain values."""
        return {}

    def requests(self, record: Any) -> tuple[EditRequest, ...]:
        """Return the facts that a record's edit writes."""
        return (record.request,)

    @property
    def generates(self) -> bool:
        """True if the model writes text about each record."""
        return False

    @property
    def kl_kinds(self) -> tuple[str, ...]:
        """The kinds of prompts at which the next token's distributions are compared."""
        return ()

    def asked(self, record: Any) -> Asked:
        """Return the prompts of a record, with the targets after each."""
        return {}

    def written(self, record: Any, edited: bool) -> Sequence[Ask]:
        """Return the prompts that the model answers in its own words; `edited`: after the edit."""
        return ()

    def judged(self, record: Any, edited: bool, texts: Sequence[str]) -> Scores:
        """Return the scores of what the model wrote after the prompts of `written`, by kind."""
        raise NotImplementedError

    def continued(self, record: Any) -> tuple[Sequence[str], int]:
        """Return the prompts that the model continues, and the seed of its draws."""
        raise NotImplementedError

    def generated(self, record: Any, texts: Sequence[str]) -> GeneratedText:
        """Return a record's texts with their GE and RS."""
        raise NotImplementedError


def score_records(
    model: Model,
    encoder: Encoder,
    scoring: Scoring,
    records: Sequence[Record],
    edits: Sequence[Edit] | None = None,
    *,
    edited: bool | None = None,
) -> list[Scores]:
    """Return, for each record, the score of every prompt, by kind.

    The prompts of all records share passes.

    Args:
        model: The model.
        encoder: Encodes the prompts.
        scoring: What is asked about a record.
        records: The records.
        edits: For each record, its edit; it is scored as with this edit on the model, and with no
            other. The model has no edit on it before and after. None: the model as it is.
        edited: Whether the scores are of an edited model. None: if there are `edits`.

    Raises:
        ValueError: A log-probability is not a number, or a prompt is longer than the context.
    """
    edited = edits is not None if edited is None else edited
    contexts, edits = parted(edits, len(records))
    asked = [scoring.asked(record) for record in records]
    rows: list[Row] = []
    owners: list[int] = []
    for i, (kinds, context) in enumerate(zip(asked, contexts, strict=True)):
        for prompt, targets in (pair for some in kinds.values() for pair in some):
            rows += [encoder.row(join(context, prompt), target=target) for target in targets]
        owners += [i] * (len(rows) - len(owners))
    if edits is None or not rows:
        row_scores = iter(score_rows(model, rows))
    else:
        row_scores = iter(score_edited(model, rows, edits, owners))
    scores = [_by_kind(kinds, row_scores) for kinds in asked]
    asks = [scoring.written(record, edited) for record in records]
    if not any(asks):
        return scores
    after = [[ask.after(text) for ask in some] for some, text in zip(asks, contexts, strict=True)]
    texts = written_answers(model, encoder, after, edits)
    judged = [scoring.judged(one, edited, some) for one, some in zip(records, texts, strict=True)]
    return [{**one, **more} for one, more in zip(scores, judged, strict=True)]


def _by_kind(asked: Asked, row_scores: Iterator[TargetScore]) -> Scores:
    """Return the scores of one record's prompts, by kind, from the scores of its rows in order."""
    scores: dict[str, list[Any]] = {}
    for kind, pairs in asked.items():
        scores[kind] = []
        for _, targets in pairs:
            score: Any = AnswerScore if len(targets) == 1 else PromptScore
            by_target = [next(row_scores) for _ in targets]
            if not all(torch.isfinite(one.log_probs).all() for one in by_target):
                raise ValueError("the model gives log-probabilities that are not finite numbers")
            values = [one.log_probs for one in by_target] + [one.correct for one in by_target]
            scores[kind].append(score(*(tensor.tolist() for tensor in values)))
    return scores


def generate_texts(
    model: Model,
    encoder: Encoder,
    scoring: Scoring,
    records: Sequence[Record],
    edits: Sequence[Edit] | None = None,
) -> list[GeneratedText | None]:
    """Return the generated text of each record; None if the scoring asks for none.

    The texts of several records share passes. `edits` is as in `score_records`.
    """
    if not scoring.generates:
        return [None] * len(records)
    contexts, edits = parted(edits, len(records))
    if any(contexts):
        return [
            text
            for i, context in enumerate(contexts)
            for text in _generated(model, encoder, scoring, records, [i], before=context)
        ]
    if edits is None or can_share_passes(model, edits):
        together = max(1, _TEXTS // max(len(scoring.continued(record)[0]) for record in records))
        acts = None if edits is None else acting_each(model, edits)
        chunks = list(torch.arange(len(records)).split(together))
        return [
            text
            for some in chunks
            for text in _generated(model, encoder, scoring, records, some.tolist(), acts)
        ]
    texts: list[GeneratedText | None] = []
    for i, edit in enumerate(edits):
        with applied(model, edit):
            texts += _generated(model, encoder, scoring, records, [i])
    return texts


def _generated(
    model: Model,
    encoder: Encoder,
    scoring: Scoring,
    records: Sequence[Record],
    some: Sequence[int],
    acts: Context | None = None,
    before: str = "",
) -> list[GeneratedText]:
    """Return the text of some records; `acts` makes the context of a pass, from owners of texts.

    `before` stands before the prompts; it is no part of the texts, and does not shorten them.
    """
    prompts, seeds = zip(*(scoring.continued(records[i]) for i in some), strict=True)
    prompts = tuple([join(before, prompt) for prompt in group] for group in prompts)
    owners = [i for i, group in zip(some, prompts, strict=True) for _ in group]
    context = nullcontext if acts is None else partial(acts, owners)
    length = _LENGTH + len(encoder.ids(before))
    each = continue_each(model, prompts, seeds, length, encoder=encoder, context=context)
    each = [[text.removeprefix(before) for text in texts] for texts in each]
    return [scoring.generated(records[i], texts) for i, texts in zip(some, each, strict=True)]
