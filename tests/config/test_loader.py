"""Reading configs: faults with places, overrides, variables, identity."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from ftlib.config.loader import Experiment, load_experiment
from ftlib.core.paths import Site
from ftlib.errors import UserError

SITE = Site(store=Path("/somewhere/store"), runs=Path("/somewhere/runs"))


def load(path: Path, *overrides: str, **environment: str) -> Experiment:
    return load_experiment(path, overrides, SITE, environment)


def faults(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(path, *overrides)
    return str(caught.value)


def test_all_faults_come_at_once_each_with_its_place(write_config: Callable[..., Path]) -> None:
    path = write_config(replace=("  learning_rate: 1.0e-2", "  learning_rat: 1\n  warmup_ratio: 0.1"))
    message = faults(path, "loss.averag=token", "job.cpus=two")
    line = path.read_text().splitlines().index("  learning_rat: 1") + 1
    assert f"{path}:{line}: training.learning_rat: unknown key; did you mean learning_rate?" in message
    assert f"{path}:{line + 1}: training.warmup_ratio: no longer exists in transformers" in message
    assert "command line: loss.averag: unknown key; did you mean average?" in message
    assert "command line: job.cpus: must be a whole number, got 'two'" in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "training.per_device_train_batch_size=-3",
            "training.per_device_train_batch_size: must be greater than 0, got -3",
        ),
        ("training.learning_rate=.nan", "training.learning_rate: must be a finite number"),
        ("training.learning_rate=yes", "training.learning_rate: must be a number, got 'yes'"),
        ("training.lr_scheduler_type=cosin", "'cosin' is not an allowed value; did you mean cosine?"),
        ("training.output_dir=x", "training.output_dir: ftlib sets this field itself"),
        ("training.activation_checkpointing=true", "ftlib sets this field itself: write gradient_checkpointing"),
        ("training.eval_steps=5", "training.eval_steps: ftlib sets this field itself: evaluation is by generation"),
        ("training.evaluation_strategy=no", "training.evaluation_strategy: no longer exists"),
        ("training.max_steps=0", "training.max_steps: must be at least 1"),
        ("training.bf16=1", "training.bf16: must be true or false, got 1"),
        ("seed=-1", "seed: must be at least 0"),
        ("seed=1.5", "seed: must be a whole number"),
        ("name=a/b", "name: must be of letters, digits, '.', '_' and '-', a letter or digit first, got 'a/b'"),
        (
            "job.time=8 hours",
            "job.time: must be a time such as 08:00:00 or 2-00:00:00, or a number of minutes, got",
        ),
        ("job.mem=48 GB", "job.mem: must be a size such as 48G, got '48 GB'"),
        ("job.qos=two words", "job.qos: must be one word, got 'two words'"),
        ("job.sbatch.reservatoin=x", "job.sbatch.reservatoin: unknown key; did you mean reservation?"),
        ("job.sbatch.export=ALL", "job.sbatch.export: ftlib sets this option itself"),
        ("adapter.method=lorra", "adapter: method must be one of 'lora', 'dora', 'full', 'attention'"),
        ("adapter.r=8", "adapter.r: unknown key"),
        ("model.quantization=nf4", "model.quantization: quantized weights cannot be trained"),
        ("model.quantization=int4", "model.quantization: must be 'none', 'int8' or 'nf4'"),
        ("loss.label_smoothing=1", "loss.label_smoothing: must be below 1"),
        ("adapter=lora", "adapter: "),
        ("data.root=${NOT_SET}/x", "data.root: ${NOT_SET} is neither ${store} nor set in the environment"),
        ("data.split.valid=1.5", "data.split.valid: must be below 1"),
        ("evaluation.splits=[val]", "evaluation.splits.0: must be 'train', 'valid' or 'test'"),
        ("name.x=1", "there is no such section"),
        ("rounds=[{learning_rate: 1}]", "each round has a learning rate; remove training.learning_rate"),
        ("rounds=[{learning_rat: 1}]", "rounds.0.learning_rat: unknown key; did you mean learning_rate?"),
        ("guard.learning_rate_factor=2", "guard.learning_rate_factor: must be at most 1.0, got 2"),
        ("guard.restarts=-1", "guard.restarts: must be at least 0"),
        ("checkpoint.best={metric: accuracy}", "checkpoint.best.every: is missing"),
        ("nonsense", "is not KEY=VALUE"),
        ("job.mem=lots", "job.mem"),
    ],
)
def test_faults_in_plain_words(write_config: Callable[..., Path], override: str, message: str) -> None:
    assert message in faults(write_config(), override)


@pytest.mark.parametrize(("dtype", "mixed"), [("bfloat16", "bf16"), ("float16", "fp16")])
def test_attention_in_float32_among_halves_needs_mixed_precision(
    write_config: Callable[..., Path], dtype: str, mixed: str
) -> None:
    path = write_config("{method: attention}")
    assert f"set training.{mixed}: true" in faults(path, f"model.dtype={dtype}")
    assert load(path, f"model.dtype={dtype}", f"training.{mixed}=true").config.model.dtype == dtype
    assert load(path).config.model.dtype == "float32"


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_adapters_on_float16_need_their_gradients_scaled(write_config: Callable[..., Path], method: str) -> None:
    path = write_config(f"{{method: {method}}}")
    message = faults(path, "model.dtype=float16")
    assert "model.dtype: float16 " in message and "set training.fp16: true" in message
    assert "set training.fp16: true" in faults(path, "model.dtype=float16", "training.bf16=true")
    assert load(path, "model.dtype=float16", "training.fp16=true").config.model.dtype == "float16"
    assert load(path, "model.dtype=bfloat16").config.model.dtype == "bfloat16"


def test_missing_sections_and_files(write_config: Callable[..., Path], tmp_path: Path) -> None:
    assert "adapter: is missing: set method" in faults(write_config("{}"))
    assert "is missing" in faults(write_config(replace=("name: tiny\n", "")))
    assert "no such config file" in faults(tmp_path / "confg.yaml")
    assert "Did you mean" in faults(tmp_path / "confg.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    assert "not a mapping" in faults(tmp_path / "list.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"name: \xff\n")
    assert "cannot be read" in faults(tmp_path / "latin.yaml")


def test_variables_count_with_their_values_and_only_the_store_may_move(write_config: Callable[..., Path]) -> None:
    experiment = load(write_config(root="${store}/d/${WHERE}"), WHERE="here")
    assert experiment.config.data.root == "/somewhere/store/d/here"
    assert yaml.safe_load(experiment.to_yaml())["data"]["root"] == "${store}/d/here"
    assert load(write_config(root="${store}/d/${WHERE}"), WHERE="there").identity != experiment.identity
    assert load(write_config(), "name=run-${WHERE}", WHERE="here").config.name == "run-here"


def test_secrets_may_not_stand_in_a_config(write_config: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=r"HF_TOKEN} looks like a secret") as caught:
        load(write_config(), "data.prompt=${HF_TOKEN}", HF_TOKEN="hf_planted")
    assert "hf_planted" not in str(caught.value)


def test_saved_config_loads_to_the_same_identity(write_config: Callable[..., Path], tmp_path: Path) -> None:
    experiment = load(write_config(), "training.warmup_steps=0.1")
    (tmp_path / "saved.yaml").write_text(experiment.to_yaml())
    assert load(tmp_path / "saved.yaml") == experiment


@pytest.mark.parametrize(
    "overrides",
    [
        ["job.mem=64G", "job.time=1-00"],
        ["evaluation.splits=[test]", "evaluation.max_new_tokens=99"],
        ["checkpoint.steps=7"],
        ["guard.restarts=7"],
        ["name=other"],
        ["training.per_device_train_batch_size=4", "training.gradient_accumulation_steps=1"],
        ["training.gradient_checkpointing=true", "training.dataloader_num_workers=3"],
        ["model.attention=eager"],
        ["job.gpus=2", "training.gradient_accumulation_steps=1"],
        ["job.nodes=2", "training.gradient_accumulation_steps=1"],
    ],
)
def test_what_cannot_change_the_result_keeps_the_identity(
    write_config: Callable[..., Path], overrides: list[str]
) -> None:
    path = write_config()
    assert load(path, *overrides).identity == load(path).identity


@pytest.mark.parametrize(
    "override",
    [
        "seed=4",
        "training.learning_rate=2e-2",
        "training.per_device_train_batch_size=4",
        "data.prompt=digit {prefix}",
        "data.split.seed=1",
        "adapter.freeze=[]",
        "loss.average=example",
        "loss.label_smoothing=0.1",
        "job.gpus=2",
        "job.nodes=2",
        "model.dtype=bfloat16",
        "model.final_softcap=on",
        "guard.above=1.0",
        "checkpoint.best={metric: accuracy, every: 5}",
    ],
)
def test_what_changes_the_result_changes_the_identity(write_config: Callable[..., Path], override: str) -> None:
    path = write_config()
    assert load(path, override).identity != load(path).identity


def test_how_answers_are_found_counts_where_training_looks_at_them(write_config: Callable[..., Path]) -> None:
    path, asking = write_config(), "checkpoint.best={metric: accuracy, every: 5}"
    assert load(path, asking, "evaluation.max_new_tokens=99").identity != load(path, asking).identity
    assert load(path, asking, "evaluation.batch_size=99").identity == load(path, asking).identity
    rounds = "rounds=[{learning_rate: 1}, {learning_rate: 2, until: {metric: accuracy, at_least: 1.0}}]"
    path = write_config(replace=("  learning_rate: 1.0e-2\n", ""))
    assert load(path, rounds, "evaluation.num_beams=3").identity != load(path, rounds).identity


def test_the_first_round_is_always_trained(write_config: Callable[..., Path]) -> None:
    path = write_config(replace=("  learning_rate: 1.0e-2\n", ""))
    until = "until: {metric: accuracy, at_least: 1.0}"
    message = faults(path, f"rounds=[{{learning_rate: 1, {until}}}, {{learning_rate: 2}}]")
    assert "rounds.0.until: the first round is always trained; set `until` in a later round" in message


def test_moving_the_store_keeps_the_identity(write_config: Callable[..., Path]) -> None:
    path = write_config(root="${store}/d")
    moved = load_experiment(path, [], Site(Path("/elsewhere"), Path("/elsewhere/runs")), {})
    assert moved.identity == load(path).identity
