"""KN's edits: which neurons are chosen, and sums of embeddings in their rows of W_out."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from conftest import CLASSES, make_model
from helpers import tiny_models
from helpers.neuron_setting import LAYERS, assert_close, by_hand, prompt_ids
from helpers.rome_setting import REQUEST

from transformer_lens_rome import EditRequest, applied, apply_edit, get_method
from transformer_lens_rome.edits.kinds import EditHealth, FactoredEdit
from transformer_lens_rome.methods.knowledge_neurons import select
from transformer_lens_rome.model import adapter, passes
from transformer_lens_rome.model.adapter import Weight, w_out
from transformer_lens_rome.prompts.encoder import Encoder
from transformer_lens_rome.prompts.scores import target_log_probs

MORE = ("{} is located in", "The city of {} is", "Everyone knows that {} stands in")
LONG = dataclasses.replace(REQUEST, target_new="in the city of Rome")


def test_the_two_classes_agree(tokenizer):
    if len(CLASSES) < 2:
        pytest.skip("one model class")
    for shape in ("gpt2", "gemma3"):
        models = [make_model(name, shape, tokenizer) for name in CLASSES]
        edits = [get_method("kn").compute(model, REQUEST) for model in models]
        assert edits[0].provenance["neurons"] == edits[1].provenance["neurons"]
        for one, other in zip(edits[0].changes().values(), edits[1].changes().values()):
            assert_close(one, other, 1e-6)


@pytest.mark.parametrize(("shape", "activation"), [("gpt2", "pre"), ("llama", "post")])
def test_the_activation_follows_the_model(model_class, shape, activation, tokenizer):
    model = make_model(model_class, shape, tokenizer)
    assert get_method("kn").prepared(model).activation == activation
    assert get_method("kn").compute(model, REQUEST).config["activation"] == activation
    own = get_method("kn", activation="post" if activation == "pre" else "pre")
    assert own.prepared(model) is own


# ---------------------------------------------------------------- which neurons


def test_neurons_above_the_threshold(gpt2):
    every = get_method("kn").attribute(gpt2, REQUEST)
    for threshold in (0.2, 0.5):
        limit = threshold * max(every.flatten().tolist())
        expected = [
            (layer, i)
            for layer, i in itertools.product(LAYERS, range(every.shape[1]))
            if every[layer, i].item() > limit
        ]
        found = get_method("kn", threshold=threshold).neurons(gpt2, REQUEST)
        assert found == expected and 0 < len(found) < every.numel() / 2


def test_selection_is_strict():
    one = torch.tensor([[4.0, 2.0, 1.0], [-8.0, 2.5, 0.0]])
    assert select([one], 0.5, 0.4) == [(0, 0), (1, 1)]
    assert select([one], 0.25, 0.4) == [(0, 0), (0, 1), (1, 1)]
    assert select([-one.abs()], 0.2, 0.4) == [] == select([0 * one], 0.2, 0.4)
    eye = torch.eye(3)
    five = [eye[:1], eye[:1], eye[:1], eye[1:2], eye[1:2]]
    assert select(five, 0.2, 0.4) == [(0, 0)]  # two of five are not more than 0.4 of them
    assert select(five, 0.2, 0.39) == [(0, 0), (0, 1)]
    assert select(five, 0.2, 0.6) == []


@pytest.mark.parametrize("p", (0.0, 0.4, 0.6))
def test_refined_neurons_are_shared_by_prompts(gpt2, p):
    counts = {}
    for prompt in (REQUEST.prompt, *MORE):
        asked = dataclasses.replace(REQUEST, prompt=prompt)
        for neuron in get_method("kn").neurons(gpt2, asked):
            counts[neuron] = counts.get(neuron, 0) + 1
    expected = sorted(neuron for neuron, count in counts.items() if count > 4 * p)
    again = (REQUEST.prompt, *MORE, MORE[0])  # each counts once
    assert get_method("kn", prompts=again, p=p).neurons(gpt2, REQUEST) == expected
    assert 0 < len(expected) and (len(expected) < len(counts)) == (p > 0)


def test_each_token_after_the_greedy_ones(gpt2):
    ids, labels = prompt_ids(gpt2), Encoder.of(gpt2).ids("Seattle")
    found, row = [], list(ids)
    for label in labels:
        found.append(by_hand(gpt2, row, [label], "pre", steps=5))
        row.append(gpt2(torch.tensor([row]))[0, -1].argmax().item())
    extended = get_method("kn", extend=True, steps=5).attribute(gpt2, REQUEST)
    assert_close(extended, torch.stack(found).mean(0))
    bare = get_method("kn", steps=5).attribute(gpt2, REQUEST)
    assert (extended - bare).norm() > 0.1 * bare.norm()
    one = dataclasses.replace(REQUEST, target_true="S")
    both = [get_method("kn", extend=extend).attribute(gpt2, one) for extend in (True, False)]
    assert torch.equal(*both)


def test_targets_with_and_without_a_space(gpt2):
    encoder, ids = Encoder.of(gpt2), prompt_ids(gpt2)
    spaced, bare = encoder.ids(" Seattle"), encoder.ids("Seattle")
    assert spaced != bare
    for add_space, labels in ((True, spaced), (False, bare)):
        method = get_method("kn", add_space=add_space, steps=4)
        assert_close(method.attribute(gpt2, REQUEST), by_hand(gpt2, ids, labels, "pre", steps=4))
        written = method.compute(gpt2, REQUEST).provenance["written"]
        assert written == encoder.ids(" Paris" if add_space else "Paris")


# ---------------------------------------------------------------- the edit


@pytest.mark.parametrize("shape", ("gpt2", "gemma3"))
@pytest.mark.parametrize(
    "options",
    ({}, {"old": 1.0, "new": 8.0}, {"forget": "truth", "add_space": True}),
    ids=str,
)
def test_each_neurons_row_is_moved(model_class, shape, options, tokenizer_of):
    model = make_model(model_class, shape, tokenizer_of(shape))
    method = get_method("kn", **options)
    edit = method.compute(model, LONG)
    encoder, space = Encoder.of(model), " " * options.get("add_space", False)
    forgotten = model(torch.tensor([prompt_ids(model)]))[0, -1].argmax().item()
    if options.get("forget") == "truth":
        assert forgotten != encoder.ids(f"{space}Seattle")[0]
        forgotten = encoder.ids(f"{space}Seattle")[0]
    E = tiny_models.tiny_hf(shape, tokenizer_of(shape)).get_input_embeddings().weight.detach()
    tokens = encoder.ids(f"{space}in the city of Rome")
    assert len(tokens) > 1
    row = -options.get("old", 2.0) * E[forgotten]
    for token in tokens:
        row = row + options.get("new", 1.0) * E[token]
    neurons = method.neurons(model, LONG)
    assert edit.provenance["neurons"] == [list(neuron) for neuron in neurons]
    before = [w_out(model, layer).detach().clone() for layer in LAYERS]
    with applied(model, edit):
        for layer in LAYERS:
            own = [i for where, i in neurons if where == layer]
            rest = [i for i in range(len(before[layer])) if i not in own]
            after = w_out(model, layer).detach()
            assert torch.equal(after[rest], before[layer][rest])
            torch.testing.assert_close(
                after[own] - before[layer][own], row.repeat(len(own), 1), rtol=1e-4, atol=2e-6
            )
    assert {where.layer for where in edit.factors} == {layer for layer, _ in neurons}
    for left, right in edit.factors.values():
        assert left.shape[1] == right.shape[0] == 1


def test_health_is_what_is_measured(gpt2):
    edit = get_method("kn", threshold=0.0).compute(gpt2, REQUEST)
    (before,) = target_log_probs(gpt2, [REQUEST.text], [REQUEST.target_new])
    changed = {where: w_out(gpt2, where.layer).detach().clone() for where in edit.factors}
    with applied(gpt2, edit):
        (after,) = target_log_probs(gpt2, [REQUEST.text], [REQUEST.target_new])
    assert edit.health.p_before == pytest.approx(before.sum().exp().item(), rel=1e-4)
    assert edit.health.p_after == pytest.approx(after.sum().exp().item(), rel=1e-4)
    weights = torch.cat(list(changed.values()))
    moved = torch.cat([edit.changes()[where] for where in changed])
    expected = (moved.norm() / weights.norm()).item()
    assert edit.health.relative_norm == pytest.approx(expected, rel=1e-4)
    assert any("neurons are rewritten" in line for line in edit.health.warnings)
    few = get_method("kn", threshold=0.95).compute(gpt2, REQUEST)
    assert not any("neurons are rewritten" in line for line in few.health.warnings)
    for one in (edit, few):
        fell = one.health.p_after < one.health.p_before
        assert fell == any("fell from" in line for line in one.health.warnings)


def test_save_load_apply_undo(gpt2, tmp_path):
    base = [w_out(gpt2, layer).detach().clone() for layer in LAYERS]
    edit = get_method("kn", threshold=0.5).compute(gpt2, REQUEST)
    again = get_method("kn", threshold=0.5).compute(gpt2, REQUEST, seed=5)
    assert edit.digest == again.digest
    edit.save(tmp_path / "edit")
    loaded = FactoredEdit.load(tmp_path / "edit")
    assert loaded.digest == edit.digest
    assert (loaded.config, loaded.provenance) == (edit.config, edit.provenance)
    with applied(gpt2, loaded):
        for where, change in edit.changes().items():
            assert change.any()
            assert torch.equal(w_out(gpt2, where.layer), base[where.layer] + change)
    assert all(torch.equal(w_out(gpt2, layer), base[layer]) for layer in LAYERS)


def test_no_neuron_no_change(gpt2, tmp_path):
    base = [w_out(gpt2, layer).detach().clone() for layer in LAYERS]
    method = get_method("kn", prompts=MORE, p=0.99, threshold=0.9)
    edit = method.compute(gpt2, REQUEST)
    assert edit.factors == {} == edit.changes() and edit.provenance["neurons"] == []
    assert "no neuron was found" in edit.health.warnings[0]
    assert edit.health.p_after == edit.health.p_before and edit.health.relative_norm == 0
    edit.save(tmp_path / "edit")
    loaded = FactoredEdit.load(tmp_path / "edit")
    assert loaded.digest == edit.digest and loaded.health == edit.health
    handle = apply_edit(gpt2, loaded)
    assert all(torch.equal(w_out(gpt2, layer), base[layer]) for layer in LAYERS)
    handle.revert()
    assert all(torch.equal(w_out(gpt2, layer), base[layer]) for layer in LAYERS)
    assert edit.scale(2.0).changes() == {}


# ---------------------------------------------------------------- the model, and wrong calls


def state(model):
    """Whatever computing an edit could leave behind."""
    points = model.hook_dict.values()
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        [parameter.requires_grad for parameter in model.parameters()],
        [module.training for module in model.modules()],
        [(len(point.fwd_hooks), len(point.bwd_hooks)) for point in points],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        [parameter.grad is None for parameter in model.parameters()],
    )


def assert_unchanged(model, before):
    weights, *rest = state(model)
    assert all(torch.equal(tensor, before[0][name]) for name, tensor in weights.items())
    assert rest == list(before[1:])


@pytest.mark.parametrize("shape", ("gpt2", "gemma3"))
def test_the_model_is_left_as_it_was(model_class, shape, tokenizer, monkeypatch):
    model = make_model(model_class, shape, tokenizer)
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 3 > 0)
    model(torch.tensor([prompt_ids(model)]))  # some hosts set hooks of their own at the first pass
    get_method("kn", steps=2).attribute(model, REQUEST)
    before = state(model)
    first = get_method("kn").compute(model, REQUEST)
    assert_unchanged(model, before)
    with torch.inference_mode():
        assert get_method("kn").compute(model, REQUEST).digest == first.digest
    calls, unembed = [], passes.unembed

    def fail(*args):
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("half-way")
        return unembed(*args)

    monkeypatch.setattr(passes, "unembed", fail)
    with pytest.raises(RuntimeError, match="half-way"):
        get_method("kn", batch_size=20).compute(model, REQUEST)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"activation": "key"}, "activation must be"),
        ({"forget": "all"}, "forget must be"),
        ({"steps": 1}, "steps must be 2 or more"),
        ({"batch_size": 0}, "batch_size"),
        ({"threshold": 1.0}, "shares"),
        ({"p": -0.1}, "shares"),
        ({"prompts": ["{} is", "It is"]}, "'It is'"),
        ({"prompts": "{} is"}, "exactly one"),
    ],
)
def test_bad_options_are_refused(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        get_method("kn", **options)


def test_requests_without_a_truth_are_refused(gpt2):
    for true in (None, " "):
        request = EditRequest("{} is in", "The Space Needle", "Paris", true)
        with pytest.raises(ValueError, match="target_true"):
            get_method("kn").compute(gpt2, request)


def test_numbers_that_are_not_finite_are_an_error(gpt2):
    broken = [("blocks.2.hook_resid_post", lambda tensor, hook: tensor * torch.nan)]
    with gpt2.hooks(fwd_hooks=broken), pytest.raises(ValueError, match="not finite"):
        get_method("kn", steps=2).attribute(gpt2, REQUEST)


def test_a_model_without_a_dense_w_out_is_refused(model_class, tokenizer):
    model = make_model(model_class, "mixtral", tokenizer)
    with pytest.raises(NotImplementedError, match="W_out"):
        get_method("kn").compute(model, REQUEST)


def test_half_precision_is_attributed_in_float32(tokenizer):
    if not tiny_models.has_bridge():
        pytest.skip("no bridge")
    model = make_model("bridge", "llama", tokenizer)
    full = get_method("kn").attribute(model, REQUEST)
    model.to(torch.bfloat16)
    found = get_method("kn").attribute(model, REQUEST)
    assert found.dtype == torch.float32
    assert torch.cosine_similarity(found.flatten(), full.flatten(), dim=0) > 0.98
    edit = get_method("kn").compute(model, REQUEST)
    E = model.W_E.detach().float()
    expected = E[edit.provenance["written"]].sum(0) - 2 * E[edit.provenance["forgotten"]]
    (left, right), *_ = edit.factors.values()
    assert left.dtype == right.dtype == torch.float32 and torch.equal(right[0], expected)
    assert isinstance(edit.health, EditHealth) and adapter.w_out(model, 0).dtype == torch.bfloat16
    assert all(where == Weight("W_out", where.layer) for where in edit.factors)
