"""One YAML file describes one experiment. This module is the schema: sections, types, defaults and bounds.

Reading a file (lines, overrides, variables, all faults at once) is `config_file.py`'s work.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema, model_validator

from ftlib import generation_fields, training_fields
from ftlib.config_base import LOSS, NAME, Count, PathKind, Section, Split
from ftlib.config_course import Batch, Checkpoint, Guard, Round
from ftlib.config_data import CHAT
from ftlib.config_data import Data as Data
from ftlib.config_data import SplitRule as SplitRule
from ftlib.job_options import SWEEP_SCHEMA, Duration, Memory, SbatchOption, Word

Part = Literal["vision", "projector", "embeddings", "language"]


class Model(Section):
    """The base model: a hub name, a local folder, or an embedded model such as ftlib/tiny-paligemma.

    A training row longer than `max_length` tokens (a causal model's: at most its positions) is dropped and counted,
    truncated at its end, or stops the run. The beginning of a question that is too long is left out, and counted.

    `attention: auto` is SDPA, and eager where the model caps attention scores, as Gemma 2 does in PaliGemma 2; `flex`
    needs less memory there, on a GPU. `final_softcap: auto` caps the final logits where the checkpoint says so, but not
    those of PaliGemma 2, as its authors fine-tune it.
    `quantization` keeps the language model's linear layers in 8 bits (Dettmers et al. 2022, arXiv:2208.07339) or in 4
    (NF4 with double quantization: QLoRA, Dettmers et al. 2023, arXiv:2305.14314); all else stays in `dtype`, which is
    also what they compute in.

    `chat_template_arguments` are passed to the model's chat template (`data.prompt: chat`), in training and wherever it
    is asked, such as `{enable_thinking: false}`.
    """

    family: Literal["paligemma", "causal"]
    base: Annotated[str, Field(min_length=1)]
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attention: Literal["auto", "eager", "sdpa", "flex"] = "auto"
    final_softcap: Literal["auto", "on", "off"] = "auto"
    quantization: Literal["none", "int8", "nf4"] = "none"
    max_length: Count | None = None
    too_long: Literal["drop", "truncate", "stop"] = "drop"
    chat_template_arguments: dict[str, Any] = {}

    def paths(self) -> dict[str, PathKind]:
        return {"base": "model"}


class Lora(Section):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) on linear layers; `dora` also learns their columns' lengths
    (Liu et al. 2024, arXiv:2402.09353). `rslora` scales by alpha / sqrt(r) instead of alpha / r (arXiv:2312.03732).

    A target is `attention`, `mlp`, `language`, `vision`, `projector`, a layer's own name such as `query_key_value`, or
    a regular expression for whole module names. Parts in `freeze` get no adapters, whatever the targets say.
    """

    method: Literal["lora", "dora"]
    r: Count = 16
    alpha: Annotated[float, Field(gt=0)] = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    rslora: bool = False
    targets: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] = ["attention", "mlp"]
    freeze: list[Part] = ["vision"]


class Attention(Section):
    """Train the language model's attention weights, in float32; everything else is frozen in `model.dtype`.

    The recipe of PaliGemma's authors for a 16 GB GPU (big_vision, finetune_paligemma.ipynb), there with SGD.
    """

    method: Literal["attention"]


class Full(Section):
    """Train the weights themselves, but for the frozen parts, which stay in `model.dtype`.

    Weights of a bfloat16 model train in float32 (master weights, Micikevicius et al. 2018, arXiv:1710.03740): torch's
    autocast computes in bfloat16, and the result is saved in bfloat16. With `master_weights: false` they train in
    bfloat16 themselves, in half the memory, and updates smaller than some 1/256 of a weight are rounded away.
    """

    method: Literal["full"]
    freeze: list[Part] = []
    master_weights: bool = True


class Loss(Section):
    """`token`: every answer token weighs the same, as in transformers. `example`: every row does, as the authors do.

    `label_smoothing` gives that share of the target's probability to all tokens alike (Szegedy et al. 2016,
    arXiv:1512.00567). A causal model may learn from `everything`, prompts too. With `packing` the rows of a micro-batch
    share sequences, without seeing each other: the same loss with less padding.
    """

    average: Literal["token", "example"] = "token"
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    on: Literal["response", "everything"] = "response"
    packing: bool = False


