"""Loading reaches no network, whatever was imported before."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from huggingface_hub import HfApi, constants, is_offline_mode
from huggingface_hub.errors import OfflineModeIsEnabled

from ftlib import api
from ftlib.cli.main import main
from ftlib.hub.offline import offline


def test_it_holds_in_the_body_only(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for _ in range(2):
        with pytest.raises(OfflineModeIsEnabled), offline():
            with offline():
                pass
            assert is_offline_mode() and datasets.config.HF_HUB_OFFLINE and os.environ["HF_HUB_OFFLINE"] == "1"
            HfApi().model_info("owner/name")
        assert not is_offline_mode() and not datasets.config.HF_HUB_OFFLINE and "HF_HUB_OFFLINE" not in os.environ


LOADS = """
import socket, sys
import huggingface_hub, transformers
from pathlib import Path
from types import SimpleNamespace
from typing import cast

def refuse(*arguments, **named):
    raise SystemExit(f"a connection was tried: {arguments}")

assert not huggingface_hub.is_offline_mode()
socket.socket.connect = socket.socket.connect_ex = socket.create_connection = socket.getaddrinfo = refuse
from ftlib.models.loading import load_weights
from ftlib.models.paligemma import PaliGemmaInputProcessor
folder = Path(sys.argv[1])
load_weights(folder, "float32")
PaliGemmaInputProcessor.load(folder)
print("loaded", huggingface_hub.is_offline_mode())
"""


def test_no_connection_is_opened_while_a_model_is_loaded(shared: Path) -> None:
    """In a program that has imported huggingface_hub, online, before ftlib."""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    done = subprocess.run(
        [sys.executable, "-c", LOADS, str(shared / "model")], env=environment, capture_output=True, text=True
    )
    assert done.stdout == "loaded False\n", done.stderr


def test_a_family_loads_its_processor_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of a plugin, too, which may call anything."""
    from ftlib.config.schema import Config
    from ftlib.models.paligemma import PaliGemmaInputProcessor
    from ftlib.models.registry import model_family

    seen = []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(PaliGemmaInputProcessor, "load", lambda folder, length, resize: seen.append(is_offline_mode()))
    config = SimpleNamespace(model=SimpleNamespace(max_length=None, resize="processor"))
    model_family("paligemma").load_processor(Path(), cast("Config", config))
    assert seen == [True] and not is_offline_mode()


@pytest.mark.parametrize(("command", "expected"), [("train", True), ("stage", False)])
def test_commands_that_need_no_network_have_none(monkeypatch: pytest.MonkeyPatch, command: str, expected: bool) -> None:
    seen = []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(f"ftlib.cli.{command}.main", lambda argv: seen.append(is_offline_mode()) or 0)
    assert main([command]) == 0 and seen == [expected]


@pytest.mark.parametrize(("function", "expected"), [("train", True), ("evaluate", True), ("stage", False)])
def test_functions_that_need_no_network_have_none(
    monkeypatch: pytest.MonkeyPatch, function: str, expected: bool
) -> None:
    """From their first import on: bitsandbytes downloads kernels when it is imported."""
    seen = []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(api, "find_site", lambda: seen.append(is_offline_mode()) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        getattr(api, function)("config.yaml")
    assert seen == [expected]
