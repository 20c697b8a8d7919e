"""Rating pages and their files: what goes in blind comes out by method, or is refused."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from helpers.evaluation_setting import record
from helpers.rating_setting import RECORDS, run, simulated_answers, write_file
from test_docs import GUIDE, blocks
from test_docs import run as run_block

from transformer_lens_rome import rate, viz
from transformer_lens_rome.rate import page
from transformer_lens_rome.rate.key import QUESTIONS, SAME, Key

ROME, FT = run("rome"), run("ft+l")
EVIL = "</script><!--<script>&\"'\u2028\u202e\x00<img src=x onerror=alert(1)>"


@pytest.fixture
def built(tmp_path):
    """The key of a page about all records, and its file."""
    path = tmp_path / "page.html"
    return rate.build(ROME, FT, records=RECORDS, out=path), path


def content(path):
    """Return the data that a page's program reads."""
    (found,) = re.findall(r'id="content">(.*?)</script>', path.read_text(encoding="utf-8"))
    return json.loads(found)


# ---------------------------------------------------------------- the page and its key


def test_the_key_tells_which_text_is_whose(built):
    key, path = built
    items = content(path)["items"]
    assert len(items) == len({item.case_id for item in key.items}) == len(RECORDS)
    for shown, item in zip(items, key.items, strict=True):
        subject = f"Tower {item.case_id}"
        assert shown["prompt"] == f"{subject} is in" and shown["target"] == "Paris"
        wanted = [f"{key.methods[one]} says of {subject}: {item.text}" for one in item.order]
        assert shown["texts"] == wanted
    assert {item.text for item in key.items} == {0, 1, 2}
    assert [item.case_id for item in key.items] != sorted(item.case_id for item in key.items)
    assert Key.load(path.with_suffix(".key.json")) == key


