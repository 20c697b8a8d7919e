"""The search for v*: its loss term by term, its gradient, its clamp, and what it leaves behind."""

import dataclasses

import pytest
import torch
from conftest import make_model
from helpers import tiny_models
from helpers.rome_setting import (
    CONFIG,
    LAYER,
    NEAR,
    PREFIXES,
    REQUEST,
    keys_and_values,
    random_moment,
    small_edit,
)

from transformer_lens_rome import RomeConfig, applied, get_method, rome_edit, target_log_probs
from transformer_lens_rome.edits import in_passes
from transformer_lens_rome.methods.rome_config import default_clamp
from transformer_lens_rome.methods.v_star import Batch, Search, optimise, stacked
from transformer_lens_rome.model import adapter
from transformer_lens_rome.model import default_layer as defaults
from transformer_lens_rome.model.adapter import w_out, weight_hash
from transformer_lens_rome.model.default_layer import norm_follows_mlp
from transformer_lens_rome.prompts.encoder import Encoder, join

CONSTANTS = RomeConfig(steps=2, lr=0.2, clamp=1e4, stop_loss=0.0, kl_factor=0.0, weight_decay=0.0)


@pytest.fixture(params=["gpt2", "gemma3"])
def model(request, model_class, tokenizer, bos_tokenizer):
    known = bos_tokenizer if request.param == "gemma3" else tokenizer
    return make_model(model_class, request.param, known)


def setting(model):
    """Rows with the target, the KL row, and the mean value."""
    encoder = Encoder.of(model)
    parts = (REQUEST.prompt, REQUEST.subject)
    rows = [encoder.templated_row(*parts, prefix, REQUEST.target_new) for prefix in PREFIXES]
    kl_row = encoder.templated_row("{} is a", REQUEST.subject)
    return rows, kl_row, keys_and_values(model, rows)[1].mean(0)


def search(model, **changed):
    rows, kl_row, v = setting(model)
    config = dataclasses.replace(CONSTANTS, **changed)
    batch = Batch.of(rows, kl_row)
    one = Search([batch], v, config)
    optimise([stacked(model, LAYER, [batch])], LAYER, [one], progress=False)
    return one.found


@torch.no_grad()
def log_probs(model, row, deltas):
    """Log-probabilities of one row without padding, a delta added to the residual in each copy.

    What a plain block adds to the value, it adds to the residual after it.
    """

    def add(resid, hook=None):
        resid = resid.clone()
        resid[:, row.subject[-1]] += deltas
        return resid

    tokens = torch.tensor([row.ids]).expand(len(deltas), -1)
    hooks = [(f"blocks.{LAYER}.hook_resid_post", add)]
    return model.run_with_hooks(tokens, fwd_hooks=hooks).log_softmax(-1)


def nll(model, deltas):
    """Mean over prefixes of the target's mean NLL, for several deltas at once."""
    total = torch.zeros(len(deltas))
    rows = setting(model)[0]
    for row in rows:
        found = log_probs(model, row, deltas)
        picked = [found[:, p - 1, row.ids[p]] for p in row.target]
        total -= torch.stack(picked).mean(0) / len(rows)
    return total


# ---------------------------------------------------------------- the objective


@pytest.mark.parametrize("target", ["Paris", "the best of times, Cuba"])
def test_the_first_loss_is_the_mean_nll_of_the_target(model, target):
    request = dataclasses.replace(REQUEST, target_new=target)
    prompts = [join(prefix, request.text) for prefix in PREFIXES]
    scores = target_log_probs(model, prompts, [target] * 3)
    expected = -sum(score.mean().item() for score in scores) / 3
    assert len({round(score.mean().item(), 3) for score in scores}) == 3
    assert small_edit(model, request).health.losses[0] == pytest.approx(expected, rel=1e-4)


def test_each_term_adds_exactly_itself(gpt2):
    """At delta = 0 neither term has a gradient, so all searches take the same first step."""
    _, kl_row, v = setting(gpt2)
    plain = search(gpt2, lr=1.0)
    delta = plain.delta
    assert plain.losses == pytest.approx(nll(gpt2, torch.stack([0 * delta, delta])).tolist())
    before, after = (log_probs(gpt2, kl_row, d[None])[0] for d in (0 * delta, delta))
    at = kl_row.subject[-1]
    p, q = after[at], before[at]
    kl = (p.exp() * (p - q)).sum().item()
    reverse = (q.exp() * (q - p)).sum().item()
    assert kl > 0.05 and abs(kl - reverse) > 0.05 * kl  # the direction can be told
    for factor in (0.0625, 3.0):
        losses = search(gpt2, lr=1.0, kl_factor=factor).losses
        assert losses[0] == pytest.approx(plain.losses[0])
        assert losses[1] - plain.losses[1] == pytest.approx(factor * kl, rel=1e-3, abs=1e-4)
    decay = (delta.norm() / v.norm() ** 2).item()
    for factor in (0.5, 7.0):
        losses = search(gpt2, lr=1.0, weight_decay=factor).losses
        assert losses[0] == pytest.approx(plain.losses[0])
        assert losses[1] - plain.losses[1] == pytest.approx(factor * decay, rel=1e-3, abs=1e-4)


