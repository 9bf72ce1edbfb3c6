"""What a plugin declares, what is refused of it, and who may be run. Files are read, not run, unless a test says so."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ftlib.config.loader import load_experiment
from ftlib.config.schema import Config
from ftlib.core import plugins, registry
from ftlib.core.paths import Site
from ftlib.errors import UserError
from ftlib.runs.run import create_run, find_run
from tests.conftest import REPOSITORY

Ftlib = Callable[..., tuple[int, str, str]]

TASK = """\
from pathlib import Path
from ftlib.core.registry import register_task
from ftlib.tasks.base import Task

Path(__file__).with_name("ran").touch()

@register_task(name="errors", metrics={"rate": {"higher_is_better": False}})
def make_task():
    return Task(score=len)
"""
CONFIG = """\
name: plugged
task: errors
plugins: [plugin.py]
model: {family: causal, base: ftlib/tiny-neox}
adapter: {method: lora, r: 4, alpha: 8}
data: {source: jsonl, root: data}
training: {max_steps: 2}
"""


@pytest.fixture(autouse=True)
def _nothing_has_been_run() -> None:
    """A plugin runs once in a process; each test is to see that anew."""
    for name in [name for name in sys.modules if name.startswith("ftlib_plugin_")]:
        del sys.modules[name]


@pytest.fixture
def site(store: Path) -> Site:
    return Site(store, store / "runs")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "plugin.py").write_text(TASK)
    path = tmp_path / "own" / "plugged.yaml"
    path.write_text(CONFIG)
    return path


def declared(text: str) -> dict[str, dict[str, dict[str, object]]]:
    return plugins.declared(text.encode(), Path("p.py"))


def test_a_declaration_is_read_without_running_the_file() -> None:
    found = declared(TASK)
    assert found == {"task": {"errors": {"metrics": {"rate": {"higher_is_better": False}}}}}
    both = TASK + '\n@registry.register_source(name="s", split_names=True)\ndef examples(data): raise SystemExit\n'
    assert declared(both)["source"] == {"s": {"split_names": True}}


HEAD = '@register_task(name="x", metrics={"m": {"higher_is_better": True}}'
REFUSED = {
    "def f(:": "p.py:1: not valid Python",
    "x = 1": "registers nothing at the top level of the file",
    f"if True:\n    {HEAD})\n    def f(): ...": "registers nothing at the top level",
    "NAME = 'x'\n@register_task(name=NAME, metrics={})\ndef f(): ...": "p.py:2: register_task: name= is not a literal",
    "@register_task(name='x')\ndef f(): ...": "p.py:1: register_task: metrics= is missing",
    "@register_task(name='x', metrics={'m': True})\ndef f(): ...": "metrics= must be like",
    "@register_task(name='x', metrics={'loss': {'higher_is_better': False}})\ndef f(): ...": "cannot be a metric",
    "@register_task('x', metrics={})\ndef f(): ...": "takes only name=",
    f"{HEAD}, speed=1)\ndef f(): ...": "takes only name=",
    f"{HEAD}, closed_labels=1)\ndef f(): ...": "closed_labels= must be a bool",
    f"{HEAD})\ndef f(): ...\n{HEAD})\ndef g(): ...": "p.py:3: register_task: x is registered twice",
    "@register_source(name='a/b')\ndef examples(d): ...": "name= must be letters",
    "@register_source(name='a')\ndef rows(d): ...": "the function of a source is called examples, not rows",
    "@register_source(name='a', split_files='all')\ndef examples(d): ...": "split_files= must be",
    "@register_model(name='a', pipeline_tag='x')\ndef f(): ...": "model_class= is missing",
    "@register_model(name='a', model_class='A', pipeline_tag='x', parts=['head'])\ndef f(): ...": "parts= must be of",
    "(" * 5000: "p.py",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_no_declaration_is_refused(text: str) -> None:
    with pytest.raises(UserError) as refused:
        declared(text)
    assert REFUSED[text] in refused.value.problem


def test_names_are_checked_with_every_other_fault(config: Path, site: Site) -> None:
    with pytest.raises(UserError) as faults:
        load_experiment(config, ["task=errrors", "data.source=jsnl", "model.family=casual", "seed=x"], site)
    told = faults.value.problem
    assert "task: must be one of" in told and "did you mean errors?" in told
    assert "did you mean jsonl?" in told and "did you mean causal?" in told and "seed: must be a whole number" in told
    with pytest.raises(UserError, match=r"data\.parts\.0\.source: must be one of .* did you mean csv\?"):
        load_experiment(config, ["data={source: mixture, root: ., parts: [{name: a, source: csvv}]}"], site)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["plugins=[gone.py]"], "plugins.0: .*gone.py: the plugin cannot be read: No such file"),
        (["plugins=[x.txt]"], "x.txt: a plugin is a .py file"),
        (["plugins=plugin.py"], "plugins: must be a list"),
        (["plugins=[1]"], "plugins.0: must be a mapping"),
        (["plugins=[{sha256: x, registers: {}}]"], "plugins.0.sha256"),
        (["plugins=[{sha256: x, registers: [1]}]"], "plugins.0.registers: must be a mapping"),
        (["data.splits={valid: [a]}", "data.source=gqa"], "splits: source gqa has fixed official splits"),
    ],
)
def test_faults_of_the_key(config: Path, site: Site, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_experiment(config, overrides, site)


def test_a_plugin_cannot_replace_what_is_built_in(config: Path, site: Site) -> None:
    config.with_name("plugin.py").write_text(TASK.replace('"errors"', '"vqa"'))
    with pytest.raises(UserError, match="plugins: task vqa is already registered"):
        load_experiment(config, ["task=vqa"], site)
    config.with_name("plugin.py").write_text(TASK)
    config.with_name("two.py").write_text(TASK)
    folder = config.parent
    with pytest.raises(UserError, match="task errors is already registered"):
        load_experiment(config, [f"plugins=[{folder}/plugin.py, {folder}/two.py]"], site)


def test_keys_that_a_plugins_source_does_not_take_are_refused(config: Path, site: Site) -> None:
    source = '@register_source(name="own", split_names=True)\ndef examples(data): ...\n'
    config.with_name("plugin.py").write_text(source)
    own = ["task=vqa", "data.source=own"]
    load_experiment(config, [*own, "data.splits={valid: [a]}"], site)
    with pytest.raises(
        UserError, match="encoding: only for sources csv, instructions, jsonl; files of source own are UTF-8"
    ):
        load_experiment(config, [*own, "data.encoding=shift_jis"], site)


def identity(config: Path, site: Site, *overrides: str) -> str:
    return load_experiment(config, list(overrides), site).identity


def test_identity_is_of_the_content_not_of_the_place(config: Path, site: Site, tmp_path: Path) -> None:
    first = identity(config, site)
    (tmp_path / "else.py").write_text(TASK)
    assert identity(config, site, f"plugins=[{tmp_path}/else.py]") == first
    (tmp_path / "else.py").write_text(TASK + "# changed\n")
    assert identity(config, site, f"plugins=[{tmp_path}/else.py]") != first
    plain = identity(config, site, "task=vqa", "plugins=[]")
    config.write_text(CONFIG.replace("plugins: [plugin.py]\n", "").replace("errors", "vqa"))
    assert identity(config, site) == plain


def test_a_run_goes_on_with_its_own_copy(config: Path, site: Site) -> None:
    run = create_run(load_experiment(config, [], site), site)
    assert not config.with_name("ran").exists()
    config.with_name("plugin.py").unlink()
    own = load_experiment(run.config_file, [], site)
    assert own.identity == run.folder.name and Path(own.config.plugins[0].file).is_relative_to(run.folder)
    entry, make = registry.load("task", "errors", own.config.plugins)
    assert entry.metrics == {"rate": {"higher_is_better": False}} and make().score([1]) == 1
    assert registry.load("task", "errors", own.config.plugins)[1] is make


def test_what_was_changed_is_not_run(config: Path, site: Site) -> None:
    experiment = load_experiment(config, [], site)
    config.with_name("plugin.py").write_text(TASK + "# changed\n")
    with pytest.raises(UserError, match="the plugin has changed"):
        registry.load("task", "errors", experiment.config.plugins)
    with pytest.raises(UserError, match="the plugin has changed"):
        create_run(experiment, site)
    assert not config.with_name("ran").exists()


def test_a_failing_plugin_names_its_line(config: Path, site: Site, ftlib: Ftlib) -> None:
    config.with_name("plugin.py").write_text(TASK.replace("Path(__file__)", "1 / 0; Path(__file__)"))
    code, _, error = ftlib("prepare", "--check", config)
    assert code == 2 and f"{config.with_name('plugin.py')}:5: the plugin fails: ZeroDivisionError: division" in error
    assert "Traceback" not in error
    with pytest.raises(UserError):
        ftlib("prepare", "--check", config, "--debug")
    config.with_name("plugin.py").write_text(TASK.replace("return Task(score=len)", "return 5"))
    code, _, error = ftlib("prepare", "--check", config)
    assert code == 2 and "task errors: the function must return a Task, not int" in error
    config.with_name("plugin.py").write_text(TASK + "\nmake_task = registered = None\nimport ftlib.gone\n")
    code, _, error = ftlib("prepare", "--check", config)
    assert code == 2 and "plugin.py:12: the plugin fails: ModuleNotFoundError" in error


def test_commands_of_a_login_node_run_no_plugin(config: Path, store: Path, site: Site, ftlib: Ftlib) -> None:
    os.environ["FTLIB_RUNS"] = str(store / "runs")
    run = create_run(load_experiment(config, [], site), site)
    commands: list[tuple[object, ...]] = [
        ("stage", config), ("submit", config, "--dry-run", "--executor", "local"), ("status",), ("status", "--usage"),
        ("doctor", config), ("logs", "plugged"), ("cancel", "plugged"), ("report", "plugged"), ("clean", "plugged"),
        ("schema",),
    ]  # fmt: skip
    for command in commands:
        _, _, error = ftlib(*command)
        assert "Traceback" not in error and "plugin" not in error.lower().replace("plugged", ""), (command, error)
    assert not list(store.parent.rglob("ran")) and not any(name.startswith("ftlib_plugin_") for name in sys.modules)
    assert run.report.exists()


@pytest.mark.users
def test_a_colleagues_plugin_is_run_only_by_its_hash(config: Path, site: Site, ftlib: Ftlib) -> None:
    run = create_run(load_experiment(config, [], site), site)
    (copy,) = run.folder.glob("plugins/*/plugin.py")
    os.chown(copy, 12345, 12345)
    own = load_experiment(run.config_file, [], site).config
    with pytest.raises(UserError, match=r"is owned by 12345") as refused:
        registry.load("task", "errors", own.plugins)
    digits = own.plugins[0].sha256[:32]
    assert f"Read {copy}" in refused.value.remedy and f"--trust-code {digits}" in refused.value.remedy
    code, _, error = ftlib("prepare", "--check", run.config_file)
    assert code == 2 and "--trust-code" in error and not copy.with_name("ran").exists()
    code, _, error = ftlib("prepare", "--check", run.config_file, "--trust-code", digits[:31])
    assert code == 2 and "--trust-code" in error and not copy.with_name("ran").exists()
    code, _, error = ftlib("prepare", "--check", run.config_file, "--trust-code", digits)
    assert code == 2 and "data.jsonl" in error and copy.with_name("ran").exists()
    assert find_run(str(run.folder), site) == run


@pytest.mark.users
def test_a_colleagues_file_is_not_copied_into_an_own_run(config: Path, site: Site) -> None:
    os.chown(config.with_name("plugin.py"), 12345, 12345)
    with pytest.raises(UserError, match="is owned by 12345"):
        create_run(load_experiment(config, [], site), site)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with a plugin, as pip installs it; its module."""
    place = tmp_path / "packages"
    (place / "word_error").mkdir(parents=True)
    (place / "word_error" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    module = place / "word_error_plugin.py"
    module.write_text(TASK)
    info = place / "word_error-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: word-error\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text("[ftlib.plugins]\ntask:errors = word_error_plugin\n")
    (info / "RECORD").write_text("word_error_plugin.py,,\n")
    monkeypatch.syspath_prepend(str(place))
    return module


def test_plugins_of_packages(config: Path, site: Site, installed: Path, ftlib: Ftlib) -> None:
    config.write_text(CONFIG.replace("plugins: [plugin.py]\n", ""))
    assert '"errors"' in ftlib("schema")[1] and "errors" not in ftlib("schema", "--markdown")[1].split("`vqa`")[0]
    experiment = load_experiment(config, [], site)
    (plugin,) = experiment.config.plugins
    assert (plugin.package, plugin.module, plugin.file) == ("word-error==1.2", "word_error_plugin", "")
    run = create_run(experiment, site)
    assert (
        not installed.with_name("ran").exists()
        and load_experiment(run.config_file, [], site).identity == run.folder.name
    )
    assert registry.load("task", "errors", experiment.config.plugins)[0].name == "errors"
    assert installed.with_name("ran").exists()
    del sys.modules["word_error_plugin"]
    installed.write_text(TASK.replace("Path(__file__)", "1 / 0; Path(__file__)"))
    with pytest.raises(UserError, match=r"word_error_plugin\.py:5: the plugin fails: ZeroDivisionError"):
        registry.load("task", "errors", load_experiment(config, [], site).config.plugins)
    installed.write_text(TASK + "# changed\n")
    assert load_experiment(config, [], site).identity != run.folder.name
    own = load_experiment(run.config_file, [], site)
    assert own.identity == run.folder.name
    with pytest.raises(UserError, match="is not the plugin that this run was made with"):
        registry.load("task", "errors", own.config.plugins)


def test_a_runs_config_cannot_name_a_module_that_is_no_plugin(config: Path, site: Site) -> None:
    own = {"package": "os==1", "module": "os", "sha256": "0" * 64, "registers": {"task": {"errors": TASK_FACTS}}}
    facts = load_experiment(config, [], site).config.model_dump() | {"plugins": [own]}
    with pytest.raises(UserError, match="os==1, which registers task errors, is not installed here"):
        registry.load("task", "errors", Config.model_validate(facts).plugins)


TASK_FACTS = {"metrics": {"rate": {"higher_is_better": False}}}


def test_nothing_is_said_of_plugins_by_help(tmp_path: Path, installed: Path) -> None:
    import subprocess

    code = "import sys; from ftlib.cli.main import main; main(['--help']); "
    code += "print([name for name in sys.modules if 'plugin' in name])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
