"""COCO files of annotation tools under any name, and what is wrong with boxes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ftlib.config.schema import Data
from ftlib.data.scan import scan_source
from ftlib.data.sources import coco_captions, coco_detection, refcoco
from ftlib.errors import UserError
from ftlib.tasks.registry import load_task
from tests.data.sources import releases
from tests.data.sources.records import CATEGORIES, coco_caption, coco_image, coco_object
from tests.data.sources.releases import data, read

Ftlib = Callable[..., tuple[int, str, str]]


def coco(names: list[str], boxes: list[tuple[int, int, list[float]]], size: tuple[int, int] = (400, 200)) -> Any:
    """A file of a tool: images from 0 on, categories 1 cat and 2 dog; boxes are (image, category, bbox)."""
    return {
        "images": [{"id": n, "file_name": name, "width": size[0], "height": size[1]} for n, name in enumerate(names)],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [
            {"id": n, "image_id": image, "category_id": kind, "bbox": box, "area": 1, "iscrowd": 0}
            for n, (image, kind, box) in enumerate(boxes, 1)
        ],
    }


def write(path: Path, content: Any, pictures: Path | None = None) -> None:
    """The file, and its pictures in a folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    for image in content["images"] if pictures else []:
        place = (pictures or path) / image["file_name"]
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((image["width"], image["height"]), 50).save(place)


CAT: tuple[int, int, list[float]] = (0, 1, [100, 50, 200, 100])
DOG: tuple[int, int, list[float]] = (0, 2, [10, 10, 50, 50])


def test_roboflow(tmp_path: Path) -> None:
    for part in ("train", "valid", "test"):
        write(tmp_path / part / "_annotations.coco.json", coco(["a.jpg"], [CAT]), tmp_path / part)
    rows, bad = read(coco_detection.examples, data(tmp_path))
    assert not bad and [(row.id, row.part, row.image) for row in rows] == [
        ("test-0", "test", "test/a.jpg"),
        ("train-0", "train", "train/a.jpg"),
        ("valid-0", "valid", "valid/a.jpg"),
    ]


def test_a_part_of_unknown_name_is_refused(tmp_path: Path) -> None:
    for part in ("train", "holdout"):
        write(tmp_path / part / "_annotations.coco.json", coco(["a.jpg"], [CAT]))
    with pytest.raises(UserError, match="'holdout' is not a known split name"):
        read(coco_detection.examples, data(tmp_path))


@pytest.mark.parametrize(
    ("file", "pictures", "image"),
    [
        ("annotations/instances_default.json", "images", "images/a.jpg"),
        ("annotations/instances_default.json", "images/default", "images/default/a.jpg"),
        ("result.json", ".", "a.jpg"),
        ("_annotations.coco.json", ".", "a.jpg"),
    ],
)
def test_tools_with_one_file(tmp_path: Path, file: str, pictures: str, image: str) -> None:
    write(tmp_path / file, coco(["a.jpg"], [CAT, DOG]), tmp_path / pictures)
    rows, bad = read(coco_detection.examples, data(tmp_path))
    assert not bad and [(row.id, row.part, row.image, row.prefix) for row in rows] == [
        ("0", "", image, "detect cat ; dog")
    ]


def test_cvat_with_a_file_for_each_part(tmp_path: Path) -> None:
    for name in ("Train", "Validation"):
        write(tmp_path / f"annotations/instances_{name}.json", coco(["a.jpg"], [CAT]), tmp_path / "images" / name)
    rows, _ = read(coco_detection.examples, data(tmp_path))
    found = [(row.id, row.part, row.image) for row in rows]
    assert found == [("train-0", "train", "images/Train/a.jpg"), ("valid-0", "valid", "images/Validation/a.jpg")]
    write(tmp_path / "annotations/instances_val.json", coco(["a.jpg"], [CAT]))
    with pytest.raises(UserError, match="are both split valid"):
        read(coco_detection.examples, data(tmp_path))


