"""Files of weights, written in any order."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from ftlib.models.tensor_files import SafetensorsWriter, TensorEntry


def test_an_unfinished_file_is_written_anew_and_a_symbolic_link_is_not_followed(tmp_path: Path) -> None:
    victim, path = tmp_path / "victim", tmp_path / "model.safetensors"
    victim.write_text("mine")
    for planted in (lambda place: place.symlink_to(victim), lambda place: place.write_bytes(b"x" * 10_000)):
        planted(tmp_path / "model.safetensors.tmp")
        shard = SafetensorsWriter(path, [TensorEntry("a", (2, 3), torch.float32)])
        shard.write("a", 0, torch.ones(2, 3))
        shard.close()
        assert torch.equal(load_file(path)["a"], torch.ones(2, 3)) and not path.is_symlink()
        assert victim.read_text() == "mine"
