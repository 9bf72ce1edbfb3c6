"""The shell around the container, as far as it can be tried without a cluster."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ftlib import doctor
from ftlib.core.paths import read_site_env
from ftlib.errors import UserError
from ftlib.slurm.image import ImageLabels, read_labels
from tests.conftest import REPOSITORY

SCRIPTS = sorted(
    [*(REPOSITORY / "jobs").glob("*.s*"), *REPOSITORY.glob("containers/*.sh"), *REPOSITORY.glob("tests/cluster/*.sh")]
)


def bash(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, **environment}
    return subprocess.run(["bash", "-c", script], cwd=REPOSITORY, env=variables, capture_output=True, text=True)


@pytest.mark.parametrize(
    "path", [path for path in SCRIPTS if path.suffix in (".sh", ".sbatch")], ids=lambda path: path.name
)
def test_scripts_parse(path: Path) -> None:
    assert bash(f"bash -n '{path}'").stderr == ""


BATCH_SCRIPTS = sorted(path.name for path in (REPOSITORY / "jobs").glob("*.sbatch"))


@pytest.mark.parametrize("name", BATCH_SCRIPTS)
@pytest.mark.parametrize("found", ["by its path", "copied", "controller away", "nowhere"])
def test_a_batch_script_finds_its_clone_from_any_folder(tmp_path: Path, name: str, found: str) -> None:
    """Slurm runs a copy of it, in the folder where sbatch was called; there is the log, too."""
    clone, here = tmp_path / "the clone", tmp_path / "jobs of me"
    for folder in (clone / "jobs", clone / "containers", here):
        folder.mkdir(parents=True)
    stub = 'echo "$PWD"; exit 7\n'
    (clone / "jobs" / "run.sh").write_text(stub)
    (clone / "containers" / "build.sh").write_text(f"#!/bin/bash\n{stub}")
    (clone / "containers" / "build.sh").chmod(0o755)
    path = tmp_path / f"copies/{name}" if found == "copied" else clone / "jobs" / name
    shown = (
        f"echo '   JobId=7 Command=/wrong'; echo '   Command={path} mine.yaml /other/jobs/x.yaml'; echo '   WorkDir=/x'"
    )
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f"#!/bin/bash\n{'exit 1' if found in ('controller away', 'nowhere') else shown}\n")
    scontrol.chmod(0o755)
    text = (REPOSITORY / "jobs" / name).read_text()
    assert "#SBATCH --output=%x-%j.log\n" in text
    submitted = here if found in ("by its path", "nowhere") else clone
    settings = {
        "PATH": f"{scontrol.parent}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_SUBMIT_DIR": str(submitted),
    }
    done = bash(f"cd '{here}'; {text}", **settings)
    if found != "nowhere":
        assert (done.returncode, done.stdout) == (7, f"{here}\n"), done.stderr
    elif name != "build.sbatch":
        assert done.returncode == 2 and "ftlib: the clone is not found: sbatch CLONE/jobs/NAME.sbatch" in done.stderr


ONLY = "only $HOME, $USER, $SCRATCH, $WORK and keys of lines above are expanded; "
AS_IT_IS = "put the value in single quotes to have it as it is"
QUOTES = "quotes belong around the whole value"

SITE_ENV = [
    # a line, and the value of its key, or (message,)
    ("FTLIB_STORE=/a b/c", "/a b/c"),
    ("  FTLIB_RUNS=/spaces\t ", "/spaces"),
    ("FTLIB_STORE= /after/a/space", "/after/a/space"),
    ("X=name=value", "name=value"),
    ("X=", ""),
    ("X=\r", ""),
    ("X=''", ""),
    ("FTLIB_STORE=/carriage/return\r", "/carriage/return"),
    # quotes
    ('FTLIB_RUNS="/quoted path"', "/quoted path"),
    ("X='$HOME `id` \\ #'", "$HOME `id` \\ #"),
    ('X="it\'s"', "it's"),
    ("X='a' # comment", "a"),
    ("X='a'b", (QUOTES,)),
    ("X='a'# no comment", (QUOTES,)),
    ("X='open", (QUOTES,)),
    ("FTLIB_STORE=/o'brien", (QUOTES,)),
    ('FTLIB_STORE=/a/"b c"', (QUOTES,)),
    # comments
    ("FTLIB_STORE=/store # of the group", "/store"),
    ("FTLIB_STORE=/store\t#of the group # 2", "/store"),
    ("FTLIB_STORE=/store#1", "/store#1"),
    ("X=#1", "#1"),
    ("X= # nothing", ""),
    ('X="a # b"', "a # b"),
    # what is expanded
    ("FTLIB_STORE=$SCRATCH/ftlib", "/scratch/me/ftlib"),
    ("FTLIB_STORE=${SCRATCH}/ftlib", "/scratch/me/ftlib"),
    ('FTLIB_STORE="$HOME/a b"', "/home/me/a b"),
    ("FTLIB_STORE=/data/$USER", "/data/me"),
    ("FTLIB_STORE=$HOME$HOME", "/home/me/home/me"),
    ("X=$DOLLARS", (ONLY + AS_IT_IS,)),
    ("FTLIB_IMAGE=$FTLIB_ABOVE/x.sif", "/above/x.sif"),
    ("X=$WORK", ("$WORK is not set here",)),
    ("X=$PATH", (ONLY + AS_IT_IS,)),
    ("X=$(id)", (ONLY + AS_IT_IS,)),
    ("X=${HOME:-/x}", (ONLY + AS_IT_IS,)),
    ("X=${HOME", (ONLY + AS_IT_IS,)),
    ("X=a$", (ONLY + AS_IT_IS,)),
    ("X=$1", (ONLY + AS_IT_IS,)),
    ("X=$HOMER", (ONLY + AS_IT_IS,)),
    ("X='$HOMER'", "$HOMER"),
    ("X=`id`", ("\\ and ` have no meaning here; " + AS_IT_IS,)),
    ("FTLIB_STORE=/a\\ b", ("\\ and ` have no meaning here; " + AS_IT_IS,)),
    # paths
    ("FTLIB_STORE=~/store", "/home/me/store"),
    ("FTLIB_STORE=~", "/home/me"),
    ("FTLIB_BINDS=/data:~/x::~", "/data:/home/me/x::/home/me"),
    ("FTLIB_IMAGE=/a:~/x", "/a:~/x"),
    ("FTLIB_VENV=~/venv", "/home/me/venv"),
    ("X=~/x", "~/x"),
    ("FTLIB_STORE='~/store'", ("must be an absolute path, not '~/store'",)),
    ("FTLIB_STORE=~other/store", ("must be an absolute path, not '~other/store'",)),
    ("FTLIB_STORE=store", ("must be an absolute path, not 'store'",)),
    ("FTLIB_BINDS=/data:projects", ("must be an absolute path, not 'projects'",)),
    ("HF_HUB_CACHE=../cache", ("must be an absolute path, not '../cache'",)),
    # the environment, and lines above
    ("FROM_ENVIRONMENT=$(anything)", "environment"),
    ("FTLIB_ABOVE=/b", ("is set in line 2 already",)),
]


@pytest.mark.parametrize(("line", "expected"), SITE_ENV)
def test_bash_and_python_read_site_env_alike(tmp_path: Path, line: str, expected: str | tuple[str]) -> None:
    file, key = tmp_path / "site.env", line.strip().split("=")[0]
    file.write_text(f"# comment\nFTLIB_ABOVE=/above\n\n{line}\n", newline="")
    environment = {"HOME": "/home/me", "USER": "me", "SCRATCH": "/scratch/me", "FROM_ENVIRONMENT": "environment"}
    unset = "unset FTLIB_STORE FTLIB_RUNS FTLIB_IMAGE WORK"
    done = bash(f"{unset}; source jobs/lib.sh; read_site_env '{file}' && printf %s \"${key}\"", **environment)
    if isinstance(expected, str):
        assert (done.returncode, done.stdout, done.stderr) == (0, expected, "")
        assert (read_site_env(file, environment) | environment)[key] == expected
        return
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"ftlib: {file}:4: {key}: {expected[0]}\n"
    with pytest.raises(UserError) as caught:
        read_site_env(file, environment)
    assert done.stderr == f"ftlib: {caught.value.problem}\n"


@pytest.mark.parametrize("line", ["export X=1", "x=1", "nonsense", "X Y=1", "X =1"])
def test_bash_and_python_refuse_alike(tmp_path: Path, line: str) -> None:
    file = tmp_path / "site.env"
    file.write_text(f"A=1\n{line}\n")
    done = bash(f"source jobs/lib.sh; read_site_env '{file}'")
    assert done.returncode == 2
    with pytest.raises(UserError) as caught:
        read_site_env(file, {})
    assert done.stderr.strip() == f"ftlib: {caught.value.problem}"


@pytest.mark.parametrize("name", ["FTLIB_STORE", "FTLIB_RUNS", "FTLIB_IMAGE"])
def test_a_relative_path_of_the_environment_is_refused(tmp_path: Path, name: str) -> None:
    """A job begins in another folder than the command that submitted it."""
    settings = {"FTLIB_STORE": str(tmp_path / "store")} | {name: "here"}
    done = bash("jobs/run.sh ftlib doctor", **settings)
    assert done.returncode == 2 and f"{name}=here must be an absolute path" in done.stderr
    assert not (tmp_path / "store").exists()


def test_by_hand_without_a_container_or_an_image(tmp_path: Path) -> None:
    bare = {"FTLIB_STORE": str(tmp_path / "store")}
    for name in (
        "bash",
        "chmod",
        "dirname",
        "find",
        "getent",
        "grep",
        "id",
        "mkdir",
        "mktemp",
        "mv",
        "realpath",
        "stat",
    ):
        (tmp_path / name).symlink_to(f"/usr/bin/{name}")
    done = bash("jobs/run.sh ftlib doctor", PATH=str(tmp_path), **bare)
    assert done.returncode == 2 and "neither apptainer nor singularity" in done.stderr
    (tmp_path / "apptainer").write_text("#!/bin/sh\n")
    (tmp_path / "apptainer").chmod(0o755)
    done = bash("jobs/run.sh ftlib doctor", PATH=str(tmp_path), **bare)
    assert done.returncode == 2 and "ftlib.sif is not there. Build it: sbatch jobs/build.sbatch" in done.stderr
    done = bash("source jobs/run.sh; run_job", **bare)
    assert done.returncode == 2 and "usage: sbatch jobs/ftlib.sbatch COMMAND" in done.stderr
    done = bash("jobs/run.sh train configs/digits.yaml", **bare)
    assert done.returncode == 2 and "usage: jobs/run.sh ftlib COMMAND" in done.stderr


STEP = """
source jobs/run.sh
job_tmp='{tmp}' container=(enter) usr1=0 term=0
mkdir -p "$job_tmp/notes"
srun() {{ {srun}; }}
run_step {command} ftlib {command} CONFIG
"""


@pytest.mark.parametrize(
    ("command", "alone"), [("stage", True), ("prepare", True), ("train", False), ("evaluate", False)]
)
def test_only_training_and_evaluation_run_on_every_gpu(tmp_path: Path, command: str, alone: bool) -> None:
    done = bash(STEP.format(tmp=tmp_path, srun='echo "$@"', command=command))
    assert done.returncode == 0 and f"ftlib {command} CONFIG" in done.stdout
    assert done.stdout.startswith("--nodes=1 --ntasks=1 --ntasks-per-node=1 ") == alone


def test_the_first_failing_task_gives_the_reason(tmp_path: Path) -> None:
    """Slurm ends the other tasks then; as they save and say 75, the job would look preempted."""
    failing = 'echo 2 > "$job_tmp/notes/failed"; return 75'
    assert bash(STEP.format(tmp=tmp_path, srun=failing, command="train")).returncode == 2


@pytest.mark.parametrize(
    ("end", "code", "reason"),
    [("Killed", 137, "n2: task 3"), ("Exited with exit code 1", 1, None)],
)
def test_of_several_tasks_one_that_was_killed_is_the_reason(
    tmp_path: Path, end: str, code: int, reason: str | None
) -> None:
    """The others fail of its death, and say so in the notes and to Slurm."""
    words = (f"srun: error: n2: task 3: {end}", "srun: error: n1: tasks 0-1: Exited with exit code 1")
    failing = 'echo 1 > "$job_tmp/notes/failed"; echo "$job_tmp" > "$job_tmp/notes/run"; ' + "; ".join(
        f"echo '{line}' >&2" for line in words
    )
    script = STEP.format(tmp=tmp_path, srun=f"{failing}; return 137", command="train")
    assert bash(script, SLURM_NTASKS="4", SLURM_JOB_ID="7").returncode == code
    history = tmp_path / "history.jsonl"
    assert history.exists() == bool(reason)
    assert not reason or json.loads(history.read_text())["reason"] == reason


def test_bitsandbytes_that_ends_the_process_is_told(tmp_path: Path) -> None:
    """It prints that memory ran out and calls exit(1) in C: no Python code hears of it."""
    failing = "echo 'Error out of memory at line 380 in file /src/csrc/pythonInterface.cpp' >&2; return 1"
    noted = f'echo "$job_tmp" > "$job_tmp/notes/run"; {failing}'
    done = bash(STEP.format(tmp=tmp_path, srun=noted, command="train"), SLURM_JOB_ID="7")
    assert done.returncode == 1 and "bitsandbytes ran out of memory" in done.stderr and "job.mem" in done.stderr
    line = json.loads((tmp_path / "history.jsonl").read_text())
    assert (line["event"], line["reason"]) == ("failed", "out of memory in bitsandbytes")


def test_a_rank_that_nccl_ended_is_told(tmp_path: Path) -> None:
    """Its watchdog aborts the process: no Python code hears of it, and "signal 6" says nothing."""
    words = (
        "[rank1]:[E1128 ProcessGroupNCCL.cpp:685] [Rank 1] Watchdog caught collective operation timeout: WorkNCCL("
        "SeqNum=12, OpType=ALLREDUCE, NumelIn=1, NumelOut=1, Timeout(ms)=60000) ran for 60064 milliseconds.",
        "srun: error: n1: task 1: Aborted (core dumped)",
    )
    failing = 'echo "$job_tmp" > "$job_tmp/notes/run"; ' + "; ".join(f"echo '{line}' >&2" for line in words)
    script = STEP.format(tmp=tmp_path, srun=f"{failing}; return 134", command="train")
    done = bash(script, SLURM_NTASKS="2", SLURM_JOB_ID="7")
    told = "rank 1 timed out after 60000 ms waiting for another rank (NCCL)"
    assert done.returncode == 134 and f"ftlib: {told}" in done.stderr and "training.ddp_timeout" in done.stderr
    assert json.loads((tmp_path / "history.jsonl").read_text())["reason"] == told


def test_memory_that_the_site_gives_for_each_cpu_is_told_for_the_node(tmp_path: Path) -> None:
    """Nothing was requested: the site's default (DefMemPerCPU) is often too small."""
    failing = "echo 'slurmstepd: error: Detected 1 oom_kill event in StepId=7.0' >&2; return 1"
    given = {"SLURM_MEM_PER_CPU": "1024", "SLURM_CPUS_ON_NODE": "4", "SLURM_JOB_ID": "7"}
    done = bash(STEP.format(tmp=tmp_path, srun=failing, command="train"), **given)
    has = "(it has 4096 MiB a node, 1024 MiB for each CPU, /dev/shm and tmpfs included)"
    assert f"ran out of the job's memory {has}; request more: job.mem, or sbatch --mem=…" in done.stderr


