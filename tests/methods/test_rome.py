"""The algebra of ROME: what the rank-one update must satisfy, on both kinds of MLP."""

import dataclasses

import pytest
import torch
from conftest import make_model
from helpers import tiny_models
from helpers.rome_setting import (
    CONFIG,
    LAYER,
    PREFIXES,
    REQUEST,
    keys_and_values,
    random_moment,
    small_edit,
)

from transformer_lens_rome import RomeConfig, SecondMoment, applied
from transformer_lens_rome.methods.rank_one import solve_rank_one
from transformer_lens_rome.model.adapter import b_out, w_out
from transformer_lens_rome.prompts.encoder import Encoder

RELEASED = dataclasses.replace(CONFIG, key="released")


@pytest.fixture(params=["gpt2", "gemma3"])
def model(request, model_class, tokenizer, bos_tokenizer):
    known = bos_tokenizer if request.param == "gemma3" else tokenizer
    return make_model(model_class, request.param, known)


def one_by_one(model, prefixes=PREFIXES):
    """Keys and values of REQUEST's subject after each prefix, one row at a time."""
    encoder = Encoder.of(model)
    rows = [encoder.templated_row(REQUEST.prompt, REQUEST.subject, p) for p in prefixes]
    pairs = [keys_and_values(model, [row]) for row in rows]
    return torch.cat([k for k, _ in pairs]), torch.cat([v for _, v in pairs])


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def draw(*size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*size, generator=generator, dtype=torch.float64)


# ---------------------------------------------------------------- Eq. 2 on a model


def test_k_star_is_the_mean_key_and_gets_v_star(model):
    edit = small_edit(model)
    keys, values = one_by_one(model)
    assert relative(edit.k_star, keys.mean(0)) < 1e-5
    assert relative(edit.k_star, keys[0]) > 0.05  # control: the bare key is another one
    before = edit.k_star @ w_out(model, LAYER) + b_out(model, LAYER)
    assert relative(before, values.mean(0)) < 1e-5
    assert relative(before, edit.v_star) > 0.05  # control: it had another value
    with applied(model, edit):
        W1 = w_out(model, LAYER).detach().clone()
        after, moved = one_by_one(model)
    assert relative(edit.k_star @ W1 + b_out(model, LAYER), edit.v_star) < 1e-5
    assert relative(moved.mean(0), edit.v_star) < 1e-4  # and so it is in the forward pass
    assert relative(after, keys) < 1e-5  # the edit changes no key of its own layer
    wrong = keys.mean(0).flip(0)
    assert relative(wrong @ W1 + b_out(model, LAYER), edit.v_star) > 0.05


@pytest.mark.parametrize("key", ["mean", "released"])
def test_delta_has_rank_one_and_is_the_constrained_optimum(model, key):
    """KKT: C delta = k lamᵀ, so delta is C-orthogonal to all that leaves k's value alone."""
    moment = random_moment(len(w_out(model, LAYER)))
    edit = small_edit(model, second_moment=moment, config=dataclasses.replace(CONFIG, key=key))
    delta, C = edit.delta().double(), moment.C
    singular = torch.linalg.svdvals(delta)
    assert singular[0] > 1e-3 and singular[1] < 1e-6 * singular[0]
    k_mean = one_by_one(model)[0].mean(0).double()
    multiplier = torch.outer(k_mean, edit.lam.double())
    assert relative(C @ delta, multiplier) < 1e-4
    assert relative(delta, multiplier) > 0.5  # control: C = I is another edit

    N = draw(*delta.shape)
    N -= torch.outer(k_mean, k_mean @ N) / (k_mean @ k_mean)
    scale = (C @ delta).norm() * N.norm()
    assert abs((delta * (C @ N)).sum()) < 1e-5 * scale
    off = N + torch.outer(k_mean, draw(delta.shape[1], seed=1))  # control: moves k's value
    assert abs((delta * (C @ off)).sum()) > 1e-3 * scale


def test_a_key_that_is_C_orthogonal_to_k_star_keeps_its_value(model):
    moment = random_moment(len(w_out(model, LAYER)))
    edit = small_edit(model, second_moment=moment)
    u = moment.solve(edit.k_star)
    x = draw(len(u))
    x -= u * (x @ u) / (u @ u)
    moved = x @ edit.delta().double()
    assert moved.norm() < 1e-5 * x.norm() * edit.delta().norm()
    plain = draw(len(u))  # control: orthogonal to k* without C
    k = edit.k_star.double()
    plain -= k * (plain @ k) / (k @ k)
    assert (plain @ edit.delta().double()).norm() > 1e-3 * plain.norm() * edit.delta().norm()


def test_the_scale_of_C_does_not_matter_but_C_does(model):
    moment = random_moment(len(w_out(model, LAYER)))
    scaled = SecondMoment.from_moment(moment.C * 1000, moment.n_tokens)
    other = random_moment(len(w_out(model, LAYER)), seed=1)
    edit = small_edit(model, second_moment=moment)
    assert relative(small_edit(model, second_moment=scaled).delta(), edit.delta()) < 1e-4
    assert relative(small_edit(model, second_moment=other).delta(), edit.delta()) > 0.1


