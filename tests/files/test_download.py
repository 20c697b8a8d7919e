"""Downloads are whole and checked, or not there; what broke off goes on."""

from __future__ import annotations

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from transformer_lens_rome.files import download as downloads
from transformer_lens_rome.files.download import Published, download

DATA = bytes(range(256)) * 5000


class Handler(BaseHTTPRequestHandler):
    """Serves DATA, in ranges if the server is told so; may break off after some bytes."""

    def do_GET(self):
        server, first = self.server, 0
        asked = self.headers.get("Range")
        server.asked.append(asked)
        if server.elsewhere:
            self.send_response(302)
            self.send_header("Location", server.elsewhere)
            self.end_headers()
            return
        if asked and server.ranges:
            first = int(asked.removeprefix("bytes=").removesuffix("-"))
            if first >= len(DATA):
                self.send_error(416)
                return
        self.send_response(206 if asked and server.ranges else 200)
        body = DATA[first:]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: server.breaks_after])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server on this machine, and for once allowed."""
    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.asked, made.ranges, made.breaks_after, made.elsewhere = [], True, None, None
    made.url = f"http://127.0.0.1:{made.server_port}/data"
    origin = made.url.removesuffix("/data")
    monkeypatch.setattr(downloads, "_ORIGINS", frozenset({origin}))
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


def right(server):
    return Published(server.url, len(DATA), hashlib.sha256(DATA).hexdigest())


def test_a_whole_file_is_kept(server, tmp_path):
    download(right(server), tmp_path / "in" / "data")
    assert (tmp_path / "in" / "data").read_bytes() == DATA
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["data"]


@pytest.mark.parametrize("ranges", (True, False))
def test_a_broken_download_goes_on(server, tmp_path, ranges):
    server.ranges, server.breaks_after = ranges, 300_000
    with pytest.raises(OSError, match="ended after 300000 of 1280000 bytes; call again"):
        download(right(server), tmp_path / "data")
    assert not (tmp_path / "data").exists()
    server.breaks_after = None
    download(right(server), tmp_path / "data")
    assert (tmp_path / "data").read_bytes() == DATA
    assert server.asked == [None, "bytes=300000-"]
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_all_bytes_were_there_already(server, tmp_path):
    (tmp_path / "data.part").write_bytes(DATA)
    download(right(server), tmp_path / "data")
    assert (tmp_path / "data").read_bytes() == DATA


def test_what_does_not_pass_its_check_is_gone(server, tmp_path):
    (tmp_path / "data.part").write_bytes(b"of another file")
    with pytest.raises(ValueError, match="not the published file; nothing was kept"):
        download(right(server), tmp_path / "data")
    assert not list(tmp_path.iterdir())
    download(right(server), tmp_path / "data")
    assert (tmp_path / "data").read_bytes() == DATA


def test_one_process_at_a_time(server, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    with (tmp_path / "data.part").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(OSError, match="another process is downloading data"):
            download(right(server), tmp_path / "data")
    download(right(server), tmp_path / "data")
    assert (tmp_path / "data").read_bytes() == DATA


# ---------------------------------------------------------------- from where, and how much

ELSEWHERE = [
    "http://rome.baulab.info/data",
    "https://example.org/data",
    "https://rome.baulab.info.example.org/data",
    "https://rome.baulab.info:8443/data",
    "https://me@rome.baulab.info/data",
    "https://rome.baulab.info@example.org/data",
    "file:///etc/passwd",
    "ftp://rome.baulab.info/data",
    "data:text/plain,x",
    "//rome.baulab.info/data",
    "rome.baulab.info/data",
    "",
]


@pytest.mark.parametrize("url", ELSEWHERE)
def test_nothing_is_asked_of_anybody_else(tmp_path, monkeypatch, url):
    def asked(*_, **__):
        raise AssertionError("a connection was made")

    monkeypatch.setattr("socket.create_connection", asked)
    monkeypatch.setattr("socket.getaddrinfo", asked)
    with pytest.raises(ValueError, match="is not an allowed source"):
        download(Published(url, 4, "0" * 64), tmp_path / "data")
    assert not list(tmp_path.iterdir())


def test_the_authors_are_asked(tmp_path, monkeypatch):
    """The control: their address passes the check, and the connection is tried."""

    def asked(address, *_, **__):
        raise OSError(f"asked {address[0]}")

    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("socket.create_connection", asked)
    with pytest.raises(OSError, match="asked rome.baulab.info"):
        download(Published("https://rome.baulab.info/data", 4, "0" * 64), tmp_path / "data")


@pytest.mark.parametrize("url", ELSEWHERE[:4])
def test_a_redirect_to_anybody_else_is_not_followed(server, tmp_path, url):
    server.elsewhere = url
    with pytest.raises(ValueError, match="is not an allowed source"):
        download(right(server), tmp_path / "data")
    assert len(server.asked) == 1 and not list(tmp_path.iterdir())


def test_more_than_was_published_is_not_read(server, tmp_path, monkeypatch):
    small = Published(server.url, 1000, hashlib.sha256(DATA[:1000]).hexdigest())
    with pytest.raises(ValueError, match="larger than the 1000 bytes"):
        download(small, tmp_path / "data")
    assert not list(tmp_path.iterdir())


def test_every_download_of_the_package_is_https_and_has_a_checksum():
    from transformer_lens_rome.evaluation import generation, records
    from transformer_lens_rome.tracing import known_facts

    files = [Published(records.URL, records._SIZE, records._SHA256)]
    files += [Published(generation.HOST + n, *has) for n, has in generation.PUBLISHED.items()]
    assert len(files) == 4
    for one in files:
        downloads._check_origin(one.url)
        assert one.size > 10**6 and len(one.sha256) == 64
    downloads._check_origin(known_facts.URL)
    assert len(known_facts._SHA256) == 64
