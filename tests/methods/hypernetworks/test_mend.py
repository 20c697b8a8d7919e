"""MEND's network is the paper's formula, starts as the identity, and keeps its statistics fixed."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import make_model
from helpers.editor_setting import (
    REQUEST,
    dense,
    factors_of,
    random_editor,
    redraw_mend,
    same_tensors,
    sample_of,
    shapes_of,
)

from transformer_lens_rome import EditRequest, get_method
from transformer_lens_rome.methods.hypernetworks.hypernetwork import Text, TokenFactors
from transformer_lens_rome.methods.hypernetworks.mend import MendNetwork, Moments, ResidualLayer
from transformer_lens_rome.model.adapter import Weight

OTHER = EditRequest("The mother tongue of {} is", "Angela Merkel", "Italian", "German")


@pytest.fixture(params=("gpt2", "llama"))
def model(request, model_class, tokenizer):
    """A model without and one with a gate."""
    return make_model(model_class, request.param, tokenizer)


def drawn(shapes, *, seed=0):
    """A network with every tensor redrawn, in double precision, in eval mode."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.random.set_rng_state(torch.Generator().manual_seed(seed).get_state())
        network = MendNetwork(shapes)
        for name, tensor in network.state_dict().items():
            redraw_mend(name, tensor)
    return network.double().eval()


@pytest.fixture(autouse=True)
def _no_trace_of_new_networks():
    """A bare network draws V from the global generator; `fit` takes care of that, these do not."""
    with torch.random.fork_rng(devices=[]):
        yield


def in_double(factors):
    return {w: TokenFactors(f.x.double(), f.delta.double()) for w, f in factors.items()}


def normalised(vectors, seen):
    """By the mean and the unbiased standard deviation of what was seen."""
    every = torch.cat(seen)
    return (vectors - every.mean(0)) / (every.std(0) + 1e-7)


def changes(network, factors):
    return {where: dense(both) for where, both in network(factors, None).items()}


# ---------------------------------------------------------------- statistics


@pytest.mark.parametrize("batch", (1, 2, 7, 50))
def test_moments_are_welfords_for_any_batching(batch):
    vectors = 20 + torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    moments = Moments(6)
    for some in vectors.split(batch):
        moments.update(some)
    mean, squares = torch.zeros(6).double(), torch.zeros(6).double()
    for k, x in enumerate(vectors.double(), start=1):
        old = mean.clone()
        mean += (x - mean) / k
        squares += (x - old) * (x - mean)
    assert moments.n == 50
    assert torch.allclose(moments.mean.double(), mean, rtol=1e-6)
    assert torch.allclose(moments.squares.double(), squares, rtol=1e-4)
    expected = (vectors - vectors.mean(0)) / vectors.std(0)  # torch's is the unbiased one
    assert torch.allclose(moments.normalised(vectors), expected, atol=1e-4)
    biased = (vectors - vectors.mean(0)) / vectors.std(0, correction=0)
    assert not torch.allclose(moments.normalised(vectors), biased, atol=1e-3)


def test_moments_take_no_harm_from_nothing_and_from_nan():
    moments, vectors = Moments(3), torch.randn(9, 3)
    moments.update(vectors)
    before = copy.deepcopy(moments.state_dict())
    moments.update(torch.zeros(0, 3))
    moments.update(torch.tensor([[0.0, torch.nan, 1.0], [torch.inf, 0.0, 0.0]]))
    assert same_tensors(moments.state_dict(), before)
    assert torch.equal(Moments(3).normalised(torch.zeros(1, 3)), torch.zeros(1, 3))


def test_in_training_they_are_those_of_all_matrices_of_a_shape_so_far(model):
    factors = factors_of(model)
    network = MendNetwork(shapes_of(model)).train()
    network(factors, None)
    network(factors_of(model, OTHER), None)
    every = [factors, factors_of(model, OTHER)]
    for shape, editor in network.editors.items():
        own = [w for w, (name, _) in network.places.items() if name == shape]
        for side, moments in enumerate((editor.x, editor.delta)):
            vectors = torch.cat([one[where][side] for one in every for where in own])
            assert moments.n == len(vectors) > 0
            assert torch.allclose(moments.mean, vectors.mean(0), rtol=1e-3, atol=1e-6)


# ---------------------------------------------------------------- how it starts


