"""Losses from slices of the vocabulary are those of stored logits, and so are their gradients."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import make_model
from torch.nn.functional import cross_entropy

from transformer_lens_rome.model import passes, vocabulary
from transformer_lens_rome.model.adapter import Point
from transformer_lens_rome.model.changes import Change
from transformer_lens_rome.model.partial_forward import PartialForward
from transformer_lens_rome.model.vocabulary import Unembedding, losses, losses_of_logits

N, K, D, V = 6, 2, 16, 1003
SLICES = (1, 100, 1002, V, 5000)  # of one token, with a rest, a rest of one, and all in one
CAPS = (0.0, 3.0)


def setting(dtype=torch.float64, cap=0.0, scale=1.0):
    """Residuals, the unembedding, labels (one in the last slice, some on top) and log q."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, weight, bias = rand(N + K, D).to(dtype), (scale * rand(D, V)).to(dtype), rand(V).to(dtype)
    unembedding = Unembedding(weight, bias, cap)
    labels = dense(x.double(), wide(unembedding))[:N].argmax(1)
    labels[0], labels[1] = V - 1, 0
    log_q = (2 * rand(K, V)).log_softmax(1).to(torch.promote_types(dtype, torch.float32))
    return x.requires_grad_(), unembedding, labels, log_q


def wide(unembedding):
    return Unembedding(unembedding.weight.double(), unembedding.bias.double(), unembedding.cap)


def dense(x, unembedding):
    logits = torch.addmm(unembedding.bias, x, unembedding.weight)
    cap = unembedding.cap
    return cap * torch.tanh(logits / cap) if cap else logits


def by_hand(logits, labels, log_q):
    """NLL and KL(P || Q) by torch's own functions."""
    nll = cross_entropy(logits[:N], labels, reduction="none")
    log_p = logits[N:].log_softmax(1)
    return nll, (log_p.exp() * (log_p - log_q)).sum(1)


def gradient(nll, kl, x):
    """Of a sum in which each row has its own weight."""
    towards = torch.linspace(0.5, 2.0, N + K).to(nll)
    (found,) = torch.autograd.grad(torch.cat([nll, kl]), x, towards, retain_graph=True)
    return found


def errors(found, x, wanted, exact_x):
    """The largest errors of NLL, KL and gradient, relative to the largest entry."""
    pairs = [(found[0], wanted[0]), (found[1], wanted[1])]
    pairs.append((gradient(*found, x), gradient(*wanted, exact_x)))
    return [((a.double() - b).abs().max() / b.abs().max()).item() for a, b in pairs]


# ---------------------------------------------------------------- values and gradients


@pytest.mark.parametrize("tokens", SLICES)
@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-13), (torch.float32, 2e-5)])
def test_slices_give_what_autograd_gives(dtype, most, cap, tokens):
    x, unembedding, labels, log_q = setting(dtype, cap)
    exact_x = x.detach().double().requires_grad_()
    wanted = by_hand(dense(exact_x, wide(unembedding)), labels, log_q.double())
    found = losses(x, unembedding, labels, log_q, tokens=tokens)
    assert max(errors((found.nll, found.kl), x, wanted, exact_x)) < most
    stored = losses_of_logits(dense(x, unembedding), labels, log_q)
    assert max(errors((stored.nll, stored.kl), x, wanted, exact_x)) < most
    top = dense(exact_x, wide(unembedding))[:N].argmax(1) == labels
    assert (
        found.is_top.tolist() == stored.is_top.tolist() == top.tolist() == [False] * 2 + [True] * 4
    )
    other = by_hand(dense(exact_x, wide(unembedding)), labels, log_q.double().roll(1, 1))
    assert max(errors((found.nll, found.kl), x, other, exact_x)) > 0.1  # the control


@pytest.mark.parametrize("cap", CAPS)
def test_finite_differences_agree(cap):
    x, unembedding, labels, log_q = setting(cap=cap)

    def run(x):
        found = losses(x, unembedding, labels, log_q, tokens=300)
        return torch.cat([found.nll, found.kl])

    assert torch.autograd.gradcheck(run, x)


