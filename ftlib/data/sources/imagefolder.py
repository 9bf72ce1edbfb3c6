"""Folders of images, named as their class: `cat/1.jpg`, `dog/old/2.png`; or `train/cat/1.jpg`, `Test/dog/2.png`.

Folders in `data.root` that are named as splits (see `split_names`) and hold folders are parts, and the classes lie in
them. All or none of the folders are parts; `data.splits` says what others are. Below a
class, folders may be nested. Hidden files and those of operating systems are passed, and so are files beside the
folders that are no images by their names; every other file that is none is told.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ftlib.config.schema import Data
from ftlib.core.registry import register_source
from ftlib.data.example import Example, InvalidRecord
from ftlib.data.split_names import NamedSplit, SplitNames, split_from_name, split_from_plain_name
from ftlib.errors import UserError

IMAGES = (".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""How the names of images end."""

_IGNORED_FOLDERS = {"__macosx", "__pycache__", "@eadir", "$recycle.bin", "system volume information", "lost+found"} | {
    "thumbs.db",
    "ehthumbs.db",
    "desktop.ini",
    "icon\r",
}
"""What operating systems and other programs leave in folders, in lower case, beside hidden files."""


_NO_CLASSES = {"images", "image", "img", "imgs", "jpegimages", "imagesets", "labels", "labelmaps", "bboxes"} | {
    *("masks", "mask", "annotations", "annots", "segmentationclass", "segmentationobject")
}
"""Folders of YOLO, Pascal VOC and sets of masks, in lower case; two or more of them alone are no classes."""


def files(data: Data) -> list[Path]:
    """There is no annotation file: the names of the images say all."""
    return []


@register_source(name="folder")
def examples(data: Data, splits: SplitNames | None = None) -> Iterator[Example | InvalidRecord]:
    """A row for each image, sorted by path: suffix is its class, id its path; the prompt is empty.

    Raises:
        UserError: no such folder, or no folder in it; folders of which it is not clear whether they are splits.
    """
    root, splits = Path(data.root), splits or SplitNames(data)
    folders, loose = _entries(root)
    if not folders:
        raise UserError(f"{root}: no class folders in it", "Images of one class lie in a folder of its name.")
    for path in loose:
        if _is_image(path):
            yield InvalidRecord(_shown(path), "an image that lies in no class folder")
    parts = _parts(root, folders, data)
    for folder in parts:
        named = splits.split(folder.name, 0)
        inner = _unwrap_folder(folder)
        if named is None:
            splits.split(folder.name, sum(_is_image(path) and not fault for path, fault in _files(folder)))
        else:
            yield from _classes(root, inner, NamedSplit(named.split, _shown(Path(named.name))))
    splits.finish()
    if not parts:
        _require_classes(root, folders, data)
        for folder in folders:
            yield from _class(root, folder, NamedSplit("", ""))


def _parts(root: Path, folders: list[Path], data: Data) -> list[Path]:
    """The folders, if they are parts; none if they are classes.

    Raises:
        UserError: some are parts and others are not.
    """
    given = {name for names in data.splits.values() for name in names}
    parts = [folder for folder in folders if folder.name in given or _is_split_folder(folder)]
    if not parts and all(split_from_plain_name(folder.name) for folder in folders):
        shown = ", ".join(_shown(Path(folder.name)) for folder in folders)
        problem = f"{root}: folders named as splits ({shown}) without class folders in them"
        raise UserError(problem, "Images of one class lie in a folder of its name: train/cat/1.jpg.")
    others = [_shown(Path(folder.name)) for folder in folders if folder not in parts]
    if parts and others:
        known, unknown = ", ".join(_shown(Path(folder.name)) for folder in parts), ", ".join(others[:10])
        problem = f"{root}: folders named as splits ({known}) lie beside others ({unknown})"
        remedy = (
            f"Say what the others are in data.splits, such as {{left_out: [{others[0]}]}}, or move them. "
            "If all are classes, put the images of those directly into their folders."
        )
        raise UserError(problem[:1000], remedy)
    return parts


