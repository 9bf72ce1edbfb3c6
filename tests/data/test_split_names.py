"""What splits are called, and that no row of a user's valid or test part is ever learned for its part's name."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from ftlib.config.schema import Data, SplitRule
from ftlib.data.example import Example, InvalidRecord, to_json_line
from ftlib.data.sources import csv_table, hf_datasets, instructions, jsonl
from ftlib.data.sources.registry import skipped_counts
from ftlib.data.split_names import split_from_name, split_from_plain_name
from ftlib.errors import UserError
from tests.data.sources.releases import data, read, write

NAMES = {
    "train": "train Train TRAIN training trainset training_set trn train_sft train_prefs train.clean.100 train2014 "
    "train-00000 seg_train train[:80%] train_r1 restval 学習 訓練データ ｔｒａｉｎ",
    "valid": "valid val Val VALID validation validate dev dev_clean dev-0 devel development eval evaluation Eval_Split "
    "validation_matched validation_mismatched val2017 minival valid_seen valset 検証用",
    "test": "test Test TEST testing tests tst testA testB TestA testa test_std test-dev testdev devtest test_sft "
    "test2015 testmini PublicTest PrivateTest test.other test_rare テスト テスト",
    "": "all full default en tr unsupervised extra holdout trainval train_val train+test train_test_split non_train "
    "pretrain latest contest invalid value 7 0 challenge seg_pred",
}


@pytest.mark.parametrize(("part", "name"), [(part, name) for part, names in NAMES.items() for name in names.split()])
def test_names(part: str, name: str) -> None:
    assert split_from_name(name) == part


def test_names_that_say_nothing_else() -> None:
    assert [split_from_plain_name(name) for name in ("Test", "testA", "test_set", "val2014")] == [
        "test",
        "test",
        "test",
        "valid",
    ]
    assert not any(map(split_from_plain_name, ("test_tube", "train_station", "dev board", "cat", "sets")))


Write = Callable[[Path, list[dict[str, Any]]], object]
Read = Callable[..., Iterator[Example | InvalidRecord]]


def write_lines(root: Path, rows: list[dict[str, Any]]) -> None:
    write(root / "data.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def write_cells(root: Path, rows: list[dict[str, Any]]) -> None:
    with (root / "data.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


FORMS: dict[str, tuple[Read, Write, dict[str, Any]]] = {
    "jsonl": (jsonl.examples, write_lines, {"image": "a", "prefix": "q", "suffix": "x"}),
    "csv": (csv_table.examples, write_cells, {"image": "a", "prefix": "q", "suffix": "x"}),
    "instructions": (instructions.examples, write_lines, {"instruction": "q", "output": "x"}),
    "hub": (hf_datasets.examples, write_lines, {"image": "a", "prefix": "q", "suffix": "x"}),
}


@pytest.fixture(params=FORMS)
def form(
    request: pytest.FixtureRequest, tmp_path: Path, store: Path
) -> Callable[..., tuple[list[Example], list[InvalidRecord]]]:
    """Reads rows that have a field with some values, after writing them in one of the forms."""
    source = request.param
    examples, put, row = FORMS[source]
    if source == "hub":
        pytest.importorskip("datasets")

    def rows(field: str, *values: Any, more: dict[str, Any] | None = None, **section: Any) -> Any:
        (tmp_path / "set").mkdir(exist_ok=True)
        put(tmp_path / "set", [{**row, "id": str(n), field: value, **(more or {})} for n, value in enumerate(values)])
        place = {"file": str(tmp_path / "set")} if source == "hub" else {}
        return read(examples, data(tmp_path / "set", source, **place, **section))

    return rows


@pytest.mark.parametrize("field", ["part", "split", "Split", "SPLIT"])
def test_rows_say_their_split(form: Any, field: str) -> None:
    rows, bad = form(field, "train", "Train", "val", "validation", "dev", "eval", "TEST", "testA")
    assert not bad
    assert [row.part for row in rows] == ["train"] * 2 + ["valid"] * 4 + ["test"] * 2
    assert [row.part_name for row in rows] == ["train", "Train", "val", "validation", "dev", "eval", "TEST", "testA"]
    assert all("part_name" not in to_json_line(row, None) for row in rows)


def test_names_that_are_not_known_are_refused(form: Any) -> None:
    """All of them are listed; they went to train."""
    with pytest.raises(UserError) as caught:
        form("split", "train", "blind", "held out", "blind", "trainval")
    assert "unknown split names: 'blind' (2), 'held out' (1), 'trainval' (1)" in caught.value.problem
    assert "data.splits, such as {valid: [blind], test: […], left_out: […]}" in caught.value.remedy
    assert "data.split.official: false" in caught.value.remedy


def test_the_config_says_what_names_mean(form: Any) -> None:
    splits = {"test": ["blind"], "valid": ["test"], "left_out": ["junk"]}
    rows, bad = form("split", "train", "blind", "test", "junk", splits=splits)
    assert not bad and [row.part for row in rows] == ["train", "test", "valid"]


def test_a_field_that_is_none_of_splits(form: Any) -> None:
    values = [f"batch {number}" for number in range(40)]
    with pytest.raises(UserError, match=r"unknown split names: .*, …\n"):
        form("split", *values)
    rows, bad = form("split", *values, split=SplitRule(official=False))
    assert not bad and len(rows) == 40 and {row.part for row in rows} == {""}
    assert rows[3].facts["split"] == "batch 3"


def test_a_field_of_another_name(form: Any) -> None:
    rows, _ = form("fold", "dev", "train", more={"split": "anything"}, columns={"part": "fold"})
    assert [row.part for row in rows] == ["valid", "train"]


def test_fields_that_contradict_one_another(form: Any) -> None:
    rows, bad = form("part", "train", "val", more={"split": "validation"})
    assert [row.part for row in rows] == ["valid"]
    assert ["fields with different splits: part 'train', split 'validation'" in one.reason for one in bad] == [True]


@pytest.mark.parametrize("field", ["subset", "Usage", "partition"])
def test_another_field_that_seems_to_say_the_split(form: Any, field: str) -> None:
    """Kaggle's FER2013 has Usage: Training, PublicTest, PrivateTest; all of them were mixed."""
    values = ["Training", "PublicTest", "PrivateTest", "other"]
    with pytest.raises(UserError, match=f"field {field} seems to hold the split .*'Training' \\(1\\)") as caught:
        form(field, *values)
    assert f"data.columns: {{part: {field}}}" in caught.value.remedy
    assert len(form(field, *values, split=SplitRule(official=False))[0]) == 4
    rows, _ = form(field, *values[:3], columns={"part": field})
    assert [row.part for row in rows] == ["train", "test", "test"]
    assert len(form(field, "test", "test", "vqa", "gqa")[0]) == 4, "one word may mean anything"


