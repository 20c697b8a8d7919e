"""Log-probabilities of targets after prompts, and the most probable next tokens.

Rows with a common start are run once, and only scored positions are unembedded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transformer_lens_rome.model import passes
from transformer_lens_rome.model.calls import model_call
from transformer_lens_rome.model.protocol import Model
from transformer_lens_rome.prompts.encoder import Encoder, Row, check_texts, pad


@model_call
def target_log_probs(
    model: Model,
    prompts: Sequence[str],
    targets: Sequence[str],
    *,
    batch_size: int = 16,
    prepend_bos: bool | None = None,
    encoder: Encoder | None = None,
) -> list[Float[Tensor, "n_target_tokens"]]:
    """Teacher-forced log P(target token | everything before it) for each target, in nats.

    The result has one tensor for each (prompt, target) pair, in the order given. Batching changes
    it only by float rounding. The mean of a tensor is minus the paper's length-normalised NLL; its
    sum is the log-probability of the whole target.
    """
    check_texts("prompts", prompts)
    check_texts("targets", targets)
    encoder = encoder or Encoder.of(model, prepend_bos)
    pairs = zip(prompts, targets, strict=True)
    rows = [encoder.row(prompt, target=target) for prompt, target in pairs]
    return [score.log_probs for score in score_rows(model, rows, batch_size=batch_size)]


class TargetScore(NamedTuple):
    """Score of the target of one row, given everything before it.

    Attributes:
        log_probs: log P of each target token, in nats, on the CPU in float32.
        correct: For each target token, True if it is the most probable token.
    """

    log_probs: Float[Tensor, "n_target_tokens"]
    correct: Bool[Tensor, "n_target_tokens"]


Text = tuple[tuple[int, ...], int]
"""The tokens of a text, and its owner."""
Context = Callable[[Sequence[int]], AbstractContextManager[Any]]
"""Makes the context of a pass from the owners of its texts."""


@model_call
@torch.no_grad()
def score_rows(
    model: Model,
    rows: Sequence[Row],
    *,
    batch_size: int = 16,
    owners: Sequence[int] | None = None,
    context: Context | None = None,
) -> list[TargetScore]:
    """Score the target of every row; return the scores in the order of the rows.

    Rows that are equal up to the last target token, such as one prompt with two targets, are one
    text in the batch, and each position in it is unembedded once. Texts of similar length share a
    batch.

    Args:
        model: The model.
        rows: The rows.
        batch_size: The largest number of texts in a pass.
        owners: A number for each row. Rows with different numbers are never one text.
        context: A function from the owners of a pass's texts to a context for that pass. None: no
            context.
    """
    by_row: dict[int, TargetScore] = {}
    owners = owners or [0] * len(rows)
    inputs = [(row.ids[: row.target[-1]], owner) for row, owner in zip(rows, owners, strict=True)]
    for side in passes.apart(model, [len(ids) for ids, _ in inputs]):
        groups: dict[Text, list[int]] = {}
        for i, text in zip(side, _longest([inputs[i] for i in side]), strict=True):
            groups.setdefault(text, []).append(i)
        texts = sorted(groups, key=lambda text: len(text[0]))
        for first in range(0, len(texts), batch_size):
            some = texts[first : first + batch_size]
            chosen = [i for text in some for i in groups[text]]
            text_of = [k for k, text in enumerate(some) for _ in groups[text]]
            with context([owner for _, owner in some]) if context else nullcontext():
                scores = _scores(
                    model, [ids for ids, _ in some], text_of, [rows[i] for i in chosen]
                )
            by_row.update(zip(chosen, scores, strict=True))
    return [by_row[i] for i in range(len(rows))]


def _scores(
    model: Model, texts: Sequence[tuple[int, ...]], text_of: Sequence[int], rows: Sequence[Row]
) -> list[TargetScore]:
    """Score rows with one pass over `texts`; row i is scored in text number `text_of[i]`."""
    triples = [(k, p - 1, row.ids[p]) for k, row in zip(text_of, rows) for p in row.target]
    where, at, labels = torch.tensor(triples).T
    places, which = torch.stack([where, at], 1).unique(dim=0, return_inverse=True)
    logits = passes.logits_at(model, pad([Row(ids) for ids in texts]), *places.T)
    which, labels = which.to(logits.device), labels.to(logits.device)
    log_probs = logits.float().log_softmax(-1)
    picked, correct = log_probs[which, labels], log_probs.argmax(-1)[which] == labels
    sizes = [len(row.target) for row in rows]
    return list(map(TargetScore, picked.cpu().split(sizes), correct.cpu().split(sizes)))


def _longest(texts: Sequence[Text]) -> list[Text]:
    """For each text, return a longest text of the same owner that starts with it."""
    longest: dict[Text, Text] = {}
    previous: Text = (), 0
    for ids, owner in sorted(set(texts), key=lambda text: (text[1], text[0]), reverse=True):
        # extensions of a text come just before it
        extended = previous[1] == owner and previous[0][: len(ids)] == ids
        longest[ids, owner] = longest.get(previous, previous) if extended else (ids, owner)
        previous = ids, owner
    return [longest[text] for text in texts]


def target_index(
    rows: Sequence[Row],
) -> tuple[Int[Tensor, "n"], Int[Tensor, "n"], Int[Tensor, "n"]]:
    """Return, for every target token of every row: row, position that predicts it, token id."""
    triples = [(i, p - 1, row.ids[p]) for i, row in enumerate(rows) for p in row.target]
    where, at, labels = torch.tensor(triples).T
    return where, at, labels


@model_call
@torch.no_grad()
def top_tokens(
    model: Model,
    prompt: str,
    k: int = 5,
    *,
    prepend_bos: bool | None = None,
    encoder: Encoder | None = None,
) -> list[tuple[str, float]]:
    """Return the k most probable next tokens after a prompt, with their probabilities."""
    encoder = encoder or Encoder.of(model, prepend_bos)
    row = encoder.row(prompt)
    if not row.ids:
        raise ValueError("the prompt contains no token; pass a prompt with some text")
    last = torch.tensor([len(row.ids) - 1])
    logits = passes.logits_at(model, pad([row]), torch.tensor([0]), last)[0]
    best = logits.float().softmax(-1).topk(k)
    return [(encoder.tokenizer.decode([i]), p) for p, i in zip(best.values.tolist(), best.indices)]
