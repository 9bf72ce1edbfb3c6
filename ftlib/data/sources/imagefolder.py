"""Image folders named by class: `cat/1.jpg`, `dog/old/2.png`; or `train/cat/1.jpg`, `Test/dog/2.png`.

Folders in `data.root` with split names (see `split_names`) that contain folders are splits, with class folders inside.
All or none of the folders are splits; `data.splits` maps other names. Folders below a class may be nested. Hidden
files, files of operating systems, and files beside the folders that are not images are ignored; every other file that
is not an image is reported.
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
"""Suffixes of image files."""

_IGNORED_FOLDERS = {"__macosx", "__pycache__", "@eadir", "$recycle.bin", "system volume information", "lost+found"} | {
    "thumbs.db",
    "ehthumbs.db",
    "desktop.ini",
    "icon\r",
}
"""Files of operating systems and other programs that are not hidden, in lower case."""


_NO_CLASSES = {"images", "image", "img", "imgs", "jpegimages", "imagesets", "labels", "labelmaps", "bboxes"} | {
    *("masks", "mask", "annotations", "annots", "segmentationclass", "segmentationobject")
}
"""Folder names of YOLO, Pascal VOC and mask datasets, in lower case; if all folders have such names, they are no
classes."""


def files(data: Data) -> list[Path]:
    """Return no files: there are no annotation files."""
    return []


@register_source(name="folder")
def examples(data: Data, splits: SplitNames | None = None) -> Iterator[Example | InvalidRecord]:
    """Yield a row for each image, sorted by path: the suffix is its class, the ID its path; the prompt is empty.

    Raises:
        UserError: there are no class folders, or it is unclear which folders are splits.
    """
    root, splits = Path(data.root), splits or SplitNames(data)
    folders, loose = _entries(root)
    if not folders:
        raise UserError(
            f"{root}: contains no class folders", "Put the images of each class into a folder with its name."
        )
    for path in loose:
        if _is_image(path):
            yield InvalidRecord(_shown(path), "an image outside of class folders")
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
    """Return the folders if they are splits; empty if they are classes.

    Raises:
        UserError: some are splits and others are not.
    """
    given = {name for names in data.splits.values() for name in names}
    parts = [folder for folder in folders if folder.name in given or _is_split_folder(folder)]
    if not parts and all(split_from_plain_name(folder.name) for folder in folders):
        shown = ", ".join(_shown(Path(folder.name)) for folder in folders)
        problem = f"{root}: folders with split names ({shown}) contain no class folders"
        raise UserError(problem, "Put the images of each class into a folder with its name: train/cat/1.jpg.")
    others = [_shown(Path(folder.name)) for folder in folders if folder not in parts]
    if parts and others:
        known, unknown = ", ".join(_shown(Path(folder.name)) for folder in parts), ", ".join(others[:10])
        problem = f"{root}: folders with split names ({known}) and other folders ({unknown})"
        remedy = (
            f"Map the others in data.splits, such as {{left_out: [{others[0]}]}}, or move them. "
            "If all are classes, put their images directly into these folders."
        )
        raise UserError(problem[:1000], remedy)
    return parts


def _is_split_folder(folder: Path) -> bool:
    """Whether a folder has a split name and contains class folders.

    With other words in the name (`train_station`) it must contain no images, because it may be a class.
    """
    if not split_from_name(folder.name):
        return False
    folders, loose = _entries(folder)
    return bool(folders) and (bool(split_from_plain_name(folder.name)) or not any(map(_is_image, loose)))


def _unwrap_folder(folder: Path) -> Path:
    """Return the folder with a split's classes: some archives unpack to `seg_train/seg_train/…`."""
    folders, _ = _entries(folder)
    if (
        len(folders) == 1
        and split_from_name(folders[0].name) == split_from_name(folder.name)
        and _is_split_folder(folders[0])
    ):
        return _unwrap_folder(folders[0])
    return folder


def _require_classes(root: Path, folders: list[Path], data: Data) -> None:
    """Reject folders that are not classes because classes or splits are deeper in the tree.

    Raises:
        UserError: a single folder that contains several; split folders below class folders.
    """
    if len(folders) > 1 and {folder.name.lower() for folder in folders} <= _NO_CLASSES:
        shown = ", ".join(_shown(Path(folder.name)) for folder in folders)
        problem = f"{root}: folders {shown} are not classes, but images and their annotations"
        raise UserError(problem, "Write images and answers to a JSONL file, and read it with source: jsonl.")
    inner = {folder: _entries(folder) for folder in folders}
    if len(folders) == 1:
        below, loose = inner[folders[0]]
        if not any(map(_is_image, loose)) and (len(below) > 1 or any(map(_is_split_folder, below))):
            problem = f"{root}: a single class folder, {_shown(Path(folders[0].name))}, which contains folders"
            raise UserError(problem, f"If these are the classes, set data.root to {_shown(folders[0])}.")
    named = [path for below, _ in inner.values() for path in below if split_from_plain_name(path.name)]
    if data.split.official and len({split_from_plain_name(path.name) for path in named}) > 1:
        shown = ", ".join(_shown(path.relative_to(root)) for path in named[:5])
        problem = f"{root}: folders with split names below class folders: {shown}"
        remedy = "Put splits above classes (train/cat), or set data.split.official: false to split all images."
        raise UserError(problem, remedy)


def _classes(root: Path, folder: Path, split: NamedSplit) -> Iterator[Example | InvalidRecord]:
    folders, loose = _entries(folder)
    for path in loose:
        yield InvalidRecord(_shown(path), "is outside of class folders")
    for inner in folders:
        yield from _class(root, inner, split)


def _class(root: Path, folder: Path, split: NamedSplit) -> Iterator[Example | InvalidRecord]:
    label = folder.name
    if not label.strip() or not _readable(folder):
        yield InvalidRecord(_shown(folder), "the folder's name is not a valid class: it is empty or not UTF-8")
        return
    empty = True
    for path, fault in _files(folder):
        empty = False
        if not fault and not _readable(path):
            fault = "its name is not UTF-8"
        if not fault and not _is_image(path):
            fault = "not an image (by its name)"
        if fault:
            yield InvalidRecord(_shown(path), fault)
        else:
            name = path.relative_to(root).as_posix()
            yield Example(name, name, "", label, part=split.split, part_name=split.name)
    if empty:
        yield InvalidRecord(_shown(folder), "a class without any image")


def _files(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield all files below a folder, sorted by path, each with an error or ""."""
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
            yield path, "a symbolic link loop"
        else:
            above.append(identity)
            stack.append(_listed(path)[::-1])


def _entries(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the subfolders and the files of a folder."""
    found = _listed(folder)
    return [path for path, is_folder in found if is_folder], [path for path, is_folder in found if not is_folder]


def _listed(folder: Path) -> list[tuple[Path, bool]]:
    """Return the sorted entries of a folder, without hidden and system files; True for folders."""
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
