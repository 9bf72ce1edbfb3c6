"""The schema's `data` section: where rows come from, how they are asked and how they are divided."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from ftlib.config_base import NAME, Count, PathKind, Section

Source = Literal[
    "coco_captions",
    "coco_detection",
    "csv",
    "digits",
    "digits_detect",
    "docvqa",
    "folder",
    "gqa",
    "hub",
    "instructions",
    "jsonl",
    "refcoco",
    "refcoco+",
    "refcocog",
    "string_tasks",
    "vqav2",
]
Column = Literal["id", "image", "prefix", "suffix", "references"]
CHAT = "chat"
"""The prompt that is the model's own chat template."""

MIXTURE = "mixture"


def _share_or_number(value: float) -> float:
    if value >= 1 and value != int(value):
        raise ValueError("must be below 1 (a share) or a whole number of images")
    return value


class SplitRule(Section):
    """How rows are divided. Rows that share an image or document always stay together.

    `valid` and `test` are shares (below 1) or numbers of images. Of `sets` random divisions this is number `set`; with
    `folds`, valid is part number `fold` of everything that is not test. A release's own parts are kept unless
    `official: false`.
    """

    valid: Annotated[float, Field(gt=0), AfterValidator(_share_or_number)] = 0.1
    test: Annotated[float, Field(ge=0), AfterValidator(_share_or_number)] = 0.1
    seed: int = 0
    stratify_by: Literal["suffix"] | None = None
    official: bool = True
    sets: Count = 1
    set: Count = 1
    folds: Annotated[int, Field(ge=2)] | None = None
    fold: Count = 1
    max_train: Count | None = None
    max_eval: Count | None = None

    @model_validator(mode="after")
    def _numbers_exist(self) -> SplitRule:
        if self.set > self.sets:
            raise ValueError(f"set: {self.set} of {self.sets} sets")
        if self.fold > (self.folds or 1):
            raise ValueError(f"fold: {self.fold} of {self.folds or 1} folds")
        return self


class Part(Section):
    """A dataset of a mixture: `root` is relative to the mixture's, its rows have their own `prompt` if it has one.

    `weight` says how often each of its rows is drawn in an epoch of training: 1: once, as without weights; 3: three
    times; 0.5: half of them, the other half in the next epoch.
    """

    name: Annotated[str, Field(pattern=NAME)]
    source: Source
    root: Annotated[str, Field(min_length=1)] = "."
    file: str = ""
    columns: dict[Column, str] = {}
    balanced: bool = True
    prompt: str | None = None
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0

    def paths(self) -> dict[str, PathKind]:
        return {"file": "dataset"} if self.source == "hub" else {}


class Data(Section):
    """Where the rows come from and how they are asked. `source: mixture` takes those of several datasets, its `parts`.

    Their roots lie below `root`. `split` divides each part by itself.
    """

    source: Literal[Source, "mixture"]
    root: Annotated[str, Field(min_length=1)]
    parts: list[Part] = []
    file: str = ""
    columns: dict[Column, str] = {}
    balanced: bool = True
    prompt: str = "{prefix}"
    on_bad: Literal["stop", "skip"] = "stop"
    frames: Literal["first", "middle", "last", "all", "exclude"] = "first"
    split: SplitRule = SplitRule()

    def paths(self) -> dict[str, PathKind]:
        return {"root": "path", **({"file": "dataset"} if self.source == "hub" else {})}

    @model_validator(mode="after")
    def _parts_of_a_mixture(self) -> Data:
        if (self.source == MIXTURE) != bool(self.parts):
            raise ValueError("source: mixture and a list of parts belong together")
        names = [part.name for part in self.parts]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"parts: the name {repeated[0]} stands there twice")
        if self.parts and (self.file or self.columns or not self.balanced):
            raise ValueError("file, columns and balanced of a mixture are set in its parts")
        own = [part.prompt for part in self.parts if part.prompt is not None]
        if CHAT in own or (own and self.prompt == CHAT):
            raise ValueError("prompt: chat holds for a whole mixture: set it beside `parts`, and no other in them")
        return self

    @property
    def datasets(self) -> dict[str, Data]:
        """The parts of a mixture by name, each as a dataset of its own; "" → this dataset, if it is none."""
        if not self.parts:
            return {"": self}
        return {part.name: self._dataset(part) for part in self.parts}

    @property
    def places(self) -> dict[str, str]:
        """Dotted key → where its files and those of its parts lie: every `root` and `file`."""
        sections = {"": self, **{f"parts.{number}.": part for number, part in enumerate(self.parts)}}
        return {f"{at}{key}": getattr(section, key) for at, section in sections.items() for key in ("root", "file")}

    def at(self, places: Mapping[str, str]) -> Data:
        """The same dataset at other places, as `places` names them; keys that are left out stay."""
        own = {key: places[key] for key in ("root", "file") if key in places}
        parts = []
        for number, part in enumerate(self.parts):
            keys = {key: f"parts.{number}.{key}" for key in ("root", "file")}
            parts.append(part.model_copy(update={key: places[at] for key, at in keys.items() if at in places}))
        return self.model_copy(update={**own, "parts": parts})

    @property
    def templates(self) -> dict[str, str]:
        """The prompt of each of `datasets`."""
        return {name: data.prompt for name, data in self.datasets.items()}

    @property
    def weights(self) -> list[float]:
        """How often each row of each of `datasets` is drawn in an epoch."""
        return [part.weight for part in self.parts] or [1.0]

    def _dataset(self, part: Part) -> Data:
        own = part.model_dump(exclude={"name", "weight", "prompt"})
        prompt = self.prompt if part.prompt is None else part.prompt
        return self.model_copy(update={**own, "root": str(Path(self.root) / part.root), "prompt": prompt, "parts": []})
