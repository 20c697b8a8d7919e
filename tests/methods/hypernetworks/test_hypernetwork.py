"""The gradient's factors are the model's own gradient; a change on trial is that change written."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import make_model
from helpers import tiny_models
from helpers.editor_setting import REQUEST, factors_of, found, gradient, others_of, sample_of
from helpers.rome_setting import factored_edit
from torch.nn.functional import cross_entropy

from transformer_lens_rome import applied
from transformer_lens_rome.methods.hypernetworks import hypernetwork
from transformer_lens_rome.methods.hypernetworks.hypernetwork import (
    Text,
    gradient_factors,
    mlp_matrices,
    outcome,
    running_with,
)
from transformer_lens_rome.model import adapter
from transformer_lens_rome.model.adapter import Weight, parameter

SHAPES = ("gpt2", "gptj", "llama", "gemma3")


def tiny(model_class, shape, tokenizer, bos_tokenizer, **options):
    return make_model(
        model_class, shape, bos_tokenizer if shape == "gemma3" else tokenizer, **options
    )


@pytest.fixture(params=SHAPES)
def model(request, model_class, tokenizer, bos_tokenizer):
    """A fresh tiny model of each shape and class."""
    return tiny(model_class, request.param, tokenizer, bos_tokenizer)


def own_gradients(model, sample, matrices):
    """Gradients of the model's live parameters, as backward() leaves them, turned as W is."""
    model = copy.deepcopy(model)
    owners = {}
    for where in matrices:
        owners[where] = adapter.owner(parameter(model, where)).requires_grad_()
    ids = torch.tensor([sample.ids[:-1]])
    log_probs = model(ids)[0].float().log_softmax(-1)
    picked = [log_probs[p - 1, sample.ids[p]] for p in range(len(sample.ids))[-sample.n_labels :]]
    loss = -torch.stack(picked).mean()
    loss.backward()
    gradients = {}
    for where, owner in owners.items():
        live = parameter(model, where)
        assert live.data_ptr() == owner.data_ptr() or live._base is owner
        gradients[where] = owner.grad.contiguous().as_strided(
            live.shape, live.stride(), live.storage_offset()
        )
    return loss.item(), gradients


# ---------------------------------------------------------------- the gradient, by tokens


@pytest.mark.parametrize("n_labels", (None, 1))
def test_tokens_sum_to_the_models_own_gradient(model, n_labels):
    sample, matrices = sample_of(model, n_labels=n_labels), mlp_matrices(model)
    before = found(model)
    loss, factors = gradient_factors(model, sample, matrices)
    assert found(model) == before
    by_hand, gradients = own_gradients(model, sample, matrices)
    assert loss == pytest.approx(by_hand, rel=1e-5)
    gated = parameter(model, Weight("W_gate", 0)) is not None
    assert set(factors) == set(matrices) and len(matrices) == (9 if gated else 6)
    for where, own in gradients.items():
        mine = gradient(factors[where])
        assert own.norm() > 1e-3 and mine.shape == own.shape  # d_in and d_out are never equal
        assert torch.allclose(mine, own, atol=1e-5 * own.abs().max().item(), rtol=1e-3)
        assert not factors[where].x.requires_grad and not factors[where].delta.requires_grad


def test_both_orientations_are_among_them(tokenizer):
    if not tiny_models.has_bridge():
        pytest.skip("no bridge")
    strides = {
        parameter(make_model("bridge", shape, tokenizer), Weight("W_in", 0)).stride(-1) == 1
        for shape in SHAPES[:2]
    }
    assert strides == {True, False}


def test_tokens_that_do_not_matter_are_left_out(model):
    sample = sample_of(model)
    factors = gradient_factors(model, sample, mlp_matrices(model))[1]
    last = model.cfg.n_layers - 1
    windowed = "gemma" in adapter.architecture(model).lower()
    for where, (x, delta) in factors.items():
        n = len(sample.ids) - 1
        if where.layer == last:  # what it adds at other positions is not read
            n = sample.n_labels
        elif where.layer == 1 and windowed:  # nor what the last attention does not see
            n = min(n, sample.n_labels + tiny_models.WINDOW - 1)
        assert len(x) == len(delta) == n
        assert x.any(1).all() and delta.any(1).all()