def test_a_killed_rank_is_told_with_the_jobs_memory(tmp_path: Path) -> None:
    """Even if srun hears of the others first, which saw it go."""
    words = (
        "srun: error: n1: tasks 0-1: Exited with exit code 76",
        "srun: error: n2: task 2: Exited with exit code 75",
        "srun: error: n2: task 3: Killed",
    )
    failing = "; ".join(f"echo '{line}' >&2" for line in words) + "; return 137"
    script = STEP.format(tmp=tmp_path, srun=failing, command="train")
    done = bash(script, SLURM_NTASKS="4", SLURM_JOB_ID="7", SLURM_MEM_PER_NODE="2048")
    assert "ftlib: n2: task 3: killed; if the job ran out of memory (it has 2048 MiB a node" in done.stderr


def test_a_killed_rank_is_the_reason_although_others_were_told_to_save(tmp_path: Path) -> None:
    """Slurm ends the others by SIGTERM, of which they leave a note; srun returns the highest code, theirs."""
    words = ("srun: error: n2: task 3: Killed", "srun: error: n2: task 2: Terminated")
    noted = 'echo "$job_tmp" > "$job_tmp/notes/run"; echo SIGTERM > "$job_tmp/notes/signal"; '
    failing = noted + "; ".join(f"echo '{line}' >&2" for line in words) + "; return 143"
    done = bash(STEP.format(tmp=tmp_path, srun=failing, command="train"), SLURM_NTASKS="4", SLURM_JOB_ID="7")
    assert done.returncode == 143 and "saved and ended" not in done.stderr
    assert json.loads((tmp_path / "history.jsonl").read_text())["reason"] == "n2: task 3"