@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_is_as_near_as_stored_logits(dtype, cap):
    x, unembedding, labels, log_q = setting(dtype, cap)
    exact_x = x.detach().double().requires_grad_()
    wanted = by_hand(dense(exact_x, wide(unembedding)), labels, log_q.double())
    found = losses(x, unembedding, labels, log_q, tokens=100)
    stored = by_hand(dense(x, unembedding).float(), labels, log_q)
    assert found.nll.dtype == found.kl.dtype == torch.float32
    assert gradient(found.nll, found.kl, x).dtype == dtype
    for mine, usual in zip(
        errors((found.nll, found.kl), x, wanted, exact_x),
        errors(stored, x, wanted, exact_x),
        strict=True,
    ):
        assert mine < 1.5 * usual + torch.finfo(dtype).eps


def test_the_direction_of_the_kl_can_be_told():
    x, unembedding, labels, log_q = setting()
    log_p = dense(x, unembedding)[N:].log_softmax(1)
    reverse = (log_q.exp() * (log_q - log_p)).sum(1)
    found = losses(x, unembedding, labels, log_q, tokens=100)
    assert ((found.kl - reverse).abs() > 0.1 * reverse).all()
    mine, other = (gradient(found.nll, kl, x)[N:] for kl in (found.kl, reverse))
    assert (mine - other).norm() > 0.1 * other.norm()


def test_each_row_is_on_its_own():
    """Equal rows have equal losses, and a row's gradient is that of its own loss."""
    x, unembedding, labels, log_q = setting()
    twice = torch.cat([x[:N], x[:N], x[N:]])
    found = losses(twice, unembedding, torch.cat([labels, labels]), log_q, tokens=100)
    torch.testing.assert_close(found.nll[:N], found.nll[N:])
    (grad,) = torch.autograd.grad(found.nll[2], twice)
    assert grad[2].norm() > 0.1 and not grad[[i for i in range(len(twice)) if i != 2]].any()
    alone = losses(x[:N], unembedding, labels, log_q[:0], tokens=100)
    torch.testing.assert_close(alone.nll, found.nll[:N])
    assert alone.kl.shape == (0,)
    none = losses(x[N:], unembedding, labels[:0], log_q)
    torch.testing.assert_close(none.kl, found.kl)


@pytest.mark.parametrize("n", (5, 6, 15, 16))
def test_few_rows_of_a_tied_unembedding(n):
    """A CPU gets up to sixteen rows where these are faster; what comes back is of n rows."""
    _, unembedding, labels, _ = setting()
    x = torch.randn(n, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x, labels = x.requires_grad_(), labels[:1].expand(n - 1)
    tied = unembedding._replace(weight=unembedding.weight.T.contiguous().T)
    gradients, values = [], []
    for one in (unembedding, tied):
        found = losses(x, one, labels, tokens=100)
        values.append((found.nll, found.kl, found.log_q, found.is_top))
        gradients += torch.autograd.grad(found.nll.sum(), x)
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*gradients)
    assert found.nll.shape == (n - 1,) and found.log_q.shape == (1, V)
    assert len(vocabulary._enough_rows(x, tied.weight)) == (16 if n > 5 else n)


def test_float32_keeps_its_digits_over_a_large_vocabulary():
    """`log_softmax` on a CPU does not."""
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(4, 2**18, generator=generator), torch.zeros(2**18)
    x, labels = torch.randn(N, 4, generator=generator), torch.arange(N)
    unembedding = Unembedding(weight, bias)
    wanted = losses_of_logits(x.double() @ weight.double(), labels).nll
    for found in (losses(x, unembedding, labels).nll, losses_of_logits(x @ weight, labels).nll):
        assert (found - wanted).abs().max() < 5e-6


# ---------------------------------------------------------------- the first call


