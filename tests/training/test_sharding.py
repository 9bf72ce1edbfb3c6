"""A sharded model (FSDP2) trains as one process does, and its checkpoints are those of one process.

Processes with Slurm's variables, joined by gloo, stand for the tasks of a step.
"""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ftlib.core import jsonl
from ftlib.runs import run as runs
from ftlib.runs.run import Run
from tests.conftest import FULL, LORA, read_lines
from tests.models import tiny_causal, tiny_paligemma, tiny_vlm
from tests.training.sharded_ranks import Case, Ranks
from tests.training.test_resume import run_of

Ftlib = Callable[..., tuple[int, str, str]]

CAUSAL = """\
name: tiny
task: instruct
seed: 3
model: {family: causal, base: BASE}
adapter: ADAPTER
data: {source: instructions, root: ROOT, file: data.jsonl, split: {valid: 7, test: 0}}
training: {max_steps: 4, per_device_train_batch_size: 1, gradient_accumulation_steps: 4, learning_rate: 1.0e-2}
evaluation: {splits: [valid], loss: true}
checkpoint: {steps: 2, keep: 9}
"""
WAIT = "training.ddp_timeout=60"


def job(count: int, shard: str = "full", micro: int = 1, nodes: int = 1) -> list[str]:
    """The effective batch of four on some ranks, in micro-batches of `micro` rows."""
    where = [f"job.gpus={count // nodes}", f"job.nodes={nodes}", f"parallel.shard={shard}", WAIT]
    cut = f"training.gradient_accumulation_steps={4 // count // micro}"
    return [*where, f"training.per_device_train_batch_size={micro}", cut]


