"""Levels, cycles, shipped configs, README commands: what keeps the house in order."""

from __future__ import annotations

import ast
import pickle
import re
from pathlib import Path

import pytest

from ftlib import __main__
from ftlib.cli.main import COMMANDS
from ftlib.config.loader import load_experiment
from ftlib.core.paths import Site
from ftlib.slurm import executors
from tests.conftest import REPOSITORY

ROOMS = (
    ("ftlib", "errors", "run_module"),
    ("core",),
    ("config",),
    ("metrics",),
    ("runs", "hub"),
    ("data",),
    ("tasks",),
    ("slurm",),
    ("models",),
    ("memory",),
    ("evaluation",),
    ("training", "merging"),
    ("reports", "doctor", "staging", "preparation"),
    ("api",),
    ("cli", "api_reference"),
    ("__main__", "submission"),
)
"""Packages and modules of ftlib from the lowest on; each imports from itself and from those before its row."""

HEAVY = re.compile(r"^\s*(import|from) (torch|transformers|peft|accelerate|safetensors)\b", re.MULTILINE)
MAY_IMPORT_TORCH = ("models", "memory", "evaluation", "training", "merging")
BUT_NOT = ("ftlib.merging.recipe",)
IN_FUNCTIONS = ("ftlib.doctor", "ftlib.preparation")
"""What imports torch only when it is called: the check of GPUs, and masks that are turned into codes."""


def modules() -> dict[str, Path]:
    """Dotted name → file of every module of ftlib."""
    paths = sorted((REPOSITORY / "ftlib").rglob("*.py"))
    return {".".join(p.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): p for p in paths}


def room(name: str) -> str:
    return name.split(".")[1] if "." in name else name


def level(name: str) -> int:
    return next(number for number, rooms in enumerate(ROOMS) if room(name) in rooms)


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


GRAPH = {name: imports(name, path) for name, path in modules().items() if name != "ftlib"} | {"ftlib": set()}
"""Without what `import ftlib` offers lazily; tests/test_api.py checks that it imports nothing."""


def test_every_module_has_a_room() -> None:
    for name in GRAPH:
        level(name)


def test_rooms_import_only_from_those_before_them() -> None:
    wrong = [
        f"{name} imports {other}"
        for name in GRAPH
        for other in GRAPH[name]
        if level(other) >= level(name) and room(other) != room(name)
    ]
    assert not wrong


def test_no_command_imports_another() -> None:
    wrong = [
        name
        for name in GRAPH
        if name.startswith("ftlib.cli.")
        for other in GRAPH[name]
        if room(other) == "cli" and other not in ("ftlib.cli", "ftlib.cli.arguments")
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


def test_only_rooms_of_models_import_torch() -> None:
    for name, path in modules().items():
        if room(name) in MAY_IMPORT_TORCH and name not in BUT_NOT:
            continue
        text = path.read_text()
        if name in IN_FUNCTIONS:
            assert all(line[0] == " " for line in (match[0].strip("\n") for match in HEAVY.finditer(text))), name
        else:
            assert not HEAVY.search(text), name


def test_templates_are_rendered_by_reports_alone() -> None:
    """So that no other command waits for jinja2 to be imported."""
    importing = re.compile(r"^(import|from) (jinja2|markupsafe)\b", re.MULTILINE)
    assert {room(name) for name, path in modules().items() if importing.search(path.read_text())} == {"reports"}
    users = {name for name in GRAPH if any(room(other) == "reports" for other in GRAPH[name])}
    assert {name for name in users if room(name) != "reports"} == {"ftlib.cli.report", "ftlib.cli.audit", "ftlib.api"}
    api = modules()["ftlib.api"].read_text()
    assert not re.search(r"^from ftlib\.reports", api, re.MULTILINE), "only when a report is written"


def calls_that_may_run_code(text: str) -> list[str]:
    """Uses of from_pretrained and from_config without trust_remote_code=False; peft's configs know no such code."""
    loaders, safe, found = ("from_pretrained", "from_config", "pipeline"), set(), []
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and any(
            word.arg == "trust_remote_code" and isinstance(word.value, ast.Constant) and word.value.value is False
            for word in node.keywords
        ):
            safe |= {id(part) for part in (node.func, *node.args)}  # a call, or functools.partial of one
    for node in ast.walk(tree):
        name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
        of = ast.unparse(node.value) if isinstance(node, ast.Attribute) else ""
        if name in loaders and id(node) not in safe and of not in ("LoraConfig", "PeftModel"):
            found.append(ast.unparse(node))
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code" and ast.unparse(node.value) != "False":
            found.append(ast.unparse(node))
    return found


def test_no_code_of_models_is_run() -> None:
    programs = [*modules().values(), *(REPOSITORY / "tests" / "gpu").glob("*.py")]
    programs += (REPOSITORY / "tests" / "benchmarks").rglob("*.py")
    assert not {str(path): found for path in programs if (found := calls_that_may_run_code(path.read_text()))}
    wrong = ("AutoConfig.from_pretrained(x)", "f = A.from_config", "pipeline('text')", "A.from_pretrained(x, **given)")
    wrong += ("A.from_pretrained(x, trust_remote_code=True)", "A.from_pretrained(x, trust_remote_code=flag)")
    for text in wrong:
        assert calls_that_may_run_code(text), text
    assert not calls_that_may_run_code("A.from_pretrained(x, trust_remote_code=False)")


def test_every_command_has_its_module() -> None:
    files = {path.stem for path in (REPOSITORY / "ftlib" / "cli").glob("*.py")} - {"__init__", "arguments", "main"}
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
                assert f'"{option}"' in modules()[f"ftlib.cli.{words[1]}"].read_text(), line
            for path in re.findall(r"\S+\.yaml", line):
                assert (REPOSITORY / path).is_file(), line


def test_names_that_other_versions_call_stay() -> None:
    """A run goes on with the code that it began with: images, queued jobs and newer code call it by these names."""
    assert "ftlib = ftlib.__main__:main" in (REPOSITORY / "setup.cfg").read_text()
    assert __main__.main(["--version"]) == 0
    assert (REPOSITORY / "ftlib" / "run_module.py").is_file()
    assert pickle.loads(b"cftlib.submission.launch\nrun_stage_command\n.") is executors.run_stage_command
