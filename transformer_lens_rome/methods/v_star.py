"""Optimise v*: the value with which the model predicts the target (Meng et al. 2022, Eq. 4).

    L(z) = mean over prefixes of -log P(target | prefix + prompt), value at the subject set to z
           + kl_factor · KL(P(· | subject) || P before(· | subject)), in the text "{subject} is a"
           + weight_decay · ||delta|| / ||v||²

delta is added to the value at the last subject token of each row, including the "is a" row. v is
the value before any change. The KL term compares the predictions at the last subject token, as the
released code does.
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

from transformer_lens_rome.methods.rome_config import RomeConfig
from transformer_lens_rome.model import adapter
from transformer_lens_rome.model.adapter import Point
from transformer_lens_rome.model.changes import Change
from transformer_lens_rome.model.partial_forward import PartialForward
from transformer_lens_rome.prompts.encoder import Row
from transformer_lens_rome.prompts.scores import target_index


class Optimised(NamedTuple):
    """The result of the optimisation.

    Attributes:
        delta: The vector to add to the value.
        losses: The objective at every step, before that step's update.
        clamp_hits: Number of steps after which delta was scaled down to the allowed norm.
    """

    delta: Float[Tensor, "d_model"]
    losses: tuple[float, ...]
    clamp_hits: int


class Batch(NamedTuple):
    """The rows of one optimisation, and the positions that the objective scores.

    Attributes:
        rows: Token ids up to the last one that is needed.
        lookup: Position of the last subject token of each row.
        where: The row of each scored token; the last entry is the KL term's.
        at: The position that predicts each scored token.
        labels: Target tokens, one fewer than scored.
        weights: Weights of the mean over a row's target tokens, then over rows.
    """

    rows: list[tuple[int, ...]]
    lookup: Int[Tensor, "row"]
    where: Int[Tensor, "scored"]
    at: Int[Tensor, "scored"]
    labels: Int[Tensor, "n"]
    weights: Float[Tensor, "n"]

    @classmethod
    def of(cls, rows: Sequence[Row], kl_row: Row) -> Batch:
        """Collect the rows; add the KL row unless another row starts with the same tokens."""
        where, at, labels = target_index(rows)
        weights = 1 / (torch.tensor([len(row.target) for row in rows])[where] * len(rows))
        ids = [row.ids[: row.target[-1]] for row in rows]
        lookup = [row.subject[-1] for row in rows]
        last = kl_row.subject[-1]
        kl_ids = kl_row.ids[: last + 1]
        same = [i for i, row in enumerate(ids) if lookup[i] == last and row[: last + 1] == kl_ids]
        if not same:
            same, ids, lookup = [len(ids)], [*ids, kl_ids], [*lookup, last]
        where = torch.cat([where, torch.tensor(same[:1])])
        at = torch.cat([at, torch.tensor([last])])
        return cls(ids, torch.tensor(lookup), where, at, labels, weights)


def optimise(
    forward: PartialForward,
    layer: int,
    batch: Batch,
    v: Float[Tensor, "d_model"],
    config: RomeConfig,
    *,
    progress: bool = True,
) -> Optimised:
    """Minimise L by Adam, with at most `steps` losses and `steps - 1` updates, as released.

    `forward` runs the rows of the batch from their `lookup` positions on. `config` gives the
    constants; after each update delta is scaled down to ||delta|| <= clamp · ||v||.

    Raises:
        ValueError: the objective is not finite.
    """
    assert config.clamp is not None  # None stands for a default, which the caller has chosen
    losses: list[float] = []
    clamp_hits, log_p_init = 0, None
    bar = tqdm(total=config.steps, desc="v*", disable=not progress)
    with adapter.gradients_for(forward.model), bar:
        delta = torch.zeros_like(v)
        adam = torch.optim.Adam([delta], lr=config.lr)
        for step in range(config.steps):
            delta.requires_grad_(True)
            nll, log_p = _nll_and_kl_prediction(forward, layer, batch, delta)
            if log_p_init is None:
                log_p_init = log_p.detach()
            kl = (log_p.exp() * (log_p - log_p_init)).sum()  # KL(current || initial)
            loss = nll + config.kl_factor * kl + config.weight_decay * delta.norm() / v.norm() ** 2
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise ValueError(
                    f"the objective is {losses[-1]} at step {step}, in float16 by overflow; "
                    "load the model in float32 or bfloat16"
                )
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
            bar.update()
            if losses[-1] < config.stop_loss or step == config.steps - 1:
                break
            (delta.grad,) = torch.autograd.grad(loss, delta)
            adam.step()
            clamp_hits += _clamp_(delta, config.clamp * v.norm())
    return Optimised(delta.detach(), tuple(losses), clamp_hits)


def _nll_and_kl_prediction(
    forward: PartialForward, layer: int, batch: Batch, delta: Float[Tensor, "d_model"]
) -> tuple[Float[Tensor, ""], Float[Tensor, "d_vocab"]]:
    """Return the mean NLL of the target and the log-probabilities after the KL row's subject."""
    rows = torch.arange(len(batch.rows))
    add = Change(Point("value", layer), rows, batch.lookup, lambda value: value + delta.to(value))
    logits = forward.logits([add], batch.where, batch.at).to(delta.device).float()
    scored, kl = logits.split([len(batch.labels), 1])
    nll = cross_entropy(scored, batch.labels.to(logits.device), reduction="none")
    return (batch.weights.to(nll) * nll).sum(), kl[0].log_softmax(-1)


@torch.no_grad()
def _clamp_(delta: Tensor, limit: Tensor) -> bool:
    """Scale delta down to a norm of at most `limit`, in place; return whether it was longer."""
    if too_long := bool(delta.norm() > limit):
        delta *= limit / delta.norm()
    return too_long
