"""What KE and MEND are trained on: texts to write, texts that should stay as they are, the split.

A text to write is a record's prompt and new target, or any text, whose last tokens are then the
target. What the edited model is asked is the same text without some of its first tokens, a random
number of them up to half of those before the target (the released "rephrase").
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
"""A text, an `EditRequest`, or a record that has one as `request`."""


class Item(NamedTuple):
    """One step's data: what to write, what to ask, and what to leave alone."""

    inner: Sample
    outer: Sample
    others: tuple[tuple[int, ...], ...]


class Corpus(NamedTuple):
    """Samples to write and token ids of texts to leave alone.

    Attributes:
        samples: Texts to write.
        others: Texts to leave alone.
        bos: How many tokens at the start of each are never cropped.
        crop: Ask with the text cropped.
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
        """Tokenise facts to write, and texts to leave alone after cutting them to some tokens."""
        samples = [to_sample(encoder, fact, n_labels) for fact in facts]
        return cls(samples, to_others(encoder, texts, n_tokens), int(encoder.prepends_bos), crop)

    def item(self, generator: torch.Generator, n_others: int, sample: int | None = None) -> Item:
        """Draw a sample, unless one is given, its crop, and texts to leave alone."""

        def draw(n: int) -> int:
            return int(torch.randint(n, (), generator=generator))

        inner = self.samples[draw(len(self.samples)) if sample is None else sample]
        outer, given = inner, len(inner.ids) - inner.n_labels - self.bos
        if self.crop:
            dropped = draw(given // 2 + 1)
            outer = inner._replace(ids=inner.ids[: self.bos] + inner.ids[self.bos + dropped :])
        return Item(
            inner, outer, tuple(self.others[draw(len(self.others))] for _ in range(n_others))
        )


def to_sample(encoder: Encoder, fact: Fact, n_labels: int | None) -> Sample:
    """A text to write; `n_labels` of None: a request's whole target.

    Raises:
        ValueError: a text that is too short, or without a target.
    """
    request = getattr(fact, "request", fact)
    if isinstance(request, EditRequest):
        row = encoder.row(request.text, target=request.target_new)
        return Sample(row.ids, min(n_labels or len(row.target), len(row.target)))
    if n_labels is None:
        raise ValueError("a text has no target; say how many of its last tokens are, n_labels=10")
    ids = encoder.row(request).ids
    if len(ids) <= n_labels:
        raise ValueError(f"{request[:40]!r} has {len(ids)} tokens, too few for {n_labels} labels")
    return Sample(ids, n_labels)


def to_others(encoder: Encoder, texts: Sequence[str], n_tokens: int) -> list[tuple[int, ...]]:
    """Token ids of texts to leave alone, cut after some tokens; empty texts are left out.

    Raises:
        ValueError: there is none.
    """
    check_texts("locality", texts)
    rows = [encoder.row(text).ids[:n_tokens] for text in texts]
    if not (rows := [ids for ids in rows if len(ids) > 1]):
        raise ValueError("training needs texts that should stay as they are; pass locality=[...]")
    return rows


def fact_digest(fact: Fact) -> str:
    """Twelve digits of the sha256 of a text, or of a request's prompt: by it a fact is known."""
    request = getattr(fact, "request", fact)
    text = request.text if isinstance(request, EditRequest) else request
    if not isinstance(text, str):
        raise ValueError(
            f"expected a text, an EditRequest or a record, got a {type(fact).__name__}"
        )
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def split(
    data: Sequence[Fact], validation: Sequence[Fact] | None = None
) -> tuple[list[Fact], list[Fact]]:
    """Data for training and for validation, which have no fact in common.

    Raises:
        ValueError: too few data, or a fact that was given for both.
    """
    train, last = list(data), list(validation or ())
    if validation is None:
        n = max(1, len(train) // 10)
        train, last = train[:-n], train[-n:]
    known = {fact_digest(fact) for fact in train}
    alone = [fact for fact in last if fact_digest(fact) not in known]
    if validation is not None and len(alone) < len(last):
        raise ValueError(f"{len(last) - len(alone)} validation facts are among the data, too")
    if not train or not alone:
        raise ValueError("training needs at least two different facts or texts of each kind")
    return train, alone
