"""The NLL of held-out text under a model; exp of the mean NLL is the perplexity."""

from __future__ import annotations

from collections.abc import Sequence

from transformer_lens_rome.model.protocol import Model
from transformer_lens_rome.prompts.encoder import Encoder, Row, check_texts
from transformer_lens_rome.prompts.scores import score_rows


def held_out_rows(encoder: Encoder, texts: Sequence[str], *, length: int = 128) -> list[Row]:
    """Cut texts into rows of at most `length` tokens plus BOS; all but the first are targets."""
    check_texts("texts", texts)
    rows = []
    for text in texts:
        ids = encoder.ids(text)
        for first in range(0, len(ids), length):
            piece = ids[first : first + length]
            row = (*encoder.bos_before(piece), *piece)
            if len(row) > 1:
                rows.append(Row(row, target=tuple(range(1, len(row)))))
    if not rows:
        raise ValueError("every held-out text has fewer than two tokens; pass a few hundred tokens")
    return rows


def held_out_nll(model: Model, rows: Sequence[Row]) -> float:
    """Return the mean NLL of the target tokens of rows, in nats per token."""
    log_probs = [score.log_probs for row in rows for score in score_rows(model, [row])]
    return -sum(s.double().sum().item() for s in log_probs) / sum(map(len, log_probs))
