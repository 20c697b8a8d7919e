"""A kind of trace is one entry of a table: tracing, pictures, files and commands follow it."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest
import torch
from conftest import make_model

from transformer_lens_rome import average_traces, viz
from transformer_lens_rome.cli.commands import _parser
from transformer_lens_rome.model import adapter
from transformer_lens_rome.model.adapter import Point
from transformer_lens_rome.tracing.averages import AverageTrace
from transformer_lens_rome.tracing.causal_trace import causal_trace
from transformer_lens_rome.tracing.kinds import KINDS, Kind, StateKind
from transformer_lens_rome.tracing.patching import get_act_patch_window
from transformer_lens_rome.tracing.results import CausalTrace, Sever

PROMPT, SUBJECT = "In the city Space Needle is", "Space Needle"
MLP_IN = StateKind(
    point=Point("mlp_in"),
    name="MLP input",
    states="MLP inputs",
    windowed=True,
    colour=(1, 2, 3),
    colour_map="Oranges",
    bar="C1",
)


def trace(model, kind, **options):
    known = {"noise_std": 1.0, "n_samples": 3, "window": 2, "progress": False}
    return causal_trace(model, PROMPT, SUBJECT, kind=kind, **(known | options))


@pytest.fixture(params=("gpt2", "gptj", "gemma3", "llama"))
def model(request, model_class, tokenizer):
    return make_model(model_class, request.param, tokenizer)


@pytest.fixture
def mlp_in(monkeypatch):
    monkeypatch.setitem(KINDS, "mlp_in", MLP_IN)


def test_the_annotations_name_the_kinds_of_the_table():
    assert get_args(Kind) == tuple(KINDS)
    assert set(get_args(Sever)) < set(KINDS)


def test_a_new_kind_restores_its_states(model, mlp_in):
    """An MLP with its clean input has its clean output, so the two kinds have equal traces."""
    found, outputs = trace(model, "mlp_in"), trace(model, "mlp")
    torch.testing.assert_close(found.samples, outputs.samples, rtol=1e-4, atol=1e-7)
    assert not torch.allclose(found.samples, trace(model, "attn").samples, rtol=1e-3)  # the control
    none = trace(model, "mlp_in", noise_std=0.0)
    p_clean = torch.full_like(none.samples, none.p_clean)
    torch.testing.assert_close(none.samples, p_clean, rtol=1e-4, atol=1e-7)


def test_a_kind_without_window_restores_one_layer(gpt2, monkeypatch):
    value = dataclasses.replace(MLP_IN, point=Point("value"), windowed=False)
    monkeypatch.setitem(KINDS, "value", value)
    found = trace(gpt2, "value", window=3)
    assert found.window == 1
    torch.testing.assert_close(found.samples, trace(gpt2, "mlp", window=1).samples)


def test_a_new_kind_is_saved_and_loaded(gpt2, mlp_in, monkeypatch, tmp_path):
    found = trace(gpt2, "mlp_in")
    found.save(tmp_path / "trace")
    average_traces([found, found]).save(tmp_path / "average")
    again = CausalTrace.load(tmp_path / "trace")
    assert again.kind == "mlp_in" and torch.equal(again.samples, found.samples)
    assert AverageTrace.load(tmp_path / "average").kind == "mlp_in"
    monkeypatch.delitem(KINDS, "mlp_in")
    for kind, name in ((CausalTrace, "trace"), (AverageTrace, "average")):
        with pytest.raises(ValueError, match=f"{name} is not a complete.*kind must be one of"):
            kind.load(tmp_path / name)


def test_a_new_kind_is_drawn(gpt2, mlp_in):
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    found = trace(gpt2, "mlp_in")
    (ax, _) = found.plot().axes
    assert ax.get_title() == "Impact of restoring MLP input after corrupted input"
    assert ax.get_xlabel() == "centre of interval of 2 restored MLP input layers"
    assert ax.collections[0].get_cmap().name == "Oranges"
    average = average_traces([found, found])
    (ax, *_) = viz.plot_averages([average]).axes
    assert ax.get_title() == "AIE of restoring MLP input over 2 prompts"
    for shown in (found, average):
        assert "rgb(1,2,3)" in shown._repr_html_()


def test_the_command_line_offers_a_new_kind(mlp_in):
    options = _parser().parse_args(["trace", "demo", PROMPT, SUBJECT, "--kind", "mlp_in"])
    assert options.kind == "mlp_in"


def test_patching_takes_a_new_kind(gpt2, mlp_in):
    """The activations are those of the kind's point; `hook_mlp_in` would be before the norm."""
    clean, corrupted = torch.tensor([[3, 8, 2, 9, 4]]), torch.tensor([[3, 8, 5, 9, 4]])

    def last(logits):
        return logits[0, -1, 7]

    def patched(kind):
        return get_act_patch_window(
            gpt2, corrupted, cache, last, kind=kind, window=1, progress=False
        )

    with torch.no_grad():
        _, cache = gpt2.run_with_cache(clean)
    if adapter.hook_name(gpt2, Point("mlp_in", 0)) is None:
        with pytest.raises(ValueError, match="no hook point for 'mlp_in'"):
            patched("mlp_in")
        return
    with pytest.raises(ValueError, match="lacks blocks.0.mlp"):
        get_act_patch_window(gpt2, corrupted, {}, last, kind="mlp_in")
    torch.testing.assert_close(patched("mlp_in"), patched("mlp"))
    assert patched("mlp_in").std() > 1e-4
