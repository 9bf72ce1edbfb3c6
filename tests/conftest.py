"""Fixtures: a store with a tiny model and a few real digits, and ways to run ftlib as a user would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from xdist.scheduler import LoadFileScheduling

from ftlib.cli.main import main
from ftlib.core import imports, log, permissions
from tests import isolation, needs

REPOSITORY = Path(__file__).resolve().parent.parent

CONFIG = """\
name: tiny
task: classify
seed: 3
model: {family: paligemma, base: BASE}
adapter: ADAPTER
data:
  source: jsonl
  root: ROOT
  split: {valid: 0.2, test: 0.2}
training:
  max_steps: 12
  per_device_train_batch_size: 2
  gradient_accumulation_steps: 2
  learning_rate: 1.0e-2
  warmup_steps: 2
checkpoint: {steps: 3, keep: 2}
evaluation: {splits: [valid], max_new_tokens: 4, batch_size: 8}
"""
FULL = "{method: full, freeze: [projector]}"
LORA = "{method: lora, r: 4, alpha: 8, dropout: 0.1, freeze: []}"


COUNTS_AND_DIES = """
import os, signal, sys
from ftlib.evaluation.model import EvalModel
plain, log, deadly = EvalModel.generate, sys.argv[1], int(sys.argv[2])
calls = 0
def answer(self, rows, settings):
    global calls
    calls += 1
    found = plain(self, rows, settings)
    with open(log, "a") as file:
        file.write(f"{len(rows)}\\n")
    if calls == deadly:
        os.kill(os.getpid(), signal.SIGKILL)
    return found
EvalModel.generate = answer
from ftlib.__main__ import main
sys.exit(main(sys.argv[3:]))
"""


def counts_and_dies(log: Path, deadly: int, *command: object) -> list[str]:
    """A command line of ftlib that logs the number of rows of each batch and dies after a given one (0: never)."""
    return [sys.executable, "-c", COUNTS_AND_DIES, str(log), str(deadly), *map(str, command)]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of ours."""
    parser.addoption(
        "--ran", type=Path, help="write the names of the tests that ran, and were not skipped, to this file"
    )
    parser.addoption("--update-golden", action="store_true", help="write tests/golden/expected anew; read the diff")


def pytest_configure(config: pytest.Config) -> None:
    """Before anything is collected."""
    if (REPOSITORY / "jobs" / "site.env").exists():
        problem = "jobs/site.env is your site's, and tests would work in its store and queue"
        pytest.exit(f"{problem}. Run them in another checkout: git clone {REPOSITORY} /tmp/ftlib", returncode=2)
    if hasattr(config, "workerinput") or not config.option.numprocesses:  # the workers of xdist hide it themselves:
        isolation.hide_machine(gpus=config.option.markexpr == "long")  # they would take the hidden one for the machine
        config.add_cleanup(isolation.clean_up)
    if "FTLIB_TORCHVISION" in os.environ:
        from tests import torchvision_folder

        torchvision_folder.use(os.environ["FTLIB_TORCHVISION"])


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Before tests are chosen by their marks. The cluster's, which are one group, and files of training take longest:
    handed out last, one process would work on them alone for minutes.
    """
    folders = {item: item.path.relative_to(REPOSITORY / "tests").parts for item in items}
    items.sort(key=lambda item: ("cluster" not in folders[item], "training" not in folders[item]))
    for item in items:
        if "cluster" in folders[item]:
            item.add_marker("cluster")


@pytest.fixture(autouse=True)
def programs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the test's marks ask for is on PATH."""
    with pytest.MonkeyPatch.context() as patch:
        for name in needs.PROGRAMS:
            if request.node.get_closest_marker(name):
                patch.setenv("PATH", needs.path_with(name, tmp_path_factory.mktemp("programs") / name))
        yield


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """What was skipped and what enables it; with --ran, what was not."""
    stats = terminalreporter.stats
    reasons = [report.longrepr[2].removeprefix("Skipped: ") for report in stats.get("skipped", [])]
    terminalreporter.section("skipped")
    for line in needs.summary(reasons, "not long" in config.option.markexpr):
        terminalreporter.write_line(line)
    if path := config.getoption("ran"):
        path.write_text("".join(f"{report.nodeid}\n" for report in stats.get("passed", []) if report.when == "call"))


class Scheduling(LoadFileScheduling):
    """A file's tests share one process, and so do all of the cluster, which is one and has one user's home."""

    def _split_scope(self, nodeid: str) -> str:
        return "cluster" if nodeid.startswith("tests/cluster/") else super()._split_scope(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> Scheduling:
    """What hands the tests to the processes."""
    return Scheduling(config, log)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model/` (tiny, with dropout, so that random states matter) and `data/` (60 real digits)."""
    from ftlib.data.sources.toy import make_digits
    from ftlib.models.tiny import tiny_model, tiny_processor

    root = tmp_path_factory.mktemp("shared")
    (root / "data").mkdir()
    make_digits(root / "data")
    file = root / "data" / "data.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:60]))
    processor = tiny_processor()
    tiny_model(processor, attention_dropout=0.1).save_pretrained(root / "model")
    processor.save_pretrained(root / "model")
    return root


@pytest.fixture(autouse=True)
def process_state() -> Iterator[None]:
    """What a test sets in the environment is gone after it, and so is its umask: a command limits it for good.

    No command hides packages, which the next test may need.
    """
    before, mask = dict(os.environ), permissions.read_umask()
    log.configure("normal")  # functions are tested as commands call them
    with pytest.MonkeyPatch.context() as patch:  # of its own: a test's is undone before the fixtures that it asks for
        patch.setattr(imports, "hide_package", lambda _: None)
        patch.setattr(imports, "hide_while_importing", lambda *_: None)
        yield
    os.umask(mask)
    if os.environ != before:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty store that ftlib finds."""
    monkeypatch.setenv("FTLIB_STORE", str(tmp_path / "store"))
    monkeypatch.delenv("FTLIB_RUNS", raising=False)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    return tmp_path / "store"


@pytest.fixture
def write_config(shared: Path, tmp_path: Path) -> Callable[..., Path]:
    """Write a config on the shared model and data; `adapter`, `base`, `root` and exact replacements can be given."""

    def write(adapter: str = FULL, base: str = "", root: str = "", replace: tuple[str, str] = ("", "")) -> Path:
        text = CONFIG.replace("ADAPTER", adapter).replace("BASE", base or str(shared / "model"))
        text = text.replace("ROOT", root or str(shared / "data"))
        assert replace[0] in text
        path = tmp_path / "config.yaml"
        path.write_text(text.replace(*replace) if replace[0] else text)
        return path

    return write


@pytest.fixture
def ftlib(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command in this process: (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def start_ftlib(
    *arguments: object, program: Sequence[str] = ("-m", "ftlib"), **environment: str
) -> subprocess.Popen[str]:
    """Start a command as a process of its own, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, *program, *map(str, arguments)],
        env={**os.environ, **environment},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def read_lines(path: Path) -> list[dict[str, object]]:
    """The records of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
