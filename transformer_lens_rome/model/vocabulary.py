"""Losses of the next token, and their gradients, from one reading of W_U.

With a large vocabulary, W_U and the logits are the largest tensors of a pass. A loss of stored
logits reads W_U once forward and once backward. Here the vocabulary is read once, in slices: the
logits of a slice go into running sums and are forgotten, and so does its part of the gradient,
while the slice of W_U is still in the cache. With p the softmax of a row's logits, and W_j the
column of W_U of token j, times the slope of the soft cap at its logit:

    NLL = -log p(label)                      dNLL/dx = sum_j p_j W_j - W_label
    KL  = sum_j p_j (log p_j - log q_j)      dKL/dx  = sum_j p_j (log p_j - log q_j - KL) W_j

The latter is the covariance of log p/q and W under p, so it is summed around the mean so far.
All sums are of exp(logit - top), with top the largest logit so far; they shrink when it grows.

With 262,144 tokens on one core this is 1.4 times as fast as stored logits for 96 rows, twice as
fast for 352, 1.5 times for 12 with a tied W_U (as fast with another), and takes 0.04 GB in place of
1.9 for 352 (`examples/benchmarks/unembedding.py 262144 640 1`).

Liger-Kernel and cut-cross-entropy need a GPU; `linear_cross_entropy` of torch 2.13 cuts rows, not
the vocabulary, and has neither a soft cap nor a KL term.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable


class Unembedding(NamedTuple):
    """The map from a normed residual x to logits: `l = x @ weight + bias`, `cap * tanh(l / cap)`.

    Attributes:
        weight: W_U.
        bias: b_U.
        cap: The soft cap; 0 means none.
    """

    weight: Float[Tensor, "d_model d_vocab"]
    bias: Float[Tensor, "d_vocab"]
    cap: float = 0.0


class Losses(NamedTuple):
    """The losses of n rows that have a label, and of k rows that are compared with a q.

    Attributes:
        nll: -log p(label), differentiable.
        is_top: Whether no token has a larger logit than the label.
        kl: KL(p || q), differentiable; 0 where q is p itself.
        log_q: log q, as it was given, or log p of the k rows.
    """

    nll: Float[Tensor, "n"]
    is_top: Bool[Tensor, "n"]
    kl: Float[Tensor, "k"]
    log_q: Float[Tensor, "k d_vocab"]

    def split(self, sizes: list[int]) -> list[Losses]:
        """Return k parts, each with one compared row and so many of the rows with a label."""
        labelled = self.nll.split(sizes), self.is_top.split(sizes)
        parts = zip(*labelled, self.kl.split(1), self.log_q.split(1), strict=True)
        return [Losses(*part) for part in parts]


class Scored(NamedTuple):
    """What a model says at n places, with further axes before that of places.

    Attributes:
        log_probs: Log-probabilities of m tokens at each place.
        top: The token with the largest logit at each place.
    """

    log_probs: Float[Tensor, "*variant n m"]
    top: Int[Tensor, "*variant n"]


def losses(
    x: Float[Tensor, "n_plus_k d_model"],
    unembedding: Unembedding,
    labels: Int[Tensor, "n"],
    log_q: Float[Tensor, "k d_vocab"] | None = None,
    *,
    tokens: int | None = None,
) -> Losses:
    """Return the losses of normed residuals, differentiable in these residuals alone.

    Products are in the model's dtype; sums and results are in float32, or float64 if that is.

    Args:
        x: The n rows that have a label, then the k rows that are compared.
        unembedding: What turns x into logits.
        labels: The token that each of the n rows predicts.
        log_q: log q of each of the k rows. None: q is the p of this very call.
        tokens: The size of a slice; see `slice_size` for the default.
    """
    n, k, gradient = len(labels), len(x) - len(labels), torch.is_grad_enabled() and x.requires_grad
    every = torch.cat([labels, labels.new_zeros(k)]).to(x.device)[:, None]
    with torch.no_grad():
        own = x.new_empty(k if log_q is None else 0, len(unembedding.bias), dtype=_wide(x))
        sums = _Sums(x, every, own[:0] if log_q is None else log_q)
        for part, weight, logits in _slices(x, unembedding, tokens):
            own[:, part] = logits[len(x) - len(own) :]
            summands = sums.add(part, logits)
            if gradient:
                sums.pull(summands, weight, _slope(logits, unembedding.cap))
        nll, log_z = (sums.log_z - sums.chosen)[:n], sums.log_z[n:]
        values = torch.cat([nll, 0 * log_z if log_q is None else sums.kl])[:, 0]
        known = sums.gradient(n, unembedding) if gradient else None
    if known is not None:
        values = _Known.apply(x, values, known)
    is_top = (sums.chosen >= sums.top)[:n, 0]
    return Losses(values[:n], is_top, values[n:], own.sub_(log_z) if log_q is None else log_q)


def losses_of_logits(
    logits: Float[Tensor, "n_plus_k d_vocab"],
    labels: Int[Tensor, "n"],
    log_q: Float[Tensor, "k d_vocab"] | None = None,
) -> Losses:
    """Return the same losses from stored logits, differentiable in these.

    In float32, `log_softmax` on a CPU loses digits of a sum over 262,144 tokens; `logsumexp` does
    not.
    """
    logits, n = logits.to(_wide(logits)), len(labels)
    labels = labels.to(logits.device)[:, None]
    log_p = logits - logits.logsumexp(1, keepdim=True)
    if log_q is None:
        log_q = log_p[n:].detach().clone()
    return Losses(
        -log_p[:n].gather(1, labels)[:, 0],
        (logits[:n].gather(1, labels) >= logits[:n].amax(1, keepdim=True))[:, 0],
        (log_p[n:].exp() * (log_p[n:] - log_q)).sum(1),
        log_q,
    )


def log_probs(
    x: Float[Tensor, "n d_model"],
    unembedding: Unembedding,
    labels: Int[Tensor, "n m"],
    *,
    tokens: int | None = None,
) -> Scored:
    """Return log p of m tokens after each normed residual, and the top token; no gradients."""
    with torch.no_grad():
        sums = _Sums(x, labels.to(x.device), x.new_empty(0, len(unembedding.bias)))
        top = torch.zeros(len(x), 1, dtype=torch.long, device=x.device)
        for part, _, logits in _slices(x, unembedding, tokens):
            largest, token = logits.max(1, keepdim=True)
            top = torch.where(largest > sums.top, part.start + token, top)
            sums.add(part, logits, largest)
        return Scored(sums.chosen - sums.log_z, top[:, 0])


def scored(logits: Float[Tensor, "n d_vocab"], labels: Int[Tensor, "n m"]) -> Scored:
    """Return the same from stored logits."""
    log_p = logits.float() - logits.float().logsumexp(1, keepdim=True)
    return Scored(log_p.gather(1, labels.to(log_p.device)), log_p.argmax(1))


def slice_size(x: Float[Tensor, "n d_model"]) -> int:
    """Return how many tokens a slice has.

    On a CPU 4,096: smaller slices cost more calls, larger ones more cache; from 2,048 to 8,192 the
    speeds are alike (`examples/benchmarks/unembedding.py`). On a GPU the start of some twenty
    kernels a slice counts, so a slice is as large as keeps its logits within 2^25 numbers; that was
    not measured.
    """
    return 4096 if x.device.type == "cpu" else max(4096, 2**25 // max(len(x), 1))


def _slices(
    x: Float[Tensor, "n d_model"], unembedding: Unembedding, tokens: int | None
) -> Iterator[tuple[slice, Float[Tensor, "d_model part"], Float[Tensor, "n part"]]]:
    """Yield the place of each slice in the vocabulary, its part of W_U, and its logits."""
    weight, bias, cap = unembedding
    n, tokens, x = len(x), tokens or slice_size(x), _enough_rows(x, weight)
    for start in range(0, len(bias), tokens):
        part = slice(start, start + tokens)
        logits = torch.addmm(bias[part], x, weight[:, part])[:n]
        if cap:
            logits = cap * torch.tanh(logits / cap)
        yield part, weight[:, part], logits.to(_wide(logits))


def _enough_rows(
    x: Float[Tensor, "n d_model"], weight: Float[Tensor, "d_model d_vocab"]
) -> Float[Tensor, "N d_model"]:
    """Return x, with rows of zeros up to sixteen where sixteen rows take less time.

    That is so on a CPU with 6 to 15 rows, if W_U is a tied embedding, which has one token after
    another in memory. See the rows 4 to 16 of `examples/benchmarks/unembedding.py`.
    """
    is_slow = x.device.type == "cpu" and 5 < len(x) < 16 and weight.stride(0) == 1
    return torch.nn.functional.pad(x, (0, 0, 0, 16 - len(x))) if is_slow else x


class _Sums:
    """Sums over the tokens so far of N rows, the last k of which are compared with a q.

    Attributes:
        labels: The tokens whose logits are kept.
        chosen: Their logits.
        top: The largest logit of each row.
        total: The sum of exp(logit - top) of each row.
        columns: The same sum, with each number times its token's column of W_U.
        ratio: The mean under p of logit - log q of the compared rows.
        moments: The sum of exp(logit - top) (logit - log q - ratio) times the column of W_U.
    """

    def __init__(
        self,
        x: Float[Tensor, "N d_model"],
        labels: Int[Tensor, "N m"],
        log_q: Float[Tensor, "k d_vocab"],
    ) -> None:
        self._log_q, self._first = log_q, len(x) - len(log_q)
        self.labels = labels
        self.columns = torch.zeros_like(x, dtype=_wide(x))
        self.moments = self.columns[self._first :].clone()
        self.chosen = self.columns.new_zeros(labels.shape)
        self.total = self.columns.new_zeros(len(x), 1)
        self.ratio = self.total[self._first :].clone()
        self.top = torch.full_like(self.total, torch.finfo(self.total.dtype).min)

    def add(
        self,
        part: slice,
        logits: Float[Tensor, "N part"],
        largest: Float[Tensor, "N 1"] | None = None,
    ) -> tuple[Float[Tensor, "N part"], Float[Tensor, "k part"]]:
        """Add the logits of a slice; return what its columns count in `columns` and `moments`."""
        at = self.labels - part.start
        inside = (at >= 0) & (at < logits.shape[1])
        found = logits.gather(1, at.clamp(0, logits.shape[1] - 1))
        self.chosen = torch.where(inside, found, self.chosen)
        top = torch.maximum(self.top, logits.amax(1, keepdim=True) if largest is None else largest)
        shrink, self.top = (self.top - top).exp(), top
        exponents = (logits - top).exp_()
        self.total = shrink * self.total + exponents.sum(1, keepdim=True)
        self.columns *= shrink
        ratios = logits[self._first :] - self._log_q[:, part] - self.ratio
        shift = (exponents[self._first :] * ratios).sum(1, keepdim=True) / self.total[self._first :]
        self.ratio = self.ratio + shift
        self.moments = shrink[self._first :] * self.moments - shift * self.columns[self._first :]
        return exponents, exponents[self._first :] * (ratios - shift)

    def pull(
        self,
        summands: tuple[Float[Tensor, "N part"], Float[Tensor, "k part"]],
        weight: Float[Tensor, "d_model part"],
        slope: Float[Tensor, "N part"] | None,
    ) -> None:
        """Add the products of a slice's numbers with its columns of W_U."""
        exponents, weighted = summands
        if slope is not None:
            exponents, weighted = exponents * slope, weighted * slope[self._first :]
        pulled = torch.cat([exponents, weighted]).to(weight.dtype) @ weight.T
        self.columns += pulled[: len(exponents)]
        self.moments += pulled[len(exponents) :]

    @property
    def log_z(self) -> Float[Tensor, "N 1"]:
        """Return the logarithms of the sums of exp(logit)."""
        return self.top + self.total.log()

    @property
    def kl(self) -> Float[Tensor, "k 1"]:
        """Return KL(p || q) of the compared rows."""
        return self.ratio - self.log_z[self._first :]

    def gradient(self, n: int, unembedding: Unembedding) -> Float[Tensor, "N d_model"]:
        """Return the gradients of n rows' NLL, and of the KL of the others; 0 without a q."""
        label = unembedding.weight[:, self.labels[:n, 0]].T
        slope = _slope(self.chosen[:n], unembedding.cap)
        found = self.columns / self.total
        found[:n] -= label if slope is None else slope * label
        found[n:] = self.moments / self.total[self._first :] if len(self._log_q) else 0
        return found


class _Known(torch.autograd.Function):
    """Values of rows whose gradients, each in its own row of x, are known already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, gradient: Tensor) -> Tensor:
        """Return the values."""
        ctx.save_for_backward(gradient)
        ctx.dtype = x.dtype
        return values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, towards: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient with respect to x."""
        (gradient,) = ctx.saved_tensors
        return (towards[:, None] * gradient).to(ctx.dtype), None, None


def _slope(logits: Float[Tensor, "n m"], cap: float) -> Float[Tensor, "n m"] | None:
    """Return the derivative of the soft cap where it gave these logits; None without a cap."""
    return 1 - (logits / cap) ** 2 if cap else None


def _wide(tensor: Tensor) -> torch.dtype:
    """Return the dtype of sums."""
    return torch.promote_types(tensor.dtype, torch.float32)
