"""Schema of experiment configs: sections, types, defaults and bounds. `loader.py` reads the files."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from ftlib.config import hf_fields
from ftlib.core import plugins as core_plugins
from ftlib.core import registry

# Common to all sections of a config.

INT32_LIMIT = 2**31
"""Upper limit of counts and numbers."""
Count = Annotated[int, Field(ge=1, lt=INT32_LIMIT)]
Split = Literal["train", "valid", "test"]
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
MAX_NAME_LENGTH = 200
"""In characters. File names, which start with the name, are limited to 255 bytes."""
Name = Annotated[str, Field(min_length=1)]
NPZ = ".npz"
"""Suffix of big_vision's checkpoints."""
MODEL_FILES = (NPZ, ".model", ".json")
"""Suffixes of files that a key accepts instead of a hub name."""
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(?<!\.model)(?<!\.json)(?<!\.npz)")
SHA256 = r"^[0-9a-f]{64}$"
LORA_INIT = r"^(default|pissa|pissa_niter_[1-9][0-9]{0,2})$"
PathKind = Literal["path", "model", "dataset", "run"]
"""A path; `model`, `dataset` (before a colon) and `run` also accept a hub name or the name of a run."""
SHARDED_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd")
"""Values of training.optim that can update sharded weights; Adafactor and bitsandbytes' optimizers cannot."""
LOSS = "loss"
"""The metric of all tasks: the loss, computed as in training."""


class Section(BaseModel):
    """A section of the config: no unknown keys, no implicit conversions."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    def paths(self) -> dict[str, PathKind]:
        """Return the keys that hold a path, or a name instead of one."""
        return {}


def _named(kind: registry.Kind, *also: str) -> dict[str, Any]:
    """Return the JSON Schema of a registered name; the loader checks names, because plugins add some."""
    return {"anyOf": [{"enum": [*registry.names(kind), *also]}, {"type": "string"}]}


class Plugin(Section):
    """A plugin as stored with a run. In a config file it is a path."""

    file: str = ""
    """The .py file."""
    package: str = ""
    """For an installed package: its name and version, as in `name==1.0`."""
    module: str = ""
    """The module of the plugin in the package."""
    sha256: Annotated[str, Field(pattern=SHA256)]
    """SHA-256 of the file's content."""
    registers: dict[str, dict[str, dict[str, Any]]]
    """Its registrations: kind, name, properties."""

    @model_validator(mode="after")
    def _check_registers(self) -> Plugin:
        """Check the registrations, because a run's config may be another user's."""
        for kind, entries in self.registers.items():
            for name, facts in entries.items():
                if fault := core_plugins.facts_error(kind, name, facts):
                    raise ValueError(f"{kind} {name}: {fault}")
        return self

    def paths(self) -> dict[str, PathKind]:
        return {"file": "path"} if self.file else {}

    @property
    def identity(self) -> str:
        """The part of the run ID: the content, not the path."""
        return " ".join(filter(None, (self.package, self.sha256)))


# Sections about the training process: checkpoints, batches, divergence, rounds.


class Best(Section):
    """Publish the checkpoint with the best metric on valid instead of the last one."""

    metric: Name
    """Metric of generated answers, or `loss`."""
    every: Count
    """Steps between evaluations; the end of a round is always evaluated."""
    patience: Count | None = None
    """End the round after this many evaluations in a row without a better one."""


class Checkpoint(Section):
    """When a checkpoint is saved: as soon as either interval has passed."""

    steps: Count = 500
    """Optimizer steps between checkpoints."""
    minutes: Annotated[float, Field(gt=0)] = 15.0
    """Minutes between checkpoints."""
    keep: Count = 2
    """How many of the newest checkpoints are kept; the best is kept, too."""
    best: Best | None = None
    """Choose the result by a metric on valid."""


class Batch(Section):
    """How the rows of an optimizer step (micro-batch × accumulation) are computed. The step itself stays the same."""

    auto: bool = False
    """Use the largest micro-batch that fits the GPU, with gradient checkpointing only if nothing fits without it; halve
    the micro-batch if memory runs out. With several GPUs all use the same; the model is not sharded then.
    """


class Parallel(Section):
    """How several GPUs share a model. It does not change the result, beyond rounding."""

    shard: Literal["auto", "none", "full"] = "auto"
    """`none`: every GPU holds the whole model (DDP). `full`: each holds a part of all weights, and of what is trained
    also of gradients and optimizer states (FSDP2). `auto`: `none` if `ftlib plan` says that it fits the GPU, else
    shards, only within each node if that fits.
    """


class Guard(Section):
    """Divergence handling: training stops and restarts with another seed.

    A loss or gradient that is not finite always counts as divergence.
    """

    max_loss: Annotated[float, Field(gt=0)] = 100.0
    """A loss above this is divergence."""
    above: Annotated[float, Field(gt=0)] | None = None
    """A loss above this for `patience` steps in a row after the warm-up is divergence."""
    spike: Annotated[float, Field(gt=1)] | None = None
    """A loss above this multiple of its running median for `patience` steps in a row is divergence."""
    patience: Count = 3
    """Number of steps in a row for `above` and `spike`."""
    restarts: Annotated[int, Field(ge=0, lt=INT32_LIMIT)] = 3
    """After this many restarts the run fails."""
    learning_rate_factor: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor by which every restart multiplies the learning rate."""


class Until(Section):
    """Condition on a metric of generated answers, or on `loss`."""

    split: Split = "train"
    """Split that is evaluated."""
    metric: Name
    """Metric."""
    at_least: float | None = None
    """Minimum of the metric, in its unit, if higher is better."""
    at_most: float | None = None
    """Maximum of the metric, if lower is better."""

    @model_validator(mode="after")
    def _check_one_bound(self) -> Until:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("set at_least, or at_most if lower is better")
        return self

    def is_reached(self, value: float | None) -> bool:
        """Whether a value of the metric meets the bound; an undefined value does not."""
        if value is None:
            return False
        return value >= self.at_least if self.at_least is not None else value <= (self.at_most or 0.0)


class Round(Section):
    """A separate training with a new schedule, starting from the weights of the previous round."""

    learning_rate: Annotated[float, Field(gt=0)]
    """Learning rate of this round."""
    until: Until | None = None
    """The round is trained only if this is not reached yet; otherwise training ends."""


# The `data` section: sources, prompts and splits.

Column = Literal["id", "image", "images", "messages", "prefix", "suffix", "references", "part"]
SplitMeaning = Literal["train", "valid", "test", "left_out"]
Categories = Literal["present", "all"]
"""Categories in the prompt of a `coco_detection` image: those in the image, or all."""

BoxFormat = Literal["location_tokens", "json_pixels", "json_1000"]
"""How answers write boxes, see `data.json_boxes`."""

CHAT = "chat"
"""Value of `data.prompt` for the model's chat template."""

