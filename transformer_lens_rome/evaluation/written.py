"""Answers in the model's own words: greedy continuations of the prompts of many records."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

from transformer_lens_rome.edits.in_passes import acting_each, can_share_passes
from transformer_lens_rome.edits.kinds import Edit
from transformer_lens_rome.edits.ledger import applied
from transformer_lens_rome.model import passes
from transformer_lens_rome.model.protocol import Model
from transformer_lens_rome.prompts.continuations import greedy_continuations
from transformer_lens_rome.prompts.encoder import Encoder, join
from transformer_lens_rome.prompts.scores import Context

_TEXTS = 32  # in a pass


class Ask(NamedTuple):
    """A prompt that the model continues.

    Attributes:
        prompt: The prompt.
        n_tokens: The number of tokens of the answer; with `whole`, of prompt and answer together.
        whole: See `n_tokens`.
    """

    prompt: str
    n_tokens: int
    whole: bool = False

    def after(self, text: str) -> Ask:
        """Return the prompt after a text, of which the answer's length does not depend."""
        more = len(text) if self.whole else 0  # a character for a token, as released
        return Ask(join(text, self.prompt), self.n_tokens + more, self.whole)


class WrittenScore(NamedTuple):
    """The model's own words in a test.

    Attributes:
        texts: What the model wrote after each prompt of the test.
        passed: Whether the texts pass the test.
    """

    texts: list[str]
    passed: bool


def written_answers(
    model: Model,
    encoder: Encoder,
    asks: Sequence[Sequence[Ask]],
    edits: Sequence[Edit] | None = None,
) -> list[list[str]]:
    """Return what the model writes after each prompt of each record, without the prompt.

    Args:
        model: The model.
        encoder: Encodes the prompts.
        asks: For each record, its prompts.
        edits: For each record, its edit, which acts on its prompts only. They share passes if the
            model allows it. None: the model as it is.

    Raises:
        ValueError: A prompt has no tokens, or a text is longer than the context.
    """
    owned = [(ask, i) for i, some in enumerate(asks) for ask in some]
    if edits is None or can_share_passes(model, edits):
        acts = None if edits is None else acting_each(model, edits)
        flat = _written(model, encoder, owned, acts)
    else:
        flat = []
        for some, edit in zip(asks, edits, strict=True):
            with applied(model, edit):
                flat += _written(model, encoder, [(ask, 0) for ask in some])
    texts = iter(flat)
    return [[next(texts) for _ in some] for some in asks]


def _written(
    model: Model, encoder: Encoder, owned: Sequence[tuple[Ask, int]], acts: Context | None = None
) -> list[str]:
    """Return the text after each prompt; `acts` makes the context of a pass from its owners."""
    lengths = [len(encoder.row(ask.prompt).ids) for ask, _ in owned]
    bos = int(encoder.prepends_bos)
    counts = [
        max(1, ask.n_tokens + bos - length) if ask.whole else ask.n_tokens
        for (ask, _), length in zip(owned, lengths, strict=True)
    ]
    ends = [sum(pair) for pair in zip(lengths, counts, strict=True)]
    found: dict[int, str] = {}
    for side in passes.apart(model, ends):
        order = sorted(side, key=lambda i: (ends[i], lengths[i]))
        for first in range(0, len(order), _TEXTS):
            some = order[first : first + _TEXTS]
            context = nullcontext if acts is None else partial(acts, [owned[i][1] for i in some])
            prompts = [owned[i][0].prompt for i in some]
            n_tokens = [counts[i] for i in some]
            texts = greedy_continuations(model, prompts, n_tokens, encoder=encoder, context=context)
            found.update(zip(some, texts, strict=True))
    return [found[i] for i in range(len(owned))]
