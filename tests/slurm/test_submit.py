"""`ftlib submit` from the command line, against programs that answer like Slurm's."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ftlib.core import files, jsonl
from ftlib.core.environment import process_start
from ftlib.core.paths import Site
from ftlib.errors import UserError
from ftlib.runs import pinning
from ftlib.runs.run import Run
from ftlib.slurm import executors, intents, requirements
from ftlib.slurm import submit as slurm_submit
from tests.conftest import REPOSITORY
from tests.slurm.fake_slurm import FakeSlurm, queued

Submit = Callable[..., tuple[int, str, str]]
REQUIRE_STARTABLE = requirements.require_startable
FOUR = ("sweep.seed=[0, 1]", "sweep.data.prompt=['a {prefix}', 'b {prefix}']")


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{fake.folder}:{os.environ['PATH']}")
    monkeypatch.setattr(intents, "SECONDS_BETWEEN_LOOKUPS", 0.0)
    monkeypatch.setattr(requirements, "require_startable", lambda *_: None)  # no image, no data; see below
    return fake


@pytest.fixture
def submit(ftlib: Submit, config_file: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Submit:
    """Run the command in an empty folder."""
    (tmp_path / "work here").mkdir()
    monkeypatch.chdir(tmp_path / "work here")
    return lambda *arguments: ftlib("submit", config_file, *arguments)


def runs(store: Path) -> list[Run]:
    """All runs, in the order of their jobs."""
    found = [Run(path.parent) for path in store.glob("runs/*/tiny/*/config.yaml")]
    return sorted(found, key=lambda run: jsonl.read_jsonl_log(run.history)[0]["job"])


def make_startable(store: Path) -> None:
    """What another process, in which nothing is patched, looks for before it submits."""
    for folder in ("images", "data"):
        (store / folder).mkdir(parents=True, exist_ok=True)
    (store / "images" / "ftlib.sif").touch()
    (store / "data" / "data.jsonl").touch()


def finish(run: Run) -> None:
    run.done_marker.write_text("{}")
    for split in ("valid", "test"):
        with files.atomic_directory(run.evaluation_folder("jsonl", split, "after")) as folder:
            (folder / "scores.json").write_text("{}")


def test_a_sweep_is_one_array(submit: Submit, slurm: FakeSlurm, store: Path, tmp_path: Path) -> None:
    code, out, err = submit(*FOUR, "job.array_parallelism=3")
    assert (code, out) == (0, "71\n"), err
    assert "4 runs: 4 missing" in err
    (script,) = slurm.scripts()
    assert "#SBATCH --array=0-3%3\n" in script
    folder = tmp_path / "work here" / "logs" / "tiny"
    code_folder = re.search(r"^FTLIB_JOBS=(.*)/jobs$", script, re.MULTILINE)
    assert code_folder and (Path(code_folder[1]) / "ftlib" / "__main__.py").is_file()
    for number, run in enumerate(runs(store)):
        (event,) = jsonl.read_jsonl_log(run.history)
        assert (event["event"], event["job"]) == ("submitted", f"71_{number}")
        assert event["log"] == str(folder / f"71_{number}_0_log.out")


def test_only_strings_and_a_name_are_pickled(submit: Submit, slurm: FakeSlurm, store: Path, tmp_path: Path) -> None:
    """Any Python reads it that can import the function."""
    submit(*FOUR)
    for number, run in enumerate(runs(store)):
        path = tmp_path / "work here" / "logs" / "tiny" / f"71_{number}_submitted.pkl"
        with path.open("rb") as file:
            pickled = pickle.load(file)
        assert pickled.function is executors.run_stage_command
        config = str(run.config_file)
        assert pickled.args == ([[name, config] for name in ("stage", "prepare", "train", "evaluate")],)
        assert b"CodeType" not in path.read_bytes() and b"PosixPath" not in path.read_bytes()


def test_a_job_whose_snapshot_was_changed_is_refused(tmp_path: Path) -> None:
    site = Site(tmp_path / "store", tmp_path / "runs")
    target = pinning.snapshot_folder(REPOSITORY, site)
    pinning.take_snapshot(REPOSITORY, target, site)
    step = "from ftlib.slurm.executors import run_stage_command as run; run([['schema']])"

    def start() -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(target), "FTLIB_STEP": "schema"}
        command = [sys.executable, "-c", step]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    assert start().returncode == 0
    page = target / "ftlib" / "cli" / "schema.py"
    page.write_text(page.read_text().replace("return 0", "return 7"))
    done = start()
    assert done.returncode == 2 and "this snapshot of the code has been changed since it was made" in done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""


def test_in_a_job_the_step_becomes_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    became: list[object] = []
    monkeypatch.setattr(os, "execv", lambda *arguments: became.append(arguments))
    monkeypatch.setenv("FTLIB_STEP", "train")
    executors.run_stage_command([["stage", "c.yaml"], ["train", "c.yaml"]])
    program = str(REPOSITORY / "ftlib" / "run_module.py")
    assert became == [(sys.executable, [sys.executable, program, "-m", "ftlib", "train", "c.yaml"])]


def test_nothing_is_inherited_from_a_surrounding_job(
    submit: Submit, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_CPUS_PER_TASK", "SBATCH_PARTITION", "SBATCH_MEM_PER_NODE", "PMIX_RANK"):
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("SLURM_CONF", "/etc/x.conf")
    assert submit()[0] == 0
    inherited = slurm.environment(71)
    assert not [name for name in inherited if re.match("SBATCH_|PMIX_|SLURM_(?!CONF)", name)]
    assert inherited["SLURM_CONF"] == "/etc/x.conf"
    assert "#SBATCH --partition=7\n" in slurm.scripts()[0], "what the user chose for jobs holds all the same"
    assert os.environ["SLURM_JOB_ID"] == "7"


def test_what_is_exported_to_jobs_stands_in_no_script(
    submit: Submit, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBATCH_EXPORT", "ALL,HF_TOKEN=secret")
    assert "secret" not in submit("--dry-run")[1]
    assert submit()[0] == 0
    assert slurm.environment(71)["SBATCH_EXPORT"] == "ALL,HF_TOKEN=secret"
    assert "secret" not in slurm.scripts()[0]


def test_only_what_is_missing_is_submitted_again(submit: Submit, slurm: FakeSlurm, store: Path) -> None:
    submit(*FOUR)
    one, two, three, four = runs(store)
    finish(one)
    three.log_event("start", command="train", job="71_2", gpus=0)
    slurm.answers(sacct="71_1|RUNNING|0:0|None|n1|5\n71_2|FAILED|1:0|None|n1|5\n71_3|CANCELLED by 5|0:0|None|n1|5\n")
    _, out, err = submit(*FOUR)
    assert "4 runs: 1 finished, 1 queued or running, 1 failed, 1 missing" in err
    assert "--retry resumes them" in err
    assert out == "72\n"
    assert [jsonl.read_jsonl_log(run.history)[-1]["job"] for run in (one, two, three, four)] == [
        "71_0", "71_1", "71_2", "72"
    ]  # fmt: skip
    slurm.answers(sacct="71_1|RUNNING|0:0|None|n1|5\n71_2|FAILED|1:0|None|n1|5\n72|PENDING|0:0|None||0\n")
    assert submit(*FOUR)[1] == ""
    assert submit(*FOUR, "--retry")[1] == "73\n"
    assert three.config_file.exists()


@pytest.mark.parametrize(
    ("line", "events", "sent"),
    [
        ("71|FAILED|75:0|None|n1|5", [], True),
        ("71|NODE_FAIL|0:0|None|n1|5", [], True),
        ("71|TIMEOUT|0:0|None|n1|5", [], True),
        ("71|OUT_OF_MEMORY|0:125|None|n1|5", [], True),
        ("71|OUT_OF_MEMORY|0:125|None|n1|5", ["start"], False),
        ("71|FAILED|2:0|None|n1|5", [], True),
        ("71|FAILED|2:0|None|n1|5", ["failed"], True),
        ("71|COMPLETED|0:0|None|n1|5", [], True),
        ("71|REQUEUED|0:0|None|n1|5\n71|PENDING|0:0|BeginTime|n1|0", [], False),
        ("", [], True),
        ("", ["start", "diverged", "gave up"], False),
        ("", ["start", "diverged"], True),
        ("", ["start", "preempted"], True),
        ("71|CANCELLED by 0|0:0|None|n1|5", ["start", "killed"], True),
    ],
)
def test_what_counts_as_missing(
    submit: Submit, slurm: FakeSlurm, store: Path, line: str, events: list[str], sent: bool
) -> None:
    submit()
    (run,) = runs(store)
    for event in events:
        run.log_event(event, command="train", reason="x", job="71", signal="SIGTERM", step=0, gpus=0)
    slurm.answers(sacct=line)
    assert submit()[1] == ("72\n" if sent else "")


@pytest.mark.parametrize(
    ("train", "sent"),
    [("FAILED|2:0", False), ("OUT_OF_MEMORY|0:125", False), ("TIMEOUT|0:0", True), ("FAILED|75:0", True)],
)
def test_a_chain_is_judged_by_what_ended_it(
    submit: Submit, slurm: FakeSlurm, store: Path, train: str, sent: bool
) -> None:
    """The evaluation is cancelled by Slurm when the training that it waits for did not end well."""
    submit("--then", "evaluate")
    runs(store)[0].log_event("start", command="train", job="71", gpus=0)
    slurm.answers(sacct=f"71|{train}|None|n1|5\n72|CANCELLED by 0|0:0|Dependency||0\n")
    assert bool(submit("--then", "evaluate")[1]) is sent
    if not sent:
        submit("--then", "evaluate", "--retry")
    slurm.answers(sacct=f"71|{train}|None|n1|5\n73|CANCELLED by 5|0:0|None||0\n74|CANCELLED by 5|0:0|None||0\n")
    assert submit()[1] == "75\n", "the user took it back"


@pytest.mark.parametrize(
    ("line", "events", "sent"),
    [
        ("9|RUNNING|0:0|None|n1|5", ["start"], False),
        ("9|PENDING|0:0|None||0", ["start", "preempted"], False),
        ("9|RUNNING|0:0|None|n1|5", ["start", "failed"], True),
        ("9|TIMEOUT|0:0|None|n1|5", ["start"], True),
    ],
)
def test_a_run_begun_by_another_job_is_at_work(
    submit: Submit, slurm: FakeSlurm, store: Path, line: str, events: list[str], sent: bool
) -> None:
    submit()
    (run,) = runs(store)
    run.history.unlink()
    for event in events:
        run.log_event(event, job="9", command="train")
    slurm.answers(sacct=line)
    if not sent:
        assert submit("--replace")[0] == 2 and run.history.exists()
    assert bool(submit("--retry")[1]) is sent


def test_a_run_with_a_living_owner_is_at_work(submit: Submit, slurm: FakeSlurm, store: Path) -> None:
    submit()
    (run,) = runs(store)
    files.write_json(run.owner, {"host": "elsewhere", "pid": 1, "started": "1", "job": None, "token": "x"})
    assert submit()[1] == "" and submit("--replace")[0] == 2
    os.utime(run.owner, (1, 1))
    assert submit()[1] == "72\n"


def test_another_process_with_the_number_of_an_old_one_is_not_it(submit: Submit, slurm: FakeSlurm, store: Path) -> None:
    submit()
    (run,) = runs(store)
    here = {"job": str(os.getpid()), "executor": "local"}
    run.log_event("submitted", **here, started=process_start(os.getpid()))
    assert submit()[1] == ""
    run.log_event("cancelled", by="ann", job=None)
    assert submit("--dry-run")[1], "its process passes it over"
    run.history.unlink()
    run.log_event("submitted", **here, started="1")
    assert submit()[1] == "72\n"


def test_status_and_submit_agree_where_a_node_has_another_name(
    submit: Submit,
    slurm: FakeSlurm,
    store: Path,
    ftlib: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Slurm's name of a node need not be the host's: `submit` in a job sent a run again that was waiting there."""
    submit()
    (run,) = runs(store)
    run.history.unlink()
    monkeypatch.setenv("SLURMD_NODENAME", "node-of-another-name")
    run.log_event("submitted", job=str(os.getpid()), executor="local", started=process_start(os.getpid()))
    assert json.loads(ftlib("status", "--json")[1])[0]["state"] == "queued"
    code, output, error = submit()
    assert (code, output) == (0, "") and "1 queued or running" in error