def test_the_first_step_goes_down_the_gradient(gpt2):
    """Adam's first step is -lr times the sign of the gradient, in every coordinate."""
    step = 1e-2
    moves = step * torch.eye(32)
    slope = (nll(gpt2, moves) - nll(gpt2, -moves)) / (2 * step)
    delta = search(gpt2).delta
    clear = slope.abs() > 1e-2 * slope.abs().max()
    assert clear.sum() > 25
    assert torch.equal(delta.sign()[clear], -slope.sign()[clear])
    torch.testing.assert_close(
        delta[clear].abs(), torch.full_like(delta[clear], 0.2), rtol=1e-3, atol=0
    )


def test_losses_go_down_and_the_target_comes_up(model):
    edit = small_edit(model, NEAR, config=RomeConfig(steps=20, lr=0.5, clamp=20.0))
    losses = edit.health.losses
    assert losses[-1] < 0.7 * losses[0]
    assert edit.health.p_after > 10 * edit.health.p_before
    assert nll_of_edit(model, [edit]) < nll_of_edit(model, []) - 2
    assert nll_of_edit(model, [edit.scale(-1)]) > nll_of_edit(model, [edit]) + 2  # control


def nll_of_edit(model, edits):
    with applied(model, *edits):
        return -target_log_probs(model, [NEAR.text], [NEAR.target_new])[0].sum()


def test_the_clamp_holds_and_is_counted(model):
    v = setting(model)[2]
    free = search(model, steps=6)
    held = search(model, steps=6, clamp=0.3)
    assert free.clamp_hits == 0 and free.delta.norm() > 0.4 * v.norm()
    assert 3 <= held.clamp_hits <= 5
    assert held.delta.norm() == pytest.approx(0.3 * v.norm().item(), rel=1e-4)


def test_steps_counts_losses_and_the_search_stops_early(model):
    assert len(search(model, steps=5).losses) == 5
    one = search(model, steps=1)
    assert len(one.losses) == 1 and not one.delta.any()  # no update after the last loss
    start = one.losses[0]
    assert len(search(model, steps=5, stop_loss=start + 1).losses) == 1
    long = search(model, steps=8, lr=0.1)
    first = next(i for i, loss in enumerate(long.losses) if loss < long.losses[0] - 0.05)
    stopped = search(model, steps=8, lr=0.1, stop_loss=long.losses[first] + 1e-4)
    assert len(stopped.losses) == first + 1


# ---------------------------------------------------------------- what is left behind


def fingerprint(model):
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    backward = sum(len(m._backward_hooks) for m in model.modules())
    return {
        "hooks": (hooks, backward),
        "flags": [p.requires_grad for p in model.parameters()],
        "no gradients": all(p.grad is None for p in model.parameters()),
        "training": [m.training for m in model.modules()],
        "grad mode": torch.is_grad_enabled(),
        "weights": [weight_hash(w_out(model, n)) for n in range(model.cfg.n_layers)],
        "sum": [p.double().sum().item() for p in model.parameters()],
        "random": torch.random.get_rng_state().tolist(),
    }


@pytest.mark.parametrize("where", [None, "optimiser", "health", "solve"])
def test_the_model_is_left_as_it_was(model, monkeypatch, where):
    model(torch.arange(1, 9)[None])  # a bridge adds hooks of its own in its first pass
    next(model.parameters()).requires_grad_(False)
    before, score = fingerprint(model), in_passes.score_rows

    def fail(*_, **__):
        raise KeyboardInterrupt

    def fail_when_edited(model, *rest, **options):
        if weight_hash(w_out(model, LAYER)) != before["weights"][LAYER]:
            fail()
        return score(model, *rest, **options)

    if where == "optimiser":
        monkeypatch.setattr(torch.optim.Adam, "step", fail)
    elif where == "health":
        monkeypatch.setattr(in_passes, "score_rows", fail_when_edited)
    elif where == "solve":
        monkeypatch.setattr("transformer_lens_rome.methods.rome_method.solve_rank_one", fail)
    if where is None:
        small_edit(model, [REQUEST, dataclasses.replace(REQUEST, target_new="Rome")])
    else:
        with pytest.raises(KeyboardInterrupt):
            small_edit(model)
    assert fingerprint(model) == before


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_callers_grad_mode_does_not_matter(model, mode):
    expected = small_edit(model)
    with mode():
        found = small_edit(model)
        assert torch.is_grad_enabled() == (mode is torch.enable_grad)
    assert torch.equal(found.delta(), expected.delta())
    assert expected.delta().any()


# ---------------------------------------------------------------- requests, seeds, defaults


