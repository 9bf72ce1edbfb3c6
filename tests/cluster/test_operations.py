"""status, logs, cancel and doctor on a real Slurm, from a login environment without torch."""

from __future__ import annotations

import contextlib
import pwd
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.cluster.conftest import FINISHED, MEMBER, USER, Cluster, life, status

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
    "timed out": '"$sbatch" "$@" >&2; echo "Batch job submission failed: Socket timed out on send/recv" >&2; exit 1',
    "killed after": '"$sbatch" "$@"; kill -9 $PPID',
    "killed before": "kill -9 $PPID",
    "disk full": '"$sbatch" "$@"; dd if=/dev/zero of="$FTLIB_RUNS/filler" bs=4k 2> /dev/null; exit 0',
}
"""What an sbatch does that is called by `ftlib submit`."""


@pytest.mark.parametrize("how", LOST_ANSWERS)
def test_a_lost_answer_of_sbatch_leaves_one_job(cluster: Cluster, how: str) -> None:
    """The job is found by `status`, not sent again, and cancelled; what was not sent is sent once."""
    runs, program, user = cluster.home / f"runs {how}", cluster.home / "lost answers" / "sbatch", pwd.getpwnam(USER)
    program.parent.mkdir(exist_ok=True)
    program.write_text(f"#!/bin/bash\nif [[ $1 == --test-only ]]; then exit; fi\n{LOST_ANSWERS[how]}\n")
    real = shutil.which("sbatch")
    program.chmod(0o755)
    runs.mkdir()
    options = f"size=64m,mode=700,uid={user.pw_uid},gid={user.pw_gid}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", runs], check=True)
    name = f"lost-{how.replace(' ', '-')}"
    what = f"submit configs/digits.yaml name={name} {SMALL} 'job.sbatch={{reservation: later}}'"
    queue = ["squeue", "-h", "-u", USER, "-o", "%i %j"]
    queued = lambda: [  # noqa: E731
        line.split()[0]
        for line in subprocess.run(queue, capture_output=True, text=True).stdout.splitlines()
        if name in line
    ]
    later = ["reservationname=later", "starttime=now+30minutes", "duration=1", "nodes=n1", f"users={USER}"]
    subprocess.run(["scontrol", "create", "reservation", *later], check=True, capture_output=True)
    try:
        first = cluster.ftlib(what, FTLIB_RUNS=runs, PATH=f"{program.parent}:/usr/local/bin:/usr/bin:/bin", sbatch=real)
        sent = queued()
        assert len(sent) == (how != "killed before"), first.stderr
        assert first.returncode in {"timed out": (0,), "disk full": (2,)}.get(how, (-9, 128 + 9)), first.stderr
        if how == "timed out":
            assert first.stdout.split() == sent, first.stderr
            assert f"job {sent[0]} waits for Reservation: the reservation has not begun" in first.stderr, first.stderr
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
        cluster.wait_until(lambda: not queued(), "its end", 30)
        subprocess.run(["scontrol", "delete", "reservationname=later"], check=True)


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
    token = "hf_planted0123456789cluster"  # no other test has it in a command line
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


@pytest.mark.long  # of `make cluster`, only the newer Slurm constrains devices
def test_a_job_opens_only_the_gpu_that_it_was_given(cluster: Cluster) -> None:
    if "ConstrainDevices=yes" not in Path("/etc/slurm/cgroup.conf").read_text():
        pytest.skip("this Slurm constrains no devices: make cluster SLURM=24.11")
    devices = life() / "dev"
    look = f"head -c 1 {devices}/gpu0; head -c 1 {devices}/gpu1; echo visible $CUDA_VISIBLE_DEVICES; sleep 5"
    jobs = [
        cluster.sbatch(f"-w n1 --gres=gpu:1 --mem=200 --output='{cluster.home}/gpu-%j' --wrap '{look}'") for _ in "12"
    ]
    seen = []
    for job in jobs:
        assert cluster.wait(job, 60) == "COMPLETED"
        seen.append((cluster.home / f"gpu-{job}").read_text())
    for text in seen:
        assert text.count("Operation not permitted") == text.count("No such device") == 1, text
        assert "visible 0" in text, "numbered within the job"
    assert len(set(seen)) == 2, "each its own"


def test_a_limit_of_a_qos(cluster: Cluster) -> None:
    """A job that Slurm would keep pending for ever is refused, where limits are enforced."""
    shown = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, check=True).stdout
    enforced = "limits" in next(line for line in shown.splitlines() if line.startswith("AccountingStorageEnforce"))
    accounting("add", "qos", "brief")
    try:
        accounting("modify", "qos", "brief", "set", "MaxWall=00:05:00", "MaxTRESPerJob=gres/gpu=1")
        accounting("modify", "user", USER, "set", "qos+=brief")
        runs, settings = cluster.home / "brief", "configs/digits.yaml name=brief job.mem=2500M job.qos=brief job.cpus=1"
        for wrong, said in (
            ("job.time='6'", "job.time: 6 minutes; QOS brief allows 00:05:00 (MaxWall)"),
            ("job.time='5' job.gpus=2", "job.gpus: 2 in all; QOS brief has MaxTRESPerJob gres/gpu=1"),
        ):
            done = cluster.ftlib(f"submit {settings} {wrong}", FTLIB_RUNS=runs)
            if enforced:
                assert (done.returncode, done.stdout) == (2, "") and said in done.stderr, done.stderr
                assert not list(runs.glob("brief/*"))
            else:
                assert done.returncode == 0 and said not in done.stderr, done.stderr
                cluster.jobs.append(done.stdout.strip())
        assert cluster.submit(f"{settings} name=short job.time='5'", FTLIB_RUNS=runs)
        if enforced:
            job = cluster.sbatch("--qos=brief --time=6 --wrap true")
            asked = ["squeue", "-h", "-o", "%r", "-j", job]
            reason = lambda: subprocess.run(asked, capture_output=True, text=True).stdout  # noqa: E731
            cluster.wait_until(lambda: reason().strip() == "QOSMaxWallDurationPerJobLimit", "Slurm to say so", 30)
    finally:
        subprocess.run(["scancel", *cluster.jobs], check=False, capture_output=True)
        accounting("modify", "user", USER, "set", "qos-=brief")
        accounting("delete", "qos", "brief")


def accounting(*arguments: str) -> None:
    """Run sacctmgr as root."""
    subprocess.run(["sacctmgr", "-i", *arguments], check=True, capture_output=True)