def test_a_failure_on_another_node_is_the_jobs_exit_code(tmp_path: Path) -> None:
    """Its note lies on that node; what srun returns is of those that Slurm ended."""
    words = ("srun: error: n2: task 3: Exited with exit code 2", "srun: error: n1: tasks 0-1: Terminated")
    failing = 'echo SIGTERM > "$job_tmp/notes/signal"; ' + "; ".join(f"echo '{line}' >&2" for line in words)
    done = bash(STEP.format(tmp=tmp_path, srun=f"{failing}; return 143", command="train"), SLURM_NTASKS="4")
    assert done.returncode == 2 and "saved and ended" not in done.stderr


@pytest.mark.parametrize(("before", "lines"), [("", 1), ('{"event": "start"}\n', 2), ('{"event": "tor', 2)])
def test_a_note_begins_a_line_of_its_own(tmp_path: Path, before: str, lines: int) -> None:
    history = tmp_path / "history.jsonl"
    history.write_text(before)
    noted = 'echo "$job_tmp" > "$job_tmp/notes/run"; return 137'
    job = {"SLURM_JOB_ID": "7", "SLURMD_NODENAME": "n7"}
    assert bash(STEP.format(tmp=tmp_path, srun=noted, command="train"), **job).returncode == 137
    found = history.read_text().splitlines()
    last = json.loads(found[-1])
    assert len(found) == lines and (last["reason"], last["host"]) == ("signal 9", "n7")


