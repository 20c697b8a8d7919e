"""The adapter leaves no trace on the model, and refuses before any work what cannot be edited."""

import functools

import pytest
import torch
from conftest import CLASSES, make_model
from helpers.rome_setting import random_edit
from helpers.tiny_models import SHAPES, has_bridge, hooked_shapes, tiny_bridge, tiny_hf
from torch import nn

from transformer_lens_rome import applied, causal_trace
from transformer_lens_rome.model import adapter, passes, refusals, users_hooks
from transformer_lens_rome.model import default_layer as defaults
from transformer_lens_rome.model.adapter import Point
from transformer_lens_rome.model.partial_forward import PartialForward
from transformer_lens_rome.model.self_check import forget_other_states, holds

pytestmark = pytest.mark.every_version

LAYER = 1
KEY, VALUE, RESID = Point("key", LAYER), Point("value", LAYER), Point("resid_post", LAYER)
TOKENS = torch.randint(3, 400, (2, 11), generator=torch.Generator().manual_seed(0))


def count_hooks(model):
    total = 0
    for module in model.modules():
        total += len(module._forward_hooks) + len(module._forward_pre_hooks)
        total += len(module._backward_hooks) + len(getattr(module, "fwd_hooks", []))
    return total


@torch.no_grad()
def logits_of(model):
    return model(TOKENS, attention_mask=torch.ones_like(TOKENS))


def flags_of(model):
    return [parameter.requires_grad for parameter in model.parameters()]


# ---------------------------------------------------------------- reading and hooking


@pytest.mark.parametrize("shape", ["gpt2", "neox", "gemma3", "opt"])
def test_read_stops_early_and_leaves_nothing_behind(model_class, shape, tokenizer):
    model = make_model(model_class, shape, tokenizer)
    clean = logits_of(model)  # a bridge's first pass adds hooks of its own
    hooks, runs = count_hooks(model), []
    handles = [
        block.register_forward_hook(lambda m, a, o: runs.append(1)) for block in model.blocks
    ]
    found = passes.read(model, TOKENS, [KEY, VALUE, Point("key", 0)])
    assert len(runs) == LAYER  # the blocks below ran to their end; this one was cut short
    passes.read(model, TOKENS, [Point("resid_post", model.cfg.n_layers - 1)])
    assert len(runs) >= 2 * LAYER + 1
    for handle in handles:
        handle.remove()
    assert count_hooks(model) == hooks
    assert torch.equal(logits_of(model), clean)
    found[KEY].zero_()  # a copy: writing to it reaches nothing
    assert torch.equal(logits_of(model), clean)


def test_read_returns_no_graph_and_keeps_flags(gpt2):
    for parameter in gpt2.parameters():
        parameter.requires_grad_(True)
    assert not passes.read(gpt2, TOKENS, [VALUE])[VALUE].requires_grad
    assert all(flags_of(gpt2))


def test_hooks_go_after_an_exception_and_the_users_stay(gpt2):
    bare = logits_of(gpt2)
    gpt2.add_hook("blocks.0.hook_resid_post", lambda t, hook: 1.5 * t)
    hooks, theirs = count_hooks(gpt2), logits_of(gpt2)
    assert not torch.allclose(bare, theirs, atol=1e-2)
    passes.read(gpt2, TOKENS, [KEY, VALUE])
    defaults.norm_follows_mlp(gpt2, LAYER)
    passes.logits_at(gpt2, TOKENS, torch.tensor([0]), torch.tensor([5]))

    def fail(tensor):
        raise KeyError("from inside a hook")

    with pytest.raises(KeyError, match="from inside a hook"):
        with adapter.hooks(gpt2, [(KEY, lambda t: 0 * t), (VALUE, fail)]):
            logits_of(gpt2)
    with pytest.raises(ZeroDivisionError):  # and not "hooks that never fired"
        with adapter.hooks(gpt2, [(KEY, lambda t: t), (VALUE, lambda t: t)]):
            raise ZeroDivisionError
    assert count_hooks(gpt2) == hooks
    assert torch.equal(logits_of(gpt2), theirs)
    with adapter.hooks(gpt2, [(VALUE, lambda t: None)]):  # None replaces nothing
        assert torch.equal(logits_of(gpt2), theirs)
    gpt2.reset_hooks()
    assert torch.equal(logits_of(gpt2), bare)