def test_a_file_of_any_name_for_each_split(tmp_path: Path) -> None:
    files = {"train": ["lists/pets_train.json"], "test": [str(tmp_path / "elsewhere/pets_test.json")]}
    root = tmp_path / "root"
    write(root / "lists/pets_train.json", coco(["a.jpg"], [CAT]), root / "images")
    write(tmp_path / "elsewhere/pets_test.json", coco(["b.jpg"], [CAT]), root / "pets_test")
    rows, bad = read(coco_detection.examples, data(root, "coco_detection", files=files))
    assert not bad and [(row.id, row.part, row.part_name, row.image) for row in rows] == [
        ("train-0", "train", "pets_train", "images/a.jpg"),
        ("test-0", "test", "pets_test", "pets_test/b.jpg"),
    ]
    with pytest.raises(UserError, match=r"none\.json: no such file"):
        read(coco_detection.examples, data(root, "coco_detection", files={"train": ["none.json"]}))


def test_other_splits_beside_a_file_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("pets_train", "pets_val"):
        write(tmp_path / f"{name}.json", coco(["a.jpg"], [CAT]))
    section = Data(source="coco_detection", root=str(tmp_path), file="pets_train.json")
    assert len(scan_source(section, tmp_path / "rows.arrow", load_task("detect")).rows) == 1
    assert "data.files: {train: pets_train.json, valid: pets_val.json}" in capsys.readouterr().err


def test_any_name_and_folders_in_file_name(tmp_path: Path) -> None:
    write(tmp_path / "labels" / "mine.json", coco(["far/away/a.jpg"], [CAT]), tmp_path / "pictures")
    (row,), _ = read(coco_detection.examples, data(tmp_path, file="labels/mine.json"))
    assert row.image == "labels/far/away/a.jpg", "nothing lies anywhere: told when images are opened"
    write(tmp_path / "labels" / "mine.json", coco(["images\\away\\a.jpg"], [CAT]))
    write(tmp_path / "unused.json", coco(["images/away/a.jpg"], []), tmp_path)
    (row,), _ = read(coco_detection.examples, data(tmp_path, file="labels/mine.json"))
    assert row.image == "images/away/a.jpg", "written on Windows"
    with pytest.raises(UserError, match=r"other\.json: no such file"):
        read(coco_detection.examples, data(tmp_path, file="other.json"))


def test_what_is_not_needed_may_be_missing(tmp_path: Path) -> None:
    content = coco(["a.jpg", "b.jpg"], [CAT, DOG, (1, 1, [1, 1, 50, 50])])
    for number, image in enumerate(content["images"]):
        image["id"] = f"img-{number}"
    for one in content["annotations"]:
        one["image_id"] = f"img-{one['image_id']}"
        one["category_id"] = str(one["category_id"])
        del one["id"], one["area"], one["iscrowd"]
    write(tmp_path / "result.json", content)
    rows, bad = read(coco_detection.examples, data(tmp_path))
    assert not bad and [(row.id, row.prefix) for row in rows] == [
        ("img-0", "detect cat ; dog"),
        ("img-1", "detect cat"),
    ]
    assert [(one["category_id"], one["area"]) for one in rows[0].facts["objects"]] == [(1, 20000), (2, 2500)]


def corner(box: list[float]) -> list[float]:
    return [box[0], box[1], box[0] + box[2], box[1] + box[3]]


BOXES = [[10, 10, 50, 50], [100, 20, 200, 100], [300, 100, 100, 100], [0, 0, 400, 200], [250, 150, 30.5, 20]]


def test_images_are_counted_as_they_stand_in_the_file(tmp_path: Path) -> None:
    """Records that cannot be used count, too."""
    images = [{"file_name": "no id"}, *(coco_image(number) for number in (1, 2))]
    notes = [coco_object(2) | {"category_id": "nine", "bbox": None}]
    del notes[0]["category_id"]
    write(tmp_path / "d.json", {"images": images, "categories": CATEGORIES, "annotations": notes})
    _, bad = read(coco_detection.examples, data(tmp_path, file="d.json"))
    told = "one of its annotations is invalid and has no valid category"
    assert (f"{tmp_path / 'd.json'}: image 3", told) in [(one.location, one.reason) for one in bad]
    write(tmp_path / "c.json", {"images": images, "annotations": [coco_caption(1)]})
    (row,), bad = read(coco_captions.examples, data(tmp_path, file="c.json"))
    assert row.location == f"{tmp_path / 'c.json'}: image 2"
    assert [one.location for one in bad] == [f"{tmp_path / 'c.json'}: image {number}" for number in (1, 3)]


