"""Hashes of large files: computed once, again where a file differs; refused where the content of a base has changed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ftlib.config.schema import Model
from ftlib.core import files, hashes
from ftlib.core.paths import Site
from ftlib.errors import UserError
from ftlib.hub import cache
from ftlib.hub.download import stage_model
from tests.conftest import LORA

Ftlib = Callable[..., tuple[int, str, str]]
DIGEST = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
"""Of the word "test"."""


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are read to be hashed."""
    found: list[str] = []
    real = files.file_sha256

    def sha256(path: Path) -> str:
        found.append(path.name)
        return real(path)

    monkeypatch.setattr(files, "file_sha256", sha256)
    return found


def site_at(folder: Path) -> Site:
    return Site(folder / "store", folder / "runs")


def test_a_file_is_read_again_only_where_it_differs(tmp_path: Path, reads: list[str]) -> None:
    folder, site = tmp_path / "model", site_at(tmp_path)
    folder.mkdir()
    for name in ("a", "b"):
        (folder / name).write_text("test")
    for _ in range(2):
        assert hashes.hash_files(folder, ["a", "b"], site) == {"a": DIGEST, "b": DIGEST}
    assert sorted(reads) == ["a", "b"]
    (folder / "a").write_text("tost")
    os.utime(folder / "a", ns=(0, (folder / "b").stat().st_mtime_ns))
    (folder / "new").write_text("test")
    (folder / "new").rename(folder / "b")  # another inode
    again = hashes.hash_files(folder, ["a", "b"], site)
    assert again["a"] != DIGEST == again["b"] and sorted(reads) == ["a", "a", "b", "b"]


def test_a_store_that_was_moved_keeps_them_and_one_that_is_not_writable_does_without(
    tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "store" / "models").mkdir(parents=True)
    (tmp_path / "store" / "models" / "a").write_text("test")
    hashes.hash_files(tmp_path / "store" / "models", ["a"], site_at(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "store").rename(tmp_path / "elsewhere" / "store")
    moved = site_at(tmp_path / "elsewhere")
    hashes.hash_files(moved.store / "models", ["a"], moved)
    assert reads == ["a"]
    (moved.store / "models" / "b").write_text("test")

    def refuse(path: Path, value: object) -> None:
        raise UserError("not writable")

    monkeypatch.setattr(files, "write_json", refuse)
    assert hashes.hash_files(moved.store / "models", ["b"], moved) == {"b": DIGEST}


def test_a_hub_blobs_name_is_its_hash_until_the_file_changes(tmp_path: Path, reads: list[str]) -> None:
    blob = tmp_path / "blobs" / DIGEST
    blob.parent.mkdir()
    blob.write_text("test")
    snapshot = tmp_path / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to(blob)
    site = site_at(tmp_path)
    assert cache.model_hashes(snapshot, site) == {"model.safetensors": DIGEST} and not reads
    blob.write_text("changed in place")
    assert cache.model_hashes(snapshot, site) != {"model.safetensors": DIGEST} and reads == ["model.safetensors"]


def test_what_a_mirror_gives_is_compared_with_its_blobs_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror = tmp_path / "mirror" / "models--someone--model"
    commit = "a" * 40
    snapshot, blob = mirror / "snapshots" / commit, mirror / "blobs" / DIGEST
    for folder in (snapshot, blob.parent, mirror / "refs"):
        folder.mkdir(parents=True)
    (mirror / "refs" / "main").write_text(commit)
    for name in ("config.json", "tokenizer.json"):
        (snapshot / name).write_text("{}")
    blob.write_text("damaged")
    (snapshot / "model.safetensors").symlink_to(blob)
    monkeypatch.setenv("HF_HUB_CACHE", str(mirror.parent))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    model = Model(family="causal", base="someone/model")
    with pytest.raises(
        UserError, match=r"model\.safetensors: this file of the cache is damaged: its content is not what its name says"
    ):
        stage_model(model, site_at(tmp_path))
    blob.write_text("test")
    folder = stage_model(model, site_at(tmp_path))
    assert cache.model_hashes(folder, site_at(tmp_path))["model.safetensors"] == DIGEST


def test_what_is_staged_is_known_from_then_on(store: Path, write_config: Callable[..., Path], ftlib: Ftlib) -> None:
    config = write_config(LORA, base="ftlib/tiny-paligemma")
    assert ftlib("stage", config)[0] == 0
    (record,) = (store / "hashes").glob("*.json")
    assert "model.safetensors" in files.read_json(record)
    weights = store / "models" / "ftlib" / "tiny-paligemma" / "model.safetensors"
    flip(weights)
    assert ftlib("prepare", config)[0] == 0
    code, _, error = ftlib("train", config)
    assert code == 2 and f"{weights}: not the file that was staged" in error


def flip(weights: Path) -> None:
    """Another weight, in a file of the same size."""
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)


