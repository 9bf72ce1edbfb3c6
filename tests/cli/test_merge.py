"""`ftlib merge` as a user runs it: words of the command line, configs, runs, refusals, death and going on."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ftlib.cli.merge import _load_recipe, _parser
from ftlib.core import files
from ftlib.core.paths import Site
from ftlib.errors import EXIT_REQUEUE, UserError
from ftlib.merging import engine
from ftlib.merging.recipe import Recipe
from tests.conftest import LORA, read_lines
from tests.merging import bare

Ftlib = Callable[..., tuple[int, str, str]]


@pytest.fixture
def folder(tmp_path: Path, store: Path) -> Path:
    base = bare.random_weights(0)
    bare.save(tmp_path / "base", base)
    for number, name in enumerate("ab", 1):
        bare.save(tmp_path / name, bare.tuned(base, number))
    return tmp_path


def recipe_of(*words: str) -> Recipe:
    return _load_recipe(_parser().parse_intermixed_args(list(words)), Site(Path("/store"), Path("/runs")))


PAIR = ("--base_model", "/b", "--model_a", "/x", "--model_b", "/y", "--output", "/o")


@pytest.mark.parametrize(
    ("words", "method", "weights", "resolved"),
    [
        ("--mode base --alpha 0.7", "linear", [0.7, 0.3], {}),
        ("--mode base --alpha 0.7 --alpha2 0.5", "linear", [0.7, 0.5], {}),
        ("--mode layerswap --layerswap_layer 8", "layerswap", [0.5, 0.5], {"layer": 8}),
        (
            "--mode ties --density 0.2",
            "ties",
            [0.5, 0.5],
            {"density": 0.2, "trim": "tensor", "normalize": "weights", "scale": 1.0},
        ),
        (
            "--mode dareties --alpha 1 --alpha2 1 --seed 3",
            "dare_ties",
            [1, 1],
            {"density": 0.3, "seed": 3, "normalize": "none", "scale": 1.0},
        ),
        (
            "--mode darelinear --lambda 0.5",
            "dare_linear",
            [0.5, 0.5],
            {"density": 0.3, "seed": 0, "normalize": "none", "scale": 0.5},
        ),
    ],
)
def test_words_for_two_models(words: str, method: str, weights: list[float], resolved: dict[str, Any]) -> None:
    recipe = recipe_of(*PAIR, *words.split())
    assert (recipe.method, recipe.base, recipe.output) == (method, "/b", "/o")
    assert [model.model for model in recipe.models] == ["/x", "/y"]
    assert recipe.weights == pytest.approx(weights)
    assert recipe.resolved == resolved


def test_words_for_many_models_and_a_config_say_the_same(tmp_path: Path) -> None:
    words = (
        "--base /b --model /x /y --model /z --weight 1 2 0.5 --method ties --density 0.2 --trim global --part head=c"
    )
    config = tmp_path / "merge.yaml"
    config.write_text(
        "base: /b\nmodels: [{model: /x}, {model: /y, weight: 2.0}, {model: /z, weight: 0.5}]\nmethod: ties\n"
        "density: 0.5\ntrim: global\nparts: {head: c}\noutput: ${store}/o\n"
    )
    assert recipe_of(*words.split(), "-o", "/store/o") == recipe_of(str(config), "density=0.2")


def test_the_shipped_config_loads() -> None:
    assert recipe_of("configs/merge/vqav2_captions.yaml").method == "ties"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--method linear --density 0.2", "density has no effect with method linear"),
        ("--method dare_ties --trim global", "trim has no effect"),
        ("--method slerp --model /z", "needs two models, not 3"),
        ("--method layerswap", "needs `layer`"),
        ("--method linear --weight 1 -1", "add up to 0"),
        ("--method linear --weight 1", "1 weights for 2 models"),
        ("--method tie", "method: must be"),
        ("--method ties --density 1.2", "density: must be at most 1.0, got 1.2"),
        ("--method ties --part vision=q", "available: a, b"),
        ("--method ties --part vision", "is not PART=SOURCE"),
        ("--method ties --form adapter", "is not a weighted sum"),
        ("--method ties --mode ties", "use only one of them"),
        ("--method ties --alpha 0.1", "are the weights of --model_a and --model_b"),
        ("--method ties --model_a /x", "go together"),
    ],
)
def test_words_that_make_no_sense(words: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        recipe_of("--base", "/b", "--model", "/x", "/y", *words.split(), "-o", "/o")
    assert message in str(error.value)


def test_a_config_names_line_and_near_key(tmp_path: Path, ftlib: Ftlib, store: Path) -> None:
    config = tmp_path / "merge.yaml"
    config.write_text("base: /b\nmodels:\n- model: /x\n  wieght: 2\nmethod: ties\noutput: /o\n")
    code, _, error = ftlib("merge", config)
    assert code == 2 and f"{config}:4: models.0.wieght: unknown key; did you mean weight?" in error
    code, _, error = ftlib("merge", config, "--density", 0.2)
    assert code == 2 and "--density: with a config file, set fields with KEY=VALUE" in error


def command(folder: Path, *models: str, method: str = "ties") -> list[str]:
    paths = [str(folder / model) for model in models]
    return ["merge", "--base", str(folder / "base"), "--model", *paths, "--method", method, "-o", str(folder / "out")]


def test_merging_again_says_that_it_is_done_and_never_overwrites(folder: Path, ftlib: Ftlib) -> None:
    code, out, error = ftlib(*command(folder, "a", "b"))
    assert code == 0 and out.strip() == str(folder / "out"), error
    assert "cos ab" in error and "conflicts" in error
    before = (folder / "out" / files.COMPLETE_MARKER).stat().st_mtime_ns
    code, _, error = ftlib(*command(folder, "a", "b"))
    assert code == 0 and "already merged" in error
    code, _, error = ftlib(*command(folder, "a"))
    assert code == 2 and "is not the result of this merge" in error
    assert (folder / "out" / files.COMPLETE_MARKER).stat().st_mtime_ns == before
    assert not list(folder.glob("out.partial*"))


def test_the_card_names_hashes_formula_and_versions(folder: Path, ftlib: Ftlib) -> None:
    ftlib(*command(folder, "a", "b"))
    card = (folder / "out" / "README.md").read_text()
    for name in ("base", "a", "b"):
        assert files.file_sha256(folder / name / "weights.safetensors") in card
    assert f"torch {torch.__version__}" in card and "/ Σ w of these models" in card and "0.3 of their entries" in card
    facts = json.loads((folder / "out" / "merge.json").read_text())
    assert facts["resolved"] == {"density": 0.3, "trim": "tensor", "normalize": "weights", "scale": 1.0}
    assert {layer["group"] for layer in facts["layers"]} == {
        "embeddings",
        "head",
        "language",
        "language 0",
        "language 1",
    }


def test_the_table_counts_what_was_kept_and_how_it_agrees(folder: Path, ftlib: Ftlib) -> None:
    ftlib(*command(folder, "a", "b"), "--density", 0.25)
    layers = json.loads((folder / "out" / "merge.json").read_text())["layers"]
    (head,) = (layer for layer in layers if layer["group"] == "head")
    base, a, b = (bare.load(folder / name)["lm_head.weight"].double() for name in ("base", "a", "b"))
    updates = torch.stack([(a - base).flatten(), (b - base).flatten()])
    assert head["nonzero"] == [82 / 328] * 2
    assert head["cosine"] == pytest.approx([float(torch.cosine_similarity(*updates, dim=0))], abs=1e-6)
    order = updates.abs().sort(dim=1, descending=True, stable=True).indices[:, :82]
    kept = torch.zeros_like(updates).scatter(1, order, updates.gather(1, order))
    assert head["conflicts"] == float((kept[0] * kept[1] < 0).sum()) / 328 > 0


def test_parts_of_a_vision_language_model(shared: Path, tmp_path: Path, store: Path, ftlib: Ftlib) -> None:
    for seed, name in enumerate("ab"):
        draw = torch.Generator().manual_seed(seed)
        shutil.copytree(shared / "model", tmp_path / name)
        weights = load_file(tmp_path / name / "model.safetensors")
        moved = {key: tensor + 0.1 * torch.rand(tensor.shape, generator=draw) for key, tensor in weights.items()}
        save_file(moved, tmp_path / name / "model.safetensors", {"format": "pt"})
    words = ["merge", "--base", shared / "model", "--model", tmp_path / "a", tmp_path / "b", "--method", "linear"]
    base, a, b = (load_file(path / "model.safetensors") for path in (shared / "model", tmp_path / "a", tmp_path / "b"))

    def sources(*more: object) -> dict[str, str]:
        code, out, error = ftlib(*words, *more)
        assert code == 0, error
        found: dict[str, set[str]] = {}
        for name, tensor in load_file(Path(out.strip()) / "model.safetensors").items():
            part = "embeddings" if "embed_tokens" in name else name.split("_", 1)[0]
            known = {"base": base[name], "a": a[name], "b": b[name], "merged": (a[name] + b[name]) / 2}
            found.setdefault(part, set()).update(
                key for key, value in known.items() if torch.allclose(tensor, value, atol=1e-6)
            )
        return {part: " ".join(sorted(names)) for part, names in found.items()}

    usual = {"vision": "a", "multi": "a", "embeddings": "base", "language": "merged"}
    assert sources("-o", tmp_path / "usual") == usual
    other = sources(
        "-o", tmp_path / "x", "--part", "vision=b", "--part", "projector=base", "--part", "embeddings=merged"
    )
    assert other == {"vision": "b", "multi": "base", "embeddings": "merged", "language": "merged"}


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Replace or remove (None) weights of model a; names with dots as __."""
    path = folder / "a" / "weights.safetensors"
    weights = load_file(path)
    for name, tensor in tensors.items():
        weights.pop(name.replace("__", "."), None)
        if tensor is not None:
            weights[name.replace("__", ".")] = tensor
    save_file(weights, path)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"model__norm__weight": None}, "1 weights missing compared to the base: norm.weight"),
        ({"odd__weight": torch.ones(2)}, "1 weights unexpected compared to the base: odd.weight"),
        ({"model__norm__weight": torch.ones(4)}, "norm.weight has shape [4], the base's has [5]"),
        ({"model__embed_tokens__weight": torch.ones(38, 8)}, "the vocabularies differ"),
        ({"model__norm__weight": torch.tensor([1, 2, float("nan"), 1, 1])}, "model.norm.weight has NaN or infinity"),
        ({"norm__weight": torch.ones(5)}, "two weights have the canonical name norm.weight"),
        ({"model__norm__weight": torch.ones(5).to(torch.float8_e4m3fn)}, "has dtype F8_E4M3"),
    ],
)
def test_models_that_do_not_fit(folder: Path, ftlib: Ftlib, tensors: dict[str, Any], message: str) -> None:
    change(folder, **tensors)
    code, _, error = ftlib(*command(folder, "a", "b"))
    assert code == 2 and message in error and str(folder / "a") in error and "Traceback" not in error
    assert not (folder / "out").exists()


