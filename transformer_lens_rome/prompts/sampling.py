"""Sample text from the model: context prefixes for an edit, or a corpus for statistics.

Tokens are drawn on the CPU from a separate generator, so the caller's random state does not change.
Special tokens are never drawn, so a sampled text does not end early.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from transformer_lens_rome.model import adapter, passes
from transformer_lens_rome.model.calls import model_call
from transformer_lens_rome.model.fingerprint import weights_digest
from transformer_lens_rome.model.protocol import Model
from transformer_lens_rome.model.self_check import difference, has_users_hooks, holds, trials_of
from transformer_lens_rome.prompts.encoder import Encoder, Row, check_texts, pad

_PREFIXES = "the last prefixes"
PREFIX_LENGTHS = ((5, 10), (10, 10))
"""(Length in tokens, number of texts) of the released code; the length includes the start token."""

OPENINGS = ("The", "Therefore", "Because", "I", "You")
"""The words from which the prefixes of MEMIT's published program are continued."""


class _GrowingText:
    """A batch of texts that a model extends token by token.

    Keys and values of earlier tokens are cached if this gives the logits of full passes. Each step
    is a full pass if it does not, if the user has hooks on the model (they may count positions), or
    beyond the model's rotation limit, where earlier keys would change.

    Attributes:
        model: A HookedTransformer or TransformerBridge.
        cached: True if keys and values of earlier tokens are cached.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
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
            logits, self._cache = passes.next_logits(self.model, new, self._cache)
            return logits
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
def sample_tokens(
    model: Model,
    n: int,
    length: int,
    *,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    encoder: Encoder | None = None,
    progress: bool = False,
) -> Int[Tensor, "n length"]:
    """Sample n texts of `length` tokens, including the start token, at temperature 1."""
    encoder = encoder or Encoder.of(model)
    generator = generator or torch.Generator().manual_seed(0)
    special = torch.tensor(sorted(encoder.special_ids), dtype=torch.long)
    tokens = torch.full((n, 1), encoder.start_id)
    new, text = tokens, _GrowingText(model)
    for _ in tqdm(range(length - 1), desc="sampling text", disable=not progress):
        logits = text.logits_after(new).float().cpu()
        logits[:, special] = -torch.inf
        if top_k is None:
            new = _draw(logits, generator)
        else:
            best = logits.topk(top_k)
            new = best.indices.gather(1, _draw(best.values, generator))
        tokens = torch.cat([tokens, new], dim=1)
    return tokens


def _draw(logits: Float[Tensor, "n choice"], generator: torch.Generator) -> Int[Tensor, "n 1"]:
    """Draw one choice for each row by inverting the cumulative distribution.

    For a vocabulary of 262,144 this is much faster than `torch.multinomial`, which draws one random
    number for every choice.
    """
    cumulative = logits.softmax(-1).cumsum(-1)
    uniform = torch.rand(len(logits), 1, generator=generator) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, uniform, right=True).clamp(max=logits.shape[1] - 1)


@model_call
def sample_prefixes(
    model: Model,
    lengths: Sequence[tuple[int, int]] = PREFIX_LENGTHS,
    *,
    seed: int = 0,
    encoder: Encoder | None = None,
) -> list[str]:
    """Return the empty prefix, then texts sampled with top-k 5, each ending in a full stop.

    Source: Meng et al. 2022, section 3.1 and appendix E.5 (ten texts of 5 tokens, ten of 10).
    White space is collapsed and braces become spaces, so that a text can be part of a template. A
    text that is empty after this is left out. The last texts are kept on the model, and sampled
    again if its weights or its state, the lengths, the seed or the BOS rule are others.
    """
    encoder = encoder or Encoder.of(model)
    key = (weights_digest(model), tuple(lengths), seed, encoder.start_id, encoder.prepends_bos)
    known = trials_of(model)
    if known.get(_PREFIXES, ("", []))[0] != key:
        known[_PREFIXES] = key, _sampled_prefixes(model, lengths, seed, encoder)
    return list(known[_PREFIXES][1])


def _sampled_prefixes(
    model: Model, lengths: Sequence[tuple[int, int]], seed: int, encoder: Encoder
) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    prefixes = [""]
    for length, n in lengths:
        tokens = sample_tokens(model, n, length, top_k=5, generator=generator, encoder=encoder)
        texts = encoder.tokenizer.batch_decode(tokens[:, 1:], skip_special_tokens=True)
        prefixes += [f"{clean}." for text in texts if (clean := _sanitise(text))]
    return prefixes


@model_call
def opened_prefixes(
    model: Model, length: int = 10, *, seed: int = 0, encoder: Encoder | None = None
) -> list[str]:
    """Return the empty prefix, then five texts that the model continues from `OPENINGS`.

    Source: the templates of MEMIT's published program (arXiv:2210.07229), one text of `length`
    tokens for each opening, BOS included, with top-k 5. Texts are cleaned as in `sample_prefixes`.
    """
    encoder = encoder or Encoder.of(model)
    length -= encoder.prepends_bos
    texts = sample_continuations(model, OPENINGS, length, top_k=5, seed=seed, encoder=encoder)
    return ["", *(f"{clean}." for text in texts if (clean := _sanitise(text)))]


def _sanitise(text: str) -> str:
    """Normalise a text, and replace white space, braces and invalid characters by spaces."""
    text = unicodedata.normalize("NFKD", text)
    return re.sub(r"[\s{}\ufffd]+", " ", text).strip()


@model_call
def sampled_texts(
    model: Model,
    n: int,
    *,
    length: int = 128,
    batch_size: int = 128,
    seed: int = 0,
    progress: bool = True,
) -> list[str]:
    """Sample a corpus from the model: n texts of `length` tokens; no data is needed.

    The texts are sampled from the full distribution at temperature 1, so their keys are
    distributed as in text that the model considers likely.
    """
    encoder = Encoder.of(model)
    generator = torch.Generator().manual_seed(seed)
    texts: list[str] = []
    while len(texts) < n:
        rows = min(batch_size, n - len(texts))
        tokens = sample_tokens(
            model, rows, length, generator=generator, encoder=encoder, progress=progress
        )
        texts += encoder.tokenizer.batch_decode(tokens[:, 1:], skip_special_tokens=True)
    return texts


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

    A prompt longer than `length` may be cut to the length of the shortest prompt. Special tokens
    are never drawn, so no text ends early.

    Raises:
        ValueError: A prompt has no tokens.
    """
    encoder = encoder or Encoder.of(model)
    generator = torch.Generator().manual_seed(seed)
    special = torch.tensor(sorted(encoder.special_ids), dtype=torch.long)

    def draw(logits: Float[Tensor, "n d_vocab"]) -> Int[Tensor, "n 1"]:
        logits[:, special] = -torch.inf
        best = logits.topk(top_k)
        return best.indices.gather(1, _draw(best.values, generator))

    check_texts("prompts", prompts)
    rows = [encoder.row(prompt) for prompt in prompts]
    tokens = _continued(model, rows, length + encoder.prepends_bos, draw)
    return encoder.tokenizer.batch_decode(tokens, skip_special_tokens=True)


