"""Tiny releases in the official layouts: real file names, real nesting."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ftlib.config.schema import Data
from ftlib.data.example import Example, InvalidRecord

Examples = Callable[[Data], Iterator[Example | InvalidRecord]]


def data(root: Path, source: str = "jsonl", **fields: Any) -> Data:
    """A data section for a source that need not be in the registry."""
    return Data.model_construct(**{"source": source, "root": str(root), **fields})


def read(examples: Examples, section: Data) -> tuple[list[Example], list[InvalidRecord]]:
    """Rows and faults."""
    rows = list(examples(section))
    return [row for row in rows if isinstance(row, Example)], [row for row in rows if isinstance(row, InvalidRecord)]


def write(path: Path, content: Any) -> Path:
    """Write JSON, or bytes or text as they are, with the folders that are needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def change(path: Path, edit: Callable[[Any], object]) -> None:
    """Apply a function to a JSON file's content."""
    content = json.loads(path.read_text())
    edit(content)
    write(path, content)


def answers(*texts: str) -> list[dict[str, Any]]:
    return [{"answer": text, "answer_confidence": "yes", "answer_id": n} for n, text in enumerate(texts, 1)]


def vqa_annotation(question: int, image: int, texts: list[str], kind: str = "other") -> dict[str, Any]:
    return {
        "question_id": question,
        "image_id": image,
        "question_type": "what is",
        "answer_type": kind,
        "multiple_choice_answer": Counter(texts).most_common(1)[0][0],
        "answers": answers(*texts),
    }


def vqav2(root: Path, nested: bool = False) -> Path:
    """Two training questions about one image, one validation question."""
    asked = {"train2014": [(9000, 9), (9001, 9)], "val2014": [(42000, 42)], "test-dev2015": [(1000, 1)]}
    zips = {"train2014": "Train", "val2014": "Val", "test-dev2015": "Test"}
    for year, ids in asked.items():
        kind = "" if "test" in year else "v2_Annotations_" + zips[year] + "_mscoco/"
        questions = [{"image_id": image, "question": f"What is {key}?", "question_id": key} for key, image in ids]
        folder = root / f"v2_Questions_{zips[year]}_mscoco" if nested else root
        header = {"info": {"year": 2014, "version": "2.0"}, "task_type": "Open-Ended", "data_type": "mscoco"}
        write(folder / f"v2_OpenEnded_mscoco_{year}_questions.json", {**header, "questions": questions})
        if "test" not in year:
            texts = ["net"] * 6 + ["netting", "mesh", "nets", "net "]
            annotations = [vqa_annotation(key, image, texts) for key, image in ids]
            name = f"v2_mscoco_{year}_annotations.json"
            write((root / kind if nested else root) / name, {**header, "annotations": annotations})
    for year in ("train2014", "val2014"):
        (root / ("images" if nested else "") / year).mkdir(parents=True, exist_ok=True)
    return root


def docvqa_question(number: int, texts: list[str], document: int, split: str) -> dict[str, Any]:
    return {
        "questionId": number,
        "question": f"What is {number}?",
        "question_types": ["table/list", "form"],
        "image": f"documents/xnbl0037_{document}.png",
        "docId": document,
        "ucsf_document_id": "xnbl0037",
        "ucsf_document_page_no": "1",
        "answers": texts,
        "data_split": split,
    }


def docvqa(root: Path, types: bool = True) -> Path:
    """Two training questions about one page, one validation question, one of the test split."""
    ending = "_withQT" if types else ""
    asked = {
        "train": [(337, ["0.28", ".28"], 279), (338, ["abc"], 279)],
        "val": [(49153, [" $5 "], 14465)],
    }
    for split, questions in asked.items():
        rows = [docvqa_question(*question, split) for question in questions]
        if not types:
            for row in rows:
                row.pop("question_types")
        content = {"dataset_name": "SP-DocVQA", "dataset_split": split, "dataset_version": "1.0", "data": rows}
        write(root / f"{split}_v1.0{ending}.json", content)
    row = docvqa_question(57344, [], 4720, "test")
    row.pop("answers")
    write(root / "test_v1.0.json", {"dataset_name": "docvqa", "data": [row]})
    (root / "documents").mkdir(exist_ok=True)
    return root


