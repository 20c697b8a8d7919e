"""What users call stays as it is until someone means to change it: names, parameters, options.

`tests/public_api.txt` is the snapshot; `python tests/test_public_api.py` writes it anew. It holds
names, kinds and defaults of parameters, not annotations, whose text differs between Pythons.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

import transformer_lens_rome
from transformer_lens_rome.cli.commands import _parser
from transformer_lens_rome.methods import base as methods

SNAPSHOT = Path(__file__).with_name("public_api.txt")
COMMAND = "python tests/test_public_api.py"
PACKAGE = "transformer_lens_rome"
MODULES = (
    "",
    "prompts.encoder",
    "prompts.continuations",
    "prompts.sampling",
    "prompts.scores",
    "statistics.sources",
    "edits.kinds",
    "edits.ledger",
    "tracing.corruption",
    "tracing.fact_traces",
    "tracing.known_facts",
    "tracing.patching",
    "methods",
    "evaluation",
    "rate",
    "sequential",
    "viz",
    "demo",
)


def snapshot() -> str:
    """Everything that users call, as text."""
    lines = []
    for module in MODULES:
        lines += [f"# {PACKAGE}.{module}".rstrip("."), *of_module(module), ""]
    lines += ["# get_method(name, **options)"]
    for name, factory in sorted(methods._REGISTRY.items()):
        lines.append(f"{name}{parameters(factory)}")
    return "\n".join([*lines, "", "# command line", *of_parser(_parser(), PACKAGE)]) + "\n"


def of_module(name: str) -> Iterator[str]:
    """A module's `__all__`; without one, the public names that it defines itself."""
    module = importlib.import_module(f"{PACKAGE}.{name}".rstrip("."))
    own = [
        n
        for n, thing in vars(module).items()
        if not n.startswith("_")
        and not isinstance(thing, TypeVar)
        and getattr(thing, "__module__", None) == module.__name__
    ]
    for public in sorted(getattr(module, "__all__", own)):
        yield from of_thing(public, getattr(module, public))


def of_thing(name: str, thing: Any) -> Iterator[str]:
    """A function's line; a class's, and below it those of what it holds."""
    if not inspect.isclass(thing):
        yield f"{name}{parameters(thing)}" if inspect.isroutine(thing) else name
        return
    made = "" if getattr(thing, "_is_protocol", False) else parameters(thing)
    yield f"class {name}{made}"
    held: dict[str, Any] = {}
    for base in reversed(thing.__mro__):
        if base.__module__.startswith(PACKAGE):
            held |= vars(base)
    fields = getattr(thing, "_fields", ())  # of a named tuple
    if dataclasses.is_dataclass(thing):
        fields = [field.name for field in dataclasses.fields(thing)]
    for inside, value in sorted(held.items()):
        if not inside.startswith("_") and inside not in fields:
            yield f"    {member(inside, value)}"


def member(name: str, value: Any) -> str:
    """One line about what stands in a class."""
    if isinstance(value, (classmethod, staticmethod)):
        return f"{type(value).__name__} {name}{parameters(value.__func__)}"
    if isinstance(value, (property, functools.cached_property)):
        return f"property {name}"
    return f"{name}{parameters(value)}" if inspect.isroutine(value) else name


def parameters(function: Any) -> str:
    """`(a, /, b, *, c=1)`, without annotations."""
    signature = inspect.signature(function)
    bare = [
        parameter.replace(annotation=parameter.empty, default=default(parameter.default))
        for parameter in signature.parameters.values()
        if not parameter.name.startswith("_")
    ]
    return str(inspect.Signature(bare))


class _Written(str):
    """A default as it stands in the snapshot."""

    def __repr__(self) -> str:
        return str(self)


def default(value: Any) -> Any:
    """A default that reads the same everywhere."""
    if value is inspect.Parameter.empty:
        return value
    if isinstance(value, (str, int, float, bool, type(None), tuple)):
        return value
    if dataclasses.is_dataclass(value):
        return _Written(f"{type(value).__name__}()")
    return _Written(repr(value) if repr(value) == "<factory>" else f"<{type(value).__name__}>")