def test_numbers_that_become_too_large(tmp_path: Path, store: Path, ftlib: Ftlib) -> None:
    base = {name: value * 30 for name, value in bare.random_weights(0).items()}
    bare.save(tmp_path / "base", base, torch.float16)
    bare.save(tmp_path / "a", {name: value * 30 for name, value in base.items()}, torch.float16)
    code, _, error = ftlib(*command(tmp_path, "a", method="task_arithmetic"), "--lambda", 1000)
    assert code == 2 and "too large for float16" in error


@pytest.mark.parametrize("damage", ["cut", "garbage", "missing"])
def test_damaged_files(folder: Path, ftlib: Ftlib, damage: str) -> None:
    path = folder / "a" / "weights.safetensors"
    if damage == "cut":
        os.truncate(path, path.stat().st_size - 3)
    elif damage == "garbage":
        path.write_bytes(b"not what it seems")
    else:
        (folder / "a" / "model.safetensors.index.json").write_text('{"weight_map": {"x": "gone.safetensors"}}')
    code, _, error = ftlib(*command(folder, "a"))
    assert code == 2 and "Traceback" not in error
    assert {"cut": "damaged", "garbage": "not a safetensors file", "missing": "gone.safetensors is missing"}[
        damage
    ] in error


def test_other_architectures_vocabularies_and_quantized_weights(folder: Path, ftlib: Ftlib) -> None:
    def refused(ours: dict[str, Any], theirs: dict[str, Any], name: str = "config.json") -> str:
        for model, value in (("base", ours), ("a", theirs)):
            (folder / model / name).write_text(json.dumps(value))
        code, _, error = ftlib(*command(folder, "a"))
        assert code == 2
        return error

    assert "different architecture: model_type is gemma, the base's is llama" in refused(
        {"model_type": "llama"}, {"model_type": "gemma"}
    )
    assert "are quantized (bitsandbytes)" in refused({}, {"quantization_config": {"quant_method": "bitsandbytes"}})
    (folder / "a" / "config.json").unlink()
    words = {"model": {"vocab": {"x": 0, "y": 1}}}
    error = refused(words, {**words, "added_tokens": [{"content": "z", "id": 1}]}, "tokenizer.json")
    assert "different vocabulary: 1 of its 3 tokens differ from the 2 of the base: 'z' has ID 1" in error
    assert "in the base 'y'" in error