def test_a_page_does_not_name_its_methods(tmp_path):
    runs = [run(name, text="{subject} is in {i}") for name in ("rome", "ft+l", "unedited")]
    rate.build(*runs, records=RECORDS, out=tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8").lower()
    text = text.replace("transformer_lens_rome", "").replace("fromentries", "")
    assert not [name for name in ("rome", "ft+l", "unedited") if name in text]
    assert "which text is most fluent?" in text


@pytest.mark.parametrize("names", [("rome", "ft+l"), ("rome", "ft+l", "unedited")])
def test_each_method_is_as_often_at_each_place(tmp_path, names):
    runs = [run(name) for name in names]
    key = rate.build(*runs, records=RECORDS, out=tmp_path / "page.html", seed=3)
    for place in range(len(names)):
        seen = [item.order[place] for item in key.items]
        assert [seen.count(one) for one in range(len(names))] == [24 // len(names)] * len(names)
    orders = [item.order for item in key.items]
    n = math.factorial(len(names))
    rounds = {tuple(orders[i : i + n]) for i in range(0, len(orders), n)}
    assert {len(set(one)) for one in rounds} == {n}, "each order once a round"
    assert len(rounds) > 1, "and each round in another order"


def test_the_seed_decides_the_page(tmp_path):
    pages = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        path = tmp_path / f"{name}.html"
        state = torch.random.get_rng_state()
        key = rate.build(ROME, FT, records=RECORDS, out=path, n_items=7, seed=seed)
        assert torch.equal(torch.random.get_rng_state(), state) and len(key.items) == 7
        pages[name] = path.read_text(encoding="utf-8")
    assert pages["a"] == pages["b"] != pages["c"]


def test_hostile_text_ends_no_script_and_runs_nowhere(tmp_path):
    hostile = [record(i, f"Tower {i}", new=f"x{EVIL}") for i in range(2)]
    runs = [run(name, hostile, text=EVIL + "{name}") for name in ("rome", "ft+l")]
    path = tmp_path / "page.html"
    rate.build(*runs, records=hostile, out=path)
    text = path.read_text(encoding="utf-8")
    assert text.count("</script>") == 2 and "<img" not in text and "<!--" not in text
    texts = [text for item in content(path)["items"] for text in item["texts"]]
    assert sorted(texts) == [EVIL + "ft+l"] * 2 + [EVIL + "rome"] * 2
    (allowed,) = re.findall(r'Security-Policy" content="([^"]*)"', text)
    assert "unsafe" not in allowed and allowed.startswith("default-src &#x27;none&#x27;; script-")


@pytest.mark.parametrize(
    ("runs", "options", "message"),
    [
        ([ROME], {}, "2 to 4 runs, got 1"),
        ([run(str(i)) for i in range(5)], {}, "2 to 4 methods, got 5"),
        ([ROME, ROME], {}, "do not tell the methods apart"),
        ([ROME, run(SAME)], {}, "do not tell the methods apart"),
        ([ROME, FT], {"names": ["rome"]}, "1 names for 2 runs"),
        ([ROME, FT], {"n_items": 25}, "24 records have generated text in all runs"),
        ([ROME, FT], {"n_items": 0}, "pass a number from 1"),
        ([ROME, run("ft+l", n_texts=0)], {}, r"in all runs \(rome: 24, ft\+l: 0\)"),
        ([ROME, run("ft+l", n_texts=2)], {}, "3, 2 texts about record 0"),
        ([ROME, run("ft+l", model_hash="b")], {}, "differ in model_hash"),
        ([ROME, FT], {"records": [record(0, "Another")]}, "record 0 is not the one of the runs"),
        ([ROME, FT], {"records": []}, "no record has generated text"),
        ([ROME, run("ft+l", text="a\ud800")], {}, "lone surrogate"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, runs, options, message):
    given = {"records": RECORDS, "out": tmp_path / "page.html"} | options
    with pytest.raises(ValueError, match=message):
        rate.build(*runs, **given)
    assert not list(tmp_path.iterdir())


def test_the_key_of_another_page_is_not_written_over(built):
    key, path = built
    before = path.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="key of another page"):
        rate.build(ROME, FT, records=RECORDS, out=path, seed=1)
    assert path.read_text(encoding="utf-8") == before
    assert rate.build(ROME, FT, records=RECORDS, out=path) == key


def test_a_page_with_other_questions_is_another_page(built, monkeypatch, tmp_path):
    """So a page of an older version of this package is told from one of a newer version."""
    monkeypatch.setitem(page._ASKED, "fluency", "Which text is {} beautiful?")
    other = rate.build(ROME, FT, records=RECORDS, out=tmp_path / "other.html")
    assert other.items == built[0].items and other.page != built[0].page


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda key: key["items"][0]["order"].reverse(), "has been changed"),
        (lambda key: key.update(methods=["ft+l", "rome"]), "has been changed"),
        (lambda key: key["items"][0].update(order=[0, 0]), "not a complete key"),
        (lambda key: key.pop("seed"), "not a complete key"),
        (lambda key: key.update(format="x"), "is not the key of a rating page"),
    ],
)
def test_a_changed_key_is_refused(built, change, message):
    path = built[1].with_suffix(".key.json")
    key = json.loads(path.read_text(encoding="utf-8"))
    change(key)
    path.write_text(json.dumps(key), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        Key.load(path)


# ---------------------------------------------------------------- the analysis

CHANCES = {"consistency": [0.8, 0.1, 0.1], "fluency": [0.2, 0.7, 0.1]}


def simulated(tmp_path, key, n=3, chances=CHANCES, **options):
    """The files of simulated raters with known preferences."""
    return [
        write_file(
            tmp_path / f"{i}.json", key, simulated_answers(key, chances, i), rater=i, **options
        )
        for i in range(n)
    ]


def test_known_preferences_of_three_simulated_raters_are_recovered(built, tmp_path):
    key, path = built
    found = rate.analyse(simulated(tmp_path, key), key=path.with_suffix(".key.json"))
    for question, chances in CHANCES.items():
        shares = found.shares[question]
        assert [*shares] == ["rome", "ft+l", SAME]
        assert sum(share.mean for share in shares.values()) == pytest.approx(100)
        for share, chance in zip(shares.values(), chances, strict=True):
            assert share.low <= 100 * chance <= share.high
            assert share.low <= share.mean <= share.high and share.high - share.low < 50
    assert found.shares["consistency"]["rome"].low > 50 > found.shares["fluency"]["rome"].high
    assert found.n_answers == {"consistency": 72, "fluency": 72} and found.notes == ()
    assert found.simulated and found.who == "3 simulated raters (no people)"


def test_the_shares_are_those_of_a_count_by_hand(built, tmp_path):
    """With the places of the texts as they were shown: the order of each item is undone."""
    key, _ = built
    given = {name: ["A"] * 20 + [None] * 3 + [SAME] for name in QUESTIONS}
    found = rate.analyse(write_file(tmp_path / "one.json", key, given), key=key)
    first = [item.order[0] for item in key.items[:20]]
    shares = found.shares["fluency"]
    assert shares["rome"].mean == pytest.approx(100 * first.count(0) / 21)
    assert shares[SAME].mean == pytest.approx(100 / 21) and found.n_answers["fluency"] == 21
    assert f"Rater {0:016x} left 6 of 48 questions unanswered." in found.notes
    assert math.isnan(found.agreement["fluency"]) and "over items only" in found.notes[1]
    assert found.table().split("\n")[2].endswith(" | - |")
    assert [ax.get_title() for ax in found.plot().axes] == [*QUESTIONS]


def test_intervals_are_over_raters_too(built, tmp_path):
    """Raters who each prefer another method at every item: items say nothing new, raters do."""
    key, _ = built
    for i, chances in enumerate(([1, 0, 0], [0, 1, 0])):
        both = dict.fromkeys(QUESTIONS, chances)
        for j in (0, 1):
            given = simulated_answers(key, both)
            write_file(tmp_path / f"{i}{j}.json", key, given, rater=2 * i + j)
    apart = rate.analyse(sorted(tmp_path.glob("??.json")), key=key).shares["fluency"]["rome"]
    assert (apart.mean, apart.low, apart.high) == (50, 0, 100)
    alike = rate.analyse(sorted(tmp_path.glob("0?.json")), key=key)
    assert alike.shares["fluency"]["rome"] == (100, 100, 100)
    assert math.isnan(alike.agreement["fluency"])  # nothing else was ever answered


def test_agreement_is_about_methods_and_not_about_places(built, tmp_path):
    key, _ = built
    alternating = {name: [i % 2 for i in range(24)] for name in QUESTIONS}
    given = {
        name: ["AB"[item.order.index(one)] for one, item in zip(some, key.items, strict=True)]
        for name, some in alternating.items()
    }
    turned = {name: ["BA"["AB".index(one)] for one in some] for name, some in given.items()}
    same = [write_file(tmp_path / f"{i}.json", key, given, rater=i) for i in (0, 1)]
    assert rate.analyse(same, key=key).agreement["fluency"] == 1
    other = [same[0], write_file(tmp_path / "2.json", key, turned, rater=2)]
    assert rate.analyse(other, key=key).agreement["fluency"] < -0.9


@pytest.mark.parametrize(
    ("answers", "alpha"),
    [  # Krippendorff 2011, sections A to C
        (["0100000010", "1110010000"], 0.095),
        (["aabbdcccedda", "babbbccceddd"], 0.692),
        (["123321412...", "1233224125.3", ".3332342251.", "12332441251."], 0.743),
    ],
)
def test_alpha_is_that_of_the_published_examples(answers, alpha):
    rows = [[None if one == "." else one for one in row] for row in answers]
    assert rate.krippendorff_alpha(rows) == pytest.approx(alpha, abs=5e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"page": "f" * 64}, "is of the page ffffffffffffffff, .*another version"),
        ({"checksum": "00000000"}, "altered .its checksum"),
        ({"rater": "0" * 15 + "1"}, "altered .its checksum"),
        ({"rater": "Ann"}, "the rater is 'Ann'"),
        ({"kind": "person"}, "altered .its checksum"),
        ({"kind": "robot"}, "kind should be"),
        ({"format": "x"}, "not a file that a rating page exported"),
        ({"extra": 1}, "has no field extra"),
        ({"answers": {"fluency": ["A"] * 24}}, "it answers fluency"),
        ({"answers": dict.fromkeys(QUESTIONS, ["A"] * 23)}, "needs 24 answers"),
        ({"answers": dict.fromkeys(QUESTIONS, ["C"] * 24)}, "answered by 'C'"),
        ({"answers": dict.fromkeys(QUESTIONS, [["A"]] * 24)}, "answered by .'A'"),
        ({"answers": dict.fromkeys(QUESTIONS, ["B"] * 24)}, "altered .its checksum"),
        ({"answers": [1]}, "answers should be"),
    ],
)
def test_a_file_that_was_altered_is_refused(built, tmp_path, change, message):
    given = dict.fromkeys(QUESTIONS, ["A"] * 24)
    path = write_file(tmp_path / "bad.json", built[0], given, change=change)
    with pytest.raises(ValueError, match=rf"bad.json .*{message}"):
        rate.analyse(path, key=built[0])


