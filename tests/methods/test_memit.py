"""Edits of many facts on tiny models: one value, its health, and the algebra on a running model."""

from __future__ import annotations

import dataclasses
import html

import pytest
import torch
from conftest import CLASSES, make_model
from helpers import tiny_models
from helpers.mass_setting import FACTS, SHORT, TEXTS, many_edit, method, options
from helpers.matrices import same, weights
from helpers.rome_setting import NEAR, random_moment

from transformer_lens_rome import (
    applied,
    apply_edit,
    get_method,
    load_edit,
    memit_edit,
    revert_all,
    show_edit,
)
from transformer_lens_rome.methods import mass_method
from transformer_lens_rome.methods.mass_config import default_layers
from transformer_lens_rome.methods.mass_history import extended_history
from transformer_lens_rome.methods.mass_targets import anchored, read_at_subject, search_targets
from transformer_lens_rome.model import adapter, passes
from transformer_lens_rome.model.adapter import Point, Weight, w_out
from transformer_lens_rome.prompts.encoder import Encoder
from transformer_lens_rome.prompts.scores import target_log_probs

RELEASED = dataclasses.replace(SHORT, variant="released")


@pytest.fixture(params=["gpt2", "gemma3"])
def model(request, model_class, tokenizer, bos_tokenizer):
    known = bos_tokenizer if request.param == "gemma3" else tokenizer
    return make_model(model_class, request.param, known)


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def change(edit, layer):
    return edit.change(Weight("W_out", layer))


# ---------------------------------------------------------------- one value


def test_an_edit_of_many_facts_is_one_small_value(model, tmp_path):
    before = weights(model)
    edit = many_edit(model)
    assert same(weights(model), before)
    assert edit.requests == tuple(FACTS) and edit.request == FACTS[0]
    m, d = w_out(model, 1).shape
    for left, right in edit.factors.values():
        assert left.shape == (m, len(FACTS)) and right.shape == (len(FACTS), d)
    edit.save(tmp_path / "edit")
    loaded = load_edit(tmp_path / "edit")
    assert loaded.requests == edit.requests and loaded.health == edit.health
    assert loaded.digest == edit.digest and loaded.config == edit.config
    assert loaded.provenance == edit.provenance
    with applied(model, edit):
        once = weights(model)
    with applied(model, loaded):
        assert same(weights(model), once) and not same(once, before)
        with applied(model, edit.scale(-1.0), force=True):
            for where in edit.factors:
                assert torch.allclose(adapter.parameter(model, where), before[where], atol=1e-6)
    assert same(weights(model), before)
    assert edit.scale(0.5).requests == edit.requests


def test_in_place_it_is_the_same_edit_and_undone_to_the_last_bit(model):
    before, edit = weights(model), many_edit(model)
    done = memit_edit(model, FACTS, **options(model), progress=False)
    assert done.edit.digest == edit.digest and not same(weights(model), before)
    done.revert()
    assert same(weights(model), before)


def test_the_facts_become_more_probable(model):
    """With a long search and little weight on C, targets of a random model become likely."""
    config = dataclasses.replace(SHORT, steps=20, covariance_weight=0.01, clamp=6.0)
    edit = many_edit(model, config=config)
    texts, targets = [one.text for one in FACTS], [one.target_new for one in FACTS]
    before = torch.stack([one.sum() for one in target_log_probs(model, texts, targets)])
    with applied(model, edit):
        after = torch.stack([one.sum() for one in target_log_probs(model, texts, targets)])
    assert after.mean() > before.mean() + 1
    facts = edit.health.facts
    assert [fact.p_before for fact in facts] == pytest.approx(before.exp().tolist(), rel=1e-3)
    assert [fact.p_after for fact in facts] == pytest.approx(after.exp().tolist(), rel=1e-3)
    assert edit.health.p_after == pytest.approx(after.exp().mean().item(), rel=1e-3)


# ---------------------------------------------------------------- the algebra on a running model