MIXTURE = "mixture"
TABLES = tuple(name for name, entry in registry.SOURCES.items() if entry.split_files == "several")
"""Sources that read files of rows; each file may be a split."""

COCO = tuple(name for name, entry in registry.SOURCES.items() if entry.split_files == "one")


def _is_encoding(name: str) -> bool:
    try:
        "".encode(name or "utf-8")
    except LookupError:
        return False
    return True


def _as_name_list(value: object) -> object:
    """Return one or several names as a list; numbers and booleans become names, too."""
    several = value if isinstance(value, list) else [value]
    return [str(one) if isinstance(one, int) else one for one in several]


NameList = Annotated[
    list[str],
    BeforeValidator(_as_name_list),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]


def _check_share_or_count(value: float) -> float:
    if value >= 1 and value != int(value):
        raise ValueError("must be below 1 (a share) or a whole number of images")
    return value


def _source_error(section: Part | Data, entry: registry.SourceEntry) -> str:
    """Return an error if a key is not supported by the source, else ""."""
    if section.splits and not entry.split_names:
        return f"splits: source {section.source} has fixed official splits"
    if section.encoding and not entry.encodings:
        return f"encoding: only for sources {', '.join(TABLES)}; files of source {section.source} are UTF-8"
    if section.files and not entry.split_files:
        return f"files: only for sources {', '.join((*TABLES, *COCO))}; source {section.source} has fixed files"
    if entry.split_files == "one" and sum(map(len, section.files.values())) > len(section.files):
        return f"files: source {section.source} takes one file for each split"
    return ""


class SplitRule(Section):
    """How rows are split into train, valid and test. Rows with the same image or document, and copies of an image,
    always stay together.
    """

    valid: Annotated[float, Field(gt=0, lt=INT32_LIMIT), AfterValidator(_check_share_or_count)] = 0.1
    """Share (below 1) or number of images."""
    test: Annotated[float, Field(ge=0, lt=INT32_LIMIT), AfterValidator(_check_share_or_count)] = 0.1
    """Share (below 1) or number of images; 0: no test split."""
    seed: int = 0
    """Seed of the split."""
    stratify_by: Literal["suffix"] | None = None
    """Stratify: the same share of every answer in each split."""
    official: bool = True
    """Keep the dataset's official splits; `false`: split all rows."""
    sets: Count = 1
    """Number of random splits, for repeated experiments."""
    set: Count = 1
    """Index of the random split, below `sets`."""
    folds: Annotated[int, Field(ge=2, lt=INT32_LIMIT)] | None = None
    """Cross-validation: number of folds of all rows that are not test; one of them is valid."""
    fold: Count = 1
    """Index of the fold that is valid."""
    max_train: Count | None = None
    """At most this many training rows."""
    max_eval: Count | None = None
    """At most this many rows of valid and of test."""
    near_duplicates: Literal["count", "group"] = "count"
    """Near-duplicate images (resized, recompressed): count and report them, or keep them in the same split."""

    @model_validator(mode="after")
    def _check_numbers(self) -> SplitRule:
        if self.set > self.sets:
            raise ValueError(f"set: {self.set} of {self.sets} sets")
        if self.fold > (self.folds or 1):
            raise ValueError(f"fold: {self.fold} of {self.folds or 1} folds")
        return self


class Part(Section):
    """A dataset of a mixture."""

    name: Annotated[str, Field(pattern=NAME_PATTERN, max_length=MAX_NAME_LENGTH)]
    """Name of the part; prefix of its row IDs."""
    source: Annotated[str, WithJsonSchema(_named("source"))]
    """As `data.source`."""
    root: Annotated[str, Field(min_length=1)] = "."
    """Folder, relative to the mixture's `root`."""
    file: str = ""
    """As `data.file`."""
    files: dict[Split, NameList] = {}
    """As `data.files`."""
    splits: dict[SplitMeaning, NameList] = {}
    """As `data.splits`."""
    columns: dict[Column, str] = {}
    """As `data.columns`."""
    encoding: str = ""
    """As `data.encoding`."""
    balanced: bool = True
    """As `data.balanced`."""
    categories: Categories = "present"
    """As `data.categories`."""
    prompt: str | None = None
    """Prompt of these rows; default: `data.prompt`."""
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """How often each row is used per epoch. 3: three times; 0.5: half of the rows, the other half in the next epoch.
    """

    def paths(self) -> dict[str, PathKind]:
        return {"file": "dataset"} if self.source == "hub" else {}


