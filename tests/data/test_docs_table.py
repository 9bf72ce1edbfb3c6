"""docs/data.md: every line of "Choosing a source" is prepared as it stands there."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from PIL import Image

from ftlib.config.loader import load_experiment
from ftlib.core.paths import find_site
from ftlib.data.sources import hf_datasets
from tests.conftest import REPOSITORY
from tests.data.preparing import prepare

PAGE = (REPOSITORY / "docs" / "data.md").read_text()
LINES = re.findall(r"^\| (.+?) \| `(source: .+)` \|$", PAGE.partition("Choosing a source")[2], re.MULTILINE)
SPLITS = ("train", "valid", "test")
CAUSAL = "model: {family: causal, base: ftlib/tiny-neox}"
PALIGEMMA = "model: {family: paligemma, base: ftlib/tiny-paligemma}"


def picture(path: Path, number: int, size: tuple[int, int] = (32, 24)) -> None:
    """A picture like no other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (number * 8 % 256, number // 32 * 40, 7)).save(path)


def rows(root: Path, numbers: range, **names: str) -> list[dict[str, Any]]:
    """Rows under other names of their fields, if some are given; their images are made."""
    made = []
    for number in numbers:
        picture(root / "images" / f"{number}.png", number)
        row = {"image": f"images/{number}.png", "prefix": f"q{number}", "suffix": str(number % 2)}
        made.append({names.get(field, field): value for field, value in row.items()})
    return made


def put(path: Path, made: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in made))


def plain(root: Path) -> None:
    put(root / "data.jsonl", rows(root, range(20)))


def captioned(root: Path) -> None:
    made = rows(root, range(20), image="file_name", suffix="text")
    put(root / "metadata.jsonl", [{key: row[key] for key in ("file_name", "text")} for row in made])


def files(root: Path, name: str) -> None:
    for split, numbers in zip(SPLITS, (range(12), range(12, 16), range(16, 20)), strict=True):
        put(root / name.format(split), rows(root, numbers))


