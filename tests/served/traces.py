"""A causal trace against the same runs made by hand, with TransformerLens's own hooks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from served import checks
from torch import Tensor

from transformer_lens_rome import causal_trace
from transformer_lens_rome.prompts.encoder import Encoder

PROMPT, SUBJECT = "The tower of Rome is in", "tower of Rome"


def trace_is_what_hooks_give(model: Any, kind: str) -> str:
    """Two cells of a causal trace, and the corrupted score, are what hooks by hand give."""
    encoder = Encoder.of(model)
    start = PROMPT.index(SUBJECT)
    row = encoder.row(PROMPT, (start, start + len(SUBJECT)))
    generator = torch.Generator().manual_seed(3)
    noise = 0.5 * torch.randn(2, len(row.subject), model.cfg.d_model, generator=generator)
    trace = causal_trace(
        model, PROMPT, SUBJECT, kind=kind, window=1, noise=noise, progress=False, batch_size=7
    )
    ids = torch.tensor([row.ids])
    answer = checks.logits_of(model, ids)[0, -1].argmax()
    n_layers, last = model.cfg.n_layers, len(row.ids) - 1
    cells = [None, (1, row.subject[-1]), (n_layers - 1, last)]
    scores = [trace.corrupted_samples, *(trace.samples[:, layer, at] for layer, at in cells[1:])]
    for cell, found in zip(cells, scores, strict=True):
        expected = restored_by_hand(model, ids, row.subject, noise, answer, kind, cell)
        error = (found - expected).abs().max().item()
        assert error < 1e-4 + 1e-3 * expected.max(), f"{kind} at {cell} is off by {error:.1e}"
    return "right"


@torch.no_grad()
def restored_by_hand(
    model: Any,
    ids: Tensor,
    subject: Sequence[int],
    noise: Tensor,
    answer: Tensor,
    kind: str,
    cell: tuple[int, int] | None,
) -> Tensor:
    """P(answer) in each corrupted sample with one state restored, by TransformerLens's hooks."""
    clean: list[Tensor] = []

    def corrupt(embedded: Tensor, hook: Any) -> Tensor:
        embedded = embedded.clone()
        embedded[:, list(subject)] += noise
        return embedded

    named = []
    if cell is not None:
        layer, position = cell
        names = {"resid": "hook_resid_post", "mlp": "hook_mlp_out", "attn": "hook_attn_out"}
        name = f"blocks.{layer}.{names[kind]}"
        with model.hooks(fwd_hooks=[(name, lambda t, hook: clean.append(t.clone()))]):
            checks.logits_of(model, ids)

        def restore(state: Tensor, hook: Any) -> Tensor:
            state = state.clone()
            state[:, position] = clean[0][0, position]
            return state

        named = [(name, restore)]
    with model.hooks(fwd_hooks=[("hook_embed", corrupt), *named]):
        logits = checks.logits_of(model, ids.expand(len(noise), -1))
    return logits[:, -1].softmax(-1)[:, answer]
