"""COCO instances and result files: read, written, scored, and every fault named."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ftlib.cli.main import main
from ftlib.data.sources.coco_detection import CocoImage, read_instances, read_results, score
from ftlib.data.sources.records import match_ids
from ftlib.errors import UserError
from ftlib.metrics.coco_ap import Detection, GroundTruthObject
from ftlib.metrics.segmentation import from_polygons, write_mask
from ftlib.metrics.segmentation import run_lengths as run_lengths_of

INSTANCES: dict[str, Any] = {
    "images": [
        {"id": 7, "file_name": "7.jpg", "width": 640, "height": 480},
        {"id": 3, "file_name": "3.jpg", "width": 640, "height": 480},
        {"id": 5},
    ],
    "categories": [{"id": 1, "name": "cat"}, {"id": 18, "name": "dog"}],
    "annotations": [
        {"id": 11, "image_id": 7, "category_id": 1, "bbox": [10, 10, 50, 50], "area": 2000, "iscrowd": 0},
        {"id": 12, "image_id": 7, "category_id": 18, "bbox": [100, 10, 150.5, 150], "area": 20000.5},
        {"id": 13, "image_id": 3, "category_id": 1, "bbox": [0, 0, 300, 300], "area": 9, "iscrowd": 1},
    ],
}
RESULTS: list[dict[str, Any]] = [
    {"image_id": 7, "category_id": 1, "bbox": [12, 10, 50, 50], "score": 0.9},
    {"image_id": 7, "category_id": 18, "bbox": [100, 10, 150, 100], "score": 1},
    {"image_id": 3, "category_id": 1, "bbox": [5, 5, 20, 20], "score": 0.5},
]


def files(folder: Path, instances: Any = INSTANCES, results: Any = RESULTS) -> tuple[Path, Path]:
    (folder / "instances.json").write_text(json.dumps(instances))
    (folder / "results.json").write_text(json.dumps(results))
    return folder / "instances.json", folder / "results.json"


def test_records(tmp_path: Path) -> None:
    references, predictions = files(tmp_path)
    instances = read_instances(references)
    assert instances.images[3] == CocoImage(3, "3.jpg", 640, 480)
    assert instances.images[5] == CocoImage(5, None, None, None)
    assert instances.categories == {1: "cat", 18: "dog"}
    assert instances.objects[0] == GroundTruthObject(11, 7, 1, (10, 10, 50, 50), 2000)
    assert [one.crowd for one in instances.objects] == [False, False, True]
    assert read_results(predictions, instances)[1] == Detection(7, 18, (100, 10, 150, 100), 1.0)


@pytest.mark.parametrize("which", ["references", "results"])
def test_boxes_that_are_no_coco_boxes_are_not_scored(tmp_path: Path, which: str) -> None:
    """Corners in place of sizes, or fractions, gave an AP without a word."""
    for box, words in (
        ([400, 300, 600, 450], "as x_min, y_min, x_max, y_max 3 are inside"),
        ([0.2, 0.2, 0.5, 0.4], "pixels"),
    ):
        content = {"references": copy.deepcopy(INSTANCES), "results": copy.deepcopy(RESULTS)}
        for one in content["references"]["annotations"] if which == "references" else content["results"]:
            one["bbox"] = box
        references, predictions = files(tmp_path, content["references"], content["results"])
        with pytest.raises(UserError, match=words) as caught:
            score([references], predictions)
        assert str(references if which == "references" else predictions) in caught.value.problem


def test_failed_answers_may_have_empty_boxes(tmp_path: Path) -> None:
    references, predictions = files(tmp_path, results=[{**one, "bbox": [0, 0, 0, 0]} for one in RESULTS])
    assert score([references], predictions).values()["AP"] == 0


def test_scores_are_pycocotools(tmp_path: Path) -> None:
    references, predictions = files(tmp_path)
    whole = copy.deepcopy(INSTANCES)
    whole["annotations"][1]["iscrowd"] = 0
    truth = COCO()
    truth.dataset = whole
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        judged = COCOeval(truth, truth.loadRes(copy.deepcopy(RESULTS)), "bbox")
        judged.evaluate()
        judged.accumulate()
        judged.summarize()
    values = score([references], predictions).values()
    assert [values["AP"], values["AP50"], values["AP75"]] == pytest.approx(judged.stats[:3])
    assert 0.2 < values["AP"] < 0.9


def test_what_is_read_is_loaded_by_pycocotools(tmp_path: Path) -> None:
    references, predictions = files(tmp_path)
    found = read_results(predictions, read_instances(references))
    assert len(found) == 3
    truth = COCO()
    truth.dataset = INSTANCES
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        assert len(truth.loadRes(str(predictions)).anns) == 3


def official(instances: Any, results: Any, kind: str) -> list[float]:
    """What pycocotools itself says of two files."""
    truth = COCO()
    truth.dataset = copy.deepcopy(instances)
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        judged = COCOeval(truth, truth.loadRes(copy.deepcopy(results)), kind)
        judged.evaluate()
        judged.accumulate()
        judged.summarize()
    return [float(value) if value > -1 else float("nan") for value in judged.stats]


def masked(seed: int, boxes: bool, masks: bool = True) -> tuple[Any, Any]:
    """Random polygons and crowds in 20 images, and results near them: with boxes or without."""
    draw, encode = random.Random(seed), from_polygons
    images = [{"id": n, "width": 120, "height": 90} for n in draw.sample(range(1000), 20)]
    annotations: list[Any] = []
    results: list[Any] = []
    for image in images:
        for _ in range(draw.choice([0, 1, 4])):
            x, y, size = draw.uniform(0, 80), draw.uniform(0, 60), draw.choice([8.0, 30.0, 100.0])
            shape = [x, y, x + size, y, x + size / 2, y + size]
            mask, crowd = encode([shape], 90, 120), draw.random() < 0.2
            runs = [int(n) for n in run_lengths_of(mask.counts)]
            written: Any = {"size": [90, 120], "counts": runs} if crowd else [shape]
            entry = {"id": len(annotations) + 1, "image_id": image["id"], "category_id": draw.choice([1, 2])}
            box = [x, y, size, size]
            annotations.append(
                {**entry, "bbox": box, "area": mask.area, "iscrowd": int(crowd), "segmentation": written}
            )
            for _ in range(draw.choice([0, 1, 2])):
                moved = [value + draw.uniform(-3, 3) for value in shape]
                found = encode([moved], 90, 120)
                record = {"image_id": image["id"], "category_id": draw.choice([entry["category_id"], 1])}
                record |= {"score": draw.choice([0.5, draw.random()]), "segmentation": write_mask(found)}
                if boxes:
                    record["bbox"] = [*moved[:2], size * draw.uniform(0.8, 1.2), size]
                if not masks:
                    del record["segmentation"]
                results.append(record)
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    return {"images": images, "categories": categories, "annotations": annotations}, results


NAMES = ["AP", "AP50", "AP75", "AP: small", "AP: medium", "AP: large", "AR-1", "AR-10", "AR-100"]
NAMES += ["AR-100: small", "AR-100: medium", "AR-100: large"]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("with_boxes", [True, False])
def test_masks_are_scored_as_by_pycocotools(tmp_path: Path, seed: int, with_boxes: bool) -> None:
    """Beside the boxes, which are those around the masks where a result has none."""
    instances, results = masked(seed, with_boxes)
    references, predictions = files(tmp_path, instances, results)
    measured = score([references], predictions)
    values = measured.values()
    assert not measured.notes and 0 < values["mask AP"] != values["AP"]
    assert [values[f"mask {name}"] for name in NAMES] == pytest.approx(
        official(instances, results, "segm"), abs=1e-9, nan_ok=True
    )
    assert [values[name] for name in NAMES] == pytest.approx(
        official(instances, results, "bbox"), abs=1e-9, nan_ok=True
    )


def test_masks_of_detections_alone_are_told(tmp_path: Path) -> None:
    instances, results = masked(0, True)
    instances["annotations"][0]["segmentation"] = []
    measured = score([files(tmp_path, instances, results)[0]], tmp_path / "results.json")
    assert "mask AP" not in measured.values()
    assert measured.notes == {"mask AP": f"1 of {len(instances['annotations'])} annotations have no segmentation"}


def test_masks_of_another_size_are_refused(tmp_path: Path) -> None:
    instances, results = masked(0, True)
    results[1]["segmentation"] = write_mask(from_polygons([[0, 0, 9, 0, 9, 9]], 120, 90))
    references, predictions = files(tmp_path, instances, results)
    with pytest.raises(
        UserError, match=r"record 2: field segmentation: its size is \[120, 90\], the image's \[90, 120\]"
    ):
        score([references], predictions)


def test_ids_are_compared_as_they_are_written(tmp_path: Path) -> None:
    """Texts in one file and numbers in the other; what is not needed is missing; the values stay the same."""
    instances, results = masked(3, True, masks=False)
    plain = score([files(tmp_path, instances, results)[0]], tmp_path / "results.json").values()
    for record in results:
        record |= {"image_id": str(record["image_id"]), "category_id": str(record["category_id"])}
    found = score([files(tmp_path, instances, results)[0]], tmp_path / "results.json").values()
    assert found == pytest.approx(plain, nan_ok=True)
    for one in instances["images"]:
        one["id"] = f"image {one['id']:04d}"
    for one in [*instances["annotations"], *results]:
        one["image_id"] = f"image {int(one['image_id']):04d}"
        one.pop("id", None)
    found = score([files(tmp_path, instances, results)[0]], tmp_path / "results.json").values()
    assert found == pytest.approx(plain, nan_ok=True)
    for one in instances["annotations"]:
        one.pop("area"), one.pop("iscrowd")
    found = score([files(tmp_path, instances, results)[0]], tmp_path / "results.json").values()
    assert 0 < found["AP"] < 1


def test_an_id_that_could_mean_two_is_refused(tmp_path: Path) -> None:
    instances, results = copy.deepcopy(INSTANCES), copy.deepcopy(RESULTS)
    instances["images"].append({"id": "7"})
    assert score([files(tmp_path, instances, results)[0]], tmp_path / "results.json").n == 4
    instances["images"][0]["id"] = "x"
    for one in instances["annotations"]:
        one["image_id"] = "x" if one["image_id"] == 7 else one["image_id"]
    assert score([files(tmp_path, instances, results)[0]], tmp_path / "results.json").n == 4, "only one is written so"
    assert match_ids([7, "8"], ["7", "8", 8]) == {7: "7", "8": "8"} and match_ids([True, 8.0], [1, 8]) == {
        True: 1,
        8.0: 8,
    }
    assert match_ids(["7"], [7, 7.0]) == {"7": 7} and match_ids(["07", "x"], [7]) == {}


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    references, predictions = files(tmp_path)
    assert main(["score", "detect", "--references", str(references), "--predictions", str(predictions), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["metric"], found["n"], found["metrics"]["AP: small"]["value"]) == ("AP", 3, None)


def test_a_model_that_found_nothing_has_an_ap_of_zero(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    references, predictions = files(tmp_path, INSTANCES, [])
    assert main(["score", "detect", "--references", str(references), "--predictions", str(predictions), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["value"], found["n"]) == (0, 3)
    assert score([references], predictions).values().keys() == score([files(tmp_path)[0]], predictions).values().keys()
    predictions.write_text("")
    with pytest.raises(UserError, match="is empty"):
        score([references], predictions)


def changed(what: str, index: int, **fields: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        content[what][index].update(fields)

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (changed("results", 0, image_id=99), "1 image_ids that are not in the references: 99"),
        (changed("results", 0, category_id=2), "1 category_ids that are not in the references: 2"),
        (changed("results", 2, score="high"), "record 3: field score"),
        (changed("results", 2, score=float("nan")), "record 3: field score"),
        (changed("results", 1, bbox=[1, 2, 3]), "record 2: field bbox"),
        (changed("results", 1, bbox=[1, 2, 3, "4"]), "record 2: field bbox"),
        (changed("results", 1, bbox=[1, 2, -3, 4]), "record 2: field bbox"),
        (changed("results", 1, bbox=7), "record 2: field bbox"),
        (changed("results", 1, image_id=[7]), "record 2: field image_id"),
        (
            changed("results", 1, segmentation=[[1, 1, 5, 1, 5, 5]]),
            "record 2: field segmentation: must be in all",
        ),
        (lambda content: content["results"][0].pop("score"), "record 1: field score is missing"),
        (lambda content: content["results"].append(3), "record 4: not an object"),
        (changed("images", 0, id=3), "id occurs more than once: 3"),
        (changed("images", 0, width="wide"), "image 7"),
        (changed("categories", 0, id=18), "id occurs more than once: 18"),
        (changed("annotations", 0, id=12), "id occurs more than once: 12"),
        (changed("annotations", 0, image_id=1), "1 image_ids that are not in the references: 1"),
        (changed("annotations", 0, category_id=3), "1 category_ids that are not in the references: 3"),
        (changed("annotations", 0, area=None), "annotation 1: field area"),
        (changed("annotations", 0, id=[1]), "annotation 1: field id"),
        (changed("annotations", 0, area=-1), "annotation 11: field area"),
        (changed("annotations", 0, bbox=[]), "annotation 11: field bbox"),
        (changed("annotations", 0, iscrowd="no"), "annotation 11: field iscrowd"),
        (lambda content: content["annotations"].clear(), "contains no annotations"),
        (lambda content: content["images"].clear(), "contains no images"),
        (lambda content: content.pop("categories"), "not a COCO instances file"),
    ],
)
def test_faults_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[dict[str, Any]], Any], said: str
) -> None:
    content = copy.deepcopy({**INSTANCES, "results": RESULTS})
    change(content)
    results = content.pop("results")
    references, predictions = files(tmp_path, content, results)
    assert main(["score", "detect", "--references", str(references), "--predictions", str(predictions)]) == 2
    printed = capsys.readouterr().err
    assert said in printed and str(tmp_path) in printed


@pytest.mark.parametrize("text", ["", "[", "[]", "3", "null", '{"images": {}}'])
def test_no_instances_file(tmp_path: Path, text: str) -> None:
    references, predictions = files(tmp_path)
    references.write_text(text)
    with pytest.raises(UserError, match="instances"):
        score([references], predictions)


def test_numbers_beyond_all_measure_are_refused(tmp_path: Path) -> None:
    """They could not become floats."""
    results = [RESULTS[0] | {"bbox": [12, 10, 50, 10**400]}, *RESULTS[1:]]
    references, predictions = files(tmp_path, results=results)
    with pytest.raises(UserError, match=r"results\.json:1: cannot be parsed as JSON: a number of 401 digits"):
        score([references], predictions)


def test_one_reference_file(tmp_path: Path) -> None:
    references, predictions = files(tmp_path)
    for paths in ([], [references, references]):
        with pytest.raises(UserError, match="one reference file"):
            score(paths, predictions)