def test_a_trained_run_without_its_scores_is_missing(submit: Submit, slurm: FakeSlurm, store: Path) -> None:
    submit()
    (run,) = runs(store)
    run.done_marker.write_text('{"step": 1}')
    assert submit()[1] == "72\n"
    finish(run)
    assert submit()[1] == ""


def test_replace_begins_anew_but_not_what_is_at_work(submit: Submit, slurm: FakeSlurm, store: Path) -> None:
    submit()
    (run,) = runs(store)
    finish(run)
    assert submit("--replace")[1] == "72\n"
    assert not run.done_marker.exists()
    slurm.answers(sacct="72|RUNNING|0:0|None|n1|5\n")
    (run.folder / "kept").touch()
    code, _, err = submit("--replace")
    assert code == 2 and "cannot be replaced" in err
    assert (run.folder / "kept").exists()


def refuse(slurm: FakeSlurm, number: int = 0) -> None:
    """From the job with this number on."""
    (slurm.folder / "refusal").write_text("sbatch: error: no\n")
    (slurm.folder / "refused-from").write_text(str(number))


def test_what_is_replaced_stays_until_something_takes_its_place(submit: Submit, slurm: FakeSlurm, store: Path) -> None:
    submit(*FOUR)
    before = runs(store)
    for run in before:
        finish(run)
    refuse(slurm)
    assert submit(*FOUR, "--replace")[0] == 2
    assert runs(store) == before and all(run.done_marker.exists() for run in before)
    assert not [path for run in before for path in run.folder.glob("owner*")]
    slurm.answers(scontrol="MaxArraySize = 3\n")
    refuse(slurm, 73)
    assert submit(*FOUR, "--replace")[0] == 2, "three were taken, the last was not"
    assert [run.done_marker.exists() for run in before] == [False, False, False, True]
    assert not list(store.glob("runs/*/.replaced-*"))