def test_the_first_call_gives_log_p_and_no_kl():
    x, unembedding, labels, log_q = setting()
    first = losses(x, unembedding, labels, tokens=100)
    torch.testing.assert_close(first.log_q, dense(x, unembedding)[N:].log_softmax(1).detach())
    assert not first.kl.any() and not gradient(first.nll, first.kl, x)[N:].any()
    again = losses(x, unembedding, labels, first.log_q, tokens=300)
    torch.testing.assert_close(again.kl, first.kl)
    torch.testing.assert_close(
        gradient(again.nll, again.kl, x), gradient(first.nll, first.kl, x), rtol=0, atol=1e-12
    )
    assert again.log_q is first.log_q and not first.log_q.requires_grad
    stored = losses_of_logits(dense(x, unembedding), labels)
    torch.testing.assert_close(stored.log_q, first.log_q)
    assert not stored.kl.any() and not stored.log_q.requires_grad
    moved = losses(x + 0.1, unembedding, labels, first.log_q)
    assert (moved.kl > 1e-3).all()  # the control


# ---------------------------------------------------------------- what may go wrong


@pytest.mark.parametrize("reverse", (False, True))
def test_logits_that_overflow_exp(reverse):
    """In float32 exp(90) is too large; tops grow from slice to slice, or fall."""
    x, (weight, bias, _), labels, log_q = setting(torch.float32, scale=1e-3)
    ramp = torch.linspace(-2000, 2000, V).flip(0) if reverse else torch.linspace(-2000, 2000, V)
    unembedding = Unembedding(weight, ramp, 0.0)
    log_q = (ramp / 1000 + log_q).log_softmax(1)
    found = losses(x, unembedding, labels, log_q, tokens=100)
    exact_x = x.detach().double().requires_grad_()
    wanted = by_hand(dense(exact_x, wide(unembedding)), labels, log_q.double())
    assert max(errors((found.nll, found.kl), x, wanted, exact_x)) < 3e-4  # a logit has 1.2e-4


@pytest.mark.parametrize("bad", (math.nan, math.inf))
@pytest.mark.parametrize("where", (0, 555, V - 1))
@pytest.mark.parametrize("given", (False, True))
def test_bad_logits_are_not_silent(bad, where, given):
    x, unembedding, labels, log_q = setting(torch.float32)
    unembedding.bias[where] = bad
    found = losses(x, unembedding, labels, log_q if given else None, tokens=100)
    assert found.nll.isnan().all() and found.kl.isnan().all()
    assert gradient(found.nll, found.kl, x).isnan().all() or not given
    found = vocabulary.log_probs(x, unembedding, labels[0].expand(N + K, 3))
    assert found.log_probs.isnan().all()
    stored = losses_of_logits(dense(x, unembedding), labels, log_q if given else None)
    assert not stored.nll.isfinite().any() and stored.kl.isnan().all()


def test_a_bad_row_leaves_the_others_alone():
    x, unembedding, labels, log_q = setting()
    with torch.no_grad():
        spoilt = x.clone()
        spoilt[3] = math.nan
    found = losses(spoilt.requires_grad_(), unembedding, labels, log_q, tokens=100)
    good = losses(x, unembedding, labels, log_q, tokens=100)
    assert found.nll.isnan().tolist() == [i == 3 for i in range(N)] and not found.is_top[3]
    torch.testing.assert_close(found.kl, good.kl)
    grads = gradient(found.nll, found.kl, spoilt), gradient(good.nll, good.kl, x)
    others = [i for i in range(N + K) if i != 3]
    torch.testing.assert_close(*(grad[others] for grad in grads))


def test_tokens_that_are_ruled_out():
    """A slice in which all logits are -inf adds nothing."""
    x, unembedding, labels, _ = setting()
    unembedding.bias[:250] = -math.inf
    labels[1] = 900
    found = losses(x, unembedding, labels, tokens=100)
    wanted = cross_entropy(dense(x, unembedding)[:N], labels, reduction="none")
    torch.testing.assert_close(found.nll, wanted)
    torch.testing.assert_close(
        torch.autograd.grad(found.nll.sum(), x), torch.autograd.grad(wanted.sum(), x)
    )


