"""Tables and bars of results that are made by hand."""

from __future__ import annotations

import math

import pytest

from transformer_lens_rome.evaluation import Results, comparison, latex, markdown
from transformer_lens_rome.evaluation.metrics import PromptScore
from transformer_lens_rome.evaluation.rows import RecordRow


def scores(success: bool, neighbour: bool):
    """One prompt a kind: the new target wins there or not."""
    high, low = [math.log(0.5)], [math.log(0.1)]
    pair = [high, low] if success else [low, high]
    other = [low, high] if neighbour else [high, low]
    return {
        "rewrite": [PromptScore(*pair, [True], [False])],
        "paraphrase": [PromptScore(*pair, [False], [False])],
        "neighborhood": [PromptScore(*other, [False], [True])],
    }


def rows(*outcomes):
    return {i: RecordRow(i, f"r{i}", scores(*outcome)) for i, outcome in enumerate(outcomes)}


def results(name, *outcomes, failed=0):
    after = rows(*outcomes)
    after |= {i: RecordRow(i, f"r{i}", failed="no") for i in range(failed)}
    before = rows(*[(False, True)] * len(outcomes))
    return Results(name, {"model_hash": "a"}, before, after)


GOOD = results("rome", *[(True, True)] * 9, (True, False))
POOR = results("ft+l", *[(True, True)] * 5, *[(True, False)] * 5)
FAILED = results("kn", *[(True, True)] * 10, failed=2)


def test_markdown_by_hand():
    head, rule, unedited, good, poor, empty, legend = markdown([GOOD, POOR]).split("\n")
    assert head == (
        "| method | records | failed | S | ES | EM | PS | PM | NS | NM | EA | PA | NA |"
    )
    assert rule.count("---") == 13 and empty == "" and legend.startswith("CounterFact, in percent")
    assert unedited.startswith("| unedited | 10 | 0 | 0.0 (0.0) | 0.0 (0.0) | -40.0 (0.0) |")
    expected = 3 / (1 / 100 + 1 / 100 + 1 / 90)
    assert good.startswith(f"| rome | 10 | 0 | {expected:.1f} (")
    assert "| 100.0 (0.0) | 40.0 (0.0) | 100.0 (0.0) | 40.0 (0.0) | 90.0 (19.6) |" in good
    assert poor.startswith("| ft+l | 10 | 0 | ") and "| 50.0 (32.7) | 0.0 (26.1) |" in poor
    failed = markdown([GOOD, FAILED]).split("\n")[4]
    assert failed.startswith("| kn | 8 | 2 | 100.0 (0.0) |")
    assert legend.endswith("prompts a record: 1 rewrite, 1 paraphrase, 1 neighborhood.")


def test_latex_has_the_same_cells():
    text = latex([GOOD, POOR]).split("\n")
    assert text[0].startswith("% CounterFact") and text[1] == r"\begin{tabular}{l" + "r" * 12 + "}"
    cells = [cell.strip() for cell in markdown([GOOD]).split("\n")[3].strip("| ").split("|")]
    assert " & ".join(cells) + r" \\" in text
    assert text[-1] == r"\end{tabular}" and text[2] == r"\toprule"
    assert GOOD.table(POOR, style="latex") == latex([GOOD, POOR])


def test_paired_tests_by_hand():
    lines = comparison(GOOD, POOR).split("\n")
    assert lines[0] == "| rome less ft+l | difference | p |"
    (ns,) = [line for line in lines if line.startswith("| NS")]
    # four records differ, all the same way: 2 of 16 choices of signs are as far from 0
    assert ns.startswith("| NS | 40.0 (32.0) | ") and float(ns.split("|")[3]) == pytest.approx(0.12)
    (es,) = [line for line in lines if line.startswith("| ES")]
    assert es == "| ES | 0.0 (0.0) | 1 |"


def test_bars_are_the_scores():
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    figure = GOOD.plot(POOR)
    assert [ax.get_title().split(":")[0] for ax in figure.axes] == ["S", "ES", "PS", "NS"]
    for ax in figure.axes:
        metric = ax.get_title().split(":")[0]
        found = [bar.get_height() for bar in ax.patches]
        runs = (GOOD.scores(edited=False), GOOD.scores(), POOR.scores())
        assert found == pytest.approx([run[metric].mean for run in runs])
        assert [label.get_text() for label in ax.get_xticklabels()] == ["unedited", "rome", "ft+l"]


def test_a_notebook_shows_a_run():
    page = GOOD._repr_html_()
    assert "rome" in page and "90.0 (19.6)" in page
