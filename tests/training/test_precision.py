"""`training.precision: auto`: chosen by the first GPU, noted, and never another one later."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ftlib.config.loader import load_experiment
from ftlib.config.schema import Config
from ftlib.core import files, jsonl
from ftlib.core import gpu as core_gpu
from ftlib.core.paths import find_site
from ftlib.errors import UserError
from ftlib.runs.run import Run, create_run
from ftlib.training import train
from tests.conftest import LORA

AUTO = "training.precision=auto"
GPUS = {"NVIDIA A100": (8, 0), "Tesla T4": (7, 5), "NVIDIA H100": (9, 0)}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], None]:
    """Put a GPU of this name (or none) before the eyes of `precision`; nothing computes on it."""

    def put(name: str | None) -> None:
        seen = {"is_available": lambda: name is not None, "get_device_name": lambda: name, "empty_cache": lambda: None}
        seen["get_device_capability"] = lambda: GPUS[str(name)]
        seen |= {
            "current_device": lambda: 0,
            "get_device_properties": lambda index: SimpleNamespace(total_memory=1 << 34),
        }
        cuda = SimpleNamespace(**(vars(torch.cuda) | seen))
        monkeypatch.setattr(core_gpu, "_cuda", lambda: cuda if name else None)

    return put


def resolved(path: Path, *overrides: str) -> tuple[Config, Run]:
    experiment = load_experiment(path, [AUTO, *overrides], find_site())
    run = create_run(experiment, find_site())
    run.folder.mkdir(parents=True, exist_ok=True)
    return train.with_precision(experiment, run).config, run


def test_bf16_from_ampere_on_and_fp16_before(
    store: Path, write_config: Callable[..., Path], gpu: Callable[[str | None], None]
) -> None:
    path = write_config(LORA)
    for seed, (name, mode) in enumerate({"NVIDIA A100": "bf16", "Tesla T4": "fp16", "NVIDIA H100": "bf16"}.items()):
        gpu(name)
        for _ in range(2):
            config, run = resolved(path, f"seed={seed}")
            assert {mode} == {"bf16", "fp16"} & set(config.training) and "precision" not in config.training
            assert config.autocast == mode
        noted = [line for line in jsonl.read_jsonl_log(run.history) if line["event"] == "precision"]
        assert [(line["mode"], line["gpu"]) for line in noted] == [(mode, name)]


@pytest.mark.parametrize(("first", "later"), [("NVIDIA A100", "Tesla T4"), ("Tesla T4", "NVIDIA H100")])
def test_a_run_does_not_go_on_in_the_other(
    store: Path, write_config: Callable[..., Path], gpu: Callable[[str | None], None], first: str, later: str
) -> None:
    path = write_config(LORA)
    gpu(first)
    resolved(path)
    gpu(later)
    with pytest.raises(
        UserError, match=rf"started in ..16 on {first}, but {later} would resume in ..16\n.*job\.gpu_type"
    ):
        resolved(path)


def test_no_gpu_and_weights_of_the_other_type_are_refused(
    store: Path, write_config: Callable[..., Path], gpu: Callable[[str | None], None]
) -> None:
    path = write_config(LORA)
    gpu(None)
    with pytest.raises(UserError, match="torch sees none"):
        resolved(path)
    gpu("Tesla T4")
    with pytest.raises(UserError, match=r"bfloat16 weights need bf16, .* fp16 on Tesla T4"):
        resolved(path, "model.dtype=bfloat16")
    gpu("NVIDIA A100")
    config, _ = resolved(path, "model.dtype=bfloat16")
    assert config.training["bf16"] is True


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.bf16=true"], "auto chooses between bf16 and fp16; remove training.bf16"),
        (["training.fp16=true"], "remove training.fp16"),
        (["model.dtype=float16"], "float16 weights need fp16; set training.fp16: true instead"),
        (["training.precision=bf16"], "'bf16' is not an allowed value"),
    ],
)
def test_what_does_not_go_together_is_found_in_the_config(
    store: Path, write_config: Callable[..., Path], overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load_experiment(write_config(LORA), [AUTO, *overrides], find_site())


def test_it_names_the_run_as_it_is_written_and_training_computes_in_it(
    store: Path,
    write_config: Callable[..., Path],
    ftlib: Callable[..., tuple[int, str, str]],
    gpu: Callable[[str | None], None],
) -> None:
    path = write_config(LORA)
    gpu("NVIDIA A100")
    few = ("training.max_steps=1", "training.use_cpu=true")
    names = {
        load_experiment(path, [*few, *more], find_site()).identity for more in ([], [AUTO], ["training.bf16=true"])
    }
    assert len(names) == 3
    assert ftlib("prepare", path)[0] == 0
    code, _, error = ftlib("train", path, AUTO, *few)
    assert code == 0 and "training.precision: bf16 on NVIDIA A100" in error, error
    experiment = load_experiment(path, [AUTO, *few], find_site())
    run = create_run(experiment, find_site())
    assert experiment.identity == run.folder.name and "precision: auto" in run.config_file.read_text()
    assert "- precision: bf16 on NVIDIA A100" in next(run.folder.glob("*/README.md")).read_text()
    assert files.read_json(run.done_marker)["step"] == 1