AWAY = "srun: error: Unable to confirm allocation for job 7: Unable to contact slurm controller (connect failure)"
PATIENT = STEP.replace("run_step", "sleep() {{ :; }}; run_step")


def srun_fails(tmp_path: Path, times: int, message: str, before: str = "") -> str:
    """A srun that counts its calls and fails this often before it runs its command."""
    fails = f"{before} echo '{message}' >&2; return 1"
    return (
        f"echo >> '{tmp_path}/calls'; if (( $(wc -l < '{tmp_path}/calls') <= {times} )); then {fails}; fi; "
        'while [[ $1 == -* ]]; do shift; done; echo "began $*"'
    )


@pytest.mark.parametrize(
    "message",
    [
        AWAY,
        "srun: error: Unable to create step for job 7: Socket timed out on send/recv operation",
        "srun: error: Unable to create step for job 7: Zero Bytes were transmitted or received",
        "srun: error: Unable to confirm allocation for job 7: Slurm backup controller in standby mode",
    ],
)
def test_a_stage_waits_for_the_controller(tmp_path: Path, message: str) -> None:
    script = PATIENT.format(tmp=tmp_path, srun=srun_fails(tmp_path, 3, message), command="train")
    done = bash(script, SLURM_JOB_ID="7")
    assert done.returncode == 0 and "ftlib train CONFIG" in done.stdout, done.stderr
    assert (tmp_path / "calls").read_text() == "\n" * 4
    pauses = ["2 s", "4 s", "8 s"]
    assert [line.split("again in ")[1] for line in done.stderr.splitlines() if "again in" in line] == pauses


def test_a_step_that_has_begun_is_not_started_again(tmp_path: Path) -> None:
    """It lost the controller while it ran: what it did must not be done twice."""
    began = ': > "$job_tmp/notes/begun";'
    script = PATIENT.format(tmp=tmp_path, srun=srun_fails(tmp_path, 9, AWAY, began), command="train")
    done = bash(script, SLURM_JOB_ID="7")
    assert done.returncode == 1 and (tmp_path / "calls").read_text() == "\n"


def test_a_refusal_of_the_controller_is_no_reason_to_wait(tmp_path: Path) -> None:
    refused = "srun: error: Unable to create step for job 7: Requested node configuration is not available"
    done = bash(PATIENT.format(tmp=tmp_path, srun=srun_fails(tmp_path, 9, refused), command="train"), SLURM_JOB_ID="7")
    assert done.returncode == 1 and (tmp_path / "calls").read_text() == "\n"


def test_a_controller_that_stays_away_ends_the_job_as_one_to_resume(tmp_path: Path) -> None:
    script = PATIENT.format(tmp=tmp_path, srun=srun_fails(tmp_path, 99, AWAY), command="train")
    done = bash(script.replace("run_step", "controller_patience=10; run_step"), SLURM_JOB_ID="7")
    assert done.returncode == 75 and "train was not started" in done.stderr and "submit it again" in done.stderr
    assert (tmp_path / "calls").read_text() == "\n" * 4


def test_the_command_is_run_after_its_note(tmp_path: Path) -> None:
    """The note that a step has begun is written by the step itself, with SIGUSR1 ignored."""
    srun = 'while [[ $1 == -* ]]; do shift; done; ("$@")'
    script = STEP.format(tmp=tmp_path, srun=srun, command="doctor").replace("container=(enter)", "container=(echo ran)")
    done = bash(script)
    assert (done.returncode, done.stdout) == (0, "ran ftlib doctor CONFIG\n"), done.stderr
    assert (tmp_path / "notes" / "begun").exists()


STARTS = """
source jobs/run.sh
job_tmp='{tmp}' pinned='{tmp}/pinned' command={command} usr1=1 term=0
mkdir -p "$job_tmp/notes" "$pinned"
scontrol() {{
    if [[ $1 == requeue ]]; then echo "$2" >> '{tmp}/requeued'; return; fi
    echo "JobState=RUNNING PreemptTime={preempted}"
    echo "   StartTime=$(date -d '-{ago} seconds' +%FT%T) EndTime=$(date -d '+{left} seconds' +%FT%T) Deadline=N/A"
}}
timeout() {{ shift; "$@"; }}
sleep() {{ :; }}
echo "$job_tmp" > "$job_tmp/notes/run"
SECONDS={ago}
{notes}
requeue "saved before the time limit"
"""


def start(tmp_path: Path, **own: object) -> subprocess.CompletedProcess[str]:
    """A start that is to be requeued 50 s before its limit of 2 minutes, if not otherwise."""
    values = {"command": "train", "preempted": "None", "ago": 70, "left": 50, "notes": ""}
    return bash(STARTS.format(tmp=tmp_path, **{**values, **own}), SLURM_JOB_ID="7")


def test_two_starts_that_the_limit_ends_before_anything_is_saved_end_the_job(tmp_path: Path) -> None:
    assert start(tmp_path).returncode == 75
    done = start(tmp_path)
    assert done.returncode == 2 and (tmp_path / "requeued").read_text() == "7\n"
    told = (
        "two starts reached the time limit (00:02:00) before anything was saved: start-up takes more than 70 s, and "
        "the job must save 50 s before the limit. Request at least --time=00:04:00 (job.time)"
    )
    line = done.stderr.replace("51 s", "50 s").replace("49 s", "50 s").replace("71 s", "70 s")
    assert f"ftlib: train: {told}" in line.replace("(00:01:59)", "(00:02:00)")
    note = json.loads((tmp_path / "history.jsonl").read_text())
    assert (note["event"], note["exit"]) == ("failed", 2) and "before anything was saved" in note["reason"]


