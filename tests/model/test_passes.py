"""Unembedding in blocks of the vocabulary gives what one product gives."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from transformer_lens_rome.model import passes

pytestmark = pytest.mark.every_version

GENERATOR = torch.Generator().manual_seed(0)


def rand(*shape):
    return torch.randn(*shape, generator=GENERATOR)


def stand_in(d_vocab, cap=0.0, dtype=torch.float32):
    """What `unembed` asks of a model."""
    return SimpleNamespace(
        ln_final=torch.nn.functional.silu,
        W_U=rand(16, d_vocab).to(dtype),
        b_U=rand(d_vocab).to(dtype),
        cfg=SimpleNamespace(output_logits_soft_cap=cap),
    )


def dense(model, residual):
    logits = model.ln_final(residual) @ model.W_U + model.b_U
    cap = model.cfg.output_logits_soft_cap
    return cap * torch.tanh(logits / cap) if cap else logits


@pytest.mark.parametrize("cap", (0.0, 3.0))
@pytest.mark.parametrize("d_vocab", (50, 2048, 2049, 5000))  # less than a block, and with a rest
def test_logits_and_log_probs(d_vocab, cap):
    model, residual = stand_in(d_vocab, cap), rand(7, 16)
    wanted = dense(model, residual)
    torch.testing.assert_close(passes.unembed(model, residual), wanted)
    labels = torch.stack([wanted.argmax(1), wanted.argmin(1), torch.full((7,), d_vocab - 1)], 1)
    found = passes.log_probs(model, residual, labels)
    torch.testing.assert_close(found.log_probs, wanted.log_softmax(1).gather(1, labels))
    assert torch.equal(found.top, wanted.argmax(1))
    torch.testing.assert_close(passes.unembed(model, residual), wanted)  # nothing was spoilt


def test_log_probs_of_half_precision_are_float32():
    model = stand_in(5000, dtype=torch.bfloat16)
    residual = rand(7, 16).bfloat16()
    labels = torch.arange(7)[:, None] * 700
    found = passes.log_probs(model, residual, labels).log_probs
    wanted = passes.unembed(model, residual).float().log_softmax(1).gather(1, labels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_no_row_is_free_and_has_no_logits():
    model = stand_in(5000)
    assert passes.unembed(model, rand(7, 16)[passes.NO_ROW]).shape == (0, 5000)
