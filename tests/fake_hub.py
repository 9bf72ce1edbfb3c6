"""A server that speaks enough of the hub's API to stage from it and push to it: `python -m tests.fake_hub FOLDER`.

FOLDER/models/OWNER/NAME and FOLDER/datasets/OWNER/NAME hold repositories. FOLDER/gated names one whose licence TOKEN
has accepted; while FOLDER/down is there, every answer is 503; FOLDER/torn names a file that is cut off half-way once,
FOLDER/wrong one that is served with other bytes, FOLDER/refuses tells why a card is refused. Files of more than 1000
bytes count as large. Every request is a line in FOLDER/requests, with `token` behind it if TOKEN came along; what is
pushed lands in FOLDER/pushed.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY

TOKEN = "hf_planted0123456789secret"
COMMIT = "c" * 40
_LARGE = 1000


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers for the repositories of one folder."""

    root: Path

    def do_GET(self) -> None:
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        with (self.root / "requests").open("a") as log:
            log.write(f"{self.command} {self.path}{' token' if known else ''}\n")
        kind, repository, rest = self._parts()
        folder = self.root / kind / repository
        if (self.root / "down").exists():
            self._answer(b"", 503)
        elif not folder.is_dir():
            self._answer(b"", 404, {"X-Error-Code": "RepoNotFound"})
        elif self._named("gated") == repository and not known:
            self._answer(b"", 403, {"X-Error-Code": "GatedRepo"})
        elif rest[:1] == ["resolve"]:
            self._file(folder, "/".join(rest[2:]))
        elif rest[:1] == ["tree"]:
            self._json([self._entry(folder, path) for path in sorted(folder.rglob("*")) if path.is_file()])
        elif rest[:1] == ["revision"] and rest[1] not in ("main", COMMIT):
            self._answer(b"", 404, {"X-Error-Code": "RevisionNotFound"})
        else:
            self._json({"id": repository, "sha": COMMIT, "siblings": []})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        body = self._body()
        with (self.root / "requests").open("a") as log:
            log.write(f"{self.command} {self.path}{' token' if known else ''}\n")
        if not known:
            self._answer(b"", 401)
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            seen = asked.get("visibility") or ("private" if asked.get("private") else "public")
            (self.root / "created").write_text(f"{name} {seen}")
            self._json({"url": f"http://{self.headers['Host']}/{name}"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self._json(
                {"files": [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in files]}
            )
        elif self.path == "/api/validate-yaml":
            refused = [{"message": self._named("refuses")}] if self._named("refuses") else []
            self._answer(json.dumps({"errors": refused, "warnings": []}).encode(), 400 if refused else 200)
        else:
            for line in body.splitlines():
                one = json.loads(line)
                if one["key"] == "file":
                    target = self.root / "pushed" / one["value"]["path"]
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(base64.b64decode(one["value"]["content"]))
            self._json(
                {
                    "commitUrl": f"http://{self.headers['Host']}/me/pushed/commit/{COMMIT}",
                    "commitOid": COMMIT,
                    "success": True,
                }
            )

    def _body(self) -> bytes:
        """What came with a request, in one piece or in chunks (RFC 9112)."""
        if self.headers["Content-Length"]:
            return self.rfile.read(int(self.headers["Content-Length"]))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        return body

    def _parts(self) -> tuple[str, str, list[str]]:
        words = self.path.partition("?")[0].strip("/").split("/")
        kind = "models"
        if words[0] == "api":
            kind, words = words[1], words[2:]
        elif words[0] == "datasets":
            kind, words = words[0], words[1:]
        return kind, "/".join(words[:2]), words[2:]

    def _named(self, name: str) -> str:
        path = self.root / name
        return path.read_text() if path.exists() else ""

    def _entry(self, folder: Path, path: Path) -> dict[str, Any]:
        content = path.read_bytes()
        name = str(path.relative_to(folder))
        entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
        if len(content) > _LARGE:
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 1}
        return entry

    def _file(self, folder: Path, name: str) -> None:
        path = folder / name
        if not path.is_file():
            self._answer(b"", 404, {"X-Error-Code": "EntryNotFound"})
            return
        content = path.read_bytes()
        etag = hashlib.sha256(content).hexdigest()
        if self._named("wrong") == name:
            content = content[::-1]
        cut = self.command == "GET" and self._named("torn") == name
        if cut:
            (self.root / "torn").unlink()
        self._answer(content, 200, {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'}, cut)

    def _json(self, value: Any) -> None:
        self._answer(json.dumps(value).encode())

    def _answer(
        self, content: bytes, code: int = 200, headers: dict[str, str] | None = None, cut: bool = False
    ) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
            if cut:
                self.wfile.flush()
                self.server.shutdown_request(self.request)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@contextlib.contextmanager
def serving(root: Path, private: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Start the server; HF_ENDPOINT names it, and token and cache are those of a user who has neither."""
    root.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.fake_hub", root]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    assert server.stdout
    monkeypatch.setenv("HF_ENDPOINT", server.stdout.readline().strip())
    monkeypatch.setenv("HF_TOKEN_PATH", str(private / "token"))
    monkeypatch.setenv("HF_HUB_CACHE", str(private / "private cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(private / "token"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield
    server.kill()
    server.wait()


if __name__ == "__main__":
    Handler.root = Path(sys.argv[1])
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.request_queue_size = 128
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
