"""A prepared dataset: checked, split, fingerprinted rows in the store.

`<store>/prepared/<source>-<key>/` holds train, valid and test as JSONL with their offsets, bad.json (records that were
left out) and data.json. The key is the hash of the task (which says what a faulty row is), of the config's data section
(but for the prompt, which is applied when rows are read) and of the annotation files; `data.root` enters it where that
is below the store. Data that were prepared from elsewhere are the same if some of their images are. Images that are
replaced in place are not noticed.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ftlib import console, files
from ftlib.config import Config
from ftlib.config_data import Data
from ftlib.data.examples import MAX_FAULTS_SHOWN, Bad, Example, compact
from ftlib.data.images import ImageFacts, choose_frames, image_path, inspect_image
from ftlib.data.intake import Encode, Intake, first_rows_of_images, take_in
from ftlib.data.rows import Rows, RowWriter
from ftlib.data.sources import MAKERS, annotation_files, left_out, version
from ftlib.data.splits import LEAKED, LEFT_OUT, SPLITS, Codes
from ftlib.errors import UserError
from ftlib.identity import lasting
from ftlib.local_paths import STORE, stored_path, stored_text, with_paths
from ftlib.pinning import same_rows
from ftlib.runs import Run
from ftlib.site import Site

FORMAT = 3
_READABLE = range(3, FORMAT + 1)
"""Formats of what is used as it is, where a run was made from it."""

_BLOCK = 1000
_LOOKED_AT = 20
"""Images of each split, roughly, that tell whether a folder elsewhere holds the same ones."""

_LOOK = "Check data.root and data.file; relative paths count from the config's folder."
_SPOOL = "rows.jsonl"
_WHY_NOT = {LEFT_OUT: "beyond max_train or max_eval", LEAKED: "image asked in another split"}


@dataclass(frozen=True)
class Prepared:
    """A prepared dataset.

    Attributes:
        folder: where it lies.
        root: what the images' paths are relative to.
        facts: data.json: source, fingerprint and number of rows per split, labels, what was left out.
    """

    folder: Path
    root: Path
    facts: dict[str, Any]

    def rows(self, split: str) -> Rows:
        """The rows of a split."""
        return Rows(self.folder / f"{split}.jsonl")

    def require_rows(self, splits: Sequence[str]) -> None:
        """Refuse to ask what is empty.

        Raises:
            UserError: a split without rows.
        """
        for split in splits:
            if not self.facts["splits"][split]["rows"]:
                remedy = f"Leave {split} out of evaluation.splits, or set data.split.{split}."
                raise UserError(f"split {split} has no rows to ask", remedy)

    def counts(self, split: str, places: Sequence[int]) -> list[int]:
        """How many of some rows of a split each dataset of a mixture has; all of them, if it is none.

        Args:
            places: of the rows, ascending.
        """
        entry = self.facts["splits"][split]
        ends = list(accumulate(entry.get("parts", {"": entry["rows"]}).values()))
        found = [bisect_left(places, end) for end in ends]
        return [end - start for start, end in zip([0, *found], found, strict=False)]

    @property
    def labels(self) -> list[str]:
        """Every answer that occurs, sorted; none if there are too many for a closed set."""
        return list(self.facts["labels"] or ())


def prepared_folder(config: Config, site: Site) -> Path:
    """Where the prepared form of a config's dataset lies, or would lie.

    Raises:
        UserError: the annotation file is missing.
    """
    by_content, by_path = possible_folders(config, site)
    found = [folder for folder in (by_content, by_path) if files.is_complete(folder)]
    for folder in found:
        if _same_images(_read(folder, config), config, site):
            return folder
    return by_path if by_content in found else by_content


def possible_folders(config: Config, site: Site) -> tuple[Path, Path]:
    """Where the prepared form of a config's dataset may lie: by its content, or by its root's path.

    The latter, as in version 0.1, is for a second dataset with the same annotation files and other images.

    Raises:
        UserError: the annotation file is missing.
    """
    data = config.data
    without = {"Data": ("prompt",), "Part": ("prompt", "weight")}  # prompts are applied when rows are read
    rule = lasting(data, without)
    movable = lasting(with_paths(data, lambda key, text, kind: stored_text(text, kind, Path("/"), site.store)), without)
    if not movable["root"].startswith(STORE):
        del movable["root"]
    contents = _contents(config)
    keys = [files.fingerprint([FORMAT, config.task, each, contents])[:12] for each in (movable, rule)]
    by_content, by_path = (site.store / "prepared" / f"{data.source}-{key}" for key in keys)
    return by_content, by_path


def _same_images(prepared: Prepared, config: Config, site: Site) -> bool:
    """Whether a root that is not the one that data were prepared from shows the same pictures; some are looked at."""
    known, root = prepared.facts.get("root"), Path(config.data.root)
    if known in (None, stored_path(root, site.store)):  # without it, the folder's name knows the path
        return True
    for split in SPLITS:
        rows = prepared.rows(split)
        for row in (rows[place] for place in range(0, len(rows), max(1, len(rows) // _LOOKED_AT))):
            path = image_path(root, row.image)
            if row.image and not (path.is_file() and files.sha256(path) == row.digest):
                return False
    return True


def _contents(config: Config) -> list[Any]:
    """What tells whether the rows of a config's dataset are the same."""
    return [*[_content(part) for part in config.data.datasets.values()], *_codec(config)]


