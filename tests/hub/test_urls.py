"""Images by URL: what is refused, what a request contains, and what is kept. The server runs in the test."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ftlib.config.schema import Data
from ftlib.data.example import Example, InvalidRecord
from ftlib.data.sources.image_references import name_of_url, stage_urls
from ftlib.data.sources.registry import iter_examples
from ftlib.errors import UserError
from ftlib.hub.urls import DownloadError, download, is_public, without_query

CERTIFICATE = Path(__file__).parent / "certificates" / "images.test.pem"
"""A certificate of images.test and other.test with its key, signed by itself, valid from 2020 to 2120."""


def picture() -> bytes:
    made = io.BytesIO()
    Image.new("RGB", (5, 4), "red").save(made, "PNG")
    return made.getvalue()


class Server(ThreadingHTTPServer):
    """Answers by path; keeps the requests."""

    seen: list[tuple[str, dict[str, str]]]

    @property
    def url(self) -> str:
        return f"https://images.test:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:  # the name is http.server's
        self.server.seen.append((self.path, dict(self.headers)))
        path, _, query = self.path.partition("?")
        if path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", query)
            self.end_headers()
            return
        if path == "/slow.png":
            self.wfile.write(b"HTTP/1.1 200 OK\r\n")
            with contextlib.suppress(OSError):
                while True:
                    time.sleep(0.05)
                    self.wfile.write(b"X: y\r\n")
            return
        if path == "/trickle.png":
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                while True:
                    time.sleep(0.05)
                    self.wfile.write(b"x")
            return
        body = {"/a.png": picture(), "/long.png": picture() * 50, "/text.png": b"hello"}.get(path)
        self.send_response(200 if body else 404)
        if path != "/long.png":
            self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server(("127.0.0.1", 0), Handler)
    made.seen = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE)
    made.socket = context.wrap_socket(made.socket, server_side=True)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


PUBLIC = "93.184.216.34"


@pytest.fixture
def fetch(server: Server, monkeypatch: pytest.MonkeyPatch) -> Callable[..., bytes]:
    """`download`, for which the names are hosts with public addresses; connections to these reach the server."""
    plain, hosts = socket.create_connection, {"images.test": [PUBLIC], "other.test": [PUBLIC, "10.0.0.7"]}

    def connect(address: tuple[str, int], *words: Any, **named: Any) -> socket.socket:
        assert address[0] == PUBLIC, "a connection to an address that was not checked"
        return plain(("127.0.0.1", address[1]), *words, **named)

    monkeypatch.setattr("ftlib.hub.urls.socket.create_connection", connect)
    context = ssl.create_default_context(cafile=str(CERTIFICATE))
    return partial(download, resolve=lambda host, port: hosts.get(host, [host]), context=context)


def test_a_request_contains_no_secrets(
    server: Server, fetch: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecretsecret")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    assert fetch(f"{server.url}/a.png?signature=1 2", 10**6) == picture()
    ((path, headers),) = server.seen
    assert path == "/a.png?signature=1%202"
    assert headers.keys() == {"Host", "User-Agent", "Accept", "Accept-Encoding", "Connection"}
    assert "secret" not in str(headers)


def test_redirects_are_followed(server: Server, fetch: Callable[..., bytes]) -> None:
    assert fetch(f"{server.url}/to/x?/a.png", 10**6) == picture()


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("http://images.test/a.png", "only https URLs are downloaded"),
        ("https://10.1.2.3/a.png?key=secret", "10.1.2.3 is not a host of the public internet"),
        ("https://other.test/a.png?key=secret", "other.test is not a host of the public internet"),
        ("https://169.254.169.254/latest/meta-data", "not a host of the public internet"),
        ("https://[::1]/a.png", "not a host of the public internet"),
        ("https://me:secret@images.test/a.png", "with a user name or password"),
        ("/to/x?/to/x", "redirects"),
        ("/none.png?key=secret", "answer 404"),
        ("/long.png", "larger than 1,000 bytes"),
        ("https://images.test:99999/a.png", "cannot be downloaded"),
        ("https://[/a.png?key=secret", "cannot be downloaded"),
    ],
)
def test_what_is_refused_directly_and_after_a_redirect(
    server: Server, fetch: Callable[..., bytes], target: str, reason: str
) -> None:
    direct = f"{server.url}{target}" if target.startswith("/") else target
    for url in (direct, f"{server.url}/to/x?{target}"):
        with pytest.raises(DownloadError) as error:
            fetch(url, 1000)
        if "/to/x?/to/x" not in url:
            assert reason in str(error.value)
        assert "secret" not in str(error.value) and "?" not in str(error.value)


@pytest.mark.parametrize("name", ["slow.png", "trickle.png"])
def test_a_server_that_never_ends(
    server: Server, fetch: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Neither in its headers, which no timeout of a read ends, nor in its content."""
    monkeypatch.setattr("ftlib.hub.urls.SECONDS", 0.3)
    start = time.monotonic()
    with pytest.raises(DownloadError, match=r"not complete after 0\.3 s"):
        fetch(f"{server.url}/{name}", 10**6)
    assert time.monotonic() - start < 10