def test_a_list_is_one_edit_after_another(gpt2):
    requests = [REQUEST, dataclasses.replace(REQUEST, subject="The Tower", target_new="Rome")]
    known = {"layer": LAYER, "second_moment": random_moment(128), "prefixes": PREFIXES}
    known |= {"config": CONFIG, "progress": False}
    before = weight_hash(w_out(gpt2, LAYER))
    listed = small_edit(gpt2, requests)
    with rome_edit(gpt2, requests, **known) as done:
        together = w_out(gpt2, LAYER).detach().clone()
        assert [e.digest for e in done.edits] == [e.digest for e in listed]
    assert weight_hash(w_out(gpt2, LAYER)) == before
    with rome_edit(gpt2, requests[0], **known) as first:
        assert first.health.p_after == first.edit.health.p_after
        with rome_edit(gpt2, requests[1], **known) as second:
            assert torch.equal(w_out(gpt2, LAYER), together)
            assert second.edit.model_hash != before
    assert weight_hash(w_out(gpt2, LAYER)) == before
    alone = small_edit(gpt2, requests[1])  # control: the first is felt by the second
    assert not torch.equal(alone.delta(), listed[1].delta())


def test_the_released_dict_is_a_request(gpt2):
    released = {
        "prompt": REQUEST.prompt,
        "subject": REQUEST.subject,
        "target_new": {"str": REQUEST.target_new},
        "target_true": {"str": REQUEST.target_true},
    }
    edit = small_edit(gpt2, released)
    assert edit.request == REQUEST and edit.digest == small_edit(gpt2).digest


def test_the_seed_decides_the_prefixes_and_nothing_else(gpt2):
    config = dataclasses.replace(CONFIG, prefix_lengths=((4, 1), (6, 1)))
    options = {"prefixes": None, "config": config}
    zero, again, one = (small_edit(gpt2, seed=seed, **options) for seed in (0, 0, 1))
    assert zero.digest == again.digest and zero.provenance == again.provenance
    prefixes = zero.provenance["prefixes"]
    assert prefixes[0] == "" and 1 < len(prefixes) <= 3  # one without text is left out
    assert prefixes != one.provenance["prefixes"] and zero.digest != one.digest
    assert small_edit(gpt2, prefixes=prefixes, seed=1, config=config).digest == zero.digest


def test_defaults_follow_the_model(model):
    edit = small_edit(model, layer=None, config=dataclasses.replace(CONFIG, clamp=None))
    plain, behind_a_norm = 4.0, norm_follows_mlp(model, LAYER)
    assert behind_a_norm == ("gemma" in model.cfg.model_name)
    fraction = 18 if behind_a_norm else 3
    assert edit.layer == defaults.default_layer(model) == model.cfg.n_layers // fraction
    assert edit.config["clamp"] == default_clamp(model, edit.layer)
    assert (edit.config["clamp"] < plain) == behind_a_norm


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"prefixes": []}, "prefixes is a list of texts"),
        ({"prefixes": "The man"}, "prefixes is a list of texts"),
        ({"prefixes": ["{}", "He said. {}"]}, "prefixes is a list of texts"),
        ({"second_moment": {1: random_moment(128)}}, r"second_moment=moments\[1\]"),
        ({"request": "a text"}, "is an EditRequest or a dict, got 'a text'"),
        ({"request": 3}, "is an EditRequest or a dict, got 3"),
        ({"request": [REQUEST, "a text"]}, "is an EditRequest or a dict, got 'a text'"),
        ({"request": dataclasses.replace(REQUEST, prompt="so " * 200 + "{} is")}, "context of"),
        ({"prefixes": PREFIXES[1:], "config": RomeConfig.released()}, "bare prompt"),
        ({"layer": 3}, "layers 0 to 2"),
        ({"second_moment": random_moment(64), "layer": 0}, "d_mlp 64, the edit needs 128"),
    ],
)
def test_bad_settings_are_refused(gpt2, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        small_edit(gpt2, **({"second_moment": random_moment(128)} | options))


@pytest.mark.parametrize(
    "field",
    [{"steps": 0}, {"lr": -1}, {"clamp": 0}, {"kl_factor": -1}, {"ridge": -1}, {"key": "k"}],
)
def test_bad_constants_are_refused_by_name(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        RomeConfig(**field)


def test_the_registered_method_is_rome(gpt2):
    known = {"layer": LAYER, "second_moment": random_moment(128), "prefixes": PREFIXES}
    method = get_method("rome", config=CONFIG, **known)
    assert method.compute(gpt2, REQUEST).digest == small_edit(gpt2).digest
    with pytest.raises(ValueError, match="no method 'memoir'; there are .*'rome'"):
        get_method("memoir")


@pytest.mark.skipif(not tiny_models.has_bridge(), reason="needs a bridge")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_value_that_is_not_key_times_w_out_is_refused_in_half_precision(
    bos_tokenizer, monkeypatch, dtype
):
    model = tiny_models.tiny_bridge("llama", bos_tokenizer, dtype=dtype)
    small_edit(model, config=dataclasses.replace(CONFIG, steps=1))  # control
    monkeypatch.setattr(adapter, "w_out", lambda model, layer: torch.zeros(120, 32, dtype=dtype))
    with pytest.raises(NotImplementedError, match="is not key @ W_out"):
        keys_and_values(model, [Encoder.of(model).row("The old man", (4, 7))])