def _content(data: Data) -> list[str]:
    """What tells whether a dataset's rows are the same: annotation files, or its version, or the names of all files."""
    sources = annotation_files(data)
    for source in sources:
        if not source.is_file():
            remedy = "Run `ftlib stage CONFIG` first." if data.source in MAKERS else _LOOK
            raise UserError(f"{source}: no such file", remedy)
    return [files.sha256(source) for source in sources] or version(data) or _listing(Path(data.root))


def _codec(config: Config) -> list[str]:
    """The weights that mask codes are made with, where they are."""
    if config.task != "segment" or config.evaluation.mask_decoder is None:
        return []
    path = Path(config.evaluation.mask_decoder)
    if not path.is_file():
        raise UserError(f"evaluation.mask_decoder: {path}: no such file")
    return [files.sha256(path)]


def _listing(root: Path) -> list[str]:
    """What a dataset without annotation files consists of."""
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def open_prepared(config: Config, site: Site, run: Run | None = None) -> Prepared:
    """The prepared form of a config's dataset; see `find_prepared`.

    Raises:
        UserError: it has not been prepared.
    """
    found = find_prepared(config, site, run)
    if found is None:
        folder = prepared_folder(config, site)
        raise UserError(f"the dataset of this config is not prepared ({folder})", "Run `ftlib prepare CONFIG` first.")
    return found


def find_prepared(config: Config, site: Site, run: Run | None = None) -> Prepared | None:
    """The prepared form of a config's dataset; None before it is prepared.

    Args:
        run: goes on with what it was made from while that exists, whatever new data of its config would be called.

    Raises:
        UserError: the annotation file is missing.
    """
    if run and (found := _made_from(run, config, site)):
        return found
    folder = prepared_folder(config, site)
    return _read(folder, config) if files.is_complete(folder) else None


def _read(folder: Path, config: Config) -> Prepared:
    return Prepared(folder=folder, root=Path(config.data.root), facts=files.read_json(folder / "data.json"))


def _made_from(run: Run, config: Config, site: Site) -> Prepared | None:
    """The prepared data that a run noted, or, of a run that did not note their place, any with the same rows."""
    if not run.data.exists():
        return None
    noted = files.read_json(run.data)
    place = noted.get("prepared")
    within = site.store / "prepared"
    for folder in [within / place] if place else sorted(within.glob(f"{noted['source']}-*")):
        if files.is_complete(folder):
            found = _read(folder, config)
            if found.facts.get("format", 3) in _READABLE and same_rows(found.facts, noted):
                return found
    return None


def same_data(run: Run, config: Config, site: Site) -> bool:
    """Whether a config's data, wherever they lie, are those that a run noted: annotation files, splits and images.

    Raises:
        UserError: the annotation file is missing.
    """
    made = _made_from(run, config, site)
    if made and {"root", "content"} <= made.facts.keys() and not changed_since(made, config):
        return _same_images(made, config, site)
    found = find_prepared(config, site)
    return found is not None and same_rows(found.facts, files.read_json(run.data))


def changed_since(prepared: Prepared, config: Config) -> bool:
    """Whether a dataset's annotation files are others than those that it was prepared from, as far as that is known."""
    return prepared.facts.get("content") not in (None, files.fingerprint(_contents(config)))


def prepare(config: Config, site: Site, encode: Encode | None = None) -> Prepared:
    """Check, split and write a dataset: two passes over its rows, each image opened once.

    Args:
        encode: see `intake.take_in`.

    Raises:
        UserError: faulty rows or images, impossible splits, storage full or read-only.
    """
    place = prepared_folder(config, site)
    with files.publish_folder(place) as folder:
        intake = take_in(config.data, folder / _SPOOL, config.task, encode)
        images = check_images(intake, config.data)
        codes = intake.divide(config.data.split)
        splits, dropped = _write(folder, intake, images, codes, config.data)
        files.write_json(folder / "bad.json", {"count": intake.bad.count, "shown": intake.bad.shown})
        facts = {
            "format": FORMAT,
            "root": stored_path(Path(config.data.root), site.store),
            "content": files.fingerprint(_contents(config)),
            "source": config.data.source,
            "rule": config.data.split.model_dump(),
            "labels": intake.labels,
            "splits": splits,
            "bad": intake.bad.count,
            "left_out": {**left_out(config.data), **dropped},
        }
        if alike := sorted(images.one_color):
            facts["one_color"] = {"images": len(alike), "shown": alike[:MAX_FAULTS_SHOWN]}
        files.write_json(folder / "data.json", facts)
        for spool in folder.glob("rows.*"):
            spool.unlink()
    return _read(place, config)


