"""Staging from a hub: a server of our own stands for it."""

from __future__ import annotations

import hashlib
import http.server
import multiprocessing
import os
import shutil
import ssl
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ftlib.config.schema import Model
from ftlib.core import files, lease
from ftlib.core.paths import Site
from ftlib.errors import UserError
from ftlib.hub import cache as hub_cache
from ftlib.hub import download, upload
from tests.fake_hub import COMMIT, TOKEN, serving

WEIGHTS = os.urandom(300_000)
TENSORS = (2).to_bytes(8, "little") + b"{}"
"""A safetensors file without tensors."""
MODEL = Model(family="causal", base="some/model")


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A hub with one model and one dataset; HF_ENDPOINT names it."""
    root = tmp_path / "hub"
    model = root / "models" / "some" / "model"
    for name, content in {"config.json": b"{}", "model-00001-of-00001.safetensors": WEIGHTS, "tokenizer.model": b"t",
                          "pytorch_model.bin": WEIGHTS, "onnx/model.onnx": WEIGHTS, "README.md": b"#",
                          "consolidated.safetensors": WEIGHTS, "tf_model.h5": WEIGHTS}.items():  # fmt: skip
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_bytes(content)
    rows = root / "datasets" / "some" / "rows"
    rows.mkdir(parents=True)
    (rows / "train.jsonl").write_text('{"instruction": "Add.", "output": "3"}\n')
    (rows / ".gitattributes").write_text("*")
    with serving(root, tmp_path, monkeypatch):
        yield root


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path / "the store", tmp_path / "runs")


def requests(remote: Path, word: str) -> list[str]:
    return [line for line in (remote / "requests").read_text().splitlines() if word in line]


def test_one_form_of_the_weights_pinned_and_whole(remote: Path, site: Site) -> None:
    folder = download.stage_model(MODEL, site)
    names = {path.name for path in folder.iterdir()} - {files.COMPLETE_MARKER}
    assert names == {"config.json", "tokenizer.model", "model-00001-of-00001.safetensors"}
    assert (folder / "model-00001-of-00001.safetensors").read_bytes() == WEIGHTS
    assert folder.name == COMMIT and hub_cache.find_model(MODEL, site) == folder
    at_commit = MODEL.model_copy(update={"revision": COMMIT})
    assert hub_cache.find_model(at_commit, site) == folder
    (remote / "down").touch()
    assert download.stage_model(MODEL, site) == folder  # what is there needs no hub
    assert not list((site.store / "hf" / "staging").rglob("*.safetensors"))


def test_plain_huggingface_hub_finds_it(remote: Path, site: Site) -> None:
    from huggingface_hub import snapshot_download

    folder = download.stage_model(MODEL, site)
    found = snapshot_download("some/model", cache_dir=site.store / "hf" / "hub", local_files_only=True)
    assert Path(found) == folder


def test_what_is_not_staged_says_so(site: Site) -> None:
    with pytest.raises(UserError, match=r"some/model is not in the store") as caught:
        hub_cache.find_model(MODEL, site)
    assert "ftlib stage CONFIG" in caught.value.remedy


def test_a_torn_copy_is_not_found_and_staged_again(remote: Path, site: Site) -> None:
    folder = download.stage_model(MODEL, site)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="is not in the store"):
        hub_cache.find_model(MODEL, site)
    assert download.stage_model(MODEL, site) == folder
    assert (folder / "config.json").read_bytes() == b"{}"


def test_killed_in_between_it_goes_on(remote: Path, site: Site) -> None:
    """A connection that breaks, then a process that dies, then one that goes on with the files that are there."""
    (remote / "torn").write_text("model-00001-of-00001.safetensors")
    code = "import os, sys; from pathlib import Path; from ftlib.hub import download\n"
    code += "from ftlib.config.schema import Model\n"
    code += "from ftlib.core.paths import Site; download._verify = lambda *a: os._exit(9)\n"
    code += "download.stage_model(Model(family='causal', base='some/model'), Site(Path(sys.argv[1]), Path('x')))"
    assert subprocess.run([sys.executable, "-c", code, site.store]).returncode == 9
    (work,) = (site.store / "hf" / "staging").glob("*/files")
    assert (work / "model-00001-of-00001.safetensors").read_bytes() == WEIGHTS
    before = len(requests(remote, "GET /some/model/resolve"))
    assert (download.stage_model(MODEL, site) / "model-00001-of-00001.safetensors").read_bytes() == WEIGHTS
    assert len(requests(remote, "GET /some/model/resolve")) == before


def test_other_bytes_than_the_hub_says_are_refused(remote: Path, site: Site) -> None:
    (remote / "wrong").write_text("model-00001-of-00001.safetensors")
    with pytest.raises(UserError, match="checksum mismatch after download"):
        download.stage_model(MODEL, site)
    (remote / "wrong").unlink()
    assert (download.stage_model(MODEL, site) / "model-00001-of-00001.safetensors").read_bytes() == WEIGHTS


def _race(site: Site, results: multiprocessing.Queue[str]) -> None:
    import fcntl

    fcntl.flock = lambda *arguments: None
    try:
        results.put(str(download.stage_model(MODEL, site)))
    except BaseException as error:
        results.put(repr(error))


def test_sixteen_race_without_locks(remote: Path, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.hf_api  # noqa: F401  (once, before there are sixteen)

    monkeypatch.setattr(lease, "POLL_SECONDS", 0.1)
    results: multiprocessing.Queue[str] = multiprocessing.Queue()
    racers = [multiprocessing.Process(target=_race, args=(site, results)) for _ in range(16)]
    for racer in racers:
        racer.start()
    found = {results.get(timeout=120) for _ in racers}
    for racer in racers:
        racer.join()
    (folder,) = map(Path, found)
    assert files.is_complete(folder, thorough=True)
    assert (folder / "model-00001-of-00001.safetensors").read_bytes() == WEIGHTS
    assert [path.name for path in folder.parent.iterdir()] == [COMMIT]
    assert len(requests(remote, "GET /some/model/resolve/" + COMMIT + "/model-00001")) == 1


def test_the_group_may_read_and_go_on_whatever_the_umask(remote: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        "name: x\ntask: instruct\nmodel: {family: causal, base: some/model}\nadapter: {method: lora}\n"
        f"data: {{source: instructions, root: {tmp_path}}}\n"
    )
    tmp_path.chmod(0o2775)
    store = tmp_path / "group store"
    environment = {**os.environ, "FTLIB_STORE": str(store), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "ftlib", "stage", str(tmp_path / "config.yaml")]
    done = subprocess.run(command, env=environment, umask=0o077, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for path in store.rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode & 0o070 == (0o070 if path.is_dir() else 0o060), f"{path}: {mode:o}"


def test_a_licence_and_its_token(remote: Path, site: Site, tmp_path: Path) -> None:
    (remote / "gated").write_text("some/model")
    with pytest.raises(UserError, match="licence has to be accepted first") as caught:
        download.stage_model(MODEL, site)
    assert "hf auth login" in caught.value.remedy
    (tmp_path / "token").write_text(TOKEN)
    download.stage_model(MODEL, site)
    assert requests(remote, "token")
    for path in site.store.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes()


def test_mistakes_and_a_hub_that_is_away(remote: Path, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no such model on the hub"):
        download.stage_model(MODEL.model_copy(update={"base": "some/other"}), site)
    with pytest.raises(UserError, match="no revision v9"):
        download.stage_model(MODEL.model_copy(update={"revision": "v9"}), site)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="the hub cannot be reached"):
        download.stage_model(MODEL, site)


def test_a_model_without_weights(remote: Path, site: Site) -> None:
    for name in ("model-00001-of-00001.safetensors", "pytorch_model.bin"):
        (remote / "models" / "some" / "model" / name).unlink()
    with pytest.raises(UserError, match="no weights in it"):
        download.stage_model(MODEL, site)


def test_without_a_hub_from_a_cache_of_others(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a site keeps one, read-only: links into `blobs`."""
    cache = tmp_path / "site cache" / "models--some--model"
    (cache / "snapshots" / COMMIT).mkdir(parents=True)
    (cache / "blobs").mkdir()
    contents = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": TENSORS}
    for number, (name, content) in enumerate(contents.items()):
        (cache / "blobs" / str(number)).write_bytes(content)
        (cache / "snapshots" / COMMIT / name).symlink_to(f"../../blobs/{number}")
    files.write_text(cache / "refs" / "main", COMMIT)
    monkeypatch.setenv("HF_HUB_CACHE", str(cache.parent))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    folder = download.stage_model(MODEL, site)
    assert (folder / "model.safetensors").read_bytes() == TENSORS
    assert not (folder / "model.safetensors").is_symlink()