@pytest.mark.parametrize("field", ["ml_use", "data set"])
def test_fields_of_any_name_that_say_nothing_but_splits(form: Any, field: str) -> None:
    """Google's AutoML has ml_use: TRAINING, VALIDATION, TEST; all rows were divided anew."""
    values = ["TRAINING", "", "VALIDATION", "Test"]
    with pytest.raises(UserError, match=f"field {field} seems to hold the split .*'TRAINING' \\(1\\)") as caught:
        form(field, *values)
    assert f"data.columns: {{part: {field}}}" in caught.value.remedy
    assert len(form(field, *values, split=SplitRule(official=False))[0]) == 4
    rows, _ = form(field, *values, columns={"part": field})
    assert [rows[number].part for number in (0, 2, 3)] == ["train", "valid", "test"]
    assert len(form(field, *values, "a train at the station")[0]) == 5, "it says something else, too"


def test_tags_and_answers(tmp_path: Path) -> None:
    rows = [
        {"image": f"{n}", "prefix": "", "suffix": split, "tags": [split]} for n, split in enumerate(("train", "test"))
    ]
    write_lines(tmp_path, rows)
    with pytest.raises(UserError, match="field tags seems to hold the split"):
        read(jsonl.examples, data(tmp_path, "jsonl"))
    found, _ = read(jsonl.examples, data(tmp_path, "jsonl", columns={"part": "tags"}))
    assert [row.part for row in found] == ["train", "test"]
    write_lines(tmp_path, [{name: value for name, value in row.items() if name != "tags"} for row in rows])
    assert len(read(jsonl.examples, data(tmp_path, "jsonl"))[0]) == 2, "an answer says no split"


