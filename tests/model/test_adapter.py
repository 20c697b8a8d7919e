"""The adapter's four points and W_out mean the same in every architecture and both model classes.

The ground truth is a Hugging Face model of the same weights, read and changed by its own modules.
"""

import re
from contextlib import contextmanager

import pytest
import torch
from conftest import CLASSES, make_model
from helpers.tiny_models import SHAPES, tiny_hf

from transformer_lens_rome.model import adapter, passes
from transformer_lens_rome.model import default_layer as defaults
from transformer_lens_rome.model.adapter import Point
from transformer_lens_rome.model.protocol import Model

pytestmark = pytest.mark.every_version

LAYER = 1
KEY, VALUE, EMBED = Point("key", LAYER), Point("value", LAYER), Point("embed")
TOKENS = torch.randint(3, 400, (2, 11), generator=torch.Generator().manual_seed(0))
W_OUT_NAMES = ("mlp.c_proj", "fc_out", "dense_4h_to_h", "down_proj", "fc2")
RAW = [(name, shape) for name in CLASSES for shape in SHAPES]
ALL = [(*case, processed) for case in RAW for processed in (False, True)]
raw_models = pytest.mark.parametrize(("name", "shape"), RAW)
all_models = pytest.mark.parametrize(("name", "shape", "processed"), ALL)
close = {"rtol": 1e-4, "atol": 5e-5}


@pytest.fixture(scope="module")
def zoo(tokenizer):
    """Models are built once; whoever changes a weight puts it back."""
    models = {}

    def get(name, shape, processed=False):
        if (name, shape, processed) not in models:
            made = make_model(name, shape, tokenizer, processed=processed)
            models[name, shape, processed] = made
        return models[name, shape, processed]

    return get


@pytest.fixture(scope="module")
def truth(tokenizer):
    models = {}

    def get(shape):
        if shape not in models:
            models[shape] = tiny_hf(shape, tokenizer)
        return models[shape]

    return get


@contextmanager
def changed(weight, change):
    before = weight.detach().clone()
    with torch.no_grad():
        weight.add_(change)
    try:
        yield
    finally:
        with torch.no_grad():
            weight.copy_(before)


@torch.no_grad()
def logits_of(model, tokens=TOKENS):
    return model(tokens, attention_mask=torch.ones_like(tokens))


def hf_w_out(hf, layer=LAYER):
    """The name and module of W_out in a Hugging Face model, and the weight as [d_mlp, d_model]."""
    found = [(n, m) for n, m in hf.named_modules() if n.endswith(W_OUT_NAMES)]
    name, module = found[layer]
    turned = type(module).__name__ != "Conv1D"
    return name, module, module.weight.T if turned else module.weight


