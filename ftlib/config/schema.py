"""One YAML file describes one experiment. This module is the schema: sections, types, defaults and bounds.

Reading a file (lines, overrides, variables, all faults at once) is `loader.py`'s work.
"""

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

# What the sections of a config have in common.

INT32_LIMIT = 2**31
"""Numbers are below it; none of them counts, or numbers, so many of anything."""
Count = Annotated[int, Field(ge=1, lt=INT32_LIMIT)]
Split = Literal["train", "valid", "test"]
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
MAX_NAME_LENGTH = 200
"""Characters; file systems end at 255 bytes, and names of files begin with it."""
Name = Annotated[str, Field(min_length=1)]
NPZ = ".npz"
"""How the name of a checkpoint of big_vision ends."""
MODEL_FILES = (NPZ, ".model", ".json")
"""How files end that a key may name in place of a hub name."""
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(?<!\.model)(?<!\.json)(?<!\.npz)")
SHA256 = r"^[0-9a-f]{64}$"
PathKind = Literal["path", "model", "dataset", "run"]
"""A path, or where none is meant a name of the hub (model; dataset, before a colon) or of a run."""
LOSS = "loss"
"""The metric that every task has: the loss, computed as in training."""


class Section(BaseModel):
    """A part of the config: no unknown keys, no silent conversions."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    def paths(self) -> dict[str, PathKind]:
        """The keys that hold a path, or a name that stands for one."""
        return {}


def _named(kind: registry.Kind, *also: str) -> dict[str, Any]:
    """The JSON Schema of a name that is registered; the loader checks names, since plugins add some."""
    return {"anyOf": [{"enum": [*registry.names(kind), *also]}, {"type": "string"}]}


class Plugin(Section):
    """A plugin as it is stored with a run. In a config file it is a path."""

    file: str = ""
    """The .py file."""
    package: str = ""
    """Of an installed package: its name and version, as in `name==1.0`."""
    module: str = ""
    """The package's module with the plugin."""
    sha256: Annotated[str, Field(pattern=SHA256)]
    """Of the file's content."""
    registers: dict[str, dict[str, dict[str, Any]]]
    """What it registers: kind, name, facts."""

    @model_validator(mode="after")
    def _check_registers(self) -> Plugin:
        """A run's config may be another user's."""
        for kind, entries in self.registers.items():
            for name, facts in entries.items():
                if fault := core_plugins.facts_error(kind, name, facts):
                    raise ValueError(f"{kind} {name}: {fault}")
        return self

    def paths(self) -> dict[str, PathKind]:
        return {"file": "path"} if self.file else {}

    @property
    def identity(self) -> str:
        """What runs depend on: the content, not its place."""
        return " ".join(filter(None, (self.package, self.sha256)))


# The sections about the course of a training: what is saved and kept, when it has gone wrong, and its rounds.


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
    """Use the largest micro-batch that fits the GPU, gradient checkpointing only where nothing fits without it, and
    halve the micro-batch when memory runs out nevertheless.
    """


