"""Sample text from the model: context prefixes for an edit, or a corpus for statistics.

Tokens are drawn on the CPU from a separate generator, so the caller's random state does not change.
Special tokens are never drawn, so a sampled text does not end early.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from transformer_lens_rome.model.calls import model_call
from transformer_lens_rome.model.fingerprint import weights_digest
from transformer_lens_rome.model.protocol import Model
from transformer_lens_rome.model.self_check import trials_of
from transformer_lens_rome.prompts.continuations import (
    GrowingText,
    draw,
    sample_continuations,
)
from transformer_lens_rome.prompts.encoder import Encoder

_PREFIXES = "the last prefixes"
PREFIX_LENGTHS = ((5, 10), (10, 10))
"""(Length in tokens, number of texts) of the released code; the length includes the start token."""

OPENINGS = ("The", "Therefore", "Because", "I", "You")
"""The words from which the prefixes of MEMIT's published program are continued."""


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
    new, text = tokens, GrowingText(model)
    for _ in tqdm(range(length - 1), desc="sampling text", disable=not progress):
        logits = text.logits_after(new).float().cpu()
        logits[:, special] = -torch.inf
        if top_k is None:
            new = draw(logits, generator)
        else:
            best = logits.topk(top_k)
            new = best.indices.gather(1, draw(best.values, generator))
        tokens = torch.cat([tokens, new], dim=1)
    return tokens


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
