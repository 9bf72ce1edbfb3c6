"""The files of a micro-batch are read side by side, and its rows are the same."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image

from ftlib.data import images
from ftlib.data.example import Example
from ftlib.errors import UserError
from ftlib.models.paligemma import PaliGemmaInputProcessor
from ftlib.models.tiny import tiny_processor
from ftlib.training.data import MixtureSampler, SupervisedDataset

COUNT = 20


@pytest.fixture
def dataset(tmp_path: Path) -> SupervisedDataset:
    """20 images; row 20 has the image of row 3, row 21 has no digest, row 22 no image."""
    rows = []
    for number in range(COUNT):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (20, 20), (10 * number, 0, 0)).save(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        rows.append(Example(str(number), path.name, "what?", str(number), digest=digest))
    rows += [Example("again", "3.png", "and?", "3", digest=rows[3].digest), Example("unverified", "4.png", "and?", "4")]
    processor, sampler = PaliGemmaInputProcessor(tiny_processor(16, 8)), MixtureSampler([len(rows)], [1.0], 0)
    return SupervisedDataset(rows, tmp_path, "{prefix}", processor, range(len(rows)), sampler)


@pytest.mark.parametrize("micro_batch", [1, 2, 5, 22])
def test_rows_are_the_same(dataset: SupervisedDataset, micro_batch: int) -> None:
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
    order[4] = ~order[4]
    for start in range(0, len(order), micro_batch):
        indices = order[start : start + micro_batch]
        collate = dataset.processor.collate
        together, alone = collate(dataset.__getitems__(indices)), collate([dataset[index] for index in indices])
        assert together.keys() == alone.keys() and all(torch.equal(together[name], alone[name]) for name in alone)
    assert dataset[~0].n_labels == 0 < dataset[0].n_labels


def test_files_are_read_side_by_side_and_once(dataset: SupervisedDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each read waits until there are as many as there are threads."""
    together, lock, reads, read = threading.Barrier(4, timeout=60), threading.Lock(), [], Path.read_bytes

    def slow(path: Path) -> bytes:
        together.wait()
        with lock:
            reads.append(path.name)
        return read(path)

    monkeypatch.setattr(images, "_ROWS_AHEAD", 4)
    monkeypatch.setattr(Path, "read_bytes", slow)
    dataset.__getitems__(range(COUNT))
    assert sorted(reads) == sorted(f"{number}.png" for number in range(COUNT))


def test_no_more_files_are_held_than_there_are_threads(
    dataset: SupervisedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large files are read when their row's turn comes."""
    read, started = Path.read_bytes, []
    monkeypatch.setattr(images, "_ROWS_AHEAD", 2)
    monkeypatch.setattr(images, "_MAX_BYTES_AHEAD", 0)
    monkeypatch.setattr(Path, "read_bytes", lambda path: started.append(threading.current_thread()) or read(path))
    dataset.__getitems__(range(COUNT))
    assert started == [threading.main_thread()] * COUNT
    monkeypatch.setattr(images, "_MAX_BYTES_AHEAD", 1 << 20)
    started.clear()
    with images.read_ahead(dataset.root, [dataset.examples[row] for row in range(COUNT)]) as read_file:
        read_file(dataset.root / "0.png")
        assert len(started) <= 3


def test_a_file_that_cannot_be_used_is_reported_as_before(dataset: SupervisedDataset) -> None:
    (dataset.root / "5.png").unlink()
    with pytest.raises(UserError, match=r"5\.png: no such image"):
        dataset.__getitems__(range(COUNT))
    (dataset.root / "2.png").write_bytes(b"other")
    with pytest.raises(UserError, match=r"2\.png: the file has changed"):
        dataset.__getitems__(range(COUNT))
