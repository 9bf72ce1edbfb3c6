"""Folders of images, named as their class: `cat/1.jpg`, `dog/old/2.png`; or `train/cat/1.jpg`, `test/dog/2.png`.

If all folders in `data.root` are called train, valid (or val, validation) and test, they are parts, and the classes lie
in them. Below a class, folders may be nested. Hidden files are passed, and so are files beside the folders that are no
images by their names; every other file that is none is told.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ftlib.config import Data
from ftlib.data.examples import Bad, Example
from ftlib.data.loaders.layout import Part
from ftlib.errors import UserError

IMAGES = (".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""How the names of images end."""

_PARTS: dict[str, Part] = {"train": "train", "valid": "valid", "val": "valid", "validation": "valid", "test": "test"}


def files(data: Data) -> list[Path]:
    """There is no annotation file: the names of the images say all."""
    return []


def examples(data: Data) -> Iterator[Example | Bad]:
    """A row for each image, sorted by path: suffix is its class, id its path; the prompt is empty.

    Raises:
        UserError: no such folder, or no folder in it.
    """
    root = Path(data.root)
    folders, loose = _entries(root)
    if not folders:
        raise UserError(f"{root}: no class folders in it", "Images of one class lie in a folder of its name.")
    for path in loose:
        if path.suffix.lower() in IMAGES:
            yield Bad(_shown(path), "an image that lies in no class folder")
    if all(folder.name in _PARTS for folder in folders):
        for folder in folders:
            yield from _classes(root, folder, _PARTS[folder.name])
    else:
        for folder in folders:
            yield from _class(root, folder, "")


def _classes(root: Path, folder: Path, part: Part) -> Iterator[Example | Bad]:
    folders, loose = _entries(folder)
    for path in loose:
        yield Bad(_shown(path), "lies in no class folder")
    for inner in folders:
        yield from _class(root, inner, part)


def _class(root: Path, folder: Path, part: Part) -> Iterator[Example | Bad]:
    label = folder.name.strip()
    if not label or not _readable(folder):
        yield Bad(_shown(folder), "the folder's name cannot be a class: it is empty or not UTF-8")
        return
    empty = True
    for path, fault in _files(folder):
        empty = False
        if not fault and not _readable(path):
            fault = "its name is not UTF-8"
        if not fault and path.suffix.lower() not in IMAGES:
            fault = "no image by its name"
        if fault:
            yield Bad(_shown(path), fault)
        else:
            name = path.relative_to(root).as_posix()
            yield Example(name, name, "", label, part=part)
    if empty:
        yield Bad(_shown(folder), "a class without any image")


def _files(folder: Path) -> Iterator[tuple[Path, str]]:
    """All files below a folder, sorted by path, each with what is wrong with it, if anything is."""
    stack = [[(folder, True)]]
    above: list[tuple[int, int]] = []
    while stack:
        above = above[: len(stack) - 1]
        if not stack[-1]:
            stack.pop()
            continue
        path, is_folder = stack[-1].pop()
        if not is_folder:
            yield path, ""
            continue
        status = path.stat()
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            yield path, "a folder that leads back to one that it lies in"
        else:
            above.append(identity)
            stack.append(_listed(path)[::-1])


def _entries(folder: Path) -> tuple[list[Path], list[Path]]:
    """The folders and the files of a folder."""
    found = _listed(folder)
    return [path for path, is_folder in found if is_folder], [path for path, is_folder in found if not is_folder]


def _listed(folder: Path) -> list[tuple[Path, bool]]:
    """What lies in a folder and is not hidden, sorted; True for folders."""
    try:
        with os.scandir(folder) as entries:
            return sorted((Path(one.path), one.is_dir()) for one in entries if not one.name.startswith("."))
    except OSError as error:
        raise UserError(f"{_shown(folder)}: cannot be read: {error.strerror}", "Check data.root.") from None


def _readable(path: Path) -> bool:
    """Whether a path is valid UTF-8."""
    return not any("\ud800" <= character <= "\udfff" for character in str(path))


def _shown(path: Path) -> str:
    return os.fsencode(path).decode(errors="replace")
