"""Staging from a hub: a server of our own stands for it."""

from __future__ import annotations

import multiprocessing
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ftlib import files, hub, once, ownership, staging
from ftlib.config import Model
from ftlib.errors import UserError
from ftlib.site import Site
from tests.fake_hub import COMMIT, TOKEN, serving

WEIGHTS = os.urandom(300_000)
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
    folder = staging.stage_model(MODEL, site)
    names = {path.name for path in folder.iterdir()} - {files.MARKER}
    assert names == {"config.json", "tokenizer.model", "model-00001-of-00001.safetensors"}
    assert (folder / "model-00001-of-00001.safetensors").read_bytes() == WEIGHTS
    assert folder.name == COMMIT and hub.find_model(MODEL, site) == folder
    at_commit = MODEL.model_copy(update={"revision": COMMIT})
    assert hub.find_model(at_commit, site) == folder
    (remote / "down").touch()
    assert staging.stage_model(MODEL, site) == folder  # what is there needs no hub
    assert not list((site.store / "hf" / "staging").rglob("*.safetensors"))


def test_plain_huggingface_hub_finds_it(remote: Path, site: Site) -> None:
    from huggingface_hub import snapshot_download

    folder = staging.stage_model(MODEL, site)
    found = snapshot_download("some/model", cache_dir=site.store / "hf" / "hub", local_files_only=True)
    assert Path(found) == folder


def test_what_is_not_staged_says_so(site: Site) -> None:
    with pytest.raises(UserError, match=r"some/model is not in the store") as caught:
        hub.find_model(MODEL, site)
    assert "ftlib stage CONFIG" in caught.value.remedy


def test_a_torn_copy_is_not_found_and_staged_again(remote: Path, site: Site) -> None:
    folder = staging.stage_model(MODEL, site)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="is not in the store"):
        hub.find_model(MODEL, site)
    assert staging.stage_model(MODEL, site) == folder
    assert (folder / "config.json").read_bytes() == b"{}"


def test_killed_in_between_it_goes_on(remote: Path, site: Site) -> None:
    """A connection that breaks, then a process that dies, then one that goes on with the files that are there."""
    (remote / "torn").write_text("model-00001-of-00001.safetensors")
    code = "import os, sys; from pathlib import Path; from ftlib import staging; from ftlib.config import Model\n"
    code += "from ftlib.site import Site; staging._verify = lambda *a: os._exit(9)\n"
    code += "staging.stage_model(Model(family='causal', base='some/model'), Site(Path(sys.argv[1]), Path('x')))"
    assert subprocess.run([sys.executable, "-c", code, site.store]).returncode == 9
    (work,) = (site.store / "hf" / "staging").glob("*/files")
    assert (work / "model-00001-of-00001.safetensors").read_bytes() == WEIGHTS
    before = len(requests(remote, "GET /some/model/resolve"))
    assert (staging.stage_model(MODEL, site) / "model-00001-of-00001.safetensors").read_bytes() == WEIGHTS
    assert len(requests(remote, "GET /some/model/resolve")) == before


def test_other_bytes_than_the_hub_says_are_refused(remote: Path, site: Site) -> None:
    (remote / "wrong").write_text("model-00001-of-00001.safetensors")
    with pytest.raises(UserError, match="is not what the hub holds"):
        staging.stage_model(MODEL, site)
    (remote / "wrong").unlink()
    assert (staging.stage_model(MODEL, site) / "model-00001-of-00001.safetensors").read_bytes() == WEIGHTS


def _race(site: Site, results: multiprocessing.Queue[str]) -> None:
    import fcntl

    fcntl.flock = lambda *arguments: None
    try:
        results.put(str(staging.stage_model(MODEL, site)))
    except BaseException as error:
        results.put(repr(error))


