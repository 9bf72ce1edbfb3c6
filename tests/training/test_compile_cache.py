"""Programs of torch.compile from one start of a run to the next; nobody else's are ever read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

from ftlib.training import compiling, train
from ftlib.training.compiling import CompileCache
from tests import isolation


class Torch:
    """What torch's caches hold, in place of the real ones."""

    def __init__(self) -> None:
        self.compiled: bytes | None = None
        self.loaded: list[bytes] = []

    def compile(self, programs: bytes) -> None:
        counters["stats"]["unique_graphs"] += 1
        self.compiled = programs


@pytest.fixture
def caches(monkeypatch: pytest.MonkeyPatch) -> Torch:
    held = Torch()
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: held.compiled and (held.compiled, None))
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", held.loaded.append)
    return held


def test_what_was_compiled_is_there_at_the_next_start(caches: Torch, tmp_path: Path) -> None:
    folder = tmp_path / "compiled"
    first = CompileCache(folder)
    first.load()
    first.save()
    assert not folder.exists() and not caches.loaded
    caches.compile(b"one program")
    first.save()
    caches.compile(b"two whole programs")
    first.save()
    assert folder.stat().st_mode & 0o777 == 0o700
    (file,) = folder.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    second = CompileCache(folder)
    second.load()
    assert caches.loaded == [b"two whole programs"]
    caches.compile(b"the first")  # a start that ends before it has come to both
    second.save()
    CompileCache(folder).load()
    assert caches.loaded == [b"two whole programs"] * 2
    second.clear()
    assert not folder.exists()


def test_other_versions_and_gpus_have_their_own(caches: Torch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = CompileCache(tmp_path / "compiled")
    caches.compile(b"programs")
    kept.save()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    kept.load()
    monkeypatch.undo()
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", caches.loaded.append)
    monkeypatch.setattr(torch, "__version__", "9.0")
    kept.load()
    assert not caches.loaded
    monkeypatch.undo()
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", caches.loaded.append)
    kept.load()
    assert caches.loaded == [b"programs"]


def open_to_others(folder: Path) -> None:
    folder.chmod(0o770)


def file_open_to_others(folder: Path) -> None:
    next(folder.iterdir()).chmod(0o660)


def linked(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to("elsewhere")


def file_linked(folder: Path) -> None:
    file = next(folder.iterdir())
    moved = file.rename(folder.with_name("elsewhere"))
    file.symlink_to(moved)


@pytest.mark.parametrize("change", [open_to_others, file_open_to_others, linked, file_linked])
def test_what_others_may_have_written_is_not_read(
    change: Callable[[Path], None], caches: Torch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = CompileCache(tmp_path / "compiled")
    caches.compile(b"programs")
    kept.save()
    change(tmp_path / "compiled")
    kept.load()
    assert not caches.loaded and "compile cache not used" in capsys.readouterr().err


def test_nor_what_belongs_to_somebody_else(caches: Torch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = CompileCache(tmp_path / "compiled")
    caches.compile(b"programs")
    kept.save()
    monkeypatch.setattr(compiling.os, "getuid", lambda: 12345)
    kept.load()
    caches.compile(b"programs, and more of them")
    kept.save()
    assert not caches.loaded and b"more" not in next((tmp_path / "compiled").iterdir()).read_bytes()


def test_damaged_or_not_writable_they_hinder_nothing(caches: Torch, tmp_path: Path) -> None:
    kept = CompileCache(tmp_path / "compiled")
    caches.compile(b"programs")
    kept.save()
    file = next((tmp_path / "compiled").iterdir())
    file.write_bytes(file.read_bytes()[:-1])
    kept.load()
    assert not caches.loaded
    CompileCache(tmp_path / "gone" / "compiled").save()
    assert not (tmp_path / "gone").exists()


def test_training_loads_keeps_and_forgets_them(
    store: Path,
    write_config: Callable[..., Path],
    ftlib: Callable[..., tuple[int, str, str]],
    caches: Torch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[str] = []

    class Noting(CompileCache):
        def load(self) -> None:
            done.append("load")
            super().load()

        def save(self) -> None:
            caches.compile(b"programs")
            super().save()
            done.append(f"{self._folder.parent.parent.name}: {len(list(self._folder.iterdir()))} file")

        def clear(self) -> None:
            super().clear()
            done.append(f"there: {self._folder.exists()}")

    assert train.open_compile_cache(store) is None
    monkeypatch.setattr(train, "open_compile_cache", Noting)
    config = write_config()
    assert ftlib("prepare", config)[0] == 0
    code, _, error = ftlib("train", config, "training.max_steps=4", "checkpoint.steps=2")
    assert code == 0, error
    assert done == ["load", "tiny: 1 file", "tiny: 1 file", "there: False"]


@pytest.mark.long
def test_torch_takes_them_for_its_own(tmp_path: Path) -> None:
    if not isolation.program_of_machine("g++"):
        pytest.skip("inductor compiles with a C++ compiler, and there is none")
    from torch._inductor.utils import fresh_cache
    from torch.compiler._cache import CacheArtifactManager

    def hits(kept: CompileCache) -> Any:
        counters.clear()
        torch._dynamo.reset()
        with isolation.shown(), fresh_cache(), CacheArtifactManager.with_fresh_cache():
            kept.load()
            assert torch.equal(torch.compile(torch.neg)(torch.ones(3)), -torch.ones(3))
            kept.save()
        return counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"]

    assert [hits(CompileCache(tmp_path / "compiled")) for _ in range(2)] == [(0, 1), (1, 0)]