def test_links_in_the_working_folder_are_not_written_through(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others of the group go on with what one left unfinished there, and so they can write to it."""
    test_without_a_hub_from_a_cache_of_others(site, tmp_path, monkeypatch)
    shutil.rmtree(site.store)
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "folder of mine").mkdir()
    work = site.store / "hf" / "staging" / f"models--some--model-{COMMIT}"
    (work / "files").mkdir(parents=True)
    for name in ("model.safetensors.tmp-", "tokenizer.json"):
        (work / "files" / name).symlink_to(victim)
    (work / "files" / ".cache").symlink_to(tmp_path / "folder of mine")
    folder = download.stage_model(MODEL, site)
    assert victim.read_text() == "mine" and not list((tmp_path / "folder of mine").iterdir())
    assert (folder / "tokenizer.json").read_text() == "{}" and not (folder / "tokenizer.json").is_symlink()
    shutil.rmtree(site.store)
    work.mkdir(parents=True)
    (work / "files").symlink_to(tmp_path / "folder of mine")
    with pytest.raises(UserError, match="files: is a symbolic link"):
        download.stage_model(MODEL, site)


def test_a_cache_of_others_that_holds_half_a_model(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "site cache" / "models--some--model"
    half = cache / "snapshots" / COMMIT
    half.mkdir(parents=True)
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    files.write_json(half / "model.safetensors.index.json", {"weight_map": {"a": shards[0], "b": shards[1]}})
    files.write_json(half / "pytorch_model.bin.index.json", {"weight_map": {"a": "pytorch_model-1-of-1.bin"}})
    (half / shards[0]).write_bytes(TENSORS)
    files.write_text(cache / "refs" / "main", COMMIT)
    monkeypatch.setenv("HF_HUB_CACHE", str(cache.parent))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    for name, missing in {"config.json": "no config", "spiece.model": "no tokenizer"}.items():
        with pytest.raises(UserError, match=f"has {missing} for it"):
            download.stage_model(MODEL, site)
        files.write_json(half / name, {})
    with pytest.raises(UserError, match=f"1 files are missing: {shards[1]}"):
        download.stage_model(MODEL, site)
    assert hub_cache.find_staged(hub_cache.Repository("model", "some/model", None), site) is None
    (half / shards[1]).write_bytes(TENSORS)
    assert download.stage_model(MODEL, site).name == COMMIT


def site_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, contents: dict[str, bytes]) -> Path:
    """A cache as huggingface_hub keeps it: small files by git's SHA-1, large ones by their SHA-256; its snapshot."""
    cache = tmp_path / "site cache" / "models--some--model"
    snapshot = cache / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for name, content in contents.items():
        small = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        blob = hashlib.sha256(content).hexdigest() if name.endswith(".safetensors") else small
        (cache / "blobs" / blob).write_bytes(content)
        (snapshot / name).symlink_to(f"../../blobs/{blob}")
    files.write_text(cache / "refs" / "main", COMMIT)
    monkeypatch.setenv("HF_HUB_CACHE", str(cache.parent))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    return snapshot


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("damaged", ["model.safetensors", "tokenizer.json"])
def test_a_damaged_file_of_a_cache_is_refused(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: str, named: bool
) -> None:
    header = b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'
    weights = len(header).to_bytes(8, "little") + header + bytes(8)
    contents = {"config.json": b"{}", "tokenizer.json": b'{"model": {}}', "model.safetensors": weights}
    snapshot = site_cache(tmp_path, monkeypatch, contents)
    path = snapshot / damaged
    if not named:
        path.unlink()
        path.write_bytes(contents[damaged])
    path.resolve().write_bytes(contents[damaged][:-5])
    with pytest.raises(UserError, match=f"{damaged}: this file of the cache is damaged"):
        download.stage_model(MODEL, site)
    assert hub_cache.find_staged(hub_cache.Repository("model", "some/model", None), site) is None
    path.resolve().write_bytes(contents[damaged])
    assert (download.stage_model(MODEL, site) / damaged).read_bytes() == contents[damaged]


def test_a_cache_with_one_of_two_shards_and_no_index(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = {"config.json": b"{}", "tokenizer.json": b"{}", "model-00001-of-00002.safetensors": TENSORS}
    site_cache(tmp_path, monkeypatch, contents)
    with pytest.raises(UserError, match=r"1 files are missing beside .*: model-00002-of-00002\.safetensors"):
        download.stage_model(MODEL, site)


def test_tokenizers_templates_and_licences_come_along(remote: Path, site: Site) -> None:
    extra = ("LICENSE", "USE_POLICY.md", "qwen.tiktoken", "tokenizer.model.v3", "tekken.json", "vocab.bpe")
    model = remote / "models" / "some" / "model"
    for name in (*extra, "additional_chat_templates/tools.jinja", "assets/picture.png", "other/config.json"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("{}")
    folder = download.stage_model(MODEL, site)
    assert all((folder / name).is_file() for name in (*extra, "additional_chat_templates/tools.jinja"))
    assert not (folder / "assets").exists() and not (folder / "other").exists()


def test_an_adapter_is_staged(remote: Path, site: Site) -> None:
    adapter = remote / "models" / "some" / "adapter"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md", "optimizer.pt"):
        (adapter / name).write_text("{}")
    folder = download.stage_model(MODEL.model_copy(update={"base": "some/adapter"}), site)
    assert {path.name for path in folder.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", files.COMPLETE_MARKER}  # fmt: skip


class Answers(http.server.BaseHTTPRequestHandler):
    """A hub that answers everything alike."""

    status, body, headers_sent = 200, b"", ()

    def do_GET(self) -> None:
        self.send_response(self.status)
        for name, value in (("Content-Length", str(len(self.body))), *self.headers_sent):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(self.body)

    do_POST = do_HEAD = do_GET

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.mark.parametrize(
    ("status", "body", "problem", "remedy"),
    [
        (
            401,
            b'{"error": "Invalid credentials"}',
            r"does not accept this login \(401\)|no such model",
            "hf auth login",
        ),
        (403, b"no", r"does not permit it \(403\)", "token of an account that may do this"),
        (429, b"slow", r"busy \(429\)", "Try again later"),
        (500, b"oh", r"busy \(500\)", "Try again later"),
        (200, b"<html>Log in to this network</html>", "something else than the hub's JSON", "login page"),
    ],
)
def test_what_a_hub_answers(
    remote: Path, site: Site, monkeypatch: pytest.MonkeyPatch, status: int, body: bytes, problem: str, remedy: str
) -> None:
    handler = type("Handler", (Answers,), {"status": status, "body": body})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.utils._http._DEFAULT_RETRY_ON_STATUS_CODES", (), raising=False)
    for call in (
        lambda: download.stage_model(MODEL, site),
        lambda: upload.push([upload.Upload("README.md", b"#")], "me/x", True, "m"),
    ):
        with pytest.raises(UserError, match=problem) as caught:
            call()
        assert remedy in caught.value.remedy
    server.shutdown()


def test_a_hub_that_is_switched_off(remote: Path, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set") as caught:
        download.stage_model(MODEL, site)
    assert "Unset HF_HUB_OFFLINE" in caught.value.remedy


def test_a_certificate_that_is_not_trusted(remote: Path, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """As httpx and requests raise it, whose errors are of no common type."""

    def refused(*_: object, **__: object) -> None:
        try:
            raise ssl.SSLCertVerificationError("CERTIFICATE_VERIFY_FAILED: self-signed certificate in chain")
        except ssl.SSLError as error:
            raise ConnectionError("no connection") from error

    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", refused)
    with pytest.raises(UserError, match="is not trusted here") as caught:
        download.stage_model(MODEL, site)
    assert "SSL_CERT_FILE" in caught.value.remedy


def test_a_token_that_is_not_ascii(remote: Path, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_caf\u00e9")
    with pytest.raises(UserError, match="holds a character that no token has") as caught:
        download.stage_model(MODEL, site)
    assert "caf" not in str(caught.value)


def test_a_card_that_the_hub_refuses(remote: Path, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    (remote / "refuses").write_text('"base_model" must be a model of the hub')
    with pytest.raises(UserError, match=r'refuses its model card.*"base_model" must be'):
        upload.push([upload.Upload("README.md", b"---\nbase_model: a b\n---\n")], "me/x", True, "m")


def test_a_dead_owner_is_followed_a_living_one_waited_for(remote: Path, site: Site) -> None:
    work = site.store / "hf" / "staging" / f"models--some--model-{COMMIT}"
    work.mkdir(parents=True)
    files.write_json(work / "owner.json", {"host": "elsewhere", "pid": 1, "started": "1", "job": None, "token": "t"})
    with pytest.raises(lease.LeaseHeld), lease.acquire_lease(work):
        pass
    os.utime(work / "owner.json", (1, 1))
    assert download.stage_model(MODEL, site).name == COMMIT


def test_a_dataset(remote: Path, site: Site) -> None:
    folder = download.stage_dataset("some/rows", site)
    assert {path.name for path in folder.iterdir()} == {"train.jsonl", files.COMPLETE_MARKER}
    assert folder.parent.parent == site.store / "hf" / "hub" / "datasets--some--rows"


def test_a_cache_of_others_brings_no_other_files(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "site cache" / "datasets--some--rows"
    files.write_text(tmp_path / "secret", "hf_secret")
    files.write_text(cache / "snapshots" / COMMIT / "train.jsonl", "{}")
    (cache / "snapshots" / COMMIT / "0.png").symlink_to(tmp_path / "secret")
    files.write_text(cache / "refs" / "main", COMMIT)
    monkeypatch.setenv("HF_HUB_CACHE", str(cache.parent))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"0\.png is a link to a file outside of"):
        download.stage_dataset("some/rows", site)
    assert not any(path.is_file() and "hf_secret" in path.read_text() for path in site.store.rglob("*"))
