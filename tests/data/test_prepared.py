"""Preparing: frames, modes, skipped records, a release's parts, fingerprints, rows mapped from disk."""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ftlib import files
from ftlib.config_file import load_experiment
from ftlib.data.images import choose_frames, open_image
from ftlib.data.prepared import Prepared, prepare
from ftlib.data.rows import Rows, RowWriter
from ftlib.site import find_site

Ftlib = Callable[..., tuple[int, str, str]]

CONFIG = """
name: pictures
task: classify
model: {family: paligemma, base: ftlib/tiny-paligemma}
adapter: {method: full}
data: {source: jsonl, root: ROOT, MORE}
"""


@pytest.fixture
def dataset(tmp_path: Path, store: Path) -> Callable[..., Prepared]:
    """Write rows (and images that are not there yet) and prepare them."""

    def made(rows: list[dict[str, Any]], more: str = "split: {valid: 2, test: 2}") -> Prepared:
        root = tmp_path / "data"
        root.mkdir(exist_ok=True)
        for row in rows:
            path = root / row["image"]
            if not path.exists():
                Image.new("RGB", (8, 8), (hash(row["image"]) % 256, 0, 0)).save(path)
        (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = tmp_path / "config.yaml"
        config.write_text(CONFIG.replace("ROOT", str(root)).replace("MORE", more))
        site = find_site()
        return prepare(load_experiment(config, [], site).config, site)

    return made


def rows(count: int) -> list[dict[str, Any]]:
    return [{"image": f"{number}.png", "prefix": f"q{number}", "suffix": str(number % 2)} for number in range(count)]


def all_rows(prepared: Prepared) -> list[Any]:
    return [row for split in ("train", "valid", "test") for row in prepared.rows(split)]


def test_rows_are_read_where_they_lie(tmp_path: Path) -> None:
    draw = random.Random(0)
    texts = ["".join(chr(draw.choice([65, 233, 12354, 128512])) for _ in range(draw.randrange(30))) for _ in range(200)]
    with RowWriter(tmp_path / "x.jsonl") as writer:
        for number, text in enumerate(texts):
            writer.write({"id": str(number), "image": "", "prefix": text, "suffix": "s"})
    found = pickle.loads(pickle.dumps(Rows(tmp_path / "x.jsonl")))
    assert len(found) == 200 and [row.prefix for row in found] == texts
    assert found[-1].prefix == texts[-1] and [row.id for row in found[3:6]] == ["3", "4", "5"]
    with pytest.raises(IndexError):
        found[200]
    with RowWriter(tmp_path / "none.jsonl"):
        pass
    assert list(Rows(tmp_path / "none.jsonl")) == []


def test_every_row_is_kept_with_its_image_s_digest(dataset: Callable[..., Prepared], tmp_path: Path) -> None:
    prepared = dataset(rows(12))
    found = all_rows(prepared)
    assert sorted(row.prefix for row in found) == sorted(row["prefix"] for row in rows(12))
    for row in found:
        assert row.digest == files.sha256(tmp_path / "data" / row.image)
    assert {path.name for path in prepared.folder.iterdir()} == {
        *[f"{split}{end}" for split in ("train", "valid", "test") for end in (".jsonl", ".offsets.npy")],
        "bad.json", "data.json", "COMPLETE.json",
    }  # fmt: skip


def test_the_fingerprint_knows_rows_and_images_but_not_their_order(
    dataset: Callable[..., Prepared], tmp_path: Path
) -> None:
    def prints(made: list[dict[str, Any]]) -> dict[str, str]:
        return {split: entry["fingerprint"] for split, entry in dataset(made).facts["splits"].items()}

    made = [{**row, "id": str(number)} for number, row in enumerate(rows(12))]
    plain = prints(made)
    assert prints(made[::-1]) == plain
    assert prints([{**made[0], "suffix": "9"}, *made[1:]]) != plain
    Image.new("RGB", (8, 8), "white").save(tmp_path / "data" / "3.png")
    assert prints([*made[:11], {**made[11], "extra": 1}]) != plain


@pytest.fixture
def gif(tmp_path: Path) -> Path:
    path = tmp_path / "data" / "moving.gif"
    path.parent.mkdir()
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue", "white")]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    return path


@pytest.mark.parametrize(
    ("rule", "frames"), [("first", [0]), ("middle", [2]), ("last", [3]), ("all", [0, 1, 2, 3]), ("exclude", [])]
)
def test_frames_of_an_animated_picture(
    dataset: Callable[..., Prepared], gif: Path, rule: str, frames: list[int]
) -> None:
    made = [*rows(12), {"image": "moving.gif", "prefix": "what?", "suffix": "1"}]
    prepared = dataset(made, f"frames: {rule}, split: {{valid: 2, test: 2}}")
    shown = {
        split: [row for row in prepared.rows(split) if row.image == "moving.gif"]
        for split in ("train", "valid", "test")
    }
    assert sorted(row.frame for part in shown.values() for row in part) == frames
    assert sum(bool(part) for part in shown.values()) <= 1, "all frames stand in one split"
    assert len({row.id for part in shown.values() for row in part}) == len(frames)
    assert prepared.facts["left_out"] == ({} if frames else {"animated image": 1})
    colors = ["red", "lime", "blue", "white"]
    for frame in frames:
        assert (
            np.abs(
                np.asarray(open_image(gif, frame)).astype(int) - np.asarray(Image.new("RGB", (8, 8), colors[frame]))
            ).max()
            < 8
        )
    assert choose_frames(1, "exclude") == [0], "a still picture is not animated"


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("L", 200, (200, 200, 200)),
        ("LA", (200, 0), (255, 255, 255)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("I;16", 51400, (200, 200, 200)),
        ("1", 1, (255, 255, 255)),
    ],
)
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str, value: Any, expected: tuple[int, int, int]) -> None:
    path = tmp_path / ("x.tiff" if mode == "CMYK" else "x.png")
    Image.new(mode, (4, 4), value).save(path)
    assert open_image(path).getpixel((1, 1)) == expected


