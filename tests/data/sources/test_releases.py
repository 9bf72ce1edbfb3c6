"""Loaders of the official releases of VQAv2, DocVQA, GQA, COCO and RefCOCO: rows, parts, ids, facts."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from ftlib.data.sources import coco_captions, coco_detection, docvqa, gqa, refcoco, vqav2
from ftlib.errors import UserError
from tests.data.sources import releases
from tests.data.sources.releases import change, data, read


@pytest.mark.parametrize("nested", [False, True])
def test_vqav2(tmp_path: Path, nested: bool) -> None:
    rows, bad = read(vqav2.examples, data(releases.vqav2(tmp_path, nested)))
    assert [(row.id, row.part) for row in rows] == [("9000", "train"), ("9001", "train"), ("42000", "valid")]
    assert not bad
    folder = "images/" if nested else ""
    assert rows[0].image == f"{folder}train2014/COCO_train2014_000000000009.jpg"
    assert rows[2].image == f"{folder}val2014/COCO_val2014_000000000042.jpg"
    assert (rows[0].prefix, rows[0].suffix) == ("What is 9000?", "net")
    assert list(rows[2].references) == ["net"] * 6 + ["netting", "mesh", "nets", "net "]
    facts = {"question_id": 42000, "image_id": 42, "question_type": "what is", "answer_type": "other"}
    assert rows[2].facts == facts | {"question": "What is 42000?"}


def test_vqav2_answers_in_any_order(tmp_path: Path) -> None:
    path = releases.vqav2(tmp_path) / "v2_mscoco_train2014_annotations.json"
    change(path, lambda c: c["annotations"].reverse())
    rows, bad = read(vqav2.examples, data(tmp_path))
    assert [(row.id, row.prefix) for row in rows][:2] == [("9001", "What is 9001?"), ("9000", "What is 9000?")]
    assert not bad


def test_vqav2_without_a_most_frequent_answer(tmp_path: Path) -> None:
    path = releases.vqav2(tmp_path) / "v2_mscoco_val2014_annotations.json"
    change(path, lambda c: c["annotations"][0].pop("multiple_choice_answer"))
    change(path, lambda c: c["annotations"][0].update(answers=releases.answers("a", "b", "b", "a", "c")))
    assert read(vqav2.examples, data(tmp_path))[0][2].suffix == "a"


VQA_FAULTS: dict[str, tuple[str, Any, str, str]] = {
    "question twice": (
        "questions",
        lambda c: c.append(c[0]),
        "questions.json: question 3",
        "id 9000: another",
    ),
    "answered twice": ("annotations", lambda c: c.append(c[0]), "annotation 3", "question_id 9000: no such question"),
    "not asked": ("questions", lambda c: c.pop(), "annotation 2", "question_id 9001: no such question"),
    "not answered": ("annotations", lambda c: c.pop(), "questions.json: question_id 9001", "has no annotation"),
    "other image": ("annotations", lambda c: c[1].update(image_id=8), "annotation 2", "question is about 9"),
    "no answers": ("annotations", lambda c: c[1].update(answers=[]), "annotation 2", "field answers: is empty"),
    "empty": ("annotations", lambda c: c[1].update(multiple_choice_answer=" "), "annotation 2", "is empty"),
    "a list": ("annotations", lambda c: c.__setitem__(1, []), "annotation 2", "not a JSON object"),
    "text as id": ("questions", lambda c: c[1].update(question_id=None), "question 2", "field question_id"),
}


@pytest.mark.parametrize("name", VQA_FAULTS)
def test_vqav2_faults(tmp_path: Path, name: str) -> None:
    which, edit, place, reason = VQA_FAULTS[name]
    releases.vqav2(tmp_path)
    kind = "OpenEnded_mscoco" if which == "questions" else "mscoco"
    change(tmp_path / f"v2_{kind}_train2014_{which}.json", lambda c: edit(c[which]))
    rows, bad = read(vqav2.examples, data(tmp_path))
    assert [row.id for row in rows if row.part == "valid"] == ["42000"]
    assert any(place in one.location and reason in one.reason for one in bad), bad
    assert "9000" in [row.id for row in rows]


def test_ok_vqa_and_conversions(tmp_path: Path) -> None:
    """The same form under other names; ids as texts, answers as texts, no kinds of questions."""
    releases.vqav2(tmp_path)
    for path in tmp_path.glob("v2_*.json"):
        path.rename(path.with_name(path.name.removeprefix("v2_")))
    plain, bad = read(vqav2.examples, data(tmp_path))
    assert len(plain) == 3 and not bad

    def convert(content: Any) -> None:
        for one in content["annotations"]:
            one |= {"question_id": str(one["question_id"]), "answers": [each["answer"] for each in one["answers"]]}
            for name in ("image_id", "question_type", "answer_type"):
                one.pop(name)

    change(tmp_path / "mscoco_train2014_annotations.json", convert)
    rows, bad = read(vqav2.examples, data(tmp_path))
    assert not bad and [(row.id, row.image, row.suffix, row.references) for row in rows] == [
        (row.id, row.image, row.suffix, row.references) for row in plain
    ]
    assert rows[0].facts == {"question_id": "9000", "image_id": 9, "question": "What is 9000?"}
    releases.vqav2(tmp_path)
    assert vqav2.files(data(tmp_path))[0].name.startswith("v2_"), "both are there"
    chosen = vqav2.files(data(tmp_path, file="OpenEnded_mscoco_val2014_questions.json"))
    assert [path.name for path in chosen] == [
        "OpenEnded_mscoco_train2014_questions.json",
        "OpenEnded_mscoco_val2014_questions.json",
        "mscoco_train2014_annotations.json",
        "mscoco_val2014_annotations.json",
    ]


def test_captions_of_any_name(tmp_path: Path) -> None:
    root = releases.coco_captions(tmp_path)
    path = root / "annotations" / "captions_train2014.json"
    plain, _ = read(coco_captions.examples, data(root))
    change(path, lambda c: [one.update(image_id=str(one["image_id"])) for one in c["annotations"]])
    assert read(coco_captions.examples, data(root))[0] == plain
    path = path.rename(root / "mine.json")
    change(path, lambda c: [one.pop("id") for one in c["annotations"]])
    change(path, lambda c: [one.update(file_name=f"far\\{one['file_name']}") for one in c["images"]])
    rows, bad = read(coco_captions.examples, data(root, file="mine.json"))
    assert not bad and [(row.part, row.suffix) for row in rows] == [
        ("", row.suffix) for row in plain if row.part == "train"
    ]
    assert rows[0].image == "far/COCO_train2014_000000000009.jpg"
    (root / "annotations" / "captions_val2014.json").unlink()
    with pytest.raises(UserError, match="no official annotation file"):
        read(coco_captions.examples, data(root))
    releases.karpathy(root)
    (root / "dataset_coco.json").rename(root / "other.json")
    assert len(read(coco_captions.examples, data(root, file="other.json"))[0]) == 6


def test_a_part_needs_both_files(tmp_path: Path) -> None:
    releases.vqav2(tmp_path)
    (tmp_path / "v2_mscoco_val2014_annotations.json").unlink()
    with pytest.raises(UserError, match=r"v2_mscoco_val2014_annotations\.json is missing"):
        vqav2.files(data(tmp_path))
    (tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json").unlink()
    assert {row.part for row in read(vqav2.examples, data(tmp_path))[0]} == {"train"}
    assert len(vqav2.files(data(tmp_path))) == 2


@pytest.mark.parametrize("types", [True, False])
def test_docvqa(tmp_path: Path, types: bool) -> None:
    rows, bad = read(docvqa.examples, data(releases.docvqa(tmp_path, types)))
    assert [(row.id, row.part, row.group) for row in rows] == [
        ("337", "train", "279"),
        ("338", "train", "279"),
        ("49153", "valid", "14465"),
    ]
    assert not bad
    first = rows[0]
    assert (first.image, first.prefix) == ("documents/xnbl0037_279.png", "What is 337?")
    assert (first.suffix, list(first.references)) == ("0.28", ["0.28", ".28"])
    assert (rows[2].suffix, list(rows[2].references)) == (" $5 ", [" $5 "])
    facts = {"questionId": 337, "docId": 279, "question": "What is 337?"}
    assert first.facts == (facts | {"question_types": ["table/list", "form"]} if types else facts)


def test_docvqa_prefers_types_and_finds_pages_beside_the_questions(tmp_path: Path) -> None:
    """The older downloads: train/train_v1.0.json beside train/documents/, and val/…"""
    releases.docvqa(tmp_path / "all", types=False)
    releases.docvqa(tmp_path / "all")
    for split in ("train", "val"):
        for path in (tmp_path / "all").glob(f"{split}_*"):
            (tmp_path / "split" / split / "documents").mkdir(parents=True, exist_ok=True)
            path.rename(tmp_path / "split" / split / path.name)
    rows, _ = read(docvqa.examples, data(tmp_path / "split"))
    assert [row.image.split("/")[:2] for row in rows] == [["train", "documents"]] * 2 + [["val", "documents"]]
    assert all(row.facts["question_types"] for row in rows)
    assert [path.name for path in docvqa.files(data(tmp_path / "split"))] == [
        "train_v1.0_withQT.json",
        "val_v1.0_withQT.json",
    ]


def test_docvqa_pages_in_folders_of_the_splits(tmp_path: Path) -> None:
    (releases.docvqa(tmp_path) / "documents").rmdir()
    for split in ("train", "val"):
        (tmp_path / split / "documents").mkdir(parents=True)
    rows, _ = read(docvqa.examples, data(tmp_path))
    assert [row.image.split("/")[0] for row in rows] == ["train", "train", "val"]


@pytest.mark.parametrize("below", ["", "images"])
def test_docvqa_pages_of_the_newer_download(tmp_path: Path, below: str) -> None:
    """There they lie in spdocvqa_images/, while the questions still say documents/."""
    (releases.docvqa(tmp_path) / "documents").rmdir()
    (tmp_path / below / "spdocvqa_images").mkdir(parents=True)
    rows, bad = read(docvqa.examples, data(tmp_path))
    assert [row.image for row in rows] == [
        str(Path(below) / f"spdocvqa_images/xnbl0037_{page}.png") for page in (279, 279, 14465)
    ]
    assert not bad


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda row: row.pop("answers"), "field answers: is missing or empty"),
        (lambda row: row.update(answers=[]), "field answers: is missing or empty"),
        (lambda row: row.update(answers=["x", 3]), "field answers: a list of texts"),
        (lambda row: row.update(answers=[" "]), "field answers: is empty"),
        (lambda row: row.pop("image"), "field image is missing"),
        (lambda row: row.update(docId=[3]), "field docId"),
        (lambda row: row.update(questionId=337), "field id: duplicate of '337' in question 1"),
    ],
)
def test_docvqa_faults(tmp_path: Path, edit: Any, reason: str) -> None:
    path = releases.docvqa(tmp_path) / "train_v1.0_withQT.json"
    change(path, lambda c: edit(c["data"][1]))
    rows, bad = read(docvqa.examples, data(tmp_path))
    assert [row.id for row in rows] == ["337", "49153"]
    assert [one.location for one in bad] == [f"{path}: question 2"] and reason in bad[0].reason


def test_ids_are_compared_over_all_parts(tmp_path: Path) -> None:
    path = releases.docvqa(tmp_path) / "val_v1.0_withQT.json"
    change(path, lambda c: c["data"][0].update(questionId=338))
    _, (bad,) = read(docvqa.examples, data(tmp_path))
    assert bad.location == f"{path}: question 1"
    assert bad.reason == f"field id: duplicate of '338' in question 2 of {tmp_path / 'train_v1.0_withQT.json'}"


def test_gqa_trains_on_balanced_questions_and_evaluates_what_consistency_needs(tmp_path: Path) -> None:
    rows, bad = read(gqa.examples, data(releases.gqa(tmp_path)))
    assert [(row.id, row.part) for row in rows] == [
        ("02930152", "train"),
        ("05451384", "valid"),
        ("05451385", "valid"),
        ("20968379", "test"),
    ]
    assert not bad
    assert (rows[0].image, rows[0].prefix, rows[0].suffix) == (
        "images/2354786.jpg",
        "Is the sky in 2354786 dark?",
        "yes",
    )
    question = releases.gqa_question("2354786", "yes", True, ["02930152", "02930160"])
    assert rows[0].facts == {
        name: question[name] for name in ("question", "isBalanced", "types", "groups", "entailed", "semantic")
    }


def test_gqa_counts_the_questions_that_are_not_asked(tmp_path: Path) -> None:
    section = data(releases.gqa(tmp_path))
    assert gqa.skipped_counts(section) == {gqa.NOT_EVALUATED: 1}
    (tmp_path / "train_balanced_questions.json").unlink()
    assert gqa.skipped_counts(section) == {gqa.NOT_EVALUATED: 3}
    assert gqa.skipped_counts(data(tmp_path, balanced=False)) == {gqa.NOT_EVALUATED: 1}


def test_gqa_all_questions(tmp_path: Path) -> None:
    section = data(releases.gqa(tmp_path), balanced=False)
    rows, _ = read(gqa.examples, section)
    assert [row.id for row in rows if row.part == "train"] == ["02930152", "02930160", "07333408"]
    assert [row.id for row in rows if row.part == "valid"] == ["05451384", "05451385"]
    assert [path.name for path in gqa.files(section)][:2] == [
        "train_all_questions_0.json",
        "train_all_questions_1.json",
    ]


def test_gqa_balanced_questions_from_the_folder_of_all(tmp_path: Path) -> None:
    (releases.gqa(tmp_path) / "train_balanced_questions.json").unlink()
    rows, _ = read(gqa.examples, data(tmp_path))
    assert [row.id for row in rows if row.part == "train"] == ["02930152"]


def test_gqa_file_chooses_the_balanced_questions_of_a_part(tmp_path: Path) -> None:
    rows, _ = read(gqa.examples, data(releases.gqa(tmp_path), file="val_balanced_questions.json"))
    assert [row.id for row in rows] == ["02930152", "05451384", "20968379"]


def test_gqa_records_are_what_its_metrics_take(tmp_path: Path) -> None:
    """With both answers consistency can be computed: the entailed questions are there."""
    from ftlib.tasks.registry import load_task

    rows, _ = read(gqa.examples, data(releases.gqa(tmp_path)))
    records = [
        {
            "id": row.id,
            "image": row.image,
            "prompt": row.prefix,
            "prediction": row.suffix,
            "references": [row.suffix],
            "facts": row.facts,
        }
        for row in rows
        if row.part == "valid"
    ]
    values = load_task("gqa").score(records, [], None).values()
    assert (values["accuracy"], values["consistency"]) == (100, 100)


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda c: c["05451384"].pop("answer"), "is empty"),
        (lambda c: c["05451384"].update(imageId=3), "field imageId: str expected, found 3"),
        (lambda c: c["05451384"].pop("types"), "field types"),
        (lambda c: c.update({"05451384": None}), "not a JSON object"),
    ],
)
def test_gqa_faults(tmp_path: Path, edit: Any, reason: str) -> None:
    path = releases.gqa(tmp_path) / "val_all_questions.json"
    change(path, edit)
    rows, (bad,) = read(gqa.examples, data(tmp_path))
    assert bad.location == f"{path}: question 1" and reason in bad.reason
    assert {row.part for row in rows} >= {"train", "test"}


def test_gqa_questions_twice(tmp_path: Path) -> None:
    path = releases.gqa(tmp_path) / "testdev_balanced_questions.json"
    path.write_text(path.read_text()[:-1] + ", " + path.read_text()[1:])
    _, (bad,) = read(gqa.examples, data(tmp_path))
    assert bad.reason == "field id: duplicate of '20968379' in question 1"


@pytest.mark.parametrize("year", [2014, 2017])
def test_coco_captions(tmp_path: Path, year: int) -> None:
    rows, bad = read(coco_captions.examples, data(releases.coco_captions(tmp_path, year)))
    assert [(row.id, row.suffix) for row in rows if row.part == "train"] == [
        ("9-109", "Caption 1 of 9. "),
        ("9-209", "Caption 2 of 9. "),
        ("25-125", "Caption 1 of 25. "),
        ("25-225", "Caption 2 of 25. "),
    ]
    assert not bad
    last = rows[-1]
    assert (last.id, last.part, last.facts) == ("42", "valid", {"image_id": 42})
    assert list(last.references) == ["Caption 1 of 42.", "Caption 2 of 42."]
    name = "COCO_val2014_000000000042.jpg" if year == 2014 else "000000000042.jpg"
    assert last.image == f"val{year}/{name}"


def test_karpathy_comes_first(tmp_path: Path) -> None:
    releases.karpathy(releases.coco_captions(tmp_path))
    rows, bad = read(coco_captions.examples, data(tmp_path))
    assert [(row.id, row.part) for row in rows] == [
        ("9-1", "train"),
        ("9-2", "train"),
        ("42-1", "train"),
        ("42-2", "train"),
        ("73", "valid"),
        ("74", "test"),
    ]
    assert not bad
    assert rows[2].image == "val2014/COCO_val2014_000000000042.jpg"
    assert list(rows[5].references) == ["Caption 0 of 74.", "Caption 1 of 74."]
    rows, _ = read(coco_captions.examples, data(tmp_path, file="annotations/captions_train2014.json"))
    assert [row.part for row in rows] == ["train"] * 4 + ["valid"]


def test_both_years_need_a_choice(tmp_path: Path) -> None:
    releases.coco_captions(tmp_path, 2014)
    releases.coco_captions(tmp_path, 2017)
    with pytest.raises(UserError, match=r"contains files of several releases: captions_train2014\.json") as caught:
        read(coco_captions.examples, data(tmp_path))
    assert "data.file: captions_train2014.json" in caught.value.remedy
    for name in ("captions_val2017.json", "annotations/captions_train2017.json"):
        rows, _ = read(coco_captions.examples, data(tmp_path, file=name))
        assert rows[0].image == "train2017/000000000009.jpg" and len(rows) == 5


@pytest.mark.parametrize(
    ("edit", "place", "reason"),
    [
        (
            lambda c: c["annotations"].append({"image_id": 7, "id": 1, "caption": "x"}),
            "annotation of id 1",
            "no such image: 7",
        ),
        (lambda c: c["annotations"][0].update(caption=3), "annotation 1", "field caption: str expected"),
        (lambda c: c["annotations"][0].update(caption="\n"), "image 1", "field caption: is empty"),
        (lambda c: c["annotations"][0].update(id=209), "annotation 3", "id 209: another annotation has the same id"),
        (lambda c: c["images"].append({"id": 8, "file_name": "8.jpg"}), "image 3", "image 8: no caption"),
        (lambda c: c["images"].append({"id": 8}), "image 3", "field file_name"),
    ],
)
def test_coco_caption_faults(tmp_path: Path, edit: Any, place: str, reason: str) -> None:
    path = releases.coco_captions(tmp_path) / "annotations" / "captions_train2014.json"
    change(path, edit)
    rows, bad = read(coco_captions.examples, data(tmp_path))
    assert any(one.location == f"{path}: {place}" and reason in one.reason for one in bad), bad
    assert {"25-125", "25-225", "42"} <= {row.id for row in rows}


@pytest.mark.parametrize(
    "edit",
    [
        lambda image: image.update(split="dev"),
        lambda image: image.update(sentences=[]),
        lambda image: image.update(sentences=[{"tokens": []}]),
        lambda image: image.update(sentences=["x"]),
        lambda image: image.pop("cocoid"),
    ],
)
def test_karpathy_faults(tmp_path: Path, edit: Any) -> None:
    path = releases.karpathy(tmp_path) / "dataset_coco.json"
    change(path, lambda c: edit(c["images"][1]))
    rows, bad = read(coco_captions.examples, data(tmp_path))
    assert [row.id for row in rows] == ["9-1", "9-2", "73", "74"]
    assert [one.location for one in bad] == [f"{path}: image 2"]


def test_coco_detection(tmp_path: Path) -> None:
    rows, bad = read(coco_detection.examples, data(releases.coco_detection(tmp_path)))
    assert not bad
    assert [(row.id, row.part, row.prefix) for row in rows] == [
        ("9", "train", "detect cat ; dog"),
        ("27", "train", "detect cat"),
        ("42", "valid", "detect dog"),
    ]
    assert rows[0].suffix == (
        "<loc0000><loc0000><loc1023><loc1023> cat"
        " ; <loc0000><loc0256><loc1023><loc0512> dog"
        " ; <loc0512><loc0512><loc1023><loc1023> dog"
    )
    assert rows[1].suffix == "<loc0512><loc0256><loc1023><loc0512> cat"
    assert rows[0].image == "train2017/000000000009.jpg"
    facts = rows[0].facts
    assert (facts["image_id"], facts["width"], facts["height"]) == (9, 400, 200)
    assert [(one["category_id"], one["label"], one["crowd"]) for one in facts["objects"]] == [
        (17, "cat", False),
        (17, "cat", True),
        (18, "dog", False),
        (18, "dog", False),
    ]
    assert facts["objects"][2] == {
        "category_id": 18,
        "label": "dog",
        "box": [100, 0, 200, 200],
        "area": 10000,
        "crowd": False,
    }


def test_what_detection_leaves_out_is_counted(tmp_path: Path) -> None:
    section = data(releases.coco_detection(tmp_path))
    assert coco_detection.skipped_counts(section) == {
        coco_detection.BOX_OUTSIDE_IMAGE: 1,
        coco_detection.IMAGE_WITHOUT_BOXES: 2,
    }


@pytest.mark.parametrize(
    ("edit", "place", "reason"),
    [
        (lambda c: c["annotations"][5].update(category_id=99), "annotation of id 5", "no such image or category"),
        (lambda c: c["annotations"][5].update(image_id=99), "annotation of id 5", "no such image"),
        (lambda c: c["annotations"][5].update(bbox=[1, 2, 3]), "annotation 6", "field bbox: must be four numbers"),
        (lambda c: c["annotations"][5].update(bbox=[1, 2, 3, "x"]), "annotation 6", "field bbox: must be four numbers"),
        (lambda c: c["annotations"][5].update(area="x"), "annotation 6", "annotation 5: field area"),
        (lambda c: c["images"][3].pop("width"), "image 4", "must have file_name, width and height"),
        (lambda c: c["images"][3].update(height=0), "image 4", "must have file_name, width and height"),
        (lambda c: c["images"][3].update(file_name=7), "image 4", "file_name must be text"),
        (lambda c: c["categories"][0].update(name="cat; dog"), "category 1", "must not contain"),
        (lambda c: c["categories"][0].update(name=" "), "category 1", "a label is needed"),
        (lambda c: c["categories"][0].pop("name"), "category 1", "field name"),
    ],
)
def test_coco_detection_faults(tmp_path: Path, edit: Any, place: str, reason: str) -> None:
    path = releases.coco_detection(tmp_path) / "annotations" / "instances_train2017.json"
    change(path, edit)
    rows, bad = read(coco_detection.examples, data(tmp_path))
    assert any(one.location == f"{path}: {place}" and reason in one.reason for one in bad), bad
    assert "42" in {row.id for row in rows}


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("source", ["refcoco", "refcoco+", "refcocog"])
def test_refcoco(tmp_path: Path, source: str, protocol: int) -> None:
    authors = "umd" if source == "refcocog" else "unc"
    section = data(releases.refcoco(tmp_path, source, authors, protocol), source)
    rows, bad = read(refcoco.examples, section)
    assert not bad
    assert [(row.id, row.part, row.prefix) for row in rows] == [
        ("0", "train", "the lady with the blue shirt"),
        ("1", "train", "lady"),
        ("20", "test", "dog right"),
        ("30", "valid", "cat"),
        ("50", "test", "cup"),
    ]
    assert rows[2].suffix == "<loc0266><loc0256><loc0777><loc0767>"
    assert rows[2].image == "images/mscoco/images/train2014/COCO_train2014_000000000025.jpg"
    assert rows[2].facts == {
        "ref_id": 2,
        "ann_id": 1002,
        "image_id": 25,
        "split": "testA",
        "box": [100, 52, 300, 152],
        "width": 400,
        "height": 200,
    }
    assert refcoco.skipped_counts(section) == {refcoco.LEAKED_EXPRESSIONS: 3}


def test_refcoco_of_other_authors_and_without_the_folder_around(tmp_path: Path) -> None:
    releases.refcoco(tmp_path, "refcoco", "google")
    with pytest.raises(UserError, match=r"refs\(unc\)\.p is neither there nor in refcoco/"):
        read(refcoco.examples, data(tmp_path, "refcoco"))
    assert len(read(refcoco.examples, data(tmp_path, "refcoco", file="refs(google).p"))[0]) == 5
    assert len(read(refcoco.examples, data(tmp_path / "refcoco", "refcoco", file="refs(google).p"))[0]) == 5


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda ref: ref.update(ann_id=7), "no such object"),
        (lambda ref: ref.update(image_id=43), "no such object"),
        (lambda ref: ref.update(split="dev"), "field split"),
        (lambda ref: ref.update(split=["dev"]), "field split"),
        (lambda ref: ref.pop("ref_id"), "field ref_id: int expected"),
        (lambda ref: ref.update(sentences=[]), "field sentence"),
        (lambda ref: ref.update(sentences=[{"sent_id": 3, "sent": " "}]), "field sentences"),
        (lambda ref: ref.update(sentences=[{"sent_id": 3, "sent": b"x"}]), "field sentences"),
        (lambda ref: ref.update(sentences=[{"sent_id": 3, "sent": "\ud800"}]), "not UTF-8"),
        (lambda ref: ref["sentences"][0].update(sent_id=0), "field id: duplicate of '0' in ref 1"),
    ],
)
def test_refcoco_faults(tmp_path: Path, edit: Any, reason: str) -> None:
    path = releases.refcoco(tmp_path) / "refcoco" / "refs(unc).p"
    refs = pickle.loads(path.read_bytes())
    edit(refs[2])
    path.write_bytes(pickle.dumps(refs, 2))
    rows, bad = read(refcoco.examples, data(tmp_path, "refcoco"))
    assert [one.location for one in bad] == [f"{path}: ref 3"] and reason in bad[0].reason
    assert {"0", "1", "30", "50"} <= {row.id for row in rows}


def test_a_box_without_extent_cannot_be_referred_to(tmp_path: Path) -> None:
    change(
        releases.refcoco(tmp_path) / "refcoco" / "instances.json",
        lambda c: c["annotations"][0].update(bbox=[3, 3, 0, 50]),
    )
    rows, bad = read(refcoco.examples, data(tmp_path, "refcoco"))
    assert len(bad) == 2 and "is empty inside" in bad[0].reason and rows[0].id == "20"


LOADERS: dict[str, Any] = {
    "vqav2": (vqav2, releases.vqav2),
    "docvqa": (docvqa, releases.docvqa),
    "gqa": (gqa, releases.gqa),
    "coco_captions": (coco_captions, releases.coco_captions),
    "coco_detection": (coco_detection, releases.coco_detection),
    "refcoco": (refcoco, releases.refcoco),
}


@pytest.mark.parametrize("name", LOADERS)
def test_missing_and_broken_files(tmp_path: Path, name: str) -> None:
    loader, make = LOADERS[name]
    with pytest.raises(UserError, match="no such folder"):
        read(loader.examples, data(tmp_path / "nowhere", name))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"looked for|is neither"):
        read(loader.examples, data(tmp_path / "empty", name))
    with pytest.raises(UserError, match=r"data\.file|is neither"):
        read(loader.examples, data(tmp_path / "empty", name, file="x.json"))
    section = data(make(tmp_path / "release"), name)
    for path in loader.files(section):
        content = path.read_bytes()
        for damage in (b"", b"{", b"[]", b"3", b"{}", content[:-3], b"\xff" + content):
            path.write_bytes(damage)
            if damage == b"{}" and name == "gqa":
                continue
            with pytest.raises(UserError, match=path.name.replace("(", r"\(").replace(")", r"\)")):
                read(loader.examples, section)
        path.write_bytes(content)
    assert read(loader.examples, section)[0]


@pytest.mark.parametrize("name", LOADERS)
def test_ids_are_unique_and_names_are_below_the_root(tmp_path: Path, name: str) -> None:
    loader, make = LOADERS[name]
    rows, _ = read(loader.examples, data(make(tmp_path), name))
    assert len({row.id for row in rows}) == len(rows) >= 3
    assert all(row.suffix and row.part and (tmp_path / row.image).parent.is_dir() for row in rows)
    assert json.loads(json.dumps([row.facts for row in rows])) == [row.facts for row in rows]


def test_one_file_in_two_places(tmp_path: Path) -> None:
    releases.docvqa(tmp_path / "a")
    releases.docvqa(tmp_path / "b")
    with pytest.raises(UserError, match=r"train_v1\.0_withQT\.json exists in several folders"):
        read(docvqa.examples, data(tmp_path))


@pytest.mark.parametrize("name", LOADERS)
def test_pictures_are_opened_by_the_names_of_rows(tmp_path: Path, name: str) -> None:
    from ftlib.data.images import image_path, open_image

    loader, make = LOADERS[name]
    rows, _ = read(loader.examples, data(make(tmp_path), name))
    folders = {path for path in tmp_path.rglob("*") if path.is_dir()}
    releases.draw(tmp_path, rows)
    assert folders == {path for path in tmp_path.rglob("*") if path.is_dir()}, (
        "pictures belong into the release's folders"
    )
    for row in rows:
        size = (row.facts.get("width", 40), row.facts.get("height", 30))
        assert open_image(image_path(tmp_path, row.image)).size == size
