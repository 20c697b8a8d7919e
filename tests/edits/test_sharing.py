"""An edit's folder: its card shows hostile texts as they are, and the Hub gives back the edit."""

import base64
import dataclasses
import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import yaml
from helpers.rome_setting import LAYER, factored_edit, random_edit, small_edit
from markdown_it import MarkdownIt

from transformer_lens_rome import EditRequest, RankOneEdit, load_edit, show_edit
from transformer_lens_rome.edits import hub_folder
from transformer_lens_rome.edits.card import adapter_card
from transformer_lens_rome.edits.health import EditHealth
from transformer_lens_rome.files.markdown import LONGEST, escaped
from transformer_lens_rome.model.adapter import Weight

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
    """An edit with what a real one has: health, and the origin of its statistics."""
    made = random_edit(gpt2)
    health = EditHealth(" Needle", (3.0, 0.1), 0.01, 0.9, warnings=("its norm is large",))
    origin = {"model": "owner/tiny", "revision": "0123abc"}
    origin["second_moment"] = {"n_tokens": 4096, "source": "wikipedia"}
    return dataclasses.replace(made, health=health, provenance=origin)


def asking(edit, text):
    """The edit with one text in every place that a file may fill."""
    hole = text.replace("{}", "")
    request = EditRequest("{} " + hole, f"x{hole}x", f"x{hole}x", f"x{hole}x")
    health = dataclasses.replace(edit.health, subject_token=text, warnings=(text,))
    origin = {"model": text, "revision": text, "second_moment": {text: text}}
    return dataclasses.replace(
        edit, request=request, health=health, provenance=origin, model_hash=text
    )


class _Page(HTMLParser):
    """The tags of a page, and the text of each table cell and heading."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.texts, self.open = set(), [], [], None
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        if tag in ("td", "h1"):
            self.open = ""

    def handle_endtag(self, tag):
        if tag in ("td", "h1"):
            self.texts.append(self.open)
            self.open = None

    def handle_data(self, data):
        if self.open is not None:
            self.open += data


def read(card):
    """The YAML of a card, and its page as a code host makes it."""
    start, front, body = card.split("---\n", 2)
    assert start == ""
    html = MarkdownIt("commonmark", {"html": True, "linkify": False}).enable("table")
    return yaml.safe_load(front), _Page(html.enable("strikethrough").render(body))


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


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_stay_texts(edit, tmp_path, text):
    bad = asking(edit, text)
    folder = bad.save_pretrained(tmp_path / "x")
    cards = [(folder / "README.md").read_text(encoding="utf-8")]
    cards.append(adapter_card([bad, bad], hub_folder.Known(), {"a.b": 1}, []))
    plain = [read(edit.save_pretrained(tmp_path / "y").joinpath("README.md").read_text())]
    plain.append(read(adapter_card([edit, edit], hub_folder.Known(), {"a.b": 1}, [])))
    for card, (expected, usual) in zip(cards, plain, strict=True):
        front, page = read(card)
        own = {"base_model": None, "tags": [t for t in expected["tags"] if ":" not in t]}
        assert front == {k: v for k, v in (expected | own).items() if v is not None}
        assert page.tags == usual.tags <= PLAIN and page.attributes == usual.attributes
        assert len(page.texts) == len(usual.texts)  # no cell more or less
        assert f"“{shown(bad.request.subject)}”" in page.texts
        assert f"“{shown(bad.request.target_new)}”" in page.texts
    assert load_edit(folder).request == bad.request


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


def equal(one, other):
    """The same edit, field by field."""
    fields = [f.name for f in dataclasses.fields(one) if f.name not in one.tensors()]
    plain = [n for n in fields if n != "factors"]
    same = all(getattr(one, name) == getattr(other, name) for name in plain)
    return type(one) is type(other) and same and one.digest == other.digest


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


# ---------------------------------------------------------------- the Hub


@pytest.fixture
def no_network(monkeypatch):
    """The names that a download was tried for."""
    tried = []
    monkeypatch.setattr(hub_folder, "fetch", lambda name, file, at: tried.append((name, file, at)))
    return tried


def test_what_exists_here_comes_before_the_hub(edit, tmp_path, monkeypatch, no_network):
    monkeypatch.chdir(tmp_path)
    edit.save_pretrained("user/folder")
    edit.save("user/file")
    assert equal(load_edit("user/folder"), edit) and equal(load_edit("user/file"), edit)
    assert no_network == []
    with pytest.raises(TypeError):  # this fetch gives no path
        load_edit("user/name", revision="v1")
    assert no_network == [("user/name", "edit.safetensors", "v1")]


@pytest.mark.parametrize(
    "name",
    [
        "missing.safetensors",
        "user/missing.safetensors",
        "name",
        "a/b/c",
        "/etc/nothing",
        "../x/y",
        "a/..",
        "user/na me",
        "user/",
        "/name",
        "user/-name",
        "user/name.git",
        "user/a--b",
        "https://host/user/name",
        "user/" + "n" * 97,
        "user/n\u00e4me",
        "user/name\n",
        "",
    ],
)
def test_what_is_no_name_is_refused_before_any_network(edit, tmp_path, monkeypatch, name):
    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub_folder, "fetch", refuse)
    monkeypatch.setattr(hub_folder, "push", refuse)
    with pytest.raises(FileNotFoundError):
        load_edit(name)
    if "safetensors" not in name:
        with pytest.raises(ValueError, match="no name of a repository"):
            edit.push_to_hub(name)


class _Hub(BaseHTTPRequestHandler):
    """As much of the Hub as an upload and a download need; it keeps what is committed."""

    def do_POST(self):
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size)
        self.server.asked.append(("POST", self.path, self.headers.get("Authorization")))
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self.answer({"url": f"{self.server.address}/user/name"})
        elif self.path == "/api/validate-yaml":
            self.server.validated.append(json.loads(body)["content"])
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in files]
            self.answer({"files": modes})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.server.files[line["value"]["path"]] = content
            url = f"{self.server.address}/user/name/commit/{'c' * 40}"
            self.answer({"commitUrl": url, "commitOid": "c" * 40, "commitMessage": "x"})

    def do_HEAD(self):
        self.do_GET(send=False)

    def do_GET(self, send=True):
        self.server.asked.append(("GET", self.path, self.headers.get("Authorization")))
        if self.path.startswith("/api/models/user/name/revision/"):
            return self.answer({"id": "user/name", "sha": "c" * 40, "xetEnabled": False})
        prefix = "/user/name/resolve/main/"
        content = self.server.files.get(self.path.removeprefix(prefix))
        if not self.path.startswith(prefix) or content is None:
            return self.answer({"error": "none"}, 404, {"X-Error-Code": "RepoNotFound"})
        headers = {"ETag": '"e"', "X-Repo-Commit": "c" * 40}
        self.answer(content if send else b"", 200, headers, len(content))

    def answer(self, content, status=200, headers=None, length=None):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@contextmanager
def local_hub():
    """A stub of the Hub at a port of this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.asked, server.created, server.validated, server.files = [], [], [], {}
    server.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