def test_a_file_of_another_version_of_the_page_is_refused(built, tmp_path):
    """The same texts in another order: read with this key, its answers would be swapped."""
    other = rate.build(ROME, FT, records=RECORDS, out=tmp_path / "second.html", seed=1)
    (first,) = simulated(tmp_path, built[0], 1)
    given = simulated_answers(other, CHANCES)
    second = write_file(tmp_path / "second.json", other, given, rater=9)
    assert rate.analyse(second, key=other).raters == (f"{9:016x}",)
    with pytest.raises(
        ValueError, match="second.json is of the page .*another version of this one"
    ):
        rate.analyse([first, second], key=built[0])


def test_files_that_do_not_go_together_are_refused(built, tmp_path):
    key, _ = built
    first, second = simulated(tmp_path, key, 2)
    again = tmp_path / "again.json"
    again.write_bytes(first.read_bytes())
    person = write_file(
        tmp_path / "person.json", key, simulated_answers(key, CHANCES), rater=7, kind="person"
    )
    empty = dict.fromkeys(QUESTIONS, [None] * 24)
    for files, message in (
        ([], "there is no file"),
        ([first, second, again], "are of one rater"),
        ([person, first], "0.json is of a simulated rater"),
        ([write_file(tmp_path / "empty.json", key, empty)], "no answer at all"),
    ):
        with pytest.raises(ValueError, match=message):
            rate.analyse(files, key=key)
    assert rate.analyse(person, key=key).who == "1 rater"
    cut = tmp_path / "cut.json"
    cut.write_text(first.read_text(encoding="utf-8")[:-30], encoding="utf-8")
    with pytest.raises(ValueError, match="cut.json is not JSON"):
        rate.analyse(cut, key=key)