def test_the_limit_that_would_do_is_longer_than_the_one_there_was(tmp_path: Path) -> None:
    assert start(tmp_path, ago=0, left=119).returncode == 75
    assert "--time=00:03:00" in start(tmp_path, ago=0, left=119).stderr


def test_the_limit_that_would_do_comes_from_measured_steps(tmp_path: Path) -> None:
    """An earlier start came to its steps: start-up 100 s, a step 30 s."""
    pace = 'echo "$(($(date +%s) - 20)) 30" > "$job_tmp/notes/pace"; : > "$job_tmp/notes/checkpointed"; SECONDS=120'
    assert start(tmp_path, notes=pace).returncode == 75
    (tmp_path / "notes" / "pace").unlink()
    (tmp_path / "notes" / "checkpointed").unlink()
    assert start(tmp_path).returncode == 75
    done = start(tmp_path)
    assert done.returncode == 2 and "start-up took 100 s and a step 30 s in an earlier start" in done.stderr
    assert "--time=00:04:00" in done.stderr


@pytest.mark.parametrize(
    "own",
    [
        {"preempted": "2026-11-01T00:00:00"},
        {"ago": 100, "left": 3000},  # a USR1 that somebody has sent, long before the limit
        {"notes": ': > "$job_tmp/notes/checkpointed"'},
    ],
    ids=["preempted", "signalled", "saved"],
)
def test_other_starts_do_not_count(tmp_path: Path, own: dict[str, object]) -> None:
    for _ in range(15):
        assert start(tmp_path, **own).returncode == 75
    assert (tmp_path / "requeued").read_text() == "7\n" * 15


def test_a_start_that_comes_to_a_later_command_is_progress(tmp_path: Path) -> None:
    for command, code in (("prepare", 75), ("train", 75), ("evaluate", 75), ("evaluate", 2)):
        assert start(tmp_path, command=command).returncode == code


def test_the_last_element_of_an_array_asks_for_itself(tmp_path: Path) -> None:
    """Slurm gives it the array's own ID, by which scontrol means all elements."""
    done = bash("source jobs/run.sh; slurm_id", SLURM_JOB_ID="40", SLURM_ARRAY_JOB_ID="40", SLURM_ARRAY_TASK_ID="3")
    assert done.stdout == "40_3\n"


def test_a_definition_for_builders_without_build_arguments(tmp_path: Path) -> None:
    settings = {"BASE": "some/base:1.2", "FTLIB_STORE": str(tmp_path)}
    done = bash(f"containers/build.sh --render '{tmp_path}/x.def'", **settings)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "x.def").read_text()
    assert "{{" not in text and "%arguments" not in text
    assert "org.ftlib.base.digest unknown" in text
    assert "From: some/base:1.2" in text and "PIP_CONFIG_FILE=/mnt/pip.conf" in text
    assert text.startswith("Bootstrap: docker\n")
    context = REPOSITORY / "build" / "context"
    assert (context / "ftlib" / "__main__.py").exists() and not (context / ".git").exists()


PINNED_BASE = f"some/base@sha256:{'1' * 64}"

BUILDER = """#!/bin/bash
set -e
env > "$SEEN/environment"
while [[ $# -gt 2 ]]; do
    if [[ $1 == --bind ]]; then cp -rp "${2%%:*}" "$SEEN/bound"; shift; fi
    shift
done
cp "$2" "$SEEN/definition"
touch "$1"
"""


def test_the_password_of_the_package_index_is_only_bound_while_building(tmp_path: Path) -> None:
    address = "https://me:planted-password@index.example/simple"
    for name in ("bin", "wheels", "tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / "wheels" / "a.whl").write_text("")
    (tmp_path / "bin" / "apptainer").write_text(BUILDER)
    (tmp_path / "bin" / "apptainer").chmod(0o755)
    settings = {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "SEEN": str(tmp_path),
        "FTLIB_STORE": str(tmp_path / "store"),
        "FTLIB_TMP": str(tmp_path / "tmp"),
        "INDEX_URL": address,
        "BASE": PINNED_BASE,
        "WHEELS": str(tmp_path / "wheels"),
    }
    done = bash("containers/build.sh", **settings)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "bound" / "pip.conf").read_text() == f"[global]\nindex-url = {address}\n"
    assert (tmp_path / "bound" / "pip.conf").stat().st_mode & 0o077 == 0
    assert (tmp_path / "bound" / "wheels" / "a.whl").exists()
    places = [tmp_path / "definition", tmp_path / "environment", *(tmp_path / "store").rglob("*")]
    told = [path for path in places if path.is_file() and b"planted-password" in path.read_bytes()]
    assert not told and "planted-password" not in done.stdout + done.stderr
    assert not list((tmp_path / "tmp").iterdir())


PROGRAMS = {
    "apptainer": """
if [[ $* == *inspect* ]]; then echo org.ftlib.revision: abc; exit; fi
if [[ $* == *ftlib.runs.pinning* ]]; then
    while [[ $1 != python3 ]]; do shift; done
    exec "$PYTHON" "${@:2}"
fi
printf '%s\\n' "$@" > "$SEEN/arguments"; env > "$SEEN/environment"
""",
    "srun": 'while [[ $1 == -* ]]; do shift; done; echo "$SLURM_EXPORT_ENV" > "$SEEN/export"; exec "$@"',
}


@pytest.fixture
def machine(tmp_path: Path) -> dict[str, str]:
    """A machine with a container program and srun that tell how they were called."""
    (tmp_path / "bin").mkdir()
    for name, text in PROGRAMS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    store = tmp_path / "the shared store"
    (tmp_path / "ftlib.sif").write_text("")
    return {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "SEEN": str(tmp_path),
        "PYTHON": sys.executable,
        "FTLIB_STORE": str(store),
        "FTLIB_RUNS": str(store / "runs" / "me"),
        "FTLIB_IMAGE": str(tmp_path / "ftlib.sif"),
        "HF_TOKEN": "hf_planted0123456789secret",
        "WANDB_API_KEY": "wandb_planted0123456789secret",
        "HF_TOKEN_PATH": "/home/me/private token",
    }


