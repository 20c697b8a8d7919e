"""A rating page in a real browser without a network: answered by keyboard, reloaded, exported."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from conftest import newest
from helpers.evaluation_setting import record
from helpers.rating_setting import RECORDS, run

from transformer_lens_rome import rate
from transformer_lens_rome.rate import answers
from transformer_lens_rome.rate.key import QUESTIONS, SAME

pytestmark = newest  # pages do not depend on the version of TransformerLens
AXE = os.environ.get("AXE_CORE", "")
EVIL = '</script><img src=x onerror="document.title=1">\u202e\x00'
ENTER, TAB, RIGHT, SPACE = "\ue007", "\ue004", "\ue014", " "


@pytest.fixture
def opened(browser, tmp_path):
    """A function that builds a page and opens it; afterwards the console has no error."""

    def open_page(*names, n_items=3, text="{name} says of {subject}: {i}", records=RECORDS):
        runs = [run(name, records, text) for name in names or ("rome", "ft+l")]
        path = tmp_path / "page.html"
        key = rate.build(*runs, records=records, out=path, n_items=n_items)
        browser.get(path.as_uri())
        return key

    yield open_page
    errors = [line for line in browser.get_log("browser") if line["level"] == "SEVERE"]
    browser.execute_script("localStorage.clear()")
    assert not errors


def press(browser, *keys):
    for key in keys:
        browser.switch_to.active_element.send_keys(key)


def shown(browser, css="#item"):
    return browser.find_element("css selector", css).text


def exported(browser):
    """The path of the file that the page has just saved."""
    deadline = time.monotonic() + 10
    while not (found := [*browser.saved.glob("*.json")]) and time.monotonic() < deadline:
        time.sleep(0.05)
    (path,) = found
    return path.rename(browser.saved.parent / f"{browser.saved.name}-{path.name}")


def test_a_page_is_answered_by_keyboard_reloaded_and_exported(browser, opened):
    key = opened()
    press(browser, TAB, "a", "b")  # both questions of item 1; then "Next" has the focus
    press(browser, ENTER, "n")
    assert "Item 2 of 3" in shown(browser) and shown(browser, "#status").startswith("3 of 6")
    browser.refresh()
    assert "Item 2 of 3" in shown(browser) and shown(browser, "#status").startswith("3 of 6")
    press(browser, TAB)
    checked = browser.switch_to.active_element
    assert checked.is_selected() and checked.get_attribute("value") == SAME
    press(browser, TAB, SPACE, RIGHT)  # as in every group of radio buttons: from A to B
    press(browser, TAB, TAB, ENTER, "b", "a")  # the last item; then "Export answers" has the focus
    press(browser, ENTER)
    path = exported(browser)
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["answers"] == {
        "consistency": ["A", SAME, "B"],
        "fluency": ["B", "B", "A"],
    }
    assert content["kind"] == "simulated", "a program drives this browser"
    found = rate.analyse(path, key=key)
    won = [key.items[i].order["AB".index(letter)] for i, letter in enumerate("BBA")]
    assert found.shares["fluency"]["rome"].mean == pytest.approx(100 * won.count(0) / 3)
    assert found.n_answers == {"consistency": 3, "fluency": 3} and found.notes[0][:8] == "With one"
    assert path.name.endswith(f"ratings-{found.raters[0]}.json")


def test_a_half_filled_page_can_be_exported_and_another_rater_begins(browser, opened):
    key = opened()
    press(browser, TAB, "b", TAB, TAB, ENTER)  # "Previous" is off, "Next", "Export answers"
    first = rate.analyse(exported(browser), key=key)
    assert "left 5 of 6 questions unanswered" in first.notes[0]
    press(browser, TAB, ENTER)
    browser.switch_to.alert.accept()
    assert shown(browser, "#status").startswith("0 of 6")
    browser.execute_script("document.querySelector('h2').focus()")
    press(browser, "a")
    assert shown(browser, "#status").startswith("1 of 6")
    browser.find_element("xpath", "//button[text()='Export answers']").click()
    second = rate.analyse(exported(browser), key=key)
    assert second.raters != first.raters


def test_texts_are_shown_in_the_order_of_the_key_and_as_text(browser, opened):
    records = [record(i, f"Tower {i}", new=f"<b>{EVIL}") for i in range(2)]
    key = opened("rome", "ft+l", "memit", text="{name}:\n\n" + EVIL, records=records, n_items=2)
    for item in key.items:
        script = "return [...document.querySelectorAll('.text')].map((one) => one.textContent)"
        assert browser.execute_script(script) == [
            f"{key.methods[one]}:\n\n{EVIL}" for one in item.order
        ]
        fact = browser.execute_script("return document.querySelector('#fact').textContent")
        assert fact == f"Tower {item.case_id} is in <b>{EVIL}"
        assert not browser.find_elements("css selector", "main img, main b")
        assert "Which text is most fluent?" in shown(browser)
        browser.find_element("xpath", "//button[text()='Next']").click()
    assert browser.title == "Which text is better?"


@pytest.mark.parametrize("state", ["null", "[]", "{", '{"at":99}', '{"rater":"x","at":0}', "other"])
def test_what_else_stands_in_the_storage_does_no_harm(browser, opened, state):
    key = opened()
    if state == "other":  # a valid state but for one answer
        script = "return localStorage.getItem(arguments[0])"
        kept = json.loads(browser.execute_script(script, f"transformer_lens_rome {key.page}"))
        kept["answers"]["fluency"][0] = "<b>"
        state = json.dumps(kept)
    script = "localStorage.setItem(arguments[0], arguments[1])"
    browser.execute_script(script, f"transformer_lens_rome {key.page}", state)
    browser.refresh()
    assert shown(browser, "#status").startswith("0 of 6")


def test_a_browser_that_keeps_nothing_says_so(browser, opened):
    opened()
    browser.execute_script("Storage.prototype.setItem = () => { throw new Error(); }")
    press(browser, TAB, "a")
    assert "does not keep answers: export them" in shown(browser, "#status")


def test_without_javascript_the_page_says_so(browser, opened):
    opened()
    off = "Emulation.setScriptExecutionDisabled"
    browser.execute_cdp_cmd(off, {"value": True})
    try:
        browser.refresh()
        assert "This page needs JavaScript" in shown(browser, "main")
    finally:
        browser.execute_cdp_cmd(off, {"value": False})


def test_the_page_can_fetch_and_run_nothing_else(browser, opened):
    opened()
    script = """
      const bad = document.createElement("script");
      bad.textContent = "window.ran = true";
      document.body.append(bad);
      return window.ran === undefined;"""
    assert browser.execute_script(script)
    fetched = "fetch('data:,x').then(() => arguments[0](true), () => arguments[0](false))"
    assert browser.execute_async_script(fetched) is False
    blocked = [line["message"] for line in browser.get_log("browser")]  # and so emptied
    assert len(blocked) >= 2 and all("Content Security Policy" in line for line in blocked)


def test_python_and_the_page_compute_one_checksum(browser, opened, tmp_path):
    key = opened()
    press(browser, TAB, "a")
    browser.find_element("xpath", "//button[text()='Export answers']").click()
    content = json.loads(exported(browser).read_text(encoding="utf-8"))
    given = {name: content["answers"][name] for name in QUESTIONS}
    assert content["checksum"] == answers.checksum(
        key.page, content["rater"], content["kind"], given
    )


@pytest.mark.skipif(not Path(AXE).is_file(), reason="AXE_CORE is no path of axe.min.js")
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_to_complain_about(browser, opened, theme):
    opened("rome", "ft+l", "unedited")
    scheme = [{"name": "prefers-color-scheme", "value": theme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
    browser.execute_script(Path(AXE).read_text(encoding="utf-8"))
    found = browser.execute_async_script(
        "axe.run().then((found) => arguments[0](found.violations))"
    )
    assert not [(one["id"], one["nodes"][0]["html"][:200]) for one in found]
