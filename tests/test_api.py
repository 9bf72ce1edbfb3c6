"""The Python API: each function gives what its command gives, prints nothing on stdout, and imports little."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ftlib
from ftlib import api, api_reference
from ftlib.core import files, jsonl, permissions
from ftlib.core.lease import LeaseHeld, acquire_lease
from ftlib.core.paths import Site, find_site
from ftlib.runs.run import Run, create_run
from tests.conftest import FULL, REPOSITORY
from tests.merging import bare
from tests.training.test_resume import outcome

Ftlib = Callable[..., tuple[int, str, str]]
Command = Callable[..., str]
FUNCTIONS = [name for name in api.__all__ if inspect.isfunction(getattr(api, name))]
FEW = {"training.max_steps": 3, "checkpoint": {}}


@pytest.fixture
def command(ftlib: Ftlib) -> Command:
    """Run a command that must succeed; its stdout."""

    def run(*arguments: object) -> str:
        code, out, error = ftlib(*arguments)
        assert code == 0, error
        return out

    return run


@pytest.fixture
def quiet(capsys: pytest.CaptureFixture[str]) -> Callable[[], None]:
    """Check that nothing was printed on stdout since it was read last."""

    def check() -> None:
        assert capsys.readouterr().out == ""

    return check


def begin(config: Path) -> Run:
    """A run that has not been trained."""
    return create_run(api.load_config(config), find_site())


def test_the_chain_gives_what_the_commands_give(
    command: Command, quiet: Callable[[], None], write_config: Callable[..., Path], store: Path, shared: Path,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config, overrides = write_config(FULL), ("training.max_steps=3", "checkpoint={}")
    folder = Path(command("prepare", config, *overrides).strip())
    trained = Run(Path(command("train", config, *overrides).strip()))
    scores = json.loads(command("evaluate", trained.folder, "--json"))
    image = shared / "data" / json.loads((shared / "data" / "data.jsonl").read_text().splitlines()[0])["image"]
    answers = json.loads(command("predict", trained.folder, "--prompt", "which digit?", "--image", image, "--json"))
    shown = json.loads(command("status", "--json"))
    page = Path(command("report", trained.folder).strip())
    numbers = page.with_suffix(".csv").read_text()

    monkeypatch.setenv("FTLIB_STORE", str(tmp_path / "other"))
    prepared = ftlib.prepare(config, FEW)
    assert (folder / "data.json").read_text() == (prepared.folder / "data.json").read_text()
    monkeypatch.setenv("FTLIB_STORE", str(store))
    monkeypatch.setenv("FTLIB_RUNS", str(tmp_path / "runs"))
    assert ftlib.prepare(config, FEW).folder == folder
    for number in (signal.SIGTERM, signal.SIGUSR1):  # the commands above have installed theirs
        signal.signal(number, signal.SIG_DFL)
    run = ftlib.train(config, FEW)
    assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    assert run.folder != trained.folder and run.folder.name == trained.folder.name
    found = ftlib.evaluate(run)
    assert json.loads(json.dumps(found)) == scores
    assert outcome(run) == outcome(trained)
    happened = [[line["event"] for line in jsonl.read_jsonl_log(one.history)] for one in (run, trained)]
    assert happened[0] == happened[1] and {"start", "done", "evaluated"} <= set(happened[0])
    for place in ("predictions.jsonl", "scores.json"):
        files_of_both = [one.evaluation_folder("jsonl", "valid", "after") / place for one in (run, trained)]
        assert files_of_both[0].read_bytes() == files_of_both[1].read_bytes()
    assert json.loads(json.dumps(ftlib.evaluate(config, FEW, splits="valid"))) == scores
    assert ftlib.predict(run, {"prompt": "which digit?", "image": image}) == answers
    (state,) = ftlib.status()
    volatile = ("seconds_per_step", "rows_per_second", "tokens_per_second", "goodput")
    assert {**dataclasses.asdict(state), **dict.fromkeys(volatile)} == {**shown[0], **dict.fromkeys(volatile)}
    assert ftlib.report(run) == run.report and run.report.is_file()
    assert run.report.with_suffix(".csv").read_text().splitlines()[0] == numbers.splitlines()[0]
    before = jsonl.read_jsonl_log(run.history)
    assert ftlib.train(config, FEW) == run and jsonl.read_jsonl_log(run.history) == before
    quiet()


def test_submit_score_plan_and_merge_give_what_the_commands_give(
    command: Command, quiet: Callable[[], None], write_config: Callable[..., Path], store: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config = write_config(FULL)
    monkeypatch.chdir(tmp_path)
    sweep = {"sweep.seed": [0, 1]}
    dry = ftlib.submit(config, sweep, then=["evaluate"], executor="local", dry_run=True)
    assert len(dry.runs) == 2 and not dry.jobs and not dry.runs[0].folder.exists()
    quiet()
    arguments = ("submit", config, "sweep.seed=[0, 1]", "--then", "evaluate", "--executor", "local", "--dry-run")
    assert command(*arguments) == f"{dry.preview}\n"

    lines = [{"id": str(number), "references": ["a" if number % 2 else "b"]} for number in range(8)]
    (tmp_path / "references.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    for name, answer in (("one", "a"), ("two", "b")):
        told = [{"id": line["id"], "prediction": answer} for line in lines]
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in told))
    scores = ftlib.score("classify", "references.jsonl", "one.jsonl", against="two.jsonl", positive="a")
    quiet()
    arguments = ("--references", "references.jsonl", "--predictions", "one.jsonl", "--against", "two.jsonl")
    assert json.loads(command("score", "classify", *arguments, "--positive", "a", "--json")) == json.loads(
        json.dumps(scores)
    )
    with pytest.raises(ftlib.UserError, match="positive is for classify"):
        ftlib.score("text", "references.jsonl", "one.jsonl", positive="a")
    with pytest.raises(ftlib.UserError, match="clasify: no result files"):
        ftlib.score("clasify", "references.jsonl", "one.jsonl")

    plan = ftlib.plan(config, gpu="1GiB")
    quiet()
    assert json.loads(json.dumps(plan.to_json())) == json.loads(command("plan", config, "--gpu", "1GiB", "--json"))

    base = bare.random_weights(0)
    bare.save(tmp_path / "base", base)
    bare.save(tmp_path / "a", bare.tuned(base, 1))
    bare.save(tmp_path / "b", bare.tuned(base, 2))
    fields = {"base": Path("base"), "models": [{"model": "a"}, {"model": "b"}], "method": "task_arithmetic"}
    merged = ftlib.merge(fields, {"output": tmp_path / "merged"})
    quiet()
    options = ("--base", "base", "--model", "a", "b", "--method", "task_arithmetic", "-o", "again")
    again = Path(command("merge", *options).strip())
    assert (merged / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    assert ftlib.status() == [] and ftlib.stage(config).datasets["jsonl"].name == "data"
    quiet()


def test_a_config_may_be_a_mapping(write_config: Callable[..., Path], store: Path, tmp_path: Path) -> None:
    from ftlib.config import yaml12

    config = write_config(FULL)
    fields, _ = yaml12.load(config.read_text(), "")
    mapping = {**fields, "data": {**fields["data"], "root": Path(fields["data"]["root"])}}
    kept = json.dumps(mapping, default=str)
    overrides = {"training.learning_rate": np.float64(1e-3), "evaluation.splits": ("test",)}
    experiment = ftlib.load_config(mapping, overrides)
    texts = ["training.learning_rate=1e-3", "evaluation.splits=[test]"]
    assert experiment.identity == ftlib.load_config(config, texts).identity != ftlib.load_config(config).identity
    assert experiment.config.evaluation.splits == ["test"] and json.dumps(mapping, default=str) == kept


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({"training.sed": 1}, "overrides: training.sed: unknown key"),
        ({"sed": 1}, "overrides: sed: unknown key; did you mean seed?"),
        ({"seed": "1.5"}, "overrides: seed: must be a whole number"),
        ({"seed": object()}, "overrides: seed: must be a number, text, true or false, a list or a mapping"),
        ({"data.split": {"valid": {1}}}, "overrides: data.split.valid: must be a number"),
        ({"training.": 1}, "overrides: 'training.' is not a dotted key"),
        ({"name.first": 1}, "overrides: name.first: there is no such section"),
    ],
)
def test_a_wrong_override_is_named(
    write_config: Callable[..., Path], store: Path, overrides: dict[str, Any], told: str
) -> None:
    with pytest.raises(ftlib.UserError) as caught:
        ftlib.train(write_config(FULL), overrides)
    assert caught.value.problem.startswith(told)
    assert not list(store.glob("runs/*/*"))


def test_wrong_arguments_are_named(write_config: Callable[..., Path], store: Path, tmp_path: Path) -> None:
    config = write_config(FULL)
    begin(config)
    for call, told in (
        (lambda: ftlib.load_config({"name": "tiny", "sed": 1}), "config: sed: unknown key"),
        (lambda: ftlib.load_config(tmp_path / "none.yaml"), "no such config file"),
        (lambda: ftlib.train(ftlib.load_config(config), {"seed": 1}), "has been loaded already"),
        (lambda: ftlib.train(config, {"sweep": {"seed": [0, 1]}}), "this config defines several runs"),
        (lambda: ftlib.evaluate(config, splits="tests"), "splits: must be of train, valid, test"),
        (lambda: ftlib.evaluate(config), "not trained yet"),
        (lambda: ftlib.evaluate("tiny", {"seed": 2}), "only evaluation"),
        (lambda: ftlib.predict("tiny", [{"prompt": "a"}, {"image": "b"}]), r"questions\[1\]: field prompt: is missing"),
        (lambda: ftlib.report("nobody"), "nobody"),
        (lambda: ftlib.report([]), "report: no runs are named"),
        (lambda: ftlib.cancel([]), "cancel: no runs are named"),
        (lambda: ftlib.submit(config, executor="debug"), "executor: must be slurm or local"),
        (lambda: ftlib.submit(config, then="training"), "then: must be evaluate, report or both"),
        (lambda: ftlib.submit(config, retry=True, replace=True), "give one of them"),
        (lambda: ftlib.plan(config, gpu="big"), "big: not a size"),
    ):  # fmt: skip
        with pytest.raises(ftlib.UserError, match=told):
            call()
    assert ftlib.cancel("tiny") == []


def test_files_that_cannot_be_used_are_user_errors(
    write_config: Callable[..., Path], store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(FULL)
    (tmp_path / "file").touch()
    monkeypatch.setenv("FTLIB_RUNS", str(tmp_path / "file" / "runs"))
    with pytest.raises(ftlib.UserError, match="file"):
        ftlib.train(config)
    monkeypatch.setattr(api, "find_site", lambda: (_ for _ in ()).throw(NotADirectoryError(20, "", "/x/y")))
    with pytest.raises(ftlib.UserError, match="/x/y: cannot be read or written") as caught:
        ftlib.status()
    assert isinstance(caught.value.__cause__, NotADirectoryError)


def test_the_umask_is_limited_only_while_a_function_runs(
    write_config: Callable[..., Path], store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(api, "find_site", lambda: seen.append(permissions.read_umask()) or Site(store, store / "runs"))
    os.umask(0o002)
    ftlib.load_config(write_config(FULL))
    assert seen == [0o022] and permissions.read_umask() == 0o002


def test_a_run_of_other_code_is_refused(write_config: Callable[..., Path], store: Path) -> None:
    config = write_config(FULL)
    ftlib.prepare(config)
    run = begin(config)
    with files.atomic_directory(run.code) as folder:
        files.write_text(folder / "ftlib" / "__init__.py", "# older\n")
    with pytest.raises(ftlib.UserError, match="started with a different version of ftlib") as caught:
        ftlib.train(config)
    assert f"ftlib train {run.config_file}" in caught.value.remedy
    assert not run.history.exists() and not run.metrics.exists()


def test_a_run_at_work_is_refused(write_config: Callable[..., Path], store: Path) -> None:
    config = write_config(FULL)
    ftlib.prepare(config)
    run = begin(config)
    other = "import sys, time; from pathlib import Path; from ftlib.core.lease import acquire_lease\n"
    other += "with acquire_lease(Path(sys.argv[1])): print(1, flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", other, run.folder], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout and holder.stdout.readline()
        with pytest.raises(LeaseHeld):
            ftlib.train(config)
        holder.kill()


def test_an_interrupted_run_resumes(
    write_config: Callable[..., Path], store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ftlib.training import train as training_train

    config, overrides = write_config(FULL), {"training.max_steps": 4, "checkpoint": {"steps": 1}}
    ftlib.prepare(config)
    monkeypatch.setenv("FTLIB_RUNS", str(tmp_path / "straight"))
    straight = ftlib.train(config, overrides)
    monkeypatch.setenv("FTLIB_RUNS", str(tmp_path / "runs"))
    log_step = training_train._log_step

    def interrupt(*arguments: Any, **named: Any) -> None:
        log_step(*arguments, **named)
        (metrics,) = tmp_path.glob("runs/*/*/metrics.jsonl")
        if jsonl.read_jsonl_log(metrics)[-1]["step"] == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training_train, "_log_step", interrupt)
        ftlib.train(config, overrides)
    (folder,) = tmp_path.glob("runs/*/*")
    with acquire_lease(folder):
        pass  # it was given up
    run = ftlib.train(config, overrides)
    starts = [line for line in jsonl.read_jsonl_log(run.history) if line["event"] == "start"]
    assert len(starts) == 2 and starts[1]["step"] > 0
    assert outcome(run) == outcome(straight)


LIGHT = """
import sys, time
began = time.perf_counter()
import ftlib
assert not [name for name in sys.modules if name.startswith("ftlib.")], sys.modules
assert {"train", "submit", "Run"} <= set(dir(ftlib)) and "torch" not in sys.modules
try:
    ftlib.nothing
