"""What every editing method owes its user, held for all of them on both model classes."""

from __future__ import annotations

import dataclasses
import re
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from conftest import CLASSES, make_model
from helpers.rome_setting import CONFIG, LAYER, PREFIXES, REQUEST, random_moment

from transformer_lens_rome import applied, evaluate_counterfact, get_method
from transformer_lens_rome.edits.kinds import EditRequest, load_edit
from transformer_lens_rome.evaluation.records import CounterFactRecord
from transformer_lens_rome.methods import MemitConfig, base
from transformer_lens_rome.methods.base import described
from transformer_lens_rome.model import adapter, users_hooks
from transformer_lens_rome.model.default_layer import norm_follows_mlp

SHAPES = ("gpt2", "gemma3")
TEXTS = [f"the people of {place} like to walk by the river and by the sea" for place in "ABCDEF"]
FACTS = [
    EditRequest("{} was born in", name, "Rome", "Oslo") for name in ("Ida", "Kai", "Lea", "Jo")
]
SHORT = {"accumulate": 2, "max_steps": 4, "validate_every": 2, "n_validation": 2, "n_locality": 1}


def rome(model, config):
    moment = random_moment(len(adapter.w_out(model, LAYER)))
    return get_method(
        "rome", layer=LAYER, second_moment=moment, prefixes=PREFIXES, config=config, progress=False
    )


def trained(name, model):
    method = get_method(name)
    labels = None if name.endswith("-cf") else 3
    settings = dataclasses.replace(method.settings(), n_labels=labels, **SHORT)
    data = FACTS if labels is None else TEXTS
    return method.fit(model, data, locality=TEXTS, settings=settings, progress=False)


def mass(name):
    """A method of many facts: two layers, or one where a norm follows the MLP."""

    def make(model):
        layers = [LAYER] if norm_follows_mlp(model, LAYER) else [0, LAYER]
        moment = random_moment(len(adapter.w_out(model, LAYER)))
        options = {"layers": layers, "second_moments": dict.fromkeys(layers, moment)}
        config = MemitConfig(steps=4, lr=0.2)
        return get_method(name, prefixes=PREFIXES, config=config, **options)

    return make


MAKE = {
    "rome": lambda model: rome(model, CONFIG),
    "rome, released": lambda model: rome(model, dataclasses.replace(CONFIG, key="released")),
    "ft": lambda model: get_method("ft", layer=LAYER, steps=4),
    "ft+l": lambda model: get_method("ft+l", layer=LAYER, steps=4),
    "kn": lambda model: get_method("kn", steps=4),
} | {name: lambda model, name=name: trained(name, model) for name in ("ke", "mend")}
MAKE |= {name: mass(name) for name in ("memit", "emmet", "alphaedit")}
MAKE |= {
    f"{name}-cf": lambda model, name=name: trained(f"{name}-cf", model) for name in ("ke", "mend")
}


@pytest.fixture(scope="module", params=[(c, s) for c in CLASSES for s in SHAPES], ids="-".join)
def model(request, tokenizer):
    return make_model(*request.param, tokenizer)


@pytest.fixture(scope="module")
def methods(model):
    """Each method, made and trained once for a model."""
    return lru_cache(lambda name: MAKE[name](model))


@pytest.fixture(params=MAKE)
def method(request, methods):
    return methods(request.param)


def test_every_method_of_the_package_is_registered_and_tried():
    files = Path(base.__file__).parent.rglob("*.py")
    names = [re.findall(r'^register_method\("(.+?)"', file.read_text(), re.M) for file in files]
    assert {name for some in names for name in some} == set(base._REGISTRY)
    changing = set(base._REGISTRY) - {"in-context"}  # which changes no weight
    assert {name.split(",")[0] for name in MAKE} == changing


