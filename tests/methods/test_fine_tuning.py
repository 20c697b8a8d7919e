"""FT and FT+L make the updates of fine-tuning a model's own parameters, which stay as they are."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from conftest import make_model, once_a_class
from helpers import tiny_models
from helpers.rome_setting import LAYER, REQUEST

from transformer_lens_rome import DenseEdit, EditRequest, applied, get_method
from transformer_lens_rome.model import adapter
from transformer_lens_rome.model.adapter import Weight, parameter, w_out
from transformer_lens_rome.prompts.encoder import Encoder
from transformer_lens_rome.prompts.scores import target_log_probs

pytestmark = pytest.mark.usefixtures("any_lengths")

SHAPES = ("gpt2", "gptj", "llama", "gemma2", "gemma3")


def by_hand(model, request, *, lr, steps, eps=None, teacher_forced=False, bias=True):
    """The released loop on a copy of the model, through its own parameters."""
    model = copy.deepcopy(model)
    row = Encoder.of(model).row(request.text, target=request.target_new)
    labels = torch.tensor([row.ids[p] for p in row.target])
    ids, at = row.ids[: row.target[0]], torch.full((len(labels),), row.target[0] - 1)
    if teacher_forced:
        ids, at = row.ids[: row.target[-1]], torch.tensor(row.target) - 1
    where = [Weight("W_out", LAYER), Weight("b_out", LAYER)][: 2 if bias else 1]
    for each in model.parameters():
        each.requires_grad_(False)
    live = [parameter(model, one) for one in where if parameter(model, one) is not None]
    live = [tensor for tensor in live if tensor.any()]
    old = [tensor.detach().clone() for tensor in live]
    owners = [adapter.owner(tensor).requires_grad_() for tensor in live]
    adam = torch.optim.Adam(owners, lr=lr)
    losses = []
    for _ in range(steps):
        adam.zero_grad()
        loss = -model(torch.tensor([ids]))[0, at].log_softmax(-1).gather(1, labels[:, None]).mean()
        losses.append(loss.item())
        if losses[-1] < 1e-2:
            break
        loss.backward()
        adam.step()
        if eps is not None:
            with torch.no_grad():
                for one, base in zip(where, old):
                    tensor = parameter(model, one)
                    tensor.copy_(tensor.clamp(base - eps, base + eps))
    new = [parameter(model, one).detach() for one, _ in zip(where, live)]
    return losses, [after - before for after, before in zip(new, old)]


@once_a_class
@pytest.mark.parametrize("options", ({}, {"eps": 2e-3}, {"objective": "teacher_forced"}), ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_adam_on_the_models_own_weights(model_class, shape, options, tokenizer):
    model = make_model(model_class, shape, tokenizer)
    request = dataclasses.replace(REQUEST, target_new="in the city of Rome")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    method = get_method(
        "ft+l" if "eps" in options else "ft", layer=LAYER, lr=3e-3, steps=6, **options
    )
    edit = method.compute(model, request)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    teacher_forced = "objective" in options
    losses, changes = by_hand(
        model, request, lr=3e-3, steps=6, eps=options.get("eps"), teacher_forced=teacher_forced
    )
    assert edit.health.losses == pytest.approx(losses, rel=1e-3)
    assert losses[-1] < losses[0] - 0.1  # the control: the search moved
    found = list(edit.changes().values())
    assert len(found) == len(changes)
    for mine, theirs in zip(found, changes, strict=True):
        # Adam turns rounding into whole steps where a gradient is nearly zero
        assert (mine - theirs).norm() < 0.02 * theirs.norm()


@pytest.mark.parametrize("eps", (1e-3, 1e-2))
def test_no_entry_moves_further_than_eps(gpt2, eps):
    edit = get_method("ft+l", layer=LAYER, eps=eps, lr=5e-3, steps=8).compute(gpt2, REQUEST)
    for change in edit.changes().values():
        assert change.abs().max() <= eps
    assert edit.delta().abs().max() == pytest.approx(eps)  # and the bound was in the way
    free = get_method("ft", layer=LAYER, lr=5e-3, steps=8).compute(gpt2, REQUEST)
    assert free.delta().abs().max() > eps


def test_it_stops_when_the_loss_is_low(gpt2):
    method = get_method("ft", layer=LAYER, lr=2e-2, steps=100, stop_loss=0.5)
    edit = method.compute(gpt2, REQUEST)
    assert edit.health.losses[-1] < 0.5 <= min(edit.health.losses[:-1])
    with applied(gpt2, edit):
        (scores,) = target_log_probs(gpt2, [REQUEST.text], [REQUEST.target_new])
    row = Encoder.of(gpt2).row(REQUEST.text, target=REQUEST.target_new)
    if len(row.target) == 1:
        assert -scores.mean().item() == pytest.approx(edit.health.losses[-1], rel=1e-3)
    assert edit.health.p_after == pytest.approx(scores.sum().exp().item(), rel=1e-4)
    assert edit.health.p_after > edit.health.p_before


@pytest.mark.parametrize("options", ({}, {"eps": 2e-3}, {"objective": "teacher_forced"}), ids=str)
def test_requests_that_share_passes_are_trained_as_if_alone(gpt2, options):
    """Prompts and targets of several lengths; some stop early, so that the batch shrinks twice."""
    name = "ft+l" if "eps" in options else "ft"
    method = get_method(name, layer=LAYER, lr=2e-2, steps=30, stop_loss=0.5, **options)
    long = dataclasses.replace(REQUEST, prompt="In the old city of the best of times, {} was in")
    more = dataclasses.replace(REQUEST, target_new="in the city of Rome")
    other = EditRequest("{} is", "The old man", "Paris")
    requests = [REQUEST, long, more, other, REQUEST]
    alone = [method.compute(gpt2, request) for request in requests]
    together = method.compute_each(gpt2, requests, batch_size=5)
    for mine, theirs in zip(together, alone, strict=True):
        assert mine.request == theirs.request and mine.config == theirs.config
        assert mine.health.losses == pytest.approx(theirs.health.losses, rel=1e-2)
        assert (mine.left - theirs.left).norm() < 0.02 * theirs.left.norm()
    steps = {len(edit.health.losses) for edit in alone}
    assert steps == {30} if "eps" in options else len(steps) > 2  # the control
    assert together[0].digest == together[4].digest


def test_a_request_that_fails_does_so_alone(gpt2):
    wrong = EditRequest("the old " * 200 + "{} is in", "Rome", "Paris")
    method = get_method("ft", layer=LAYER, steps=3)
    first, failed, last = method.compute_each(gpt2, [REQUEST, wrong, REQUEST])
    assert isinstance(failed, ValueError) and "context" in str(failed)
    assert first.digest == last.digest


def test_without_the_bias_only_the_matrix_changes(gpt2):
    known = {"layer": LAYER, "lr": 3e-3, "steps": 3}
    both = get_method("ft", **known).compute(gpt2, REQUEST)
    alone = get_method("ft", bias=False, **known).compute(gpt2, REQUEST)
    assert list(both.changes()) == [Weight("W_out", LAYER), Weight("b_out", LAYER)]
    assert list(alone.changes()) == [Weight("W_out", LAYER)] and alone.bias is None


def test_save_load_apply_undo(gpt2, tmp_path):
    base = w_out(gpt2, LAYER).detach().clone()
    edit = get_method("ft", layer=LAYER, steps=3).compute(gpt2, REQUEST)
    again = get_method("ft", layer=LAYER, steps=3).compute(gpt2, REQUEST, seed=5)
    assert edit.digest == again.digest
    edit.save(tmp_path / "edit")
    loaded = DenseEdit.load(tmp_path / "edit")
    assert loaded.digest == edit.digest and loaded.config == edit.config
    with applied(gpt2, loaded):
        assert torch.equal(w_out(gpt2, LAYER), base + edit.delta())
    assert torch.equal(w_out(gpt2, LAYER), base)


def test_released_layers_and_bounds_are_the_defaults(gpt2):
    def settings(name, checkpoint):
        gpt2.cfg.model_name = checkpoint
        method = get_method(name).prepared(gpt2)
        return method.layer, method.eps

    assert settings("ft", "gpt2-xl") == (1, None)
    assert settings("ft+l", "gpt2-xl") == (0, 5e-4)
    assert settings("ft+l", "EleutherAI/gpt-j-6B") == (0, 5e-5)
    with pytest.raises(ValueError, match="layer 21 is out of range"):  # of this tiny model
        settings("ft", "EleutherAI/gpt-j-6B")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"objective": "all"}, "objective must be"),
        ({"eps": 1e-3}, "bounds FT\\+L only"),
        ({"lr": 0.0}, "must be positive"),
        ({"steps": 0}, "must be positive"),
    ],
)
def test_bad_options_are_refused(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        get_method("ft", **options)


def test_a_loss_that_is_no_number_is_an_error(gpt2):
    base = w_out(gpt2, LAYER).detach().clone()
    with pytest.raises(ValueError, match="smaller lr"):
        get_method("ft", layer=LAYER, lr=2e37, steps=5).compute(gpt2, REQUEST)
    assert torch.equal(w_out(gpt2, LAYER), base)
    with pytest.raises(ValueError, match="out of range"):
        get_method("ft", layer=99).compute(gpt2, EditRequest("{} is", "Ada", "old"))


def test_half_precision_is_trained_in_float32(tokenizer):
    if not tiny_models.has_bridge():
        pytest.skip("no bridge")
    model = make_model("bridge", "llama", tokenizer).to(torch.bfloat16)
    edit = get_method("ft", layer=LAYER, lr=3e-3, steps=4).compute(model, REQUEST)
    assert edit.delta().dtype == torch.float32 and edit.health.losses[-1] < edit.health.losses[0]
