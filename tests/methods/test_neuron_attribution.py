"""KN's attributions are integrated gradients of a probability."""

from __future__ import annotations

import pytest
import torch
from conftest import make_model
from helpers.neuron_setting import (
    LAYERS,
    SHAPES,
    assert_close,
    by_hand,
    clean,
    probability,
    prompt_ids,
)
from helpers.rome_setting import REQUEST

from transformer_lens_rome import get_method
from transformer_lens_rome.prompts.encoder import Encoder


@pytest.mark.parametrize("activation", ("pre", "post"))
@pytest.mark.parametrize("shape", SHAPES)
def test_attributions_are_integrated_gradients(model_class, shape, activation, tokenizer_of):
    model = make_model(model_class, shape, tokenizer_of(shape))
    found = get_method("kn", activation=activation).attribute(model, REQUEST)
    ids, labels = prompt_ids(model), Encoder.of(model).ids("Seattle")
    assert (ids[0] == model.tokenizer.bos_token_id) == (shape == "gemma3")
    assert len(labels) > 1  # several tokens, all after the bare prompt
    assert_close(found, by_hand(model, ids, labels, activation))
    other = by_hand(model, ids, labels, "post" if activation == "pre" else "pre")
    assert (found - other).norm() > 0.01 * found.norm()  # the control: the choice matters


@pytest.mark.parametrize(("shape", "activation"), zip(SHAPES, ("pre", "post", "pre", "post")))
def test_attributions_are_differences_of_probabilities(model_class, shape, activation, tokenizer):
    """Without the point 0, where the norm after Gemma's MLP makes P as good as discontinuous."""
    model = make_model(model_class, shape, tokenizer)
    found = get_method("kn", activation=activation, both_ends=False).attribute(model, REQUEST)
    ids, labels = prompt_ids(model), Encoder.of(model).ids("Seattle")
    for layer, i in [(layer, found[layer].abs().argmax().item()) for layer in LAYERS]:
        a = clean(model, ids, activation, layer)
        path = torch.arange(1, 21)[:, None] / 20 * a
        step = torch.zeros_like(a)
        step[i] = 0.01 * a.abs().max()
        with torch.no_grad():
            up, down = (
                probability(model, ids, labels, activation, layer, path + sign * step)
                for sign in (1, -1)
            )
        slope = ((up - down) / (2 * step[i])).mean()
        assert found[layer, i].item() == pytest.approx((a[i] * slope).item(), rel=0.02)


@pytest.mark.parametrize("both_ends", (True, False))
@pytest.mark.parametrize("shape", ("gpt2", "llama"))
def test_a_layers_attributions_add_up(model_class, shape, both_ends, tokenizer):
    """S · sum of Attr is S · the difference of P, plus what S does not change, plus O(1 / S).

    With both ends it is (S - 1) · the difference and half of both, by the trapezoidal rule.
    """
    model = make_model(model_class, shape, tokenizer)
    ids, labels = prompt_ids(model), Encoder.of(model).ids("Seattle")
    gained = []
    for layer in LAYERS:
        a = clean(model, ids, "post", layer)
        ends = torch.stack([torch.zeros_like(a), a])
        off, on = probability(model, ids, labels, "post", layer, ends).detach()
        gained.append(on - off)
    gained = torch.stack(gained)
    for activation in ("pre", "post"):  # two paths with the same ends
        options = {"activation": activation, "both_ends": both_ends, "batch_size": 200}
        few, many = (
            get_method("kn", steps=steps, **options).attribute(model, REQUEST).sum(1)
            for steps in (50, 150)
        )
        assert_close((150 * many - 50 * few) / 100, gained, 5e-3)
        assert_close(many, gained, 0.05)
        assert (many - gained).norm() < 0.5 * (few - gained).norm()  # O(1 / S), to be exact


def test_a_norm_after_the_mlp_hides_the_path(gemma3):
    """What the module's docstring says of Gemma: the point 0 is all there is to the sum."""
    whole = get_method("kn", activation="post").attribute(gemma3, REQUEST)
    rest = get_method("kn", activation="post", both_ends=False).attribute(gemma3, REQUEST)
    assert (rest.sum(1).abs() < 1e-3 * whole.sum(1).abs()).all()
    assert (rest.abs().sum(1) > 100 * rest.sum(1).abs()).all()  # they cancel, but are there


@pytest.mark.parametrize("batch_size", (1, 7, 20, 45))
def test_batches_change_nothing(gpt2, batch_size):
    whole = get_method("kn", batch_size=1000).attribute(gpt2, REQUEST)
    assert_close(get_method("kn", batch_size=batch_size).attribute(gpt2, REQUEST), whole, 1e-5)


def test_models_that_are_run_whole_give_the_same(gemma3):
    cut = get_method("kn").attribute(gemma3, REQUEST)
    seen = []
    with gemma3.hooks(fwd_hooks=[("blocks.0.hook_resid_post", lambda t, hook: seen.append(t))]):
        whole = get_method("kn").attribute(gemma3, REQUEST)
    assert len(seen) > len(LAYERS)
    assert_close(whole, cut)
