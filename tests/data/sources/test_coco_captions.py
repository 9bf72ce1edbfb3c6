"""COCO caption files: read, scored, written, and every fault named."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ftlib.data.sources.coco_captions import CaptionedImage, read_captions, read_karpathy_splits, read_results, score
from ftlib.errors import UserError

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _no_java(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """METEOR has its own tests."""
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A release file of three images and right captions for them."""
    images = [{"id": number, "file_name": f"COCO_val2014_{number:012}.jpg", "height": 1} for number in (30, 10, 20)]
    captions = [(10, "A dog runs."), (20, "Two cats"), (10, "The dog is running"), (30, "A red bus.")]
    annotations = [{"id": n, "image_id": image, "caption": text} for n, (image, text) in enumerate(captions)]
    results = [{"image_id": 20, "caption": "two cats"}, {"image_id": 30, "caption": "a bus"}]
    results.append({"image_id": 10, "caption": "a dog runs"})
    references, predictions = tmp_path / "captions_val2014.json", tmp_path / "results.json"
    references.write_text(json.dumps({"info": {}, "images": images, "annotations": annotations}))
    predictions.write_text(json.dumps(results))
    return references, predictions


def change(path: Path, edit: Callable[[Any], Any]) -> None:
    """Apply a function to a JSON file's content."""
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_images_keep_their_order_and_their_captions(files: tuple[Path, Path]) -> None:
    assert read_captions(files[0]) == [
        CaptionedImage(30, "COCO_val2014_000000000030.jpg", ("A red bus.",)),
        CaptionedImage(10, "COCO_val2014_000000000010.jpg", ("A dog runs.", "The dog is running")),
        CaptionedImage(20, "COCO_val2014_000000000020.jpg", ("Two cats",)),
    ]


def test_score_of_result_files(files: tuple[Path, Path], ftlib: Run) -> None:
    found = score([files[0]], files[1])
    assert found.sample.groups == [30, 10, 20] and found.n == 3
    assert found.values()["BLEU-1"] == pytest.approx(math.exp(1 - 8 / 7)), "7 of 7 words, 8 in the references"
    code, out, _ = ftlib("score", "caption", "--references", files[0], "--predictions", files[1], "--json")
    told = json.loads(out)
    assert code == 0 and told["metric"] == "CIDEr-D" and told["rule"] == "coco-caption/1"
    assert told["value"] == pytest.approx(found.values()["CIDEr-D"])
    assert told["metrics"]["BLEU-4"]["interval"] and "METEOR: not computed: Java is not installed" in told["remarks"]


def test_captions_without_words_share_none(files: tuple[Path, Path]) -> None:
    def empty(content: Any) -> None:
        for one in content["annotations"]:
            one["caption"] = "."

    change(files[0], empty)
    values = score([files[0]], files[1]).values()
    assert values["CIDEr-D"] == values["ROUGE-L"] == 0 and values["BLEU-4"] == pytest.approx(0, abs=1e-6)


def test_results_are_read_as_written(tmp_path: Path) -> None:
    captions = {10: 'two "cats"', 9: "naïve"}
    records = [{"image_id": image, "caption": caption} for image, caption in captions.items()]
    (tmp_path / "results.json").write_text(json.dumps(records))
    assert read_results(tmp_path / "results.json") == captions


REFERENCE_FAULTS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "no images": (lambda c: c.pop("images"), "must be an object with a list `images`"),
    "no captions": (lambda c: c.pop("annotations"), "must be an object with a list `annotations`"),
    "empty images": (lambda c: c["images"].clear(), "contains no images"),
    "empty captions": (lambda c: c["annotations"].clear(), "contains no annotations"),
    "image twice": (lambda c: c["images"].append(c["images"][0]), "id occurs more than once: 30"),
    "caption twice": (lambda c: c["annotations"].append(c["annotations"][1]), "id occurs more than once: 1"),
    "image without a caption": (lambda c: c["annotations"].pop(1), "1 images have no caption: 20"),
    "caption of no image": (lambda c: c["images"].pop(2), "captions of 1 images that it does not list: 20"),
    "no text": (lambda c: c["annotations"][0].pop("caption"), "annotation 1: field caption is missing"),
    "number as text": (lambda c: c["annotations"][2].update(caption=5), "annotation 3: field caption: str expected"),
    "text as list": (lambda c: c["images"].insert(0, "x"), "image 1: not an object but str"),
    "list as id": (lambda c: c["images"][0].update(id=[1]), "image 1: field id"),
}
RESULT_FAULTS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "missing": (lambda c: c.pop(0), "1 of 3 image_ids have no answer: 20"),
    "unknown": (lambda c: c.append({"image_id": 7, "caption": "a"}), "1 image_ids that are not in the references: 7"),
    "text id": (lambda c: c[0].update(image_id="020"), "not in the references: 020"),
    "twice": (lambda c: c.append(c[0]), "image_id occurs more than once: 20"),
    "empty": (lambda c: c.clear(), "contains no records"),
    "no caption": (lambda c: c[1].pop("caption"), "record 2: field caption is missing"),
    "null": (lambda c: c[1].update(caption=None), "record 2: field caption: str expected, found None"),
}
FAULTS = [(0, *fault) for fault in REFERENCE_FAULTS.values()] + [(1, *fault) for fault in RESULT_FAULTS.values()]