def case(runs: Path, arguments: Sequence[object], **more: Any) -> Case:
    """One of `sharded_ranks`."""
    return {"runs": str(runs), "arguments": [*map(str, arguments)], **more}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Starts ranks on this machine."""
    ranks = Ranks(tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


def train_on(
    ranks: Ranks, count: int, cases: list[Case], expect: Sequence[int] = (), nodes: int = 1
) -> list[dict[str, Any]]:
    """Run cases on some ranks, which all end them with the same codes; return what the first rank saw of each."""
    ended = ranks.run(count, cases, nodes)
    wanted = list(expect) or [0] * len(cases)
    assert [one.codes for one in ended] == [wanted] * count, "\n---\n".join(one.error for one in ended)
    if count > 1:
        assert_sharded(cases, ended[0].seen)
    return ended[0].seen


def assert_sharded(cases: list[Case], found: list[dict[str, Any]]) -> None:
    """Where sharding was asked for, everything but adapters was sharded."""
    for one, seen in zip(cases, found, strict=True):
        if ("parallel.shard=full" in one["arguments"] or "scope" in one) and "sharded" in seen:
            assert seen["sharded"] and not seen["differing"], "all ranks hold the same adapters"
            assert seen["noticed"] == ["rank"], "a difference would be found"
            assert not [name for name in seen["whole"] if not ("lora_" in name or "modules_to_save" in name)]


def values_of(run: Run, name: str) -> list[float]:
    return [line[name] for line in jsonl.read_jsonl_log(run.metrics) if "grad_norm" in line]


def evaluations_of(run: Run) -> list[tuple[int, str, float]]:
    return [
        (line["step"], line["metric"], line["value"]) for line in jsonl.read_jsonl_log(run.metrics) if "split" in line
    ]


def assert_same(ours: Run, theirs: Run, coarse: float = 1) -> None:
    """Losses, gradient norms and evaluations are equal up to rounding; checkpoints and results have the same layout.

    Args:
        coarse: factor of the tolerances.
    """
    assert ours.folder.name == theirs.folder.name, "sharding is not part of a run's identity"
    for name, tolerance in (("loss", 1e-6), ("grad_norm", 1e-5)):
        values, wanted = values_of(ours, name), values_of(theirs, name)
        assert values[:2] == pytest.approx(wanted[:2], rel=coarse * tolerance), name
        assert values == pytest.approx(wanted, rel=100 * coarse * tolerance), f"{name}: Adam amplifies rounding"
    for one, other in zip(evaluations_of(ours), evaluations_of(theirs), strict=True):
        assert one[:2] == other[:2] and one[2] == pytest.approx(other[2], rel=1e-4 * coarse, abs=1e-6)
    for folder, file in ((checkpoint_of(ours), "trainable.safetensors"), (result_of(ours), "*.safetensors")):
        there = checkpoint_of(theirs) if folder == checkpoint_of(ours) else result_of(theirs)
        weights, wanted = (load_file(next(iter(place.glob(file)))) for place in (folder, there))
        assert {name: (one.shape, one.dtype) for name, one in weights.items()} == {
            name: (one.shape, one.dtype) for name, one in wanted.items()
        }
        # Adam turns a gradient that is rounding alone into a step of the learning rate: compare what has moved.
        far = [name for name in wanted if (weights[name] - wanted[name]).norm() > 0.01 * wanted[name].norm() + 1e-3]
        assert not [name for name in far if "k_proj.bias" not in name and "query_key_value.bias" not in name], far
    names = sorted(path.name for path in result_of(theirs).iterdir())
    assert sorted(path.name for path in result_of(ours).iterdir()) == names
    settings = [json.loads(next(result_of(run).glob("*config.json")).read_text()) for run in (ours, theirs)]
    assert settings[0] == settings[1]
    states = [torch.load(checkpoint_of(run) / "optimizer.pt", weights_only=True) for run in (ours, theirs)]
    shapes = [
        {
            number: {key: (type(value), value.shape) for key, value in own.items()}  # a DTensor has the whole's shape
            for number, own in state["state"].items()
            if own.get("exp_avg", torch.ones(1)).any()  # one process also has zeros for weights that nothing reads
        }
        for state in states
    ]
    assert shapes[0] == shapes[1], "the optimizer's file holds whole tensors"


def exact(run: Run) -> tuple[dict[str, bytes], list[dict[str, object]]]:
    """The bytes of every file of weights and settings, and every logged number of a step but times."""
    found = [path for folder in (result_of(run), checkpoint_of(run)) for path in folder.glob("*.safetensors")]
    lines = [
        {name: value for name, value in line.items() if not name.endswith("seconds")}
        for line in jsonl.read_jsonl_log(run.metrics)
        if "grad_norm" in line
    ]
    return {str(path.relative_to(run.folder)): path.read_bytes() for path in found}, lines


def checkpoint_of(run: Run) -> Path:
    found = runs.last_checkpoint(run.checkpoint_root())
    assert found
    return found[1]


def result_of(run: Run) -> Path:
    return next(path for path in (run.folder / "model", run.folder / "adapter") if path.exists())


def causal_config(folder: Path, architecture: str, adapter: str, ftlib: Ftlib) -> Path:
    """Questions of several lengths for a tiny causal model."""
    folder.mkdir()
    model = tiny_causal.save(architecture, folder / "model")
    rows = [
        {"instruction": f"{a} + {b * 7}", "input": "now" * (a % 3), "output": str(a + b * 7)}
        for a in range(6)
        for b in range(6)
    ]
    (folder / "data").mkdir()
    (folder / "data" / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "config.yaml"
    text = CAUSAL.replace("BASE", str(model)).replace("ADAPTER", adapter).replace("ROOT", str(folder / "data"))
    path.write_text(text)
    assert ftlib("prepare", path)[0] == 0
    return path


@pytest.fixture
def paligemma(
    store: Path, write_config: Callable[..., Path], ftlib: Ftlib, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Callable[..., Path]]:
    """Make a config on tiny PaliGemmas without dropout; 17 rows: in an epoch's last batch, step 5, a rank has none."""
    monkeypatch.setenv("FTLIB_RUNS", "")

    def make(adapter: str, generation: int = 1) -> Path:
        base = tiny_paligemma.save(tmp_path / f"paligemma{generation}", generation)
        rows = ("split: {valid: 0.2, test: 0.2}", "split: {valid: 11, test: 32}")
        path = write_config(adapter.replace("dropout: 0.1", "dropout: 0.0"), base=str(base), replace=rows)
        path = path.rename(tmp_path / f"config-{len(list(tmp_path.glob('config-*')))}.yaml")
        assert ftlib("prepare", path)[0] == 0
        return path

    yield make