@pytest.fixture
def own(shared: Path, tmp_path: Path) -> Path:
    """A base model of one's own."""
    return Path(shutil.copytree(shared / "model", tmp_path / "own"))


def test_a_base_that_changed_under_a_run_is_refused(
    store: Path, own: Path, write_config: Callable[..., Path], ftlib: Ftlib, reads: list[str]
) -> None:
    config = write_config(LORA, base=str(own))
    assert ftlib("prepare", config)[0] == 0 and ftlib("train", config, "training.max_steps=2")[0] == 0
    (run,) = (store / "runs").glob("*/tiny/*")
    reads.clear()
    (run / "DONE").unlink()  # as if it had been ended
    flip(own / "model.safetensors")
    told = "the base model is not the one that this run was started with: model.safetensors has changed"
    code, _, error = ftlib("train", config, "training.max_steps=2")
    assert code == 2 and told in error and "Put the old files back" in error
    (run / "DONE").write_text('{"step": 2, "result": "adapter"}')
    for words in (("evaluate", run), ("evaluate", run, "--before"), ("predict", run, "--prompt", "which?")):
        code, _, error = ftlib(*words)
        assert code == 2 and told in error, words
    assert reads.count("model.safetensors") == 1, "by the first of these commands"
    flip(own / "model.safetensors")
    (own / "chat_template.jinja").write_text("{{ messages }}")
    code, _, error = ftlib("evaluate", run)
    assert code == 2 and "chat_template.jinja is new" in error
    (own / "chat_template.jinja").unlink()
    (own / "notes.txt").write_text("of no concern")
    assert ftlib("evaluate", run)[0] == 0


def test_a_run_from_before_gets_a_record_and_is_told_once(
    store: Path, own: Path, write_config: Callable[..., Path], ftlib: Ftlib
) -> None:
    config = write_config(LORA, base=str(own))
    assert ftlib("prepare", config)[0] == 0
    code, _, error = ftlib("train", config, "training.max_steps=2")
    assert code == 0 and "content was not recorded" not in error
    (run,) = (store / "runs").glob("*/tiny/*")
    (run / "base.json").unlink()
    code, _, error = ftlib("evaluate", run)
    assert code == 0 and "the base model's content was not recorded when this run was started" in error
    assert "model.safetensors" in files.read_json(run / "base.json")
    assert "content was not recorded" not in ftlib("evaluate", run, "--split", "test")[2]


def test_neither_merging_nor_a_warm_start_takes_an_adapter_for_another_base(
    store: Path, own: Path, write_config: Callable[..., Path], ftlib: Ftlib, tmp_path: Path
) -> None:
    config = write_config(LORA, base=str(own))
    assert ftlib("prepare", config)[0] == 0 and ftlib("train", config, "training.max_steps=2")[0] == 0
    (run,) = (store / "runs").glob("*/tiny/*")
    merge = ("merge", "--base", own, "--model", run, "--method", "task_arithmetic", "-o", tmp_path / "merged")
    flip(own / "model.safetensors")
    code, _, error = ftlib(*merge)
    assert code == 2 and "and its weights differ from those of" in error
    code, _, error = ftlib("train", config, "training.max_steps=2", f"warm_start={run}/adapter", "seed=4")
    assert code == 2 and "model.safetensors has changed" in error
    flip(own / "model.safetensors")
    assert ftlib(*merge)[0] == 0
