"""Texts that grow token by token: sampled or greedy continuations of prompts, in one batch.

Tokens are drawn on the CPU from generators of their own, so the caller's random state does not
change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens_rome.model import adapter, passes
from transformer_lens_rome.model.calls import model_call
from transformer_lens_rome.model.protocol import Model
from transformer_lens_rome.model.self_check import difference, has_users_hooks, holds
from transformer_lens_rome.prompts.encoder import Encoder, Row, check_texts, pad

__all__ = ["continue_each", "greedy_continuations", "sample_continuations"]


class GrowingText:
    """A batch of texts that a model extends token by token.

    Keys and values of earlier tokens are cached if this gives the logits of full passes. Each step
    is a full pass if it does not, if the user has hooks on the model (they may count positions), or
    beyond the model's rotation limit, where earlier keys would change.

    Attributes:
        model: A HookedTransformer or TransformerBridge.
        context: Returns the context in which each pass over the texts runs.
        cached: True if keys and values of earlier tokens are cached.
    """

    def __init__(
        self, model: Model, context: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> None:
        self.model, self.context = model, context
        self.cached = not has_users_hooks(model) and _can_be_cached(model)
        self._cache: Any = None
        self._tokens: Tensor | None = None

    @torch.no_grad()
    def logits_after(self, new: Int[Tensor, "n new"]) -> Float[Tensor, "n d_vocab"]:
        """Append tokens to each text; return the next-token logits after them."""
        self._tokens = new if self._tokens is None else torch.cat([self._tokens, new], dim=1)
        length = self._tokens.shape[1]
        passes.check_context(self.model, length)
        if self.cached and length <= (adapter.rotation_limit(self.model) or length):
            with self.context():
                logits, self._cache = passes.next_logits(self.model, new, self._cache)
            return logits
        with self.context():
            return _logits_after(self.model, self._tokens)


def _logits_after(model: Model, tokens: Int[Tensor, "n pos"]) -> Float[Tensor, "n d_vocab"]:
    """Return the next-token logits after texts of equal length, from a full pass."""
    each = torch.arange(len(tokens))
    return passes.logits_at(model, tokens, each, torch.full_like(each, tokens.shape[1] - 1))


def _can_be_cached(model: Model) -> bool:
    """Return whether passes with cached keys and values give the logits of full passes."""
    return holds(model, "text is written by whole passes", lambda: _error_of_caching(model))


def _error_of_caching(model: Model) -> float:
    """Return how much the logits after two short texts differ between cached and full passes."""
    tokens, cache = (7 * torch.arange(18).unflatten(0, (2, 9)) + 1) % model.cfg.d_vocab, None
    for new in tokens.split((5, 3, 1), dim=1):
        logits, cache = passes.next_logits(model, new, cache)
    return difference(logits, _logits_after(model, tokens))


@model_call
def sample_continuations(
    model: Model,
    prompts: Sequence[str],
    length: int = 100,
    *,
    top_k: int = 5,
    seed: int = 0,
    encoder: Encoder | None = None,
) -> list[str]:
    """Return texts of `length` tokens (BOS not counted), each of which begins with its prompt.

    A prompt longer than `length` is cut. Special tokens are never drawn, so no text ends early.

    Raises:
        ValueError: A prompt has no tokens.
    """
    (texts,) = continue_each(model, [prompts], [seed], length, top_k=top_k, encoder=encoder)
    return texts


@model_call
def continue_each(
    model: Model,
    groups: Sequence[Sequence[str]],
    seeds: Sequence[int],
    length: int = 100,
    *,
    top_k: int = 5,
    encoder: Encoder | None = None,
    context: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> list[list[str]]:
    """Return what `sample_continuations` returns for each group of prompts; all texts share passes.

    Args:
        model: The model.
        groups: Groups of prompts.
        seeds: The seed of each group's draws, which do not depend on the other groups.
        length: The number of tokens of each text, without BOS.
        top_k: The number of tokens among which each draw is made.
        encoder: Encodes the prompts. None: that of the checkpoint.
        context: Returns the context in which each pass over all texts runs, in their order.

    Raises:
        ValueError: A prompt has no tokens.
    """
    encoder = encoder or Encoder.of(model)
    special = torch.tensor(sorted(encoder.special_ids), dtype=torch.long)
    for prompts in groups:
        check_texts("prompts", prompts)
    rows = [[encoder.row(prompt) for prompt in prompts] for prompts in groups]
    sizes = [len(some) for some in rows]
    starts = [min((len(row.ids) for row in some), default=0) for some in rows]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def choose(logits: Float[Tensor, "n d_vocab"], column: int) -> Int[Tensor, "n 1"]:
        logits[:, special] = -torch.inf
        best = logits.topk(top_k)
        drawn = torch.zeros(len(logits), 1, dtype=torch.long)
        for some, start, generator in zip(
            torch.arange(len(logits)).split(sizes), starts, generators, strict=True
        ):
            if column >= start:  # until then, the group's prompts supply their own tokens
                drawn[some] = best.indices[some].gather(1, draw(best.values[some], generator))
        return drawn

    flat = [row for some in rows for row in some]
    tokens = _continued(model, flat, length + encoder.prepends_bos, choose, context)
    texts = encoder.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [texts[end - size : end] for end, size in zip(ends, sizes, strict=True)]


@model_call
def greedy_continuations(
    model: Model,
    prompts: Sequence[str],
    n_tokens: int | Sequence[int] = 20,
    *,
    encoder: Encoder | None = None,
    context: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> list[str]:
    """Return the continuation of each prompt in which each token is the most probable one.

    Args:
        model: The model.
        prompts: The prompts.
        n_tokens: The number of tokens of each continuation, or one number for each prompt.
        encoder: Encodes the prompts. None: that of the checkpoint.
        context: Returns the context in which each pass over all texts runs, in their order.

    Raises:
        ValueError: A prompt has no tokens.
    """
    encoder = encoder or Encoder.of(model)
    check_texts("prompts", prompts)
    rows = [encoder.row(prompt) for prompt in prompts]
    lengths = [len(row.ids) for row in rows]
    counts = [n_tokens] * len(rows) if isinstance(n_tokens, int) else list(n_tokens)
    ends = [sum(pair) for pair in zip(lengths, counts, strict=True)]

    def best(logits: Float[Tensor, "n d_vocab"], column: int) -> Int[Tensor, "n 1"]:
        return logits.argmax(-1, keepdim=True)

    tokens = _continued(model, rows, max(ends, default=0), best, context)
    new = [row[n:end] for row, n, end in zip(tokens.tolist(), lengths, ends, strict=True)]
    return encoder.tokenizer.batch_decode(new, skip_special_tokens=True)


def _continued(
    model: Model,
    rows: Sequence[Row],
    width: int,
    choose: Callable[[Float[Tensor, "n d_vocab"], int], Int[Tensor, "n 1"]],
    context: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Int[Tensor, "n width"]:
    """Return the rows continued to `width` tokens, as one batch.

    `choose` picks the next tokens from their logits and their position. While shorter rows are
    already continued, longer ones still supply their own tokens.
    """
    if not all(row.ids for row in rows):
        raise ValueError("a prompt contains no token; pass prompts with some text")
    given, lengths = pad(rows), torch.tensor([[len(row.ids)] for row in rows])
    tokens = new = given[:, : min(int(lengths.min()), width)]
    text = GrowingText(model, context)
    while (column := tokens.shape[1]) < width:
        new = choose(text.logits_after(new).float().cpu(), column)
        if column < given.shape[1]:
            new = torch.where(column < lengths, given[:, column : column + 1], new)
        tokens = torch.cat([tokens, new], dim=1)
    return tokens


def draw(logits: Float[Tensor, "n choice"], generator: torch.Generator) -> Int[Tensor, "n 1"]:
    """Draw one choice for each row by inverting the cumulative distribution.

    For a vocabulary of 262,144 this is much faster than `torch.multinomial`, which draws one random
    number for every choice.
    """
    cumulative = logits.softmax(-1).cumsum(-1)
    uniform = torch.rand(len(logits), 1, generator=generator) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, uniform, right=True).clamp(max=logits.shape[1] - 1)
