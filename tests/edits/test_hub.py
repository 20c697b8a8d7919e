"""An edit goes to the Hub and comes back; what cannot be a name is refused before any network."""

import base64
import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from helpers.shared_edit import edit_to_share, equal, read

from transformer_lens_rome import RankOneEdit, load_edit
from transformer_lens_rome.edits import hub_folder


@pytest.fixture
def edit(gpt2):
    return edit_to_share(gpt2)


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


def test_without_huggingface_hub_the_command_to_install_it_is_said(edit, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (lambda: load_edit("user/name"), lambda: edit.push_to_hub("user/name")):
        with pytest.raises(ImportError, match=r"transformer-lens-rome\[share\]"):
            call()


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