@pytest.mark.parametrize("values", [(1, 0), (True, False), ("yes", "no")])
def test_flags(form: Any, values: tuple[Any, Any]) -> None:
    with pytest.raises(UserError, match="field is_train seems to hold") as caught:
        form("is_train", *values)
    yes, no = map(str, values)
    assert f"{{part: is_train}} and data.splits: {{train: [{yes!r}], test: [{no!r}]}}" in caught.value.remedy
    section = Data.model_validate({"source": "jsonl", "root": "x", "splits": {"train": values[0], "test": [values[1]]}})
    rows, _ = form("is_train", *values, columns={"part": "is_train"}, splits=section.splits)
    assert [row.part for row in rows] == ["train", "test"]
    with pytest.raises(UserError, match="is_test seems") as caught:
        form("is_test", *values)
    assert f"{{test: [{yes!r}], train: [{no!r}]}}" in caught.value.remedy


def test_names_of_the_config_that_no_row_has(form: Any) -> None:
    """Else a name that is misspelt would change nothing."""
    with pytest.raises(UserError, match=r"data\.splits: the dataset has no split evall"):
        form("split", "train", "eval", splits={"test": ["evall"]})


def test_rows_without_a_split_have_none(form: Any) -> None:
    rows, bad = form("split", "", "test")
    assert not bad and [row.part for row in rows] in (["", "test"], ["train", "test"])  # the hub's own split is train


def test_left_out_rows_are_counted(tmp_path: Path) -> None:
    rows = [{"image": "a", "prefix": "", "suffix": "x", "split": name} for name in ("train", "junk", "junk")]
    write_lines(tmp_path, rows)
    section = Data(source="jsonl", root=str(tmp_path), splits={"left_out": ["junk"]})
    assert skipped_counts(section) == {"data.splits leaves out junk": 2}


def test_configs() -> None:
    section = Data(source="jsonl", root="x", splits={"valid": "eval", "test": ["a", 1]})  # type: ignore[dict-item]
    assert section.splits == {"valid": ["eval"], "test": ["a", "1"]}
    for fields, words in (
        ({"source": "vqav2", "splits": {"valid": ["a"]}}, "source vqav2 has fixed official splits"),
        ({"source": "jsonl", "splits": {"valid": ["a"], "test": ["a"]}}, "duplicate name a"),
        ({"source": "jsonl", "splits": {"dev": ["a"]}}, "'train', 'valid', 'test' or 'left_out'"),
        ({"source": "jsonl", "splits": {"valid": [None]}}, "valid string"),
    ):
        with pytest.raises(ValidationError, match=words):
            Data.model_validate({"root": "x", **fields})