def _is_split_folder(folder: Path) -> bool:
    """Whether a folder has the name of a split and holds folders, the classes.

    With a name that says more (`train_station`) it must hold no images, since it may be a class.
    """
    if not split_from_name(folder.name):
        return False
    folders, loose = _entries(folder)
    return bool(folders) and (bool(split_from_plain_name(folder.name)) or not any(map(_is_image, loose)))


def _unwrap_folder(folder: Path) -> Path:
    """The folder with a part's classes: archives unpack to `seg_train/seg_train/…`."""
    folders, _ = _entries(folder)
    if (
        len(folders) == 1
        and split_from_name(folders[0].name) == split_from_name(folder.name)
        and _is_split_folder(folders[0])
    ):
        return _unwrap_folder(folders[0])
    return folder


def _require_classes(root: Path, folders: list[Path], data: Data) -> None:
    """Refuse what would be read as classes although classes or splits lie deeper.

    Raises:
        UserError: a single folder that holds several; folders of splits below the classes.
    """
    if len(folders) > 1 and {folder.name.lower() for folder in folders} <= _NO_CLASSES:
        shown = ", ".join(_shown(Path(folder.name)) for folder in folders)
        problem = f"{root}: folders {shown} are no classes, but images and what belongs to them"
        raise UserError(problem, "Write the images with their answers to a JSONL file, and read it with source: jsonl.")
    inner = {folder: _entries(folder) for folder in folders}
    if len(folders) == 1:
        below, loose = inner[folders[0]]
        if not any(map(_is_image, loose)) and (len(below) > 1 or any(map(_is_split_folder, below))):
            problem = f"{root}: a single class folder, {_shown(Path(folders[0].name))}, with folders in it"
            raise UserError(problem, f"If these are the classes, set data.root to {_shown(folders[0])}.")
    named = [path for below, _ in inner.values() for path in below if split_from_plain_name(path.name)]
    if data.split.official and len({split_from_plain_name(path.name) for path in named}) > 1:
        shown = ", ".join(_shown(path.relative_to(root)) for path in named[:5])
        problem = f"{root}: below the classes lie folders named as splits: {shown}"
        remedy = "Put splits above classes (train/cat), or set data.split.official: false to divide all images anew."
        raise UserError(problem, remedy)


def _classes(root: Path, folder: Path, split: NamedSplit) -> Iterator[Example | InvalidRecord]:
    folders, loose = _entries(folder)
    for path in loose:
        yield InvalidRecord(_shown(path), "lies in no class folder")
    for inner in folders:
        yield from _class(root, inner, split)


def _class(root: Path, folder: Path, split: NamedSplit) -> Iterator[Example | InvalidRecord]:
    label = folder.name
    if not label.strip() or not _readable(folder):
        yield InvalidRecord(_shown(folder), "the folder's name cannot be a class: it is empty or not UTF-8")
        return
    empty = True
    for path, fault in _files(folder):
        empty = False
        if not fault and not _readable(path):
            fault = "its name is not UTF-8"
        if not fault and not _is_image(path):
            fault = "no image by its name"
        if fault:
            yield InvalidRecord(_shown(path), fault)
        else:
            name = path.relative_to(root).as_posix()
            yield Example(name, name, "", label, part=split.split, part_name=split.name)
    if empty:
        yield InvalidRecord(_shown(folder), "a class without any image")


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
    """What lies in a folder and is neither hidden nor put there by a system, sorted; True for folders."""
    try:
        with os.scandir(folder) as entries:
            shown = (
                one for one in entries if not one.name.startswith(".") and one.name.lower() not in _IGNORED_FOLDERS
            )
            return sorted((Path(one.path), one.is_dir()) for one in shown)
    except OSError as error:
        raise UserError(f"{_shown(folder)}: cannot be read: {error.strerror}", "Check data.root.") from None


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGES


def _readable(path: Path) -> bool:
    """Whether a path is valid UTF-8."""
    return not any("\ud800" <= character <= "\udfff" for character in str(path))


def _shown(path: Path) -> str:
    return os.fsencode(path).decode(errors="replace")
