"""Map official split names to train, valid and test: one table for folders, splits on the hub and fields of rows.

Names are split at capitals, digits and punctuation: `testA`, `test-dev`, `validation_matched`, `train_sft`,
`PublicTest`, `dev.clean`, `seg_train`. A name with words for test and valid (`test_dev`) is test; a name with words for
train and another split (`trainval`) is unknown. `data.splits` in the config maps unknown names.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ftlib.config.schema import Data
from ftlib.core.text import normalize
from ftlib.data.sources.release_files import OfficialSplit
from ftlib.errors import UserError

_WORDS: dict[str, OfficialSplit] = {
    "train": "train",
    "training": "train",
    "trn": "train",
    "restval": "train",
    "学習": "train",
    "訓練": "train",
    "valid": "valid",
    "val": "valid",
    "minival": "valid",
    "検証": "valid",
    "validate": "valid",
    "validation": "valid",
    "dev": "valid",
    "devel": "valid",
    "develop": "valid",
    "development": "valid",
    "eval": "valid",
    "evaluate": "valid",
    "evaluation": "valid",
    "test": "test",
    "tests": "test",
    "testing": "test",
    "tst": "test",
    "テスト": "test",
}
_NEGATIONS = {"no", "non", "not", "pre", "un", "without"}
_ALTERNATIVES = "|".join(sorted(_WORDS, key=len, reverse=True))
_FILLERS = "sets?|splits?|data|images?|mini|std|challenge|reserve|[a-d]|データ|用"
_COMPOUND = re.compile(rf"((?:{_ALTERNATIVES})+)(?:{_FILLERS})?")
"""Compound words: testset, devtest, testa, testmini."""
_NOTHING = re.compile(rf"{_FILLERS}")
"""Further words that a split name may have: test_set, testA."""
_TOKEN = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[^\W\d_a-zA-Z]+")

_FIELDS = ("part", "split")
"""Fields with a row's official split (any case), unless `data.columns.part` is set."""

_DOUBTFUL = {"data_split", "dataset_split", "fold", "partition", "phase", "set", "split_name", "subset", "usage"}
"""Fields that hold the split in some datasets; if their values are split names, the config must decide."""

_FLAGS = {"is_test", "is_train", "is_training", "is_val", "is_valid", "is_validation"}
_ROLES = {"id", "image", "prefix", "suffix", "references", "instruction", "input", "output", "response", "context"}
"""Fields that never hold the split."""

_YES = ("1", "1.0", "true", "yes")
_MAX_FORMS = 1000

_LEFT_OUT = "left_out"
_MAX_SHOWN = 20
"""Number of names that are shown; a field with more unknown names does not hold splits."""


@functools.lru_cache(1024)  # rows have few names
def split_from_name(name: str) -> OfficialSplit:
    """Return the split of a name; "" if it is not a split name, or ambiguous."""
    tokens = _tokens(name)
    compounds = [found.group(1) for token in tokens if (found := _COMPOUND.fullmatch(token))]
    parts = {_WORDS[word] for compound in compounds for word in re.findall(_ALTERNATIVES, compound)}
    if "train" in parts:
        return "train" if len(parts) == 1 and not _NEGATIONS.intersection(tokens) else ""
    return "test" if "test" in parts else "valid" if parts else ""


@functools.lru_cache(1024)
def split_from_plain_name(name: str) -> OfficialSplit:
    """As `split_from_name`, but only for names without other words: `Test`, `testA`, `test_set`, not `test_tube`."""
    words = all(_COMPOUND.fullmatch(token) or _NOTHING.fullmatch(token) for token in _tokens(name))
    return split_from_name(name) if words else ""


def _tokens(name: str) -> list[str]:
    return [token.lower() for token in _TOKEN.findall(normalize("NFKC", name))]


def without_split(name: str) -> str:
    """Return a name without its split words: `cats` for cats_train and cats_test."""
    return " ".join(token for token in _tokens(name) if not _COMPOUND.fullmatch(token))