def of_parser(parser: argparse.ArgumentParser, name: str) -> Iterator[str]:
    """The arguments of a command, then its sub-commands."""
    yield name
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command, inner in action.choices.items():
                yield from of_parser(inner, f"{name} {command}")
        elif action.dest != "help":
            said = {
                "nargs": action.nargs,
                "choices": action.choices and tuple(action.choices),
                # the model class is that of the installed TransformerLens
                "default": None if action.dest == "model_class" else action.default,
            }
            words = [f"{key}={value!r}" for key, value in said.items() if value not in (None, [])]
            yield "    " + " ".join(["|".join(action.option_strings) or action.dest, *words])


def differences(old: str, new: str) -> list[str]:
    """The lines of a diff, with the heading under which each stands left in."""
    lines = difflib.unified_diff(
        old.splitlines(), new.splitlines(), SNAPSHOT.name, "now", lineterm="", n=2
    )
    return list(lines)


def test_the_public_interface_is_the_snapshot():
    found = differences(SNAPSHOT.read_text(encoding="utf-8"), snapshot())
    if found:
        text = "\n".join(found)
        pytest.fail(f"{text}\n\nif this is meant, run: {COMMAND}", pytrace=False)


def test_a_change_of_the_interface_is_seen(monkeypatch):
    """A default, a kind, a lost name, a lost option and a method's option."""
    before = snapshot()

    def causal_trace(model, prompt, subject, kind="resid", *, window=11):
        pass

    monkeypatch.setattr(transformer_lens_rome, "causal_trace", causal_trace)
    monkeypatch.delattr(transformer_lens_rome.SecondMoment, "merge")
    monkeypatch.setitem(methods._REGISTRY, "rome", lambda *, layer=1: None)
    found = differences(before, snapshot())
    assert "+causal_trace(model, prompt, subject, kind='resid', *, window=11)" in found
    assert "+rome(*, layer=1)" in found
    assert any(line.startswith("-    merge(self") for line in found)
    assert not any("<locals>" in line or " at 0x" in line for line in snapshot().splitlines())


def kinds(function: Any) -> tuple[list[str], list[str]]:
    """Names that may be given by position, and those that may not."""
    every = [p for p in inspect.signature(function).parameters.values() if p.name != "self"]
    by_name = [p.name for p in every if p.kind is p.KEYWORD_ONLY]
    return [p.name for p in every if p.kind is p.POSITIONAL_OR_KEYWORD], by_name


_ROME = ["layer", "second_moment", "prefixes", "config", "seed"]
_TRACE = ["answer", "kind", "window", "noise", "noise_std", "n_samples", "seed"]
_FIXED = {
    "EditRequest": (["prompt", "subject", "target_new", "target_true"], []),
    "rome_edit": (["model", "request"], _ROME),
    "compute_rome_edit": (["model", "request"], _ROME),
    "collect_second_moment": (["model", "texts", "layer"], ["max_tokens", "batch_size"]),
    "causal_trace": (["model", "prompt", "subject"], _TRACE),
    "severed_trace": (["model", "prompt", "subject"], ["sever"]),
    "average_traces": (["traces"], []),
    "evaluate_counterfact": (
        ["model", "records", "method"],
        ["out", "seed", "generate", "workers"],
    ),
    "get_method": (["name"], []),
    "CounterFact.load": (["path"], ["limit"]),
    "EditRequest.from_dict": ([None], []),
    "RankOneEdit": (
        [],
        "layer k_star u lam v_star request config model_hash health".split(),
    ),
    "RankOneEdit.delta": ([], []),
    "RankOneEdit.scale": (["alpha"], []),
    "RankOneEdit.save": (["path"], []),
    "RankOneEdit.load": (["path"], []),
    "DenseEdit.delta": ([], []),
    "DenseEdit.scale": (["alpha"], []),
    "DenseEdit.save": (["path"], []),
    "DenseEdit.load": (["path"], []),
    "AppliedEdit.revert": ([], []),
    "SecondMoment.update": (["keys"], []),
    "SecondMoment.merge": (["other"], []),
    "SecondMoment.solve": (["k"], ["ridge"]),
    "SecondMoment.save": (["path"], []),
    "SecondMoment.load": (["path"], []),
    "SecondMoment.from_moment": (["C", "n_tokens"], []),
    "SecondMoment.from_npz": (["path"], []),
    "SecondMoment.identity": (["d_mlp"], []),
    "SecondMoment.report": ([], []),
}
"""The contract of the design: positional names exactly, and keyword-only names at least these."""


