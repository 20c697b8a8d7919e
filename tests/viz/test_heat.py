"""Heat maps: a cell's colour and text are its effect, and what noise explains has no colour."""

from __future__ import annotations

import dataclasses
import html
import json
import re

import pytest
import torch

from transformer_lens_rome.tracing.averages import average_severed, average_traces
from transformer_lens_rome.tracing.results import CausalTrace, SeveredTrace
from transformer_lens_rome.viz import heat
from transformer_lens_rome.viz.heat import heat_map
from transformer_lens_rome.viz.traces import difference, trace_panel


def rand(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(len(shape)))


TRACE = CausalTrace(
    samples=rand(3, 7, 5),
    corrupted_samples=rand(3) / 10 + 0.4,
    p_clean=0.9,
    tokens=("<bos>", "Space", " $N$", " </script>is", " in\n\u202e\x00"),
    subject_positions=(1, 2),
    answer=" Seattle",
    kind="mlp",
    window=4,
    metric="probability",
    info={"model": "tiny"},
    top=(10 * rand(3, 7, 5)).long() % 3,
    top_tokens=(" Seattle", "</script>\u202e", ""),
)
SEVERED = SeveredTrace(rand(3, 7), rand(3, 7), rand(3) / 10, 0.9, "attn", " Seattle", TRACE.info)


def cells(shown):
    """Number, kind and share of the colour of every cell, by table, row and column."""
    found = {}
    for i, table in enumerate(re.findall(r"<table>.*?</table>", shown, flags=re.S)):
        for row, line in re.findall(
            r'<th scope="row"[^>]*>(.*?)</th>(.*?)(?=<tr>|</tbody>)', table
        ):
            for column, cell in enumerate(line.split("<td")[1:]):
                name = re.search(r'class="tlr-(\w+)"', cell)
                share = re.search(r"--s:(\d+)%", cell)
                number = float(cell.split(">")[1] or "nan")
                found[i, html.unescape(row), column] = (
                    number,
                    name and name[1],
                    int(share[1]) if share else 0,
                )
    return found


def test_a_page_holds_the_top_tokens_of_each_cell():
    body = heat_map(trace_panel(TRACE)).body
    (known,) = json.loads(re.search(r'tlr-data">(.*?)</script>', body)[1])
    tops = [known["says"][n] for n in known["tops"]]
    assert len(tops) == 35 == len(known["effects"])
    for position, layer in ((0, 0), (4, 6)):
        counts = TRACE.top[:, layer, position].bincount(minlength=3).tolist()
        parts = dict(one.rsplit(" ", 1) for one in tops[position * 7 + layer].split(", "))
        names = (" Seattle", "</script>\\u202e", "")
        named = zip(names, counts, strict=True)
        assert parts == {f"\u201c{name}\u201d": str(n) for name, n in named if n}
    change = difference(TRACE, dataclasses.replace(TRACE, samples=TRACE.samples / 2))
    assert not change.tops


def test_a_cell_is_its_effect_on_one_scale_for_both_signs():
    found = cells(TRACE._repr_html_())
    effects, half = TRACE.indirect_effect, TRACE.half_width
    bound = effects.abs().max()
    assert len(found) == 7 * 5 and (effects < 0).any()
    for layer in range(7):
        for row, position in (("<bos>", 0), ("Space*", 1), (" in\\n\\u202e\\x00", 4)):
            number, name, share = found[0, row, layer]
            effect = effects[layer, position]
            assert number == pytest.approx(effect.item(), rel=1e-2)
            if effect.abs() <= half[layer, position]:
                assert (name, share) == ("zero", 0)
            else:
                assert name == ("low" if effect < 0 else None)
                assert share == pytest.approx((effect.abs() / bound * 100).item(), abs=0.51)
    assert {name for _, name, _ in found.values()} == {"zero", "low", None}
    assert "<script" not in TRACE._repr_html_()


def test_an_effect_is_white_where_its_interval_holds_zero():
    """1.96 standard errors of the samples' own differences from the corrupted run."""
    effects = TRACE.samples - TRACE.corrupted_samples[:, None, None]
    torch.testing.assert_close(TRACE.half_width, 1.96 * effects.std(0) / 3**0.5)
    steady = dataclasses.replace(TRACE, samples=TRACE.corrupted_samples[:, None, None] + rand(7, 5))
    assert not (steady.indirect_effect.abs() <= steady.half_width).any()
    first = {name: getattr(TRACE, name)[:1] for name in ("samples", "corrupted_samples", "top")}
    one = dataclasses.replace(TRACE, **first)
    assert one.half_width.isnan().all() and "tlr-zero" not in one._repr_html_().split("</style>")[1]


def test_before_and_after_have_one_scale():
    weak = dataclasses.replace(
        TRACE,
        samples=TRACE.corrupted_samples[:, None, None] + rand(7, 5) / 10,
    )
    strong = dataclasses.replace(weak, samples=weak.samples + 0.5)
    shown = heat_map(trace_panel(weak), trace_panel(strong)).body
    found = cells(shown)
    bound = strong.indirect_effect.max()
    for i, trace in enumerate((weak, strong)):
        wanted = (trace.indirect_effect[3, 1] / bound * 100).item()
        assert found[i, "Space*", 3][2] == pytest.approx(wanted, abs=0.51)
    change = difference(weak, strong)
    torch.testing.assert_close(change.effects, torch.full((5, 7), 0.5))
    torch.testing.assert_close(change.half_width, torch.zeros(5, 7), atol=1e-6, rtol=0)


def test_averages_and_severed_paths_are_maps():
    average = average_traces([TRACE, TRACE])
    number, *_ = cells(average._repr_html_())[0, "last token (n = 2)", 3]
    assert number == pytest.approx(average.indirect_effect[5, 3].item(), rel=1e-2)
    found = cells(average_severed([SEVERED, SEVERED])._repr_html_())
    number, *_ = found[0, "attention severed", 2]
    assert number == pytest.approx(SEVERED.effects[1, 2].item(), rel=1e-2)
    effects = SEVERED.severed - SEVERED.corrupted_samples[:, None]
    torch.testing.assert_close(SEVERED.half_width[1], 1.96 * effects.std(0) / 3**0.5)


def test_of_a_long_text_the_tokens_with_the_largest_effects_are_shown(monkeypatch):
    monkeypatch.setattr(heat, "CELLS", 7 * 3)
    quiet = dataclasses.replace(TRACE, samples=TRACE.samples.clone())
    quiet.samples[:, :, [0, 3]] = TRACE.corrupted_samples[:, None, None]
    shown = quiet._repr_html_()
    rows = {row for _, row, _ in cells(shown)}
    assert rows == {"Space*", " $N$*", " in\\n\\u202e\\x00"}
    assert "The 3 rows with the largest effects of 5 rows." in shown