@pytest.mark.parametrize("solve", ["memit", "emmet", "alphaedit"])
def test_one_fact_moves_by_what_its_health_says(model, solve):
    """One layer, the bare prompt only: s / (1 + s) of the residual, or all of it in EMMET."""
    known = {"layers": (1,), "prefixes": [""], "solve": solve}
    edit = method(model, **known).compute_many(model, FACTS[:1])
    (fact,) = edit.health.facts
    left = fact.residuals[1] / fact.residuals[0]
    (s,) = fact.s
    expected = 0.0 if solve == "emmet" else 1 / (1 + s)
    assert left == pytest.approx(expected, abs=2e-5)
    assert 0.2 < s / (1 + s) < 0.999  # the control: it could have been seen
    row = Encoder.of(model).templated_row(FACTS[0].prompt, FACTS[0].subject)
    point = Point("value" if tiny_models_is_normed(model) else "resid_post", 1)
    (before,) = read_at_subject(model, [row], [point])
    with applied(model, edit):
        (after,) = read_at_subject(model, [row], [point])
    assert (after - before).norm().item() == pytest.approx(fact.residuals[0] * (1 - left), rel=1e-4)


def tiny_models_is_normed(model):
    return "emma" in adapter.architecture(model)


def test_keys_and_residuals_are_half_the_bare_prompts(model, monkeypatch):
    seen = []
    solve = mass_method.solve_many
    monkeypatch.setattr(
        mass_method,
        "solve_many",
        lambda metric, K, *a, **o: seen.append(K) or solve(metric, K, *a, **o),
    )
    edit = many_edit(model, layers=(1,))
    encoder = Encoder.of(model)
    rows = [encoder.templated_row(FACTS[1].prompt, FACTS[1].subject, text) for text in TEXTS]
    keys = torch.cat([read_at_subject(model, [row], [Point("key", 1)])[0] for row in rows])
    assert relative(seen[0][:, 1], keys[0] / 2 + keys[1] / 4 + keys[2] / 4) < 1e-5
    assert relative(seen[0][:, 1], keys.mean(0)) > 1e-3  # control
    # before a weight changes, z* - z is delta, whatever the weights of the prefixes are
    point = Point("value" if tiny_models_is_normed(model) else "resid_post", 1)
    targets = search_targets(model, encoder, FACTS, TEXTS, point, SHORT, progress=False)
    right = edit.factors[Weight("W_out", 1)][1]
    assert relative(right, torch.stack([target.delta for target in targets])) < 1e-4


def test_layers_are_written_one_after_another(gpt2):
    """Each layer is solved on the model with those below it, and takes a share of what is left."""
    edit = many_edit(gpt2, layers=(0, 1))
    for fact in edit.health.facts:
        assert len(fact.s) == 2 and len(fact.residuals) == 3
        assert sum(fact.absorbed) == pytest.approx(1 - fact.residuals[-1] / fact.residuals[0])
    for i, layer in enumerate((0, 1)):
        norms = edit.factors[Weight("W_out", layer)][1].norm(dim=1)
        known = [fact.residuals[i] / (2 - i) for fact in edit.health.facts]
        assert norms.tolist() == pytest.approx(known, rel=1e-5)
    lower = {Weight("W_out", 0): edit.factors[Weight("W_out", 0)]}
    below = type(edit).of(lower, {where: edit.hashes[where] for where in lower}, request=FACTS[0])
    encoder, z = Encoder.of(gpt2), Point("resid_post", 1)
    rows = [encoder.templated_row(FACTS[2].prompt, FACTS[2].subject, text) for text in TEXTS]
    (before,) = read_at_subject(gpt2, rows, [z])
    with applied(gpt2, below):
        (after,) = read_at_subject(gpt2, rows, [z])
    delta = edit.factors[Weight("W_out", 0)][1][2] * 2
    moved = (after - before)[0] / 2 + (after - before)[1:].mean(0) / 2
    assert relative(edit.factors[Weight("W_out", 1)][1][2], delta - moved) < 1e-4
    assert relative(delta, delta - moved) > 1e-2  # control