def test_corners_in_place_of_sizes_are_refused(tmp_path: Path) -> None:
    """Read as sizes, most of them leave the image; before, they were cut off at its edge."""
    right = coco([f"{n}.jpg" for n in range(5)], [(n, 1, [*map(float, box)]) for n, box in enumerate(BOXES)])
    write(tmp_path / "result.json", right)
    assert len(read(coco_detection.examples, data(tmp_path))[0]) == 5
    for one in right["annotations"]:
        one["bbox"] = corner(one["bbox"])
    write(tmp_path / "result.json", right)
    for on_bad in ("stop", "skip"):
        with pytest.raises(UserError, match=r"2 of 5 boxes would exceed .* as x_min, y_min, x_max, y_max 5 are inside"):
            read(coco_detection.examples, data(tmp_path, on_bad=on_bad))


def test_whole_images_and_one_wrong_box_are_no_corners(tmp_path: Path) -> None:
    """Boxes of which both readings lie inside say nothing; one that leaves the image is one fault."""
    boxes: list[tuple[int, int, list[float]]] = [(n, 1, [0, 0, 400, 200]) for n in range(20)]
    write(tmp_path / "result.json", coco([f"{n}.jpg" for n in range(21)], boxes))
    assert not read(coco_detection.examples, data(tmp_path))[1]
    write(tmp_path / "result.json", coco([f"{n}.jpg" for n in range(21)], [*boxes, (20, 2, [300, 100, 399, 199])]))
    (bad,) = read(coco_detection.examples, data(tmp_path))[1]
    assert bad.location.endswith("annotation of id 21")
    said = "dog in 20.jpg: field bbox: x, y, width, height [300, 100, 399, 199] exceed the image of 400 × 200 pixels"
    assert bad.reason == said


def test_fractions_in_place_of_pixels_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "result.json", coco(["a.jpg"], [(0, 1, [0.1, 0.2, 0.3, 0.4]), (0, 2, [0, 0, 1, 1])]))
    with pytest.raises(UserError, match="not in pixels: no number of its 2 boxes is larger than 1"):
        read(coco_detection.examples, data(tmp_path))


@pytest.mark.parametrize(
    ("box", "inside"),
    [([-1.5, 0, 50, 50], True), ([350, 100, 52, 101], True), ([-3, 0, 50, 50], False), ([350, 0, 53, 50], False),
     ([0, 190, 9, 13], False), ([900, 10, 20, 20], False)],
)  # fmt: skip
def test_rounding_is_no_fault(tmp_path: Path, box: list[float], inside: bool) -> None:
    """2 pixels of 400 or 200."""
    more = [(0, 1, [10.0, 10.0, n, n]) for n in range(5, 30)]
    write(tmp_path / "result.json", coco(["a.jpg"], [*more, (0, 2, box)]))
    rows, bad = read(coco_detection.examples, data(tmp_path))
    assert (rows[0].prefix, len(bad)) == (("detect cat ; dog", 0) if inside else ("detect cat", 1))


def test_a_bad_box_costs_its_category_in_its_image(tmp_path: Path) -> None:
    """The row stays, and its answer lacks no box of what it is asked for."""
    content = coco(["a.jpg", "b.jpg"], [CAT, DOG, (0, 2, [1, 2, 3]), (1, 2, [5, 5, 50, 50])])
    write(tmp_path / "result.json", content)
    rows, bad = read(coco_detection.examples, data(tmp_path))
    assert [row.prefix for row in rows] == ["detect cat", "detect dog"]
    assert {one["label"] for one in rows[0].facts["objects"]} == {"cat"}, "nor is it missed when answers are scored"
    assert len(bad) == 1 and "annotation 3: field bbox" in bad[0].reason
    content["annotations"][2].pop("category_id")
    write(tmp_path / "result.json", content)
    rows, bad = read(coco_detection.examples, data(tmp_path))
    assert [row.prefix for row in rows] == ["detect dog"] and "has no valid category" in bad[1].reason


