"""Trained editors as files and values: saved, read, refused, copied, and put to use."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
from conftest import CLASSES, make_model
from helpers.editor_setting import (
    OTHERS,
    REQUEST,
    found,
    random_editor,
    same_tensors,
    sample_of,
    shapes_of,
)
from helpers.rome_setting import factored_edit
from helpers.tiny_tokenizer import TEXT

from transformer_lens_rome import EditRequest, applied, evaluate_counterfact, get_method
from transformer_lens_rome.edits.kinds import FactoredEdit, load_edit
from transformer_lens_rome.evaluation.records import CounterFactRecord
from transformer_lens_rome.methods import Training
from transformer_lens_rome.methods.base import described
from transformer_lens_rome.methods.hypernetworks.hypernetwork import gradient_factors
from transformer_lens_rome.model.adapter import Weight, parameter, weight_hash
from transformer_lens_rome.sequential import edit_in_sequence

KINDS = ("ke", "mend")
MATRICES = [Weight("W_out", 1), Weight("W_in", 2)]
SMALL = {"validate_every": 2, "accumulate": 1, "n_validation": 1, "locality_tokens": 8}


@pytest.fixture
def gpt2(tokenizer):
    """One class is enough where the model does not matter."""
    return make_model(CLASSES[-1], "gpt2", tokenizer)


@pytest.fixture(params=KINDS)
def editor(request, gpt2):
    """A small editor of random tensors, of either kind."""
    return random_editor(gpt2, request.param, matrices=MATRICES)


def method_of(editor, **options):
    return get_method(editor.info["kind"], editor=editor, **options)


# ---------------------------------------------------------------- files


def test_a_saved_editor_is_the_same_editor(gpt2, editor, tmp_path):
    kind = editor.info["kind"]
    editor.save(tmp_path / "editor")
    loaded = get_method(kind).load(tmp_path / "editor")
    assert same_tensors(loaded.tensors, editor.tensors)
    assert loaded.digest == editor.digest and loaded.info.items() >= editor.info.items()
    assert repr(loaded) == repr(editor) and editor.digest in repr(editor)
    ways = (
        editor,
        loaded,
        method_of(editor),
        get_method(kind, editor=tmp_path / "editor"),
        editor.prepared(gpt2),
    )
    first, *rest = [way.compute(gpt2, REQUEST) for way in ways]
    assert all(edit.digest == first.digest and edit.config == first.config for edit in rest)
    assert editor.digest in first.config["editor"] and first.config["scale"] == 1.0
    other = random_editor(gpt2, kind, matrices=MATRICES, seed=1)
    assert other.digest != editor.digest
    assert other.compute(gpt2, REQUEST).digest != first.digest


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_file_of_a_training_is_its_best_editor(gpt2, tmp_path, kind):
    out = tmp_path / "folder" / "editor"
    settings = Training(lr=1e-3, n_labels=2, max_steps=4, layers=(1,), **SMALL)
    lines = TEXT.splitlines()
    trained = get_method(kind).fit(gpt2, lines, settings=settings, out=out, progress=False)
    read = get_method(kind).load(out)
    assert read.digest == trained.digest and read.info["step"] == trained.info["step"]
    best = min(read.info["curve"], key=lambda entry: entry["loss"])
    assert best["step"] == read.info["step"] and len(read.info["curve"]) == 3
    mine, again = (one.compute(gpt2, REQUEST) for one in (trained, read))
    assert mine.digest == again.digest
    assert [tuple(where) for where in read.info["matrices"]] == list(mine.factors)[::-1]


def test_a_missing_file_and_a_file_of_another_kind(gpt2, editor, tmp_path):
    path = tmp_path / "editor"
    kind = editor.info["kind"]
    with pytest.raises(FileNotFoundError):
        get_method(kind).load(path)
    editor.save(path)
    with pytest.raises(ValueError, match="edit"):
        load_edit(path)
    for name in {"ke", "ke-cf", "mend", "mend-cf"} - {kind}:
        with pytest.raises(ValueError, match=f"editor is an editor of {kind}; use get_method"):
            get_method(name, editor=path)
        with pytest.raises(ValueError, match=f"this is an editor of {kind}; use get_method"):
            get_method(name, editor=editor)
    variant = dataclasses.replace(editor, info=editor.info | {"counterfact": True})
    variant.save(path)
    with pytest.raises(ValueError, match=f"use get_method\\('{kind}-cf'"):
        get_method(kind).load(path)
    assert get_method(f"{kind}-cf").load(path).name == f"{kind}-cf"


@pytest.mark.parametrize("name", ("ke", "ke-cf", "mend", "mend-cf"))
def test_an_untrained_method_says_what_to_do(gpt2, name, tmp_path):
    method = get_method(name)
    assert method.name == name and not hasattr(method, "save") and not hasattr(method, "has_seen")
    records = [CounterFactRecord(1, REQUEST, (), ("Pike Place is in",))]
    for use in (
        lambda: method.compute(gpt2, REQUEST),
        lambda: method.prepared(gpt2),
        lambda: evaluate_counterfact(gpt2, records, name, out=tmp_path / "run", progress=False),
        lambda: edit_in_sequence(gpt2, [REQUEST], name, texts=OTHERS, progress=False),
    ):
        with pytest.raises(ValueError, match=f"get_method\\('{name}'\\).fit\\(model"):
            use()
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- which model


def test_another_model_is_refused_by_its_weights(gpt2, editor, tokenizer):
    other = make_model(CLASSES[-1], "gpt2", tokenizer, seed=1)
    before, prepared = found(other), method_of(editor).prepared(gpt2)
    for method in (method_of(editor), prepared):  # also what was made ready for the right one
        with pytest.raises(ValueError, match="W_out of layer 1 is not the one.*fit"):
            method.compute(other, REQUEST)
    assert found(other) == before
    with torch.no_grad():
        parameter(gpt2, Weight("W_in", 0)).add_(1.0)
    prepared.compute(gpt2, REQUEST)  # a matrix that the editor does not edit may be another
    with torch.no_grad():
        parameter(gpt2, Weight("W_in", 2)).add_(1.0)
    with pytest.raises(ValueError, match="W_in of layer 2"):
        prepared.compute(gpt2, REQUEST)
    deep = editor.info | {"matrices": [["W_out", 9], ["W_in", 2]]}
    for use in ("prepared", "compute"):
        with pytest.raises(ValueError, match="this model has no W_out of layer 9.*fit"):
            arguments = (gpt2, REQUEST)[: 1 if use == "prepared" else 2]
            getattr(dataclasses.replace(editor, info=deep), use)(*arguments)


def test_an_editor_of_a_gated_model_is_refused_by_one_without_gates(gpt2, tokenizer):
    llama = make_model(CLASSES[-1], "llama", tokenizer)
    assert llama.cfg.d_model == gpt2.cfg.d_model
    editor = random_editor(llama, "mend", matrices=[Weight("W_gate", 1)])
    editor.compute(llama, REQUEST)  # the control
    for use in (lambda: editor.prepared(gpt2), lambda: editor.compute(gpt2, REQUEST)):
        with pytest.raises(ValueError, match="this model has no W_gate of layer 1.*fit"):
            use()


@pytest.mark.parametrize("shape", ("llama", "gemma3"))
@pytest.mark.parametrize("kind", KINDS)
def test_the_edit_is_as_every_other(model_class, shape, kind, tokenizer, bos_tokenizer, tmp_path):
    model = make_model(model_class, shape, bos_tokenizer if shape == "gemma3" else tokenizer)
    method, before = method_of(random_editor(model, kind)), found(model)
    edit = method.compute(model, REQUEST)
    assert found(model) == before
    assert isinstance(edit, FactoredEdit) and set(edit.factors) == set(shapes_of(model))
    assert edit.made_on() == {w: weight_hash(parameter(model, w)) for w in edit.factors}
    edit.save(tmp_path / "edit")
    assert load_edit(tmp_path / "edit").digest == edit.digest
    sizes = [
        sum(t.float().square().sum().item() for t in some)
        for some in (edit.changes().values(), (parameter(model, w).detach() for w in edit.factors))
    ]
    assert edit.health.relative_norm == pytest.approx((sizes[0] / sizes[1]) ** 0.5, rel=1e-3)
    matrices = list(edit.factors)
    assert edit.health.losses[0] == pytest.approx(
        gradient_factors(model, sample_of(model), matrices)[0]
    )
    with applied(model, edit):
        loss, _ = gradient_factors(model, sample_of(model), matrices)
        n = sample_of(model).n_labels
        assert edit.health.p_after == pytest.approx(torch.tensor(-loss * n).exp().item(), rel=1e-2)
    assert found(model) == before
    half = method_of(method, scale=0.5).compute(model, REQUEST)
    for where, change in edit.changes().items():
        assert torch.allclose(half.changes()[where], 0.5 * change, atol=1e-7)


def test_an_edited_model_is_edited_from_where_it_is(gpt2, editor):
    method = method_of(editor).prepared(gpt2)
    bare = method.compute(gpt2, REQUEST)
    with applied(gpt2, factored_edit(gpt2, MATRICES)):
        later = method.compute(gpt2, REQUEST)
        assert later.made_on() != bare.made_on() and later.digest != bare.digest
        method_of(editor).prepared(gpt2)  # edits that are on it do not make it another model
        with pytest.raises(ValueError, match="revert_all"):
            method.recipe.fit(gpt2, TEXT.splitlines(), progress=False)
        with applied(gpt2, later):
            pass
    assert method.compute(gpt2, REQUEST).digest == bare.digest


def test_a_model_with_dropout_on_is_refused(gpt2, editor):
    method = method_of(editor).prepared(gpt2)
    gpt2.train()
    tokens = torch.arange(1, 9)[None]
    with torch.random.fork_rng(devices=[]):
        if torch.equal(*(gpt2(tokens).detach() for _ in range(2))):
            pytest.skip("passes of this class have no dropout, in training mode too")
    for use in (method.prepared, lambda model: method.compute(model, REQUEST)):
        with pytest.raises(ValueError, match="model.eval"):
            use(gpt2)
    with pytest.raises(ValueError, match="model.eval"):
        method.recipe.fit(gpt2, TEXT.splitlines(), progress=False)


# ---------------------------------------------------------------- as values


def test_what_it_has_seen_is_known_by_the_prompt(gpt2, editor):
    method = method_of(editor)
    again = EditRequest(REQUEST.prompt, REQUEST.subject, "another target")
    record = type("Record", (), {"request": again})()
    assert method.has_seen(REQUEST) and method.has_seen(again) and method.has_seen(record)
    assert not method.has_seen(EditRequest(REQUEST.prompt, "Colosseum", REQUEST.target_new))
    others = editor.info | {"train": [], "validation": editor.info["train"]}
    texts = dataclasses.replace(editor, info=others)
    assert texts.has_seen(REQUEST) and not texts.has_seen(OTHERS[0])


def test_copies_for_workers(gpt2, editor):
    method = method_of(editor)
    expected = method.compute(gpt2, REQUEST).digest
    for one in (method, method.prepared(gpt2)):
        for same in (pickle.loads(pickle.dumps(one)), copy.deepcopy(one)):
            assert same.compute(gpt2, REQUEST).digest == expected
            assert described(same) == described(method)
    ready, bare = (pickle.dumps(one) for one in (method.prepared(gpt2), method))
    assert len(ready) < 1.1 * len(bare)  # tensors travel once


def test_a_description_tells_editors_apart(gpt2, editor, tmp_path):
    editor.save(tmp_path / "editor")
    path = get_method(editor.info["kind"], editor=tmp_path / "editor")
    said = described(method_of(editor))
    assert editor.digest in str(said) and said == described(path.prepared(gpt2))
    assert said != described(method_of(editor, scale=2.0))


def test_options_that_change_later_have_their_effect(gpt2, editor):
    """An editor that is at hand is used with other options, and stays as it was."""
    ready = editor.prepared(gpt2)
    before = ready.compute(gpt2, REQUEST).digest
    options = {"own_statistics": True} if editor.info["kind"] == "mend" else {"scale": 2.0}
    other = method_of(ready, **options)
    assert other.digest == editor.digest and other.options.items() >= options.items()
    assert other.compute(gpt2, REQUEST).digest != before == ready.compute(gpt2, REQUEST).digest


@pytest.mark.parametrize(
    "mode", (torch.no_grad, torch.inference_mode), ids=("no_grad", "inference")
)
def test_the_callers_mode_makes_no_difference(gpt2, editor, mode):
    expected = method_of(editor).compute(gpt2, REQUEST).digest
    with mode():
        ready = method_of(editor).prepared(gpt2)
        assert ready.compute(gpt2, REQUEST).digest == expected
    assert ready.compute(gpt2, REQUEST).digest == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_on_a_gpu(gpt2, kind):
    model = gpt2.to("cuda")
    settings = Training(lr=1e-4, n_labels=2, max_steps=2, **SMALL)
    trained = get_method(kind).fit(model, TEXT.splitlines(), settings=settings, progress=False)
    with applied(model, trained.compute(model, REQUEST)):
        pass
