"""COCO instances and result files: read, written, scored, and every fault named."""

from __future__ import annotations

import contextlib
import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ftlib.__main__ import main
from ftlib.data.official.detection import Picture, read_instances, read_results, score
from ftlib.errors import UserError
from ftlib.metrics.boxes import Detection, Object

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
    assert instances.pictures[3] == Picture(3, "3.jpg", 640, 480)
    assert instances.pictures[5] == Picture(5, None, None, None)
    assert instances.categories == {1: "cat", 18: "dog"}
    assert instances.objects[0] == Object(11, 7, 1, (10, 10, 50, 50), 2000)
    assert [one.crowd for one in instances.objects] == [False, False, True]
    assert read_results(predictions, instances)[1] == Detection(7, 18, (100, 10, 150, 100), 1.0)


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


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    references, predictions = files(tmp_path)
    assert main(["score", "detect", "--references", str(references), "--predictions", str(predictions), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["metric"], found["n"], found["metrics"]["AP: small"]["value"]) == ("AP", 3, None)


def changed(what: str, index: int, **fields: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        content[what][index].update(fields)

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (changed("results", 0, image_id=99), "1 image_ids that the references do not have: 99"),
        (changed("results", 0, category_id=2), "1 category_ids that the references do not have: 2"),
        (changed("results", 2, score="high"), "record 3: field score"),
        (changed("results", 2, score=float("nan")), "record 3: field score"),
        (changed("results", 1, bbox=[1, 2, 3]), "record 2: field bbox"),
        (changed("results", 1, bbox=[1, 2, 3, "4"]), "record 2: field bbox"),
        (changed("results", 1, bbox=[1, 2, -3, 4]), "record 2: field bbox"),
        (changed("results", 1, bbox=7), "record 2: field bbox"),
        (changed("results", 1, image_id="7"), "record 2: field image_id"),
        (lambda content: content["results"][0].pop("score"), "record 1: field score is missing"),
        (lambda content: content["results"].clear(), "no records in it"),
        (lambda content: content["results"].append(3), "record 4: not an object"),
        (changed("images", 0, id=3), "id occurs more than once: 3"),
        (changed("images", 0, width="wide"), "image 7"),
        (changed("categories", 0, id=18), "id occurs more than once: 18"),
        (changed("annotations", 0, id=12), "id occurs more than once: 12"),
        (changed("annotations", 0, image_id=1), "1 image_ids that the references do not have: 1"),
        (changed("annotations", 0, category_id=3), "1 category_ids that the references do not have: 3"),
        (changed("annotations", 0, area=None), "annotation 1: field area"),
        (changed("annotations", 0, area=-1), "annotation 11: field area"),
        (changed("annotations", 0, bbox=[]), "annotation 11: field bbox"),
        (changed("annotations", 0, iscrowd="no"), "annotation 11: field iscrowd"),
        (lambda content: content["annotations"].clear(), "no annotations in it"),
        (lambda content: content["images"].clear(), "no images in it"),
        (lambda content: content.pop("categories"), "no COCO instances file"),
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


def test_one_reference_file(tmp_path: Path) -> None:
    references, predictions = files(tmp_path)
    for paths in ([], [references, references]):
        with pytest.raises(UserError, match="one reference file"):
            score(paths, predictions)