def test_options_are_those_of_the_fields():
    assert {"ft", "ft+l", "rome"} <= set(base.methods_with("layer"))
    assert not {"kn", "ke", "mend", "memit"} & set(base.methods_with("layer"))
    assert base.methods_with("layers") == ["alphaedit", "emmet", "memit"]
    assert base.methods_with("editor") == ["ke", "ke-cf", "mend", "mend-cf"]
    assert base.methods_with("own_statistics") == ["mend", "mend-cf"]
    assert base.methods_with("second_moment") == ["rome"] and not base.methods_with("nothing")


def state(model):
    """All that a computation must leave alone."""
    parameters = {name: (p.requires_grad, p.clone()) for name, p in model.named_parameters()}
    return parameters, model.training, users_hooks.has_hooks(model)


def alike(one, two):
    return one[1:] == two[1:] and all(
        one[0][name][0] == two[0][name][0] and torch.equal(one[0][name][1], two[0][name][1])
        for name in one[0]
    )


def test_computing_leaves_the_model_alone_and_the_edit_can_be_undone(model, method, tmp_path):
    before = state(model)
    edit = method.compute(model, REQUEST, seed=3)
    assert alike(state(model), before)
    assert any(change.any() for change in edit.changes().values())
    base = {where: adapter.parameter(model, where).clone() for where in edit.changes()}
    with applied(model, edit):
        for where, change in edit.changes().items():
            assert torch.equal(adapter.parameter(model, where), base[where] + change)
        assert not alike(state(model), before)
    assert alike(state(model), before)
    edit.save(tmp_path / "edit")
    loaded = load_edit(tmp_path / "edit")
    assert loaded.digest == edit.digest and loaded.config == edit.config
    with applied(model, loaded), pytest.raises(ZeroDivisionError):
        with applied(model, edit.scale(0.5)):
            raise ZeroDivisionError
    assert alike(state(model), before)


def test_the_same_seed_gives_the_same_edit(model, method):
    one, two = (method.compute(model, REQUEST, seed=3) for _ in range(2))
    assert one.digest == two.digest
    other = method.compute(model, dataclasses.replace(REQUEST, target_new="Rome"), seed=3)
    assert other.digest != one.digest


def test_an_exception_half_way_leaves_the_model_alone(model, method, monkeypatch):
    before = state(model)
    ready = method.prepared(model, seed=3) if hasattr(method, "prepared") else method
    calls = []

    def fail(*_args, **_options):
        calls.append(1)
        raise ZeroDivisionError

    monkeypatch.setattr(torch.autograd, "grad", fail)
    with pytest.raises(ZeroDivisionError):
        ready.compute(model, REQUEST, seed=3)
    assert calls and alike(state(model), before)


def test_it_is_evaluated_and_described(model, method, tmp_path):
    record = CounterFactRecord(7, REQUEST, ("The Space Needle stands in",), ("Pike Place is in",))
    results = evaluate_counterfact(model, [record], method, out=tmp_path / "run", progress=False)
    assert not results.failed and results.name == method.name == described(method)["name"]
    again = evaluate_counterfact(model, [record], method, out=tmp_path / "run", progress=False)
    assert again.after == results.after
    if hasattr(method, "has_seen") and method.recipe.counterfact:
        seen = CounterFactRecord(8, FACTS[0], (), ("Pike Place is in",))
        with pytest.raises(ValueError, match="trained on 1 of these records"):
            evaluate_counterfact(model, [record, seen], method, progress=False)


@pytest.mark.parametrize("name", MAKE)
def test_both_classes_give_the_same_edit(name, tokenizer):
    if len(CLASSES) < 2:
        pytest.skip("one class only in this TransformerLens")
    made = [make_model(each, "gemma3", tokenizer) for each in CLASSES]
    edits = [MAKE[name](model).compute(model, REQUEST, seed=3) for model in made]
    one, two = (edit.changes() for edit in edits)
    assert list(one) == list(two)
    for where in one:
        assert (one[where] - two[where]).norm() <= 2e-3 * two[where].norm()