@pytest.mark.parametrize(("place", "edit", "told"), FAULTS, ids=[*REFERENCE_FAULTS, *RESULT_FAULTS])
def test_faults_are_named(
    files: tuple[Path, Path], ftlib: Run, place: int, edit: Callable[[Any], Any], told: str
) -> None:
    change(files[place], edit)
    code, out, err = ftlib("score", "caption", "--references", files[0], "--predictions", files[1])
    assert code == 2 and not out
    assert told in err and files[place].name in err and "Traceback" not in err


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"3", b'{"a": 1}'])
@pytest.mark.parametrize("place", [0, 1])
def test_broken_files_are_named(files: tuple[Path, Path], ftlib: Run, place: int, content: bytes) -> None:
    files[place].write_bytes(content)
    code, _, err = ftlib("score", "caption", "--references", files[0], "--predictions", files[1])
    assert code == 2 and files[place].name in err and "Traceback" not in err


def test_ids_as_texts_and_what_is_not_needed(files: tuple[Path, Path]) -> None:
    plain = score([files[0]], files[1]).values()

    def as_texts(content: Any) -> None:
        for one in content if isinstance(content, list) else content["annotations"]:
            one["image_id"] = str(one["image_id"])
            one.pop("id", None)
        for one in content["images"] if isinstance(content, dict) else []:
            one.pop("file_name")

    change(files[1], as_texts)
    assert score([files[0]], files[1]).values() == plain
    change(files[0], as_texts)
    assert score([files[0]], files[1]).values() == plain
    change(files[1], lambda c: c.append({"image_id": int(c[0]["image_id"]), "caption": "other"}))
    with pytest.raises(UserError, match="image_id occurs more than once"):
        score([files[0]], files[1])


def test_one_reference_file_is_needed(files: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match="one reference file, the captions of the split; got 2"):
        score([files[0], files[0]], files[1])
    with pytest.raises(UserError, match="cannot be read"):
        score([files[0].with_name("none.json")], files[1])


def karpathy(number: int, split: str, *captions: str) -> dict[str, Any]:
    sentences = [{"raw": caption, "tokens": caption.lower().split()} for caption in captions]
    return {
        "cocoid": number,
        "filepath": "val2014",
        "filename": f"{number}.jpg",
        "split": split,
        "sentences": sentences,
    }


def test_karpathy_splits(tmp_path: Path) -> None:
    path = tmp_path / "dataset_coco.json"
    images = [karpathy(7, "test", "A dog."), karpathy(5, "restval", "One", "Two "), karpathy(6, "test", "A cat")]
    path.write_text(json.dumps({"images": images, "dataset": "coco"}))
    assert read_karpathy_splits(path) == {
        "test": [CaptionedImage(7, "val2014/7.jpg", ("A dog.",)), CaptionedImage(6, "val2014/6.jpg", ("A cat",))],
        "restval": [CaptionedImage(5, "val2014/5.jpg", ("One", "Two "))],
    }


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda c: c["images"].append(c["images"][0]), "cocoid occurs more than once: 7"),
        (lambda c: c["images"][0]["sentences"].clear(), "contains no image 7: sentences"),
        (lambda c: c["images"][0]["sentences"].append({}), "image 7: sentence 2: field raw is missing"),
        (lambda c: c["images"][0].pop("split"), "image 1: field split is missing"),
        (lambda c: c.pop("images"), "must be an object with a list `images`"),
    ],
)
def test_faults_of_karpathy_files_are_named(tmp_path: Path, edit: Callable[[Any], Any], told: str) -> None:
    path = tmp_path / "dataset_coco.json"
    path.write_text(json.dumps({"images": [karpathy(7, "test", "A dog.")]}))
    change(path, edit)
    with pytest.raises(UserError, match=told):
        read_karpathy_splits(path)
