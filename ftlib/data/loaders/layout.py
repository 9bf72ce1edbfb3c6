"""Where the files of an official release lie: directly in `data.root`, or in one folder below, as its zips unpack."""

from __future__ import annotations

import glob
import posixpath
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Literal

from ftlib.config import Data
from ftlib.errors import UserError

Part = Literal["train", "valid", "test", ""]
"""Of a release; none for a file that holds several."""

Variant = Mapping[Part, str]
"""Part → the name of its annotation file, or folder."""


def find(root: Path, name: str) -> Path | None:
    """A file or folder of a release, of any depth of its own (`documents/1.png`).

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
        raise UserError(f"{name} lies in several places: {shown}", "Set data.root to the one that is meant.")
    return found[0] if found else None


def folder_of(root: Path, *names: str) -> str:
    """A folder of images as rows name it, relative to the root: `train2014`, or `images/train2014`.

    Args:
        names: the places where it may lie; where it lies nowhere the first counts, and whoever opens images will tell.
    """
    for name in names:
        if found := find(root, name):
            return found.relative_to(root).as_posix()
    return names[0]


def picture(folder: str, name: str) -> str:
    """An image as rows name it."""
    return posixpath.normpath(posixpath.join(folder, name))


def choose(data: Data, *choices: Sequence[Sequence[Variant]]) -> dict[Part, Path]:
    """Choose variants of a release (its year, its authors' splits) and find their files.

    Args:
        data: its `file` names a variant by any of its files.
        choices: for each, one variant is taken. It is given as ranks, the preferred first, of variants of which none
            is preferred; without `data.file`, the first rank counts of which there is a file.

    Returns:
        part → file or folder, for all parts that are there.

    Raises:
        UserError: no file of any variant, files of several variants of a rank, or `file` is of no variant.
    """
    root = Path(data.root)
    known = [variant for ranks in choices for rank in ranks for variant in rank]
    names = ", ".join(dict.fromkeys(name for variant in known for name in variant.values()))
    named = next((one for one in known if PurePosixPath(data.file).name in one.values()), None)
    if data.file and named is None:
        raise UserError(f"data.file: {data.file} is no file of the release; there are: {names}")
    found: dict[Part, Path] = {}
    for ranks in choices:
        mine = named is not None and any(named is variant for rank in ranks for variant in rank)
        found |= _beside(root, data.file, named) if mine and named else _first_rank(root, ranks)
    if not found:
        raise UserError(f"{root}: no annotation file of the release lies there; looked for {names}", "Check data.root.")
    return found


def _beside(root: Path, file: str, variant: Variant) -> dict[Part, Path]:
    """The files of a variant that lie in the same folder as one of them."""
    found = find(root, file)
    if not found:
        raise UserError(f"{root / file}: no such file", "Check data.root and data.file.")
    return {part: path for part, name in variant.items() if (path := found.with_name(name)).exists()}


def _first_rank(root: Path, ranks: Sequence[Sequence[Variant]]) -> dict[Part, Path]:
    for rank in ranks:
        present = [files for variant in rank if (files := _files(root, variant))]
        if len(present) > 1:
            names = [path.name for files in present for path in files.values()]
            remedy = f"Choose with data.file, for example data.file: {names[0]}"
            raise UserError(f"{root}: files of several releases lie there: {', '.join(names)}", remedy)
        if present:
            return present[0]
    return {}


def _files(root: Path, variant: Variant) -> dict[Part, Path]:
    return {part: path for part, name in variant.items() if (path := find(root, name))}