def test_sixteen_race_without_locks(remote: Path, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.hf_api  # noqa: F401  (once, before there are sixteen)

    monkeypatch.setattr(once, "POLL_SECONDS", 0.1)
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
        staging.stage_model(MODEL, site)
    assert "hf auth login" in caught.value.remedy
    (tmp_path / "token").write_text(TOKEN)
    staging.stage_model(MODEL, site)
    assert requests(remote, "token")
    for path in site.store.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes()


def test_mistakes_and_a_hub_that_is_away(remote: Path, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no such model on the hub"):
        staging.stage_model(MODEL.model_copy(update={"base": "some/other"}), site)
    with pytest.raises(UserError, match="no revision v9"):
        staging.stage_model(MODEL.model_copy(update={"revision": "v9"}), site)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="the hub cannot be reached"):
        staging.stage_model(MODEL, site)


def test_a_model_without_weights(remote: Path, site: Site) -> None:
    for name in ("model-00001-of-00001.safetensors", "pytorch_model.bin"):
        (remote / "models" / "some" / "model" / name).unlink()
    with pytest.raises(UserError, match="no weights in it"):
        staging.stage_model(MODEL, site)


def test_without_a_hub_from_a_cache_of_others(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a site keeps one, read-only: links into `blobs`."""
    cache = tmp_path / "site cache" / "models--some--model"
    (cache / "snapshots" / COMMIT).mkdir(parents=True)
    (cache / "blobs").mkdir()
    for number, name in enumerate(("config.json", "tokenizer.json", "model.safetensors")):
        (cache / "blobs" / str(number)).write_bytes(name.encode())
        (cache / "snapshots" / COMMIT / name).symlink_to(f"../../blobs/{number}")
    files.write_text(cache / "refs" / "main", COMMIT)
    monkeypatch.setenv("HF_HUB_CACHE", str(cache.parent))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    folder = staging.stage_model(MODEL, site)
    assert (folder / "model.safetensors").read_text() == "model.safetensors"
    assert not (folder / "model.safetensors").is_symlink()


def test_a_cache_of_others_that_holds_half_a_model(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "site cache" / "models--some--model"
    half = cache / "snapshots" / COMMIT
    half.mkdir(parents=True)
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    files.write_json(half / "model.safetensors.index.json", {"weight_map": {"a": shards[0], "b": shards[1]}})
    files.write_json(half / "pytorch_model.bin.index.json", {"weight_map": {"a": "pytorch_model-1-of-1.bin"}})
    (half / shards[0]).write_bytes(b"weights")
    files.write_text(cache / "refs" / "main", COMMIT)
    monkeypatch.setenv("HF_HUB_CACHE", str(cache.parent))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    for name, missing in {"config.json": "no config", "spiece.model": "no tokenizer"}.items():
        with pytest.raises(UserError, match=f"holds {missing} of it"):
            staging.stage_model(MODEL, site)
        files.write_json(half / name, {})
    with pytest.raises(UserError, match=f"1 files are missing: {shards[1]}"):
        staging.stage_model(MODEL, site)
    assert hub.find_staged(hub.Repository("model", "some/model", None), site) is None
    (half / shards[1]).write_bytes(b"weights")
    assert staging.stage_model(MODEL, site).name == COMMIT


def test_a_dead_owner_is_followed_a_living_one_waited_for(remote: Path, site: Site) -> None:
    work = site.store / "hf" / "staging" / f"models--some--model-{COMMIT}"
    work.mkdir(parents=True)
    files.write_json(work / "owner.json", {"host": "elsewhere", "pid": 1, "started": "1", "job": None, "token": "t"})
    with pytest.raises(ownership.Occupied), ownership.owned(work):
        pass
    os.utime(work / "owner.json", (1, 1))
    assert staging.stage_model(MODEL, site).name == COMMIT


def test_a_dataset(remote: Path, site: Site) -> None:
    folder = staging.stage_dataset("some/rows", site)
    assert {path.name for path in folder.iterdir()} == {"train.jsonl", files.MARKER}
    assert folder.parent.parent == site.store / "hf" / "hub" / "datasets--some--rows"