def test_it_starts_as_alpha_times_the_normalised_gradient(model):
    factors = in_double(factors_of(model))
    network = MendNetwork(shapes_of(model)).double().train()
    seen = {}
    for where, change in changes(network, factors).items():
        shape = network.places[where][0]
        parts = []
        for side, vectors in enumerate(factors[where]):
            seen.setdefault((shape, side), []).append(vectors)
            parts.append(normalised(vectors, seen[shape, side]))
        expected = 1e-4 * parts[0].T @ parts[1]
        assert expected.abs().max() > 1e-5
        assert torch.allclose(change, expected, rtol=1e-5, atol=1e-12)


def test_which_matrix_it_is_makes_no_difference_at_first(model):
    factors, network = factors_of(model), MendNetwork(shapes_of(model)).eval()
    where = Weight("W_out", 1)
    editor = network.editors[network.places[where][0]]
    editor.train()(factors[where], 0)
    editor.eval()
    first, second = (torch.cat(editor(factors[where], which), 1) for which in (0, 2))
    assert torch.equal(first, second)
    with torch.no_grad():
        editor.layers[1].shift[2] += 0.5
    assert not torch.equal(first, torch.cat(editor(factors[where], 2), 1))


def test_the_first_gradient_reaches_u(model, monkeypatch):
    factors = factors_of(model)

    def gradients():
        network = MendNetwork(shapes_of(model)).train()
        total = sum((c * torch.linspace(-1, 1, c.shape[1])).sum() for c in _of(network).values())
        total.backward()
        return {n: p.grad.norm().item() for n, p in network.named_parameters()}

    def _of(network):
        return changes(network, factors)

    mine = gradients()
    for name, norm in mine.items():  # V stands behind U = 0, and what scale multiplies is 0
        assert (norm == 0) == name.endswith((".v", ".scale"))

    def with_relu(self, z, which):
        y = z @ self.v.T @ self.u.T + self.bias
        return z + torch.relu(y * self.scale[which] + self.shift[which])

    monkeypatch.setattr(ResidualLayer, "forward", with_relu)
    dead = gradients()  # the control: its gradient at zero is zero, and nothing but alpha learns
    assert [name for name, norm in dead.items() if norm > 0] == ["alpha"]


# ---------------------------------------------------------------- the formula


def by_hand(network, where, factors):
    """Section 3.2's formula, entry by entry, for one token at a time."""
    name, which = network.places[where]
    state = {k.removeprefix(f"editors.{name}."): v for k, v in network.state_dict().items()}
    alpha = state["alpha"][list(network.places).index(where)]
    total = 0
    for token in range(len(factors.x)):
        parts = []
        for side, vector in (("x", factors.x[token]), ("delta", factors.delta[token])):
            std = (state[f"{side}.squares"] / (state[f"{side}.n"] - 1)).sqrt()
            parts.append((vector - state[f"{side}.mean"]) / (std + 1e-7))
        z = torch.cat(parts)
        for layer in ("layers.0", "layers.1"):
            y = state[f"{layer}.u"] @ (state[f"{layer}.v"] @ z) + state[f"{layer}.bias"]
            y = y * state[f"{layer}.scale"][which] + state[f"{layer}.shift"][which]
            assert 0.05 < (y > 0).double().mean() < 0.95  # both sides of the rectifier
            z = torch.maximum(y, torch.zeros_like(y)) + z
        total = total + alpha * torch.outer(z[: len(parts[0])], z[len(parts[0]) :])
    return total


def test_it_is_the_papers_formula(model):
    network, factors = drawn(shapes_of(model)), in_double(factors_of(model))
    for where, change in changes(network, factors).items():
        expected = by_hand(network, where, factors[where])
        assert torch.allclose(change, expected, rtol=1e-9, atol=1e-12)
    single = changes(network.float(), factors_of(model))[where]
    assert torch.allclose(single.double(), expected, rtol=1e-2, atol=1e-4 * expected.abs().max())


def test_the_inner_width_is_bounded():
    assert ResidualLayer(40, 1).u.shape == (40, 40)
    with torch.device("meta"):
        assert ResidualLayer(8000, 3).u.shape == (8000, 1920)


