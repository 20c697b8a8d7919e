"""Pages in a real browser without a network: they show, answer the keyboard, and can be heard."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path

import pytest
import torch
from conftest import newest
from helpers.rome_setting import random_edit

from transformer_lens_rome import show_edit, viz
from transformer_lens_rome.evaluation.metrics import PromptScore
from transformer_lens_rome.evaluation.results import Results
from transformer_lens_rome.evaluation.rows import RecordRow
from transformer_lens_rome.tracing.averages import average_traces
from transformer_lens_rome.tracing.results import CausalTrace

pytestmark = newest  # pages do not depend on the version of TransformerLens
AXE = os.environ.get("AXE_CORE", "")
EVIL = '</script><img src=x onerror="alert(1)">$\u202e\x00'


def drawn(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(len(shape)))


TRACE = CausalTrace(
    samples=(drawn(3, 7, 5) + drawn(7, 5)) / 2,
    corrupted_samples=drawn(3) / 10 + 0.2,
    p_clean=0.9,
    tokens=("<bos>", "Space", " Needle", EVIL, " \u05d0\u05d1 is in"),
    subject_positions=(1, 2),
    answer=" Seattle",
    kind="mlp",
    window=4,
    metric="probability",
    info={},
    top=torch.tensor([1, 0, 1])[:, None, None].expand(3, 7, 5).clone(),
    top_tokens=(" Paris", EVIL),
)
ATTENTION = dataclasses.replace(TRACE, samples=TRACE.samples * 2, kind="attn")


def run(name, shift):
    """A run of an evaluation with three records."""
    rows = [
        {
            case: RecordRow(
                case,
                "r",
                {
                    kind: [PromptScore([-1.0 - case], [-2.0 + by], [True], [False])]
                    for kind in ("rewrite", "paraphrase", "neighborhood")
                },
            )
            for case in range(3)
        }
        for by in (0.0, shift)
    ]
    return Results(name, {"method": {"name": name}}, *rows)


@pytest.fixture
def opened(browser, tmp_path):
    """A function that opens things on a page; afterwards the console has no error."""

    def open_page(*things, fragment=""):
        path = tmp_path / "page.html"
        viz.save_html(path, *things, title=f"A page of {EVIL}")
        browser.get(f"{path.as_uri()}{fragment}")
        return browser

    yield open_page
    errors = [line for line in browser.get_log("browser") if line["level"] == "SEVERE"]
    assert not errors


def cell(browser, row, column):
    """A cell of the shown panel, with its text and the share of its colour."""
    script = """
      const panel = [...document.querySelectorAll(".tlr-panel")].find((one) => !one.hidden);
      const cell = panel.querySelectorAll("tbody tr")[arguments[0]].cells[arguments[1] + 1];
      return [cell, cell.textContent, cell.style.getPropertyValue("--s"), cell.className];"""
    return browser.execute_script(script, row, column)


def choose(browser, label, text):
    script = """
      const list = [...document.querySelectorAll("label")]
        .find((one) => one.textContent.trim().startsWith(arguments[0])).querySelector("select");
      list.value = [...list.options].find((one) => one.textContent === arguments[1]).value;
      list.dispatchEvent(new Event("change"));"""
    browser.execute_script(script, label, text)


def details(browser):
    return browser.execute_script("return document.querySelector('.tlr-details').textContent")


def test_every_part_of_an_edits_page_is_drawn(opened, gpt2):
    """Also the figures of circuitsvis, whose program the page holds compressed."""
    report = show_edit(gpt2, random_edit(gpt2), ["Cuba is in"], n_samples=2, progress=False)
    browser = opened(report.show())
    drawn_parts = "return document.querySelectorAll('.tlr-light h4, .tlr-light svg').length"
    deadline = time.monotonic() + 20
    while browser.execute_script(drawn_parts) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    figures = browser.execute_script("return document.querySelectorAll('.tlr-light span').length")
    assert figures > 10
    choose(browser, "run", "difference")
    effect = report.after.indirect_effect[1, 0] - report.before.indirect_effect[1, 0]
    assert float(cell(browser, 0, 1)[1]) == pytest.approx(effect.item(), rel=1e-2, abs=1e-8)


def test_kind_measure_and_scale_are_chosen_without_python(opened):
    browser = opened(TRACE.show(ATTENTION))
    clear = TRACE.indirect_effect - TRACE.half_width
    layer, position = divmod(int(clear.argmax()), 5)  # no noise explains this cell
    highest = ATTENTION.indirect_effect.abs().max().item()
    for trace, kind in ((ATTENTION, "attention"), (TRACE, "MLP")):
        choose(browser, "kind", kind)
        _, text, share, _ = cell(browser, position, layer)
        effect = trace.indirect_effect[layer, position].item()
        assert float(text) == pytest.approx(effect, rel=1e-2)
        assert float(share[:-1]) == pytest.approx(effect / highest * 100, abs=0.51)
    choose(browser, "colours up to", "this panel")
    share = float(cell(browser, position, layer)[2][:-1])
    assert share == pytest.approx(effect / TRACE.indirect_effect.abs().max().item() * 100, abs=0.51)
    choose(browser, "measure", "share of the whole effect")
    assert float(cell(browser, position, layer)[1][:-1]) == pytest.approx(
        effect / TRACE.total_effect * 100, rel=1e-2
    )
    choose(browser, "measure", "effect on the logarithm")
    logs = (TRACE.samples.log() - TRACE.corrupted_samples.log()[:, None, None]).mean(0)
    assert float(cell(browser, position, layer)[1]) == pytest.approx(
        logs[layer, position].item(), rel=1e-2
    )


def test_the_program_hatches_what_python_hatches(opened):
    browser = opened(TRACE.show())
    script = "return [...document.querySelectorAll('tbody td')].map((one) => one.className)"
    live = browser.execute_script(script)
    kinds = {"zero": "tlr-zero", "low": "tlr-low", None: ""}
    white = TRACE.indirect_effect.abs() <= TRACE.half_width
    wanted = torch.where(white, 0, TRACE.indirect_effect).T.flatten().tolist()
    names = [kinds["zero" if x == 0 else "low" if x < 0 else None] for x in wanted]
    assert live == names and 0 < names.count("tlr-zero") < len(names)


def test_a_cell_is_reached_by_arrows_and_says_its_samples(opened):
    browser = opened(TRACE.show())
    browser.execute_script("document.querySelector('td[tabindex=\"0\"]').focus()")
    for key in ("\ue011", "\ue014", "\ue015"):  # Home, right, down
        browser.switch_to.active_element.send_keys(key)
    focused = browser.switch_to.active_element
    row = browser.execute_script("return arguments[0].parentNode.rowIndex - 1", focused)
    assert focused == cell(browser, row, 1)[0]
    said = details(browser)
    assert "MLP outputs of layers 0 to 2 at" in said and "P(Seattle) changes by" in said
    listed, tops = said.split("Samples: ")[1].split(". Top tokens, and in how many samples: ")
    listed = listed.split(", ")
    assert tops.startswith(f"\u201c{EVIL[:-2]}\\u202e\\x00\u201d 2, \u201c Paris\u201d 1.")
    samples = [float(x) for x in listed]
    assert samples == pytest.approx(TRACE.samples[:, 1, row].tolist(), rel=1e-2)
    assert len(browser.find_elements("css selector", ".tlr-details circle")) == 3


def test_view_and_notes_are_in_the_address_and_in_a_saved_copy(opened, tmp_path):
    browser = opened(TRACE.show(ATTENTION))
    choose(browser, "kind", "attention")
    cell(browser, 1, 2)[0].click()
    browser.find_element("css selector", "textarea").send_keys("look <here>")
    copy, address = browser.execute_script("return [tlr.copy(), location.hash]")
    (tmp_path / "copy.html").write_text(copy, encoding="utf-8")
    assert copy.count("<textarea") == 0 and copy.count("</main>") == 1
    for url in ((tmp_path / "copy.html").as_uri(), (tmp_path / "page.html").as_uri() + address):
        browser.get("about:blank")
        browser.get(url)
        note = browser.find_element("css selector", "textarea").get_attribute("value")
        assert note == "look <here>" and "Attention outputs of layers 0 to 3 at" in details(browser)
        assert cell(browser, 1, 2)[0].get_attribute("aria-selected") == "true"


@pytest.mark.parametrize(
    "state", ["%E0%A4%A", '{"map0":{"panel":99,"cell":-1,"measure":"x"},"theme":{}}', "[1]", "null"]
)
def test_an_address_that_somebody_made_up_does_no_harm(opened, state):
    browser = opened(TRACE.show(), fragment=f"#{state}")
    assert "P(Seattle) changes by" in details(browser)


def test_a_method_is_compared_with_another_record_by_record(opened):
    rome, ft = run("rome", -2.5), run("ft", 0.5)
    browser = opened(rome.show(ft))
    choose(browser, "subtracted", "ft")
    ours, theirs = rome.metrics(), ft.metrics()
    differences = torch.tensor([100 * (ours[case]["EM"] - theirs[case]["EM"]) for case in ours])
    half = 1.96 * differences.std() / 3**0.5
    wanted = f"{differences.mean():.1f} ± {half:.1f}"
    script = "return [...document.querySelectorAll('.tlr-panel:not([hidden]) thead th')]"
    names = browser.execute_script(f"{script}.map((one) => one.textContent)")
    assert cell(browser, 1, names.index("EM"))[1] == wanted
    assert names[:3] == ["ES", "EM", "PS"] and cell(browser, 2, 1)[3] == "tlr-zero"


def test_without_javascript_the_tables_stay(opened):
    browser = opened("words")
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        opened(TRACE.show(ATTENTION))
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
        tables = browser.find_elements("css selector", "table")
        assert [table.is_displayed() for table in tables] == [True, True]
        assert not browser.find_elements("css selector", "select")
        assert float(cell(browser, 2, 3)[1]) == pytest.approx(
            TRACE.indirect_effect[3, 2].item(), rel=1e-2
        )
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_in_a_notebook_the_view_is_a_page_in_a_frame(browser, tmp_path):
    shown = TRACE.show()._repr_html_()
    assert shown.startswith("<iframe ") and shown.count("<iframe") == 1
    (tmp_path / "cell.html").write_text(f"<!DOCTYPE html><body>{shown}", encoding="utf-8")
    browser.get((tmp_path / "cell.html").as_uri())
    frame = browser.find_element("css selector", "iframe")
    browser.switch_to.frame(frame)
    browser.find_element("css selector", "textarea").send_keys("kept")
    inside = browser.execute_script("return document.body.offsetHeight")
    assert "P(Seattle) changes by" in details(browser)
    browser.switch_to.default_content()
    assert frame.size["height"] >= inside > 300
    assert not [line for line in browser.get_log("browser") if line["level"] == "SEVERE"]


def test_a_text_of_thousands_of_tokens_is_a_page_of_a_megabyte_at_most(opened, tmp_path):
    n = 3000
    long = dataclasses.replace(
        TRACE,
        samples=drawn(3, 26, n),
        top=torch.ones(3, 26, n, dtype=torch.long),
        tokens=tuple(f" {EVIL[:9]}{i}" for i in range(n)),
        subject_positions=(7, 8),
    )
    browser = opened(long.show(long))
    assert (tmp_path / "page.html").stat().st_size < 1_500_000
    assert "of 3000 rows" in browser.find_element("css selector", ".tlr-finding").text
    rows = browser.execute_script("return document.querySelector('tbody').rows.length")
    assert 100 < rows < n


def test_a_page_with_a_token_for_each_run_is_a_megabyte_at_most(opened, tmp_path):
    n = 760  # with 3 samples and 26 layers as many numbers as a page holds
    several = dataclasses.replace(
        TRACE,
        samples=drawn(3, 26, n),
        top=torch.arange(3)[:, None, None].expand(3, 26, n).clone(),
        top_tokens=(" constitutionally", " internationally", " characteristics"),
        tokens=tuple(f" {EVIL[:9]}{i}" for i in range(n)),
    )
    assert " characteristics\u201d 1" in details(opened(several.show()))
    assert (tmp_path / "page.html").stat().st_size < 1_500_000


@pytest.mark.skipif(not Path(AXE).is_file(), reason="AXE_CORE is no path of axe.min.js")
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", ["trace", "average", "methods", "edit"])
def test_axe_finds_nothing_to_complain_about(opened, gpt2, name, theme):
    things = {
        "trace": lambda: TRACE.show(ATTENTION),
        "average": lambda: average_traces([TRACE, TRACE]).show(),
        "methods": lambda: run("rome", -2.5).show(run("ft", 0.5)),
        "edit": lambda: show_edit(gpt2, random_edit(gpt2), n_samples=2, progress=False),
    }
    scheme = [{"name": "prefers-color-scheme", "value": theme}]
    browser = opened(things[name]())
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
    browser.execute_script(Path(AXE).read_text(encoding="utf-8"))
    options = json.dumps({"exclude": [[".tlr-light"]]})  # what circuitsvis draws is its own
    found = browser.execute_async_script(
        f"axe.run({options}).then((found) => arguments[0](found.violations))"
    )
    said = [(one["id"], one["nodes"][0]["html"][:200]) for one in found]
    assert not said