except AttributeError as error:
    assert "nothing" in str(error)
from ftlib import doctor
config = ftlib.load_config(sys.argv[1])
assert ftlib.submit(sys.argv[1], executor="local", dry_run=True).preview
run = ftlib.runs.run.create_run(config, ftlib.core.paths.find_site())
assert [one.state for one in ftlib.status()] == ["not started"]
assert ftlib.report(run).is_file() and ftlib.cancel(run) == []
heavy = {"torch", "transformers", "peft", "accelerate"} & set(sys.modules)
assert not heavy, heavy
"""


def test_import_is_light(store: Path, tmp_path: Path) -> None:
    config = REPOSITORY / "configs" / "digits.yaml"
    done = subprocess.run([sys.executable, "-c", LIGHT, config], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout, done.stderr


def test_names_are_offered_and_typed() -> None:
    assert set(ftlib.__all__) == {*api.__all__, "__version__"}
    assert all(getattr(ftlib, name) is getattr(api, name) for name in api.__all__)
    assert (REPOSITORY / "ftlib" / "py.typed").is_file()
    for name in FUNCTIONS:
        signature = inspect.signature(getattr(ftlib, name))
        assert signature.return_annotation is not signature.empty, name
        assert all(one.annotation is not one.empty for one in signature.parameters.values()), name
        assert inspect.getdoc(getattr(ftlib, name)), name
    text = (REPOSITORY / "ftlib" / "__init__.py").read_text()
    assert all(f"        {name},\n" in text for name in api.__all__), "for type checkers"


def test_the_reference_is_current() -> None:
    assert (REPOSITORY / "docs" / "api.md").read_text() == api_reference.markdown(), "make api-docs"