_USE = """
import sys
from transformer_lens_rome import load_edit
edit = load_edit(sys.argv[1])
for wrong in ("user", "user/na me"):
    try:
        edit.push_to_hub(wrong)
    except ValueError as error:
        print("refused", error)
print(edit.push_to_hub("user/name", private=True, token="hf_stub", license="mit"))
assert load_edit("user/name").digest == edit.digest
try:
    load_edit("user/other")
except OSError as error:
    print("no", error)
"""


def test_an_edit_goes_to_the_hub_and_comes_back(edit, tmp_path):
    pytest.importorskip("huggingface_hub", reason="the share extra is not installed")
    edit.save(tmp_path / "edit.safetensors")
    with local_hub() as hub:
        environment = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
        own = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}
        own |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*"}
        done = subprocess.run(
            [sys.executable, "-c", _USE, str(tmp_path / "edit.safetensors")],
            capture_output=True,
            text=True,
            env=environment | own,
            cwd=tmp_path,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.startswith("refused") for line in lines] == [True, True, False, False]
    assert lines[2] == f"{hub.address}/user/name/commit/{'c' * 40}"
    assert lines[3].startswith("no there is no file or folder user/other here")
    (made,) = hub.created
    assert (made["organization"], made["name"]) == ("user", "name")
    assert made.get("private") is True or made.get("visibility") == "private"
    assert sorted(hub.files) == ["README.md", "edit.safetensors"]
    (tmp_path / "sent").write_bytes(hub.files["edit.safetensors"])
    assert equal(RankOneEdit.load(tmp_path / "sent"), edit)
    card = hub.files["README.md"].decode()
    assert 'load_edit("user/name")' in card and read(card)[0]["license"] == "mit"
    posts = [who for how, path, who in hub.asked if how == "POST" and "yaml" not in path]
    assert set(posts) == {"Bearer hf_stub"}
    assert not any("na me" in path or "na%20me" in path for _, path, _ in hub.asked)


def test_a_damaged_file_of_the_hub_is_refused(edit, tmp_path, monkeypatch):
    folder = edit.save_pretrained(tmp_path / "x")
    file = folder / "edit.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    monkeypatch.setattr(hub_folder, "fetch", lambda *_: file)
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        load_edit("user/name")
    torch.save({"u": edit.u}, file)  # a pickle
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        load_edit("user/name")