class Data(Section):
    """The dataset: source, prompts and splits."""

    source: Annotated[str, WithJsonSchema(_named("source", MIXTURE))]
    """Type of dataset, see docs/data.md; `mixture`: several datasets, listed in `parts`; or the name of a plugin's."""
    root: Annotated[str, Field(min_length=1)]
    """Folder with images and annotations."""
    parts: list[Part] = []
    """Datasets of a mixture; `split` applies to each separately."""
    file: str = ""
    """Annotation file below `root`; for source hub: `owner/name[:subset]` or a local folder."""
    files: dict[Split, NameList] = {}
    """One or several files for each split: `{train: train.jsonl, valid: valid.jsonl, test: [a.jsonl, b.jsonl]}`."""
    splits: dict[SplitMeaning, NameList] = {}
    """Mapping of the dataset's split names, if ftlib does not know them: `{valid: [eval_a], test: [blind],
    left_out: [raw]}`.
    """
    columns: dict[Column, str] = {}
    """Field of a row → name in the dataset, such as `{suffix: label}`."""
    encoding: str = ""
    """Encoding of annotation files that are not UTF-8, such as `shift_jis`, `utf-16` or `cp1252`."""
    balanced: bool = True
    """Source gqa: train on the balanced questions; `false`: on all."""
    categories: Categories = "present"
    """Source coco_detection: categories in the prompt of an image: those in the image (`present`), or `all`, including
    images without boxes.
    """
    prompt: str = "{prefix}"
    """Template with fields of the row in braces, `alpaca`, or `chat` (the model's chat template). Default for task
    instruct: `alpaca`.
    """
    allow_urls: bool = False
    """`ftlib stage` downloads images that rows name by https URL, from the public internet only."""
    chat_turns: Literal["rows", "all", "last"] = "rows"
    """Conversations with several answers. `rows`: every answer is a row, with the turns before it as its prompt;
    `all`: a conversation is one row, with loss on all its answers; `last`: it is one row, with loss on the last answer.
    """
    box_format: BoxFormat = "location_tokens"
    """Tasks detect and refer: how answers write boxes. `location_tokens`: as PaliGemma (`<loc0123>`). JSON with
    `bbox_2d` and `label`, as Qwen-VL: in pixels of the image file (`json_pixels`; rows need `width` and `height`) or
    in thousandths of its width and height (`json_1000`). Answers in location tokens are converted.
    """
    on_bad: Literal["stop", "skip"] = "stop"
    """Invalid records: stop with a list of them, or skip and count them."""
    frames: Literal["first", "middle", "last", "all", "exclude"] = "first"
    """Which frames of an animated image are used."""
    max_pixels: Count | None = None
    """Larger images are scaled down when they are decoded."""
    split: SplitRule = SplitRule()

    _plugins: tuple[Plugin, ...] = ()

    def paths(self) -> dict[str, PathKind]:
        return {"root": "path", **({"file": "dataset"} if self.source == "hub" else {})}

    @property
    def plugins(self) -> tuple[Plugin, ...]:
        """The plugins of the config, which may provide the sources."""
        return self._plugins

    @property
    def source_plugins(self) -> list[Plugin]:
        """Return the plugins that provide the dataset's sources."""
        found = (registry.provider("source", part.source, self._plugins) for part in self.datasets.values())
        return [plugin for plugin in self._plugins if plugin in found]

    @model_validator(mode="after")
    def _check_parts(self) -> Data:
        if (self.source == MIXTURE) != bool(self.parts):
            raise ValueError("source: mixture requires `parts`, and `parts` requires source: mixture")
        names = [part.name for part in self.parts]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"parts: duplicate name {repeated[0]}")
        own_places = self.file or self.files or self.columns or self.splits or self.encoding
        if self.parts and (own_places or not self.balanced or self.categories != "present"):
            keys = "file, files, columns, splits, encoding, balanced and categories"
            raise ValueError(f"for a mixture, set {keys} in its parts")
        if self.chat_turns == "all" and self.prompt != CHAT:
            raise ValueError("chat_turns: all requires prompt: chat; with another prompt set rows or last")
        own = [part.prompt for part in self.parts if part.prompt is not None]
        if CHAT in own or (own and self.prompt == CHAT):
            raise ValueError(
                "prompt: chat applies to the whole mixture: set it beside `parts`, and no prompt in `parts`"
            )
        return self

    @model_validator(mode="after")
    def _check_source(self) -> Data:
        self.check_sources(())
        return self

    def check_sources(self, plugins: Sequence[Plugin]) -> None:
        """Check that the source supports the keys; sources of plugins that are not given are not checked.

        Raises:
            ValueError: the first error.
        """
        sections: list[Part | Data] = [*self.parts, self]
        for section in sections:
            entry = registry.lookup("source", section.source, plugins)
            if fault := _source_error(section, entry) if entry else "":
                raise ValueError(fault)

    @model_validator(mode="after")
    def _check_split_names(self) -> Data:
        sections: list[Part | Data] = [*self.parts, self]
        for section in sections:
            names = [name for names in section.splits.values() for name in names]
            if repeated := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"splits: duplicate name {repeated[0]}")
        return self

    @model_validator(mode="after")
    def _check_encodings(self) -> Data:
        sections: list[Part | Data] = [*self.parts, self]
        for section in sections:
            if not _is_encoding(section.encoding):
                raise ValueError(
                    f"encoding: {section.encoding} is unknown; use one such as shift_jis, utf-16 or cp1252"
                )
        return self

    @model_validator(mode="after")
    def _check_split_files(self) -> Data:
        sections: list[Part | Data] = [*self.parts, self]
        for section in sections:
            if not section.files:
                continue
            if section.file:
                raise ValueError("file and files: set only one of them")
            names = [posixpath.normpath(name) for names in section.files.values() for name in names]
            if not all(section.files.values()) or not all(names):
                raise ValueError("files: a split has no file; remove it")
            if repeated := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"files: duplicate file {repeated[0]}")
        return self

    @property
    def split_files(self) -> list[tuple[Split, str]]:
        """Return split and name of each of `files`, in the order of the splits."""
        return [(split, name) for split in get_args(Split) for name in self.files.get(split, [])]

    @property
    def datasets(self) -> dict[str, Data]:
        """Return name → dataset for the parts of a mixture; {"": this dataset} without a mixture."""
        if not self.parts:
            return {"": self}
        return {part.name: self._dataset(part) for part in self.parts}

    @property
    def locations(self) -> dict[str, str]:
        """Return dotted key → path of the dataset and its parts: every `root` and `file`, and all `files`."""
        sections: dict[str, Part | Data] = {"": self}
        sections |= {f"parts.{number}.": part for number, part in enumerate(self.parts)}
        return {f"{at}{key}": text for at, section in sections.items() for key, text in _locations(section).items()}

    def with_locations(self, locations: Mapping[str, str]) -> Data:
        """Return the dataset with other paths, in the form of `locations`; missing keys stay unchanged."""
        parts = [
            part.model_copy(update=_with_locations(part, locations, f"parts.{n}.")) for n, part in enumerate(self.parts)
        ]
        return self.model_copy(update={**_with_locations(self, locations, ""), "parts": parts})

    @property
    def templates(self) -> dict[str, str]:
        """Return the prompt of each of `datasets`."""
        return {name: data.prompt for name, data in self.datasets.items()}

    @property
    def weights(self) -> list[float]:
        """Return how often each row is used per epoch, for each of `datasets`."""
        return [part.weight for part in self.parts] or [1.0]

    def _dataset(self, part: Part) -> Data:
        own = part.model_dump(exclude={"name", "weight", "prompt"})
        prompt = self.prompt if part.prompt is None else part.prompt
        return self.model_copy(update={**own, "root": str(Path(self.root) / part.root), "prompt": prompt, "parts": []})


def _locations(section: Part | Data) -> dict[str, str]:
    several = {f"files.{split}.{n}": name for split, names in section.files.items() for n, name in enumerate(names)}
    return {"root": section.root, "file": section.file, **several}