def test_a_layer_after_which_nothing_sees_the_subject_is_said(gpt2):
    """After the last block only the next token can change, so the search has no gradient."""
    edit = many_edit(gpt2, layers=(2,))
    blind, near = edit.health.facts[0], edit.health.facts[2]
    assert any("did not lower" in warning for warning in blind.warnings)
    assert not any("did not lower" in warning for warning in near.warnings)
    assert any("3 of 4 facts" in w and "did not lower" in w for w in edit.health.warnings)


def test_batched_searches_are_those_one_by_one(model):
    together = method(model).compute_many(model, FACTS)
    alone = method(model).compute_many(model, FACTS, batch_size=1)
    for where in together.factors:
        assert relative(together.change(where), alone.change(where)) < 1e-4


@pytest.mark.skipif(len(CLASSES) < 2, reason="one class only in this TransformerLens")
@pytest.mark.parametrize("shape", [s for s in tiny_models.SHAPES if tiny_models.has_hooked()])
def test_equal_weights_give_equal_edits_in_both_classes(shape, tokenizer):
    hooked, bridge = (make_model(c, shape, tokenizer) for c in ("hooked", "bridge"))
    mine, other = many_edit(hooked), many_edit(bridge)
    assert mine.hashes == other.hashes
    for where in mine.factors:
        assert relative(mine.change(where), other.change(where)) < 2e-3


# ---------------------------------------------------------------- batches and a history


def in_batches(model, sizes, targets, with_history=True, **changed):
    """The change of one layer by batches whose targets were searched on the unedited model."""
    one, first, total = method(model, layers=(1,), **changed), 0, 0.0
    with pytest.MonkeyPatch.context() as patch:
        for n in sizes:
            some = slice(first, first + n)
            found = targets[some]
            patch.setattr(mass_method, "search_targets", lambda *a, found=found, **o: found)
            edit = one.compute_many(model, FACTS[some])
            total = total + change(edit, 1)
            apply_edit(model, edit)
            if with_history:
                one = one.after(model, edit)
            first += n
    revert_all(model)
    return total


@pytest.mark.parametrize("sizes", [(2, 2), (1, 1, 1, 1), (3, 1)], ids=str)
def test_batches_with_a_history_equal_all_at_once(model, sizes):
    """One layer, fixed targets; keys and residuals of the same prefixes. Released: not quite."""
    point = Point("value" if tiny_models_is_normed(model) else "resid_post", 1)
    encoder = Encoder.of(model)
    each = {
        variant: search_targets(model, encoder, FACTS, TEXTS, point, config, progress=False)
        for variant, config in (("consistent", SHORT), ("released", RELEASED))
    }
    whole = in_batches(model, (4,), each["consistent"])
    assert relative(in_batches(model, sizes, each["consistent"]), whole) < 1e-4
    without = in_batches(model, sizes, each["consistent"], with_history=False)
    assert relative(without, whole) > 1e-2
    released = [
        in_batches(model, some, each["released"], config=RELEASED) for some in ((4,), sizes)
    ]
    assert relative(*released) > 1e-3


def test_a_later_batch_preserves_the_earlier_facts(gpt2):
    """With the history the second batch changes the values at the first batch's keys less."""
    first = many_edit(gpt2, FACTS[:2], layers=(1,))
    with applied(gpt2, first):
        history = extended_history(gpt2, first)
        known = {"layers": (1,), "config": dataclasses.replace(SHORT, covariance_weight=1.0)}
        second = [many_edit(gpt2, FACTS[2:], history=one, **known) for one in (None, history)]
    moved = [(history.keys[1].T @ change(edit, 1)).norm().item() for edit in second]
    assert moved[1] < 0.5 * moved[0]
    assert second[1].provenance["n_earlier_facts"] == 2


