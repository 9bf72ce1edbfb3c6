"""Preparing: frames, modes, skipped records, a release's parts, fingerprints, rows mapped from disk."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from ftlib.config.loader import load_experiment
from ftlib.core import files
from ftlib.core.paths import find_site
from ftlib.data.dataset import PreparedDataset, RowWriter, SplitRows, open_prepared
from ftlib.data.example import Example, to_json_line
from ftlib.data.images import choose_frames, open_image
from ftlib.data.splits import hash_text
from ftlib.errors import UserError
from tests.data.preparing import prepare

Ftlib = Callable[..., tuple[int, str, str]]

CONFIG = """
name: pictures
task: classify
model: {family: paligemma, base: ftlib/tiny-paligemma}
adapter: {method: full}
data: {source: jsonl, root: ROOT, MORE}
"""


TEXTS = """
name: texts
task: instruct
model: {family: causal, base: ftlib/tiny-neox}
adapter: {method: full}
data: {source: instructions, root: ROOT, prompt: alpaca, split: {valid: 2, test: 2}}
"""


@pytest.fixture
def dataset(tmp_path: Path, store: Path) -> Callable[..., PreparedDataset]:
    """Write rows (and images that are not there yet) and prepare them."""

    def made(rows: list[dict[str, Any]], more: str = "split: {valid: 2, test: 2}") -> PreparedDataset:
        root = tmp_path / "data"
        root.mkdir(exist_ok=True)
        for row in rows:
            path = root / row["image"]
            if not path.exists():
                Image.new("RGB", (8, 8), f"#{hash_text(row['image']) % (1 << 24):06x}").save(path)
        (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = tmp_path / "config.yaml"
        config.write_text(CONFIG.replace("ROOT", str(root)).replace("MORE", more))
        site = find_site()
        return prepare(load_experiment(config, [], site).config, site)

    return made


def rows(count: int) -> list[dict[str, Any]]:
    return [{"image": f"{number}.png", "prefix": f"q{number}", "suffix": str(number % 2)} for number in range(count)]


def all_rows(prepared: PreparedDataset) -> list[Any]:
    return [row for split in ("train", "valid", "test") for row in prepared.rows(split)]


def test_rows_are_read_where_they_lie(tmp_path: Path) -> None:
    draw = random.Random(0)
    texts = ["".join(chr(draw.choice([65, 233, 12354, 128512])) for _ in range(draw.randrange(30))) for _ in range(200)]
    with RowWriter(tmp_path / "x.arrow") as writer:
        for number, text in enumerate(texts):
            writer.write(Example(str(number), "", text, "s"), None)
    found = pickle.loads(pickle.dumps(SplitRows(tmp_path / "x.arrow")))
    assert len(found) == 200 and [row.prefix for row in found] == texts
    assert found[-1].prefix == texts[-1] and [row.id for row in found[3:6]] == ["3", "4", "5"]
    with pytest.raises(IndexError):
        found[200]
    with RowWriter(tmp_path / "none.arrow"):
        pass
    assert list(SplitRows(tmp_path / "none.arrow")) == []


def test_every_row_is_kept_with_its_image_s_digest(dataset: Callable[..., PreparedDataset], tmp_path: Path) -> None:
    prepared = dataset(rows(12))
    found = all_rows(prepared)
    assert sorted(row.prefix for row in found) == sorted(row["prefix"] for row in rows(12))
    for row in found:
        assert row.digest == files.file_sha256(tmp_path / "data" / row.image)
    assert {path.name for path in prepared.folder.iterdir()} == {
        "train", "valid", "test", "dataset_dict.json", "bad.json", "data.json", "COMPLETE.json",
    }  # fmt: skip


def test_the_fingerprint_knows_rows_and_images_but_not_their_order(
    dataset: Callable[..., PreparedDataset], tmp_path: Path
) -> None:
    def prints(made: list[dict[str, Any]]) -> dict[str, str]:
        return {split: entry["fingerprint"] for split, entry in dataset(made).metadata["splits"].items()}

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
    dataset: Callable[..., PreparedDataset], gif: Path, rule: str, frames: list[int]
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
    assert prepared.metadata["left_out"] == ({} if frames else {"animated image": 1})
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
    dataset: Callable[..., PreparedDataset], store: Path, tmp_path: Path, ftlib: Ftlib
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "broken.png").write_bytes(b"no image")
    made = [
        *rows(12),
        {"image": "broken.png", "prefix": "", "suffix": "1"},
        {"image": "0.png", "prefix": 3, "suffix": "1"},
    ]
    prepared = dataset(made, "on_bad: skip, split: {valid: 2, test: 2}")
    assert prepared.metadata["bad"] == 2 and prepared.metadata["left_out"] == {"unreadable image": 1}
    shown = files.read_json(prepared.folder / "bad.json")["shown"]
    assert "data.jsonl:14: field prefix: must be text, got 3" in shown[0] and "broken.png: not an image" in shown[1]
    assert len(all_rows(prepared)) == 12
    code, _, error = ftlib("prepare", tmp_path / "config.yaml", "data.on_bad=stop")
    assert code == 2 and "field prefix: must be text" in error and "data.on_bad=skip" in error


def test_a_file_whose_name_is_not_utf8_is_skipped_like_any_other_bad_record(store: Path, tmp_path: Path) -> None:
    for number in range(12):
        path = tmp_path / "classes" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number * 20, 0, 0)).save(path)
    shutil.copy(path, os.fsencode(path.parent) + b"/\xe9.png")
    config = tmp_path / "folder.yaml"
    text = CONFIG.replace("jsonl", "folder").replace("ROOT", str(path.parent.parent))
    config.write_text(text.replace("MORE", "on_bad: skip, split: {valid: 2, test: 2}"))
    found = prepare(load_experiment(config, [], find_site()).config, find_site())
    assert sum(entry["rows"] for entry in found.metadata["splits"].values()) == 12 and found.metadata["bad"] == 1


def test_a_split_without_rows(dataset: Callable[..., PreparedDataset]) -> None:
    prepared = dataset(rows(12), "split: {valid: 2, test: 0}")
    assert [len(prepared.rows(split)) for split in ("valid", "test")] == [2, 0] and list(prepared.rows("test")) == []


def test_every_row_is_tried_with_the_prompt(
    dataset: Callable[..., PreparedDataset], store: Path, tmp_path: Path, ftlib: Ftlib
) -> None:
    """Not only the first: a run would stop in the middle, after the model is loaded."""
    made = [{**row, "ocr": number} for number, row in enumerate(rows(12))]
    del made[4]["ocr"]
    made[7]["ocr"] = True
    prepared = dataset(made, 'on_bad: skip, prompt: "{prefix} {ocr}", split: {valid: 2, test: 2}')
    assert len(all_rows(prepared)) == 10 and prepared.metadata["bad"] == 2
    code, _, error = ftlib("prepare", tmp_path / "config.yaml", "data.on_bad=stop")
    assert code == 2 and "data.jsonl:5: field ocr: is missing, but data.prompt uses it" in error
    assert "data.jsonl:8: field ocr: data.prompt uses it, so it must be text or a number, got True" in error


def test_rows_without_a_prefix_are_not_asked_with_one(
    dataset: Callable[..., PreparedDataset], store: Path, tmp_path: Path, ftlib: Ftlib
) -> None:
    """Rows may lack it where the prompt does not show it."""
    first = dataset([{key: value for key, value in row.items() if key != "prefix"} for row in rows(12)], "prompt: what")
    assert ftlib("prepare", tmp_path / "config.yaml", "data.prompt=what then")[1].strip() == str(first.folder)
    code, _, error = ftlib("prepare", tmp_path / "config.yaml", "data.prompt={prefix}")
    assert code == 2 and "field prefix: is empty or missing" in error


def test_another_prompt_is_tried_on_the_rows_that_are_prepared(
    dataset: Callable[..., PreparedDataset], store: Path, tmp_path: Path, ftlib: Ftlib
) -> None:
    made = [{**row, "ocr": "x"} for row in rows(12)]
    del made[4]["ocr"]
    first = dataset(made)
    assert ftlib("prepare", tmp_path / "config.yaml", "data.prompt=say {prefix}")[1].strip() == str(first.folder)
    code, _, error = ftlib("prepare", tmp_path / "config.yaml", "data.prompt={prefix} {ocr}")
    assert code == 2 and "('q4'): field ocr: is missing, but data.prompt uses it" in error
    site, change = find_site(), ["data.prompt={prefix} {ocr}"]
    assert open_prepared(load_experiment(tmp_path / "config.yaml", [], site).config, site).folder == first.folder
    with pytest.raises(UserError, match="field ocr: is missing"):
        open_prepared(load_experiment(tmp_path / "config.yaml", change, site).config, site)
    found = []
    for prompt in ("{prefix} {ocr}", "{prefix}", "{prefix} {ocr}"):
        _, out, _ = ftlib("prepare", tmp_path / "config.yaml", f"data.prompt={prompt}", "data.on_bad=skip")
        splits = files.read_json(Path(out.strip()) / "data.json")["splits"].values()
        found.append(sum(entry["rows"] for entry in splits))
    assert found == [11, 12, 11], "what a prompt leaves out is there for another"


def test_answers_that_are_not_to_be_learned_are_counted(store: Path, tmp_path: Path, ftlib: Ftlib) -> None:
    def turn(number: int, **mark: Any) -> list[dict[str, Any]]:
        return [{"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": "a", **mark}]

    chats = [{"messages": [*turn(number, weight=0), *turn(number + 100)]} for number in range(12)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    config = tmp_path / "config.yaml"
    config.write_text(TEXTS.replace("ROOT", str(tmp_path)))
    code, out, error = ftlib("prepare", config)
    assert code == 0 and "left out: 12 (answers that are not to be learned)" in error
    assert "fields in the prompt: input, instruction, messages" in error
    assert files.read_json(Path(out.strip()) / "data.json")["splits"]["train"]["rows"] == 8


def test_suspicious_labels_are_told(
    dataset: Callable[..., PreparedDataset], store: Path, tmp_path: Path, ftlib: Ftlib
) -> None:
    made = [
        {**row, "suffix": label} for row, label in zip(rows(14), ["Cat", "cat", 1, 1.0, "nan", *[7] * 9], strict=True)
    ]
    assert dataset(made).labels == ["1", "1.0", "7", "Cat", "cat", "nan"]
    wanted = [
        "'nan' (1 row) may stand for a missing label",
        "'1' (1 row) and '1.0' (1 row) differ only in how a number is written",
        "'Cat' (1 row) and 'cat' (1 row) differ only in upper and lower case",
    ]
    error, out = ftlib("prepare", tmp_path / "config.yaml")[2], ftlib("prepare", tmp_path / "config.yaml", "--check")[1]
    assert [line.removeprefix("labels: ") for line in error.splitlines() if line.startswith("labels: ")] == [
        *wanted,
        "in test, but not in train: 'nan'",
    ]
    assert [
        " ".join(line.split()).removeprefix("labels ") for line in out.splitlines() if line.startswith("labels")
    ] == wanted


def test_space_around_answers(
    dataset: Callable[..., PreparedDataset], store: Path, tmp_path: Path, ftlib: Ftlib
) -> None:
    """Of labels it is taken off and counted; of instructions it is part of what is learned."""
    prepared = dataset([*rows(12), {**rows(1)[0], "suffix": " 0\n"}])
    assert prepared.labels == ["0", "1"]
    assert (
        "rows whose answer had surrounding whitespace, which was removed: 1\n"
        in ftlib("prepare", tmp_path / "config.yaml")[2]
    )
    (tmp_path / "data.jsonl").write_text(
        "".join(json.dumps({"instruction": f"q{n}\n", "output": f" {n}\n"}) + "\n" for n in range(12))
    )
    config = tmp_path / "config.yaml"
    config.write_text(TEXTS.replace("ROOT", str(tmp_path)))
    _, out, error = ftlib("prepare", config)
    found = [row for split in ("train", "valid", "test") for row in SplitRows(Path(out.strip()) / split)]
    assert {(row.prefix, row.suffix) for row in found} == {(f"q{n}\n", f" {n}\n") for n in range(12)}
    assert "surrounding whitespace" not in error and "does not show" not in error
    (tmp_path / "data.jsonl").write_text(
        "".join(json.dumps({"instruction": "q", "input": "c" * n, "output": f"{n}"}) + "\n" for n in range(12))
    )
    for prompt, count in (("{prefix}", 11), ("alpaca", 0), ("chat", 0)):
        _, _, error = ftlib("prepare", config, f"data.prompt={prompt}")
        assert (
            f"an input that the prompt does not show (use {{input}}, or set alpaca or chat): {count}" in error
        ) == bool(count)


def test_check_tells_what_is_there_and_writes_nothing(
    dataset: Callable[..., PreparedDataset], store: Path, tmp_path: Path, ftlib: Ftlib
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


def ids(prepared: PreparedDataset) -> dict[str, list[str]]:
    return {split: sorted(row.id for row in prepared.rows(split)) for split in ("train", "valid", "test")}


def test_rows_without_an_id_keep_their_split_wherever_they_stand(dataset: Callable[..., PreparedDataset]) -> None:
    made = [{key: value for key, value in row.items() if key != "id"} for row in rows(40)]
    plain = ids(dataset(made, "split: {valid: 6, test: 6}"))
    assert plain == ids(dataset(made[::-1], "split: {valid: 6, test: 6}"))
    more = ids(dataset([{"image": "new.png", "prefix": "?", "suffix": "1"}, *made], "split: {valid: 6, test: 6}"))
    gone = {split: set(plain[split]) - set(more[split]) for split in plain}
    assert sum(map(len, gone.values())) <= 3, "a row more moves at most one row from each split to the next"


def test_equal_rows_are_told_apart_by_a_number(dataset: Callable[..., PreparedDataset]) -> None:
    made = [*rows(12), rows(1)[0], rows(1)[0]]
    prepared = dataset(made)
    names = [row.id for row in all_rows(prepared)]
    assert len(set(names)) == len(names) == 14
    first = next(row.id for row in all_rows(prepared) if row.image == "0.png" and "-" not in row.id)
    assert {f"{first}-2", f"{first}-3"} <= set(names)
    assert prepared.metadata["splits"] == dataset(made[::-1]).metadata["splits"]


def test_copies_of_a_picture_stay_together(dataset: Callable[..., PreparedDataset], tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    for number in range(30):
        Image.new("RGB", (8, 8), (number * 8, 0, 0)).save(root / f"{number}.png")
        (root / f"copy-{number}.png").write_bytes((root / f"{number}.png").read_bytes())
    (root / "link.png").symlink_to(root / "7.png")
    made = [*rows(30), *[{**row, "image": f"copy-{row['image']}"} for row in rows(30)]]
    prepared = dataset([*made, {"image": "link.png", "prefix": "?", "suffix": "1"}], "split: {valid: 6, test: 6}")
    digests = {split: {row.digest for row in prepared.rows(split)} for split in ("train", "valid", "test")}
    assert sum(map(len, digests.values())) == 30 == len(set.union(*digests.values()))
    assert [len(digests[split]) for split in ("train", "valid", "test")] == [18, 6, 6]
    assert prepared.metadata["together"] == {"rows": 61, "groups": 30}


def test_a_copy_that_the_data_put_in_another_split_is_left_out(
    dataset: Callable[..., PreparedDataset], tmp_path: Path
) -> None:
    root = tmp_path / "data"
    root.mkdir()
    for number in range(14):
        Image.new("RGB", (8, 8), (number * 8, 0, 0)).save(root / f"{number}.png")
    (root / "copy.png").write_bytes((root / "12.png").read_bytes())
    made = [{**row, "part": ["train", "valid", "test"][max(0, number - 9) // 2]} for number, row in enumerate(rows(14))]
    prepared = dataset([*made, {"image": "copy.png", "prefix": "?", "suffix": "1", "part": "train"}])
    assert "copy.png" not in {row.image for row in all_rows(prepared)}
    assert prepared.metadata["left_out"] == {"asked in another split": 1}
    assert {part["name"]: part["train"] for part in prepared.metadata["parts"]} == {"train": 11, "valid": 0, "test": 0}


@pytest.fixture
def photos(tmp_path: Path) -> list[dict[str, Any]]:
    """Twenty different pictures, each of them twice: the second one smaller and compressed."""
    draw = np.random.default_rng(0)
    root = tmp_path / "data"
    root.mkdir()
    for number in range(20):
        picture = Image.fromarray(draw.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((96, 96), Image.BICUBIC)
        picture.save(root / f"{number}.png")
        picture.resize((70, 70)).save(root / f"small-{number}.jpg", quality=80)
    names = [f"{kind}{number}{end}" for number in range(20) for kind, end in (("", ".png"), ("small-", ".jpg"))]
    return [{"image": name, "prefix": "?", "suffix": str(place % 2)} for place, name in enumerate(names)]


def test_pictures_that_look_alike_are_counted(
    dataset: Callable[..., PreparedDataset], photos: list[dict[str, Any]]
) -> None:
    near = dataset(photos).metadata["together"]["near"]
    assert (near["images"], near["groups"]) == (40, 20)
    assert all(len({name.removeprefix("small-").split(".")[0] for name in pair}) == 1 for pair in near["shown"])


def test_pictures_that_look_alike_stay_together_if_told(
    dataset: Callable[..., PreparedDataset], photos: list[dict[str, Any]]
) -> None:
    def divided(more: str) -> set[str]:
        prepared = dataset(photos, f"split: {{valid: 4, test: 4{more}}}")
        where = {row.image: split for split in ("train", "valid", "test") for row in prepared.rows(split)}
        return {f"{number}" for number in range(20) if where[f"{number}.png"] != where[f"small-{number}.jpg"]}

    assert divided("")
    assert not divided(", near_duplicates: group")


def test_images_that_arrive_later_are_read(
    dataset: Callable[..., PreparedDataset], tmp_path: Path, ftlib: Ftlib
) -> None:
    made = rows(20)
    (tmp_path / "data").mkdir()
    for row in made[8:]:
        (tmp_path / "data" / row["image"]).write_bytes(b"not yet")
    first = dataset(made, "on_bad: skip, split: {valid: 2, test: 2}")
    assert [first.metadata["splits"][split]["rows"] for split in ("train", "valid", "test")] == [4, 2, 2]
    assert first.metadata["left_out"] == {"unreadable image": 12}
    code, out, error = ftlib("prepare", tmp_path / "config.yaml")
    assert code == 0 and "already prepared" in error and out.strip() == str(first.folder)
    for row in made[8:]:
        Image.new("RGB", (8, 8), (int(row["prefix"][1:]), 9, 9)).save(tmp_path / "data" / row["image"])
    code, out, error = ftlib("prepare", tmp_path / "config.yaml")
    assert code == 0 and out.strip() == f"{first.folder}-2", error
    assert files.read_json(Path(out.strip()) / "data.json")["splits"]["train"]["rows"] == 16
    assert ftlib("prepare", tmp_path / "config.yaml")[1] == out
    code, out, _ = ftlib("prepare", tmp_path / "config.yaml", "--again")
    assert code == 0 and out.strip() == f"{first.folder}-3"


def test_data_of_which_nothing_is_left_are_refused(dataset: Callable[..., PreparedDataset], tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for row in rows(20):
        (tmp_path / "data" / row["image"]).write_bytes(b"no image")
    with pytest.raises(UserError, match="none of 20 rows can be used"):
        dataset(rows(20), "on_bad: skip")


def test_what_was_understood_is_told(
    dataset: Callable[..., PreparedDataset], tmp_path: Path, store: Path, ftlib: Ftlib
) -> None:
    parts = ["train"] * 16 + ["Validation"] * 4
    dataset([{**row, "note": "x", "part": part} for row, part in zip(rows(20), parts, strict=True)])
    shutil.rmtree(store / "prepared")
    code, _, error = ftlib("prepare", tmp_path / "config.yaml", "data.prompt={prefix} {note}")
    assert code == 0, error
    assert re.search(r"part 'Validation' +0 +0 +4", error) and re.search(r"part 'train' +\d+ +\d+ +0", error)
    assert "fields in the prompt: note" in error


def test_anybody_reads_prepared_data_with_datasets(dataset: Callable[..., PreparedDataset], tmp_path: Path) -> None:
    prepared = dataset([{**row, "id": str(number), "box": [1, 2]} for number, row in enumerate(rows(12))])
    tables = datasets.load_from_disk(str(prepared.folder))
    assert {split: len(table) for split, table in tables.items()} == {"train": 8, "valid": 2, "test": 2}
    row = tables["train"][0]
    assert row["image"].endswith(".png") and json.loads(row["facts"]) == {"box": [1, 2]} and row["part"] is None


def test_rows_of_format_3_are_read(dataset: Callable[..., PreparedDataset], tmp_path: Path) -> None:
    """Written as that format was: JSONL and, beside it, where each line begins."""
    prepared = dataset([{**row, "id": str(number), "box": [1, 2]} for number, row in enumerate(rows(12))])
    old = tmp_path / "old"
    old.mkdir()
    files.write_json(old / "data.json", {**prepared.metadata, "format": 3})
    for split in ("train", "valid", "test"):
        made = [json.loads(to_json_line(row, json.dumps(row.facts))) for row in prepared.rows(split)]
        lines = [json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in made]
        (old / f"{split}.jsonl").write_bytes(b"".join(lines))
        np.save(old / f"{split}.offsets.npy", np.cumsum([0, *map(len, lines)]))
        total = sum(int.from_bytes(hashlib.sha256(line).digest(), "big") for line in lines)
        assert f"{total % (1 << 256):064x}"[:16] == prepared.metadata["splits"][split]["fingerprint"], "as in format 3"
    read = PreparedDataset(old, prepared.root, files.read_json(old / "data.json"))
    assert [list(read.rows(split)) for split in ("train", "valid", "test")] == [
        list(prepared.rows(split)) for split in ("train", "valid", "test")
    ]
    assert pickle.loads(pickle.dumps(read.rows("train")))[-1] == prepared.rows("train")[-1]


def test_rows_that_are_changed_in_place_are_refused(
    dataset: Callable[..., PreparedDataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same size, they were trained on."""
    first, site = dataset(rows(20)), find_site()
    config = load_experiment(tmp_path / "config.yaml", [], site).config
    assert open_prepared(config, site).folder == first.folder
    read: list[Path] = []
    monkeypatch.setattr(
        "ftlib.core.hashes.files.file_sha256",
        lambda path: (read.append(path), hashlib.sha256(path.read_bytes()).hexdigest())[1],
    )
    open_prepared(config, site)
    assert not [path for path in read if path.is_relative_to(first.folder)], "what is known is not read again"
    (file,) = (first.folder / "train").glob("*.arrow")
    old = file.read_bytes()
    file.write_bytes(old)
    assert open_prepared(config, site).folder == first.folder, "the same content, written again"
    file.write_bytes(old[:-9] + bytes([old[-9] ^ 1]) + old[-8:])
    assert files.is_complete(first.folder)
    with pytest.raises(UserError, match=r"train/.*\.arrow: prepared rows have been modified") as raised:
        open_prepared(config, site)
    assert "ftlib prepare CONFIG --again" in raised.value.remedy
    assert prepare(config, site, again=True).folder.name == f"{first.folder.name}-2"
    assert open_prepared(config, site).folder.name == f"{first.folder.name}-2"
