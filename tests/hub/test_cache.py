"""Staging from a hub: a local server stands for it."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ftlib.config.schema import Model
from ftlib.core.paths import Site
from ftlib.errors import UserError
from ftlib.hub.cache import find_model
from ftlib.models.loading import load_weights
from tests.models.tiny_causal import save

CONFIG = """\
name: staged
task: instruct
model: {family: causal, base: someone/model}
adapter: {method: lora}
data: {source: instructions, root: ROOT}
"""
COMMIT = "a" * 40


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("gpt_neox", tmp_path_factory.mktemp("model"))


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """What the hub's repository holds; tests put the weights in."""
    folder = tmp_path / "repository"
    folder.mkdir()
    return folder


@pytest.fixture
def address(repository: Path) -> Iterator[str]:
    """A server that answers as the hub does for `someone/model`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            names = sorted(file.name for file in repository.iterdir())
            if path.startswith("/api/models/someone/model/tree"):
                sizes = {name: (repository / name).stat().st_size for name in names}
                listed = [{"type": "file", "path": name, "size": sizes[name], "oid": COMMIT} for name in names]
                self.reply(json.dumps(listed).encode())
            elif path.startswith("/api/models/someone/model"):
                info = {"id": "someone/model", "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
                self.reply(json.dumps(info).encode())
            else:
                file = repository / path.removeprefix(f"/someone/model/resolve/{COMMIT}/")
                self.reply(file.read_bytes()) if file.is_file() else self.send_error(404)

        def reply(self, content: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def stage(address: str, tmp_path: Path, store: Path) -> Callable[[], subprocess.CompletedProcess[str]]:
    (tmp_path / "config.yaml").write_text(CONFIG.replace("ROOT", str(tmp_path)))

    def run() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ftlib", "stage", str(tmp_path / "config.yaml")]
        environment = {**os.environ, "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0"}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    return run


Stage = Callable[[], subprocess.CompletedProcess[str]]


def link_all(model: Path, repository: Path, but: str = "") -> None:
    for file in model.iterdir():
        if file.name != but:
            (repository / file.name).write_bytes(file.read_bytes())


def staged(tmp_path: Path) -> Path:
    site = Site(tmp_path / "store", tmp_path / "runs")
    return find_model(Model(family="causal", base="someone/model"), site)


def as_bin(model: Path, repository: Path) -> dict[str, torch.Tensor]:
    weights = load_file(model / "model.safetensors")
    torch.save(weights, repository / "pytorch_model.bin")
    return weights


def test_safetensors_are_enough(model: Path, repository: Path, stage: Stage, tmp_path: Path) -> None:
    link_all(model, repository)
    as_bin(model, repository)
    (repository / "consolidated.safetensors").write_bytes(b"the same once more")
    (repository / "model.fp16.safetensors").write_bytes(b"the same once more")
    done = stage()
    assert done.returncode == 0, done.stderr
    names = {path.name for path in staged(tmp_path).iterdir()}
    assert {name for name in names if name.endswith((".bin", ".safetensors"))} == {"model.safetensors"}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= names


def test_models_of_pickled_weights_alone(model: Path, repository: Path, stage: Stage, tmp_path: Path) -> None:
    """In two shards, as larger ones are."""
    link_all(model, repository, but="model.safetensors")
    weights = as_bin(model, repository)
    (repository / "pytorch_model.bin").unlink()
    places = {}
    for number in (1, 2):
        name = f"pytorch_model-{number:05d}-of-00002.bin"
        shard = {key: tensor for place, (key, tensor) in enumerate(weights.items()) if place % 2 == number - 1}
        torch.save(shard, repository / name)
        places |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (repository / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (repository / "training_args.bin").write_bytes(b"not weights")
    done = stage()
    assert done.returncode == 0, done.stderr
    folder = staged(tmp_path)
    assert {path.name for path in folder.glob("*.bin")} == set(places.values())
    loaded, wanted = (load_weights(one, "float32", "causal").state_dict() for one in (folder, model))
    assert loaded.keys() == wanted.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in wanted.items())


def test_a_pickle_with_code_is_refused(model: Path, repository: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "sprung"),)

    link_all(model, repository, but="model.safetensors")
    (repository / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Trap()}))
    with pytest.raises(UserError, match="hold more than tensors"):
        load_weights(repository, "float32", "causal")
    assert not (tmp_path / "sprung").exists()


def test_a_repository_without_weights(model: Path, repository: Path, stage: Stage) -> None:
    link_all(model, repository, but="model.safetensors")
    (repository / "model.onnx").write_bytes(b"another form")
    done = stage()
    assert done.returncode == 2 and "no weights in it" in done.stderr


def test_a_folder_of_ones_own_stays_where_it_is(model: Path, stage: Stage, tmp_path: Path, store: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(config.read_text().replace("someone/model", str(model)))
    done = stage()
    assert done.returncode == 0, done.stderr
    assert f"model {model}: {model} (a local folder: nothing to download)" in done.stderr
    assert not [path for path in (store / "hf").rglob("*") if path.is_file()]
    config.write_text(config.read_text().replace(str(model), str(tmp_path / "none")))
    done = stage()
    assert done.returncode == 2 and f"{tmp_path / 'none'}: no such folder" in done.stderr