KILLED_WHILE_REPLACING = """
import os, signal, sys
from ftlib.slurm import executors, intents, requirements
from ftlib.slurm import submit as slurm_submit
from ftlib.runs.run import Run
plain, taken = Run.log_event, []
def note(self, event, **details):
    plain(self, event, **details)
    taken.append(event)
    if len(taken) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] == "sending":
    Run.log_event = note
else:
    executors._sbatch = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
from ftlib.cli.main import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(("where", "back"), [("before", [True] * 4), ("sending", [False, True, True, True])])
def test_a_replacement_that_was_killed_is_undone_where_nothing_has_begun(
    submit: Submit, slurm: FakeSlurm, store: Path, config_file: Path, where: str, back: list[bool], ftlib: Submit
) -> None:
    """Killed before any job was taken, or when one run's history told of its job and the others' did not yet."""
    submit(*FOUR)
    before = runs(store)
    for run in before:
        finish(run)
        files.write_json(run.done_marker, {"step": 1})
    make_startable(store)
    command = [sys.executable, "-c", KILLED_WHILE_REPLACING, where, "submit", config_file, *FOUR, "--replace"]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    (aside,) = store.glob("runs/*/.replaced-*")
    assert len(list(aside.glob("*/*"))) == 4
    assert submit(*FOUR, "--dry-run")[0] == 0 and aside.exists()
    owner = aside / "owner.json"
    dead = files.read_json(owner)
    files.write_json(owner, {**dead, "pid": os.getpid(), "started": process_start(os.getpid())})
    assert ftlib("clean", "--yes")[0] == 0 and len(list(aside.glob("*/*"))) == 4, "it may be at work still"
    files.write_json(owner, dead)
    _, _, err = ftlib("clean", "--yes")
    assert err.count("restored, because the --replace that moved it was interrupted") == sum(back)
    assert [run.done_marker.exists() for run in before] == back and set(runs(store)) == set(before)
    assert not [*store.glob("runs/*/.replaced-*"), *store.glob("runs/*/.deleted-*")]


def test_a_deletion_that_was_killed_is_finished(submit: Submit, slurm: FakeSlurm, store: Path) -> None:
    submit()
    (run,) = runs(store)
    left = run.folder.parent.parent / ".deleted-1" / "tiny" / run.folder.name
    left.mkdir(parents=True)
    old = run.folder.parent.parent / ".replaced-1" / "0"
    old.mkdir(parents=True)
    (old / "config.yaml").touch()
    submit()
    assert not left.parent.parent.exists() and old.exists(), "an older ftlib's is nobody's, and stays"


def test_what_was_taken_before_a_refusal_is_known(submit: Submit, slurm: FakeSlurm, store: Path) -> None:
    refuse(slurm, 72)
    code, _, err = submit(*FOUR, "--then", "evaluate")
    assert code == 2 and "submitted before the error: slurm job 71" in err
    assert [jsonl.read_jsonl_log(run.history)[-1]["job"] for run in runs(store)] == [f"71_{n}" for n in range(4)]
    slurm.answers(sacct="71_[0-3]|PENDING|0:0|None||0\n")
    assert submit(*FOUR)[1] == ""


def test_when_slurm_does_not_answer_nothing_is_submitted(submit: Submit, slurm: FakeSlurm) -> None:
    submit()
    slurm.answers(sacct=None, squeue=None)
    code, _, err = submit()
    assert code == 2 and "cannot check earlier jobs: squeue: Unable to contact slurm controller" in err
    assert len(slurm.scripts()) == 1


def test_refusals_come_in_slurms_words(submit: Submit, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    (slurm.folder / "refusal").write_text("sbatch: error: invalid partition specified: x\n")
    code, _, err = submit("job.partition=x")
    assert code == 2 and "invalid partition specified: x" in err and "Traceback" not in err
    monkeypatch.setenv("PATH", "/nowhere")
    code, _, err = submit()
    assert code == 2 and "--executor local" in err


def test_arrays_are_cut_to_the_sites_limits(submit: Submit, slurm: FakeSlurm) -> None:
    slurm.answers(scontrol="MaxArraySize = 3\n")
    code, out, _ = submit(*FOUR, "job.array_parallelism=2")
    assert (code, out) == (0, "71\n72\n")
    first, second = slurm.scripts()
    assert "--array=0-2%2" in first and "--dependency" not in first
    assert "--array" not in second and "--dependency=afterany:71" in second


def test_what_slurm_does_not_take_now_is_left_for_later(submit: Submit, slurm: FakeSlurm, store: Path) -> None:
    slurm.answers(sacctmgr="lab|||5\n", squeue=queued("1") + queued("2"))
    _, _, err = submit(*FOUR)
    assert "Slurm accepts 3 more jobs from you now (MaxSubmitJobs): submitting 3 of 4 runs." in err
    assert len(runs(store)) == 3
    mine = "".join(map(queued, ("71_0", "71_1", "71_2")))
    slurm.answers(sacct="71_[0-2]|PENDING|0:0|None||0\n", squeue=queued("1") + queued("2") + mine)
    code, _, err = submit(*FOUR)
    assert code == 2 and "Slurm accepts 0 more jobs" in err
    slurm.answers(squeue=mine)
    assert submit(*FOUR)[1] == "72\n"


def test_a_chain(submit: Submit, slurm: FakeSlurm, store: Path) -> None:
    code, out, _ = submit(*FOUR, "--then", "evaluate,report")
    assert (code, out) == (0, "71\n72\n73\n")
    train, evaluate, report = slurm.scripts()
    assert "--dependency" not in train and "run_submitted stage+prepare+train python3" in train
    assert "--dependency=aftercorr:71\n" in evaluate and "--kill-on-invalid-dep=yes" in evaluate
    assert "--dependency=afterany:71:72\n" in report and "--gres" not in report
    for number, run in enumerate(runs(store)):
        *jobs, report = jsonl.read_jsonl_log(run.history)
        assert [event["job"] for event in jobs] == [f"71_{number}", f"72_{number}"]
        assert (report["event"], report["report"]) == ("report submitted", "73")
    assert submit("--then", "train")[0] == 2


def test_a_dry_run_prints_what_is_submitted_and_does_nothing(
    submit: Submit, slurm: FakeSlurm, store: Path, tmp_path: Path
) -> None:
    arguments = (*FOUR, "--then", "evaluate")
    code, out, _ = submit(*arguments, "--dry-run")
    assert code == 0 and not slurm.scripts()
    assert not list(store.rglob("*")) and not list((tmp_path / "work here").iterdir())
    submit(*arguments)
    for number, script in enumerate(slurm.scripts(), 1):
        plain = re.sub(r"--job-name=tiny-[0-9a-f]{6}-[0-9a-f]{8}\n", "--job-name=tiny\n", script)
        assert plain != script and plain.replace("aftercorr:71", "aftercorr:ARRAY1") in out, f"script {number}"
    for run in runs(store):
        assert f"ftlib train {run.config_file}\n" in out
    assert f"# tiny/{runs(store)[1].folder.name}: seed=0 data.prompt=b {{prefix}}\n" in out


def test_a_dry_run_needs_no_slurm(submit: Submit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    code, out, err = submit("--dry-run")
    assert code == 0 and "run_submitted stage+prepare+train+evaluate python3" in out
    assert "Slurm is not available (scontrol is not in PATH)" in err


def test_a_snapshot_holds_the_code_of_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site_env = "FTLIB_STORE=/x\n"
    clone = tmp_path / "clone"
    for part in ("ftlib", "jobs"):
        shutil.copytree(REPOSITORY / part, clone / part)
    (clone / "jobs" / "site.env").write_text(site_env)
    monkeypatch.chdir(clone)
    assert pinning.find_clone() == clone
    target = pinning.snapshot_folder(clone, Site(tmp_path, tmp_path / "runs"))
    pinning.take_snapshot(clone, target, Site(tmp_path, tmp_path / "runs"))
    assert (target / "jobs" / "run.sh").is_file() and not (target / "jobs" / "site.env").exists()
    assert not list(target.rglob("__pycache__"))
    edited = clone / "ftlib" / "__init__.py"
    edited.write_text(edited.read_text() + "# edited\n")
    assert pinning.snapshot_folder(clone, Site(tmp_path, tmp_path / "runs")) != target
    with pytest.raises(UserError, match="is not what is installed here"):
        pinning.find_clone()


LOST = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation\n"


def intents_left(store: Path) -> list[Path]:
    return [path for path in store.glob("runs/*/.submissions/*") if path.name != "owner.json"]


def test_a_job_whose_id_was_lost_is_found_by_its_name(
    submit: Submit, slurm: FakeSlurm, store: Path, tmp_path: Path
) -> None:
    (slurm.folder / "lost").write_text(LOST)
    code, out, err = submit(*FOUR)
    assert (code, out) == (0, "71\n") and "sbatch's answer is lost" in err
    assert [jsonl.read_jsonl_log(run.history)[-1]["job"] for run in runs(store)] == [f"71_{n}" for n in range(4)]
    assert not intents_left(store)
    folder = tmp_path / "work here" / "logs" / "tiny"
    names = [*(f"71_{n}_submitted.pkl" for n in range(4)), "71_submission.sh"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert submit(*FOUR)[1] == "" and len(slurm.scripts()) == 1


def test_what_slurm_does_not_have_after_a_lost_answer_is_sent_again(
    submit: Submit, slurm: FakeSlurm, store: Path, tmp_path: Path
) -> None:
    (slurm.folder / "refusal").write_text(LOST)
    code, _, err = submit()
    assert code == 2 and "Slurm does not have the job" in err and "Run the same command again" in err
    assert len(slurm.asked("squeue")) == 2, "asked twice"
    assert not intents_left(store) and not list(store.glob("runs/*/tiny"))
    assert not list((tmp_path / "work here" / "logs" / "tiny").iterdir())
    (slurm.folder / "refusal").unlink()
    assert submit()[1] == "71\n"


def test_while_nobody_knows_nothing_is_sent(submit: Submit, slurm: FakeSlurm, store: Path, ftlib: Submit) -> None:
    """sbatch's answer was lost, and squeue does not answer either."""
    (slurm.folder / "lost").write_text(LOST)
    slurm.answers(squeue=None)
    code, _, err = submit(*FOUR)
    assert code == 2 and "whether Slurm has the job" in err and len(intents_left(store)) == 1
    code, _, err = submit(*FOUR)
    assert code == 2 and "cannot check an interrupted submission: squeue" in err and len(slurm.scripts()) == 1
    slurm.answers(squeue="")
    assert {one["state"] for one in json.loads(ftlib("status", "--json")[1])} == {"queued"}
    assert len(intents_left(store)) == 1, "status writes nothing"
    code, out, err = submit(*FOUR)
    assert (code, out) == (0, "") and "but Slurm has it: job 71" in err and "4 queued or running" in err
    assert len(slurm.scripts()) == 1 and not intents_left(store)