def train(ftlib: Ftlib, write_config: Callable[..., Path], *overrides: str) -> Path:
    config = write_config(LORA)
    assert ftlib("prepare", config, *overrides)[0] == 0
    code, _, error = ftlib("train", config, "training.max_steps=3", *overrides)
    assert code == 0, error
    return config


def test_runs_by_name_and_an_adapter_of_another_base(
    shared: Path, store: Path, tmp_path: Path, write_config: Callable[..., Path], ftlib: Ftlib
) -> None:
    train(ftlib, write_config, "name=one")
    train(ftlib, write_config, "name=two", "seed=4")
    words = ["merge", "--model", "one", "two", "--method", "linear", "-o", tmp_path / "out"]
    code, _, error = ftlib(*words, "--base", shared / "model")
    assert code == 0, error
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    shutil.copytree(shared / "model", tmp_path / "copy")
    words[-1] = tmp_path / "again"
    assert ftlib(*words, "--base", tmp_path / "copy")[0] == 0  # the same weights
    weights = load_file(tmp_path / "copy" / "model.safetensors")
    weights["language_model.model.norm.weight"][0] += 1
    save_file(weights, tmp_path / "copy" / "model.safetensors", {"format": "pt"})
    words[-1] = tmp_path / "other"
    code, _, error = ftlib(*words, "--base", tmp_path / "copy")
    assert code == 2 and f"one was trained on {shared / 'model'}, and its weights differ" in error
    (adapter,) = (store / "runs").glob("*/one/*/adapter")
    shutil.copytree(adapter, tmp_path / "moved")
    described = json.loads((tmp_path / "moved" / "adapter_config.json").read_text())
    (tmp_path / "moved" / "adapter_config.json").write_text(
        json.dumps({**described, "base_model_name_or_path": "someone/gone"})
    )
    code, _, error = ftlib("merge", "--base", shared / "model", "--model", tmp_path / "moved", *words[4:])
    assert code == 0 and "has someone/gone as its base, which was not found: using" in error
    words[-1] = tmp_path / "unfit"
    code, _, error = ftlib("merge", "--base", shared / "model", "--model", "three", *words[4:])
    assert code == 2 and "three: no such folder, and no run with that name" in error