class Guard(Section):
    """Divergence handling: training stops and restarts with another seed.

    A loss or gradient that is not finite always counts as divergence.
    """

    max_loss: Annotated[float, Field(gt=0)] = 100.0
    """A loss above it is divergence."""
    above: Annotated[float, Field(gt=0)] | None = None
    """So is a loss that stays above this for `patience` steps in a row after the warm-up."""
    spike: Annotated[float, Field(gt=1)] | None = None
    """So is a loss above this multiple of its running median for `patience` steps in a row."""
    patience: Count = 3
    """Steps in a row, see `above` and `spike`."""
    restarts: Annotated[int, Field(ge=0, lt=INT32_LIMIT)] = 3
    """After this many restarts the run fails."""
    learning_rate_factor: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Every restart multiplies the learning rate by this."""


class Until(Section):
    """Condition on a metric of generated answers, or on `loss`."""

    split: Split = "train"
    """Split that is evaluated."""
    metric: Name
    """Metric."""
    at_least: float | None = None
    """Reached from this value on (in the metric's unit)."""
    at_most: float | None = None
    """For metrics of which lower is better: reached from this value down."""

    @model_validator(mode="after")
    def _check_one_bound(self) -> Until:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("give at_least, or at_most for a metric of which lower is better")
        return self

    def is_reached(self, value: float | None) -> bool:
        """Whether a value of the metric is enough; an undefined one is not."""
        if value is None:
            return False
        return value >= self.at_least if self.at_least is not None else value <= (self.at_most or 0.0)


class Round(Section):
    """A training of its own, with a fresh schedule, from the weights of the round before it."""

    learning_rate: Annotated[float, Field(gt=0)]
    """Learning rate of the round."""
    until: Until | None = None
    """The round is trained only while this is not reached; otherwise training is over."""


# The schema's `data` section: where rows come from, how they are asked and how they are divided.

Column = Literal["id", "image", "prefix", "suffix", "references", "part"]
SplitMeaning = Literal["train", "valid", "test", "left_out"]
Categories = Literal["present", "all"]
"""Which categories an image of `coco_detection` is asked for: those that are in it, or all."""

CHAT = "chat"
"""The prompt that is the model's own chat template."""

MIXTURE = "mixture"
TABLES = tuple(name for name, entry in registry.SOURCES.items() if entry.split_files == "several")
"""Sources that read files of rows, of which each may be a split."""

COCO = tuple(name for name, entry in registry.SOURCES.items() if entry.split_files == "one")


def _is_encoding(name: str) -> bool:
    try:
        "".encode(name or "utf-8")
    except LookupError:
        return False
    return True


def _as_name_list(value: object) -> object:
    """One name, or several; a number is a name, too, and so are true and false."""
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
    """Why a key is not for a source; "" if all are."""
    if section.splits and not entry.split_names:
        return f"splits: source {section.source} knows the splits of its release"
    if section.encoding and not entry.encodings:
        return f"encoding: of sources {', '.join(TABLES)}; those of source {section.source} are UTF-8"
    if section.files and not entry.split_files:
        return f"files: of source {', '.join((*TABLES, *COCO))}; source {section.source} has its own files"
    if entry.split_files == "one" and sum(map(len, section.files.values())) > len(section.files):
        return f"files: one for each split of source {section.source}"
    return ""


class SplitRule(Section):
    """How rows are divided into train, valid and test. Rows that share an image or document, and copies of an image,
    always stay together.
    """

    valid: Annotated[float, Field(gt=0, lt=INT32_LIMIT), AfterValidator(_check_share_or_count)] = 0.1
    """Share (below 1) or number of images."""
    test: Annotated[float, Field(ge=0, lt=INT32_LIMIT), AfterValidator(_check_share_or_count)] = 0.1
    """Share (below 1) or number of images; 0: no test split."""
    seed: int = 0
    """Seed of the division."""
    stratify_by: Literal["suffix"] | None = None
    """Same share of every answer in each split."""
    official: bool = True
    """Keep the splits that the dataset has itself; `false` divides all rows."""
    sets: Count = 1
    """Number of random divisions, for repeated experiments."""
    set: Count = 1
    """Which of the `sets` divisions this is."""
    folds: Annotated[int, Field(ge=2, lt=INT32_LIMIT)] | None = None
    """Cross-validation: valid is one of this many parts of all that is not test."""
    fold: Count = 1
    """Which of the `folds` parts is valid."""
    max_train: Count | None = None
    """At most this many training rows."""
    max_eval: Count | None = None
    """At most this many rows of valid and of test."""
    near_duplicates: Literal["count", "group"] = "count"
    """Images that look alike (resized, compressed again): counted and reported, or kept in the same split."""

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
    """Name of the part; row IDs begin with it."""
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
    """Prompt of these rows; default: the mixture's."""
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """How often each row is drawn in an epoch: 3: three times; 0.5: half of the rows, the other half in the next epoch.
    """

    def paths(self) -> dict[str, PathKind]:
        return {"file": "dataset"} if self.source == "hub" else {}


class Data(Section):
    """Where the rows come from, and how prompts are made of them."""

    source: Annotated[str, WithJsonSchema(_named("source", MIXTURE))]
    """Kind of dataset, see docs/data.md; `mixture`: several, listed in `parts`; or one of a plugin."""
    root: Annotated[str, Field(min_length=1)]
    """Folder with images and annotations."""
    parts: list[Part] = []
    """Datasets of a mixture; `split` divides each by itself."""
    file: str = ""
    """Annotation file below `root`; for source hub: `owner/name[:subset]` or a local folder."""
    files: dict[Split, NameList] = {}
    """A file, or several, for each split: `{train: train.jsonl, valid: valid.jsonl, test: [a.jsonl, b.jsonl]}`."""
    splits: dict[SplitMeaning, NameList] = {}
    """What the dataset's own names of splits mean, where they are not known: `{valid: [eval_a], test: [blind],
    left_out: [raw]}`.
    """
    columns: dict[Column, str] = {}
    """Field of a row → the dataset's name for it, such as `{suffix: label}`."""
    encoding: str = ""
    """Encoding of annotation files that are not UTF-8, such as `shift_jis`, `utf-16` or `cp1252`."""
    balanced: bool = True
    """Source gqa: train on the balanced questions; `false`: on all."""
    categories: Categories = "present"
    """Source coco_detection: ask each image for the categories that are in it (`present`), or for `all`, images without
    boxes included.
    """
    prompt: str = "{prefix}"
    """Template with fields of the row in braces, `alpaca`, or `chat` (the model's chat template). Default for task
    instruct: `alpaca`.
    """
    on_bad: Literal["stop", "skip"] = "stop"
    """Records that cannot be used: stop with a list of them, or skip and count them."""
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
        """Those of the config; its sources may be theirs."""
        return self._plugins

    @property
    def source_plugins(self) -> list[Plugin]:
        """The plugins that the dataset's sources are from."""
        found = (registry.provider("source", part.source, self._plugins) for part in self.datasets.values())
        return [plugin for plugin in self._plugins if plugin in found]

    @model_validator(mode="after")
    def _check_parts(self) -> Data:
        if (self.source == MIXTURE) != bool(self.parts):
            raise ValueError("source: mixture and a list of parts belong together")
        names = [part.name for part in self.parts]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"parts: the name {repeated[0]} stands there twice")
        own_places = self.file or self.files or self.columns or self.splits or self.encoding
        if self.parts and (own_places or not self.balanced or self.categories != "present"):
            keys = "file, files, columns, splits, encoding, balanced and categories"
            raise ValueError(f"{keys} of a mixture are set in its parts")
        own = [part.prompt for part in self.parts if part.prompt is not None]
        if CHAT in own or (own and self.prompt == CHAT):
            raise ValueError("prompt: chat holds for a whole mixture: set it beside `parts`, and no other in them")
        return self

    @model_validator(mode="after")
    def _check_source(self) -> Data:
        self.check_sources(())
        return self

    def check_sources(self, plugins: Sequence[Plugin]) -> None:
        """Refuse keys that are not for a source; those of plugins that are not given are not checked.

        Raises:
            ValueError: the first fault.
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
                raise ValueError(f"splits: the name {repeated[0]} stands there twice")
        return self

    @model_validator(mode="after")
    def _check_encodings(self) -> Data:
        sections: list[Part | Data] = [*self.parts, self]
        for section in sections:
            if not _is_encoding(section.encoding):
                raise ValueError(
                    f"encoding: {section.encoding} is unknown; write one such as shift_jis, utf-16 or cp1252"
                )
        return self

    @model_validator(mode="after")
    def _check_split_files(self) -> Data:
        sections: list[Part | Data] = [*self.parts, self]
        for section in sections:
            if not section.files:
                continue
            if section.file:
                raise ValueError("file and files: only one of them, since files names all")
            names = [posixpath.normpath(name) for names in section.files.values() for name in names]
            if not all(section.files.values()) or not all(names):
                raise ValueError("files: a split without a file; leave it out")
            if repeated := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"files: {repeated[0]} stands there twice")
        return self

    @property
    def split_files(self) -> list[tuple[Split, str]]:
        """Split and name of each of `files`, in the order of the splits."""
        return [(split, name) for split in get_args(Split) for name in self.files.get(split, [])]

    @property
    def datasets(self) -> dict[str, Data]:
        """The parts of a mixture by name, each as a dataset of its own; "" → this dataset, if it is none."""
        if not self.parts:
            return {"": self}
        return {part.name: self._dataset(part) for part in self.parts}

    @property
    def locations(self) -> dict[str, str]:
        """Dotted key → where its files and those of its parts lie: every `root` and `file`, and all `files`."""
        sections: dict[str, Part | Data] = {"": self}
        sections |= {f"parts.{number}.": part for number, part in enumerate(self.parts)}
        return {f"{at}{key}": text for at, section in sections.items() for key, text in _locations(section).items()}

    def with_locations(self, locations: Mapping[str, str]) -> Data:
        """The same dataset at other places, as `locations` names them; keys that are left out stay."""
        parts = [
            part.model_copy(update=_with_locations(part, locations, f"parts.{n}.")) for n, part in enumerate(self.parts)
        ]
        return self.model_copy(update={**_with_locations(self, locations, ""), "parts": parts})

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


def _locations(section: Part | Data) -> dict[str, str]:
    several = {f"files.{split}.{n}": name for split, names in section.files.items() for n, name in enumerate(names)}
    return {"root": section.root, "file": section.file, **several}


def _with_locations(section: Part | Data, locations: Mapping[str, str], at: str) -> dict[str, Any]:
    """The fields of a section that hold places, with those that are given."""
    new = {key: locations.get(f"{at}{key}", text) for key, text in _locations(section).items()}
    names = section.files.items()
    files = {split: [new[f"files.{split}.{n}"] for n in range(len(several))] for split, several in names}
    return {"root": new["root"], "file": new["file"], "files": files}


# What the config's `job` and `sweep` may hold: sbatch's options, and the sweep's shape for editors.

WORD = r"^\S+$"
MEMORY = r"^[0-9]+[KMGT]?$"
DURATION = r"^([0-9]+-)?[0-9]{1,3}(:[0-5][0-9]){0,2}$"
Word = Annotated[str, Field(pattern=WORD)]
Memory = Annotated[str, Field(pattern=MEMORY)]
Duration = Annotated[str, Field(pattern=DURATION)]
SbatchOption = Literal[
    "begin", "bb", "comment", "contiguous", "core-spec", "cpu-freq", "deadline", "distribution",
    "exclusive", "extra-node-info", "gpu-bind", "gpu-freq", "gres-flags", "hint", "licenses", "mem-bind", "mincpus",
    "network", "nice", "nodelist", "oversubscribe", "prefer", "priority", "profile", "reservation", "switches",
    "thread-spec", "threads-per-core", "tmp", "use-min-nodes", "wckey",
]  # fmt: skip
"""Options of sbatch (its manual, 22.05 to 24.11) that change neither what a job runs nor how ftlib follows it."""

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
    """`paligemma` (PaliGemma 1 and 2: image and prompt → text), `causal` (causal language models such as OpenCALM,
    GPT-NeoX, Llama) or one of a plugin.
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
    """Type in which frozen weights are kept."""
    attention: Literal["auto", "eager", "sdpa", "flex"] = "auto"
    """Attention implementation. `auto`: SDPA, or eager where the model caps attention scores (Gemma 2 in PaliGemma 2);
    `flex` needs less memory there, on a GPU.
    """
    final_softcap: Literal["auto", "on", "off"] = "auto"
    """Whether the final logits are capped. `auto`: as the checkpoint says, except for PaliGemma 2, whose authors
    fine-tune it without.
    """
    quantization: Literal["none", "int8", "nf4"] = "none"
    """Keep the linear layers of the language model in 8 bits (Dettmers et al. 2022, arXiv:2208.07339) or 4 bits (`nf4`:
    NF4 with double quantization, QLoRA, Dettmers et al. 2023, arXiv:2305.14314). All else stays in `dtype`, which is
    also the type of the computation.
    """
    max_length: Count | None = None
    """Longest training row in tokens, image tokens included; default: the positions of the model."""
    too_long: Literal["drop", "truncate", "stop"] = "drop"
    """What happens to longer training rows: left out and counted, truncated at their end, or the run stops. In
    evaluation the beginning of a prompt that is too long is cut off and counted.
    """
    chat_template_arguments: dict[str, Any] = {}
    """Arguments of the model's chat template (`data.prompt: chat`) in training and evaluation, such as
    `{enable_thinking: false}`.
    """

    _plugins: tuple[Plugin, ...] = ()

    @model_validator(mode="after")
    def _check_tokenizer(self) -> Model:
        npz = self.base.endswith(NPZ)
        if npz and self.tokenizer is None:
            raise ValueError(
                "base is an .npz file, which holds no tokenizer: set model.tokenizer (docs/models.md says where to "
                "download paligemma_tokenizer.model)"
            )
        if npz and (self.family != "paligemma" or self.revision):
            raise ValueError("base is an .npz file: that needs family paligemma, and no revision")
        if self.tokenizer and not npz:
            raise ValueError("tokenizer is for an .npz base only; any other base has its own")
        if self.tokenizer and not (HUB_NAME.fullmatch(self.tokenizer) or self.tokenizer.endswith(MODEL_FILES[1:])):
            raise ValueError("tokenizer must be a .model file, a tokenizer.json or a hub name (OWNER/NAME)")
        return self

    def paths(self) -> dict[str, PathKind]:
        return {"base": "model", "tokenizer": "model"}

    @property
    def plugins(self) -> tuple[Plugin, ...]:
        """Those of the config; the family may be theirs."""
        return self._plugins

    @property
    def entry(self) -> registry.ModelEntry:
        """What is known of the family without importing it.

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
    """`dora` also learns the magnitude of each column."""
    r: Count = 16
    """Rank."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """Scale of the update: alpha / r."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the input of the adapters."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) instead (rank-stabilized LoRA, arXiv:2312.03732)."""
    targets: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] = ["attention", "mlp"]
    """Layers with adapters: `attention`, `mlp`, `language`, `vision`, `projector`, the name of a layer such as
    `query_key_value`, or a regular expression for whole module names.
    """
    freeze: list[ModelPart] = ["vision"]
    """Parts of the model without adapters, whatever `targets` says."""


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
    """Weights of a bfloat16 model train in float32 (master weights, Micikevicius et al. 2018, arXiv:1710.03740):
    autocast computes in bfloat16, and the result is saved in bfloat16. With `false` they train in bfloat16, in half
    the memory; updates smaller than about 1/256 of a weight are rounded away.
    """


class Loss(Section):
    """The training loss."""

    average: Literal["token", "example"] = "token"
    """`token`: every answer token has the same weight, as in transformers. `example`: every row has, as in the authors'
    code.
    """
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target's probability that is given to all tokens alike (Szegedy et al. 2016, arXiv:1512.00567)."""
    on: Literal["response", "everything"] = "response"
    """`response`: only answers carry loss. `everything` (causal models): prompts do, too."""
    packing: bool = False
    """Rows of a micro-batch share sequences without seeing each other (causal models): the same loss with less padding.
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
    """Beams of beam search; 1: none."""
    max_new_tokens: Count = 16
    """Longest generated answer in tokens."""
    generation: dict[str, Any] = {}
    """Fields of transformers' GenerationConfig (temperature, top_p, repetition_penalty, …; sampling needs `do_sample:
    true`) and `seed`.
    """
    batch_size: Count = 32
    """Rows that are evaluated together."""
    positive: str | None = None
    """Label that precision and recall refer to. `choose` then predicts it above a threshold of its probability, which
    is set on valid: the one with the best F1, or the best recall (see `min_precision`).
    """
    min_precision: Annotated[float, Field(gt=0, le=1)] | None = None
    """The threshold has the best recall among those of at least this precision on valid."""
    prompts: list[str] = []
    """Prompts that `ftlib prompts` compares with `data.prompt`."""
    mask_decoder: str | None = None
    """Path of `vae-oid.npz` of PaliGemma's authors, for task segment."""
    without_context: bool = False
    """Task instruct: also evaluate every row that has a context without it."""
    loss: bool = False
    """Compute loss and perplexity on valid at every checkpoint of training, or every `checkpoint.best.every` steps
    where the best checkpoint is chosen by it.
    """

    def paths(self) -> dict[str, PathKind]:
        return {"mask_decoder": "path"}

    @model_validator(mode="before")
    @classmethod
    def _merge_generation_fields(cls, data: Any) -> Any:
        """`max_new_tokens` and `num_beams` may stand in either place."""
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
            raise ValueError("generation belongs to decode: generate; choose looks at every label")
        if self.decode == "choose" and self.num_beams > 1:
            raise ValueError("num_beams belongs to decode: generate; choose looks at every label")
        if self.decode == "choose" and self.without_context:
            raise ValueError("without_context belongs to decode: generate; choose looks at every label")
        if self.min_precision is not None and (self.positive is None or self.decode != "choose"):
            raise ValueError("min_precision needs `positive` and `decode: choose`")
        return self


class Job(Section):
    """What is requested from Slurm. Partition, account, QOS and the like may be set in jobs/site.env instead, under
    sbatch's own names (SBATCH_PARTITION, …).
    """

    cpus: Count = 4
    """CPU cores per task."""
    gpus: Annotated[int, Field(ge=0, lt=INT32_LIMIT)] = 1
    """GPUs per node; one task for each."""
    gpu_type: Word | None = None
    """Type of GPU as the site names it."""
    mem: Memory = "16G"
    """Memory per node."""
    time: Duration = "08:00:00"
    """Time limit, as sbatch reads it."""
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
    """Nodes that are not used."""
    mail_type: Word | None = None
    """Events of which sbatch sends mail."""
    mail_user: Word | None = None
    """Address of that mail."""
    sbatch: dict[SbatchOption, str | int | Literal[True]] = {}
    """Any other option of sbatch that ftlib does not set itself, without dashes; `true` for options without a value."""
    array_parallelism: Count = 256
    """How many runs of a sweep run at the same time."""

    @property
    def world_size(self) -> int:
        """Processes that train together."""
        return self.nodes * max(1, self.gpus)


class Privacy(Section):
    """What of the data may be in reports, trackers, model cards and in what `ftlib push` sends. Run folders and the
    store keep both.
    """

    images: bool = True
    """Images."""
    text: bool = True
    """Prompts, answers and labels."""


def _families(fact: str) -> str:
    """The built-in families of which a fact holds."""
    return ", ".join(name for name, entry in registry.MODELS.items() if getattr(entry, fact))


class Config(Section):
    """An experiment."""

    name: Annotated[str, Field(pattern=NAME_PATTERN, max_length=MAX_NAME_LENGTH)]
    """Name of the run folders; a name may stand for many runs."""
    task: Annotated[str, WithJsonSchema(_named("task"))]
    """Decides which answers are valid and how they are scored; or one of a plugin."""
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
    """What is trained: LoRA, DoRA, attention weights only, or all weights."""
    data: Data
    training: Annotated[dict[str, Any], WithJsonSchema(hf_fields.json_schema())] = {}
    """Fields of transformers' TrainingArguments, and `precision: auto`: bf16 on GPUs that have it, else fp16."""
    loss: Loss = Loss()
    guard: Guard = Guard()
    rounds: list[Round] = []
    """Trainings one after the other, each with its own learning rate."""
    batch: Batch = Batch()
    checkpoint: Checkpoint = Checkpoint()
    evaluation: Evaluation = Evaluation()
    job: Job = Job()
    privacy: Privacy = Privacy()
    sweep: Annotated[dict[str, Any] | None, WithJsonSchema(SWEEP_SCHEMA)] = None
    """Makes the file stand for several runs: every combination of `KEY: [VALUES]`, the points of `list`, or `random:
    {count, seed, draw}`.
    """

    def paths(self) -> dict[str, PathKind]:
        return {"warm_start": "run"}

    @model_validator(mode="before")
    @classmethod
    def _default_instruct_prompt(cls, data: Any) -> Any:
        """Task instruct asks in Alpaca's form unless told otherwise."""
        if not isinstance(data, dict) or data.get("task") != "instruct" or not isinstance(data.get("data"), dict):
            return data
        return {**data, "data": {"prompt": "alpaca", **data["data"]}}

    @model_validator(mode="after")
    def _check_plugins(self) -> Config:
        """Model and data are told the plugins, since they are used without the config, too."""
        self.model._plugins = self.data._plugins = tuple(self.plugins)
        self.data.check_sources(self.plugins)
        return self

    @model_validator(mode="after")
    def _check_consistency(self) -> Config:
        family = registry.lookup("model", self.model.family, self.plugins)
        if family and not family.packing and (self.loss.on == "everything" or self.loss.packing):
            raise ValueError(f"loss.on: everything and loss.packing are for model.family: {_families('packing')}")
        if family and not family.chat and self.data.prompt == CHAT:
            raise ValueError(f"data.prompt: chat is for model.family: {_families('chat')}")
        if self.model.chat_template_arguments and self.data.prompt != CHAT:
            raise ValueError("model.chat_template_arguments is for data.prompt: chat")
        if self.evaluation.without_context and self.task != "instruct":
            raise ValueError("evaluation.without_context is for task: instruct; rows of other tasks have no context")
        if self.loss.packing and self.loss.average == "example":
            raise ValueError(
                "loss.packing: rows that share a sequence cannot be averaged one by one; set average: token"
            )
        if self.model.dtype == "float16" and self.adapter.method == "full":
            raise ValueError("model.dtype: float16 weights cannot be trained themselves; take float32 or bfloat16")
        if self.model.quantization != "none" and not isinstance(self.adapter, Lora):
            raise ValueError(
                "model.quantization: quantized weights cannot be trained; set adapter.method: lora or dora"
            )
        modes = [mode for mode in ("bf16", "fp16") if self.training.get(mode)]
        auto = "precision" in self.training
        if auto and modes:
            raise ValueError(f"training.precision: auto chooses between bf16 and fp16; remove training.{modes[0]}")
        if auto and self.model.dtype == "float16":
            problem = "training.precision: auto is bf16 on newer GPUs, and model.dtype: float16 weights need fp16"
            raise ValueError(f"{problem}; set training.fp16: true instead, or model.dtype: float32")
        if self.model.dtype == "float16" and "fp16" not in modes:
            problem = "model.dtype: float16 loses small gradients unless they are scaled"
            raise ValueError(f"{problem}; set training.fp16: true (where nothing is trained it changes nothing)")
        if isinstance(self.adapter, Attention) and self.model.dtype == "bfloat16" and not auto and "bf16" not in modes:
            problem = "adapter.method: attention trains float32 weights between bfloat16 ones"
            raise ValueError(f"{problem}; set training.bf16: true, which computes them together")
        if self.batch.auto and self.job.world_size > 1:
            raise ValueError("batch.auto is for one GPU; with several, set training.per_device_train_batch_size")
        if self.rounds and "learning_rate" in self.training:
            raise ValueError("rounds have learning rates of their own; remove training.learning_rate")
        if self.rounds and self.rounds[0].until:
            raise ValueError("rounds.0.until: the first round is always trained; give `until` to the one after it")
        return self

    @property
    def generates_in_training(self) -> bool:
        """Whether the course of training depends on generated answers."""
        best = self.checkpoint.best
        metrics = [*([best.metric] if best else []), *[one.until.metric for one in self.rounds if one.until]]
        return any(metric.lower() != LOSS for metric in metrics)

    @property
    def autocast(self) -> Literal["bf16", "fp16"] | None:
        """What torch.autocast computes in, by TrainingArguments' names; a bfloat16 model's master weights need it.

        With `training.precision: auto`, before a GPU has decided: bf16, which takes as much memory as fp16.
        """
        if self.training.get("fp16"):
            return "fp16"
        masters = isinstance(self.adapter, Full) and self.adapter.master_weights and self.model.dtype == "bfloat16"
        return "bf16" if self.training.get("bf16") or "precision" in self.training or masters else None

    @property
    def effective_batch_size(self) -> int:
        """Rows that one optimizer step sees, those of all GPUs together."""
        return self.micro_batch_size * int(self.training.get("gradient_accumulation_steps", 1)) * self.job.world_size

    @property
    def rows_per_gpu(self) -> int:
        """Rows of an optimizer step that one GPU computes."""
        return self.effective_batch_size // self.job.world_size

    @property
    def micro_batch_size(self) -> int:
        """Rows that go through the model at once."""
        return int(self.training.get("per_device_train_batch_size", 8))