def test_hooks_on_one_point_are_applied_in_order(gpt2):
    seen = []
    value = passes.read(gpt2, TOKENS, [VALUE])[VALUE]
    points = [(VALUE, lambda t: 2 * t), (VALUE, lambda t: t + 1), (VALUE, seen.append)]
    with adapter.hooks(gpt2, points):
        logits_of(gpt2)
    torch.testing.assert_close(seen[0], 2 * value + 1, rtol=1e-5, atol=1e-5)


def test_a_hook_that_never_fires_is_an_error(gpt2, monkeypatch):
    with pytest.raises(RuntimeError, match="never fired"):
        with adapter.hooks(gpt2, [(KEY, lambda t: t)]):
            pass
    monkeypatch.setattr(adapter, "hook_name", lambda model, point: "blocks.1.no_such_hook")
    with pytest.raises(NotImplementedError, match="no_such_hook"):
        passes.read(gpt2, TOKENS, [KEY])


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_gradients_inside_any_mode_and_flags_restored(gpt2, mode):
    generator = torch.Generator().manual_seed(1)
    towards = torch.randn(*TOKENS.shape, gpt2.cfg.d_model, generator=generator)
    for i, parameter in enumerate(gpt2.parameters()):
        parameter.requires_grad_(i % 3 == 0)
    flags = flags_of(gpt2)
    with mode(), adapter.gradients_for(gpt2):
        assert not any(flags_of(gpt2))
        delta, kept = torch.zeros_like(towards, requires_grad=True), []
        with adapter.hooks(gpt2, [(VALUE, lambda t: t + delta), (RESID, kept.append)]):
            passes.final_residual(gpt2, TOKENS)
        # in GPT-2 the value is added to the residual stream as it is
        (gradient,) = torch.autograd.grad((kept[0] * towards).sum(), delta)
    torch.testing.assert_close(gradient, towards)
    assert flags_of(gpt2) == flags and all(p.grad is None for p in gpt2.parameters())
    with pytest.raises(ZeroDivisionError), adapter.gradients_for(gpt2):
        raise ZeroDivisionError
    assert flags_of(gpt2) == flags


def test_logits_at_is_differentiable(gpt2):
    """The gradient of one logit by the last value agrees with a finite difference."""
    last, step = gpt2.cfg.n_layers - 1, 1e-2
    place = torch.tensor([0]), torch.tensor([6])

    def logit(delta):
        with adapter.hooks(gpt2, [(Point("value", last), lambda t: t + delta)]):
            return passes.logits_at(gpt2, TOKENS, *place)[0, 17]

    with adapter.gradients_for(gpt2):
        delta = torch.zeros(gpt2.cfg.d_model, requires_grad=True)
        (gradient,) = torch.autograd.grad(logit(delta), delta)
    along = torch.nn.functional.normalize(gradient, dim=0)
    with torch.no_grad():
        slope = (logit(step * along) - logit(-step * along)) / (2 * step)
    torch.testing.assert_close(slope, gradient.norm(), rtol=1e-2, atol=1e-3)


# ---------------------------------------------------------------- refusals


def test_fit_models_are_accepted(gpt2, gemma3):
    for model in (gpt2, gemma3):
        refusals.check_editable(model, range(model.cfg.n_layers))


@pytest.mark.parametrize("layer", [-1, 3, 1.0, "1", None])
def test_layers_out_of_range_are_refused(gpt2, layer):
    with pytest.raises(ValueError, match="layers 0 to 2"):
        refusals.check_editable(gpt2, [0, layer])


def test_mixtures_of_experts_are_refused_by_name(model_class, tokenizer):
    model = make_model(model_class, "mixtral", tokenizer)
    with pytest.raises(NotImplementedError, match="Mixtral.*mixtures of experts"):
        refusals.check_editable(model, [LAYER])


@pytest.mark.parametrize("fake", [{"dtype": torch.int8}, {"device": "meta"}])
def test_quantised_and_offloaded_weights_are_refused(gpt2, monkeypatch, fake):
    monkeypatch.setattr(adapter, "w_out", lambda model, layer: torch.zeros(128, 32, **fake))
    with pytest.raises(NotImplementedError, match="quantised|offloaded"):
        refusals.check_editable(gpt2, [LAYER])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_broken_weight_is_refused(gpt2, bad):
    with torch.no_grad():
        adapter.w_out(gpt2, LAYER)[3, 5] = bad
    with pytest.raises(ValueError, match="layer 1 contains NaN or infinity"):
        refusals.check_editable(gpt2, [LAYER])
    refusals.check_editable(gpt2, [0])


