"""Mixtures: rows of several datasets under one root, each with its own files, columns and prompt."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ftlib.config.loader import load_experiment
from ftlib.core.paths import find_site
from ftlib.data.dataset import PreparedDataset, prepared_folder
from ftlib.data.prompts import render_prompt
from ftlib.errors import UserError
from tests.data.preparing import prepare

CONFIG = """
name: mixed
task: classify
model: {family: paligemma, base: ftlib/tiny-paligemma}
adapter: {method: full}
data:
  source: mixture
  root: ROOT
  prompt: "answer {prefix}"
  split: {valid: 0.2, test: 0.2}
  parts:
    - {name: cats, source: jsonl, root: a}
    - {name: dogs, source: csv, root: ROOT/b, file: list.csv, columns: {suffix: label}, prompt: "which?", weight: 0.5}
"""
ROWS = 20


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Twenty rows each, two for each image; images and ids of both parts have the same names."""
    lines, cells = [], ["id,image,label"]
    for folder, color in (("a", 10), ("b", 200)):
        (tmp_path / folder).mkdir()
        for number in range(ROWS // 2):
            Image.new("RGB", (4, 4), (color, number, 0)).save(tmp_path / folder / f"{number}.png")
    for number in range(ROWS):
        record = {"id": number, "image": f"{number % 10}.png", "prefix": f"q{number}", "suffix": "cat"}
        lines.append(json.dumps(record) + "\n")
        cells.append(f"{number},{number % 10}.png,dog")
    (tmp_path / "a" / "data.jsonl").write_text("".join(lines))
    (tmp_path / "b" / "list.csv").write_text("\n".join(cells) + "\n")
    return tmp_path


Make = Callable[..., PreparedDataset]


@pytest.fixture
def config(root: Path, store: Path) -> Callable[..., Any]:
    def load(*changes: tuple[str, str]) -> Any:
        text = CONFIG
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        path = root / "config.yaml"
        path.write_text(text.replace("ROOT", str(root)))
        return load_experiment(path, [], find_site())

    return load


def test_rows_of_all_parts(config: Callable[..., Any], root: Path) -> None:
    experiment = config()
    prepared = prepare(experiment.config, find_site())
    templates = experiment.config.data.templates
    rows = {split: list(prepared.rows(split)) for split in ("train", "valid", "test")}
    everything = [row for split in rows.values() for row in split]
    assert {row.id for row in everything} == {f"{part}/{n}" for part in ("cats", "dogs") for n in range(ROWS)}
    for row in everything:
        part, number = row.id.split("/")
        assert (row.dataset, row.suffix) == (part, part.removesuffix("s"))
        assert row.image == f"{'a' if part == 'cats' else 'b'}/{int(number) % 10}.png"
        assert render_prompt(row, templates) == (f"answer q{number}" if part == "cats" else "which?")
        red = Image.open(prepared.root / row.image).getpixel((0, 0))[0]  # type: ignore[index]
        assert red == (10 if part == "cats" else 200)
    for split, wanted in (("train", 12), ("valid", 4), ("test", 4)):
        assert Counter(row.dataset for row in rows[split]) == {"cats": wanted, "dogs": wanted}
        assert prepared.metadata["splits"][split]["parts"] == {"cats": wanted, "dogs": wanted}
    images = [{row.image for row in split} for split in rows.values()]
    assert not images[0] & images[1] and not images[0] & images[2] and not images[1] & images[2]


def test_an_image_of_two_parts_is_never_learned_and_asked(config: Callable[..., Any], root: Path) -> None:
    """The first part's pictures are test rows as their file says; the second shows them, too, and some of its own."""
    lines = (root / "a" / "data.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    given = [row | {"part": "test" if int(row["id"]) % 10 < 5 else "train"} for row in rows]
    (root / "a" / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    shown = [f"{number},../a/{number}.png,dog" for number in range(10)]
    own = [f"{number},{number % 10}.png,dog" for number in range(10, 20)]
    (root / "b" / "list.csv").write_text("\n".join(["id,image,label", *shown, *own]) + "\n")
    prepared = prepare(config().config, find_site())
    splits = {split: list(prepared.rows(split)) for split in ("train", "valid", "test")}
    images = {split: {row.image for row in rows} for split, rows in splits.items()}
    assert not images["train"] & images["valid"] and not (images["train"] | images["valid"]) & images["test"]
    assert {f"a/{number}.png" for number in range(5)} <= images["test"]
    left_out = prepared.metadata["left_out"]["asked in another split"]
    assert left_out > 0 and sum(map(len, splits.values())) + left_out == 2 * ROWS
    for row in splits["test"]:
        assert row.dataset == "dogs" or int(row.id.split("/")[1]) % 10 < 5


def test_the_learned_rows_of_each_part_are_counted(config: Callable[..., Any]) -> None:
    prepared = prepare(config().config, find_site())
    assert prepared.counts("train", range(24)) == [12, 12]
    assert prepared.counts("train", [0, 3, 11, 12, 20]) == [3, 2]
    assert prepared.counts("train", [12, 23]) == [0, 2]


def test_prompts_and_weights_are_no_part_of_the_prepared_data_but_of_the_run(config: Callable[..., Any]) -> None:
    changes = [("weight: 0.5", "weight: 2"), ('"which?"', '"what?"')]
    one, others = config(), [config(change) for change in changes]
    site = find_site()
    assert {prepared_folder(each.config, site) for each in [one, *others]} == {prepared_folder(one.config, site)}
    assert len({each.identity for each in [one, *others]}) == 3
    before = prepared_folder(one.config, site)
    (Path(one.config.data.root) / "b" / "list.csv").write_text("image,label\n0.png,dog\n")
    assert prepared_folder(one.config, site) != before


def test_faults_are_listed_by_their_own_file_and_line(config: Callable[..., Any], root: Path) -> None:
    with (root / "a" / "data.jsonl").open("a") as file:
        file.write('{"image": "0.png"}\n')
    with (root / "b" / "list.csv").open("a") as file:
        file.write("77,0.png,\n")
    with pytest.raises(UserError) as caught:
        prepare(config().config, find_site())
    assert f"{root}/a/data.jsonl:21: field prefix: is missing" in str(caught.value)
    assert f"{root}/b/list.csv:22: field label: is empty" in str(caught.value)
    prepared = prepare(config(("root: ROOT\n", "root: ROOT\n  on_bad: skip\n")).config, find_site())
    assert prepared.metadata["bad"] == 2


MISTAKES = {
    "a name twice": (("name: dogs", "name: cats"), "duplicate name cats"),
    "no parts": (("source: mixture", "source: jsonl"), "requires"),
    "a file of the whole": (("root: ROOT\n", "root: ROOT\n  file: x\n"), "in its parts"),
    "chat in a part": (('"which?"', "chat"), "chat applies to the whole mixture"),
    "a weight of nothing": (("weight: 0.5", "weight: 0"), "data.parts.1.weight: must be greater than 0"),
    "a near name": (("weight: 0.5", "weigth: 2"), "data.parts.1.weigth: unknown key; did you mean weight?"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_in_the_config(name: str, config: Callable[..., Any]) -> None:
    change, words = MISTAKES[name]
    with pytest.raises(UserError, match=r"config.yaml:[0-9]+") as caught:
        config(change)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("root: ROOT\n", "root: ROOT/a\n"), "its images are outside data.root"),
        (("answer {prefix}", "answer {question}"), "field question: is missing, but data.prompt uses it; available:"),
        (('"which?"', '"{breed}?"'), "field breed: is missing, but data.prompt uses it; available:"),
        (("valid: 0.2", "valid: 9"), "part cats: data.split: valid and test together leave no rows"),
    ],
)
def test_mistakes_that_the_rows_show(change: tuple[str, str], words: str, config: Callable[..., Any]) -> None:
    changes = [change] if "ROOT/a" not in change[1] else [change, ("root: a}", "root: .}")]
    with pytest.raises(UserError) as caught:
        prepare(config(*changes).config, find_site())
    assert words in str(caught.value)


def test_a_part_without_rows(config: Callable[..., Any], root: Path) -> None:
    (root / "b" / "list.csv").write_text("image,label\n")
    with pytest.raises(UserError, match=f"{root}/b: has no rows"):
        prepare(config().config, find_site())


def test_absolute_paths_below_the_root_are_the_same_rows(config: Callable[..., Any], root: Path) -> None:
    """As they are written by tools that list files; also through a symbolic link to the root."""
    plain = prepare(config().config, find_site())
    linked = root.parent / "linked"
    linked.symlink_to(root)
    for part, above in (("a", root), ("b", linked)):
        file = root / part / ("data.jsonl" if part == "a" else "list.csv")
        text = file.read_text()
        for number in range(10):
            for mark in ('"', ","):
                end = '"' if mark == '"' else ","
                text = text.replace(f"{mark}{number}.png{end}", f"{mark}{above / part / str(number)}.png{end}")
        file.write_text(text)
        assert str(above) in text
    found = prepare(config().config, find_site())
    assert found.folder != plain.folder and found.metadata["splits"] == plain.metadata["splits"]
    text = (root / "a" / "data.jsonl").read_text()
    (root / "a" / "data.jsonl").write_text(text.replace(f"{root}/a/3.png", "/elsewhere/3.png"))
    with pytest.raises(UserError, match=r"image '/elsewhere/3\.png' is outside the data folder"):
        prepare(config().config, find_site())