def parts(root: Path) -> None:
    made = rows(root, range(20))
    put(
        root / "data.jsonl",
        [{**row, "subset": ["fit", "fit", "fit", "dev", "blind"][n // 4]} for n, row in enumerate(made)],
    )


def sheet(root: Path) -> None:
    made = rows(root, range(20))
    lines = ["file;label", *[f"{row['image']};{'犬猫'[n % 2]}" for n, row in enumerate(made)]]
    (root / "sheet.csv").write_bytes("\n".join(lines).encode("shift_jis"))


def classes(root: Path, *parts: str) -> None:
    for number in range(20):
        part = parts[number % len(parts)] if parts else "."
        picture(root / part / ("cat" if number % 3 else "dog") / f"{number}.png", number)


def instructions(root: Path) -> None:
    made: list[dict[str, Any]] = [{"instruction": f"Say {n}.", "input": "", "output": f"{n}!"} for n in range(10)]
    put(root / "data.jsonl", made + [{"instruction": f"Do {n}.", "context": "c", "response": "r"} for n in range(10)])


def chats(root: Path) -> None:
    made = [
        {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "a"}]} for n in range(10)
    ]
    sharegpt = [
        {"conversations": [{"from": "human", "value": f"s{n}"}, {"from": "gpt", "value": "a"}]} for n in range(10)
    ]
    put(root / "chats.jsonl", [*made, *sharegpt])


def coco(file: Path, images: Path, numbers: range) -> None:
    for number in numbers:
        picture(images / f"{number}.png", number)
    content = {
        "images": [{"id": n, "file_name": f"{n}.png", "width": 32, "height": 24} for n in numbers],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [
            {"id": n, "image_id": n, "category_id": 1, "bbox": [2, 3, 10, 9], "area": 90, "iscrowd": 0} for n in numbers
        ],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def release(root: Path) -> None:
    coco(root / "annotations/instances_train2017.json", root / "train2017", range(14))
    coco(root / "annotations/instances_val2017.json", root / "val2017", range(14, 20))


def table(root: Path) -> datasets.Dataset:
    made = rows(root, range(20), prefix="question", suffix="answer")
    features = datasets.Features(
        {"image": datasets.Image(), "question": datasets.Value("string"), "answer": datasets.Value("string")}
    )
    return datasets.Dataset.from_list([{**row, "image": str(root / row["image"])} for row in made], features=features)


def parquet(root: Path) -> None:
    (root / "parquet").mkdir()
    table(root).to_parquet(str(root / "parquet" / "train-00000-of-00001.parquet"))


def lists(root: Path) -> None:
    made = rows(root, range(20), image="images", prefix="question")
    made = [{**row, "images": [str(root / row["images"])]} for row in made]
    text = datasets.Value("string")
    features = datasets.Features({"images": [datasets.Image()], "question": text, "suffix": text})
    (root / "parquet").mkdir()
    datasets.Dataset.from_list(made, features=features).to_parquet(str(root / "parquet" / "train.parquet"))


def saved(root: Path) -> None:
    table(root).save_to_disk(str(root / "saved"))


def similar(root: Path) -> None:
    made = rows(root, range(20))
    for number, row in enumerate(made):
        with Image.open(root / row["image"]) as image:
            image.resize((64, 48)).save(root / "images" / f"large-{number}.png")
    put(root / "data.jsonl", [*made, *[{**row, "image": f"images/large-{n}.png"} for n, row in enumerate(made)]])


def huge(root: Path) -> None:
    plain(root)
    picture(root / "images" / "3.png", 3, (12_000, 9_000))


def broken(root: Path) -> None:
    plain(root)
    (root / "images" / "3.png").write_bytes(b"no image")


def several(root: Path) -> None:
    plain(root / "a")
    classes(root / "b")
    for number in range(20):  # other pictures than those of a
        picture(next((root / "b").glob(f"*/{number}.png")), 100 + number)


MAKERS: dict[str, tuple[str, str, Callable[[Path], None], int]] = {
    "data.jsonl with image, prefix, suffix": ("classify", PALIGEMMA, plain, 20),
    "a JSON list, labels.json, with path, question, label": (
        "classify",
        PALIGEMMA,
        lambda root: (
            (root / "labels.json").write_text(
                json.dumps(rows(root, range(20), image="path", prefix="question", suffix="label"))
            )
            and None
        ),
        20,
    ),
    "train.jsonl, valid.jsonl and test.jsonl": ("classify", PALIGEMMA, lambda root: files(root, "{}.jsonl"), 20),
    "Roboflow's `_annotations.train.jsonl`, …": (
        "classify",
        PALIGEMMA,
        lambda root: files(root, "_annotations.{}.jsonl"),
        20,
    ),
    "🤗 imagefolder's metadata.jsonl, with file_name and text": ("caption", PALIGEMMA, captioned, 20),
    "rows with a column `subset` of `fit`, `dev` and `blind`": ("classify", PALIGEMMA, parts, 20),
    "a spreadsheet, sheet.csv, with semicolons, in Shift-JIS": ("classify", PALIGEMMA, sheet, 20),
    "a folder of images for each class": ("classify", PALIGEMMA, classes, 20),
    "`Train/`, `Val/`, `Test/` with a folder for each class": (
        "classify",
        PALIGEMMA,
        lambda root: classes(root, "Train", "Val", "Test"),
        20,
    ),
    "instructions as Alpaca's or Dolly's, data.jsonl": ("instruct", CAUSAL, instructions, 20),
    "chats as OpenAI's or ShareGPT's, chats.jsonl": ("instruct", CAUSAL, chats, 20),
    "COCO's `annotations/instances_train2017.json`, …": ("detect", PALIGEMMA, release, 20),
    "Roboflow's or CVAT's COCO file": (
        "detect",
        PALIGEMMA,
        lambda root: coco(root / "export.json", root / "images", range(20)),
        20,
    ),
    "Parquet files with images inside": ("classify", PALIGEMMA, parquet, 20),
    "Parquet files with a list `images` in each row": ("classify", PALIGEMMA, lists, 20),
    "what `save_to_disk` wrote": ("classify", PALIGEMMA, saved, 20),
    "images with copies and resized versions of each other": ("classify", PALIGEMMA, similar, 40),
    "photographs of more than 100 megapixels, maps": ("classify", PALIGEMMA, huge, 20),
    "some broken images": ("classify", PALIGEMMA, broken, 19),
    "several of these": ("classify", PALIGEMMA, several, 40),
}
"""What one has → a task, a model, what makes such data, and how many rows they have."""


def test_every_line_has_its_test() -> None:
    assert [what for what, _ in LINES] == list(MAKERS)


@pytest.mark.parametrize(("what", "section"), LINES, ids=[what for what, _ in LINES])
def test_lines(what: str, section: str, tmp_path: Path, store: Path) -> None:
    task, model, make, count = MAKERS[what]
    root = tmp_path / "root"
    root.mkdir()
    make(root)
    written = yaml.safe_load("{" + section.replace("ROOT", str(root)) + "}")
    config = tmp_path / "config.yaml"
    sections = yaml.safe_dump({"data": {"root": str(root), **written}})
    config.write_text(f"name: page\ntask: {task}\n{model}\nadapter: {{method: full}}\n{sections}")
    site = find_site()
    read = load_experiment(config, [], site).config
    if read.data.source == "hub":
        hf_datasets.fetch(read.data)
    found = prepare(read, site)
    sizes = [entry["rows"] for entry in found.metadata["splits"].values()]
    assert sum(sizes) == count and all(sizes)