# ---------------------------------------------------------------- what is shown of it


def test_table_page_and_figure_say_who_answered(built, tmp_path):
    found = rate.analyse(simulated(tmp_path, built[0]), key=built[0])
    head, _, consistency, fluency, _, legend = found.table().split("\n")
    assert head == r"| question | answers | rome | ft+l | no difference | alpha |"
    share = found.shares["consistency"]["rome"]
    cell = f"{share.mean:.1f} ({share.low:.1f} to {share.high:.1f})"
    assert consistency.startswith(f"| consistency | 72 | {cell} | ") and fluency.count("|") == 7
    assert "3 simulated raters (no people)" in legend
    body = found.show().body
    assert cell in body and "3 simulated raters (no people)" in body
    figure = viz.plot_preferences(found)
    assert figure.get_suptitle().startswith("3 simulated raters (no people), 24 items")
    heights = [bar.get_height() for bar in figure.axes[1].patches]
    assert heights == [share.mean for share in found.shares["fluency"].values()]
    low, high = figure.axes[0].collections[0].get_segments()[0][:, 1]
    assert (low, high) == pytest.approx((share.low, share.high))


def test_a_names_markup_stays_text_in_the_table(tmp_path):
    names = ["a|b<i>", "$x$"]
    key = rate.build(ROME, FT, records=RECORDS, out=tmp_path / "page.html", names=names)
    found = rate.analyse(simulated(tmp_path, key), key=key)
    assert r"| a\|b\<i\> | \$x\$ |" in found.table()
    assert "<i>" not in found.show().body


def test_the_guide_s_code_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    first, second = blocks(GUIDE / "asking_people.md")
    space = {"rome": ROME, "ft": FT, "records": RECORDS, "__name__": "page"}
    run_block(first, space)
    folder = tmp_path / "exported"
    folder.mkdir()
    simulated(folder, Key.load("rate.key.json"))
    run_block(second, space)
    assert "| consistency | 60 |" in capsys.readouterr().out
