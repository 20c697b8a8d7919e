"""The rank-one solution of ROME's Eq. 2: the update u Λᵀ of W_out (Meng et al. 2022)."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from transformer_lens_rome.methods.rome_config import RomeConfig
from transformer_lens_rome.statistics.second_moment import SecondMoment


class RankOneUpdate(NamedTuple):
    """The solution of Eq. 2 and the key that it maps to v*."""

    k_star: Float[Tensor, "d_mlp"]
    u: Float[Tensor, "d_mlp"]
    lam: Float[Tensor, "d_model"]
    v_star: Float[Tensor, "d_model"]


def solve_rank_one(
    keys: Float[Tensor, "prefix d_mlp"],
    values: Float[Tensor, "prefix d_model"],
    v_star: Float[Tensor, "d_model"],
    second_moment: SecondMoment,
    config: RomeConfig,
) -> RankOneUpdate:
    """Solve Eq. 2: the smallest change, in the metric of C, that gives the key k* the value v*.

    With `config.key == "released"`, k* is the key of the first row, the bare prompt.
    """
    k_mean = keys.mean(0)  # Eq. 3
    u = second_moment.solve(k_mean, ridge=config.ridge).to(keys)  # C⁻¹ k*
    k_star = keys[0] if config.key == "released" else k_mean
    value = values[0] if config.key == "released" else values.mean(0)  # W k*, bias included
    lam = (v_star - value) / (u @ k_star)  # Eq. 2, Λ
    return RankOneUpdate(k_star, u, lam, v_star)
