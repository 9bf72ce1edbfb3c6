"""One YAML file describes one experiment. This module is the schema: sections, types, defaults and bounds.

Reading a file (lines, overrides, variables, all faults at once) is `config_file.py`'s work.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema, model_validator

from ftlib import generation_fields, training_fields
from ftlib.job_options import SWEEP_SCHEMA, SbatchOption, Word

Fraction = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Part = Literal["vision", "projector", "embeddings", "language"]
Split = Literal["train", "valid", "test"]


class Section(BaseModel):
    """A part of the config: no unknown keys, no silent conversions."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Model(Section):
    """The base model: a hub name, a local folder, or an embedded model such as ftlib/tiny-paligemma.

    A training row longer than `max_length` tokens (a causal model's: at most its positions) is dropped and counted,
    truncated at its end, or stops the run. The beginning of a question that is too long is left out, and counted.
    """

    family: Literal["paligemma", "causal"]
    base: Annotated[str, Field(min_length=1)]
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    max_length: Count | None = None
    too_long: Literal["drop", "truncate", "stop"] = "drop"


class Lora(Section):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) on the linear layers named by `targets`.

    A target is `attention`, `mlp`, or a layer's own name such as `query_key_value`.
    """

    method: Literal["lora"]
    r: Count = 16
    alpha: Annotated[float, Field(gt=0)] = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] = ["attention", "mlp"]
    freeze: list[Literal["vision", "language"]] = ["vision"]


class Full(Section):
    """Train the weights themselves, but for the frozen parts."""

    method: Literal["full"]
    freeze: list[Part] = []


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


class Data(Section):
    """Where the rows come from and how they are asked."""

    source: Literal[
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
    root: Annotated[str, Field(min_length=1)]
    file: str = ""
    columns: dict[Literal["id", "image", "prefix", "suffix", "references"], str] = {}
    balanced: bool = True
    prompt: str = "{prefix}"
    on_bad: Literal["stop", "skip"] = "stop"
    frames: Literal["first", "middle", "last", "all", "exclude"] = "first"
    split: SplitRule = SplitRule()


class Loss(Section):
    """`token`: every answer token weighs the same, as in transformers. `example`: every row does, as the authors do.

    A causal model may learn from `everything`, prompts too. With `packing` the rows of a micro-batch share sequences,
    without seeing each other: the same loss with less padding.
    """

    average: Literal["token", "example"] = "token"
    on: Literal["response", "everything"] = "response"
    packing: bool = False


class Checkpoint(Section):
    """When to save what is needed to go on; a checkpoint is due when either interval has passed."""

    steps: Count = 500
    minutes: Annotated[float, Field(gt=0)] = 15.0
    keep: Count = 2


class Evaluation(Section):
    """Which splits are asked, how answers are found and what is looked at in them.

    `decode: choose` takes the likeliest of the dataset's answers instead of free text. With `positive`, precision and
    recall are of that label; `choose` then answers it from a threshold of its probability on, which is set on valid:
    the one with the best F1, or with the best recall among those of at least `min_precision`.

    `generation` holds fields of transformers' GenerationConfig (temperature, top_p, repetition_penalty, …; sampling
    needs `do_sample: true`) and `seed`.

    `mask_decoder`: the file vae-oid.npz of PaliGemma's authors, for task segment.
    """

    splits: Annotated[list[Split], Field(min_length=1)] = ["valid"]
    before: bool = True
    decode: Literal["generate", "choose"] = "generate"
    num_beams: Count = 1
    max_new_tokens: Count = 16
    generation: dict[str, Any] = {}
    batch_size: Count = 32
    positive: str | None = None
    min_precision: Annotated[float, Field(gt=0, le=1)] | None = None
    mask_decoder: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _two_of_generation(cls, data: Any) -> Any:
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
    def _belongs_together(self) -> Evaluation:
        if fault := generation_fields.fault(self.generation):
            raise ValueError(f"generation: {fault}")
        if self.decode == "choose" and self.generation:
            raise ValueError("generation belongs to decode: generate; choose looks at every label")
        if self.decode == "choose" and self.num_beams > 1:
            raise ValueError("num_beams belongs to decode: generate; choose looks at every label")
        if self.min_precision is not None and (self.positive is None or self.decode != "choose"):
            raise ValueError("min_precision needs `positive` and `decode: choose`")
        return self


class Job(Section):
    """What to ask Slurm for: per node `gpus` (of `gpu_type`) and `mem`, per task `cpus`; one task for each GPU.

    Partition, account, QOS and the like may stand in jobs/site.env instead, under sbatch's own names (SBATCH_PARTITION,
    …). `sbatch` holds any other option of sbatch that ftlib does not need for itself. Of a sweep, `array_parallelism`
    runs are at work at the same time.
    """

    cpus: Count = 4
    gpus: Annotated[int, Field(ge=0, le=1)] = 1
    gpu_type: Word | None = None
    mem: Annotated[str, Field(pattern=r"^[0-9]+[KMGT]?$")] = "16G"
    time: Annotated[str, Field(pattern=r"^([0-9]+-)?[0-9]{1,3}(:[0-5][0-9]){0,2}$")] = "08:00:00"
    nodes: Count = 1
    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    constraint: Word | None = None
    exclude: Word | None = None
    mail_type: Word | None = None
    mail_user: Word | None = None
    sbatch: dict[SbatchOption, str | int | Literal[True]] = {}
    array_parallelism: Count = 256


class Config(Section):
    """An experiment. With `sweep` the file stands for several (see `submission/sweep.py`), and this is one of them."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    task: Literal["caption", "classify", "detect", "docvqa", "gqa", "instruct", "refer", "segment", "vqa"]
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    model: Model
    adapter: Annotated[Lora | Full, Field(discriminator="method")]
    data: Data
    training: Annotated[dict[str, Any], WithJsonSchema(training_fields.json_schema())] = {}
    loss: Loss = Loss()
    checkpoint: Checkpoint = Checkpoint()
    evaluation: Evaluation = Evaluation()
    job: Job = Job()
    sweep: Annotated[dict[str, Any] | None, WithJsonSchema(SWEEP_SCHEMA)] = None

    @model_validator(mode="before")
    @classmethod
    def _instruct_prompt(cls, data: Any) -> Any:
        """Task instruct asks in Alpaca's form unless told otherwise."""
        if not isinstance(data, dict) or data.get("task") != "instruct" or not isinstance(data.get("data"), dict):
            return data
        return {**data, "data": {"prompt": "alpaca", **data["data"]}}

    @model_validator(mode="after")
    def _fits(self) -> Config:
        if self.model.family != "causal" and (self.loss.on == "everything" or self.loss.packing):
            raise ValueError("loss.on: everything and loss.packing are for model.family: causal")
        if self.model.family != "causal" and self.data.prompt == "chat":
            raise ValueError("data.prompt: chat is for model.family: causal")
        if self.loss.packing and self.loss.average == "example":
            raise ValueError(
                "loss.packing: rows that share a sequence cannot be averaged one by one; set average: token"
            )
        if self.model.dtype == "float16" and self.adapter.method == "full":
            raise ValueError("model.dtype: float16 weights cannot be trained themselves; take float32 or bfloat16")
        return self

    @property
    def effective_batch(self) -> int:
        """Rows that one optimizer step sees."""
        return self.micro_batch * int(self.training.get("gradient_accumulation_steps", 1))

    @property
    def micro_batch(self) -> int:
        """Rows that go through the model at once."""
        return int(self.training.get("per_device_train_batch_size", 8))


_NOT_IN_IDENTITY = ("name", "checkpoint", "evaluation", "job", "sweep")


def identity_fields(raw: dict[str, Any]) -> dict[str, Any]:
    """The part of a config that decides the trained weights; its hash names the run.

    Left out: names, intervals of saving, evaluation, the job, and how an effective batch is cut into micro-batches.
    Paths count as written, `${store}` unexpanded, so that moving the store moves the runs.

    Args:
        raw: the whole config with defaults filled in and `${store}` unexpanded.
    """
    config = Config.model_validate(raw)
    fields = {key: value for key, value in raw.items() if key not in _NOT_IN_IDENTITY}
    fields["training"] = training_fields.result_changing(raw["training"])
    fields["training"]["effective_batch"] = config.effective_batch
    return fields