@model_call
def greedy_continuations(
    model: Model, prompts: Sequence[str], n_tokens: int = 20, *, encoder: Encoder | None = None
) -> list[str]:
    """Return the continuation of each prompt in which each token is the most probable one.

    Raises:
        ValueError: A prompt has no tokens.
    """
    encoder = encoder or Encoder.of(model)
    check_texts("prompts", prompts)
    rows = [encoder.row(prompt) for prompt in prompts]
    lengths = [len(row.ids) for row in rows]
    width = max(lengths, default=0) + n_tokens
    tokens = _continued(model, rows, width, lambda logits: logits.argmax(-1, keepdim=True))
    new = [row[n : n + n_tokens] for row, n in zip(tokens.tolist(), lengths, strict=True)]
    return encoder.tokenizer.batch_decode(new, skip_special_tokens=True)


def _continued(
    model: Model,
    rows: Sequence[Row],
    width: int,
    choose: Callable[[Float[Tensor, "n d_vocab"]], Int[Tensor, "n 1"]],
) -> Int[Tensor, "n width"]:
    """Return the rows continued to `width` tokens, as one batch; `choose` picks the next tokens.

    While shorter rows are already continued, longer ones still supply their own tokens.
    """
    if not all(row.ids for row in rows):
        raise ValueError("a prompt contains no token; pass prompts with some text")
    given, lengths = pad(rows), torch.tensor([[len(row.ids)] for row in rows])
    tokens = new = given[:, : int(lengths.min())]
    text = _GrowingText(model)
    while (column := tokens.shape[1]) < width:
        new = choose(text.logits_after(new).float().cpu())
        if column < given.shape[1]:
            new = torch.where(column < lengths, given[:, column : column + 1], new)
        tokens = torch.cat([tokens, new], dim=1)
    return tokens
