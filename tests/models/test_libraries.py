"""Packages that libraries would import are hidden from commands that do not need them, and only from them."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ftlib.config.loader import load_experiment
from ftlib.core import imports
from ftlib.core.imports import hide_package, hide_while_importing  # conftest.py replaces them in their module
from ftlib.core.paths import Site
from ftlib.models.libraries import hide_unused_packages, hide_unused_packages_of

CONFIG = """
name: tiny
task: classify
model: {family: paligemma, base: not/staged}
adapter: {method: lora, r: 4}
data: {source: jsonl, root: /data}
training: {max_steps: 1}
"""
PLUGIN = """
from ftlib import register_source

@register_source(name="mine", title="Mine")
def examples(data): ...
"""


@pytest.fixture
def hidden(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[str]]:
    """What is hidden for a config with these overrides."""

    file = tmp_path / "config.yaml"
    file.write_text(CONFIG)

    def of(*overrides: str) -> list[str]:
        names: list[str] = []
        monkeypatch.setattr(imports, "hide_package", names.append)
        site = Site(Path("/s"), Path("/r"))
        hide_unused_packages(load_experiment(file, overrides, site, {}).config, site)
        return names

    return of


def test_it_is_hidden_where_nothing_needs_it(hidden: Callable[..., list[str]]) -> None:
    assert hidden() == ["bitsandbytes"]
    assert hidden("training.optim=adamw_torch_fused") == ["bitsandbytes"]


def test_it_stays_where_something_may_need_it(hidden: Callable[..., list[str]], tmp_path: Path) -> None:
    assert not hidden("model.quantization=nf4")
    assert not hidden("training.optim=paged_adamw_8bit")
    base = tmp_path / "stored quantized"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "bitsandbytes"}}))
    assert not hidden(f"model.base={base}")
    plugin = tmp_path / "mine.py"
    plugin.write_text(PLUGIN)
    assert not hidden(f"plugins=[{plugin}]")


def test_the_folder_of_a_model_or_a_run_tells_as_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    monkeypatch.setattr(imports, "hide_package", names.append)
    monkeypatch.chdir(tmp_path)

    def hidden_of(folder: str) -> list[str]:
        names.clear()
        hide_unused_packages_of(folder, Site(Path("/s"), Path("/r")))
        return list(names)

    plain, quantized, run = Path("my/plain"), Path("my/quantized"), Path("runs/1")
    for folder in (plain, quantized, run):
        folder.mkdir(parents=True)
    (plain / "config.json").write_text("{}")
    (quantized / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "bitsandbytes"}}))
    assert hidden_of("my/plain") == ["bitsandbytes"] and not hidden_of("my/quantized")
    (run / "config.yaml").write_text(CONFIG)
    assert hidden_of("runs/1") == ["bitsandbytes"]
    (run / "config.yaml").write_text(CONFIG.replace("not/staged", "not/staged, quantization: nf4"))
    assert not hidden_of("runs/1")


def test_some_packages_are_hidden_from_imports_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imports, "_unneeded", ())
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    hide_while_importing("colorsys", "json")
    with pytest.raises(ValueError, match="in the body"), imports.quick_imports():
        assert importlib.util.find_spec("colorsys") is None and json is sys.modules["json"]
        raise ValueError("in the body")
    import colorsys

    with imports.quick_imports():
        assert colorsys is sys.modules["colorsys"], "what is imported already stays"


def test_a_hidden_package_looks_as_if_it_were_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    hide_package("colorsys")
    assert importlib.util.find_spec("colorsys") is None
    with pytest.raises(ImportError):
        import colorsys  # noqa: F401
    del sys.modules["colorsys"]
    hide_package("json")
    assert json is sys.modules["json"], "what is imported already stays"
