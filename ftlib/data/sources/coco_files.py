"""Find COCO files and their image folders: those of the release, or of annotation tools.

Roboflow: `train/_annotations.coco.json`, `valid/…`, `test/…`, images beside them. CVAT: `instances_default.json` or
`instances_Train.json` and so on in `annotations/`, `images/` or `images/Train/`. Label Studio: `result.json`. Other
names are set with `data.file`, or `data.files` for each split.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from ftlib.config.schema import Data
from ftlib.data.sources.annotations import files_hint
from ftlib.data.sources.release_files import OfficialSplit, ReleaseFiles, find, find_release_files, image_dir
from ftlib.data.split_names import other_splits, split_from_plain_name, splits_in_folders
from ftlib.errors import UserError

_ROBOFLOW = "_annotations.coco.json"
_WHOLE = (_ROBOFLOW, "result.json", "annotations/instances_default.json", "instances_default.json")
_LOOKED_FOR = 20


def find_files(data: Data, release: Sequence[Sequence[ReleaseFiles]], prefix: str) -> dict[OfficialSplit, Path]:
    """Return split → annotation file; a single file that is not official has the split "".

    Args:
        release: the official files in order of preference, see `release_files.find_release_files`.
        prefix: prefix of file names with one split each (`instances_`).

    Raises:
        UserError: there is none, there are several for one split, or a file of the config does not exist.
    """
    root = Path(data.root)
    if data.files:
        return {split: _named(root, name) for split, name in data.split_files}
    official = _names(release)
    if data.file and PurePosixPath(data.file).name not in official:
        return {"": _named(root, data.file)}
    if not data.file and not any(find(root, name) for name in official):
        parts: dict[OfficialSplit, Path] = {}
        for path in _split_files(root, prefix):
            part = split_from_plain_name(part_name(path, prefix))
            if not part:
                problem = f"{path}: {part_name(path, prefix)!r} is not a known split name"
                raise UserError(problem, "Assign files to splits: data.files: {train: …, valid: …, test: …}.")
            if part in parts:
                raise UserError(f"{root}: {parts[part]} and {path} are both split {part}", "Set data.file.")
            parts[part] = path
        if parts:
            return parts
        if whole := next((path for name in _WHOLE if (path := root / name).is_file()), None):
            return {"": whole}
        problem = f"{root}: no official annotation file; looked for {', '.join(official)} and {_ROBOFLOW}"
        if splits := other_splits(root, {".json"}) or splits_in_folders(root, {".json"}):
            raise UserError(problem, files_hint(splits))
        raise UserError(problem, "Check data.root, or set data.file to a COCO file.")
    return find_release_files(data, release)


def _named(root: Path, name: str) -> Path:
    path = find(root, name)
    if path is None:
        raise UserError(f"{root / name}: no such file", "Check data.root and data.file, or data.files.")
    return path


def is_official(path: Path, release: Sequence[Sequence[ReleaseFiles]]) -> bool:
    """Whether a file has a name of the official release."""
    return path.name in _names(release)


def _names(release: Sequence[Sequence[ReleaseFiles]]) -> list[str]:
    return [name for rank in release for variant in rank for name in variant.values()]


def part_name(path: Path, prefix: str) -> str:
    """Return the split name in an annotation file's folder (Roboflow) or file name."""
    return path.parent.name if path.name == _ROBOFLOW else path.stem.removeprefix(prefix)


def _split_files(root: Path, prefix: str) -> Iterator[Path]:
    """Yield files with one split each: Roboflow's and CVAT's."""
    yield from sorted(root.glob(f"*/{_ROBOFLOW}"))
    for folder in (root, root / "annotations"):
        yield from (path for path in sorted(folder.glob(f"{prefix}*.json")) if path.stem != f"{prefix}default")


def image_folder(root: Path, path: Path, prefix: str, names: Sequence[str]) -> str:
    """Return the image folder of an annotation file, relative to the root.

    Args:
        prefix: see `find_files`.
        names: the images' names; the folder with most of the first ones is returned.
    """
    own = path.stem.removeprefix(prefix)
    beside = path.parent.relative_to(root) if path.is_relative_to(root) else Path()
    candidates = [beside.as_posix(), f"images/{own}", "images", (beside / "images").as_posix(), ".", own]
    if path.stem.startswith(prefix):
        candidates.insert(0, image_dir(root, own))
    shown = names[:_LOOKED_FOR]
    return max(candidates, key=lambda candidate: sum(_is_present(root / candidate / name) for name in shown))


def _is_present(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # not a valid file name
        return False