def test_a_server_that_never_ends_the_handshake(monkeypatch: pytest.MonkeyPatch) -> None:
    """It sends the first record of TLS byte by byte, so that every read gets something in time."""
    monkeypatch.setattr("ftlib.hub.urls.SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def drip() -> None:
            connected, _ = listening.accept()
            with connected, contextlib.suppress(OSError):
                connected.sendall(b"\x16\x03\x03\x3f\xff\x02\x00\x3f\xfb")
                for _ in range(60):
                    time.sleep(0.05)
                    connected.sendall(b"\x03")

        threading.Thread(target=drip, daemon=True).start()
        start = time.monotonic()
        with pytest.raises(DownloadError, match=r"not complete after 0\.3 s"):
            download(
                f"https://images.test:{listening.getsockname()[1]}/a.png",
                1000,
                resolve=lambda host, port: ["127.0.0.1"],
                is_allowed=lambda address: True,
            )
        assert time.monotonic() - start < 2


def test_another_address_is_tried(server: Server, fetch: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    reached = socket.create_connection

    def connect(address: tuple[str, int], *words: Any, **named: Any) -> socket.socket:
        if ":" in address[0]:
            raise OSError("no route")
        return reached(address, *words, **named)

    monkeypatch.setattr("ftlib.hub.urls.socket.create_connection", connect)
    assert fetch(f"{server.url}/a.png", 10**6, resolve=lambda host, port: ["2606:4700::1111", PUBLIC]) == picture()


def test_a_server_with_another_certificate(server: Server, fetch: Callable[..., bytes]) -> None:
    with pytest.raises(DownloadError, match="SSLCertVerificationError"):
        fetch(f"{server.url}/a.png", 1000, context=ssl.create_default_context())
    with pytest.raises(DownloadError, match="SSLCertVerificationError"):
        fetch(f"https://wrong.test:{server.server_port}/a.png", 1000, resolve=lambda host, port: [PUBLIC])


@pytest.mark.parametrize(
    ("address", "public"),
    [
        (PUBLIC, True), ("2606:4700::1111", True), ("127.0.0.1", False), ("10.0.0.1", False), ("100.64.0.1", False),
        ("169.254.169.254", False), ("0.0.0.0", False), ("224.0.0.1", False), ("::1", False), ("fe80::1%eth0", False),
        ("fd00::1", False), ("::ffff:10.0.0.1", False), ("64:ff9b::a00:1", False), ("2002:a00:1::1", False),
        ("::", False), ("192.168.1.1", False), ("172.16.0.1", False), ("::127.0.0.1", False),
        ("::ffff:0:10.0.0.1", False), ("fec0::1", False), ("64:ff9b:1::a00:1", False), ("3fff::1", False),
    ],
)  # fmt: skip
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(address) == public


@pytest.mark.parametrize(
    "host", ["2130706433", "0x7f.1", "127.1", "0", "localhost", "[::ffff:127.0.0.1]", "127.0.0.1."]
)
def test_other_names_of_this_machine(host: str) -> None:
    with pytest.raises(DownloadError, match=r"not a host of the public internet|cannot be downloaded \(gaierror\)"):
        download(f"https://{host}:1/a.png", 1000)


def test_urls_in_messages() -> None:
    assert without_query("https://me:pw@host:8/a/b.png?key=1#x") == "https://host:8/a/b.png"
    assert without_query("https://me@[2606:4700::1111]:8/a.png?key=1") == "https://[2606:4700::1111]:8/a.png"
    assert without_query("https://[/") == "(not a URL)"


def rows_of(data: Data) -> list[Example | InvalidRecord]:
    return list(iter_examples(data))


def test_staging(tmp_path: Path, server: Server, fetch: Callable[..., bytes]) -> None:
    """Images are stored once, with their SHA-256 and without the query string; only staging downloads them."""
    url = f"{server.url}/a.png?signature=secret"
    part = {"type": "image_url", "image_url": {"url": url}}
    turns = [{"role": "user", "content": [part, {"type": "text", "text": "q"}]}, {"role": "assistant", "content": "a"}]
    (tmp_path / "data.jsonl").write_text(json.dumps({"messages": turns}) + "\n" + json.dumps({"messages": turns}))
    data = Data(source="instructions", root=str(tmp_path), prompt="chat", allow_urls=True)
    assert all(isinstance(row, InvalidRecord) and "ftlib stage" in row.reason for row in rows_of(data))
    for _ in range(2):
        assert stage_urls(data, lambda: rows_of(data), fetch) == 1
    assert len(server.seen) == 1
    found = rows_of(data)
    assert [row.image for row in found if isinstance(row, Example)] == [name_of_url(url)] * 2
    image = tmp_path / name_of_url(url)
    known = json.loads((tmp_path / f"{name_of_url(url)}.json").read_text())
    assert image.read_bytes() == picture()
    assert known == {
        "url": f"{server.url}/a.png", "sha256": hashlib.sha256(picture()).hexdigest(), "bytes": len(picture())
    }  # fmt: skip
    written = [path for path in (tmp_path / ".images").rglob("*") if path.is_file()]
    assert len(written) == 2 and not any(b"secret" in path.read_bytes() for path in written)
    assert "secret" not in str([row.facts for row in found if isinstance(row, Example)])
    image.write_bytes(b"changed")
    stage_urls(data, lambda: rows_of(data), fetch)
    assert image.read_bytes() == picture()
    closed = data.model_copy(update={"allow_urls": False})
    assert all(isinstance(row, InvalidRecord) and "data.allow_urls: true" in row.reason for row in rows_of(closed))


def test_what_is_no_image_or_too_large_is_not_kept(tmp_path: Path, server: Server, fetch: Callable[..., bytes]) -> None:
    row = {"prefix": "q", "suffix": "a"}
    names = ("text.png?x=secret", "none.png")
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps({"image": f"{server.url}/{n}", **row}) for n in names))
    data = Data(source="jsonl", root=str(tmp_path), allow_urls=True)
    with pytest.raises(UserError) as error:
        stage_urls(data, lambda: rows_of(data), fetch)
    assert "text.png: " in str(error.value) and "none.png: answer 404" in str(error.value)
    assert "secret" not in str(error.value) and not list((tmp_path / ".images").rglob("*.png*"))
    assert not [path for path in (tmp_path / ".images").rglob("*") if path.is_file()]
    skipping = data.model_copy(update={"on_bad": "skip"})
    assert stage_urls(skipping, lambda: rows_of(data), fetch) == 2
