"""status, logs, cancel and doctor on a real Slurm, from a login environment without torch."""

from __future__ import annotations

import contextlib
import pwd
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.cluster.conftest import FINISHED, MEMBER, USER, Cluster, status

SMALL = "job.cpus=1 job.gpus=0 job.mem=1400M"


def test_a_run_is_watched_and_cancelled_by_name(cluster: Cluster) -> None:
    runs = cluster.home / "operated"
    what = f"configs/digits.yaml name=watched training.num_train_epochs=24 checkpoint.steps=40 {SMALL}"
    (job,) = cluster.submit(what, FTLIB_RUNS=runs)
    cluster.wait_until(lambda: cluster.steps("watched", runs) >= 30, "training to begin", 400)
    found = status(cluster, "watched", runs)
    assert (found["state"], found["total"], found["job"]) == ("running", 888, job)
    assert found["step"] >= 30 and found["node"] in ("n1", "n2") and found["eta"] > 0
    log = cluster.ftlib("logs watched -n 100000", FTLIB_RUNS=runs)
    assert log.returncode == 0 and "step: " in log.stdout
    done = cluster.ftlib("cancel watched", FTLIB_RUNS=runs)
    assert done.returncode == 0 and f"cancelled job {job}" in done.stderr
    assert cluster.wait(job).startswith("CANCELLED")
    time.sleep(20)
    assert cluster.state(job).startswith("CANCELLED")
    found = status(cluster, "watched", runs)
    assert (found["state"], found["reason"]) in (("cancelled", "by scancel"), ("cancelled", f"by {USER}"))
    again = cluster.ftlib(f"submit {what} --dry-run", FTLIB_RUNS=runs)
    assert "1 missing" in again.stderr, "what was cancelled can be submitted again"


LOST_ANSWERS = {
    "timed out": "/usr/bin/sbatch \"$@\" >&2; echo 'Batch job submission failed: Socket timed out on send/recv' >&2; exit 1",
    "killed after": '/usr/bin/sbatch "$@"; kill -9 $PPID',
    "killed before": "kill -9 $PPID",
    "disk full": '/usr/bin/sbatch "$@"; dd if=/dev/zero of="$FTLIB_RUNS/filler" bs=4k 2> /dev/null',
}
"""What an sbatch does that is called by `ftlib submit`."""


@pytest.mark.parametrize("how", LOST_ANSWERS)
def test_a_lost_answer_of_sbatch_leaves_one_job(cluster: Cluster, how: str) -> None:
    """The job is found by `status`, not sent again, and cancelled; what was not sent is sent once."""
    runs, program, user = cluster.home / f"runs {how}", cluster.home / "lost answers" / "sbatch", pwd.getpwnam(USER)
    program.parent.mkdir(exist_ok=True)
    program.write_text(f"#!/bin/bash\nif [[ $1 == --test-only ]]; then exit; fi\n{LOST_ANSWERS[how]}\n")
    program.chmod(0o755)
    runs.mkdir()
    options = f"size=64m,mode=700,uid={user.pw_uid},gid={user.pw_gid}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", runs], check=True)
    name = f"lost-{how.replace(' ', '-')}"
    what = f"submit configs/digits.yaml name={name} {SMALL} 'job.sbatch={{hold: true}}'"
    queue = ["squeue", "-h", "-u", USER, "-o", "%i %j"]
    queued = lambda: [  # noqa: E731
        line.split()[0]
        for line in subprocess.run(queue, capture_output=True, text=True).stdout.splitlines()
        if name in line
    ]
    try:
        first = cluster.ftlib(what, FTLIB_RUNS=runs, PATH=f"{program.parent}:/usr/bin:/bin")
        sent = queued()
        assert len(sent) == (how != "killed before"), first.stderr
        assert first.returncode == {"timed out": 0, "disk full": 2}.get(how, -signal.SIGKILL), first.stderr
        if how == "timed out":
            assert first.stdout.split() == sent and f"job {sent[0]} waits for JobHeldUser: it is held" in first.stderr
        (runs / "filler").unlink(missing_ok=True)
        if sent:
            found = status(cluster, name, runs)
            assert (found["state"], found["job"]) == ("queued", sent[0])
        again = cluster.ftlib(what, FTLIB_RUNS=runs)
        assert again.returncode == 0 and ("1 queued or running" in again.stderr) == bool(sent), again.stderr
        (job,) = queued()
        assert sent in ([], [job]) and again.stdout.split() == ([] if sent else [job])
        assert f"cancelled job {job}" in cluster.ftlib(f"cancel {name}", FTLIB_RUNS=runs).stderr
        cluster.wait_until(lambda: not queued(), "its cancellation", 30)
    finally:
        subprocess.run(["scancel", *queued()], check=False, capture_output=True)
        subprocess.run(["umount", "-l", runs], check=True)


