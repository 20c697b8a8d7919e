"""An edit's folder: it gives back the edit, and its card shows hostile texts as they are."""

import dataclasses

import pytest
from helpers.mass_setting import many_edit
from helpers.rome_setting import LAYER, factored_edit, random_edit, small_edit
from helpers.shared_edit import edit_to_share, equal, read

from transformer_lens_rome import EditRequest, load_edit, show_edit
from transformer_lens_rome.edits.card import Known, adapter_card
from transformer_lens_rome.files.markdown import LONGEST, escaped
from transformer_lens_rome.model.adapter import Weight, shared_part

HOSTILE = [
    "a | b || c",
    "`code` and ```\nfence",
    "line one\nline two\r\n\n# heading\n- item",
    "---\nlicense: mit\n---",
    "tags: [x]\n'\"{} &anchor *alias !tag %",
    "<script>alert(1)</script><img src=x onerror=alert(1)> &lt;b&gt;",
    "[link](javascript:alert(1)) ![i](http://x.y/z) https://x.y www.x.y <http://x.y>",
    "**bold** _em_ ~~gone~~ \\| \\` \\\\",
    "$x$ 1. 2) + * > ^ = :smile: @someone #1",
    "\u202eright to left\u2066 \u0000\u001b[31m\u2028\u00a0",
    "Öl, 東京, Ünïcode 🙂",
]


@pytest.fixture
def edit(gpt2):
    return edit_to_share(gpt2)


def asking(edit, text):
    """The edit with one text in every place that a file may fill."""
    hole = text.replace("{}", "")
    request = EditRequest("{} " + hole, f"x{hole}x", f"x{hole}x", f"x{hole}x")
    health = dataclasses.replace(edit.health, subject_token=text, warnings=(text,))
    origin = {"model": text, "revision": text, "second_moment": {text: text}}
    return dataclasses.replace(
        edit, request=request, health=health, provenance=origin, model_hash=text
    )