def test_identity_gives_the_least_norm(model):
    d_mlp = len(w_out(model, LAYER))
    least = small_edit(model, second_moment=SecondMoment.identity(d_mlp))
    edit = small_edit(model)
    assert relative(least.v_star, edit.v_star) < 1e-5  # they meet the same constraint
    assert least.delta().norm() < 0.95 * edit.delta().norm()
    k = least.k_star.double()
    for seed in range(20):
        N = draw(*least.delta().shape, seed=seed)
        N -= torch.outer(k, k @ N) / (k @ k)
        other = least.delta().double() + 0.01 * N
        assert relative(k @ other, k @ least.delta().double()) < 1e-5
        assert other.norm() > least.delta().norm()


def test_a_ridge_leaves_the_constraint_and_tends_to_the_identity(model):
    plain, some, much = (
        small_edit(model, config=dataclasses.replace(CONFIG, ridge=r)) for r in (0, 0.1, 1e6)
    )
    identity = small_edit(model, second_moment=SecondMoment.identity(len(w_out(model, LAYER))))
    for edit in (plain, some, much):
        gained = edit.k_star @ edit.delta()
        assert relative(gained, identity.k_star @ identity.delta()) < 1e-4
    assert plain.delta().norm() > some.delta().norm() > much.delta().norm()
    assert relative(much.delta(), identity.delta()) < 1e-3


# ---------------------------------------------------------------- the solve by itself, in float64


@pytest.mark.parametrize("key", ["mean", "released"])
def test_rotating_the_key_basis_rotates_the_edit(key):
    keys, values, v_star = draw(3, 20), draw(3, 7, seed=1), draw(7, seed=2)
    moment, Q = random_moment(20), torch.linalg.qr(draw(20, 20, seed=3)).Q
    turned = SecondMoment.from_moment(Q.T @ moment.C @ Q, moment.n_tokens)
    config = RomeConfig(key=key)
    plain = solve_rank_one(keys, values, v_star, moment, config)
    rotated = solve_rank_one(keys @ Q, values, v_star, turned, config)
    delta = torch.outer(plain.u, plain.lam)
    torch.testing.assert_close(torch.outer(rotated.u, rotated.lam), Q.T @ delta)
    torch.testing.assert_close(rotated.k_star, plain.k_star @ Q)
    unturned = solve_rank_one(keys @ Q, values, v_star, moment, config)  # control
    assert relative(torch.outer(unturned.u, unturned.lam), Q.T @ delta) > 0.1


def test_the_solve_on_paper():
    """One key (2, 0), C = diag(4, 1), value 1 wanted 3: u = (1/2, 0), u·k = 1, lam = 2."""
    moment = SecondMoment.from_moment(torch.tensor([[4.0, 0.0], [0.0, 1.0]]), 100)
    keys, values = torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0]])
    found = solve_rank_one(keys, values, torch.tensor([3.0]), moment, RomeConfig())
    assert found.u.tolist() == [0.5, 0.0] and found.lam.tolist() == [2.0]
    assert found.k_star.tolist() == [2.0, 0.0] and found.v_star.tolist() == [3.0]


# ---------------------------------------------------------------- the released configuration


def test_released_gives_the_bare_key_its_value_along_the_mean_key(model):
    edit = small_edit(model, config=RELEASED)
    keys, _ = one_by_one(model)
    assert relative(edit.k_star, keys[0]) < 1e-5
    moment = random_moment(len(w_out(model, LAYER)))
    assert relative(edit.u, moment.solve(keys.mean(0)).float()) < 1e-4
    assert relative(edit.u, moment.solve(keys[0]).float()) > 0.05  # control
    with applied(model, edit):
        _, values = one_by_one(model)
    assert relative(values[0], edit.v_star) < 1e-4
    assert relative(values.mean(0), edit.v_star) > 0.01  # which is what r-ROME objects to


def test_with_one_bare_prefix_both_configurations_agree(model):
    mean, released = (small_edit(model, prefixes=[""], config=c) for c in (CONFIG, RELEASED))
    assert relative(released.delta(), mean.delta()) < 1e-6
    assert released.health.losses == mean.health.losses
    mean, released = (small_edit(model, config=c) for c in (CONFIG, RELEASED))
    assert relative(released.delta(), mean.delta()) > 0.01  # control: with three they do not


def test_the_order_of_prefixes_does_not_matter(model):
    edit = small_edit(model)
    turned = small_edit(model, prefixes=PREFIXES[::-1])
    assert relative(turned.delta(), edit.delta()) < 1e-3
    fewer = small_edit(model, prefixes=PREFIXES[:2])
    assert relative(fewer.delta(), edit.delta()) > 0.01  # control: which ones does


# ---------------------------------------------------------------- both model classes


@pytest.mark.parametrize("shape", [s for s in tiny_models.SHAPES if tiny_models.has_hooked()])
@pytest.mark.skipif(not tiny_models.has_bridge(), reason="no bridge to compare with")
def test_equal_weights_give_equal_edits_in_both_classes(shape, tokenizer, bos_tokenizer):
    known = bos_tokenizer if shape in ("llama", "gemma2", "gemma3") else tokenizer
    hooked, bridge = (make_model(c, shape, known) for c in ("hooked", "bridge"))
    mine, other = small_edit(hooked), small_edit(bridge)
    assert mine.model_hash == other.model_hash
    assert relative(mine.delta(), other.delta()) < 1e-3
    assert mine.health.losses == pytest.approx(other.health.losses, rel=1e-4)
    assert mine.config == other.config
    assert mine.provenance["prepend_bos"] == other.provenance["prepend_bos"]