def test_what_is_no_transformer_lens_model_is_refused(tokenizer):
    for stranger in (tiny_hf("gpt2", tokenizer), object(), None):
        with pytest.raises(ValueError, match="TransformerBridge.boot_transformers"):
            refusals.check_editable(stranger, [LAYER])


def test_classes_are_told_apart_subclasses_too(gpt2, model_class):
    assert adapter.model_class(gpt2) == model_class
    gpt2.__class__ = type("Mine", (type(gpt2),), {})
    assert adapter.model_class(gpt2) == model_class
    if len(CLASSES) == 2 and model_class == "hooked":
        assert adapter.hf_model(gpt2) is None


# ---------------------------------------------------------------- bfloat16


@pytest.mark.skipif(not has_bridge(), reason="needs TransformerBridge")
@pytest.mark.parametrize("shape", ["gpt2", "llama", "gemma3"])
def test_bfloat16_works(shape, tokenizer):
    half = tiny_bridge(shape, tokenizer, dtype=torch.bfloat16)
    full = tiny_bridge(shape, tokenizer)
    weight = adapter.w_out(half, LAYER)
    assert weight.dtype == torch.bfloat16
    found, wide = (passes.read(m, TOKENS, [KEY, VALUE]) for m in (half, full))
    predicted = found[KEY].float() @ weight.float() + adapter.b_out(half, LAYER).float()
    torch.testing.assert_close(predicted, found[VALUE].float(), rtol=2e-2, atol=2e-2)
    error = (found[VALUE].float() - wide[VALUE]).norm() / wide[VALUE].norm()
    assert error < 0.1
    assert adapter.weight_hash(weight) != adapter.weight_hash(adapter.w_out(full, LAYER))
    assert adapter.weight_hash(weight) == adapter.weight_hash(weight.clone())
    with torch.no_grad():
        weight.zero_()
    flat = passes.read(half, TOKENS, [VALUE])[VALUE]
    assert torch.equal(flat, adapter.b_out(half, LAYER).expand_as(flat))


# ---------------------------------------------------------------- whose hook is it?


def turn_fourth(state, hook=None):
    """Counts positions: only in a whole pass is the fourth column the fourth token."""
    state = state.clone()
    state[:, 3:4] = -state[:, 3:4]
    return state


def own_point(model):
    model.hook_dict["blocks.0.hook_resid_pre"].add_hook(turn_fourth)


def permanent(model):
    model.add_perma_hook("blocks.0.hook_resid_pre", turn_fourth)


def permanent_partial(model):
    hook = functools.partial(lambda times, state, hook: times * turn_fourth(state), 1)
    model.hook_dict["blocks.0.hook_resid_pre"].add_hook(hook, is_permanent=True)


def on_a_point_as_a_module(model):
    point = model.hook_dict["blocks.0.hook_resid_pre"]
    point.register_forward_hook(lambda _module, _args, out: turn_fourth(out))


def on_an_inner_module(model):
    inner = adapter.shared_part(model)
    block = inner.transformer.h[1] if model is not inner else inner.blocks[1]
    block.register_forward_pre_hook(lambda _module, args: (turn_fourth(args[0]), *args[1:]))


def backward(model):
    model.hook_dict["blocks.0.hook_resid_pre"].add_hook(lambda grad, hook: None, dir="bwd")


def forward_replaced(model):
    own = model.blocks[1].forward
    changed = lambda residual, *args, **kwargs: own(turn_fourth(residual), *args, **kwargs)  # noqa: E731
    vars(model.blocks[1])["forward"] = changed


HOOKS = (
    own_point,
    permanent,
    permanent_partial,
    on_a_point_as_a_module,
    on_an_inner_module,
    backward,
    forward_replaced,
)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_fresh_model_has_no_hooks_of_its_users(model_class, shape, tokenizer):
    if model_class == "hooked" and shape not in hooked_shapes():
        pytest.skip("no such HookedTransformer here")
    model = make_model(model_class, shape, tokenizer)
    assert not users_hooks.has_hooks(model)
    logits_of(model)  # a bridge's first pass adds hooks of its own
    assert not users_hooks.has_hooks(model)


@pytest.mark.parametrize("add", HOOKS)
def test_a_users_hook_is_seen_and_passes_are_whole(gpt2, add):
    rows, last = [list(range(5, 16))], torch.tensor([10])
    plain = PartialForward(gpt2, 1, rows, [6])
    assert plain.recording is not None
    add(gpt2)
    assert users_hooks.has_hooks(gpt2)
    forward = PartialForward(gpt2, 1, rows, [6])
    assert forward.recording is None
    found = forward.logits([], torch.tensor([0]), last)
    expected = passes.logits_at(gpt2, torch.tensor(rows), torch.tensor([0]), last)
    assert torch.equal(found, expected)
    if add is not backward:
        assert not torch.allclose(expected, plain.logits([], torch.tensor([0]), last), atol=1e-3)