def shown(text):
    """How a card shows a text."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


PLAIN = {"h1", "h2", "p", "table", "thead", "tbody", "tr", "th", "td", "pre", "code"}


# ---------------------------------------------------------------- the card


def test_a_card_says_what_was_edited_and_how_to_undo_it(edit, tmp_path):
    folder = edit.save_pretrained(tmp_path / "needle", license="apache-2.0")
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "edit.safetensors"]
    front, page = read((folder / "README.md").read_text(encoding="utf-8"))
    assert front == {
        "library_name": "transformer-lens-rome",
        "base_model": "owner/tiny",
        "license": "apache-2.0",
        "tags": [
            "base_model:adapter:owner/tiny",
            "transformer-lens",
            "knowledge-editing",
            "model-editing",
        ],
    }
    cells = dict(zip(page.texts[1::2], page.texts[2::2], strict=False))
    assert cells["base model"] == "owner/tiny, revision 0123abc"
    assert (cells["prompt"], cells["subject"]) == ("“{} is in”", "“The Space Needle”")
    assert (cells["new answer"], cells["old answer"]) == ("“Paris”", "“Seattle”")
    assert cells["changes"] == f"W_out of layer {LAYER} (RankOneEdit)"
    assert cells["statistics of keys (C)"] == "n_tokens 4096, source wikipedia"
    assert cells["made on weights with sha256"] == edit.model_hash
    assert cells["p_before"] == "0.01" and cells["p_after"] == "0.9"
    assert cells["warning"] == "its norm is large"
    text = (folder / "README.md").read_text(encoding="utf-8")
    for line in ('load_edit("needle")', "on.revert()", 'boot_transformers("owner/tiny")'):
        assert line in text
    assert "Licence: apache-2.0." in text


def test_what_is_not_known_is_not_made_up(gpt2, tmp_path):
    bare = random_edit(gpt2)
    front, page = read((bare.save_pretrained(tmp_path / "x") / "README.md").read_text())
    assert set(front) == {"library_name", "tags"}
    cells = dict(zip(page.texts[1::2], page.texts[2::2], strict=False))
    assert cells["base model"] == "not known" and cells["statistics of keys (C)"] == "none recorded"
    assert "No licence was stated" in (tmp_path / "x" / "README.md").read_text()


def test_the_answers_of_a_report_are_in_the_card(gpt2, tmp_path):
    made = small_edit(gpt2)
    report = show_edit(gpt2, made, ["Rome | is in"], n_samples=1, progress=False)
    folder = made.save_pretrained(tmp_path / "x", answers=report.prompts)
    _, page = read((folder / "README.md").read_text(encoding="utf-8"))
    for change in report.prompts:
        at = page.texts.index(f"“{change.prompt}”", 9)
        for text, top in zip(page.texts[at + 1 :], (change.top_before, change.top_after)):
            assert text == ", ".join(f"“{shown(token)}” {p:.3f}" for token, p in top)
        assert page.texts[at + 3] == f"{change.p_before:.3g}"
        assert page.texts[at + 4] == f"{change.p_after:.3g}"
    assert "base_model" not in (folder / "README.md").read_text()  # this one has no name there


def test_the_base_s_revision_is_recorded_and_in_the_card(gpt2, model_class, tmp_path):
    part = shared_part(gpt2)
    if model_class == "bridge":
        part.config._commit_hash = "0123abc"
    made = small_edit(gpt2)
    known = "0123abc" if model_class == "bridge" else None  # a HookedTransformer does not keep it
    assert made.provenance["revision"] == known
    origin = made.provenance | {"model": "owner/name"}
    folder = dataclasses.replace(made, provenance=origin).save_pretrained(tmp_path / "x")
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert ("`owner/name`, revision `0123abc`" in card) == (known is not None)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_stay_texts(edit, tmp_path, text):
    bad = asking(edit, text)
    folder = bad.save_pretrained(tmp_path / "x")
    cards = [(folder / "README.md").read_text(encoding="utf-8")]
    cards.append(adapter_card([bad, bad], Known(), {"a.b": 1}, []))
    plain = [read(edit.save_pretrained(tmp_path / "y").joinpath("README.md").read_text())]
    plain.append(read(adapter_card([edit, edit], Known(), {"a.b": 1}, [])))
    for card, (expected, usual) in zip(cards, plain, strict=True):
        front, page = read(card)
        own = {"base_model": None, "tags": [t for t in expected["tags"] if ":" not in t]}
        assert front == {k: v for k, v in (expected | own).items() if v is not None}
        assert page.tags == usual.tags <= PLAIN and page.attributes == usual.attributes
        assert len(page.texts) == len(usual.texts)  # no cell more or less
        assert f"“{shown(bad.request.subject)}”" in page.texts
        assert f"“{shown(bad.request.target_new)}”" in page.texts
    assert load_edit(folder).request == bad.request


def test_a_card_of_many_facts_lists_them(gpt2, tmp_path):
    made = many_edit(gpt2)
    texts = [text.replace("{}", "") for text in HOSTILE]
    hostile = [EditRequest("{} " + text, f"x{text}x", "y") for text in texts]
    unmeasured = dataclasses.replace(made.health, facts=())
    many = dataclasses.replace(made, requests=(*made.requests, *hostile * 5), health=unmeasured)
    folder = made.save_pretrained(tmp_path / "x")
    front, page = read((folder / "README.md").read_text(encoding="utf-8"))
    assert page.texts[0] == "4 facts, written by one edit" and len(load_edit(folder).requests) == 4
    for request, fact in zip(made.requests, made.health.facts, strict=True):
        at = page.texts.index(f"“{request.subject}”")
        assert page.texts[at + 1 : at + 4] == [
            *(f"“{request.target_new}”", f"{fact.p_before:.3g}", f"{fact.p_after:.3g}")
        ]
    cells = dict(zip(page.texts[1::2], page.texts[2::2], strict=False))
    assert "layer 0: " in cells["statistics of keys (C)"]
    card = (many.save_pretrained(tmp_path / "y") / "README.md").read_text(encoding="utf-8")
    other, large = read(card)
    assert "50 of 59 facts." in card and other == front
    assert large.tags <= PLAIN and f"“{shown(hostile[0].subject)}”" in large.texts
    (tall,) = [read(adapter_card([many], Known(), {"a.b": 1}, []))[1]]
    assert tall.texts[0] == "59 edited facts as a LoRA adapter"


@pytest.mark.parametrize("text", ['x")\nimport os', "`", "", 3, None, ["a"]])
def test_a_revision_that_cannot_be_one_is_left_out(edit, tmp_path, text):
    """It may come from a stranger's file, so it is no reason to refuse the edit."""
    odd = dataclasses.replace(edit, provenance={"model": "owner/tiny", "revision": text})
    card = (odd.save_pretrained(tmp_path / "x") / "README.md").read_text(encoding="utf-8")
    assert "| base model | `owner/tiny` |" in card


def test_a_very_long_text_is_shortened():
    text = escaped("a" * 10_000)
    assert text == "a" * LONGEST + "…" and escaped("a" * LONGEST) == "a" * LONGEST


@pytest.mark.parametrize(
    "options",
    [
        {"base_model": "a b"},
        {"base_model": "a/b\nlicense: mit"},
        {"base_model": "../x"},
        {"base_model": "a/b/c"},
        {"revision": 'x")\nimport os'},
        {"revision": "`"},
        {"license": "mit\n---"},
        {"license": 3},
    ],
)
def test_what_cannot_be_a_name_is_refused(edit, tmp_path, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}|no name of a repository"):
        edit.save_pretrained(tmp_path / "x", **options)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- the folder


def test_a_folder_gives_back_the_edit_of_any_kind(gpt2, edit, tmp_path):
    places = [Weight("W_out", 0), Weight("W_in", 2)]
    others = [random_edit(gpt2, rank=2, bias=True), factored_edit(gpt2, places)]
    for i, one in enumerate([edit, *others]):
        folder = one.save_pretrained(tmp_path / "deep" / str(i))
        for path in (folder, str(folder), folder / "edit.safetensors"):
            assert equal(load_edit(path), one)
    assert not equal(edit, others[0])  # control


def test_nothing_is_written_over(edit, tmp_path):
    folder = edit.save_pretrained(tmp_path / "x")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(FileExistsError, match="exists, and nothing is written over it"):
        (edit * 2).save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_folder_without_an_edit_is_said_to_have_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="edit.safetensors"):
        load_edit(tmp_path)
