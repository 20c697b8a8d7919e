"""Edits of many facts from bad input: what is refused, what is said, and what goes on."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from conftest import make_model
from helpers.mass_setting import FACTS, TEXTS, many_edit, method, options
from helpers.matrices import same, weights
from helpers.rome_setting import random_edit, random_moment
from safetensors.torch import load_file, save_file

from transformer_lens_rome import EditRequest, RomeConfig, compute_rome_edit
from transformer_lens_rome.methods import (
    History,
    extended_history,
    get_method,
    mass_method,
    mass_targets,
)
from transformer_lens_rome.methods.mass_history import _narrowed
from transformer_lens_rome.model.adapter import Weight, w_out

TOO_LONG = EditRequest("word " * 200 + "{} is in", "Rome", "Oslo")
"""Longer than the context of a tiny model."""


# ---------------------------------------------------------------- requests


def test_requests_that_contradict_each_other_are_named(gpt2):
    other = dataclasses.replace(FACTS[1], target_new="Oslo")
    with pytest.raises(ValueError, match="requests 1 and 4 contradict.*'Rome' and with 'Oslo'"):
        many_edit(gpt2, [*FACTS, other])
    same_text = EditRequest("The mother of the old {} was", "king", "Oslo")
    with pytest.raises(ValueError, match="requests 1 and 4 contradict"):
        many_edit(gpt2, [*FACTS, same_text])


def test_a_request_that_is_there_twice_is_named(gpt2):
    with pytest.raises(ValueError, match="requests 2 and 4 are the same.*A river in the north"):
        many_edit(gpt2, [*FACTS, FACTS[2]])


@pytest.mark.parametrize("requests", [[], [{"prompt": "x"}], ["text"]], ids=str)
def test_what_is_no_list_of_requests_is_refused(gpt2, requests):
    with pytest.raises(ValueError, match="the list of requests is empty|request"):
        many_edit(gpt2, requests)


def test_more_facts_than_a_layer_can_hold_are_refused_before_any_work(gpt2, monkeypatch, caplog):
    m, d = w_out(gpt2, 0).shape
    searched = []
    monkeypatch.setattr(mass_method, "search_targets", lambda *a, **o: searched.append(a))
    facts = [EditRequest("{} is in", f"Town {i}", "Rome") for i in range(m + 1)]
    with pytest.raises(ValueError, match=f"at most d_mlp = {m} facts.*got {m + 1}.*a history"):
        many_edit(gpt2, facts, layers=(0,), prefixes=[""])
    assert not searched
    limit = m * d // (m + d)
    for n, said in ((limit, False), (limit + 1, True)):
        with pytest.raises(TypeError):  # what stands for the search gives no targets
            many_edit(gpt2, facts[:n], layers=(0,), prefixes=[""])
        assert (f"of which the limit is {limit}" in caplog.text) == said


def test_requests_that_fail_are_named_and_nothing_is_written(gpt2):
    before = weights(gpt2)
    facts = [FACTS[0], TOO_LONG, FACTS[1]]
    with pytest.raises(ValueError, match="1 of 3 requests failed, and nothing .*request 1 .*skip"):
        many_edit(gpt2, facts)
    assert same(weights(gpt2), before)


def test_the_others_are_written_where_the_caller_chose_so(gpt2, caplog):
    edit = many_edit(gpt2, [FACTS[0], TOO_LONG, FACTS[1]], skip_failed=True)
    assert edit.requests == (FACTS[0], FACTS[1])
    (reason,) = edit.provenance["failed"]
    assert "request 1" in reason and "context" in reason
    assert "left out: request 1" in caplog.text
    alone = many_edit(gpt2, [FACTS[0], FACTS[1]])
    for where in edit.factors:
        assert torch.allclose(edit.change(where), alone.change(where), atol=1e-5)
    with pytest.raises(ValueError, match="1 of 1 requests failed"):
        many_edit(gpt2, [TOO_LONG], skip_failed=True)


def test_an_error_between_two_layers_leaves_the_model_as_it_was(gpt2, monkeypatch):
    before, solve, calls = weights(gpt2), mass_method.solve_many, []

    def fails_at_the_second(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            assert not same(weights(gpt2), before)  # the first layer is written
            raise ZeroDivisionError
        return solve(*args, **options)

    monkeypatch.setattr(mass_method, "solve_many", fails_at_the_second)
    with pytest.raises(ZeroDivisionError):
        many_edit(gpt2)
    assert same(weights(gpt2), before)


@pytest.mark.usefixtures("any_lengths")
def test_a_batch_that_does_not_fit_into_memory_is_halved_and_said(gpt2, monkeypatch, caplog):
    search, sizes = mass_targets._searched, []

    def small(model, groups, *args):
        sizes.append(len(groups))
        if len(groups) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return search(model, groups, *args)

    monkeypatch.setattr(mass_targets, "_searched", small)
    edit = many_edit(gpt2, batch_size=4)
    assert sizes == [4, 2, 1, 1, 2, 1, 1] and "a batch of 4 does not fit" in caplog.text
    monkeypatch.setattr(mass_targets, "_searched", search)
    alone = many_edit(gpt2, batch_size=1)
    assert edit.digest == alone.digest


# ---------------------------------------------------------------- options


@pytest.mark.slow
def test_options_that_do_not_fit_are_refused(gpt2):
    m = len(w_out(gpt2, 0))
    for layers in ([], [1, 0], [0, 0]):
        with pytest.raises(ValueError, match="layers must be different, in ascending order"):
            dataclasses.replace(method(gpt2), layers=layers).prepared(gpt2)
    with pytest.raises(ValueError, match="layer 7 is out of range"):
        dataclasses.replace(method(gpt2), layers=[7]).prepared(gpt2)
    moments = {0: random_moment(m)}
    with pytest.raises(ValueError, match=r"second_moments has none for the layers \[1\]"):
        many_edit(gpt2, second_moments=moments)
    with pytest.raises(ValueError, match="second_moments is a SecondMoment; pass a dict"):
        many_edit(gpt2, second_moments=random_moment(m))
    with pytest.raises(ValueError, match="d_mlp 8, the edit needs"):
        many_edit(gpt2, second_moments={0: random_moment(8), 1: random_moment(8)})
    with pytest.raises(ValueError, match="the bare prompt .* must be the first prefix"):
        many_edit(gpt2, prefixes=TEXTS[::-1])
    with pytest.raises(ValueError, match="prefixes is a list of texts"):
        many_edit(gpt2, prefixes="Hello.")
    with pytest.raises(ValueError, match="solve must be memit, emmet or alphaedit"):
        method(gpt2, solve="rome").prepared(gpt2)
    with pytest.raises(ValueError, match="projectors are for alphaedit"):
        method(gpt2, projectors={0: torch.eye(m)}).prepared(gpt2)
    with pytest.raises(ValueError, match="projectors are for alphaedit, one for each of"):
        get_method("alphaedit", **options(gpt2), projectors={0: torch.eye(m)}).prepared(gpt2)
    with pytest.raises(ValueError, match="a projector is .*trace"):
        projectors = dict.fromkeys((0, 1), torch.eye(m))
        get_method("alphaedit", **options(gpt2), projectors=projectors).prepared(gpt2)
    with pytest.raises(ValueError, match="batch_size must be 1 or more"):
        many_edit(gpt2, batch_size=0)


# ---------------------------------------------------------------- history


@pytest.fixture
def history(gpt2):
    return extended_history(gpt2, many_edit(gpt2))


def test_a_history_is_saved_and_loaded(gpt2, history, tmp_path):
    history.save(tmp_path / "history")
    loaded = History.load(tmp_path / "history")
    assert (loaded.n_facts, loaded.model, loaded.prepend_bos) == (4, history.model, False)
    assert list(loaded.keys) == [0, 1]
    for layer, keys in history.keys.items():
        assert keys.shape == (len(w_out(gpt2, 0)), 4) and torch.equal(keys, loaded.keys[layer])
    more = FACTS[:1]  # the same fact again is a new key, of the edited model
    edits = [many_edit(gpt2, more, history=one) for one in (history, loaded)]
    assert edits[0].digest == edits[1].digest != many_edit(gpt2, more).digest


def test_a_history_of_another_model_or_other_layers_is_refused(
    gpt2, history, model_class, tokenizer, bos_tokenizer
):
    with pytest.raises(ValueError, match=r"of the layers \[0, 1\], the edit changes \[1\]"):
        many_edit(gpt2, layers=(1,), history=history)
    other = make_model(model_class, "gpt2", tokenizer, seed=1)
    with pytest.raises(ValueError, match="this model has other keys at layer 0"):
        many_edit(other, history=history)
    with pytest.raises(ValueError, match="of texts with prepend_bos=False"):
        many_edit(gpt2, history=history, prepend_bos=True)
    llama = make_model(model_class, "llama", tokenizer)
    with pytest.raises(ValueError, match="other keys"):
        many_edit(llama, history=history)
    with pytest.raises(ValueError, match="a history needs an edit by memit, emmet or alphaedit"):
        extended_history(gpt2, random_edit(gpt2))
    moment = random_moment(len(w_out(gpt2, 0)))
    rome = compute_rome_edit(
        gpt2, FACTS[0], layer=0, second_moment=moment, prefixes=[""], config=RomeConfig(steps=2)
    )
    with pytest.raises(ValueError, match="a history needs an edit"):
        extended_history(gpt2, rome)


def test_more_keys_than_dimensions_become_as_many_with_the_same_sum():
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(8, 30, generator=generator)
    narrow = _narrowed(keys)
    assert narrow.shape == (8, 8)
    torch.testing.assert_close(narrow @ narrow.T, keys @ keys.T, rtol=1e-4, atol=1e-4)
    assert _narrowed(keys[:, :8]) is not None and torch.equal(_narrowed(keys[:, :5]), keys[:, :5])
    history = History({0: keys[:, :6]}, 6, torch.ones(3), "tiny", False)
    longer = history.extended({0: keys[:, 6:]}, 24)
    assert longer.n_facts == 30 and longer.keys[0].shape == (8, 8)
    torch.testing.assert_close(
        longer.keys[0] @ longer.keys[0].T, keys @ keys.T, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    "broken",
    [
        {"layers": [0, 2]},
        {"layers": []},
        {"layers": [[0]]},
        {"layers": 3},
        {"n_facts": 0},
        {"n_facts": "4"},
        {"prepend_bos": None},
        {"more": 1},
        {"format": "transformer_lens_rome.edit.1"},
    ],
    ids=str,
)
def test_a_damaged_history_is_refused(history, tmp_path, broken):
    history.save(tmp_path / "history")
    tensors, path = load_file(tmp_path / "history"), tmp_path / "broken"
    info = {"n_facts": 4, "model": "m", "prepend_bos": False, "layers": [0, 1]}
    info |= {"format": "transformer_lens_rome.history.1"} | broken
    save_file(tensors, path, metadata={"transformer_lens_rome": json.dumps(info)})
    with pytest.raises(ValueError, match="broken"):
        History.load(path)


@pytest.mark.parametrize("change", ["nan", "missing", "more", "size", "integers", "vector"])
def test_a_history_with_wrong_tensors_is_refused(history, tmp_path, change):
    history.save(tmp_path / "history")
    tensors, path = load_file(tmp_path / "history"), tmp_path / "broken"
    info = {"n_facts": 4, "model": "m", "prepend_bos": False, "layers": [0, 1]}
    info["format"] = "transformer_lens_rome.history.1"
    if change == "nan":
        tensors["keys.0"][0, 0] = torch.nan
    elif change == "missing":
        del tensors["keys.1"]
    elif change == "more":
        tensors["keys.2"] = tensors["keys.1"].clone()
    elif change == "size":
        tensors["keys.1"] = tensors["keys.1"][:, :2].contiguous()
    elif change == "integers":
        tensors = {name: (10 * tensor).long() for name, tensor in tensors.items()}
    else:
        tensors["keys.0"] = tensors["keys.1"] = torch.ones(4)
        tensors["keys.0"] = tensors["keys.0"].clone()
    save_file(tensors, path, metadata={"transformer_lens_rome": json.dumps(info)})
    with pytest.raises(ValueError, match="no complete history"):
        History.load(path)


def test_an_edit_file_whose_requests_do_not_fit_is_refused(gpt2, tmp_path):
    from transformer_lens_rome import load_edit

    edit = many_edit(gpt2)
    with pytest.raises(ValueError, match="the first of an edit's requests is not its request"):
        dataclasses.replace(edit, requests=tuple(FACTS[1:]))
    edit.save(tmp_path / "edit")
    tensors = load_file(tmp_path / "edit")
    from safetensors import safe_open

    with safe_open(tmp_path / "edit", "pt") as file:
        info = json.loads(file.metadata()["transformer_lens_rome"])
    for wrong in ([], 3, [{"prompt": "{}"}], [info["requests"][1]]):
        changed = json.dumps(info | {"requests": wrong})
        save_file(tensors, tmp_path / "wrong", metadata={"transformer_lens_rome": changed})
        if wrong == []:
            assert load_edit(tmp_path / "wrong").requests == (FACTS[0],)
            continue
        with pytest.raises(ValueError, match="is an incomplete edit file"):
            load_edit(tmp_path / "wrong")
    assert load_edit(tmp_path / "edit").factors[Weight("W_out", 0)][0].shape[1] == 4