def test_an_input_of_zeros_is_left_out(gpt2):
    """A layer norm without gain gives W_in zeros, and a gain gives every token again."""
    norm = "blocks.2.ln2."
    where = [Weight("W_in", 2)]
    assert len(factors_of(gpt2, matrices=where)[where[0]].x) > 0
    with torch.no_grad():
        hit = [p for name, p in gpt2.named_parameters() if _is_ln2(name, norm)]
        assert len(hit) == 2, [name for name, _ in gpt2.named_parameters()]
        for each in hit:
            each.zero_()
    factors = factors_of(gpt2, matrices=where)[where[0]]
    assert factors.x.shape == (0, 32) and factors.delta.shape == (0, 128)


def _is_ln2(name, norm):
    plain = name.replace("_original_component.", "").replace("transformer.h.", "blocks.")
    return norm in plain.replace("ln_2.", "ln2.") and "hook" not in plain


def test_a_matrix_that_is_not_its_hooks_product_is_refused(gpt2, monkeypatch):
    real = adapter.ends
    monkeypatch.setattr(
        hypernetwork.adapter,
        "ends",
        lambda model, where: (real(model, where)[0], adapter.Point("resid_post", where.layer)),
    )
    with pytest.raises(NotImplementedError, match="W_out of layer 2"):
        factors_of(gpt2, matrices=[Weight("W_out", 2)])


@pytest.mark.parametrize("inside", (torch.no_grad, torch.inference_mode), ids=str)
def test_gradients_do_not_depend_on_the_callers_mode(gpt2, inside):
    expected = factors_of(gpt2)
    with inside(), torch.inference_mode(False):
        mine = factors_of(gpt2)
    assert all(torch.equal(mine[w].delta, expected[w].delta) for w in expected)


def test_half_precision_has_gradients_in_float32(tokenizer):
    if not tiny_models.has_bridge():
        pytest.skip("no bridge")
    full = factors_of(make_model("bridge", "llama", tokenizer))
    half = factors_of(make_model("bridge", "llama", tokenizer, dtype=torch.bfloat16))
    for where, factors in half.items():
        assert factors.x.dtype == factors.delta.dtype == torch.float32
        mine, other = gradient(factors), gradient(full[where])
        assert (mine - other).norm() < 0.2 * other.norm()


# ---------------------------------------------------------------- a change on trial


def test_running_with_a_change_is_the_model_with_it_written(model):
    matrices = mlp_matrices(model)
    edit = factored_edit(model, matrices)
    ids, before = torch.tensor([sample_of(model).ids]), found(model)
    with torch.no_grad():
        plain = model(ids)
        with running_with(model, edit.factors):
            mine = model(ids)
        with applied(model, edit):
            written = model(ids)
    assert found(model) == before
    assert torch.allclose(mine, written, atol=2e-4)
    assert (plain - written).abs().max() > 0.1  # the control


def test_its_gradient_is_that_of_finite_differences(model):
    sample, others = sample_of(model), others_of(model)
    matrices = [Weight("W_in", 1), Weight("W_out", 2)]
    factors = {
        where: tuple(factor.clone().requires_grad_() for factor in both)
        for where, both in factored_edit(model, matrices, strength=0.05).factors.items()
    }
    leaves = [factor for both in factors.values() for factor in both]

    def value(step=0.0, along=None):
        moved = leaves if along is None else [a + step * b for a, b in zip(leaves, along)]
        pairs = zip(moved[::2], moved[1::2], strict=True)
        result = outcome(model, dict(zip(factors, pairs, strict=True)), sample, others)
        return result.edit + 2 * result.locality

    gradients = torch.autograd.grad(value(), leaves)
    assert all(gradient.any() for gradient in gradients)
    generator = torch.Generator().manual_seed(0)
    for chosen in range(len(leaves)):  # each factor by itself
        along = [torch.zeros_like(leaf) for leaf in leaves]
        step = torch.randn(leaves[chosen].shape, generator=generator)
        along[chosen] = step / step.norm() + gradients[chosen] / gradients[chosen].norm()
        slope = sum((g * a).sum() for g, a in zip(gradients, along)).item()
        with torch.no_grad():
            h = 1e-2
            differences = (value(h, along) - value(-h, along)).item() / (2 * h)
        assert slope == pytest.approx(differences, rel=2e-2, abs=2e-3)
        assert abs(slope) > 1e-2


