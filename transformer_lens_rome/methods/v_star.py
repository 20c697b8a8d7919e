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
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from transformer_lens_rome.model import adapter
from transformer_lens_rome.model.adapter import Point
from transformer_lens_rome.model.changes import Change
from transformer_lens_rome.model.partial_forward import PartialForward
from transformer_lens_rome.prompts.encoder import Row
from transformer_lens_rome.prompts.scores import target_index


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
    """The rows of one optimisation, and where in them the objective looks.

    Attributes:
        rows: Token ids up to the last one that is needed.
        lookup: The last subject token of each row.
        where: The row of each scored token; the last entry is the KL term's.
        at: The position from which it is predicted.
        labels: Target tokens, one fewer than scored.
        weights: Mean over a row's target tokens, then over rows.
    """

    rows: list[tuple[int, ...]]
    lookup: Int[Tensor, "row"]
    where: Int[Tensor, "scored"]
    at: Int[Tensor, "scored"]
    labels: Int[Tensor, "n"]
    weights: Float[Tensor, "n"]

    @classmethod
    def of(cls, rows: Sequence[Row], kl_row: Row) -> Batch:
        """Collect the rows, and the one for the KL term unless another begins just like it."""
        where, at, labels = target_index(rows)
        weights = 1 / (torch.tensor([len(row.target) for row in rows])[where] * len(rows))
        ids = [row.ids[: row.target[-1]] for row in rows]
        lookup = [row.subject[-1] for row in rows]
        last = kl_row.subject[-1]
        begins = kl_row.ids[: last + 1]
        alike = [i for i, row in enumerate(ids) if lookup[i] == last and row[: last + 1] == begins]
        if not alike:
            alike, ids, lookup = [len(ids)], [*ids, begins], [*lookup, last]
        where = torch.cat([where, torch.tensor(alike[:1])])
        at = torch.cat([at, torch.tensor([last])])
        return cls(ids, torch.tensor(lookup), where, at, labels, weights)


def optimise(
    forward: PartialForward,
    layer: int,
    batch: Batch,
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

    `forward` runs the batch's rows from their lookups on.
    After each update delta is pulled back to ||delta|| <= clamp · ||v||.
    """
    losses: list[float] = []
    clamp_hits, log_p_init = 0, None
    bar = tqdm(total=steps, desc="v*", disable=not progress)
    with adapter.gradients_for(forward.model), bar:
        delta = torch.zeros_like(v)
        adam = torch.optim.Adam([delta], lr=lr)
        for step in range(steps):
            delta.requires_grad_(True)
            nll, log_p = _nll_and_kl_prediction(forward, layer, batch, delta)
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
    forward: PartialForward, layer: int, batch: Batch, delta: Float[Tensor, "d_model"]
) -> tuple[Float[Tensor, ""], Float[Tensor, "d_vocab"]]:
    """Mean NLL of the target, and the log-probabilities after the subject in the KL row."""
    every = torch.arange(len(batch.rows))
    add = Change(Point("value", layer), every, batch.lookup, lambda value: value + delta.to(value))
    logits = forward.logits([add], batch.where, batch.at).to(delta.device).float()
    scored, kl = logits.split([len(batch.labels), 1])
    nll = cross_entropy(scored, batch.labels.to(logits.device), reduction="none")
    return (batch.weights.to(nll) * nll).sum(), kl[0].log_softmax(-1)


@torch.no_grad()
def _clamp_(delta: Tensor, limit: Tensor) -> bool:
    """Pull delta back to a norm, in place; whether that was needed."""
    if too_long := bool(delta.norm() > limit):
        delta *= limit / delta.norm()
    return too_long
