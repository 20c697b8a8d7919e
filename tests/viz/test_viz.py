"""Pictures: what they show is what the results hold, and a saved page needs no network."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import json
import re

import pytest
import torch
from circuitsvis.tokens import colored_tokens

from transformer_lens_rome import viz
from transformer_lens_rome.edits.kinds import EditHealth
from transformer_lens_rome.tracing.averages import average_severed, average_traces
from transformer_lens_rome.tracing.results import CausalTrace, SeveredTrace
from transformer_lens_rome.viz import page

GENERATOR = torch.Generator().manual_seed(0)


def rand(*shape):
    return torch.rand(*shape, generator=GENERATOR)


TRACE = CausalTrace(
    samples=rand(3, 7, 5),
    corrupted_samples=rand(3) / 10,
    p_clean=0.9,
    tokens=("<bos>", "Space", " $N$", " </script>is", " in\n"),
    subject_positions=(1, 2),
    answer=" Seattle",
    kind="mlp",
    window=10,
    metric="probability",
    info={"model": "tiny"},
)
SEVERED = SeveredTrace(rand(3, 7), rand(3, 7), rand(3) / 10, 0.9, "attn", " Seattle", TRACE.info)
LOG_PROBS = rand(4, 12).log_softmax(-1)
AVERAGES = [
    average_traces([dataclasses.replace(TRACE, kind=kind)] * 2) for kind in ("resid", "mlp", "attn")
]


def token(ids):
    return "<unk>" if ids[0] == 3 else f"t{ids[0]}"


def everything():
    """One of each thing that a page can hold."""
    return (
        "A <b> paragraph",
        TRACE,
        average_traces([TRACE, TRACE]),
        SEVERED,
        average_severed([SEVERED, SEVERED]),
        EditHealth(subject_token=" <N>", losses=(2.0, 1.0), p_before=0.1, warnings=("look",)),
        viz.log_probs_before_and_after(torch.tensor([1, 2, 3, 4]), LOG_PROBS, LOG_PROBS, token),
        viz.attention_before_and_after(["<!--", "<script>"], rand(3, 2, 2), rand(3, 2, 2)),
        colored_tokens(["of", "circuitsvis"], [0.5, 1.0]),
    )


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Circuitsvis asks the network whether it is there; here nothing may."""
    asked = []  # circuitsvis forgives every exception, so it is noted as well

    def refuse(*arguments, **_):
        asked.append(arguments)
        raise OSError("no network here")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    yield
    assert not asked


# ---------------------------------------------------------------- pages


def test_a_saved_page_holds_the_program_once_and_points_nowhere(tmp_path):
    path = tmp_path / "new" / "page.html"
    viz.save_html(path, *everything(), title="Five & more")
    text = path.read_text()
    program = page.circuitsvis_program()
    assert text.count(program) == 1 and len(text) < 1_000_000
    rest = text.replace(program, "").replace("http://www.w3.org/2000/svg", "")  # a name, no address
    assert not re.search(r"https?:|src=\"(?!data:)|import |@import|url\(", rest)
    assert "<title>Five &amp; more</title>" in rest and "A &lt;b&gt; paragraph" in rest
    assert rest.count("CircuitsVis.render(") == 5  # two log-probs, two attentions, tokens
    unpacked = gzip.decompress(base64.b64decode(program))
    assert len(unpacked) > 1e6 and b"sourceMappingURL" not in unpacked


def test_every_script_ends_where_it_should(tmp_path):
    viz.save_html(tmp_path / "page.html", *everything())
    text = (tmp_path / "page.html").read_text()
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", text, flags=re.S)
    assert max(script.count("CircuitsVis.render(") for script in scripts) == 1
    data = re.findall(r'"tlr-data">(.*?)</script>', text)
    assert len(data) == 4 and all(json.loads(one)[0]["effects"] for one in data)
    rest = re.sub(r"<script.*?</script>", "", text, flags=re.S)
    assert rest.count("<div") == rest.count("</div>") and "alert" not in rest


def test_a_page_without_interactive_parts_is_small(tmp_path):
    viz.save_html(tmp_path / "page.html", "words", AVERAGES[0])
    assert (tmp_path / "page.html").stat().st_size < 40_000
    with pytest.raises(ValueError, match="not a list"):
        viz.save_html(tmp_path / "other.html", [1])