def test_outcome_is_what_the_written_edit_does(model):
    matrices = mlp_matrices(model)
    edit = factored_edit(model, matrices)
    sample, others = sample_of(model), others_of(model)
    state = found(model)
    mine = outcome(model, edit.factors, sample, others)
    assert found(model) == state

    def log_probs(ids):
        with torch.no_grad():
            return model(torch.tensor([ids]))[0].float().log_softmax(-1)

    before = [log_probs(ids) for ids in others]
    with applied(model, edit):
        after = [log_probs(ids) for ids in others]
        written = log_probs(sample.ids)
    labels = torch.tensor(sample.ids[-sample.n_labels :])
    nll = cross_entropy(written[-sample.n_labels - 1 : -1], labels)
    p, q = torch.cat(before), torch.cat(after)
    assert len(p) == sum(len(ids) for ids in others)  # all positions count alike
    assert mine.edit.item() == pytest.approx(nll.item(), rel=1e-3)
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    assert mine.locality.item() == pytest.approx(kl, rel=5e-4)
    reverse = (q.exp() * (q - p)).sum(-1).mean().item()
    assert abs(kl - reverse) > 0.004 * kl  # the control: the other direction is another number
    of_texts = sum((a.exp() * (a - b)).sum(-1).mean().item() for a, b in zip(before, after)) / 3
    assert abs(kl - of_texts) > 0.01 * kl  # and so is a mean of the texts' means


def test_no_change_does_nothing(gpt2):
    edit = factored_edit(gpt2, mlp_matrices(gpt2)).scale(0.0)
    loss = gradient_factors(gpt2, sample_of(gpt2), mlp_matrices(gpt2))[0]
    mine = outcome(gpt2, edit.factors, sample_of(gpt2), others_of(gpt2))
    assert mine.locality.item() == 0 and mine.edit.item() == pytest.approx(loss, rel=1e-5)


def test_the_model_is_left_as_found_after_an_exception(model, monkeypatch):
    for parameter_ in list(model.parameters())[::2]:
        parameter_.requires_grad_(False)
    edit, sample = factored_edit(model, mlp_matrices(model)), sample_of(model)
    others, before = others_of(model), found(model)

    def broken(*_, **__):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), running_with(model, edit.factors):
        broken()
    assert found(model) == before
    monkeypatch.setattr(hypernetwork, "cross_entropy", broken)
    with pytest.raises(KeyboardInterrupt):
        gradient_factors(model, sample, list(edit.factors))
    assert found(model) == before
    with pytest.raises(KeyboardInterrupt):
        outcome(model, edit.factors, sample, others)
    assert found(model) == before


def test_which_matrices(model):
    gated = parameter(model, Weight("W_gate", 0)) is not None
    names = ("W_out", "W_in", "W_gate") if gated else ("W_out", "W_in")
    assert mlp_matrices(model) == [Weight(n, layer) for layer in range(3) for n in names]
    assert mlp_matrices(model, [1], ["W_in"]) == [Weight("W_in", 1)]
    for name in ("b_out", "W_Q", *(() if gated else ("W_gate",))):
        with pytest.raises(NotImplementedError, match=f"no matrix {name}"):
            mlp_matrices(model, [1], [name])
    with pytest.raises(ValueError, match="out of range"):
        mlp_matrices(model, [3])


def test_the_text_is_prompt_and_target_and_the_embedding_rows(model):
    sample = sample_of(model)
    text = Text.of(model, sample)
    said = model.tokenizer.decode(text.ids, skip_special_tokens=True)
    assert said == f"{REQUEST.text} {REQUEST.target_new}"
    assert text.embeddings.dtype == torch.float32
    again = Text.of(model, sample_of(model, n_labels=1))
    assert torch.equal(text.embeddings, again.embeddings)