@torch.no_grad()
def hf_activations(hf, shape):
    """Key, value, output of the block and of the embedding, by the modules' own hooks."""
    name, module, _ = hf_w_out(hf)
    block = hf.get_submodule(re.match(r".*?\.\d+", name).group())
    found, handles = {}, []

    def keep_both(_module, args, output):
        found[KEY], found[VALUE] = args[0], output

    def keep(point):
        def hook(_module, _args, output):
            found[point] = output[0] if isinstance(output, tuple) else output

        return hook

    handles.append(module.register_forward_hook(keep_both))
    handles.append(block.register_forward_hook(keep(Point("resid_post", LAYER))))
    handles.append(hf.get_input_embeddings().register_forward_hook(keep(EMBED)))
    hidden = hf(TOKENS, output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    if shape.startswith("gemma") or shape == "bloom":  # scaled, or normalised, before block 0
        found[EMBED] = hidden[0]
    return {point: found[point].reshape(*TOKENS.shape, -1) for point in found}


def change_like(weight, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return 0.1 * torch.randn(weight.shape, generator=generator, dtype=torch.float32)


# ---------------------------------------------------------------- points and weights


@all_models
def test_value_is_key_times_w_out_plus_b_out(zoo, name, shape, processed):
    model = zoo(name, shape, processed)
    weight, bias = adapter.w_out(model, LAYER), adapter.b_out(model, LAYER)
    assert weight.shape[0] != weight.shape[1] == model.cfg.d_model == len(bias)
    found = passes.read(model, TOKENS, [KEY, VALUE])
    torch.testing.assert_close(found[KEY] @ weight + bias, found[VALUE], **close)
    if shape in ("gpt2", "gptj", "neox", "phi", "opt", "bloom"):  # the others have no bias
        assert not torch.allclose(found[KEY] @ weight, found[VALUE], atol=1e-2)


@raw_models
def test_points_are_those_of_hugging_face(zoo, truth, name, shape):
    expected = hf_activations(truth(shape), shape)
    found = passes.read(zoo(name, shape), TOKENS, list(expected))
    for point, tensor in expected.items():
        torch.testing.assert_close(found[point], tensor, **close, msg=lambda m, p=point: f"{p} {m}")


@all_models
def test_written_weight_is_the_one_that_runs(zoo, truth, name, shape, processed):
    model = zoo(name, shape, processed)
    weight = adapter.w_out(model, LAYER)
    change = change_like(weight)
    before, clean = passes.read(model, TOKENS, [KEY, VALUE]), logits_of(model)
    with changed(weight, change):
        after, edited = passes.read(model, TOKENS, [KEY, VALUE]), logits_of(model)
    assert torch.equal(before[KEY], after[KEY])
    torch.testing.assert_close(after[VALUE] - before[VALUE], before[KEY] @ change, **close)
    assert (edited - clean).abs().max() > 1e-2
    assert torch.equal(logits_of(model), clean)
    hf = truth(shape)
    with changed(hf_w_out(hf)[2], change):
        expected = hf(TOKENS).logits.log_softmax(-1)  # processing moves logits by a constant
    torch.testing.assert_close(edited.log_softmax(-1), expected, **close)
    if not processed:
        assert adapter.weight_hash(weight) == adapter.weight_hash(hf_w_out(hf)[2])


@all_models
def test_replacing_the_value_is_what_a_rank_one_edit_does(zoo, name, shape, processed):
    model = zoo(name, shape, processed)
    keys = passes.read(model, TOKENS, [KEY])[KEY]
    k, lam = keys[0, 4], change_like(torch.empty(model.cfg.d_model)) * 5
    u = k / (k @ k)
    with adapter.hooks(model, [(VALUE, lambda v: v + (keys @ u)[..., None] * lam)]):
        by_hook = logits_of(model)
    clean = logits_of(model)
    with changed(adapter.w_out(model, LAYER), torch.outer(u, lam)):
        by_weight = logits_of(model)
    torch.testing.assert_close(by_hook, by_weight, **close)
    assert (by_hook - clean).abs().max() > 1e-2


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(("shape", "same"), [("gemma2", False), ("gemma3", False), ("llama", True)])
def test_value_is_read_before_the_norm_that_follows(zoo, name, shape, same):
    model, seen = zoo(name, shape), []
    with model.hooks(
        fwd_hooks=[(f"blocks.{LAYER}.hook_mlp_out", lambda t, hook: seen.append(t.clone()))]
    ):
        logits_of(model)
    value = passes.read(model, TOKENS, [VALUE])[VALUE]
    assert torch.allclose(seen[0], value, atol=1e-4) == same


@all_models
def test_norm_after_the_mlp_is_noticed(zoo, name, shape, processed):
    model = zoo(name, shape, processed)
    found = {defaults.norm_follows_mlp(model, layer) for layer in range(model.cfg.n_layers)}
    assert found == {shape in ("gemma2", "gemma3")}


@raw_models
def test_hash_is_of_the_very_bytes(zoo, name, shape):
    model = zoo(name, shape)
    weight = adapter.w_out(model, LAYER)
    before = adapter.weight_hash(weight)
    assert adapter.weight_hash(adapter.w_out(zoo(CLASSES[0], shape), LAYER)) == before
    assert adapter.weight_hash(adapter.w_out(model, 0)) != before
    changes = torch.zeros_like(weight)
    nudged = torch.nextafter(weight[7, 3].detach(), torch.tensor(9.0))  # one unit in the last place
    changes[7, 3] = nudged - weight[7, 3].detach()
    with changed(weight, changes):
        assert (weight != nudged).sum() == weight.numel() - 1
        assert adapter.weight_hash(adapter.w_out(model, LAYER)) != before
    assert adapter.weight_hash(adapter.w_out(model, LAYER)) == before
    owner = adapter.owner(weight)
    assert owner is adapter.owner(adapter.w_out(model, LAYER))
    assert owner.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()


# ---------------------------------------------------------------- logits


@all_models
def test_logits_at_chosen_places_are_those_of_the_full_forward(zoo, name, shape, processed):
    model, lengths = zoo(name, shape, processed), (11, 4, 8)
    rows = [TOKENS[i % 2, :n] for i, n in enumerate(lengths)]
    batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    places = [(2, 7), (0, 10), (1, 3), (0, 0), (1, 0), (0, 10)]
    at = torch.tensor(places).T
    found = passes.logits_at(model, batch, *at).detach()
    expected = torch.stack([logits_of(model, rows[r][None])[0, p] for r, p in places])
    torch.testing.assert_close(found, expected, **close)
    if shape == "gemma2":
        assert expected.abs().max() < 8  # its soft cap


@raw_models
def test_cached_steps_give_the_logits_of_the_full_forward(zoo, name, shape):
    model, cache, done = zoo(name, shape), None, 0
    tokens = TOKENS.clone()
    tokens[:, 0] = (
        0  # the token that is BOS, end of text and padding at once; it is no padding here
    )
    expected = logits_of(model, tokens)
    for step in (4, 1, 1, 3):
        logits, cache = passes.next_logits(model, tokens[:, done : done + step], cache)
        done += step
        torch.testing.assert_close(logits, expected[:, done - 1], **close)


def test_each_class_has_the_members_of_the_type(gpt2):
    members = [name for name in vars(Model) if not name.startswith("_")]
    assert {"cfg", "tokenizer", "blocks", "hooks"} <= set(members)
    assert not [name for name in members if not hasattr(gpt2, name)]
