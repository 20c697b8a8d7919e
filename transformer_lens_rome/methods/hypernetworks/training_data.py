"""Training data of KE and MEND: texts to write, texts that should stay unchanged, and the split.

A text to write is a record's prompt and new target, or any text whose last tokens are the target.
The edited model is scored on the same text without some of its first tokens: a random number of
them, up to half of the tokens before the target (the released "rephrase").
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from transformer_lens_rome.edits.kinds import EditRequest
from transformer_lens_rome.methods.hypernetworks.hypernetwork import Sample
from transformer_lens_rome.prompts.encoder import Encoder, check_texts

Fact = Any
"""A text, an `EditRequest`, or a record with an `EditRequest` as `request`."""


class Item(NamedTuple):
    """The data of one step.

    Attributes:
        inner: The text that the edit writes.
        outer: The text on which the edited model is scored.
        others: Token ids of texts that should stay unchanged.
    """

    inner: Sample
    outer: Sample
    others: tuple[tuple[int, ...], ...]


class Corpus(NamedTuple):
    """Samples to write and token ids of texts that should stay unchanged.

    Attributes:
        samples: Texts to write.
        others: Texts that should stay unchanged.
        bos: Number of tokens at the start of each text that are never cropped.
        crop: Score the edited model on the cropped text.
    """

    samples: list[Sample]
    others: list[tuple[int, ...]]
    bos: int
    crop: bool

    @classmethod
    def of(
        cls,
        encoder: Encoder,
        facts: Sequence[Fact],
        texts: Sequence[str],
        n_labels: int | None,
        n_tokens: int,
        *,
        crop: bool,
    ) -> Corpus:
        """Tokenise facts to write, and other texts, cut to their first `n_tokens` tokens."""
        samples = [to_sample(encoder, fact, n_labels) for fact in facts]
        return cls(samples, to_others(encoder, texts, n_tokens), int(encoder.prepends_bos), crop)

    def item(self, generator: torch.Generator, n_others: int, sample: int | None = None) -> Item:
        """Draw a sample unless one is given, its crop, and `n_others` other texts."""

        def draw(n: int) -> int:
            return int(torch.randint(n, (), generator=generator))

        inner = self.samples[draw(len(self.samples)) if sample is None else sample]
        outer, n_prompt = inner, len(inner.ids) - inner.n_labels - self.bos
        if self.crop:
            dropped = draw(n_prompt // 2 + 1)
            outer = inner._replace(ids=inner.ids[: self.bos] + inner.ids[self.bos + dropped :])
        return Item(
            inner, outer, tuple(self.others[draw(len(self.others))] for _ in range(n_others))
        )


def to_sample(encoder: Encoder, fact: Fact, n_labels: int | None) -> Sample:
    """Tokenise a text to write; with `n_labels=None` the labels are a request's whole target.

    Raises:
        ValueError: the text is too short, or has no target.
    """
    request: Any = getattr(fact, "request", fact)
    if isinstance(request, EditRequest):
        row = encoder.row(request.text, target=request.target_new)
        return Sample(row.ids, min(n_labels or len(row.target), len(row.target)))
    if n_labels is None:
        raise ValueError(
            "a text has no target; set the number of its last tokens that are, n_labels=10"
        )
    ids = encoder.row(request).ids
    if len(ids) <= n_labels:
        raise ValueError(f"{request[:40]!r} has {len(ids)} tokens, too few for {n_labels} labels")
    return Sample(ids, n_labels)


def to_others(encoder: Encoder, texts: Sequence[str], n_tokens: int) -> list[tuple[int, ...]]:
    """Tokenise texts that should stay unchanged, cut to `n_tokens`; skip empty texts.

    Raises:
        ValueError: no text remains.
    """
    check_texts("locality", texts)
    rows = [encoder.row(text).ids[:n_tokens] for text in texts]
    if not (rows := [ids for ids in rows if len(ids) > 1]):
        raise ValueError("training needs texts that should stay unchanged; pass locality=[...]")
    return rows


def fact_digest(fact: Fact) -> str:
    """Return the fact's identifier: 12 digits of the sha256 of its text or its request's prompt."""
    request: Any = getattr(fact, "request", fact)
    text = request.text if isinstance(request, EditRequest) else request
    if not isinstance(text, str):
        raise ValueError(
            f"expected a text, an EditRequest or a record, got a {type(fact).__name__}"
        )
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def split(
    data: Sequence[Fact], validation: Sequence[Fact] | None = None
) -> tuple[list[Fact], list[Fact]]:
    """Return the data for training and for validation, which share no fact.

    Raises:
        ValueError: there are too few data, or a given validation fact is among the data.
    """
    train, last = list(data), list(validation or ())
    if validation is None:
        n = max(1, len(train) // 10)
        train, last = train[:-n], train[-n:]
    known = {fact_digest(fact) for fact in train}
    held_out = [fact for fact in last if fact_digest(fact) not in known]
    if validation is not None and len(held_out) < len(last):
        n_shared = len(last) - len(held_out)
        raise ValueError(f"{n_shared} validation facts are among the data, too; remove them")
    if not train or not held_out:
        raise ValueError("training needs at least two different facts or texts of each kind")
    return train, held_out
