"""COCO files under any name, and where their images lie: the release's, or those that annotation tools write.

Roboflow: `train/_annotations.coco.json`, `valid/…`, `test/…`, images beside them. CVAT: `instances_default.json` or
`instances_Train.json` and so on in `annotations/`, `images/` or `images/Train/`. Label Studio: `result.json`. Any other
is named by `data.file`, or one for each split by `data.files`.
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
    """The annotation files of a dataset; a single one that is not the release's has the part "".

    Args:
        release: its files in ranks, see `release_files.find_release_files`.
        prefix: what names of files with one part each begin with (`instances_`).

    Raises:
        UserError: none is there, several for one part, or one that the config names does not exist.
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
                problem = f"{path}: {part_name(path, prefix)!r} is no known name of a split"
                raise UserError(problem, "Say which file is which split: data.files: {train: …, valid: …, test: …}.")
            if part in parts:
                raise UserError(f"{root}: {parts[part]} and {path} are both part {part}", "Choose with data.file.")
            parts[part] = path
        if parts:
            return parts
        if whole := next((path for name in _WHOLE if (path := root / name).is_file()), None):
            return {"": whole}
        problem = (
            f"{root}: no annotation file of the release lies there; looked for {', '.join(official)} and {_ROBOFLOW}"
        )
        if splits := other_splits(root, {".json"}) or splits_in_folders(root, {".json"}):
            raise UserError(problem, files_hint(splits))
        raise UserError(problem, "Check data.root, or name a COCO file with data.file.")
    return find_release_files(data, release)


def _named(root: Path, name: str) -> Path:
    path = find(root, name)
    if path is None:
        raise UserError(f"{root / name}: no such file", "Check data.root and data.file, or data.files.")
    return path


def is_official(path: Path, release: Sequence[Sequence[ReleaseFiles]]) -> bool:
    """Whether a file has a name of the release."""
    return path.name in _names(release)


def _names(release: Sequence[Sequence[ReleaseFiles]]) -> list[str]:
    return [name for rank in release for variant in rank for name in variant.values()]


def part_name(path: Path, prefix: str) -> str:
    """What an annotation file is called by its folder (Roboflow) or its own name."""
    return path.parent.name if path.name == _ROBOFLOW else path.stem.removeprefix(prefix)


def _split_files(root: Path, prefix: str) -> Iterator[Path]:
    """Files that hold one part each: Roboflow's and CVAT's."""
    yield from sorted(root.glob(f"*/{_ROBOFLOW}"))
    for folder in (root, root / "annotations"):
        yield from (path for path in sorted(folder.glob(f"{prefix}*.json")) if path.stem != f"{prefix}default")


def image_folder(root: Path, path: Path, prefix: str, names: Sequence[str]) -> str:
    """The folder, relative to the root, that the images of an annotation file lie in.

    Args:
        prefix: see `find_files`.
        names: the images' names; the folder with most of the first ones is taken.
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
    except (OSError, ValueError):  # a name that no file can have
        return False