def test_spaces_in_paths_a_closed_umask_and_secrets(machine: dict[str, str], tmp_path: Path) -> None:
    tmp_path.chmod(0o2775)  # hands its group down: to the store
    done = bash("umask 077; jobs/run.sh ftlib doctor 'a b'", **machine)
    assert done.returncode == 0, done.stderr
    arguments = (tmp_path / "arguments").read_text().splitlines()
    assert arguments[-3:] == ["ftlib", "doctor", "a b"] and machine["FTLIB_STORE"] in arguments
    assert "planted" not in " ".join(arguments) + done.stdout + done.stderr
    environment = (tmp_path / "environment").read_text().splitlines()
    assert "APPTAINERENV_HF_TOKEN_PATH=/home/me/private token" in environment
    assert not [line for line in environment if "planted" in line and line.startswith(("APPTAINERENV", "SINGULARITY"))]
    runs = Path(machine["FTLIB_RUNS"])
    assert [folder.stat().st_mode & 0o070 for folder in (runs.parent.parent, runs.parent, runs)] == [0o070, 0o070, 0]
    assert not [
        path for path in Path(machine["FTLIB_STORE"]).rglob("*") if path.is_file() and b"planted" in path.read_bytes()
    ]


def test_the_image_is_built_through_no_symbolic_link(machine: dict[str, str], tmp_path: Path) -> None:
    """Planted under the name that the process's number gave it; `exec` keeps that number."""
    (tmp_path / "bin" / "apptainer").write_text('#!/bin/bash\necho built > "${@: -2:1}"\n')
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "images").mkdir()
    image = tmp_path / "images" / "ftlib.sif"
    plant = f"ln -s '{tmp_path}/victim' '{image}.tmp-'$$; exec containers/build.sh '{image}'"
    done = bash(plant, **{**machine, "FTLIB_TMP": str(tmp_path), "BASE": PINNED_BASE})
    assert done.returncode == 0, done.stderr
    assert image.read_text() == "built\n" and (tmp_path / "victim").read_text() == "mine"
    (planted,) = [path for path in image.parent.iterdir() if path != image]
    assert planted.is_symlink(), "the folder beside it is gone"


REGISTRY = """#!/bin/bash
printf '%s\\n' "$*" >> "$SEEN/requests"
case $* in
    *Bearer\\ secret-token*) printf 'HTTP/2 200\\r\\ndocker-content-digest: sha256:%s\\r\\n' "$(< "$SEEN/digest")" ;;
    *auth.example*) echo '{"token": "secret-token"}' ;;
    *)
        printf 'HTTP/2 401\\r\\nWWW-Authenticate: Bearer realm="https://auth.example/token",service="registry.example"\\r\\n'
        ;;
esac
"""
LABELLER = """#!/bin/bash
if [[ $1 == inspect ]]; then sed -n 's/^ *\\(org.ftlib[^ ]*\\) /\\1: /p' "$3"; else cp "${@: -1}" "${@: -2:1}"; fi
"""