def test_the_keys_of_the_history(gpt2):
    """Those of the solve, or those of the model with all layers edited."""
    for rule, equal in (("solved", True), ("after", False)):
        config = dataclasses.replace(SHORT, history_keys=rule)
        edit = many_edit(gpt2, layers=(0, 1), config=config)
        history = extended_history(gpt2, edit)
        encoder = Encoder.of(gpt2)
        row = encoder.templated_row(FACTS[0].prompt, FACTS[0].subject)
        only = type(edit).of(
            {Weight("W_out", 0): edit.factors[Weight("W_out", 0)]},
            {Weight("W_out", 0): edit.hashes[Weight("W_out", 0)]},
            request=FACTS[0],
        )
        with applied(gpt2, only if equal else edit):
            (key,) = read_at_subject(gpt2, [row], [Point("key", 1)])
            others = read_at_subject(
                gpt2,
                [
                    encoder.templated_row(FACTS[0].prompt, FACTS[0].subject, text)
                    for text in TEXTS[1:]
                ],
                [Point("key", 1)],
            )[0]
        assert relative(history.keys[1][:, 0], key[0] / 2 + others.mean(0) / 2) < 1e-5
        with applied(gpt2, edit):
            assert torch.equal(extended_history(gpt2, edit).keys[1], history.keys[1])


# ---------------------------------------------------------------- the search's options


def test_encores_stop_needs_the_target_on_top_several_times(gpt2):
    """The target right after the subject is on top soon; each wanted step more is one step more."""
    known = {"steps": 40, "lr": 0.5, "clamp": 20.0, "stop_loss": 0.0, "stop": "top"}
    known |= {"kl_factor": 0.0, "weight_decay": 0.0}
    steps = {}
    for n in (1, 2, 4):
        config = dataclasses.replace(SHORT, top_steps=n, **known)
        edit = many_edit(gpt2, [NEAR], layers=(1,), config=config)
        steps[n] = edit.health.facts[0].steps
    assert 1 < steps[1] < 36 and steps[1] < steps[2] < steps[4] <= 40
    assert steps[2] >= steps[1] + 1 and steps[4] >= steps[2] + 2


def test_nas_gives_every_value_one_norm_or_leaves_it():
    v0, delta = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    scaled = v0 + anchored(v0, delta, 2.5)
    assert scaled.tolist() == pytest.approx([1.5, 2.0])
    assert anchored(v0, delta, 2.4).tolist() == [0.0, 0.0]  # ||v|| = 5 > 2 · 2.4


def test_nas_on_a_model(model):
    """Where one layer absorbs all, the MLP's addition at the subject gets the anchor's norm."""
    anchor = 5.0
    config = dataclasses.replace(SHORT, anchor=anchor)
    known = {"layers": (1,), "prefixes": [""], "solve": "emmet", "config": config}
    edit = method(model, **known).compute_many(model, FACTS[:2])
    encoder = Encoder.of(model)
    rows = [encoder.templated_row(one.prompt, one.subject) for one in FACTS[:2]]
    with applied(model, edit):
        (added,) = read_at_subject(model, rows, [Point("value", 1)])
    assert added.norm(dim=1).tolist() == pytest.approx([anchor, anchor], rel=1e-3)


# ---------------------------------------------------------------- defaults


def test_default_layers_are_published_or_a_guess_that_is_said(model, caplog):
    caplog.set_level("INFO")
    layers = default_layers(model)
    assert layers == ((0,) if tiny_models_is_normed(model) else (0,))
    assert "the model's shape" in caplog.text
    caplog.clear()
    depth, name = model.cfg.n_layers, model.cfg.model_name
    model.cfg.model_name, model.cfg.n_layers = "openai-community/gpt2-xl", 48
    assert default_layers(model) == (13, 14, 15, 16, 17) and "published" in caplog.text
    model.cfg.model_name, model.cfg.n_layers = name, depth