def test_a_merge_stands_beside_its_parent_after_the_command_that_it_prints(
    shared: Path, store: Path, tmp_path: Path, write_config: Callable[..., Path], ftlib: Ftlib
) -> None:
    config = train(ftlib, write_config, "name=one")
    assert ftlib("evaluate", "one")[0] == 0
    words = ["--base", shared / "model", "--model", "one", "--method", "linear", "-o", tmp_path / "out"]
    code, _, error = ftlib("merge", *words)
    assert code == 0, error
    (command,) = re.findall(r"ftlib (evaluate CONFIG .*)", error)
    merged = [word for part in ("vision", "projector") for word in ("--part", f"{part}=merged")]
    code, _, error = ftlib("merge", *words[:-1], tmp_path / "adapter", "--form", "adapter", *merged)
    assert code == 0, error
    words_of = [config if word == "CONFIG" else word for word in command.split()]
    code, _, error = ftlib(*words_of, "name=one")
    assert code == 0, error
    as_adapter = [str(word).replace(str(tmp_path / "out"), str(tmp_path / "adapter")) for word in words_of]
    code, _, error = ftlib(*as_adapter, "name=other")
    assert code == 0, error
    (scores,) = (store / "runs").glob("*/other/*/eval/*/*/before/predictions.jsonl")
    found = (store / "runs").glob("*/one/*/eval/*/*/before/predictions.jsonl")
    (alike,) = (path for path in found if not (path.parents[4] / "DONE").exists())
    answers = [[row["prediction"] for row in read_lines(path)] for path in (scores, alike)]
    assert answers[0] == answers[1], "in both forms it answers alike"
    image = next((shared / "data" / "images").iterdir())
    ask = ("--prompt", "which digit is this?", "--image", image)
    told = [ftlib("predict", model, *ask) for model in ("one", tmp_path / "out", tmp_path / "adapter")]
    assert [code for code, _, _ in told] == [0, 0, 0], told
    assert told[1][1] == told[2][1]
    assert ftlib("report", "one", "-o", tmp_path / "page.html")[0] == 0
    page = (tmp_path / "page.html").read_text()
    assert "1 run: 1 done; 1 only evaluated, without training" in page
    made = json.loads((tmp_path / "out" / "merge.json").read_text())["formula"]
    assert f"linear of one (weight 1): {made}" in page and "weighted average" in made