def test_a_mistake_in_the_data_is_told_by_status(cluster: Cluster) -> None:
    runs = cluster.home / "mistaken"
    (cluster.home / "nowhere").mkdir()  # `submit` refuses a folder that is not there
    wrong = f"configs/digits.yaml name=mistaken data.source=jsonl data.root={cluster.home}/nowhere {SMALL}"
    (job,) = cluster.submit(wrong, FTLIB_RUNS=runs)
    assert cluster.wait(job) == "FAILED"
    found = status(cluster, "mistaken", runs)
    assert found["state"] == "never begun" and "nowhere" in found["reason"]


def test_doctor_in_a_job_finds_the_gpu_that_is_none(cluster: Cluster) -> None:
    """The cluster's GPUs are stand-ins and the image's torch is for the CPU."""
    job = cluster.sbatch("--time=10 jobs/doctor.sbatch")
    assert cluster.wait(job) == "FAILED"
    log = cluster.log(job)
    assert "FAIL  GPU: Slurm gave 1, torch sees 0" in log
    assert f"ok    Slurm: inside job {job}, partition low, node n" in log
    assert "store clock: agrees" in log and "MB/s written" in log
    login = cluster.ftlib("doctor")
    assert "ok    job: " in login.stdout, login.stdout + login.stderr


def test_a_token_in_the_environment_is_in_no_file_and_no_process_list(cluster: Cluster) -> None:
    """The job's script, its logs, the run folder and its report; the command lines of all processes, all the time."""
    runs = cluster.home / "secret"
    token = "hf_planted0123456789secret"
    what = f"configs/digits.yaml name=secret training.num_train_epochs=1 {SMALL}"
    (job,) = cluster.submit(what, FTLIB_RUNS=runs, HF_TOKEN=token)
    seen: set[bytes] = set()
    script = subprocess.run(["scontrol", "write", "batch_script", job, "-"], capture_output=True).stdout
    while not cluster.state(job).startswith(FINISHED):
        for process in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                seen.add(process.read_bytes())
        time.sleep(0.3)
    assert cluster.state(job) == "COMPLETED"
    assert cluster.ftlib("report secret", FTLIB_RUNS=runs, HF_TOKEN=token).returncode == 0
    shown = subprocess.run(["scontrol", "show", "job", job], capture_output=True).stdout
    written = [path for path in (*runs.rglob("*"), *(cluster.home / "ftlib/logs").rglob("*")) if path.is_file()]
    assert any(b"submitit.core._submit" in line and b"python" in line for line in seen) and len(written) > 20
    assert not [text for text in (*seen, script, shown) if token.encode() in text]
    assert not [path for path in written if token.encode() in path.read_bytes()]


def test_nobody_else_s_code_runs(cluster: Cluster) -> None:
    """Another member of the group can neither replace a run nor have a script of theirs run in a job of the user."""
    store, other = cluster.home / "guarded store", MEMBER
    store.mkdir()
    shutil.chown(store, USER, USER)
    store.chmod(0o2770)
    own = {"FTLIB_STORE": store, "FTLIB_IMAGE": cluster.image}
    for user in (USER, other):
        done = cluster.shell("umask 002; jobs/run.sh ftlib stage configs/digits.yaml", user=user, **own)
        assert done.returncode == 0, done.stderr
    what = f"configs/digits.yaml name=guarded training.max_steps=2 {SMALL}"
    refused = cluster.ftlib(f"submit {what}", **own)
    assert refused.returncode == 2 and f"chmod +t '{store}'" in refused.stderr
    doctor = cluster.ftlib("doctor", **own)
    assert f"chmod 3770 '{store}'" in doctor.stdout and doctor.returncode == 1
    store.chmod(0o3770)
    (job,) = cluster.submit(what, **own)
    assert cluster.wait(job) == "COMPLETED"
    runs = store / "runs" / USER
    for attack in (f"mv '{runs}' '{runs}.old'", f"ls '{runs}'", f"mv '{store}/models' '{store}/old'"):
        assert cluster.shell(attack, user=other).returncode != 0, attack
    hook = store / "modules.sh"
    cluster.shell(f"echo 'touch \"{store}/executed\"' > '{hook}'", user=other)
    done = cluster.shell("sbatch --parsable --time=5 --mem=500M jobs/ftlib.sbatch status", FTLIB_HOOK=hook, **own)
    cluster.jobs.append(done.stdout.strip())
    assert cluster.wait(cluster.jobs[-1]) == "FAILED"
    assert f"FTLIB_HOOK is not used: {hook} is owned by {other}" in cluster.log(cluster.jobs[-1])
    assert not (store / "executed").exists()
