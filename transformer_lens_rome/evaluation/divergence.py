"""KL(edited || unedited) of the next token: how much an edit changes a prompt's distribution.

Source: CounterFact+ (Hoelscher-Obermaier et al. 2023, arXiv:2305.17553), which divides the sum over
the vocabulary by its size; here it is the sum itself, in nats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens_rome.edits.in_passes import acting_each, can_share_passes
from transformer_lens_rome.edits.kinds import Edit
from transformer_lens_rome.edits.ledger import applied
from transformer_lens_rome.evaluation.contexts import parted
from transformer_lens_rome.model import passes
from transformer_lens_rome.model.protocol import Model
from transformer_lens_rome.prompts.encoder import Encoder, Row, join, pad
from transformer_lens_rome.prompts.scores import Context

_TEXTS = 16  # in a pass


@torch.no_grad()
def divergences(
    model: Model,
    encoder: Encoder,
    prompts: Sequence[Mapping[str, Sequence[str]]],
    edits: Sequence[Edit],
) -> list[dict[str, list[float]]]:
    """Return the KL of the next token after each prompt, in nats.

    Args:
        model: The model, without the edits.
        encoder: Encodes the prompts.
        prompts: For each edit, prompts by kind.
        edits: Independent edits; they share passes if the model allows it.
    """
    rows = [[encoder.row(p) for some in kinds.values() for p in some] for kinds in prompts]
    contexts, on_weights = parted(edits, len(edits))
    if on_weights is None:
        return [
            _in_context(model, encoder, kinds, text)
            for kinds, text in zip(prompts, contexts, strict=True)
        ]
    owned = [(row, owner) for owner, some in enumerate(rows) for row in some]
    if owned and can_share_passes(model, edits):
        flat = _divergences(model, owned, acting_each(model, edits))
    else:
        flat = []
        for some, edit in zip(rows, edits, strict=True):
            flat += _divergences(model, [(row, 0) for row in some], _written(model, edit))
    values = iter(flat)
    return [
        {kind: [next(values) for _ in some] for kind, some in kinds.items()} for kinds in prompts
    ]


def _in_context(
    model: Model, encoder: Encoder, kinds: Mapping[str, Sequence[str]], text: str
) -> dict[str, list[float]]:
    """Return the KL of the next token after each prompt, with and without a text before it."""
    kls: dict[str, list[float]] = {}
    for kind, prompts in kinds.items():
        kls[kind] = []
        for prompt in prompts:
            edited, unedited = (
                _next_log_probs(model, [encoder.row(one)]) for one in (join(text, prompt), prompt)
            )
            kls[kind].append((edited.exp() * (edited - unedited)).sum().item())
    return kls


def _written(model: Model, edit: Edit) -> Context:
    """Return a function whose context has the edit written into the model."""
    return lambda _owners: applied(model, edit)


def _divergences(model: Model, owned: Sequence[tuple[Row, int]], edited: Context) -> list[float]:
    """Return the KL after each row; `edited` makes the context of a pass from its rows' owners."""
    found: dict[int, float] = {}
    for side in passes.apart(model, [len(row.ids) for row, _ in owned]):
        order = sorted(side, key=lambda i: len(owned[i][0].ids))
        for first in range(0, len(order), _TEXTS):
            some = order[first : first + _TEXTS]
            rows = [owned[i][0] for i in some]
            unedited = _next_log_probs(model, rows)
            with edited([owned[i][1] for i in some]):
                log_probs = _next_log_probs(model, rows)
            kl = (log_probs.exp() * (log_probs - unedited)).sum(-1)
            found.update(zip(some, kl.tolist(), strict=True))
    return [found[i] for i in range(len(owned))]


def _next_log_probs(model: Model, rows: Sequence[Row]) -> Float[Tensor, "row d_vocab"]:
    """Return the log-probabilities of the token after each row."""
    last = torch.tensor([len(row.ids) - 1 for row in rows])
    logits = passes.logits_at(model, pad(rows), torch.arange(len(rows)), last)
    return logits.float().log_softmax(-1)