def _with_locations(section: Part | Data, locations: Mapping[str, str], at: str) -> dict[str, Any]:
    """Return the path fields of a section with the given values."""
    new = {key: locations.get(f"{at}{key}", text) for key, text in _locations(section).items()}
    names = section.files.items()
    files = {split: [new[f"files.{split}.{n}"] for n in range(len(several))] for split, several in names}
    return {"root": new["root"], "file": new["file"], "files": files}


# Types for `job` (options of sbatch), and the schema of `sweep` for editors.

WORD = r"^\S+$"
MEMORY = r"^[0-9]+[KMGT]?$"
DURATION = r"^([0-9]+-)?[0-9]{1,3}(:[0-5][0-9]){0,2}$|^[0-9]{1,7}$"
DEPENDENCY = r"^(singleton|[a-z]+(:[0-9]+(_[0-9]+)?(\+[0-9]+)?)+)(,[a-z]+(:[0-9]+(_[0-9]+)?(\+[0-9]+)?)*)*$"
GRES = r"^[A-Za-z0-9_.-]+(:[A-Za-z0-9_.-]+){0,2}$"
_MIG = re.compile(r"\d+g\.\d+gb")
"""In the name of a type of GPU: a MIG slice, such as 1g.10gb or nvidia_a100_1g.10gb."""


def _as_text(value: Any) -> Any:
    """Accept Slurm's numbers as numbers."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _as_memory(value: Any) -> Any:
    """Return a size as Slurm writes it: `16GB`, `16GiB` and `16g` become `16G`."""
    text = _as_text(value)
    found = re.fullmatch(r"(\d+)([kmgtKMGT])(?:i?[bB])?", text) if isinstance(text, str) else None
    return f"{found[1]}{found[2].upper()}" if found else text


def _as_list(value: Any) -> Any:
    return value.split(",") if isinstance(value, str) else value


_TEXT_OR_NUMBER: dict[str, Any] = {"anyOf": [{"type": "string"}, {"type": "integer", "minimum": 0}]}
Word = Annotated[str, Field(pattern=WORD)]
Memory = Annotated[str, BeforeValidator(_as_memory), Field(pattern=MEMORY), WithJsonSchema(_TEXT_OR_NUMBER)]
Duration = Annotated[str, BeforeValidator(_as_text), Field(pattern=DURATION), WithJsonSchema(_TEXT_OR_NUMBER)]
Gres = Annotated[
    list[Annotated[str, Field(pattern=GRES)]],
    BeforeValidator(_as_list),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]
SbatchOption = Literal[
    "begin", "bb", "comment", "contiguous", "core-spec", "cpu-freq", "deadline", "distribution",
    "exclusive", "extra-node-info", "gpu-freq", "gres-flags", "hint", "licenses", "mem-bind", "mincpus",
    "network", "nice", "nodelist", "oversubscribe", "prefer", "priority", "profile", "reservation", "switches",
    "thread-spec", "threads-per-core", "tmp", "use-min-nodes", "wckey",
]  # fmt: skip
"""Options of sbatch (manual of 22.05 to 24.11) that change neither the command of a job nor how ftlib tracks it."""

_ONE_GPU_EACH = (
    "every task would see its own GPU as device 0, and NCCL could not use peer-to-peer between them; set job.gpus, the "
    "GPUs of a node, each of which gets a task"
)
REFUSED_SBATCH_OPTIONS = {
    **dict.fromkeys(
        ("array", "output", "error", "open-mode", "export", "export-file", "wrap", "chdir", "requeue", "no-requeue"),
        "ftlib sets this option itself",
    ),
    "signal": "ftlib sets this option itself; job.signal is its number of seconds",
    "gpu-bind": "ftlib sets it to none, since every task takes its GPU of those of the node",
    **dict.fromkeys(("gpus-per-task", "ntasks-per-gpu"), _ONE_GPU_EACH),
    **dict.fromkeys(("ntasks", "ntasks-per-node"), "there is a task for each GPU; set job.gpus and job.nodes"),
    **{
        name.replace("_", "-"): f"set job.{name}"
        for name in ("mem", "mem_per_cpu", "mem_per_gpu", "time", "nodes", "partition", "account", "qos", "constraint",
                     "exclude", "mail_type", "mail_user", "dependency", "gres", "gpus")
    },
    **dict.fromkeys(("gpus-per-node", "cpus-per-task"), "set job.gpus or job.cpus"),
}  # fmt: skip
"""Option → why it cannot stand in job.sbatch."""

SWEEP_SCHEMA: dict[str, Any] = {
    "description": "dotted key: [values] for every combination; list: [points]; random: {count, seed, draw}",
    "type": ["object", "null"],
    "properties": {
        "list": {"type": "array", "items": {"type": "object"}},
        "random": {
            "type": "object",
            "properties": {"count": {"type": "integer"}, "seed": {"type": "integer"}, "draw": {"type": "object"}},
            "required": ["count", "draw"],
            "additionalProperties": False,
        },
    },
}


# The other sections, and the config.

ModelPart = Literal["vision", "projector", "embeddings", "language"]


class Model(Section):
    """The base model."""

    family: Annotated[str, WithJsonSchema(_named("model"))]
    """`paligemma` (PaliGemma 1 and 2: image and prompt → text), `vlm` (other vision-language models with a chat
    template), `causal` (causal language models such as OpenCALM, GPT-NeoX, Llama) or one of a plugin.
    """
    base: Annotated[str, Field(min_length=1)]
    """Hub name, local folder, an embedded model such as `ftlib/tiny-paligemma`, or a PaliGemma checkpoint of big_vision
    (`.npz`).
    """
    tokenizer: Annotated[str, Field(min_length=1)] | None = None
    """Tokenizer of an `.npz` base: a SentencePiece `.model` file, a `tokenizer.json`, or the hub name of a PaliGemma in
    the store or the hub cache.
    """
    revision: str | None = None
    """Branch, tag or commit on the hub; default: the main branch. `ftlib stage` records the commit."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of frozen weights."""
    attention: Literal["auto", "eager", "sdpa", "flex"] = "auto"
    """Attention implementation. `auto`: SDPA, or eager if the model caps attention scores (Gemma 2 in PaliGemma 2);
    `flex` then needs less memory, on a GPU.
    """
    final_softcap: Literal["auto", "on", "off"] = "auto"
    """Whether the final logits are capped. `auto`: as in the checkpoint's config, except for PaliGemma 2, whose authors
    fine-tune it without.
    """
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout in training inside the language model of PaliGemma: on the output of every attention and MLP block,
    before it is added to the residual stream (big_vision, models/ppp/gemma.py).
    """
    quantization: Literal["none", "int8", "nf4"] = "none"
    """Keep the linear layers of the language model in 8 bits (Dettmers et al. 2022, arXiv:2208.07339) or 4 bits (`nf4`:
    NF4 with double quantization, QLoRA, Dettmers et al. 2023, arXiv:2305.14314). Everything else stays in `dtype`,
    which is also the compute dtype.
    """
    resize: Literal["processor", "bilinear"] = "processor"
    """How images are resized. `processor`: as the model's image processor says (bicubic in PaliGemma's folders on the
    hub); `bilinear`: with antialiasing, as PaliGemma's authors do.
    """
    max_length: Count | None = None
    """Maximum length of a training row in tokens, image tokens included; default: the model's maximum."""
    too_long: Literal["drop", "truncate", "stop"] = "drop"
    """Longer training rows: drop and count them, truncate their end, or stop the run. In evaluation, a prompt that is
    too long is truncated at its start and counted.
    """
    chat_template_arguments: dict[str, Any] = {}
    """Arguments of the model's chat template (`data.prompt: chat` or `family: vlm`) in training and evaluation, such as
    `{enable_thinking: false}`.
    """
    image_arguments: dict[str, Any] = {}
    """Arguments of the model's image processor (`family: vlm`), such as `{max_pixels: 401408}` for Qwen-VL: how many
    tokens an image has.
    """

    _plugins: tuple[Plugin, ...] = ()

    @model_validator(mode="after")
    def _check_keys_of_families(self) -> Model:
        npz = self.base.endswith(NPZ)
        if npz and self.tokenizer is None:
            raise ValueError(
                "base is an .npz file, which contains no tokenizer: set model.tokenizer (see docs/models.md for "
                "paligemma_tokenizer.model)"
            )
        if npz and (self.family != "paligemma" or self.revision):
            raise ValueError("base is an .npz file: set family: paligemma, and no revision")
        if self.tokenizer and not npz:
            raise ValueError("tokenizer is only for an .npz base; other bases contain one")
        if self.tokenizer and not (HUB_NAME.fullmatch(self.tokenizer) or self.tokenizer.endswith(MODEL_FILES[1:])):
            raise ValueError("tokenizer must be a .model file, a tokenizer.json or a hub name (OWNER/NAME)")
        if self.resize != "processor" and self.family != "paligemma":
            raise ValueError(f"resize: {self.resize} is only for family: paligemma")
        return self

    @model_validator(mode="after")
    def _check_dropout(self) -> Model:
        if self.dropout and self.family != "paligemma":
            raise ValueError("dropout requires family: paligemma; other models have dropout in their config.json")
        return self

    def paths(self) -> dict[str, PathKind]:
        return {"base": "model", "tokenizer": "model"}

    @property
    def plugins(self) -> tuple[Plugin, ...]:
        """The plugins of the config, which may provide the family."""
        return self._plugins

    @property
    def entry(self) -> registry.ModelEntry:
        """The registry entry of the family, which does not import it.

        Raises:
            UserError: there is no such family.
        """
        found: registry.ModelEntry = registry.find("model", self.family, self._plugins)
        return found