@pytest.mark.parametrize(("turn", "faulty"), [(30.0, True), (90, True), (0.0, False), (180, False)])
def test_turned_boxes_of_cvat_are_refused(tmp_path: Path, turn: float, faulty: bool) -> None:
    """CVAT writes the box before the turn, which was learned as it stands."""
    content = coco(["a.jpg"], [CAT])
    content["annotations"][0]["attributes"] = {"occluded": False, "rotation": turn}
    write(tmp_path / "annotations/instances_default.json", content, tmp_path / "images")
    rows, bad = read(coco_detection.examples, data(tmp_path))
    assert len(bad) == faulty and len(rows) == (not faulty)
    assert all(f"the box is rotated by {turn:g} degrees" in one.reason for one in bad)


def test_the_same_id_twice_costs_the_category_too(tmp_path: Path) -> None:
    content = coco(["a.jpg"], [CAT, DOG, (0, 2, [90, 90, 9, 9])])
    content["annotations"][2]["id"] = 2
    write(tmp_path / "result.json", content)
    rows, bad = read(coco_detection.examples, data(tmp_path))
    assert [row.prefix for row in rows] == ["detect cat"] and len(bad) == 1


def test_all_categories_and_images_without_boxes(tmp_path: Path) -> None:
    """Without it images without boxes are left out, and a prompt tells what is in the image."""
    boxes = [CAT, (2, 2, [1, 2, 3]), (3, 1, [5.0, 5.0, 0.0, 9.0])]
    content = coco([f"{n}.jpg" for n in range(5)], boxes)
    content["annotations"].append({**content["annotations"][0], "id": 9, "image_id": 4, "iscrowd": 1})
    write(tmp_path / "result.json", content)
    section = data(tmp_path, categories="all")
    rows, bad = read(coco_detection.examples, section)
    assert [(row.id, row.prefix, row.suffix != "") for row in rows] == [
        ("0", "detect cat ; dog", True),
        ("1", "detect cat ; dog", False),
        ("2", "detect cat", False),
        ("3", "detect dog", False),
        ("4", "detect dog", False),
    ]
    assert len(bad) == 1 and coco_detection.skipped_counts(section) == {
        coco_detection.BOX_OUTSIDE_IMAGE: 1,
        coco_detection.IMAGE_WITHOUT_BOXES: 0,
    }
    assert [row.id for row in read(coco_detection.examples, data(tmp_path))[0]] == ["0"]


def test_a_category_above_all_others_is_not_asked_for(tmp_path: Path) -> None:
    """Roboflow writes one first: it has no boxes. One that has boxes is asked for, whatever stands below it."""
    content = coco(["a.jpg", "b.jpg"], [CAT])
    for one in content["categories"]:
        one["supercategory"] = "pets"
    content["categories"].insert(0, {"id": 0, "name": "pets", "supercategory": "none"})
    write(tmp_path / "result.json", content)
    rows, _ = read(coco_detection.examples, data(tmp_path, categories="all"))
    assert [row.prefix for row in rows] == ["detect cat ; dog"] * 2
    content["annotations"].append({**content["annotations"][0], "id": 2, "category_id": 0, "image_id": 1})
    write(tmp_path / "result.json", content)
    rows, _ = read(coco_detection.examples, data(tmp_path, categories="all"))
    assert [row.prefix for row in rows] == ["detect pets ; cat ; dog"] * 2


def test_refcoco_has_the_same_rules(tmp_path: Path) -> None:
    path = releases.refcoco(tmp_path) / "refcoco" / "instances.json"
    whole = json.loads(path.read_text())
    releases.change(path, lambda c: c["annotations"][2].update(bbox=[-9, 50, 100, 100]))
    rows, bad = read(refcoco.examples, data(tmp_path, "refcoco"))
    assert len(rows) == 4 and "annotation 1002: field bbox: x, y, width, height [-9, 50" in bad[0].reason
    for one in whole["annotations"]:
        one["bbox"] = corner([250, 50, 100, 100])
    write(path, whole)
    with pytest.raises(UserError, match="6 of 6 boxes would exceed their images"):
        read(refcoco.examples, data(tmp_path, "refcoco"))


