"""How well a model predicts held-out text: the exponential of the mean NLL is its perplexity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformer_lens_rome.prompts.encoder import Encoder, Row, check_texts
from transformer_lens_rome.prompts.scores import score_rows


def held_out_rows(encoder: Encoder, texts: Sequence[str], *, length: int = 128) -> list[Row]:
    """Texts as rows of at most `length` tokens, of which all but the first are to be predicted."""
    check_texts("texts", texts)
    rows = []
    for text in texts:
        ids = encoder.ids(text)
        for first in range(0, len(ids), length):
            piece = ids[first : first + length]
            one = (*encoder.bos_before(piece), *piece)
            if len(one) > 1:
                rows.append(Row(one, target=tuple(range(1, len(one)))))
    if not rows:
        raise ValueError("the held-out texts hold less than two tokens; give a few hundred")
    return rows


def held_out_nll(model: Any, rows: Sequence[Row]) -> float:
    """Mean negative log-likelihood of rows' tokens, nats a token; exp of it is the perplexity."""
    scores = [one.log_probs for row in rows for one in score_rows(model, [row])]
    return -sum(s.double().sum().item() for s in scores) / sum(map(len, scores))