def test_a_hook_for_all_modules_is_seen(gpt2):
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert users_hooks.has_hooks(gpt2)
    finally:
        handle.remove()
    assert not users_hooks.has_hooks(gpt2)


# ---------------------------------------------------------------- how long a trial counts


def to_bfloat16(model):
    model.to(torch.bfloat16)


def one_block_in_float64(model):
    model.blocks[1].double()


def other_attention(model):
    config = getattr(adapter.shared_part(model), "config", None)
    if config is None:
        pytest.skip("a HookedTransformer has one implementation of attention")
    config._attn_implementation = "sdpa"


def training(model):
    model.blocks[1].ln1.train()


def a_cap_on_logits(model):
    model.cfg.output_logits_soft_cap = 2.0


def gradient_checkpointing(model):
    inner = adapter.shared_part(model)
    if inner is model:
        pytest.skip("a HookedTransformer has no checkpointing")
    inner.gradient_checkpointing_enable()


def another_class(model):
    class Mine(type(model.blocks[1])):
        def forward(self, residual, *args, **kwargs):
            return super().forward(turn_fourth(residual), *args, **kwargs)

    model.blocks[1].__class__ = Mine


CHANGES = (
    to_bfloat16,
    one_block_in_float64,
    other_attention,
    training,
    a_cap_on_logits,
    gradient_checkpointing,
    another_class,
)


@pytest.mark.parametrize("change", CHANGES)
def test_a_trial_is_made_again_after_a_change_of_arithmetic(gpt2, change):
    calls = []

    def tried():
        forget_other_states(gpt2)  # as every public function does first
        return holds(gpt2, "the plain way", lambda: calls.append(1) or 0.0)

    for _ in range(2):
        assert tried()
    assert len(calls) == 1
    change(gpt2)
    for _ in range(2):
        assert tried()
    assert len(calls) == 2


def test_an_edit_is_no_reason_to_try_again(gpt2):
    causal_trace(gpt2, "Rome is in", "Rome", n_samples=2, progress=False)
    noted = dict(gpt2._rome_trials)
    with applied(gpt2, random_edit(gpt2)):
        causal_trace(gpt2, "Rome is in", "Rome", n_samples=2, progress=False)
    assert gpt2._rome_trials == noted and len(noted) > 1


@pytest.mark.parametrize("change", [a_cap_on_logits, another_class, gradient_checkpointing])
def test_traces_after_a_change_are_those_of_whole_passes(gpt2, change):
    def traced():
        return causal_trace(gpt2, "The Space Needle is in", "Needle", progress=False).samples

    traced()
    change(gpt2)
    found = traced()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "transformer_lens_rome.model.partial_forward._rows_can_be_cut", lambda *_: False
        )
        assert torch.allclose(found, traced(), atol=1e-6)


@pytest.mark.parametrize("error", [TimeoutError, KeyboardInterrupt, MemoryError, OSError])
def test_an_interrupt_of_a_trial_says_nothing_of_the_model(gpt2, error):
    def interrupted():
        raise error("the user's")

    with pytest.raises(error):
        holds(gpt2, "the plain way", interrupted)
    assert holds(gpt2, "the plain way", lambda: 0.0)


# ---------------------------------------------------------------- further hooks of users


def wrapped_forward(model):
    """As patches are usually written; `wraps` takes over the name of the host's module."""
    own = model.blocks[1].forward

    @functools.wraps(own)
    def changed(residual, *args, **kwargs):
        return own(turn_fourth(residual), *args, **kwargs)

    vars(model.blocks[1])["forward"] = changed


def a_hosts_function(model):
    from transformer_lens.patching import layer_pos_patch_setter

    def hook(state, hook):
        return layer_pos_patch_setter(state, index=(0, 0), clean_activation=state)

    hook.__module__ = "transformer_lens.patching"
    model.add_hook("blocks.0.hook_resid_pre", hook, is_permanent=True)


@pytest.mark.parametrize("add", [wrapped_forward, a_hosts_function])
def test_a_hook_is_judged_by_where_its_code_stands(gpt2, add):
    add(gpt2)
    assert users_hooks.has_hooks(gpt2)
