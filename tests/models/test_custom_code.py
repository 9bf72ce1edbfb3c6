"""A model whose files name Python code of their own, on a terminal: nothing is asked, nothing of it runs."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

CLASSES = {
    "AutoConfig": "stranger.Stranger",
    "AutoModelForCausalLM": "stranger.Stranger",
    "AutoTokenizer": ["stranger.Stranger", "stranger.Stranger"],
    "AutoImageProcessor": "stranger.Stranger",
    "AutoProcessor": "stranger.Stranger",
}


def strange(folder: Path, family: str) -> None:
    """Let the files of a model name code that lies beside them, and be of a kind that transformers does not know."""
    for name, unknown in {
        "config.json": {} if family == "paligemma" else {"model_type": "stranger"},
        "tokenizer_config.json": {"tokenizer_class": "StrangerTokenizer"},
        "processor_config.json": {"processor_class": "StrangerProcessor"},
        "preprocessor_config.json": {"image_processor_type": "StrangerProcessor"},
    }.items():
        path = folder / name
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**known, **unknown, "auto_map": CLASSES}))
    executed = folder.parent / "executed"
    (folder / "stranger.py").write_text(
        f"import pathlib\npathlib.Path({str(executed)!r}).touch()\nclass Stranger: pass\n"
    )
    (folder / "custom_generate").mkdir()
    shutil.copy(folder / "stranger.py", folder / "custom_generate" / "generate.py")


def on_terminal(*command: str) -> tuple[int, str]:
    """Exit code and output of a command on a terminal where somebody answers every question with y."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-m", "ftlib", *command], stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    os.write(ours, b"y\n" * 20)
    output = b""
    while True:
        try:
            block = os.read(ours, 4096)
        except OSError:  # the last writer has closed it
            break
        if not block:
            break
        output += block
    os.close(ours)
    return process.wait(), output.decode(errors="replace")


@pytest.mark.parametrize("family", ["paligemma", "causal"])
def test_code_of_a_model_is_neither_run_nor_asked_about(
    write_config: Callable[..., Path], shared: Path, store: Path, tmp_path: Path, family: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(shared / "model", model)
    strange(model, family)
    config = write_config(base=str(model))
    if family == "causal":
        config.write_text(
            f"name: tiny\ntask: instruct\nmodel: {{family: causal, base: {model}}}\n"
            f"adapter: {{method: full}}\ndata: {{source: instructions, root: {tmp_path}, "
            "file: data.json, split: {valid: 0.2, test: 0.2}}\n"
        )
        rows = [{"instruction": f"say {number}", "input": "", "output": str(number)} for number in range(20)]
        (tmp_path / "data.json").write_text(json.dumps(rows))
    said = {}
    for command in ("prepare", "plan", "train"):
        code, said[command] = on_terminal(command, str(config))
        assert "[y/N]" not in said[command] and "Traceback" not in said[command], said[command]
        assert not (tmp_path / "executed").exists(), said[command]
        assert code in (0, 2), said[command]
    assert "it needs Python code that comes with it (auto_map), and ftlib runs none" in "".join(said.values()), said