class Evaluation(Section):
    """Which splits are asked, how answers are found and what is looked at in them.

    `decode: choose` takes the likeliest of the dataset's answers instead of free text. With `positive`, precision and
    recall are of that label; `choose` then answers it from a threshold of its probability on, which is set on valid:
    the one with the best F1, or with the best recall among those of at least `min_precision`.

    `generation` holds fields of transformers' GenerationConfig (temperature, top_p, repetition_penalty, …; sampling
    needs `do_sample: true`) and `seed`.

    `prompts`: what `ftlib prompts` compares with `data.prompt`.

    `without_context`: of task instruct, ask every row that has a context a second time without it.

    `mask_decoder`: the file vae-oid.npz of PaliGemma's authors, for task segment.

    `loss`: compute loss and perplexity on valid at every checkpoint of training, or every `checkpoint.best.every` steps
    where the best checkpoint is chosen by it.
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
    prompts: list[str] = []
    mask_decoder: str | None = None
    without_context: bool = False
    loss: bool = False

    def paths(self) -> dict[str, PathKind]:
        return {"mask_decoder": "path"}

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
        if self.decode == "choose" and self.without_context:
            raise ValueError("without_context belongs to decode: generate; choose looks at every label")
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
    gpus: Annotated[int, Field(ge=0)] = 1
    gpu_type: Word | None = None
    mem: Memory = "16G"
    time: Duration = "08:00:00"
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

    @property
    def tasks(self) -> int:
        """Processes that train together."""
        return self.nodes * max(1, self.gpus)


class Config(Section):
    """An experiment. With `sweep` the file stands for several (see `submission/sweep.py`), and this is one of them.

    `warm_start` names a finished run (folder, name/identity, or name), or a folder with an adapter or a model: training
    begins with its weights, with a fresh optimizer and schedule.
    """

    name: Annotated[str, Field(pattern=NAME)]
    task: Literal["caption", "classify", "detect", "docvqa", "gqa", "instruct", "refer", "segment", "vqa"]
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    warm_start: Annotated[str, Field(min_length=1)] | None = None
    model: Model
    adapter: Annotated[Lora | Full | Attention, Field(discriminator="method")]
    data: Data
    training: Annotated[dict[str, Any], WithJsonSchema(training_fields.json_schema())] = {}
    loss: Loss = Loss()
    guard: Guard = Guard()
    rounds: list[Round] = []
    batch: Batch = Batch()
    checkpoint: Checkpoint = Checkpoint()
    evaluation: Evaluation = Evaluation()
    job: Job = Job()
    sweep: Annotated[dict[str, Any] | None, WithJsonSchema(SWEEP_SCHEMA)] = None

    def paths(self) -> dict[str, PathKind]:
        return {"warm_start": "run"}

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
        if self.model.family != "causal" and self.data.prompt == CHAT:
            raise ValueError("data.prompt: chat is for model.family: causal")
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
        if self.batch.auto and self.job.tasks > 1:
            raise ValueError("batch.auto is for one GPU; with several, set training.per_device_train_batch_size")
        if self.rounds and "learning_rate" in self.training:
            raise ValueError("rounds have learning rates of their own; remove training.learning_rate")
        if self.rounds and self.rounds[0].until:
            raise ValueError("rounds.0.until: the first round is always trained; give `until` to the one after it")
        return self

    @property
    def asks_in_training(self) -> bool:
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
    def effective_batch(self) -> int:
        """Rows that one optimizer step sees, those of all GPUs together."""
        return self.micro_batch * int(self.training.get("gradient_accumulation_steps", 1)) * self.job.tasks

    @property
    def rows_per_gpu(self) -> int:
        """Rows of an optimizer step that one GPU computes."""
        return self.effective_batch // self.job.tasks

    @property
    def micro_batch(self) -> int:
        """Rows that go through the model at once."""
        return int(self.training.get("per_device_train_batch_size", 8))