class TestHub:
    """Splits of a dataset of the hub."""

    @pytest.fixture(autouse=True)
    def tables(self, tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
        datasets = pytest.importorskip("datasets")
        self.root = tmp_path

        def offer(**splits: dict[str, list[str]]) -> Data:
            made = {}
            for name, fields in splits.items():
                count = len(next(iter(fields.values()))) if fields else 2
                content = {"image": ["a"] * count, "suffix": ["x"] * count, **fields}
                made[name] = datasets.Dataset.from_dict(content)
            monkeypatch.setattr(hf_datasets, "load_tables", lambda section: made)
            return data(tmp_path, "hub", file=str(tmp_path))

        return offer

    def test_names(self, tables: Any) -> None:
        rows, _ = read(
            hf_datasets.examples, tables(train_sft={}, validation_matched={}, eval={}, testA={}, test_std={})
        )
        found = [(row.part, row.part_name) for row in rows[::2]]
        valid = [("valid", "validation_matched"), ("valid", "eval")]
        assert found == [("train", "train_sft"), *valid, ("test", "testA"), ("test", "test_std")]

    def test_names_that_are_not_known_are_refused_before_rows_are_read(self, tables: Any) -> None:
        with pytest.raises(UserError, match=r"unknown split names: 'unsupervised' \(2\), 'blind' \(2\)"):
            next(hf_datasets.examples(tables(train={}, unsupervised={}, blind={})))

    def test_left_out(self, tables: Any) -> None:
        section = tables(train={}, unsupervised={}, test={})
        section = section.model_copy(update={"splits": {"left_out": ["unsupervised"]}})
        rows, _ = read(hf_datasets.examples, section)
        assert [row.part for row in rows] == ["train"] * 2 + ["test"] * 2
        assert skipped_counts(section) == {"data.splits leaves out unsupervised": 2}

    def test_rows_of_a_single_split_say_more(self, tables: Any) -> None:
        """As Flickr30k lies on the hub: all in split test, with the splits of others in a column."""
        rows, _ = read(hf_datasets.examples, tables(test={"split": ["train", "val", "test", ""]}))
        assert [row.part for row in rows] == ["train", "valid", "test", "test"]

    def test_rows_that_contradict_their_split(self, tables: Any) -> None:
        section = tables(train={"split": ["train", "test", "other"]}, test={"split": ["x", "test", ""]})
        rows, bad = read(hf_datasets.examples, section)
        assert [row.part for row in rows] == ["train", "train", "test", "test", "test"]
        assert [one.reason for one in bad] == ["field split: 'test', but the row is in train (train)"]
        named = section.model_copy(update={"columns": {"part": "split"}, "splits": {"test": ["other", "x"]}})
        rows, bad = read(hf_datasets.examples, named)
        assert not bad and [row.part for row in rows] == ["train", "test", "test", "test", "test", "test"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.jsonl", "testA.jsonl"], "testA.jsonl is read as train"),
        (["TRAIN/a.jsonl", "TEST/a.jsonl"], "TEST/a.jsonl is read as train"),
        (["TRAIN/cat/1.png", "TEST/cat/1.png"], "TEST/cat/1.png is read as train"),
    ],
)
def test_files_that_the_library_puts_into_train(tmp_path: Path, store: Path, names: list[str], message: str) -> None:
    """`datasets` finds splits by the names of files, and knows only a few; without any of these, all are train."""
    pytest.importorskip("datasets")
    for name in names:
        row = {"image": "a", "suffix": "x"}
        write(tmp_path / "set" / name, json.dumps(row) + "\n" if name.endswith("l") else b"")
    section = data(tmp_path, "hub", file=str(tmp_path / "set"))
    with pytest.raises(UserError, match=message):
        read(hf_datasets.examples, section)


def test_files_that_the_library_does_not_read(tmp_path: Path, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("datasets")
    for name in ("train", "testA"):
        write(tmp_path / "set" / f"{name}.jsonl", json.dumps({"image": "a", "suffix": "x"}) + "\n")
    rows, _ = read(hf_datasets.examples, data(tmp_path, "hub", file=str(tmp_path / "set")))
    assert [row.part for row in rows] == ["train"]
    assert "not read: testA.jsonl" in capsys.readouterr().err


def test_files_with_declared_splits(tmp_path: Path, store: Path) -> None:
    pytest.importorskip("datasets")
    for name in ("train", "testA"):
        write(tmp_path / "set" / f"{name}.jsonl", json.dumps({"image": "a", "suffix": "x"}) + "\n")
    lines = [f"  - split: {name}\n    path: {name}.jsonl" for name in ("train", "testA")]
    write(
        tmp_path / "set/README.md", "\n".join(["---", "configs:", "- config_name: a", "  data_files:", *lines, "---"])
    )
    rows, _ = read(hf_datasets.examples, data(tmp_path, "hub", file=str(tmp_path / "set")))
    assert [(row.part, row.part_name) for row in rows] == [("train", "train"), ("test", "testA")]
    (tmp_path / "set/testA.jsonl").unlink()
    write(tmp_path / "set/README.md", "no declaration")
    write(tmp_path / "set/testA.md", "no data")
    rows, _ = read(hf_datasets.examples, data(tmp_path, "hub", file=str(tmp_path / "set")))
    assert [row.part for row in rows] == ["train"]


def test_files_that_the_library_puts_into_two_splits(tmp_path: Path, store: Path) -> None:
    """It took the pictures of a class called test_tube for training and for testing."""
    pytest.importorskip("datasets")
    for name in ("train/test_tube/1.png", "train/dog/1.png", "test/dog/1.png"):
        write(tmp_path / "set" / name, b"")
    with pytest.raises(UserError, match=r"train/test_tube/1\.png is read as train and test"):
        read(hf_datasets.examples, data(tmp_path, "hub", file=str(tmp_path / "set")))
