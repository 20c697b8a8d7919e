"""Training lowers the loss, goes on where it was stopped, and leaves the model as it was."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch
from conftest import CLASSES, make_model
from helpers import tiny_models
from helpers.editor_setting import REQUEST, found, same_tensors
from helpers.tiny_tokenizer import TEXT

from transformer_lens_rome import EditRequest, applied, get_method
from transformer_lens_rome.files.tensors import read_tensors
from transformer_lens_rome.methods import Training
from transformer_lens_rome.methods.hypernetworks import knowledge_editor, recipe, training

TEXTS = TEXT.splitlines()
SMALL = Training(
    lr=1e-4,
    alpha_lr=1e-4,
    n_labels=3,
    c_edit=1.0,
    max_steps=8,
    validate_every=4,
    accumulate=2,
    n_validation=2,
    locality_tokens=12,
    n_locality=1,
    layers=(1,),
    matrices=("W_out",),
)
LR = {"mend": 1e-4, "ke": 1e-2}


@pytest.fixture(autouse=True)
def _narrow(monkeypatch):
    """A KE that is quick to train."""
    for width in ("LSTM_WIDTH", "H_WIDTH", "HEAD_WIDTH"):
        monkeypatch.setattr(knowledge_editor, width, 32)


@pytest.fixture
def gpt2(tokenizer):
    """One class is enough where the model does not matter."""
    return make_model(CLASSES[-1], "gpt2", tokenizer)


def fit(model, name="mend", *, data=TEXTS, locality=None, out=None, options=(), **settings):
    """A short training of a tiny editor."""
    chosen = dataclasses.replace(SMALL, **{"lr": LR[name.removesuffix("-cf")]} | settings)
    known = {"settings": chosen, "locality": locality, "out": out, "progress": False}
    return get_method(name, **dict(options)).fit(model, data, **known)


def losses(editor):
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in editor.info["curve"]]


@pytest.mark.parametrize(("name", "shape"), [("mend", "gpt2"), ("mend", "gemma3"), ("ke", "gpt2")])
def test_it_learns_to_edit(model_class, name, shape, tokenizer, bos_tokenizer):
    own = bos_tokenizer if shape == "gemma3" else tokenizer
    model = make_model(model_class, shape, own)
    before = found(model)
    editor = fit(model, name, max_steps=24, validate_every=12, matrices=None)
    assert found(model) == before
    first, *_, last = editor.info["curve"]
    assert [entry["step"] for entry in editor.info["curve"]] == [0, 12, 24]
    assert last["edit"] < first["before"] - 0.2 and last["loss"] < first["loss"] - 0.2
    assert 0 < last["locality"] < 0.5 * (first["edit"] - last["edit"])
    assert last["before"] == first["before"]  # the model did not move
    assert last["loss"] == pytest.approx(last["edit"] + last["locality"])
    assert editor.info["step"] == 24


# ---------------------------------------------------------------- going on


class Stopped(Exception):
    """What ends a run half-way."""


def stop_at(monkeypatch, step):
    """Training breaks off in that step."""
    real = training._step

    def once(model, matrices, state, *rest):
        if state.step == step:
            raise Stopped
        real(model, matrices, state, *rest)

    monkeypatch.setattr(training, "_step", once)


@pytest.mark.slow
@pytest.mark.parametrize("name", ("mend", "ke"))
def test_a_stopped_run_goes_on_to_the_same_end(gpt2, tmp_path, monkeypatch, name):
    whole = fit(gpt2, name, max_steps=12, out=tmp_path / "whole")
    before = found(gpt2)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, 7)
        fit(gpt2, name, max_steps=12, out=tmp_path / "editor")
    assert found(gpt2) == before
    again = fit(gpt2, name, max_steps=12, out=tmp_path / "editor")
    assert same_tensors(again.tensors, whole.tensors) and again.digest == whole.digest
    assert losses(again) == losses(whole) and len(losses(whole)) == 4
    assert whole.info["step"] > 0  # so that it is not the start that is compared
    one, other = (
        read_tensors(tmp_path / f"{file}.training", "transformer_lens_rome.training.1")[0]
        for file in ("whole", "editor")
    )
    assert same_tensors(one, other) and {key.split(".")[0] for key in one} == {
        "network",
        "best",
        "adam",
    }


@pytest.mark.slow
def test_a_longer_run_is_a_shorter_one_gone_on(gpt2, tmp_path):
    out = tmp_path / "editor"
    fit(gpt2, max_steps=4, out=out)
    assert fit(gpt2, max_steps=12, out=out).digest == fit(gpt2, max_steps=12).digest
    done = fit(gpt2, max_steps=4, out=out)  # nothing is left to do
    assert [entry["step"] for entry in done.info["curve"]] == [0, 4, 8, 12]
    out.unlink()
    assert fit(gpt2, max_steps=12, out=out).digest == get_method("mend").load(out).digest


@pytest.mark.slow
def test_it_stops_when_nothing_gets_better(gpt2, tmp_path):
    still = {"alpha_lr": 10.0, "c_edit": 1e-6}  # nothing counts but locality, best at the start
    out = tmp_path / "editor"
    editor = fit(gpt2, max_steps=40, patience=8, out=out, **still)
    assert [entry["step"] for entry in editor.info["curve"]] == [0, 4, 8]
    assert editor.info["step"] == 0
    assert (
        fit(gpt2, max_steps=40, patience=8, out=out, **still).info["curve"]
        == (editor.info["curve"])
    )
    longer = fit(gpt2, max_steps=40, patience=16, out=out, **still)
    assert [entry["step"] for entry in longer.info["curve"]] == [0, 4, 8, 12, 16]
    assert longer.digest == editor.digest
    whole = fit(gpt2, max_steps=40, patience=16, **still)
    assert losses(whole) == losses(longer)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"lr": 2e-4}, "settings"),
        ({"data": TEXTS[:-1]}, "locality.*train.*validation"),
        ({"locality": ["Berlin is a city.", "He said so."]}, "locality"),
        ({"name": "mend-cf"}, "counterfact"),
        ({"matrices": ("W_in",)}, "hashes.*matrices"),
    ],
    ids=str,
)
def test_another_runs_file_is_refused(gpt2, tmp_path, changed, said):
    out = tmp_path / "editor"
    fit(gpt2, out=out, max_steps=4)
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=f"another training run.*{said}"):
        fit(gpt2, **{"out": out, "max_steps": 4} | changed)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == kept


def test_an_editor_is_never_overwritten_by_a_new_run(gpt2, tmp_path):
    out = tmp_path / "editor"
    fit(gpt2, out=out, max_steps=4)
    content = out.read_bytes()
    (tmp_path / "editor.training").unlink()
    with pytest.raises(ValueError, match="there is a file .* another name"):
        fit(gpt2, out=out, max_steps=8)
    assert out.read_bytes() == content


# ---------------------------------------------------------------- one seed, one editor


@pytest.mark.slow
def test_the_seed_is_all_that_is_random(gpt2):
    one, same = fit(gpt2, max_steps=4), fit(gpt2, max_steps=4)
    assert one.digest == same.digest and one.info["step"] == 4
    assert fit(gpt2, max_steps=4, seed=1).digest != one.digest
    with torch.no_grad():
        assert fit(gpt2, max_steps=4).digest == one.digest
    released = {"swap_alphas": True, "own_statistics": True}  # these hold for editing only
    with torch.inference_mode():
        assert fit(gpt2, max_steps=4, options=released.items()).digest == one.digest


def test_an_exception_leaves_the_model_as_found(model_class, tokenizer, monkeypatch):
    model = make_model(model_class, "llama", tokenizer)
    next(model.parameters()).requires_grad_(False)
    before = found(model)
    real = training.outcome

    def broken(*arguments):
        real(*arguments)
        raise Stopped

    monkeypatch.setattr(training, "outcome", broken)
    with torch.no_grad(), pytest.raises(Stopped):
        fit(model)
    assert found(model) == before and not torch.is_inference_mode_enabled()


@pytest.mark.slow
def test_half_precision_models_have_editors_in_single_precision(tokenizer):
    if not tiny_models.has_bridge():
        pytest.skip("no bridge")
    model = make_model("bridge", "gpt2", tokenizer, dtype=torch.bfloat16)
    for name in ("mend", "ke"):
        editor = fit(model, name, max_steps=4)
        kinds = {tensor.dtype for tensor in editor.tensors.values()} - {torch.int64}
        assert kinds == {torch.float32}
        edit = get_method(name, editor=editor).compute(model, REQUEST)
        assert {change.dtype for change in edit.changes().values()} == {torch.float32}
        with applied(model, edit):
            pass


def test_no_data_at_all_is_what_the_model_writes(gpt2, monkeypatch):
    asked = []
    monkeypatch.setattr(
        recipe, "sampled_texts", lambda _, n, **known: asked.append((n, known)) or TEXTS
    )
    fit(gpt2, data=None, max_steps=4, seed=3)
    fit(gpt2, "mend-cf", data=[REQUEST, EditRequest("{} is", "Rome", "a city")], max_steps=4)
    assert [(n, known["length"], known["seed"]) for n, known in asked] == [
        (1000, 32, 3),
        (200, 64, 0),
    ]


# ---------------------------------------------------------------- steps


def gradients(model, monkeypatch, **settings):
    """The gradients that each update gets, after clipping, and their norms before."""
    seen, real = [], torch.nn.utils.clip_grad_norm_

    def spy(parameters, clip, **known):
        norm = real(parameters, clip, **known)
        seen.append(
            (
                norm.item(),
                [torch.zeros(()) if p.grad is None else p.grad.clone() for p in parameters],
            )
        )
        return norm

    with monkeypatch.context() as patch:
        patch.setattr(training.nn.utils, "clip_grad_norm_", spy)
        fit(model, "ke", lr=1e-12, max_steps=2, validate_every=2, **settings)
    return seen


def test_updates_have_the_mean_of_their_steps_gradients(gpt2, monkeypatch):
    (_, first), (_, second) = gradients(gpt2, monkeypatch, accumulate=1)
    ((norm, both),) = gradients(gpt2, monkeypatch, accumulate=2)
    for mean, one, other in zip(both, first, second, strict=True):
        assert torch.allclose(mean, (one + other) / 2, rtol=1e-4, atol=1e-7)
    assert not torch.allclose(first[0], second[0], rtol=1e-2)
    ((same, clipped),) = gradients(gpt2, monkeypatch, accumulate=2, clip=norm / 8)
    assert same == pytest.approx(norm, rel=1e-5)
    assert torch.cat([g.flatten() for g in clipped]).norm().item() == pytest.approx(
        norm / 8, rel=1e-3
    )


def test_a_step_that_gives_no_numbers_is_left_out(gpt2, monkeypatch, caplog):
    (_, first), (_, second) = gradients(gpt2, monkeypatch, accumulate=1)
    real, calls = training.outcome, []

    def broken(*arguments):
        result = real(*arguments)
        calls.append(torch.is_grad_enabled())
        return result._replace(edit=result.edit * torch.nan) if calls.count(True) == 1 else result

    monkeypatch.setattr(training, "outcome", broken)
    with caplog.at_level(logging.WARNING):
        ((_, rest),) = gradients(gpt2, monkeypatch, accumulate=2)
    assert "step 0" in caplog.text and "left out" in caplog.text
    assert all(torch.allclose(r, g / 2, rtol=1e-4, atol=1e-7) for r, g in zip(rest, second))


def test_alphas_learning_rate(gpt2):
    def alpha(**settings):
        return fit(gpt2, max_steps=4, c_loc=0.0, **settings).tensors

    released = dataclasses.replace(SMALL, lr=1e-4).released()
    assert released.alpha_lr is None and dataclasses.replace(released, alpha_lr=1e-4) == SMALL
    assert same_tensors(alpha(alpha_lr=None), alpha(alpha_lr=1e-4))
    frozen, moved = (alpha(alpha_lr=rate)["alpha"].item() for rate in (0.0, 1e-5))
    assert frozen == pytest.approx(1e-4, rel=1e-6) and abs(moved - 1e-4) > 1e-6
    assert get_method("mend").settings().alpha_lr == 1e-4  # what was meant, not what was run


def test_steps_after_the_last_validation_are_not_made(gpt2):
    assert [entry["step"] for entry in fit(gpt2, max_steps=7).info["curve"]] == [0, 4]
