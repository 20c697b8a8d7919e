"""The algebra of the family: one solve, and what MEMIT, EMMET and AlphaEdit must satisfy."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers.rome_setting import random_moment

from transformer_lens_rome import RomeConfig, SecondMoment
from transformer_lens_rome.methods import MemitConfig
from transformer_lens_rome.methods.mass_config import PUBLISHED
from transformer_lens_rome.methods.mass_solve import Covariance, NullSpace, metric_of, solve_many
from transformer_lens_rome.methods.rank_one import solve_rank_one

M, N, D = 40, 6, 12
MOMENT = random_moment(M)
C = MOMENT.C


def draw(*size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*size, generator=generator, dtype=torch.float64)


K, RIGHT, EARLIER = draw(M, N), draw(N, D, seed=1), draw(M, 4, seed=2)


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def change(metric, keys=K, right=RIGHT, earlier=None, **options):
    return solve_many(metric, keys, earlier, **options).left @ right


def covariance(weight=3.0, norm_weight=0.0):
    return Covariance.of(MOMENT, weight, norm_weight)


# ---------------------------------------------------------------- MEMIT


@pytest.mark.parametrize("norm_weight", [0.0, 0.7])
@pytest.mark.parametrize("earlier", [None, EARLIER], ids=["first", "later"])
def test_woodbury_is_the_direct_solve(norm_weight, earlier):
    H = torch.zeros(M, M) if earlier is None else earlier @ earlier.T
    direct = torch.linalg.solve(
        3.0 * C + norm_weight * torch.eye(M, dtype=C.dtype) + H + K @ K.T, K @ RIGHT
    )
    mine = change(covariance(norm_weight=norm_weight), earlier=earlier)
    assert relative(mine, direct) < 1e-11
    assert relative(change(covariance(2.9), earlier=earlier), direct) > 1e-3  # control


def test_it_is_the_minimum_of_its_objective():
    """The gradient of tr(Δᵀ G Δ) + ||K_prevᵀ Δ||² + ||Kᵀ Δ - Rᵀ||² is 0."""
    delta = change(covariance(), earlier=EARLIER)
    slope = 3.0 * C @ delta + EARLIER @ (EARLIER.T @ delta) + K @ (K.T @ delta - RIGHT)
    assert slope.norm() < 1e-10 * (K @ RIGHT).norm()
    moved = 1.01 * delta
    slope = 3.0 * C @ moved + EARLIER @ (EARLIER.T @ moved) + K @ (K.T @ moved - RIGHT)
    assert slope.norm() > 1e-4 * (K @ RIGHT).norm()  # control


def test_one_fact_absorbs_s_of_one_plus_s():
    for weight in (0.1, 3.0, 500.0):
        solved = solve_many(covariance(weight), K[:, :1])
        s = (K[:, 0] @ torch.linalg.solve(weight * C, K[:, 0])).item()
        assert solved.s.item() == pytest.approx(s)
        assert (K[:, 0] @ solved.left[:, 0]).item() == pytest.approx(s / (1 + s))


def test_the_default_weight_gives_a_key_of_the_corpus_an_s_of_one_on_average():
    metric = metric_of("memit", MemitConfig(), MOMENT)
    mean_s = torch.trace(metric.inverse(C)).item()  # E[kᵀ G⁻¹ k] = tr(G⁻¹ C)
    assert mean_s == pytest.approx(1.0)
    space = metric_of("alphaedit", MemitConfig(), MOMENT)
    assert torch.trace(space.inverse(C)).item() == pytest.approx(1.0)


def test_the_order_of_facts_does_not_matter():
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    plain = solve_many(covariance(), K, EARLIER)
    turned = solve_many(covariance(), K[:, order], EARLIER)
    assert relative(turned.left, plain.left[:, order]) < 1e-11
    assert relative(turned.left @ RIGHT[order], plain.left @ RIGHT) < 1e-11
    assert relative(turned.left @ RIGHT, plain.left @ RIGHT) > 0.1  # control


@pytest.mark.parametrize("solve", ["memit", "alphaedit"])
def test_a_large_weight_changes_nothing(solve):
    """Like one over the weight, as the second order is left out."""
    sizes = []
    for weight in (1e6, 1e7):
        config = MemitConfig(covariance_weight=weight, norm_weight=weight * (solve != "memit"))
        sizes.append(change(metric_of(solve, config, MOMENT)).norm().item())
    assert sizes[0] / sizes[1] == pytest.approx(10, rel=1e-3)


# ---------------------------------------------------------------- batches one after another


@pytest.mark.parametrize("solve", ["memit", "emmet", "alphaedit"])
@pytest.mark.parametrize("sizes", [(2, 4), (1, 1, 1, 1, 1, 1), (5, 1)], ids=str)
def test_with_a_history_batches_give_the_change_of_all_at_once(solve, sizes):
    """Residuals are measured after the earlier batches, through the same keys."""
    metric, slack = metric_of(solve, MemitConfig(), MOMENT), 0.0 if solve == "emmet" else 1.0
    whole = change(metric, slack=slack)

    def in_batches(with_history):
        total, first = torch.zeros_like(whole), 0
        for n in sizes:
            some = slice(first, first + n)
            missing = RIGHT[some] - K[:, some].T @ total
            earlier = K[:, :first] if first and with_history else None
            total = total + change(metric, K[:, some], missing, earlier, slack=slack)
            first += n
        return total

    assert relative(in_batches(True), whole) < 1e-10
    assert relative(in_batches(False), whole) > 1e-2  # control


# ---------------------------------------------------------------- EMMET


def test_emmet_gives_every_key_its_target_and_the_weight_cancels():
    exact = change(covariance(), slack=0.0)
    assert relative(K.T @ exact, RIGHT) < 1e-11
    assert relative(change(covariance(1000.0), slack=0.0), exact) < 1e-11
    soft = change(covariance(), slack=0.1, relative=True)
    assert relative(K.T @ soft, RIGHT) > 1e-2  # control
    assert relative(change(covariance(1000.0), slack=0.1, relative=True), soft) < 1e-11
    absolute = [change(covariance(weight), slack=0.1) for weight in (1.0, 1000.0)]
    assert relative(*absolute) > 0.1  # which is why the default is relative


def test_emmet_is_the_least_change_with_its_constraint():
    """C Δ is in the span of the keys, so no change with Kᵀ Δ = 0 makes tr(Δᵀ C Δ) smaller."""
    exact = change(covariance(), slack=0.0)
    outside = torch.linalg.qr(K, mode="complete").Q[:, N:]
    assert (outside.T @ (C @ exact)).norm() < 1e-10 * (C @ exact).norm()


def test_emmet_of_one_fact_is_rome_with_one_key():
    key, value, target = K[:, 0], draw(D, seed=3), draw(D, seed=4)
    rome = solve_rank_one(key[None], value[None], target, MOMENT, RomeConfig())
    mine = change(covariance(), K[:, :1], (target - value)[None], slack=0.0)
    assert relative(mine, torch.outer(rome.u, rome.lam)) < 1e-12


def test_memit_tends_to_emmet_as_its_weight_tends_to_zero():
    exact = change(covariance(), slack=0.0)
    errors = [relative(change(covariance(weight)), exact) for weight in (1e-2, 1e-4, 1e-6)]
    assert errors[0] / errors[1] == pytest.approx(100, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(100, rel=0.05)


@pytest.mark.parametrize("slack", [0.0, 1.0])
def test_more_facts_than_dimensions_are_refused(slack):
    with pytest.raises(ValueError, match=f"at most d_mlp = {M} facts.*got {M + 1}; .*batches"):
        solve_many(covariance(), draw(M, M + 1), slack=slack)
    assert solve_many(covariance(), draw(M, M), EARLIER).left.shape == (M, M)
    if slack == 0:
        with pytest.raises(ValueError, match=f"{M + 4} keys of {M} dimensions"):
            solve_many(covariance(), draw(M, M), EARLIER, slack=0.0)


def test_keys_that_depend_on_each_other_are_refused_where_targets_are_exact():
    twice = torch.cat([K, K[:, :1]], 1)
    with pytest.raises(ValueError, match="depend on each other.*slack"):
        solve_many(covariance(), twice, slack=0.0)
    with pytest.raises(ValueError, match="depend on each other"):
        solve_many(covariance(), K[:, :2], K[:, 1:3], slack=0.0)
    mean = change(covariance(1e-6), twice, torch.cat([RIGHT, -RIGHT[:1]]))
    assert (K[:, 0] @ mean).norm() < 1e-4 * RIGHT[0].norm()  # MEMIT averages contradictions


# ---------------------------------------------------------------- AlphaEdit


def test_both_forms_of_alphaedit_agree():
    space = NullSpace.of(MOMENT, MemitConfig(null_fraction=0.7, norm_weight=0.3))
    P = space.basis @ space.basis.T
    for earlier in (None, EARLIER):
        H = 0 * C if earlier is None else earlier @ earlier.T
        own = torch.linalg.solve(
            P @ (K @ K.T + H) + 0.3 * torch.eye(M, dtype=C.dtype), P @ K @ RIGHT
        )
        assert relative(change(space, earlier=earlier), own) < 1e-11
        given = NullSpace.given(P, 0.3)
        assert relative(change(given, earlier=earlier), own) < 1e-11


def test_the_null_space_is_that_of_the_smallest_eigenvalues_and_nothing_leaves_it():
    values = torch.linalg.eigvalsh(C)
    space = NullSpace.of(MOMENT, MemitConfig(threshold=values[9:11].mean().item()))
    P = space.basis @ space.basis.T
    assert space.basis.shape == (M, 10) and space.fraction == 0.25
    assert relative(P @ P, P) < 1e-12 and (P - P.T).norm() < 1e-12
    assert torch.trace(P @ C).item() == pytest.approx(values[:10].sum().item())
    delta = change(space)
    assert (delta - P @ delta).norm() < 1e-12 * delta.norm()
    assert relative(change(covariance()), P @ change(covariance())) > 0.1  # control
    same = NullSpace.of(MOMENT, MemitConfig(null_fraction=0.25))
    assert relative(change(same), delta) < 1e-12


def test_an_empty_or_whole_null_space_is_refused():
    low, high = torch.linalg.eigvalsh(C)[[0, -1]].tolist()
    for threshold, rank in ((low / 2, 0), (2 * high, M)):
        with pytest.raises(ValueError, match=f"^{rank} of the {M} eigenvalues.*another threshold"):
            NullSpace.of(MOMENT, MemitConfig(threshold=threshold))
    with pytest.raises(ValueError, match="^0 of the 40"):
        NullSpace.of(MOMENT, MemitConfig(null_fraction=1e-3))
    eye, zero = torch.eye(M), torch.zeros(M, M)
    for wrong in (eye, zero, eye[:3], 2 * torch.diag(torch.arange(M) % 2.0)):
        with pytest.raises(ValueError, match="a projector is"):
            NullSpace.given(wrong, 1.0)
    with pytest.raises(ValueError, match="positive norm_weight"):
        NullSpace.of(MOMENT, MemitConfig(norm_weight=0.0))
    with pytest.raises(ValueError, match="positive norm_weight"):
        NullSpace.given(torch.diag(torch.arange(M) % 2.0), 0.0)


def test_the_released_constants_of_alphaedit_are_absolute():
    moment = SecondMoment.from_moment(torch.diag(torch.tensor([0.01, 0.019, 0.021, 5.0])), 100)
    space = NullSpace.of(moment, MemitConfig.released(threshold=0.02))
    assert space.basis.shape[1] == 2 and space.norm_weight == 10.0


# ---------------------------------------------------------------- statistics and constants


def test_a_singular_c_is_refused_unless_a_norm_term_is_given():
    few = SecondMoment.from_moment(draw(M, 5) @ draw(M, 5).T, 5)
    with pytest.raises(ValueError, match=r"5 tokens is singular.*MemitConfig\(norm_weight=1\)"):
        metric_of("memit", MemitConfig(), few)
    with pytest.raises(ValueError, match="is singular.*norm_weight=, AlphaEdit's L2"):
        metric_of("alphaedit", MemitConfig(), few)
    dead = SecondMoment.from_moment(torch.diag((torch.arange(M) > 0).double()), 1000)
    with pytest.raises(ValueError, match="not positive definite"):
        metric_of("emmet", MemitConfig(), dead)
    solved = solve_many(metric_of("memit", MemitConfig(norm_weight=1.0), few), K)
    assert torch.isfinite(solved.left).all()


def test_the_solve_is_float64_whatever_the_keys_are():
    assert solve_many(covariance(), K.float()).left.dtype == torch.float64
    assert solve_many(covariance(), K.float(), EARLIER.bfloat16()).left.dtype == torch.float64


def test_released_constants_are_those_of_a_model():
    for name, known in PUBLISHED.items():
        config = MemitConfig.released(of=name)
        assert (config.steps, config.lr) == (known.steps, known.lr)
        assert config.covariance_weight == known.covariance_weight
    assert MemitConfig.released(covariance_weight=7).covariance_weight == 7
    encore = MemitConfig.released(norm_weight=10, top_steps=4)
    assert (encore.stop, encore.top_steps, encore.history_keys) == ("top", 4, "solved")
    with pytest.raises(ValueError, match="no published constants of 'mine'; there are"):
        MemitConfig.released(of="mine")


@pytest.mark.parametrize(
    "wrong",
    [
        {"variant": "mean"},
        {"history_keys": "before"},
        {"clamp": None},
        {"clamp": -1.0},
        {"stop": "never"},
        {"top_steps": 0},
        {"covariance_weight": 0.0},
        {"norm_weight": -1.0},
        {"slack": -0.1},
        {"slack": float("nan")},
        {"threshold": 0.0},
        {"null_fraction": 1.0},
        {"null_fraction": 0.0},
        {"anchor": 0.0},
        {"steps": 0},
        {"kl_factor": -1.0},
    ],
    ids=str,
)
def test_wrong_constants_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        dataclasses.replace(MemitConfig(), **wrong)
