"""Find the files of an official release: in `data.root`, or in one folder below, as zips unpack."""

from __future__ import annotations

import glob
import posixpath
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Literal

from ftlib.config.schema import Data
from ftlib.errors import UserError

OfficialSplit = Literal["train", "valid", "test", ""]
"""An official split; "" for a file with several splits."""

ReleaseFiles = Mapping[OfficialSplit, str]
"""Split → name of its annotation file or folder."""


def find(root: Path, name: str) -> Path | None:
    """Return a file or folder of a release by its relative path (`documents/1.png`); None if there is none.

    Raises:
        UserError: the root is missing, or several folders have such a file.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder", "Check data.root.")
    if (root / name).exists():
        return root / name
    found = sorted(root.glob(f"*/{glob.escape(name)}"))
    if len(found) > 1:
        shown = ", ".join(map(str, found[:5]))
        raise UserError(f"{name} exists in several folders: {shown}", "Set data.root to one of them.")
    return found[0] if found else None


def image_dir(root: Path, *names: str) -> str:
    """Return an image folder relative to the root: `train2014`, or `images/train2014`.

    Args:
        names: possible folders; if none exists, the first is returned, and opening images reports the error.
    """
    for name in names:
        if found := find(root, name):
            return found.relative_to(root).as_posix()
    return names[0]


def image_name(folder: str, name: str) -> str:
    """Return the image path for a row."""
    return posixpath.normpath(posixpath.join(folder, name))


def find_release_files(data: Data, *choices: Sequence[Sequence[ReleaseFiles]]) -> dict[OfficialSplit, Path]:
    """Choose a variant of a release (year, or authors' splits) and find its files.

    Args:
        data: its `file` selects a variant by any of its files.
        choices: for each, one variant is chosen. Variants are grouped by rank, preferred ranks first; without
            `data.file`, the first rank with existing files is used.

    Returns:
        split → file or folder, for all splits that exist.

    Raises:
        UserError: no files, files of several variants of a rank, or `file` is not part of a variant.
    """
    root = Path(data.root)
    known = [release for preferences in choices for rank in preferences for release in rank]
    names = ", ".join(dict.fromkeys(name for release in known for name in release.values()))
    named = next((one for one in known if PurePosixPath(data.file).name in one.values()), None)
    if data.file and named is None:
        raise UserError(f"data.file: {data.file} is not a file of the release; available: {names}")
    found: dict[OfficialSplit, Path] = {}
    for preferences in choices:
        mine = named is not None and any(named is release for rank in preferences for release in rank)
        found |= _in_same_folder(root, data.file, named) if mine and named else _first_preference(root, preferences)
    if not found:
        raise UserError(f"{root}: no official annotation file; looked for {names}", "Check data.root.")
    return found


def _in_same_folder(root: Path, file: str, release: ReleaseFiles) -> dict[OfficialSplit, Path]:
    """Return the files of a variant in the same folder as one of them."""
    found = find(root, file)
    if not found:
        raise UserError(f"{root / file}: no such file", "Check data.root and data.file.")
    return {part: path for part, name in release.items() if (path := found.with_name(name)).exists()}


def _first_preference(root: Path, preferences: Sequence[Sequence[ReleaseFiles]]) -> dict[OfficialSplit, Path]:
    for rank in preferences:
        present = [files for release in rank if (files := _files(root, release))]
        if len(present) > 1:
            names = [path.name for files in present for path in files.values()]
            remedy = f"Choose one with data.file, for example data.file: {names[0]}"
            raise UserError(f"{root}: contains files of several releases: {', '.join(names)}", remedy)
        if present:
            return present[0]
    return {}


def _files(root: Path, release: ReleaseFiles) -> dict[OfficialSplit, Path]:
    return {part: path for part, name in release.items() if (path := find(root, name))}