def test_two_sharded_ranks_are_one(
    ranks: Ranks, paligemma: Callable[..., Path], shared: Path, tmp_path: Path, ftlib: Ftlib
) -> None:
    """PaliGemma fully trained, with evaluations by loss and by generation between the steps: straight; stopped by
    signals that reach the ranks at different times; killed, and with a full disk; then Llama with LoRA. 11 rows of
    valid are two batches for generation and eleven for the loss. The results are used like any other.
    """
    full = paligemma(FULL)
    asked = ["training.max_steps=6", "checkpoint.steps=3", "checkpoint.keep=9", "evaluation.loss=true"]
    asked += ["checkpoint.best={metric: accuracy, every: 3}"]
    lora = causal_config(tmp_path / "llama", "llama", LORA.replace("dropout: 0.1", "dropout: 0.0"), ftlib)
    one, small = run_of(full, tmp_path / "one", *asked), run_of(lora, tmp_path / "small")
    for config, place, overrides in ((full, "one", asked), (lora, "small", [])):
        os.environ["FTLIB_RUNS"] = str(tmp_path / place)
        assert ftlib("train", config, *overrides)[0] == 0
    places = {name: tmp_path / name for name in ("two", "stopped", "killed")}
    two, stopped, killed = (run_of(full, place, *asked, *job(2)) for place in places.values())
    small_two = run_of(lora, tmp_path / "small-two", *job(2))
    still = [f"warm_start={two.folder}", "training.max_steps=1", "training.learning_rate=0"]
    arguments = [full, *asked, *job(2)]
    cases = [
        case(places["two"], arguments),
        case(places["stopped"], arguments, stop_in_loss=2),
        case(places["stopped"], arguments, stop_after=4),
        case(places["stopped"], arguments),
        case(tmp_path / "small-two", [lora, *job(2)]),
        case(places["two"], [full, *still, *job(2)]),
        case(places["killed"], arguments, kill_after=4),
    ]
    first, second = ranks.run(2, cases)
    assert first.codes == [0, 75, 75, 0, 0, 0, 76], first.error + second.error
    assert second.codes == [0, 75, 75, 0, 0, 0] and second.code == -signal.SIGKILL, second.error
    assert_sharded(cases, first.seen)
    assert [found[:2] for found in evaluations_of(two)] == [
        (3, "loss"), (3, "accuracy"), (6, "loss"), (6, "accuracy")
    ]  # fmt: skip
    assert_same(two, one)
    assert exact(stopped) == exact(two), "the same number of ranks resumes bit for bit"
    assert [found for found in evaluations_of(stopped) if found[0] in (3, 6)] == evaluations_of(two)
    assert_same(small_two, small)
    warm = run_of(full, places["two"], *still, *job(2))
    ours, theirs = (load_file(result_of(run) / "model.safetensors") for run in (warm, two))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs), "a step of size 0 from a run's result"
    results_are_plain(two, one, small_two, small, shared / "data", tmp_path, ftlib)
    told = f"another task of this job is gone: task 1 on {socket.gethostname()}"
    assert told in first.error and "Traceback" not in first.error
    assert checkpoint_step(killed) == 3

    # A disk fills up for the rank that writes nothing but the states of its random numbers, then for the first one.
    filled = {1: case(places["killed"], arguments, fill_after=4, fill_rank=1, fill_bytes=1 << 13),
              0: case(places["killed"], arguments, fill_after=4)}  # fmt: skip
    for full_rank, one_case in filled.items():
        ended = ranks.run(2, [one_case])
        there, elsewhere = ended[full_rank], ended[1 - full_rank]
        assert (there.codes, elsewhere.codes) == ([2], [76]), there.error + elsewhere.error
        assert "no space left on the storage" in there.error
        assert f"another task of this job is gone: task {full_rank}" in elsewhere.error
        assert "Traceback" not in there.error + elsewhere.error
        assert checkpoint_step(killed) == 3, "the earlier checkpoint stays"
    os.environ["FTLIB_RUNS"] = str(places["killed"])
    assert ftlib("train", full, *asked)[0] == 0
    assert_same(killed, one)