def test_an_image_is_rebuilt_from_the_same_base_only(machine: dict[str, str], tmp_path: Path) -> None:
    """The registry tells which digest a tag means; that one is built, noted in the labels, and compared."""
    for name, text in (("curl", REGISTRY), ("apptainer", LABELLER)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    image, known = tmp_path / "an image.sif", tmp_path / "digest"

    def build(*options: str, **settings: str) -> subprocess.CompletedProcess[str]:
        command = f"containers/build.sh {' '.join(options)} '{image}'"
        return bash(command, **{**machine, "FTLIB_TMP": str(tmp_path), "BASE": "some/base:1.2", **settings})

    known.write_text("1" * 64)
    done = build()
    assert done.returncode == 0, done.stderr
    text = image.read_text()
    assert f"From: some/base@sha256:{'1' * 64}\n" in text
    assert f"org.ftlib.base.digest sha256:{'1' * 64}\n" in text
    assert "https://registry-1.docker.io/v2/some/base/manifests/1.2" in (tmp_path / "requests").read_text()
    assert build().returncode == 0, "the same base"
    text = image.read_text()
    known.write_text("2" * 64)
    done = build()
    assert done.returncode == 2 and image.read_text() == text
    assert (
        f"was built from sha256:{'1' * 64}, and the base image (some/base:1.2) is sha256:{'2' * 64} now" in done.stderr
    )
    assert f"BASE=some/base@sha256:{'1' * 64}" in done.stderr and "--new-base" in done.stderr
    assert build(BASE=f"some/base@sha256:{'1' * 64}").returncode == 0
    assert build("--new-base").returncode == 0 and f"sha256:{'2' * 64}" in image.read_text()
    known.write_text("no digest")
    assert "of unknown digest now" in build().stderr
    local = tmp_path / "base.sif"
    local.write_text("base")
    assert build("--new-base", BOOTSTRAP="localimage", BASE=str(local)).returncode == 0
    assert f"org.ftlib.base.digest sha256:{hashlib.sha256(b'base').hexdigest()}" in image.read_text()


def test_labels_are_read(machine: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, image = tmp_path / "bin" / "apptainer", Path(machine["FTLIB_IMAGE"])
    assert read_labels(str(program), image) == ImageLabels(revision="abc"), "as of an older version"
    lines = ("base: b@sha256:1", "base.digest: sha256:1", "lock: lock-py311.txt 2", "architectures: sm_80 sm_90",
             "packages: a==1.0 torch==2.11.0+cu130")  # fmt: skip
    more = "\n".join(f"org.ftlib.{line}" for line in ("revision: v1", *lines))
    program.write_text(f"#!/bin/sh\necho 'other: 1\n{more}'\n")
    assert read_labels(str(program), image) == ImageLabels(
        "v1",
        "b@sha256:1",
        "sha256:1",
        "lock-py311.txt 2",
        ("sm_80", "sm_90"),
        (("a", "1.0"), ("torch", "2.11.0+cu130")),
    )
    for name in ("PATH", "FTLIB_STORE", "FTLIB_IMAGE"):
        monkeypatch.setenv(name, machine[name])
    (shown,) = doctor.image()
    assert "digest sha256:1, lock lock-py311.txt 2, GPU architectures sm_80 sm_90, packages 2" in shown.state
    assert shown.state.endswith("torch 2.11.0+cu130")
    program.write_text("#!/bin/sh\necho other: 1\n")
    assert read_labels(str(program), image) is None
    monkeypatch.setenv("FTLIB_RUNTIME", "none")
    monkeypatch.setenv("FTLIB_VENV", sys.prefix)
    (shown,) = doctor.image()
    assert shown.state == f"no container: FTLIB_VENV={sys.prefix}"


def test_a_venv_instead_of_a_container(machine: dict[str, str], tmp_path: Path) -> None:
    """The venv's Python runs the job's code, with the same settings; no container program is asked."""
    (tmp_path / "bin" / "apptainer").write_text("#!/bin/sh\nexit 9\n")
    venv = tmp_path / "a venv"
    (venv / "bin").mkdir(parents=True)
    python = f"""#!/bin/bash
if [[ $1 == -c ]]; then cat "$SEEN/missing" 2> /dev/null; exit 0; fi
if [[ $* == *ftlib.runs.pinning* ]]; then exec {shlex.quote(sys.executable)} "$@"; fi
printf '%s\\n' "$@" > "$SEEN/arguments"; env > "$SEEN/environment"
"""
    (venv / "bin" / "python3").write_text(python)
    (venv / "bin" / "python3").chmod(0o755)
    settings = {**machine, "FTLIB_RUNTIME": "none", "FTLIB_VENV": str(venv), "HF_HOME": "/home/me/hf"}
    del settings["HF_TOKEN_PATH"]
    done = bash("jobs/run.sh ftlib doctor 'a b'", **settings)
    assert done.returncode == 0, done.stderr
    program = [str(REPOSITORY / "ftlib" / "run_module.py"), "-m", "ftlib"]
    assert (tmp_path / "arguments").read_text().splitlines() == [*program, "doctor", "a b"]
    done = bash("source jobs/run.sh; usr1=0 term=0; run_job doctor", SLURM_JOB_ID="12", **settings)
    assert done.returncode == 0, done.stderr
    environment = dict(
        line.split("=", 1) for line in (tmp_path / "environment").read_text().splitlines() if "=" in line
    )
    code = environment["PYTHONPATH"]
    assert code.startswith(machine["FTLIB_RUNS"]) and "/code" in code, "the job's snapshot"
    assert (tmp_path / "arguments").read_text().splitlines()[0] == f"{code}/ftlib/run_module.py"
    assert environment["HF_HUB_OFFLINE"] == environment["PYTHONNOUSERSITE"] == "1"
    assert environment["HF_HOME"] == f"{machine['FTLIB_STORE']}/hf"
    assert environment["HF_TOKEN_PATH"] == "/home/me/hf/token", "the user's own, not in the store"
    (tmp_path / "missing").write_text("torch peft\n")
    done = bash("jobs/run.sh ftlib doctor", **settings)
    assert done.returncode == 2 and f"{venv}/bin/python3 lacks torch peft" in done.stderr
    (tmp_path / "missing").unlink()
    (venv / "bin").chmod(0o777)
    assert "FTLIB_VENV is not used" in bash("jobs/run.sh ftlib doctor", **settings).stderr
    done = bash("jobs/run.sh ftlib doctor", **{**settings, "FTLIB_VENV": str(tmp_path)})
    assert done.returncode == 2 and "there is no bin/python3 in it" in done.stderr
    done = bash("jobs/run.sh ftlib doctor", **{**settings, "FTLIB_RUNTIME": "docker"})
    assert done.returncode == 2 and "FTLIB_RUNTIME=docker must be apptainer, none or pyxis" in done.stderr


def test_pyxis_is_srun_with_a_container(machine: dict[str, str], tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    stand_in = f"""#!/bin/bash
printf '%s\\n' "$@" "" >> '{calls}'
while [[ $1 == -* ]]; do shift; done
while [[ $1 == env || $1 == PATH=* ]]; do shift; done
if [[ $* == *ftlib.runs.pinning* ]]; then exec {shlex.quote(sys.executable)} "${{@:2}}"; fi
"""
    (tmp_path / "bin" / "srun").write_text(stand_in)
    job = {"SLURM_JOB_ID": "12", "FTLIB_RUNTIME": "pyxis", "FTLIB_BINDS": "/data", "SLURM_GPUS_ON_NODE": "2"}
    done = bash("source jobs/run.sh; usr1=0 term=0; run_job train CONFIG", **machine, **job)
    assert done.returncode == 0, done.stderr
    temporary = re.search(r"([^,:]+/ftlib\.\w+):", calls.read_text())
    assert temporary
    text = calls.read_text()
    for name, path in (("TMP", temporary[1]), ("CLONE", str(REPOSITORY)), ("STORE", machine["FTLIB_STORE"]),
                       ("IMAGE", machine["FTLIB_IMAGE"])):  # fmt: skip
        text = text.replace(path, name)
    assert text == (REPOSITORY / "tests" / "slurm" / "golden" / "pyxis-steps.txt").read_text()


@pytest.mark.parametrize(
    ("job", "told"),
    [
        ({"SLURM_GPUS_PER_TASK": "1"}, "--gpus-per-task: every task would see its own GPU as device 0"),
        ({"CUDA_VISIBLE_DEVICES": "MIG-1,MIG-2", "SLURM_NTASKS": "2"}, "several tasks on MIG slices"),
    ],
)
def test_gpus_that_tasks_could_not_use_together(machine: dict[str, str], job: dict[str, str], told: str) -> None:
    done = bash("source jobs/run.sh; usr1=0 term=0; run_job train", SLURM_JOB_ID="12", **machine, **job)
    assert done.returncode == 2 and told in done.stderr


def test_a_job_without_the_submitters_environment(machine: dict[str, str], tmp_path: Path) -> None:
    """sbatch --export=NONE: srun hands the job's own environment on; the job's log is known to what runs inside."""
    job = {"SLURM_JOB_ID": "12", "SBATCH_EXPORT": "NONE", "SLURM_EXPORT_ENV": "NONE"}
    log = tmp_path / "a log"
    done = bash(f"source jobs/run.sh; usr1=0 term=0; run_job doctor 2> '{log}' 1>&2", **machine, **job)
    assert done.returncode == 0, log.read_text()
    assert (tmp_path / "export").read_text() == "ALL\n"
    done = bash(f"exec 2> '{log}'; source jobs/run.sh; usr1=0 term=0; run_job doctor", **machine, **job)
    environment = (tmp_path / "environment").read_text().splitlines()
    assert f"APPTAINERENV_FTLIB_LOG={log}" in environment and "APPTAINERENV_HF_HUB_OFFLINE=1" in environment


def test_ranks_of_two_nodes_meet_at_the_first_and_each_has_the_temporary_folder(
    machine: dict[str, str], tmp_path: Path
) -> None:
    calls = tmp_path / "calls"
    for name, text in {
        "scontrol": "[[ $* == 'show hostnames n[7,9]' ]] && printf 'n7\\nn9\\n'",
        "srun": f'echo "$*" >> {calls}; while [[ $1 == -* ]]; do shift; done; exec "$@"',
    }.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "12", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[7,9]"}
    done = bash("source jobs/run.sh; usr1=0 term=0; run_job train", **machine, **job)
    assert done.returncode == 0, done.stderr
    assert "APPTAINERENV_MASTER_ADDR=n7" in (tmp_path / "environment").read_text().splitlines()
    begin, train, end = calls.read_text().splitlines()
    everywhere = "--nodes=2 --ntasks=2 --ntasks-per-node=1 "
    assert begin.startswith(f"{everywhere}bash -c mkdir -m 700 ") and end.startswith(f"{everywhere}rm -rf /")
    assert train.startswith("--mem=0 --kill-on-bad-exit=1 "), "a task for each GPU of every node"
    folder = Path(end.split()[-1])
    assert begin.split()[-1] == str(folder) and not folder.exists()


def test_a_temporary_folder_that_somebody_else_made_on_another_node_ends_the_job(
    machine: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    for name, text in {
        "scontrol": "printf 'n7\\nn9\\n'",
        "srun": f"""
while [[ $1 == -* ]]; do shift; done
if [[ $* == *mkdir* ]]; then rm -r "${{@: -1}}"; ln -s '{tmp_path}/elsewhere' "${{@: -1}}"; fi
exec "$@"
""",
    }.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "12", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[7,9]"}
    done = bash("source jobs/run.sh; usr1=0 term=0; run_job train", **machine, **job)
    assert done.returncode == 2 and "cannot be made on every node" in done.stderr
    assert not list((tmp_path / "elsewhere").iterdir())


def test_nodes_without_names_are_refused(machine: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "bin" / "scontrol").write_text("#!/bin/bash\nexit 1\n")
    (tmp_path / "bin" / "scontrol").chmod(0o755)
    job = {"SLURM_JOB_ID": "12", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[7,9]"}
    done = bash("source jobs/run.sh; usr1=0 term=0; run_job train", **machine, **job)
    assert done.returncode == 2 and "does not list this job's nodes" in done.stderr


def test_what_a_job_has_done_is_not_run_again(machine: dict[str, str], tmp_path: Path) -> None:
    """Neither after the job was requeued, nor if the command before has done it already."""
    (tmp_path / "bin" / "apptainer").write_text(f"""#!/bin/bash
if [[ $* == *inspect* ]]; then echo org.ftlib.revision: abc; exit; fi
if [[ $* == *ftlib.runs.pinning* ]]; then exec {shlex.quote(sys.executable)} "${{@: -4}}"; fi
echo "${{@: -2:1}} then $APPTAINERENV_FTLIB_FOLLOWING" >> "$SEEN/calls"
if [[ $* == *" train "* && ! -e $SEEN/can-train ]]; then exit "$NOT_TRAINED"; fi
if [[ $* == *" stage "* && $PREPARED == 1 ]]; then echo prepare >> "$APPTAINERENV_FTLIB_JOB_TMP/done"; fi
echo "${{@: -2:1}}" >> "$APPTAINERENV_FTLIB_JOB_TMP/done"
""")

    def start(prepared: int, restart: int, not_trained: int = 1) -> tuple[int, list[str]]:
        (tmp_path / "calls").write_text("")
        settings = {"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": str(restart), "PREPARED": str(prepared)}
        settings["NOT_TRAINED"] = str(not_trained)
        script = "source jobs/run.sh; usr1=0 term=0; run_job stage+prepare+train+evaluate CONFIG"
        done = bash(script, **machine, **settings)
        return done.returncode, (tmp_path / "calls").read_text().splitlines()

    calls = ["stage then prepare", "prepare then train", "train then evaluate", "evaluate then "]
    assert start(0, 0) == (1, calls[:3])
    assert start(0, 1, not_trained=137) == (137, calls[2:3])
    (tmp_path / "can-train").touch()
    assert start(0, 1) == (0, calls[2:]), "requeued"
    assert start(1, 0) == (0, [calls[0], *calls[2:]]), "another job with this number"
    assert not list(Path(machine["FTLIB_RUNS"], ".jobs").glob("12*"))


def test_a_lost_node_is_not_taken_for_the_end_of_a_command(machine: dict[str, str], tmp_path: Path) -> None:
    """srun ends with 0 then; Slurm starts the job on another node, perhaps while this script still runs."""
    lost = 'echo "srun: error: Node failure on n1" >&2'
    done = bash(STEP.format(tmp=tmp_path, srun=lost, command="train") + "echo next")
    assert (done.returncode, done.stdout) == (1, "")
