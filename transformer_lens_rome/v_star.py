"""Find v*: the value that makes the model say the target (Meng et al. 2022, Eq. 4).

    L(z) = mean over prefixes of -log P(target | prefix + prompt), value at the subject set to z
           + kl_factor · KL(P(· | subject) || P before(· | subject)), in the text "{subject} is a"
           + weight_decay · ||delta|| / ||v||²

delta is added to the value at each row's last subject token, in the "is a" row too; v is the value
before any change. The KL term compares the predictions at the last subject token, as released.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from transformer_lens_rome import adapter
from transformer_lens_rome.adapter import Point
from transformer_lens_rome.prompts import Row, pad, target_index


class Optimised(NamedTuple):
    """The result of the search.

    Attributes:
        delta: What to add to the value.
        losses: The objective at every step, before that step's update.
        clamp_hits: Steps after which delta was pulled back to the allowed norm.
    """

    delta: Float[Tensor, "d_model"]
    losses: tuple[float, ...]
    clamp_hits: int


class Batch(NamedTuple):
    """The rows of one optimisation as tensors; the last row is the one for the KL term."""

    tokens: Int[Tensor, "row pos"]
    lookup: Int[Tensor, "row"]  # the last subject token of each row
    where: Int[Tensor, "scored"]  # row, position and label of every target token
    at: Int[Tensor, "scored"]
    labels: Int[Tensor, "scored"]
    weights: Float[Tensor, "scored"]  # mean over a row's target tokens, then over rows

    @classmethod
    def of(cls, rows: Sequence[Row], kl_row: Row, device: Any) -> Batch:
        """Collect the rows; `where` and `at` get one more entry, for the KL row."""
        every = [*rows, kl_row]
        lookup = torch.tensor([row.subject[-1] for row in every])
        where, at, labels = target_index(rows)
        sizes = torch.tensor([len(row.target) for row in rows])
        weights = 1 / (sizes[where] * len(rows))
        where = torch.cat([where, torch.tensor([len(rows)])])
        at = torch.cat([at, lookup[-1:]])
        tensors = (pad(every), lookup, where, at, labels, weights)
        return cls(*(tensor.to(device) for tensor in tensors))


def read_keys_and_values(
    model: Any, layer: int, rows: Sequence[Row]
) -> tuple[Float[Tensor, "row d_mlp"], Float[Tensor, "row d_model"]]:
    """Keys and values at each row's last subject token, in float32.

    Raises:
        NotImplementedError: value != key @ W_out + b_out, so this architecture's MLP is not what
            the edit assumes.
        ValueError: a key is not finite.
    """
    key, value = Point("key", layer), Point("value", layer)
    found = adapter.read(model, pad(rows), [key, value])
    index = torch.arange(len(rows)), torch.tensor([row.subject[-1] for row in rows])
    keys, values = found[key][index], found[value][index]
    if not torch.isfinite(keys).all():
        raise ValueError(
            f"a key at layer {layer} holds NaN or infinity; check the model's weights and dtype"
        )
    weight, bias = adapter.w_out(model, layer).detach(), adapter.b_out(model, layer)
    expected = keys.float() @ weight.float() + bias.float()
    error = (expected - values.float()).norm() / values.float().norm()
    if not error < max(1e-3, 8 * torch.finfo(values.dtype).eps):
        raise NotImplementedError(
            f"{adapter.architecture(model)}: the value at layer {layer} is not key @ W_out + b_out "
            f"(relative error {error:.1e}), so a change of W_out would not do what ROME computes"
        )
    return keys.float(), values.float()


def optimise(
    model: Any,
    layer: int,
    rows: Sequence[Row],
    kl_row: Row,
    v: Float[Tensor, "d_model"],
    *,
    steps: int,
    lr: float,
    clamp: float,
    weight_decay: float,
    kl_factor: float,
    stop_loss: float,
    progress: bool = True,
) -> Optimised:
    """Minimise L by Adam; at most `steps` losses and `steps - 1` updates, as released.

    After each update delta is pulled back to ||delta|| <= clamp · ||v||.
    """
    losses: list[float] = []
    clamp_hits, log_p_init = 0, None
    with adapter.gradients_for(model), tqdm(total=steps, desc="v*", disable=not progress) as bar:
        batch = Batch.of(rows, kl_row, v.device)
        delta = torch.zeros_like(v)
        adam = torch.optim.Adam([delta], lr=lr)
        for step in range(steps):
            delta.requires_grad_(True)
            nll, log_p = _nll_and_kl_prediction(model, layer, batch, delta)
            if log_p_init is None:
                log_p_init = log_p.detach()
            kl = (log_p.exp() * (log_p - log_p_init)).sum()  # KL(current || initial)
            loss = nll + kl_factor * kl + weight_decay * delta.norm() / v.norm() ** 2
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise ValueError(
                    f"the objective is {losses[-1]} at step {step}; in float16 that is overflow: "
                    "load the model in float32 or bfloat16"
                )
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
            bar.update()
            if losses[-1] < stop_loss or step == steps - 1:
                break
            (delta.grad,) = torch.autograd.grad(loss, delta)
            adam.step()
            clamp_hits += _clamp_(delta, clamp * v.norm())
    return Optimised(delta.detach(), tuple(losses), clamp_hits)


def _nll_and_kl_prediction(
    model: Any, layer: int, batch: Batch, delta: Float[Tensor, "d_model"]
) -> tuple[Float[Tensor, ""], Float[Tensor, "d_vocab"]]:
    """Mean NLL of the target, and the log-probabilities after the subject in the KL row."""
    rows = torch.arange(len(batch.tokens), device=delta.device)

    def add_delta(value: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "row pos d_model"]:
        added = delta.to(value).expand(len(rows), -1)
        return value.index_put((rows, batch.lookup), added, accumulate=True)

    with adapter.hooks(model, [(Point("value", layer), add_delta)]):
        logits = adapter.logits_at(model, batch.tokens, batch.where, batch.at)
    log_p = logits.to(delta.device).float().log_softmax(-1)
    picked = log_p[:-1].gather(1, batch.labels[:, None])[:, 0]
    return -(batch.weights * picked).sum(), log_p[-1]


@torch.no_grad()
def _clamp_(delta: Tensor, limit: Tensor) -> bool:
    """Pull delta back to a norm, in place; whether that was needed."""
    if too_long := bool(delta.norm() > limit):
        delta *= limit / delta.norm()
    return too_long