def gqa_question(image: str, answer: str, balanced: bool, entailed: list[str]) -> dict[str, Any]:
    return {
        "semantic": [
            {"operation": "select", "dependencies": [], "argument": "sky (2486325)"},
            {"operation": "verify color", "dependencies": [0], "argument": "dark"},
        ],
        "entailed": entailed,
        "equivalent": [],
        "question": f"Is the sky in {image} dark?",
        "imageId": image,
        "isBalanced": balanced,
        "groups": {"global": None, "local": "06-sky_dark"},
        "answer": answer,
        "semanticStr": "select: sky (2486325)->verify color: dark [0]",
        "annotations": {"answer": {}, "question": {"2": "2486325"}, "fullAnswer": {}},
        "types": {"detailed": "verifyColor", "semantic": "attr", "structural": "verify"},
        "fullAnswer": "Yes, the sky is dark.",
    }


def gqa(root: Path) -> Path:
    """Training: one balanced question and two others in two chunks; val: balanced, entailed by it, neither."""
    train = {
        "02930152": gqa_question("2354786", "yes", True, ["02930152", "02930160"]),
        "02930160": gqa_question("2354786", "no", False, []),
        "07333408": gqa_question("2375429", "pipe", False, []),
    }
    val = {
        "05451384": gqa_question("2382986", "no", True, ["05451384", "05451385"]),
        "05451385": gqa_question("2382986", "yes", False, ["05451386"]),
        "05451386": gqa_question("n161313", "cup", False, []),
    }
    write(root / "train_balanced_questions.json", {"02930152": train["02930152"]})
    write(root / "train_all_questions" / "train_all_questions_0.json", dict(list(train.items())[:2]))
    write(root / "train_all_questions" / "train_all_questions_1.json", dict(list(train.items())[2:]))
    write(root / "val_balanced_questions.json", {"05451384": val["05451384"]})
    write(root / "val_all_questions.json", val)
    write(root / "testdev_balanced_questions.json", {"20968379": gqa_question("n161313", "yes", True, ["20968379"])})
    write(root / "test_all_questions.json", {"1": {"isBalanced": False, "question": "Where?", "imageId": "n4"}})
    (root / "images").mkdir(exist_ok=True)
    return root


def coco_captions(root: Path, year: int = 2014) -> Path:
    """Two training images with two captions each (not in order), one validation image with two."""
    for split, images in (("train", [9, 25]), ("val", [42])):
        name = f"COCO_{split}{year}_" if year == 2014 else ""
        content = {
            "info": {"description": f"COCO {year}"},
            "images": [
                {"license": 3, "file_name": f"{name}{key:012d}.jpg", "height": 480, "width": 640, "id": key}
                for key in images
            ],
            "licenses": [{"url": "x", "id": 1, "name": "y"}],
            "annotations": [
                {"image_id": key, "id": 100 * n + key, "caption": f"Caption {n} of {key}. "}
                for n in (1, 2)
                for key in images
            ],
        }
        write(root / "annotations" / f"captions_{split}{year}.json", content)
        (root / f"{split}{year}").mkdir(exist_ok=True)
    return root


def karpathy(root: Path) -> Path:
    """An image for each of the four splits."""
    images = []
    splits = (("train2014", 9, "train"), ("val2014", 42, "restval"), ("val2014", 73, "val"), ("val2014", 74, "test"))
    for number, (folder, key, split) in enumerate(splits):
        images.append(
            {
                "filepath": folder,
                "sentids": [10 * number, 10 * number + 1],
                "filename": f"COCO_{folder}_{key:012d}.jpg",
                "imgid": number,
                "split": split,
                "sentences": [
                    {"tokens": ["a"], "raw": f"Caption {n} of {key}.", "imgid": number, "sentid": 10 * number + n}
                    for n in (0, 1)
                ],
                "cocoid": key,
            }
        )
        (root / folder).mkdir(parents=True, exist_ok=True)
    write(root / "dataset_coco.json", {"images": images, "dataset": "coco"})
    return root


