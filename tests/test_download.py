"""Downloads are whole and checked, or not there; what broke off goes on."""

from __future__ import annotations

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from transformer_lens_rome.files import checked, download

DATA = bytes(range(256)) * 5000


class Handler(BaseHTTPRequestHandler):
    """Serves DATA, in ranges if the server is told so; may break off after some bytes."""

    def do_GET(self):
        server, first = self.server, 0
        asked = self.headers.get("Range")
        server.asked.append(asked)
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
def server():
    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.asked, made.ranges, made.breaks_after = [], True, None
    made.url = f"http://127.0.0.1:{made.server_port}/data"
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


def is_right(server):
    return checked(server.url, len(DATA), hashlib.sha256(DATA).hexdigest())


def test_a_whole_file_is_kept(server, tmp_path):
    download(server.url, tmp_path / "in" / "data", is_right(server))
    assert (tmp_path / "in" / "data").read_bytes() == DATA
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["data"]


@pytest.mark.parametrize("ranges", (True, False))
def test_a_broken_download_goes_on(server, tmp_path, ranges):
    server.ranges, server.breaks_after = ranges, 300_000
    with pytest.raises(OSError, match="ended after 300000 of 1280000 bytes; call again"):
        download(server.url, tmp_path / "data", is_right(server))
    assert not (tmp_path / "data").exists()
    server.breaks_after = None
    download(server.url, tmp_path / "data", is_right(server))
    assert (tmp_path / "data").read_bytes() == DATA
    assert server.asked == [None, "bytes=300000-"]
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_all_bytes_were_there_already(server, tmp_path):
    (tmp_path / "data.part").write_bytes(DATA)
    download(server.url, tmp_path / "data", is_right(server))
    assert (tmp_path / "data").read_bytes() == DATA


def test_without_a_check_nothing_old_is_used(server, tmp_path):
    (tmp_path / "data.part").write_bytes(b"something else")
    download(server.url, tmp_path / "data")
    assert (tmp_path / "data").read_bytes() == DATA and server.asked == [None]


def test_what_does_not_pass_its_check_is_gone(server, tmp_path):
    (tmp_path / "data.part").write_bytes(b"of another file")
    with pytest.raises(ValueError, match="not the published file; nothing was kept"):
        download(server.url, tmp_path / "data", is_right(server))
    assert not list(tmp_path.iterdir())
    download(server.url, tmp_path / "data", is_right(server))
    assert (tmp_path / "data").read_bytes() == DATA


def test_one_process_at_a_time(server, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    with (tmp_path / "data.part").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(OSError, match="another process is downloading data"):
            download(server.url, tmp_path / "data", is_right(server))
    download(server.url, tmp_path / "data", is_right(server))
    assert (tmp_path / "data").read_bytes() == DATA