@pytest.mark.parametrize("name", _FIXED)
def test_the_fixed_signatures(name):
    thing: Any = transformer_lens_rome
    for part in name.split("."):
        thing = getattr(thing, part)
    positional, by_name = kinds(thing)
    expected, least = _FIXED[name]
    if expected == [None]:  # one argument, whatever its name
        assert len(positional) == 1
    else:
        assert positional == expected
    assert set(least) <= set(by_name)


@pytest.mark.parametrize(
    ("name", "attributes"),
    [
        ("AppliedEdit", "edit health __enter__ __exit__"),
        ("SecondMoment", "C"),
        ("RankOneEdit", "digest"),
    ],
)
def test_the_fixed_attributes(name, attributes):
    thing = getattr(transformer_lens_rome, name)
    assert not [a for a in attributes.split() if not hasattr(thing, a)]


def test_the_paper_s_methods_are_registered():
    assert {"rome", "ft", "ft+l", "kn", "ke", "mend"} <= set(methods._REGISTRY)


def test_the_version_is_that_of_the_metadata():
    from importlib.metadata import version

    assert transformer_lens_rome.__version__ == version("transformer-lens-rome")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        transformer_lens_rome.nothing


# ---------------------------------------------------------------- what holds of all of them

ALONE = {
    "active_edits": "reads what is noted on the model",
    "base_weight": "reads what is noted on the model",
    "check_unedited": "reads what is noted on the model",
    "edited_weights": "reads what is noted on the model",
    "applied": "`apply_edit` and `revert`, with the caller's own code between them",
    "without": "two writes, with the caller's own code between them",
    "get_act_patch_window": "the host's own passes, in the states that the clean cache is of",
    "provenance": "runs no pass",
    "AppliedEdit.of": "puts values together",
    "Encoder.of": "reads the tokenizer",
    "Recipe.compute": "says that the method has to be trained",
    "Recipe.prepared": "says that the method has to be trained",
}
"""Public functions with a parameter `model` that are not called under `model_call`, and why."""


def functions_of_models() -> Iterator[tuple[str, Any]]:
    """Public functions and methods that take a model."""
    for name in MODULES:
        module = importlib.import_module(f"{PACKAGE}.{name}".rstrip("."))
        names = getattr(module, "__all__", None) or [
            n
            for n, item in vars(module).items()
            if getattr(item, "__module__", "") == module.__name__
        ]
        for item in (getattr(module, n) for n in names if not n.startswith("_")):
            if getattr(item, "_is_protocol", False):
                continue
            members = [m for _, m in inspect.getmembers(item)] if inspect.isclass(item) else [item]
            for one in (getattr(member, "__func__", member) for member in members):
                public = inspect.isfunction(one) and not one.__name__.startswith("_")
                if public and "model" in inspect.signature(one).parameters:
                    yield one.__qualname__, one


def test_every_public_function_runs_under_torchs_defaults_alone_on_its_model():
    found = dict(functions_of_models())
    every = {"rome_edit", "causal_trace", "Rome.compute", "Recipe.fit", "FineTuning.compute"}
    assert every <= set(found)
    plain = {
        n for n, one in found.items() if not one.__code__.co_filename.endswith("model/calls.py")
    }
    assert plain - set(ALONE) == set()


if __name__ == "__main__":
    SNAPSHOT.write_text(snapshot(), encoding="utf-8")