class Lora(Section):
    """Low-rank adapters on linear layers: LoRA (Hu et al. 2021, arXiv:2106.09685) or DoRA (Liu et al. 2024,
    arXiv:2402.09353).
    """

    method: Literal["lora", "dora"]
    """`dora` also trains the magnitude of each column."""
    r: Count = 16
    """Rank."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """The update is scaled by alpha / r."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the input of the adapters."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) instead (rank-stabilized LoRA, arXiv:2312.03732)."""
    targets: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] = ["attention", "mlp"]
    """Layers with adapters: `attention`, `mlp`, `language`, `vision`, `projector`, the name of a layer such as
    `query_key_value`, or a regular expression for whole module names.
    """
    freeze: list[ModelPart] = ["vision"]
    """Parts of the model without adapters, even if `targets` matches them."""
    modules_to_save: list[Literal["projector"]] = []
    """Parts that are trained fully beside the adapters and saved with them: `[projector]`."""
    loraplus_lr_ratio: Annotated[float, Field(ge=1)] = 1.0
    """LoRA+: the learning rate of the B matrices is that of the A matrices times this (Hayou et al. 2024,
    arXiv:2402.12354).
    """
    init_lora_weights: Annotated[str, Field(pattern=LORA_INIT)] = "default"
    """`default`: B is zero. `pissa`: A and B are the principal singular vectors of the weights (Meng et al. 2024,
    arXiv:2404.02948); `pissa_niter_16`: by a faster, randomized decomposition with 16 iterations.
    """

    @property
    def pissa(self) -> bool:
        """Whether A and B start as the principal part of the weights."""
        return self.init_lora_weights != "default"

    @model_validator(mode="after")
    def _check_variants(self) -> Lora:
        if self.pissa and self.method == "dora":
            raise ValueError("init_lora_weights: pissa requires method: lora")
        if odd := set(self.modules_to_save) & {*self.freeze, *self.targets}:
            part = min(odd)
            place = "freeze" if part in self.freeze else "targets"
            raise ValueError(f"modules_to_save: {part} is trained fully; remove it from adapter.{place}")
        return self


class Attention(Section):
    """Train the attention weights of the language model in float32; everything else is frozen in `model.dtype`.

    The recipe of PaliGemma's authors for a 16 GB GPU (big_vision, finetune_paligemma.ipynb), there with SGD.
    """

    method: Literal["attention"]


class Full(Section):
    """Train all weights except those of frozen parts."""

    method: Literal["full"]
    freeze: list[ModelPart] = []
    """Parts of the model that are not trained and stay in `model.dtype`."""
    master_weights: bool = True
    """Keep float32 master weights of a bfloat16 model (Micikevicius et al. 2018, arXiv:1710.03740): autocast computes
    in
    bfloat16, and the result is saved in bfloat16. With `false` the weights train in bfloat16, in half the memory;
    updates smaller than about 1/256 of a weight are lost to rounding.
    """


class PartOptimization(Section):
    """Learning rate and weight decay of a part of the model."""

    learning_rate_factor: Annotated[float, Field(gt=0)] = 1.0
    """The part's learning rate is the run's (or the round's) times this, throughout the schedule."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """Weight decay of the part's matrices; default: `training.weight_decay`."""


class Loss(Section):
    """The training loss."""

    average: Literal["token", "example"] = "token"
    """`token`: every answer token has the same weight, as in transformers. `example`: every row has the same weight, as
    in the code of PaliGemma's authors.
    """
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Label smoothing: share of the target probability that is spread over all tokens (Szegedy et al. 2016,
    arXiv:1512.00567).
    """
    on: Literal["response", "everything"] = "response"
    """`response`: loss on answers only. `everything` (causal models): on prompts, too."""
    packing: bool = False
    """Pack rows of a micro-batch into sequences, without attention between rows (causal models): same loss, less
    padding.
    """


class Evaluation(Section):
    """Which splits are evaluated, and how."""

    splits: Annotated[list[Split], Field(min_length=1)] = ["valid"]
    """Splits that `ftlib evaluate` scores."""
    before: bool = True
    """Also evaluate the base model, for comparison."""
    decode: Literal["generate", "choose"] = "generate"
    """`generate`: free text. `choose`: the most likely of the dataset's labels."""
    num_beams: Count = 1
    """Number of beams of beam search; 1: no beam search."""
    max_new_tokens: Count = 16
    """Maximum length of a generated answer in tokens."""
    generation: dict[str, Any] = {}
    """Fields of transformers' GenerationConfig (temperature, top_p, repetition_penalty, …; sampling needs `do_sample:
    true`) and `seed`.
    """
    batch_size: Count = 32
    """Rows per batch."""
    tokenize: Literal["auto", "13a", "char", "intl", "none", "zh", "ja-mecab", "ko-mecab"] = "auto"
    """Task instruct: sacrebleu's tokenizer for BLEU. `auto`: `13a`; for texts without spaces between words `char`, for
    Japanese ones `ja-mecab` where it is installed.
    """
    positive: str | None = None
    """The positive class for precision and recall. `choose` then predicts it if its probability is above a threshold,
    which is chosen on valid: the best F1, or the best recall (see `min_precision`).
    """
    min_precision: Annotated[float, Field(gt=0, le=1)] | None = None
    """Choose the threshold with the best recall among those with at least this precision on valid."""
    prompts: list[str] = []
    """Prompts that `ftlib prompts` compares with `data.prompt`."""
    mask_decoder: str | None = None
    """Path of `vae-oid.npz` of PaliGemma's authors, for task segment."""
    without_context: bool = False
    """Task instruct: evaluate rows with a context also without it."""
    loss: bool = False
    """Compute loss and perplexity on valid at every checkpoint of training, or every `checkpoint.best.every` steps
    if `checkpoint.best.metric` is `loss`.
    """

    def paths(self) -> dict[str, PathKind]:
        return {"mask_decoder": "path"}

    @model_validator(mode="before")
    @classmethod
    def _merge_generation_fields(cls, data: Any) -> Any:
        """Accept `max_new_tokens` and `num_beams` in either section."""
        if not isinstance(data, dict) or not isinstance(data.get("generation"), dict):
            return data
        moved = {
            name: data["generation"][name] for name in ("max_new_tokens", "num_beams") if name in data["generation"]
        }
        for name, value in moved.items():
            if data.get(name, value) != value:
                raise ValueError(f"generation.{name} is {value!r}, but {name} is {data[name]!r}; set one of them")
        rest = {name: value for name, value in data["generation"].items() if name not in moved}
        return {**data, **moved, "generation": rest}

    @model_validator(mode="after")
    def _check_consistency(self) -> Evaluation:
        if fault := hf_fields.find_generation_error(self.generation):
            raise ValueError(f"generation: {fault}")
        if self.decode == "choose" and self.generation:
            raise ValueError("generation requires decode: generate; choose scores every label")
        if self.decode == "choose" and self.num_beams > 1:
            raise ValueError("num_beams requires decode: generate; choose scores every label")
        if self.decode == "choose" and self.without_context:
            raise ValueError("without_context requires decode: generate; choose scores every label")
        if self.min_precision is not None and (self.positive is None or self.decode != "choose"):
            raise ValueError("min_precision needs `positive` and `decode: choose`")
        return self


class Job(Section):
    """Resources and options of Slurm jobs. Partition, account, QOS and the like may be set in jobs/site.env instead,
    under
    sbatch's own names (SBATCH_PARTITION, …).
    """

    cpus: Count = 4
    """CPU cores per task."""
    gpus: Annotated[int, Field(ge=0, lt=INT32_LIMIT)] = 1
    """GPUs per node; each gets one task. `TYPE:NUMBER` sets `gpu_type`, too."""
    gpu_type: Word | None = None
    """Type of GPU, by the cluster's name for it. Of MIG slices (`1g.10gb`) a job can use one."""
    gres: Gres = []
    """Other generic resources of a node, such as `lscratch:200` or `[lscratch:200, nvme:1]`."""
    mem: Memory | None = "16G"
    """Memory per node: `16G`, `16GB`, megabytes as a number, 0 for all of the node; `null`: what the site gives."""
    mem_per_cpu: Memory | None = None
    """Memory per CPU, instead of `mem`."""
    mem_per_gpu: Memory | None = None
    """Memory per GPU, instead of `mem`."""
    time: Duration = "08:00:00"
    """Time limit: minutes as a number, or in sbatch's format."""
    signal: Annotated[int, Field(ge=10, le=65535)] = 120
    """Seconds before the time limit at which a job is told to save. Increase it if saving takes longer."""
    dependency: Annotated[str, Field(pattern=DEPENDENCY)] | None = None
    """Jobs that must end first, as for sbatch: `afterok:123`. Slurm cancels the job if that cannot happen any more."""
    nodes: Count = 1
    """Nodes."""
    partition: Word | None = None
    """Partition."""
    account: Word | None = None
    """Account."""
    qos: Word | None = None
    """Quality of service."""
    constraint: Word | None = None
    """Features that nodes must have."""
    exclude: Word | None = None
    """Nodes to exclude."""
    mail_type: Word | None = None
    """Events for which sbatch sends mail."""
    mail_user: Word | None = None
    """Address for mail."""
    sbatch: dict[SbatchOption, str | int | Literal[True]] = {}
    """Any other option of sbatch that ftlib does not set itself, without dashes; `true` for options without a value."""
    array_parallelism: Count = 256
    """Maximum number of runs of a sweep that run at the same time."""

    @model_validator(mode="before")
    @classmethod
    def _as_slurm_writes_it(cls, data: Any) -> Any:
        """Split `gpus: TYPE:NUMBER`; of the ways to request memory, one that is set replaces the default of `mem`."""
        if not isinstance(data, dict):
            return data
        data = dict(data)
        if isinstance(data.get("gpus"), str) and (found := re.fullmatch(r"([^:\s]+):(\d+)", data["gpus"])):
            if data.get("gpu_type") not in (None, found[1]):
                raise ValueError(f"gpus: {data['gpus']} and gpu_type: {data['gpu_type']} contradict each other")
            data |= {"gpus": int(found[2]), "gpu_type": found[1]}
        if "mem" not in data and not (data.get("mem_per_cpu") is data.get("mem_per_gpu") is None):
            data["mem"] = None
        return data

    @model_validator(mode="after")
    def _check_consistency(self) -> Job:
        asked = [name for name in ("mem", "mem_per_cpu", "mem_per_gpu") if getattr(self, name) is not None]
        if len(asked) > 1:
            raise ValueError(f"{' and '.join(asked)} exclude each other; set the others to null")
        if self.mem_per_gpu and not self.gpus:
            raise ValueError("mem_per_gpu requires gpus")
        if self.gpus > 1 and self.gpu_type and _MIG.search(self.gpu_type):
            raise ValueError(
                f"gpus: a process sees one MIG slice, and NCCL connects none; {self.gpu_type} needs gpus: 1"
            )
        if any(each.partition(":")[0] in ("gpu", "mps", "shard") for each in self.gres):
            raise ValueError("gres: GPUs are requested with gpus and gpu_type")
        return self

    @property
    def world_size(self) -> int:
        """Number of training processes."""
        return self.nodes * max(1, self.gpus)


class Privacy(Section):
    """Which data may be in reports, trackers, model cards and uploads of `ftlib push`. Run folders and the store always
    contain both.
    """

    images: bool = True
    """Images."""
    text: bool = True
    """Prompts, answers and labels."""


def _families(fact: str) -> str:
    """Return the built-in families with a property."""
    return ", ".join(name for name, entry in registry.MODELS.items() if getattr(entry, fact))


class Config(Section):
    """An experiment."""

    name: Annotated[str, Field(pattern=NAME_PATTERN, max_length=MAX_NAME_LENGTH)]
    """Name of the run folders; several runs may share a name."""
    task: Annotated[str, WithJsonSchema(_named("task"))]
    """Defines which answers are valid and how they are scored; built in or from a plugin."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of initialization, dropout and the order of the rows."""
    warm_start: Annotated[str, Field(min_length=1)] | None = None
    """Start from the weights of a finished run (folder, name/identity, or name) or of a folder with an adapter or a
    model, with a fresh optimizer and schedule.
    """
    model: Model
    plugins: Annotated[list[Plugin], WithJsonSchema({"type": "array", "items": {"type": "string"}, "default": []})] = []
    """Python files that register tasks, data sources or model families, see docs/extending.md."""
    adapter: Annotated[Lora | Full | Attention, Field(discriminator="method")]
    """What to train: LoRA, DoRA, attention weights only, or all weights."""
    data: Data
    training: Annotated[dict[str, Any], WithJsonSchema(hf_fields.json_schema())] = {}
    """Fields of transformers' TrainingArguments, and `precision: auto`: bf16 on GPUs that have it, else fp16."""
    parts: dict[ModelPart, PartOptimization] = {}
    """Learning rate and weight decay by part of the model: `{vision: {learning_rate_factor: 0.1}, language:
    {weight_decay: 0}}`.
    """
    loss: Loss = Loss()
    guard: Guard = Guard()
    rounds: list[Round] = []
    """Several trainings in sequence, each with its own learning rate."""
    batch: Batch = Batch()
    parallel: Parallel = Parallel()
    checkpoint: Checkpoint = Checkpoint()
    evaluation: Evaluation = Evaluation()
    job: Job = Job()
    privacy: Privacy = Privacy()
    sweep: Annotated[dict[str, Any] | None, WithJsonSchema(SWEEP_SCHEMA)] = None
    """Defines several runs: every combination of `KEY: [VALUES]`, the points of `list`, or `random:
    {count, seed, draw}`.
    """

    def paths(self) -> dict[str, PathKind]:
        return {"warm_start": "run"}

    @model_validator(mode="before")
    @classmethod
    def _default_instruct_prompt(cls, data: Any) -> Any:
        """Set the default prompt of task instruct: Alpaca."""
        if not isinstance(data, dict) or data.get("task") != "instruct" or not isinstance(data.get("data"), dict):
            return data
        return {**data, "data": {"prompt": "alpaca", **data["data"]}}

    @model_validator(mode="after")
    def _check_plugins(self) -> Config:
        """Pass the plugins to model and data, which are also used without the config."""
        self.model._plugins = self.data._plugins = tuple(self.plugins)
        self.data.check_sources(self.plugins)
        return self

    @model_validator(mode="after")
    def _check_consistency(self) -> Config:
        family = registry.lookup("model", self.model.family, self.plugins)
        if family and not family.packing and (self.loss.on == "everything" or self.loss.packing):
            raise ValueError(f"loss.on: everything and loss.packing require model.family: {_families('packing')}")
        if family and not family.chat and self.data.prompt == CHAT:
            raise ValueError(f"data.prompt: chat requires model.family: {_families('chat')}")
        if family and family.auto_processor and self.training.get("torch_compile"):
            problem = f"training.torch_compile does not work with model.family: {self.model.family}"
            raise ValueError(f"{problem}: the shapes of image inputs differ from batch to batch; remove it")
        if family and not family.auto_processor:
            families = _families("auto_processor")
            if self.model.chat_template_arguments and self.data.prompt != CHAT:
                raise ValueError(
                    f"model.chat_template_arguments requires data.prompt: chat or model.family: {families}"
                )
            if self.model.image_arguments:
                raise ValueError(f"model.image_arguments requires model.family: {families}")
        if self.data.box_format != "location_tokens" and self.task not in ("detect", "refer"):
            raise ValueError(f"data.box_format: {self.data.box_format} requires task: detect or refer")
        if self.evaluation.without_context and self.task != "instruct":
            raise ValueError("evaluation.without_context requires task: instruct; rows of other tasks have no context")
        if self.loss.packing and self.loss.average == "example":
            raise ValueError("loss.packing: packed rows cannot be averaged per row; set average: token")
        if self.model.dtype == "float16" and self.adapter.method == "full":
            raise ValueError("model.dtype: float16 weights cannot be trained; use float32 or bfloat16")
        if self.model.quantization != "none" and not isinstance(self.adapter, Lora):
            raise ValueError(
                "model.quantization: quantized weights cannot be trained; set adapter.method: lora or dora"
            )
        modes = [mode for mode in ("bf16", "fp16") if self.training.get(mode)]
        auto = "precision" in self.training
        if auto and modes:
            raise ValueError(f"training.precision: auto chooses between bf16 and fp16; remove training.{modes[0]}")
        if auto and self.model.dtype == "float16":
            problem = "training.precision: auto is bf16 on newer GPUs, but model.dtype: float16 weights need fp16"
            raise ValueError(f"{problem}; set training.fp16: true instead, or model.dtype: float32")
        if self.model.dtype == "float16" and "fp16" not in modes:
            problem = "model.dtype: float16 needs loss scaling, or small gradients are lost"
            raise ValueError(f"{problem}; set training.fp16: true (it has no effect on evaluation)")
        if isinstance(self.adapter, Attention) and self.model.dtype == "bfloat16" and not auto and "bf16" not in modes:
            problem = "adapter.method: attention mixes float32 and bfloat16 weights"
            raise ValueError(f"{problem}; set training.bf16: true (autocast)")
        if self.parallel.shard == "full" and (obstacle := self.sharding_obstacle):
            raise ValueError(f"parallel.shard: full: {obstacle}")
        self._check_parts()
        if self.rounds and "learning_rate" in self.training:
            raise ValueError("each round has a learning rate; remove training.learning_rate")
        if self.rounds and self.rounds[0].until:
            raise ValueError("rounds.0.until: the first round is always trained; set `until` in a later round")
        return self

    def _check_parts(self) -> None:
        """Check `parts` and the parts in `adapter.modules_to_save`."""
        family = registry.lookup("model", self.model.family, self.plugins)
        adapter = self.adapter
        saved = set(adapter.modules_to_save) if isinstance(adapter, Lora) else set()
        if family and (odd := {*self.parts, *saved} - set(family.parts)):
            key = "adapter.modules_to_save" if saved & odd else "parts"
            raise ValueError(f"{key}: models of family {self.model.family} have no part {min(odd)}")
        frozen = {"vision", "projector", "embeddings"} if isinstance(adapter, Attention) else set(adapter.freeze)
        if isinstance(adapter, Lora):
            frozen.add("embeddings")
        if odd := set(self.parts) & frozen:
            raise ValueError(f"parts.{min(odd)} has no effect: this part is not trained (see adapter)")
        auto = "precision" in self.training or self.training.get("bf16")
        if saved and self.model.dtype == "bfloat16" and not auto:
            problem = "adapter.modules_to_save mixes float32 and bfloat16 weights"
            raise ValueError(f"{problem}; set training.bf16: true (autocast)")
        if isinstance(adapter, Lora) and adapter.pissa and self.model.quantization != "none":
            raise ValueError("adapter.init_lora_weights: pissa changes the base's weights; set quantization: none")
        if isinstance(adapter, Lora) and adapter.pissa and self.warm_start:
            raise ValueError("adapter.init_lora_weights: pissa and warm_start both set the initial adapter; remove one")

    @property
    def sharding_obstacle(self) -> str | None:
        """Why the model of this config cannot be sharded over several GPUs, and what to set; None if it can."""
        optimizer = str(self.training.get("optim", "adamw_torch_fused"))
        if self.batch.auto:
            return "batch.auto: a GPU that runs out of memory would leave the others waiting for its part; remove it"
        if self.model.quantization != "none":
            problem = "packed weights of bitsandbytes can be corrupted when they are gathered"
            return f"model.quantization: {self.model.quantization}: {problem}; set quantization: none"
        for name in ("torch_compile", "use_liger_kernel"):
            if self.training.get(name):
                return f"training.{name} does not work on sharded weights; remove it"
        if isinstance(self.adapter, Lora):
            return None
        if optimizer not in SHARDED_OPTIMIZERS:
            choice = ", ".join(SHARDED_OPTIMIZERS)
            problem = "cannot update sharded weights (adapter.method: lora and dora can use it: adapters stay whole)"
            return f"training.optim: {optimizer} {problem}; choose one of {choice}"
        if self.training.get("fp16"):
            return "training.fp16: the scaler does not see all parts of a gradient; set training.bf16: true"
        return None

    @property
    def whole_load_reason(self) -> str | None:
        """Why each GPU loads all of a model that will be sharded; None if it reads only its part."""
        if isinstance(self.adapter, Lora) and self.adapter.pissa:
            return f"adapter.init_lora_weights: {self.adapter.init_lora_weights} changes the base's weights"
        if self.loss.packing:
            return "loss.packing: the model is tried on two rows before it is sharded"
        return None

    @property
    def generates_in_training(self) -> bool:
        """Whether training depends on generated answers."""
        best = self.checkpoint.best
        metrics = [*([best.metric] if best else []), *[one.until.metric for one in self.rounds if one.until]]
        return any(metric.lower() != LOSS for metric in metrics)

    @property
    def evaluates_in_training(self) -> bool:
        """Whether the model is evaluated during training, by its loss or by generated answers."""
        return self.evaluation.loss or self.checkpoint.best is not None or any(one.until for one in self.rounds)

    @property
    def autocast(self) -> Literal["bf16", "fp16"] | None:
        """The dtype of torch.autocast by TrainingArguments' names; master weights of a bfloat16 model need it.

        With `training.precision: auto`, before a GPU is known: bf16, which takes as much memory as fp16.
        """
        if self.training.get("fp16"):
            return "fp16"
        masters = isinstance(self.adapter, Full) and self.adapter.master_weights and self.model.dtype == "bfloat16"
        return "bf16" if self.training.get("bf16") or "precision" in self.training or masters else None

    @property
    def effective_batch_size(self) -> int:
        """Rows per optimizer step on all GPUs together."""
        return self.micro_batch_size * int(self.training.get("gradient_accumulation_steps", 1)) * self.job.world_size

    @property
    def rows_per_gpu(self) -> int:
        """Rows per optimizer step on one GPU."""
        return self.effective_batch_size // self.job.world_size

    @property
    def micro_batch_size(self) -> int:
        """Rows per forward pass."""
        return int(self.training.get("per_device_train_batch_size", 8))