@dataclass(frozen=True)
class Images:
    """What is known of all images of a dataset, 44 bytes each.

    Attributes:
        names: hashes of their names, ascending, shape (n,).
        digests: SHA-256 of their bytes, raw.
        frames: how many; 0 if the image cannot be used.
        sizes, kinds: how many images are of a size, of a format and mode.
        one_color: names of those whose pixels are all alike once they are decoded.
    """

    names: NDArray[np.uint64]
    digests: NDArray[np.void]
    frames: NDArray[np.int32]
    sizes: Counter[tuple[int, int]]
    kinds: Counter[str]
    one_color: list[str]

    def find(self, name: int) -> tuple[str, int]:
        """Digest in hexadecimal and number of frames."""
        place = int(np.searchsorted(self.names, np.uint64(name)))
        return bytes(self.digests[place]).hex(), int(self.frames[place])


def check_images(intake: Intake, data: Data) -> Images:
    """Decode every image once; faulty ones count as bad records.

    Raises:
        UserError: faulty images, unless they are to be skipped.
    """
    names, places = first_rows_of_images(intake)
    rows, root = intake.rows, Path(data.root)
    digests, frames = np.zeros(len(names), dtype="V32"), np.zeros(len(names), dtype=np.int32)
    found = Images(names, digests, frames, Counter(), Counter(), [])

    def look(place: int) -> ImageFacts | Bad:
        row = rows[place]
        try:
            return inspect_image(image_path(root, row.image))
        except UserError as error:
            return Bad(f"row {row.id}", error.problem)

    bad_rows = intake.bad.count
    with ThreadPoolExecutor() as pool, console.progress("checking images", len(names)) as update:
        for start in range(0, len(names), _BLOCK):
            for number, seen in enumerate(pool.map(look, places[start : start + _BLOCK].tolist()), start):
                if isinstance(seen, Bad):
                    intake.bad.add(seen)
                else:
                    _note(found, number, seen)
                    if seen.one_color:
                        found.one_color.append(rows[int(places[number])].image)
                update(number + 1, "")
    if intake.bad.count > bad_rows:
        intake.bad.settle()
    return found


def _note(images: Images, number: int, seen: ImageFacts) -> None:
    images.digests[number] = np.void(bytes.fromhex(seen.digest))
    images.frames[number] = seen.frames
    images.sizes[seen.size] += 1
    images.kinds[seen.kind] += 1


def _write(
    folder: Path, intake: Intake, images: Images, codes: Codes, data: Data
) -> tuple[dict[str, Any], Counter[str]]:
    """Second pass: every row into its split.

    Returns:
        Split → number of rows (of a mixture's parts, too) and fingerprint; what was left out, counted.
    """
    sums = np.zeros(len(SPLITS), dtype=object)
    dropped: Counter[str] = Counter()
    parts = [dict.fromkeys(data.datasets, 0) for _ in SPLITS]
    with ExitStack() as stack, console.progress("writing splits", len(codes)) as update:
        writers = [stack.enter_context(RowWriter(folder / f"{split}.jsonl")) for split in SPLITS]
        for place, (row, code) in enumerate(zip(intake.rows, codes.tolist(), strict=True)):
            digest, frames = images.find(int(intake.images[place])) if row.image else ("", 1)
            for shown in _shown(row, digest, frames, data.frames, dropped):
                if code < 0:
                    dropped[_WHY_NOT[code]] += 1
                    continue
                line = writers[code].write(compact(shown))
                parts[code][row.dataset] += 1
                sums[code] += int.from_bytes(hashlib.sha256(line).digest(), "big")
            update(place + 1, "")
    splits = {}
    for split, writer, total, counts in zip(SPLITS, writers, sums, parts, strict=True):
        # a sum does not depend on the order of rows, and needs only one row at a time
        splits[split] = {"rows": len(writer), "fingerprint": f"{total % (1 << 256):064x}"[:16]}
        splits[split] |= {"parts": counts} if data.parts else {}
    return splits, dropped


def _shown(row: Example, digest: str, frames: int, rule: str, dropped: Counter[str]) -> Iterator[Example]:
    """A row as it is asked: once, once a frame, or not at all."""
    if not frames:
        dropped["unreadable image"] += 1
        return
    chosen = choose_frames(frames, rule)
    if not chosen:
        dropped["animated image"] += 1
    for frame in chosen:
        identity = f"{row.id}#{frame}" if len(chosen) > 1 else row.id
        yield replace(row, id=identity, frame=frame, digest=digest)