def test_another_circuitsvis_is_noticed():
    rendered = colored_tokens(["a"], [1.0])
    assert page.component(rendered).interactive
    rendered.local_src = rendered.local_src.replace("CircuitsVis.render", "Other.render")
    with pytest.raises(RuntimeError, match="circuitsvis renders in another form"):
        page.component(rendered)


# ---------------------------------------------------------------- in a notebook cell


def test_a_cell_shows_health():
    shown = EditHealth(subject_token=" <N>", losses=(2.0, 1.0), warnings=("look here",))
    assert "&lt;N&gt;" in shown._repr_html_() and "look here" in shown._repr_html_()


# ---------------------------------------------------------------- figures


def drawn(ax):
    """The numbers of a heat map."""
    return torch.tensor(ax.collections[0].get_array().data)


@pytest.fixture
def matplotlib():
    return pytest.importorskip("matplotlib", reason="the plot extra is not installed")


def test_the_heat_map_of_a_trace(matplotlib):
    figure = TRACE.plot()
    ax = figure.axes[0]
    torch.testing.assert_close(drawn(ax).float(), TRACE.scores.T)
    assert ax.collections[0].get_clim()[0] == pytest.approx(TRACE.p_corrupted)
    assert ax.collections[0].get_cmap().name == "Greens" and ax.yaxis_inverted()
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert [label.endswith("*") for label in labels] == [False, True, True, False, False]
    assert "10 restored MLP layers" in ax.get_xlabel()
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_cells_that_noise_explains_are_hatched(matplotlib):
    (ax, _) = dataclasses.replace(TRACE, samples=TRACE.samples - 0.4).plot().axes
    white = (TRACE.indirect_effect - 0.4).abs() <= TRACE.half_width
    assert ax.collections[1].get_hatch() and 0 < white.sum() < white.numel()
    assert torch.equal(torch.tensor(ax.collections[1].get_array().mask), ~white.T)


def test_where_restoring_only_hurts_nothing_is_coloured(matplotlib):
    worse = dataclasses.replace(TRACE, samples=TRACE.samples * 0.01)
    assert worse.scores.max() < worse.p_corrupted
    low, high = worse.plot().axes[0].collections[0].get_clim()
    assert low == pytest.approx(worse.p_corrupted) and high > low


def test_dollars_are_no_formulas(matplotlib):
    figure = dataclasses.replace(TRACE, answer="$_{$").plot()
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_averages_share_the_scale_of_the_states(matplotlib):
    figure = viz.plot_averages(AVERAGES)
    axes = [ax for ax in figure.axes if ax.get_title()]
    high = AVERAGES[0].indirect_effect.nan_to_num(0.0).max().item()
    for average, ax in zip(AVERAGES, axes, strict=True):
        expected = average.indirect_effect.clamp(min=0)
        torch.testing.assert_close(drawn(ax).float(), expected, equal_nan=True)
        assert ax.collections[0].get_clim() == (0, pytest.approx(high))
        assert "2 prompts" in ax.get_title()
    assert axes[0].get_yticklabels()[2].get_text() == "last subject token"


def test_lines_have_bands_of_their_own_width(matplotlib):
    figure = viz.plot_lines(AVERAGES[1:])
    ax = figure.axes[0]
    line = torch.tensor(ax.lines[2].get_ydata())
    torch.testing.assert_close(line.float(), AVERAGES[1].indirect_effect[2])
    band = torch.tensor(ax.collections[2].get_paths()[0].vertices[:, 1])
    highest = (AVERAGES[1].indirect_effect + AVERAGES[1].half_width)[2].max().item()
    assert band.max().item() == pytest.approx(highest)


def test_severed_bars(matplotlib):
    other = dataclasses.replace(SEVERED, sever="mlp", severed=rand(3, 7))
    ax = viz.plot_severed(SEVERED, other).axes[0]
    boxes = [box for box in ax.containers if type(box).__name__ == "BarContainer"]
    bars = [torch.tensor([bar.get_height() for bar in box]) for box in boxes]
    expected = [SEVERED.effects[0], SEVERED.effects[1], other.effects[1]]
    for found, wanted in zip(bars, expected, strict=True):
        torch.testing.assert_close(found.float(), wanted)
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels[1].endswith("attention severed") and labels[2].endswith("MLP severed")
    assert SEVERED.plot() is not None


def test_without_matplotlib_the_call_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'transformer-lens-rome\[plot\]'"):
        TRACE.plot()