def test_a_submit_that_was_killed_leaves_no_second_job(
    submit: Submit, slurm: FakeSlurm, store: Path, config_file: Path, ftlib: Submit
) -> None:
    """Killed while sbatch was at work; the job is cancelled by the name of its run."""
    (slurm.folder / "lost").write_text("killed")
    make_startable(store)
    command = [sys.executable, "-m", "ftlib", "submit", config_file]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    assert subprocess.run(command, env=environment, capture_output=True).returncode == -signal.SIGKILL
    (slurm.folder / "lost").unlink()
    assert json.loads(ftlib("status", "--json")[1])[0]["state"] == "queued"
    slurm.answers(scancel="")
    code, _, err = ftlib("cancel", "tiny")
    assert code == 0 and "cancelled" in err and set(slurm.asked("scancel")) == {"71"}
    (slurm.folder / "ghosts").unlink()
    assert submit()[1] == "72\n" and not intents_left(store)


def test_on_a_full_disk_nothing_is_sent(
    submit: Submit, slurm: FakeSlurm, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The intent cannot be written; or the history of the run after sbatch, and then the job is found again."""
    plain = files.write_json

    def full(path: Path, value: object) -> None:
        if path.parent.name == ".submissions" and not path.name.startswith("owner"):
            with files.storage_errors(path):
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
        plain(path, value)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_json", full)
        code, _, err = submit()
        assert code == 2 and "no space left" in err and not slurm.scripts() and not list(store.glob("runs/*/tiny"))

    def no_event(self: Run, event: str, **details: object) -> None:
        raise UserError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log_event", no_event)
        assert submit()[0] == 2 and len(slurm.scripts()) == 1 and len(intents_left(store)) == 1
    (name,) = re.findall(r"--job-name=(\S+)", slurm.scripts()[0])
    slurm.answers(squeue=queued("71", name=name))
    assert submit()[1] == "" and len(slurm.scripts()) == 1


def test_two_submits_at_the_same_time_send_one_job(
    submit: Submit, slurm: FakeSlurm, store: Path, config_file: Path
) -> None:
    slow = (slurm.folder / "sbatch").read_text().replace("#!/bin/bash\n", "#!/bin/bash\nsleep 1\n", 1)
    (slurm.folder / "sbatch").write_text(slow)
    slurm.answers(sacct="71|PENDING|0:0|None||0\n")
    make_startable(store)
    command = [sys.executable, "-m", "ftlib", "submit", config_file]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    both = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    told = "".join(process.communicate()[1] for process in both)
    assert len(slurm.scripts()) == 1 and "another ftlib submit or cancel is at work" in told, told


def test_what_sbatch_refuses_leaves_no_run_folder(submit: Submit, slurm: FakeSlurm, store: Path) -> None:
    refuse(slurm)
    assert submit(*FOUR)[0] == 2 and not list(store.glob("runs/*/tiny"))
    (slurm.folder / "refusal").unlink()
    submit()
    (run,) = runs(store)
    run.log_event("cancelled", by="ann", job=None)
    refuse(slurm)
    assert submit()[0] == 2 and run.config_file.exists(), "it was there before"


@pytest.mark.parametrize(
    ("parallel", "after"), [(2, ["", "71", "72", "73"]), (3, ["", "71", "72", "73"]), (7, ["", "", "71", "72"])]
)
def test_parallelism_holds_for_all_arrays_of_a_sweep(
    submit: Submit, slurm: FakeSlurm, parallel: int, after: list[str]
) -> None:
    """Of three elements each: two of them fit into seven."""
    slurm.answers(scontrol="MaxArraySize = 3\n")
    seeds = f"sweep.seed={list(range(10))}"
    assert submit(seeds, f"job.array_parallelism={parallel}")[0] == 0
    found = [re.search(r"--dependency=afterany:(\d+)", script) for script in slurm.scripts()]
    assert [each[1] if each else "" for each in found] == after


@pytest.mark.parametrize(("line", "code"), [("COMPLETED|0:0", 0), ("FAILED|1:0", 1)])
def test_wait_tells_by_its_exit_code_whether_all_runs_finished(
    submit: Submit, slurm: FakeSlurm, store: Path, monkeypatch: pytest.MonkeyPatch, line: str, code: int
) -> None:
    """One job ends, and is seen to have ended, while `submit` waits."""
    monkeypatch.setattr("ftlib.slurm.submit._SECONDS_BETWEEN_STATES", 0.0)
    states = iter(["PENDING|0:0", "RUNNING|0:0", line])
    plain = slurm_submit.Slurm.jobs

    def jobs(self: slurm_submit.Slurm, ids: list[str], own: bool = False) -> object:
        state = next(states, line)
        slurm.answers(sacct=f"71|{state}|None|n1|5\n")
        if state == "COMPLETED|0:0":
            finish(runs(store)[0])
            files.write_json(runs(store)[0].done_marker, {"step": 1})
        return plain(self, ids, own)

    monkeypatch.setattr(slurm_submit.Slurm, "jobs", jobs)
    done, out, err = submit("--wait")
    assert (done, out) == (code, "71\n") and "waiting: 1 queued or running" in err and "ended: 1 " in err


def test_a_dry_run_of_another_executor_prints_its_commands(submit: Submit, slurm: FakeSlurm) -> None:
    out = submit("--executor", "local", "--dry-run", "--then", "report")[1]
    assert "sbatch" not in out and out.count("ftlib train ") == 1 and out.endswith("ftlib report tiny\n")


def test_without_torch_nothing_is_started_here(submit: Submit, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = submit("--executor", "local")
    assert code == 2 and "torch is not installed here" in err and "jobs/run.sh ftlib submit" in err
    assert not list(store.glob("runs/*/tiny"))


PARTITION = "PartitionName=low AllowAccounts=lab AllowQos=ALL Default=YES MaxNodes=UNLIMITED MaxTime=1-00:00:00 "
PARTITION += "MaxMemPerNode=UNLIMITED State=UP TotalNodes=2\n"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ((), ""),
        (("job.account=lab", "job.time=1-00:00:00", "job.mem=12000M", "job.cpus=4", "job.nodes=2"), ""),
        (("job.time=1-00:01:00",), "job.time: 1441 minutes; partition low allows 1-00:00:00"),
        (("job.nodes=3",), "job.nodes: 3; partition low has TotalNodes=2"),
        (("job.account=other",), "job.account: other; partition low allows only lab"),
        (("job.mem=13G",), "job.mem: 13312 MiB on a node; nodes of partition low have at most 12000 MiB"),
        (("job.cpus=9",), "job.cpus (times job.gpus): 9 on a node"),
        (("job.gpus=3",), "job.gpus: 3 on a node"),
        (("job.cpus=8", "job.mem=12000M"), "no node of partition low has 8 CPUs, 12000 MiB and 0 GPUs together"),
        (("job.partition=high",), "there is no partition high; there are low"),
        (("job.partition=high,low",), ""),
    ],
)
def test_a_request_that_its_partition_rules_out_is_refused(
    submit: Submit, slurm: FakeSlurm, store: Path, settings: tuple[str, ...], said: str
) -> None:
    slurm.answers(scontrol=PARTITION, sinfo="low*|4|12000|gpu:a100:2(S:0)\nlow*|8|6000|(null)\n")
    code, _, err = submit("job.mem=1G", "job.time='60'", *settings)
    assert (code, len(slurm.scripts())) == ((2, 0) if said else (0, 1)) and said in err, err
    assert len(slurm.asked("sbatch")) == (not said), "asked once"
    assert bool(list(store.glob("runs/*/tiny"))) is not bool(said)


RULES = "lab||brief|20|02:00:00|gres/gpu=2,mem=8G\nbrief|9|00:10:00|gres/gpu:a100=1|cpu=2|\nwide|||gres/gpu=4||\n"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("job.time='10'", "job.cpus=2", "job.gpus=1"), ""),
        (("job.time='11'",), "job.time: 11 minutes; QOS brief allows 00:10:00 (MaxWall). A run that needs longer"),
        (("job.time='11'", "job.qos=wide"), ""),
        (("job.time='121'", "job.qos=wide"), "121 minutes; your association with account lab allows 02:00:00"),
        (("job.gpus=2", "job.gpu_type=a100"), "job.gpus: 2 in all; QOS brief has MaxTRESPerJob gres/gpu:a100=1"),
        (("job.gpus=2", "job.nodes=2", "job.qos=unknown"), "association with account lab has MaxTRESPerJob gres/gpu=2"),
        (("job.gpus=2", "job.nodes=2", "job.qos=wide"), ""),
        (("job.cpus=3",), "job.cpus: 3 in all; QOS brief has MaxTRESPerUser cpu=2"),
        (("job.mem=5G", "job.nodes=2"), "job.mem: 10240 MiB in all; your association with account lab has"),
        (("job.mem=null", "job.mem_per_cpu=5G", "job.cpus=2"), "job.mem: 10240 MiB in all"),
    ],
)  # fmt: skip
def test_a_request_that_qos_or_association_rules_out_is_refused(
    submit: Submit, slurm: FakeSlurm, settings: tuple[str, ...], said: str
) -> None:
    slurm.answers(scontrol="AccountingStorageEnforce = associations,limits,qos\n" + PARTITION, sacctmgr=RULES)
    code, _, err = submit("job.mem=1G", "job.time='5'", "job.account=lab", *settings)
    assert (code, len(slurm.scripts())) == ((2, 0) if said else (0, 1)) and said in err, err
    assert len(slurm.asked("sacctmgr")) == 2, "asked once"


@pytest.mark.parametrize(
    "answers",
    [
        {"scontrol": "AccountingStorageEnforce = associations\n" + PARTITION},
        {"sacctmgr": None},
        {"sacctmgr": "lab||||\nbrief\n"},
    ],
)
def test_limits_that_are_not_enforced_or_not_readable_refuse_nothing(
    submit: Submit, slurm: FakeSlurm, answers: dict[str, str | None]
) -> None:
    slurm.answers(scontrol=PARTITION, sacctmgr=RULES)
    slurm.answers(**answers)
    assert submit("job.mem=1G", "job.time='11'", "job.account=lab", "job.cpus=3")[0] == 0


def test_what_a_test_of_the_request_says_is_a_warning(submit: Submit, slurm: FakeSlurm) -> None:
    (slurm.folder / "test-only").write_text("allocation failure: all nodes are down\n")
    code, _, err = submit(*FOUR)
    assert code == 0 and "sbatch --test-only: allocation failure: all nodes are down" in err
    assert len(slurm.asked("sbatch")) == 1


@pytest.mark.parametrize(
    ("reason", "told"),
    [
        ("Priority", ""),
        ("QOSMaxJobsPerUserLimit", ""),
        ("QOSMaxWallDurationPerJobLimit", "with other job.*"),
        ("QOSMaxGRESPerUser", "and never if the limit is below this request"),
        ("ReqNodeNotAvail, UnavailableNodes:n1", "request less time"),
    ],
)
def test_a_reason_that_does_not_pass_is_told_after_sbatch(
    submit: Submit, slurm: FakeSlurm, reason: str, told: str
) -> None:
    """By one question for all jobs; other jobs of the queue do not count."""
    rows = [queued(f"71_{element}", reason=reason) for element in range(4)]
    slurm.answers(squeue="".join([*rows, queued("70", reason="JobHeldUser")]))
    code, _, err = submit(*FOUR)
    assert code == 0 and "JobHeldUser" not in err
    assert err.count(f"job 71 waits for {reason}: ") == bool(told) and told in err
    assert [asked for asked in slurm.asked("squeue") if "-j" in asked.split()] == [slurm.asked("squeue")[-1]]


def test_after_sbatch_a_silent_slurm_is_no_error(submit: Submit, slurm: FakeSlurm) -> None:
    slurm.answers(squeue=None)
    code, out, err = submit()
    assert (code, out) == (0, "71\n") and "squeue" not in err


def test_jobs_that_cannot_start_are_refused(
    submit: Submit, slurm: FakeSlurm, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requirements, "require_startable", REQUIRE_STARTABLE)
    code, _, err = submit("model.base=google/none", "warm_start=other")
    assert code == 2 and not slurm.scripts() and not list(store.glob("runs/*/tiny"))
    for said in ("ftlib.sif is not there", "google/none is not in the store", "data: no such folder", "other"):
        assert said in err, err
    make_startable(store)
    assert submit()[1] == "71\n", "a model of ftlib is made by the job"