def test_a_tie_is_at_the_top():
    x, unembedding, _, _ = setting()
    unembedding.weight.zero_(), unembedding.bias.zero_()
    unembedding.bias[[3, 700]] = 1.0
    labels = torch.tensor([3, 700, 4, 3, 700, 4])
    for found in (
        losses(x, unembedding, labels, tokens=100),
        losses_of_logits(dense(x, unembedding), labels),
    ):
        assert found.is_top.tolist() == [True, True, False] * 2


def test_gradients_are_of_the_residual_alone():
    x, unembedding, labels, log_q = setting()
    unembedding.weight.requires_grad_(), unembedding.bias.requires_grad_()
    found = losses(x, unembedding, labels, log_q, tokens=100)
    (found.nll.sum() + found.kl.sum()).backward()
    assert x.grad.any() and unembedding.weight.grad is None and unembedding.bias.grad is None
    for free in (x.detach(), x):
        with torch.set_grad_enabled(free is not x):
            quiet = losses(free, unembedding, labels, log_q, tokens=100)
        assert not quiet.nll.requires_grad and not quiet.kl.requires_grad
        torch.testing.assert_close(quiet.nll, found.nll.detach())
        torch.testing.assert_close(quiet.kl, found.kl.detach())
    squares = losses(x, unembedding, labels, log_q).nll.square().sum()
    (once,) = torch.autograd.grad(squares, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        once.sum().backward()


# ---------------------------------------------------------------- of a model


@pytest.mark.parametrize("shape", ("gpt2", "gemma2", "gptj"))  # gemma2 has a cap, gptj a bias
def test_losses_of_passes(model_class, shape, tokenizer, monkeypatch):
    """In slices and from stored logits of whole passes, with the gradients of a change."""
    monkeypatch.setattr(vocabulary, "slice_size", lambda x: 100)
    model = make_model(model_class, shape, tokenizer)
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(len(tokenizer), (n,), generator=generator).tolist() for n in (7, 9, 5)]
    starts, where, at = (
        torch.tensor([3, 4, 2]),
        torch.tensor([0, 1, 1, 2]),
        torch.tensor([6, 5, 8, 3]),
    )
    labels = torch.randint(len(tokenizer), (3,), generator=generator)
    log_q = torch.randn(1, model.cfg.d_vocab, generator=generator).log_softmax(1)
    shift = (0.3 * torch.randn(model.cfg.d_model, generator=generator)).requires_grad_()
    change = Change(Point("value", 1), torch.arange(3), starts, lambda old: old + shift)

    def run(found):
        loss = found.nll.sum() + 0.5 * found.kl.sum()
        return torch.cat([found.nll, found.kl]), *torch.autograd.grad(loss, shift)

    part, whole = (
        PartialForward(model, 1, rows, starts.tolist(), cut=cut) for cut in (True, False)
    )
    stored = run(losses_of_logits(whole.logits([change], where, at), labels, log_q))
    for forward in (part, whole):
        found = run(forward.losses([change], where, at, labels, log_q))
        torch.testing.assert_close(found, stored, rtol=2e-5, atol=2e-5)
    first = part.losses([], where, at, labels).log_q
    torch.testing.assert_close(first, whole.logits([], where, at)[3:].log_softmax(1))
    assert stored[1].norm() > 1e-2
    assert part.recording is not None and whole.recording is None


def test_slices_are_chosen_by_the_device():
    assert vocabulary.slice_size(torch.zeros(352, 8)) == 4096
    sizes = [vocabulary.slice_size(torch.zeros(n, 8, device="meta")) for n in (0, 22, 352)]
    assert sizes[0] == 2**25 and all(
        2**24 < n * size <= 2**25 for n, size in zip((22, 352), sizes[1:])
    )
    assert passes.NO_ROW.shape == (0,)