def results_are_plain(
    full: Run, other: Run, lora: Run, other_lora: Run, data: Path, folder: Path, ftlib: Ftlib
) -> None:
    """The results of sharded runs are evaluated, asked, exported and merged with those of others."""
    assert ftlib("evaluate", full.folder, "--split", "valid")[0] == 0
    folders = (full.folder / "eval" / "jsonl" / "valid" / name for name in ("after", "attempt-0-step-3"))
    records, sharded = (read_lines(place / "predictions.jsonl") for place in folders)
    answers = [record["prediction"] for record in records]
    assert answers == [record["prediction"] for record in sharded], "what the ranks answered, of the best checkpoint"
    asked = ["--image", data / str(records[0]["image"]), "--prompt", records[0]["prompt"]]
    code, answer, _ = ftlib("predict", full.folder, *asked)
    assert (code, answer.strip()) == (0, answers[0])
    models = [result_of(run) for run in (full, other)]
    merged = folder / "merged"
    base = folder / "paligemma1"
    assert ftlib("merge", "--base", base, "--model", *models, "--method", "linear", "-o", merged)[0] == 0
    weights, *parts = (load_file(next(place.glob("*.safetensors"))) for place in (merged, *models))
    blocks = [name for name in weights if "language_model" in name and ".layers." in name]
    assert blocks and all(torch.allclose(weights[n], (parts[0][n] + parts[1][n]) / 2, atol=1e-5) for n in blocks)
    for run in (lora, other_lora):
        code, _, error = ftlib("export", run.folder, "-o", folder / f"exported-{run.folder.parent.parent.name}")
        assert code == 0, error
    whole = [load_file(next(path.glob("*.safetensors"))) for path in sorted(folder.glob("exported-*"))]
    assert len(whole) == 2 and all(torch.allclose(whole[0][name], whole[1][name], atol=1e-3) for name in whole[0])


def checkpoint_step(run: Run) -> int:
    found = runs.last_checkpoint(run.checkpoint_root())
    assert found
    return found[0]


def test_ranks_with_images_and_ranks_without(
    tmp_path: Path,
    store: Path,
    write_config: Callable[..., Path],
    ftlib: Ftlib,
    monkeypatch: pytest.MonkeyPatch,
    ranks: Ranks,
) -> None:
    """PaliGemma with LoRA and Gemma 3 fully trained, sharded and in DDP: rows have no image, one or three, and in most
    steps one rank alone has images."""
    monkeypatch.setenv("FTLIB_RUNS", "")
    data, lora = rows_of_many_images(tmp_path / "data"), LORA.replace("dropout: 0.1", "dropout: 0.0")
    cases, pairs = [], []
    for name, adapter in (("paligemma", lora), ("gemma3", FULL.replace(", freeze: [projector]", ""))):
        config = image_config(tmp_path / name, name, adapter, data, write_config, ftlib)
        one = run_of(config, tmp_path / name / "one")
        assert ftlib("train", config)[0] == 0
        for shard in ("full", "none"):
            place, two = tmp_path / name / shard, job(2, shard)
            pairs.append((run_of(config, place, *two), one))
            cases.append(case(place, [config, *two]))
    train_on(ranks, 2, cases)
    for ours, one in pairs:
        assert_same(ours, one)


def image_config(
    folder: Path, model: str, adapter: str, data: Path, write_config: Callable[..., Path], ftlib: Ftlib
) -> Path:
    """A config in a new folder, on a tiny PaliGemma or an architecture of `tiny_vlm`."""
    folder.mkdir()
    family, base = "vlm", folder / "model"
    if model == "paligemma":
        family, base = model, tiny_paligemma.save(base)
    else:
        tiny_vlm.save(model, base)
    path = write_config(adapter, str(base), str(data), ("family: paligemma", f"family: {family}"))
    path = path.rename(folder / "config.yaml")
    path.write_text(path.read_text().replace("max_steps: 12", "max_steps: 4"))
    assert ftlib("prepare", path)[0] == 0
    return path


def rows_of_many_images(folder: Path, scale: int = 1) -> Path:
    """Rows with no image, one, or three, of several sizes.

    Args:
        scale: factor of the sizes.
    """
    (folder / "images").mkdir(parents=True)
    noise = np.random.default_rng(0)
    for number in range(26):
        pixels = noise.integers(0, 255, (scale * (20 + number % 3), scale * (24 + number % 5), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
    rows = [
        {
            "images": [f"images/{number + image}.png" for image in range((0, 1, 3, 0)[number % 4])],
            "prefix": f"{number}?",
            "suffix": "ab"[number % 2],
        }
        for number in range(24)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