def test_what_matrices_share(model):
    network, factors = drawn(shapes_of(model)), in_double(factors_of(model))
    shapes = shapes_of(model)
    assert len(network.editors) == 2  # W_in and W_gate are of one shape
    where, before = Weight("W_in", 1), changes(network, factors)
    name, which = network.places[where]

    def moved(parameter):
        with torch.no_grad():
            parameter += 0.3
            after = changes(network, factors)
            parameter -= 0.3
        return {w for w in before if not torch.allclose(after[w], before[w], rtol=1e-9)}

    alike = {w for w, shape in shapes.items() if shape == shapes[where]}
    assert len(alike) < len(shapes)
    for layer in network.editors[name].layers:
        for part in (layer.u, layer.v, layer.bias):
            assert moved(part) == alike
        for part in (layer.scale, layer.shift):
            assert len(part) == len(alike) and moved(part[which]) == {where}
    assert moved(network.alpha[list(shapes).index(where) : list(shapes).index(where) + 1]) == {
        where
    }


# ---------------------------------------------------------------- editing


def test_swapping_exchanges_the_step_sizes_of_a_block(model):
    editor = random_editor(model, "mend")
    alpha = dict(zip(editor.matrices, editor.tensors["alpha"].tolist(), strict=True))
    plain = get_method("mend", editor=editor).compute(model, REQUEST).changes()
    swapped = get_method("mend", editor=editor, swap_alphas=True).compute(model, REQUEST).changes()
    partner = {"W_in": "W_out", "W_out": "W_in", "W_gate": "W_gate"}
    for where, change in plain.items():
        ratio = alpha[Weight(partner[where.name], where.layer)] / alpha[where]
        assert ratio == 1 if where.name == "W_gate" else abs(ratio - 1) > 0.01
        rounding = 1e-5 * change.abs().max().item()
        assert torch.allclose(swapped[where], ratio * change, rtol=1e-4, atol=rounding)
    alone = random_editor(model, "mend", matrices=[Weight("W_out", 1)])
    one, other = (
        get_method("mend", editor=alone, swap_alphas=swap).compute(model, REQUEST).digest
        for swap in (False, True)
    )
    assert one == other


def test_own_statistics_are_those_of_the_edits_tokens(model):
    factors, shapes = in_double(factors_of(model)), shapes_of(model)
    network = drawn(shapes)
    stored, state = changes(network, factors), copy.deepcopy(network.state_dict())
    network.own_statistics = True
    mine = changes(network, factors)
    assert same_tensors(network.state_dict(), state)
    fresh = drawn(shapes).train()  # whose own statistics come from these tokens alone
    for editor in fresh.editors.values():
        for moments in (editor.x, editor.delta):
            for part in (moments.n, moments.mean, moments.squares):
                part.zero_()
    expected = changes(fresh, factors)
    for where, change in mine.items():
        assert torch.allclose(change, expected[where], rtol=1e-3, atol=1e-3)  # in float32
        assert not torch.allclose(change, stored[where], rtol=0.1)  # the control


def test_a_network_that_has_seen_nothing_uses_the_edits_own_tokens(gpt2):
    network, factors = MendNetwork(shapes_of(gpt2)).eval(), factors_of(gpt2)
    found = changes(network, factors)
    assert max(change.abs().max() for change in found.values()) < 0.1
    assert all(editor.x.n == 0 for editor in network.editors.values())


@pytest.mark.parametrize("options", ({}, {"swap_alphas": True, "own_statistics": True}), ids=str)
def test_edits_depend_on_nothing_but_model_and_request(model, options):
    editor = random_editor(model, "mend")
    state = {name: tensor.clone() for name, tensor in editor.tensors.items()}
    method = get_method("mend", editor=editor, **options).prepared(model)
    first = [method.compute(model, one).digest for one in (REQUEST, OTHER, REQUEST)]
    again = [method.compute(model, one, seed=7).digest for one in (OTHER, REQUEST)]
    assert first == [again[1], again[0], again[1]] and again[0] != again[1]
    assert same_tensors(editor.tensors, state)


def test_the_text_is_not_read(gpt2):
    network, factors = drawn(shapes_of(gpt2)).float(), factors_of(gpt2)
    text = Text.of(gpt2, sample_of(gpt2, OTHER))
    one, other = network(factors, text), network(factors, None)
    assert all(torch.equal(dense(one[where]), dense(other[where])) for where in one)