def test_several_layers_are_refused_where_a_norm_follows_the_mlp(gemma3):
    with pytest.raises(NotImplementedError, match=r"a norm follows the MLP.*layers=\[0\]"):
        many_edit(gemma3, layers=(0, 1))


@pytest.mark.slow
def test_the_model_writes_its_own_prefixes(model):
    edit = many_edit(model, prefixes=None)
    texts = edit.provenance["prefixes"]
    assert texts[0] == "" and 2 <= len(texts) <= 6 and all(text.endswith(".") for text in texts[1:])
    assert texts[1].startswith("The")
    assert many_edit(model, prefixes=None).digest == edit.digest
    assert many_edit(model, prefixes=None, seed=1).digest != edit.digest


def test_what_was_used_is_in_the_edit(model):
    edit = get_method("alphaedit", **options(model)).compute_many(model, FACTS)
    assert edit.config["solve"] == "alphaedit" and edit.config["steps"] == 4
    layers = [str(where.layer) for where in edit.factors]
    assert list(edit.provenance["metrics"]) == layers == list(edit.provenance["second_moments"])
    assert edit.provenance["metrics"][layers[0]]["null_fraction"] == 0.5


@pytest.mark.parametrize("state", ["no_grad", "inference_mode", "float64", "bfloat16"])
def test_states_of_torch_change_nothing(gpt2, state):
    plain = many_edit(gpt2)
    known = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
    if state in known:
        with known[state]():
            edit = many_edit(gpt2)
    else:
        before = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, state))
        try:
            edit = many_edit(gpt2)
        finally:
            torch.set_default_dtype(before)
    assert edit.digest == plain.digest and edit.health == plain.health


@pytest.mark.slow
def test_every_fact_is_shown(gpt2):
    edit = many_edit(gpt2)
    page = edit._repr_html_()
    assert "and 3 more facts" in page and page.count("%</td>") == 4
    assert all(html.escape(fact.target_new) in page for fact in FACTS)
    known = {"n_samples": 2, "progress": False}
    first, other = (show_edit(gpt2, edit, fact=i, **known) for i in (0, 1))
    assert (first.request, other.request) == (FACTS[0], FACTS[1])
    alone = dataclasses.replace(edit, request=FACTS[1], requests=(FACTS[1],))
    for mine, expected in zip(other.prompts, show_edit(gpt2, alone, **known).prompts, strict=True):
        assert mine.prompt == expected.prompt and mine.p_after == expected.p_after
    with pytest.raises(ValueError, match="this edit has the facts 0 to 3, got 4"):
        show_edit(gpt2, edit, fact=4, **known)
    with pytest.raises(ValueError, match="one residual before each layer"):
        dataclasses.replace(edit.health.facts[0], residuals=())


def test_a_bfloat16_model_says_what_rounding_loses(gpt2):
    model = gpt2.to(torch.bfloat16)
    edit = many_edit(model)
    assert all(left.dtype == torch.float32 for left, _ in edit.factors.values())
    assert edit.health.rounding_error > 1e-3
    before = weights(model)
    with applied(model, edit):
        assert not same(weights(model), before)
    assert same(weights(model), before)


def test_a_pass_reads_the_subject_of_every_row(gpt2):
    """Rows of different lengths, in batches, are those one by one."""
    encoder = Encoder.of(gpt2)
    rows = [encoder.templated_row(one.prompt, one.subject, text) for one in FACTS for text in TEXTS]
    together = read_at_subject(gpt2, rows, [Point("key", 0), Point("resid_post", 2)])
    for i, row in enumerate(rows):
        points = [Point("key", 0), Point("resid_post", 2)]
        found = passes.read(gpt2, torch.tensor([row.ids]), points)
        for mine, point in zip(together, points, strict=True):
            assert relative(mine[i], found[point][0, row.subject[-1]]) < 1e-5


def test_random_moments_differ_by_layer():
    """The setting gives each layer its own C, so a mixed-up layer would be seen."""
    assert relative(random_moment(40, seed=1).C, random_moment(40, seed=0).C) > 0.1