def instance(key: int, image: int, category: int, box: list[float], crowd: int = 0) -> dict[str, Any]:
    return {
        "segmentation": [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]],
        "area": box[2] * box[3] / 2,
        "iscrowd": crowd,
        "image_id": image,
        "bbox": box,
        "category_id": category,
        "id": key,
    }


def coco_detection(root: Path, year: int = 2017) -> Path:
    """Image 9: two dogs, a cat, a crowd; 25: nothing; 26: a crowd; 27: a cat and a box without height; val: a dog."""
    categories = [{"supercategory": "animal", "id": 17, "name": "cat"}, {"supercategory": "a", "id": 18, "name": "dog"}]
    train = [
        instance(1, 9, 18, [100, 0, 100, 200]),
        instance(2, 9, 17, [0, 0, 400, 200]),
        instance(3, 9, 18, [200, 100, 200.5, 100]),
        instance(900100, 9, 17, [1, 1, 50, 50], crowd=1),
        instance(900101, 26, 17, [1, 1, 50, 50], crowd=1),
        instance(5, 27, 17, [100, 100, 100, 100]),
        instance(6, 27, 18, [296.65, 88.33, 1.03, 0.0]),
    ]
    parts = {"train": ([9, 25, 26, 27], train), "val": ([42], [instance(7, 42, 18, [10, 20, 30, 40])])}
    for split, (images, objects) in parts.items():
        pictures = [{"file_name": f"{key:012d}.jpg", "height": 200, "width": 400, "id": key} for key in images]
        content = {"info": {}, "licenses": [], "images": pictures, "annotations": objects, "categories": categories}
        write(root / "annotations" / f"instances_{split}{year}.json", content)
        (root / f"{split}{year}").mkdir(exist_ok=True)
    return root


def ref(number: int, image: int, split: str, sentences: list[str]) -> dict[str, Any]:
    """A referring expression's record; its object is `number` + 1000, its sentences' ids 10 · `number`, …"""
    return {
        "sent_ids": [10 * number + n for n in range(len(sentences))],
        "file_name": f"COCO_train2014_{image:012d}_{number}.jpg",
        "ann_id": 1000 + number,
        "ref_id": number,
        "image_id": image,
        "split": split,
        "sentences": [
            {"tokens": text.split(), "raw": text.upper(), "sent_id": 10 * number + n, "sent": text}
            for n, text in enumerate(sentences)
        ],
        "category_id": 1,
    }


def refcoco(root: Path, source: str = "refcoco", authors: str = "unc", protocol: int = 0) -> Path:
    """Refs 0, 1 and 4 of train, 1 and 4 about images that testA and val have."""
    refs = [
        ref(0, 9, "train", ["the lady with the blue shirt", "lady"]),
        ref(1, 25, "train", ["dog left"]),
        ref(2, 25, "testA", ["dog right"]),
        ref(3, 42, "val", ["cat"]),
        ref(4, 42, "train", ["big cat", "cat far left"]),
        ref(5, 43, "testB", ["cup"]),
    ]
    images = [
        {"license": 1, "file_name": f"COCO_train2014_{key:012d}.jpg", "height": 200, "width": 400, "id": key}
        for key in (9, 25, 42, 43)
    ]
    annotations = [instance(one["ann_id"], one["image_id"], 1, [100, 50 + one["ref_id"], 200, 100]) for one in refs]
    content = {"info": {}, "images": images, "annotations": annotations, "categories": [{"id": 1, "name": "person"}]}
    write(root / source / f"refs({authors}).p", pickle.dumps(refs, protocol=protocol))
    write(root / source / "instances.json", content)
    (root / "images" / "mscoco" / "images" / "train2014").mkdir(parents=True, exist_ok=True)
    return root


def draw(root: Path, rows: list[Example]) -> None:
    """Write a picture wherever rows name one, in the format that its name says and of the size that they tell."""
    from PIL import Image

    sizes = {row.image: (row.facts.get("width", 40), row.facts.get("height", 30)) for row in rows}
    for number, (name, size) in enumerate(sizes.items()):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (number * 29 % 256, 90, 200)).save(root / name)
