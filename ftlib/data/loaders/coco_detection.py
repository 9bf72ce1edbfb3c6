"""COCO's instances of 2014 or 2017 → rows of parts train and valid, `detect cat ; dog` → boxes as location tokens.

Files below `data.root`, with or without their zips' folders: `instances_{train,val}2014.json` or
`instances_{train,val}2017.json`; images in `train2014/` and so on. `data.file` chooses by the name of a file. The
prompt names the categories that are in the image, in the release's order; the answer lists the boxes in the same order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ftlib.config import Data
from ftlib.data.examples import Bad, Example
from ftlib.data.loaders.boxes import SizedPicture, an_object, corners, sized_picture, to_text, visible
from ftlib.data.loaders.layout import Part, Variant, choose, folder_of, picture
from ftlib.data.loaders.rows import Kept, Numbered, Reading, collect, fault
from ftlib.data.official.results import require_fields
from ftlib.metrics.boxes import Object

_YEARS: list[Variant] = [
    {"train": f"instances_train{year}.json", "valid": f"instances_val{year}.json"} for year in (2014, 2017)
]
NOWHERE = "boxes without extent inside the image"
EMPTY = "images without any box to ask for"


def files(data: Data) -> list[Path]:
    """The annotation files that `examples` reads.

    Raises:
        UserError: none is there, or those of several releases.
    """
    return list(choose(data, [_YEARS]).values())


def examples(data: Data) -> Iterator[Example | Bad]:
    """A row for each image with objects. Boxes of crowds are not asked for; facts has them, as all objects.

    Raises:
        UserError: missing files, files of both years, files that are no such JSON.
    """
    return _read(data, Counter())


def left_out(data: Data) -> dict[str, int]:
    """What `examples` leaves out: reason → how many. Reads the whole source once more.

    Raises:
        UserError: as `examples`.
    """
    counts = Counter({NOWHERE: 0, EMPTY: 0})
    for _ in _read(data, counts):
        pass
    return dict(counts)


def _read(data: Data, counts: Counter[str]) -> Iterator[Example | Bad]:
    root, reading = Path(data.root), Reading()
    for part, path in choose(data, [_YEARS]).items():
        yield from _part(reading, part, path, folder_of(root, path.stem.removeprefix("instances_")), counts)


def _part(reading: Reading, part: Part, path: Path, folder: str, counts: Counter[str]) -> Iterator[Example | Bad]:
    pictures, categories = Kept("image", sized_picture), Kept("category", _category)
    objects = Kept("annotation", an_object)
    yield from collect(path, {"images": pictures, "categories": categories, "annotations": objects})
    by_image: dict[int, list[Object]] = {key: [] for key in pictures.found}
    for one in objects.found.values():
        if one.image in by_image and one.category in categories.found:
            by_image[one.image].append(one)
        else:
            yield fault(f"{path}: annotation of id {one.id}", "there is no such image, or no such category")
    order = {key: number for number, key in enumerate(categories.found)}

    def parse(record: dict[str, Any], number: int) -> list[Example]:
        found = pictures.found[record["id"]]
        mine = sorted(by_image[found.id], key=lambda one: order[one.category])
        asked = [one for one in mine if not one.crowd and visible(one, found)]
        counts[NOWHERE] += sum(not one.crowd for one in mine) - len(asked)
        counts[EMPTY] += not asked
        row = Example(str(found.id), picture(folder, found.name), _prompt(asked, categories.found), "", part=part)
        facts = _facts(found, mine, categories.found)
        return [replace(row, suffix=to_text(asked, found, categories.found), facts=facts)] if asked else []

    yield from reading.rows(Numbered(path, "image"), enumerate(({"id": key} for key in by_image), 1), parse)


def _prompt(objects: Sequence[Object], categories: dict[int, str]) -> str:
    return "detect " + " ; ".join(dict.fromkeys(categories[one.category] for one in objects))


def _facts(found: SizedPicture, objects: Sequence[Object], categories: dict[int, str]) -> dict[str, Any]:
    known = [
        {
            "category_id": one.category,
            "label": categories[one.category],
            "box": corners(one.box),
            "area": one.area,
            "crowd": one.crowd,
        }
        for one in objects
    ]
    return {"image_id": found.id, "width": found.width, "height": found.height, "objects": known}


def _category(record: dict[str, Any]) -> tuple[int, str]:
    require_fields(record, {"id": int, "name": str})
    return record["id"], record["name"]