SCRIPT = """
import sys, time
from ftlib.cli.main import main
from ftlib.merging import engine
from ftlib.models import tensor_files
engine.SHARD_BYTES = 100
close = tensor_files.SafetensorsWriter.close
def slow(shard):
    time.sleep(1)
    close(shard)
tensor_files.SafetensorsWriter.close = slow
sys.exit(main(sys.argv[1:]))
"""
"""A merge of one weight a shard that takes a second for each."""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGUSR1, EXIT_REQUEUE)])
def test_killed_in_the_middle_it_goes_on_with_the_missing_shards(
    folder: Path, ftlib: Ftlib, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    words, partial = command(folder, "a", "b"), folder / "out.partial"
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, *words], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(list(partial.glob("model-*.json"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline, process.stderr and process.stderr.read()
        time.sleep(0.02)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == code
    assert not (folder / "out").exists()
    there = {path.name.replace(".json", ".safetensors") for path in partial.glob("model-*.json")}
    kept = {name: (partial / name).stat().st_ino for name in there}
    assert 2 <= len(kept) < 7
    monkeypatch.setattr(engine, "SHARD_BYTES", 100)
    code, _, error = ftlib(*words)
    assert code == 0 and f"resuming: {len(kept)} of 7 shards exist" in error
    assert {name: (folder / "out" / name).stat().st_ino for name in kept} == kept
    assert not partial.exists()
    (folder / "out").rename(folder / "first")
    assert ftlib(*words)[0] == 0
    for path in (folder / "first").glob("model*"):
        assert path.read_bytes() == (folder / "out" / path.name).read_bytes(), path.name


def test_what_is_left_of_another_merge_is_not_taken(
    folder: Path, ftlib: Ftlib, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "SHARD_BYTES", 100)
        patch.setattr(engine, "_write_index", full)
        code, _, error = ftlib(*command(folder, "a", "b"))
    assert code == 2 and "no space left" in error and not (folder / "out").exists()
    assert len(list((folder / "out.partial").glob("*.safetensors"))) == 7
    code, _, error = ftlib(*command(folder, "b"))
    assert code == 0 and "starting again" in error and "resuming" not in error
    alone = bare.run(folder, ["b"], method="ties", output=str(folder / "alone"))
    for name, tensor in bare.load(folder / "out").items():
        assert torch.equal(tensor, alone[name])


def test_the_stated_memory_holds(tmp_path: Path, store: Path) -> None:
    """An embedding matrix in row blocks; the peak stays below what was said: less than one float32 copy of it."""
    shapes = {"model.layers.0.up.weight": (1024, 4096), "model.embed_tokens.weight": (24000, 1024)}
    for seed, name in enumerate(("base", "a", "b")):
        draw = torch.Generator().manual_seed(seed)
        (tmp_path / name).mkdir()
        weights = {key: torch.rand(shape, generator=draw).bfloat16() for key, shape in shapes.items()}
        save_file(weights, tmp_path / name / "model.safetensors")
    words = [sys.executable, "-m", "ftlib", *command(tmp_path, "a", "b")]
    error = subprocess.run(words, capture_output=True, text=True, check=True).stderr
    said = float(error.partition("at most ")[2].split()[0])
    lines = [line for line in error.splitlines() if line.startswith("peak memory: ")]
    measured = float(lines[-1].split()[-2])
    import_alone = "import torch, resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    torch_alone = int(subprocess.check_output([sys.executable, "-c", import_alone])) / 2**20
    assert measured <= said <= torch_alone + 0.15
