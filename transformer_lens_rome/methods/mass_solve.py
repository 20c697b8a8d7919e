"""One solve for MEMIT, EMMET and AlphaEdit, with or without the keys of earlier batches.

K `[m, n]` are the keys of n facts, R `[d, n]` what is missing at each, and J = [K_prev, K] puts the
keys of earlier batches in front. E are the last n columns of the identity. The change of W_out is

    left @ right,    left = G⁻¹ J (σ I + Jᵀ G⁻¹ J)⁻¹ E   [m, n],    right = Rᵀ   [n, d]

    MEMIT      G = λ C + μ I    σ = 1    arXiv:2210.07229, section 4.2; μ: ENCORE, arXiv:2502.01636
    EMMET      G = λ C + μ I    σ = ε    arXiv:2403.14236; ε = 0 gives each key exactly its target
    AlphaEdit  G⁻¹ = P / L2     σ = 1    arXiv:2410.02355; P spans small eigenvalues of C

For σ = 1 it minimises tr(Δᵀ G Δ) + ||K_prevᵀ Δ||² + ||Kᵀ Δ - Rᵀ||². The published programs solve
this with G + K_prev K_prevᵀ + K Kᵀ, `[m, m]`. By Woodbury's identity the matrix above has
as many rows as there are keys, and G is factored once for all batches. AlphaEdit's own form,
(P (K Kᵀ + H) + L2 I)⁻¹ P K Rᵀ, equals it for every P. s = kᵀ G⁻¹ k says how much of its residual
one fact alone absorbs: s / (1 + s), or all of it in EMMET.

Everything is float64. The released programs round C to float32; AlphaEdit's also solves in it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens_rome.methods.mass_config import MemitConfig, Solve
from transformer_lens_rome.statistics.second_moment import SecondMoment, singular

logger = logging.getLogger(__name__)


class Metric(Protocol):
    """G⁻¹, factored: what a change of W_out costs in each direction of key space."""

    def inverse(self, keys: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        """Return G⁻¹ times some keys."""
        ...

    def summary(self) -> dict[str, Any]:
        """Return what an edit saves of it."""
        ...


@dataclass(frozen=True)
class Covariance:
    """G = λ C + μ I, by its Cholesky factor."""

    factor: Float[Tensor, "m m"]
    covariance_weight: float
    norm_weight: float

    @classmethod
    def of(cls, moment: SecondMoment, covariance_weight: float, norm_weight: float) -> Covariance:
        """Factor G.

        Raises:
            ValueError: G is singular: C is from too few tokens, and μ is 0.
        """
        if moment.n_tokens < moment.d_mlp and norm_weight == 0:
            raise ValueError(singular(moment, "MemitConfig(norm_weight=1)"))
        G = covariance_weight * moment.C.double()
        G.diagonal().add_(norm_weight)
        factor, failed = torch.linalg.cholesky_ex(G)
        if failed:
            raise ValueError(singular(moment, "MemitConfig(norm_weight=1)"))
        return cls(factor, covariance_weight, norm_weight)

    def inverse(self, keys: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        """Return G⁻¹ times some keys."""
        return torch.cholesky_solve(keys.to(self.factor), self.factor)

    def summary(self) -> dict[str, Any]:
        """Return λ and μ."""
        return {"covariance_weight": self.covariance_weight, "norm_weight": self.norm_weight}


@dataclass(frozen=True)
class NullSpace:
    """G⁻¹ = P / L2, with P = basis @ dual.

    Attributes:
        basis: `[m, r]`: orthonormal eigenvectors, or a given P.
        dual: `[r, m]`: the basis transposed; None if `basis` is a given P.
        norm_weight: L2.
        fraction: rank(P) / m.
    """

    basis: Float[Tensor, "m r"]
    dual: Float[Tensor, "r m"] | None
    norm_weight: float
    fraction: float

    @classmethod
    def of(cls, moment: SecondMoment, config: MemitConfig) -> NullSpace:
        """Find the null space of C.

        Raises:
            ValueError: No eigenvalue of C, or every one, is below the threshold.
        """
        values, vectors = torch.linalg.eigh(moment.C.double())  # ascending
        m, threshold = len(values), config.threshold
        if threshold is None and config.variant == "released":
            threshold = 0.02
        rank = (
            round(config.null_fraction * m)
            if threshold is None
            else int((values < threshold).sum())
        )
        if not 0 < rank < m:
            raise ValueError(
                f"{rank} of the {m} eigenvalues of C are in AlphaEdit's null space, so nothing "
                f"{'can change' if rank == 0 else 'is preserved'}; they are between "
                f"{values[0].item():.3g} and {values[-1].item():.3g}, and the threshold is "
                f"{threshold}: pass another threshold, or null_fraction="
            )
        if (weight := config.norm_weight) is None:
            weight = 10.0 if config.variant == "released" else values[:rank].sum().item()
            if moment.n_tokens < m and config.variant != "released":
                raise ValueError(singular(moment, "norm_weight=, AlphaEdit's L2"))
        logger.info("null space: rank(P) / d_mlp = %.3f, L2 = %.3g", rank / m, weight)
        basis = vectors[:, :rank].contiguous()
        return cls(basis, basis.T, _positive(weight), rank / m)

    @classmethod
    def given(cls, projector: Float[Tensor, "m m"], norm_weight: float | None) -> NullSpace:
        """Use a given P; `norm_weight=None` is the released L2, 10.

        Raises:
            ValueError: P is no matrix of d_mlp rows and columns that projects onto a part of them.
        """
        P = projector.double()
        square = P.ndim == 2 and P.shape[0] == P.shape[1]
        rank = round(P.trace().item()) if square else 0
        if not square or not 0 < rank < len(P) or (P @ P - P).norm() > 1e-2 * P.norm():
            raise ValueError(
                f"a projector is [d_mlp, d_mlp] with P @ P = P and a rank between 1 and d_mlp - 1; "
                f"got {tuple(P.shape)}" + (f" with trace {P.trace().item():.4g}" if square else "")
            )
        weight = 10.0 if norm_weight is None else norm_weight
        return cls(P, None, _positive(weight), rank / len(P))

    def inverse(self, keys: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        """Return P / L2 times some keys."""
        inside = keys.to(self.basis) if self.dual is None else self.dual @ keys.to(self.basis)
        return self.basis @ inside / self.norm_weight

    def summary(self) -> dict[str, Any]:
        """Return L2 and rank(P) / m."""
        return {"norm_weight": self.norm_weight, "null_fraction": self.fraction}


def metric_of(
    solve: Solve,
    config: MemitConfig,
    moment: SecondMoment,
    projector: Float[Tensor, "m m"] | None = None,
) -> Metric:
    """Return the metric of a closed form from the statistics of a layer.

    Raises:
        ValueError: C is singular, the null space is empty or everything, or L2 is 0.
    """
    if solve == "alphaedit":
        if projector is not None:
            return NullSpace.given(projector, config.norm_weight)
        return NullSpace.of(moment, config)
    weight = moment.d_mlp if config.covariance_weight is None else config.covariance_weight
    return Covariance.of(moment, float(weight), config.norm_weight or 0.0)


class Solved(NamedTuple):
    """The left factor, and what each fact alone would absorb.

    Attributes:
        left: `[m, n]`, float64.
        s: kᵀ G⁻¹ k of each fact.
    """

    left: Float[Tensor, "m n"]
    s: Float[Tensor, "n"]


def solve_many(
    metric: Metric,
    keys: Float[Tensor, "m n"],
    earlier: Float[Tensor, "m n_prev"] | None = None,
    *,
    slack: float = 1.0,
    relative: bool = False,
) -> Solved:
    """Return the left factor of the change of W_out; the right one is the residuals.

    Args:
        metric: G⁻¹.
        keys: K.
        earlier: K_prev.
        slack: σ; with `relative`, in units of the mean of diag(Kᵀ G⁻¹ K).
        relative: See `slack`.

    Raises:
        ValueError: There are more keys than they have dimensions, or with σ = 0 they depend on
            each other.
    """
    m, n = keys.shape
    check_room(m, n)
    J = keys if earlier is None else torch.cat([earlier.to(keys), keys], 1)
    X = metric.inverse(J)  # G⁻¹ J, float64
    J = J.cpu().to(X)  # not every device has float64
    core = J.T @ X
    core = (core + core.T) / 2
    s = core.diagonal()[-n:].clone()
    if slack == 0:
        _check_independent(core, m)
    core.diagonal().add_(slack * s.mean() if relative else slack)
    factor, failed = torch.linalg.cholesky_ex(core)
    if failed:
        raise ValueError(
            f"the solve for {n} facts has no Cholesky factor: a key is not finite, or keys are "
            "equal; leave out facts with the same subject and prompt, or pass a slack"
        )
    E = torch.eye(len(core), dtype=core.dtype, device=core.device)[:, -n:]
    return Solved(X @ torch.cholesky_solve(E, factor), s)


def check_room(m: int, n: int) -> None:
    """Raise ValueError if there are more facts than dimensions of their keys."""
    if n > m:
        raise ValueError(
            f"one edit can hold at most d_mlp = {m} facts, as many as its keys have dimensions, "
            f"got {n}; write them in several batches, with a history"
        )


def _check_independent(core: Float[Tensor, "n n"], m: int) -> None:
    """Raise ValueError if the keys cannot all get their targets exactly."""
    values = torch.linalg.eigvalsh(core) if len(core) <= m else core.new_zeros(2)
    if not values[0] > 1e-12 * values[-1]:
        raise ValueError(
            f"these {len(core)} keys of {m} dimensions, earlier batches included, depend on each "
            "other, so they cannot all get exactly their targets; leave out facts with the same "
            "subject and prompt, or pass a slack, for instance MemitConfig(slack=1e-3)"
        )


def _positive(norm_weight: float) -> float:
    """Return L2; raise ValueError if it is 0."""
    if not norm_weight > 0:
        raise ValueError(f"AlphaEdit needs a positive norm_weight, its L2, got {norm_weight}")
    return norm_weight