def other_splits(folder: Path, suffixes: Collection[str], like: str = "") -> dict[str, list[str]]:
    """Return split → file names of the files in a folder that are splits of one dataset; empty for a single split.

    Args:
        suffixes: of the file names.
        like: the name of one of them; without it, only names without other words count (and Roboflow's).
    """
    rests = {without_split(Path(like).stem)} if like else {"", "annotations"}
    found: dict[str, list[str]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        part = split_from_name(path.stem)
        if part and path.suffix in suffixes and without_split(path.stem) in rests and path.is_file():
            found.setdefault(part, []).append(path.name)
    return {part: found[part] for part in ("train", "valid", "test") if part in found} if len(found) > 1 else {}


def splits_in_folders(folder: Path, suffixes: Collection[str]) -> dict[str, list[str]]:
    """As `other_splits`, for one file in each of several split folders: `train/_annotations.jsonl`."""
    found: dict[str, list[str]] = {}
    for inner in sorted(folder.iterdir()) if folder.is_dir() else []:
        part = split_from_plain_name(inner.name)
        names = [path.name for path in inner.iterdir() if path.suffix in suffixes] if part and inner.is_dir() else []
        if len(names) == 1:
            found.setdefault(part, []).append(f"{inner.name}/{names[0]}")
    return {part: found[part] for part in ("train", "valid", "test") if part in found} if len(found) > 1 else {}


class NamedSplit(NamedTuple):
    """A split and its name in the source."""

    split: OfficialSplit
    name: str


class SplitNames:
    """The split names of one dataset; unknown names are collected, and `require_known` rejects them.

    With `data.split.official: false` any name is accepted.

    Attributes:
        left_out: name → number of rows that `data.splits` leaves out.
    """

    def __init__(self, data: Data) -> None:
        self._given = {name: part for part, names in data.splits.items() for name in names}
        self._field = data.columns.get("part", "")
        self._other = _ROLES | set(data.columns.values())
        self._forms: dict[tuple[str, ...], tuple[list[str], list[str], list[str]]] = {}
        self._silent: set[str] = set()
        """Fields with a value that is not a split name."""
        self._doubts: dict[str, Counter[str]] = {}
        self._missing = set(self._given)
        self._needed = data.split.official
        self._where = data.file or data.root
        self._unknown: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()

    def split(self, name: str, rows: int = 1) -> NamedSplit | None:
        """Return the split of a name; None for rows that are left out.

        Args:
            rows: number of rows with this name.

        Raises:
            UserError: too many unknown names for a dataset's splits.
        """
        part = self._describe_reading(name)
        if part == _LEFT_OUT:
            self.left_out[name] += rows
            return None
        if not part and name and self._needed:
            self._unknown[name] += rows
            if len(self._unknown) > _MAX_SHOWN:
                self.require_known()
        return NamedSplit(part, name)  # type: ignore[arg-type]

    def of_row(self, record: Mapping[str, Any], outer: NamedSplit | None = None) -> NamedSplit | None:
        """Return the split in a row's field; None for a row that is left out.

        Args:
            outer: the split of the row's file or folder, if known. Then fields without split names are ignored, unless
                `data.columns.part` is set.

        Raises:
            ValueError: two fields, or a field and the file, have different splits.
            UserError: as `split`.
        """
        fields, doubtful, others_left = self._fields_of(record)
        said = {field: str(_single(record[field])) for field in fields if record.get(field) not in (None, "")}
        if outer and not self._field:
            said = {field: name for field, name in said.items() if self._describe_reading(name)}
        if not said:
            if not outer:
                for field in doubtful:
                    self._add_doubtful(field, str(record[field]))
                for field in tuple(others_left):
                    self._try(field, record[field], others_left)
            return outer or NamedSplit("", "")
        field, name = next(iter(said.items()))
        others = {
            key: other for key, other in said.items() if self._describe_reading(other) != self._describe_reading(name)
        }
        if others and self._needed:
            shown = ", ".join(f"{key} {other[:50]!r}" for key, other in {field: name, **others}.items())
            raise ValueError(f"fields with different splits: {shown}; choose one with data.columns, {{part: {field}}}")
        if outer and not self._field and self._describe_reading(name) != _LEFT_OUT:
            if self._describe_reading(name) != outer.split and self._needed:
                raise ValueError(f"field {field}: {name[:50]!r}, but the row is in {outer.name} ({outer.split})")
            return outer
        return self.split(name)

    def merge(self, other: SplitNames) -> None:
        """Merge the names of later rows, which another process has read."""
        self._unknown.update(other._unknown)
        self.left_out.update(other.left_out)
        self._missing &= other._missing
        self._silent |= other._silent
        for field, values in other._doubts.items():
            for name, count in values.items():
                self._add_doubtful(field, name, count)

    def finish(self) -> None:
        """Check the names after all rows are read.

        Raises:
            UserError: as `require_known`; no row has a name of `data.splits`; another field seems to hold the split.
        """
        self.require_known()
        if self._missing:
            shown = ", ".join(sorted(self._missing))
            raise UserError(f"{self._where}: data.splits: the dataset has no split {shown}", "Check the names there.")
        for field, values in self._doubts.items() if self._needed else ():
            if field in self._silent:
                continue
            flag = field.lower() in _FLAGS
            if len(values) > 1 if flag else len({split_from_name(name) for name in values} - {""}) > 1:
                shown = ", ".join(f"{name[:50]!r} ({count:,})" for name, count in values.most_common(_MAX_SHOWN))
                remedy = f"Set data.columns: {{part: {field}}}"
                if flag:
                    yes, part = [name for name in values if name.lower() in _YES], split_from_name(field)
                    no, rest = [name for name in values if name not in yes], "test" if part == "train" else "train"
                    remedy += f" and data.splits: {{{part}: {yes}, {rest}: {no}}}"
                problem = f"{self._where}: field {field} seems to hold the split of a row: {shown}"
                raise UserError(problem, f"{remedy}. If it does not, set data.split.official: false.")

    def require_known(self) -> None:
        """Reject unknown names.

        Raises:
            UserError: there are unknown names; the message lists them and the config line that maps them.
        """
        if not self._unknown:
            return
        names = list(self._unknown)
        shown = ", ".join(f"{name[:50]!r} ({count:,})" for name, count in self._unknown.most_common(_MAX_SHOWN))
        more = ", …" if len(names) > _MAX_SHOWN else ""
        problem = f"{self._where}: unknown split names: {shown}{more}"
        lines = [
            f"Map them in data.splits, such as {{valid: [{names[0][:50]}], test: […], left_out: […]}}.",
            "If they are not splits, set data.split.official: false to split all rows by data.split.",
        ]
        raise UserError(problem, "\n".join(lines))

    def _fields_of(self, record: Mapping[str, Any]) -> tuple[list[str], list[str], list[str]]:
        """Return fields that hold the split, that may hold it by their names, and by all values so far."""
        form = tuple(record)
        found = self._forms.get(form)
        if found is None:
            own = [self._field] if self._field else [key for name in _FIELDS for key in form if key.lower() == name]
            doubtful = [] if self._field else [key for key in form if key.lower() in _DOUBTFUL | _FLAGS]
            said = {*own, *doubtful, *self._other, *self._silent}
            found = own, doubtful, [] if self._field else [key for key in form if key not in said]
            if len(self._forms) < _MAX_FORMS:
                self._forms[form] = found
        return found

    def _try(self, field: str, value: Any, left: list[str]) -> None:
        """Count a field's value if it is a plain split name; else the field is not considered any more."""
        name = _single(value)
        if name is None or name == "":
            return
        if isinstance(name, str) and split_from_plain_name(name):
            self._add_doubtful(field, name)
        else:
            left.remove(field)
            self._silent.add(field)

    def _add_doubtful(self, field: str, name: str, rows: int = 1) -> None:
        values = self._doubts.setdefault(field, Counter())
        if name in values or len(values) < _MAX_SHOWN:
            values[name] += rows

    def _describe_reading(self, name: str) -> str:
        if name in self._given:
            self._missing.discard(name)
            return self._given[name]
        return split_from_name(name)


def _single(value: Any) -> Any:
    """Return the element of a list of length one (as in the tags of some tools); other values unchanged."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value