CONFIG = """
name: boxes
task: detect
model: {family: paligemma, base: ftlib/tiny-paligemma}
adapter: {method: full}
data: {source: coco_detection, root: ROOT, split: {valid: 2, test: 2}}
"""


def test_sizes_that_are_not_the_file_s_are_refused(tmp_path: Path, ftlib: Ftlib, store: Path) -> None:
    """A photograph that was annotated as it lies on the disk, but is shown upright; one that was made smaller."""
    names = [f"{n}.jpg" for n in range(9)]
    content = coco(names, [(n, 1, [100, 50, 200, 100]) for n in range(9)])
    write(tmp_path / "data" / "result.json", content, tmp_path / "data")
    (tmp_path / "boxes.yaml").write_text(CONFIG.replace("ROOT", str(tmp_path / "data")))
    assert ftlib("prepare", tmp_path / "boxes.yaml")[0] == 0
    exif = Image.Exif()
    exif[274] = 6
    Image.effect_noise((400, 200), 50).save(tmp_path / "data" / "7.jpg", exif=exif)
    Image.effect_noise((200, 100), 50).save(tmp_path / "data" / "8.jpg")
    content["info"] = "prepare again"
    write(tmp_path / "data" / "result.json", content)
    code, _, error = ftlib("prepare", tmp_path / "boxes.yaml")
    assert code == 2
    assert "7.jpg: 200 × 400 pixels, but its annotation has 400 × 200: width and height are swapped" in error
    assert "8.jpg: 200 × 100 pixels, but its annotation has 400 × 200: boxes" in error
    code, _, error = ftlib("prepare", tmp_path / "boxes.yaml", "data.on_bad=skip")
    assert code == 0 and "2 invalid records are skipped" in error


def test_negatives_are_prepared(tmp_path: Path, ftlib: Ftlib, store: Path) -> None:
    names = [f"{n}.jpg" for n in range(9)]
    write(tmp_path / "data" / "result.json", coco(names, [CAT]), tmp_path / "data")
    (tmp_path / "boxes.yaml").write_text(CONFIG.replace("ROOT", str(tmp_path / "data")))
    code, _, error = ftlib("prepare", tmp_path / "boxes.yaml", "data.categories=all")
    assert code == 0, error
    assert "train" in error


def test_what_may_be_a_mistake_and_what_nothing_uses_is_told(tmp_path: Path, ftlib: Ftlib, store: Path) -> None:
    names = [f"{n}.jpg" for n in range(9)]
    content = coco(names, [CAT, DOG, *[(n, 1, [10, 10, 50, 50]) for n in range(1, 9)], CAT, (2, 3, [5, 5, 9, 9])])
    content["categories"] += [{"id": 3, "name": "Cat "}, {"id": 4, "name": "bird"}]
    content["images"][3]["license"] = 7
    content["annotations"][5] |= {"segmentation": [], "attributes": {"occluded": True}}
    write(tmp_path / "data" / "result.json", content, tmp_path / "data")
    (tmp_path / "boxes.yaml").write_text(CONFIG.replace("ROOT", str(tmp_path / "data")))
    for _ in range(2):  # made, and found again
        code, _, error = ftlib("prepare", tmp_path / "boxes.yaml")
        assert code == 0, error
        assert "unused fields: annotations.attributes, annotations.segmentation, images.license\n" in error
        assert "result.json: category 'Cat' (1 row) and 'cat' (10 rows) differ only in upper and lower case" in error
        assert "result.json: 1 duplicate boxes, the first of them a cat" in error
        assert "several categories" not in error and "bird" not in error
    code, output, _ = ftlib("prepare", tmp_path / "boxes.yaml", "--check")
    assert code == 0 and "differ only in upper and lower case" in output
    content["categories"][2]["name"] = "cat"
    write(tmp_path / "data" / "result.json", content)
    _, _, error = ftlib("prepare", tmp_path / "boxes.yaml")
    assert "result.json: several categories have the same name" in error