def test_palettes_with_a_transparent_colour(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "x.png", transparency=1)
    assert [open_image(tmp_path / "x.png").getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 0), (255, 255, 255)]


def test_bad_records_are_skipped_only_if_told(
    dataset: Callable[..., Prepared], store: Path, tmp_path: Path, ftlib: Ftlib
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "broken.png").write_bytes(b"no image")
    made = [
        *rows(12),
        {"image": "broken.png", "prefix": "", "suffix": "1"},
        {"image": "0.png", "prefix": 3, "suffix": "1"},
    ]
    prepared = dataset(made, "on_bad: skip, split: {valid: 2, test: 2}")
    assert prepared.facts["bad"] == 2 and prepared.facts["left_out"] == {"unreadable image": 1}
    shown = files.read_json(prepared.folder / "bad.json")["shown"]
    assert "data.jsonl:14: field prefix: must be text, got 3" in shown[0] and "row 13: " in shown[1]
    assert len(all_rows(prepared)) == 12
    code, _, error = ftlib("prepare", tmp_path / "config.yaml", "data.on_bad=stop")
    assert code == 2 and "field prefix: must be text" in error and "data.on_bad=skip" in error


def test_check_tells_what_is_there_and_writes_nothing(
    dataset: Callable[..., Prepared], store: Path, tmp_path: Path, ftlib: Ftlib
) -> None:
    prepared = dataset([*rows(12), {**rows(1)[0], "id": "again"}])
    before = sorted(store.rglob("*"))
    code, out, _ = ftlib("prepare", tmp_path / "config.yaml", "--check")
    assert code == 0 and sorted(store.rglob("*")) == before
    lines = {line.split("  ")[0]: line for line in out.splitlines()}
    assert lines["rows"].endswith(" 13") and lines["images"].endswith(" 12")
    assert lines["duplicates (image, prompt and answer)"].endswith(" 1")
    assert "PNG RGB 12" in out and "8 × 8 12" in out and "0 7, 1 6" in out
    assert "answer, characters (the model is not staged)" in out
    assert len(all_rows(prepared)) == 13
