"""Levels, cycles, shipped configs, README commands: what keeps the house in order."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from ftlib.__main__ import COMMANDS
from ftlib.config_file import load_experiment
from ftlib.site import Site
from tests.conftest import REPOSITORY

LEVELS = (
    ("ftlib", "errors", "yaml_core", "files", "disk", "site", "console", "config", "config_base", "config_course",
     "config_data", "config_file", "training_fields", "generation_fields", "job_options", "identity", "local_paths",
     "runs", "history", "ownership", "once", "environment", "command_line", "preemption", "pinning", "out_of_memory",
     "hashes", "packages", "job_memory", "gpu_architectures"),
    ("data", "tasks", "metrics", "submission", "reporting", "hub", "staging", "pushing"),
    ("models", "training", "evaluation", "memory", "merging", "diagnosis"),
    ("commands",),
    ("__main__",),
)  # fmt: skip
"""Level → the modules and packages of it; a module imports only from its own level or below."""


def modules() -> dict[str, Path]:
    """Dotted name → file of every module of ftlib."""
    paths = sorted((REPOSITORY / "ftlib").rglob("*.py"))
    return {".".join(p.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): p for p in paths}


def level(name: str) -> int:
    word = name.split(".")[1] if "." in name else name
    return next(number for number, words in enumerate(LEVELS) if word in words)


def imports(name: str, path: Path) -> set[str]:
    """The modules of ftlib that a module imports, anywhere in it."""
    known = modules()
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{name}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {module for module in found if module in known and module != name}


GRAPH = {name: imports(name, path) for name, path in modules().items()}


def test_every_module_has_a_level() -> None:
    for name in GRAPH:
        level(name)


def test_no_module_imports_from_a_level_above() -> None:
    wrong = [f"{name} imports {other}" for name in GRAPH for other in GRAPH[name] if level(other) > level(name)]
    assert not wrong


def test_no_command_imports_another() -> None:
    wrong = [
        name for name in GRAPH if name.startswith("ftlib.commands.") for other in GRAPH[name] if "commands" in other
    ]
    assert not wrong


def test_no_cycles() -> None:
    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        stack = list(GRAPH[start])
        while stack:
            name = stack.pop()
            if name not in seen:
                seen.add(name)
                stack += GRAPH[name]
        return seen

    assert not [name for name in GRAPH if name in reachable(name)]


def test_the_lower_levels_never_import_torch() -> None:
    heavy = re.compile(r"^\s*(import|from) (torch|transformers|peft|accelerate|safetensors)\b", re.MULTILINE)
    wrong = [name for name, path in modules().items() if level(name) < 2 and heavy.search(path.read_text())]
    assert not wrong


def test_every_command_has_its_module() -> None:
    files = {path.stem for path in (REPOSITORY / "ftlib" / "commands").glob("*.py")} - {"__init__"}
    assert files == set(COMMANDS)


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configs_load(path: Path) -> None:
    assert load_experiment(path, [], Site(Path("/store"), Path("/runs")), {}).config.name == path.stem
    assert path.read_text().startswith("# ftlib "), "the first comment is the command that runs it"


def commands_in(text: str) -> list[str]:
    """The lines of all shell blocks."""
    blocks = re.findall(r"```(?:sh|bash|console)\n(.*?)```", text, re.DOTALL)
    return [
        line.removeprefix("$ ").split("  #")[0].strip()
        for block in blocks
        for line in block.splitlines()
        if line.strip()
    ]


def test_readme_says_how_to_begin() -> None:
    found = [line.split("  ")[0] for line in commands_in((REPOSITORY / "README.md").read_text())]
    assert "make demo" in found and "make test" in found


@pytest.mark.parametrize("page", ["README.md", *[f"docs/{page.name}" for page in (REPOSITORY / "docs").glob("*.md")]])
def test_commands_of_the_pages_exist(page: str) -> None:
    targets = set(re.findall(r"^([a-z]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    for line in commands_in((REPOSITORY / page).read_text()):
        words = line.split()
        if words[0] == "make":
            assert words[1] in targets, line
        if words[0] == "ftlib":
            assert words[1] in COMMANDS, line
            for option in re.findall(r"--[a-z-]+", line):
                assert f'"{option}"' in modules()[f"ftlib.commands.{words[1]}"].read_text(), line
            for path in re.findall(r"\S+\.yaml", line):
                assert (REPOSITORY / path).is_file(), line
