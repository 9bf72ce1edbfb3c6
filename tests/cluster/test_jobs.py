"""`sbatch jobs/train.sbatch` on a real Slurm, in the real container, as an ordinary user."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import subprocess
import sysconfig
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from signal import SIGUSR1

import pytest

from tests.cluster.conftest import FINISHED, MEMBER, STATE, USER, Cluster, bring_up, history, life, losses, weights
from tests.conftest import REPOSITORY

LONG = "configs/digits.yaml name=long training.num_train_epochs=24 checkpoint.steps=40"
"""A run of 888 steps (37 an epoch), long enough to be interrupted several times."""


def walk(lines: Sequence[str], **environment: object) -> list[str]:
    """Run lines in one login shell of the second user, with umask 077; returns what each printed."""
    home = Path(f"/home/{MEMBER}")
    exports = "".join(f"export {name}='{value}'; " for name, value in environment.items())
    each = [f"{{ {line}\n}} > ~/output-{number} 2>&1 || exit\n" for number, line in enumerate(lines)]
    script = f"umask 077; rm -f ~/output-*; {exports}\n{''.join(each)}"
    done = subprocess.run(["runuser", "-l", MEMBER, "-c", script], capture_output=True, text=True)
    outputs = [path.read_text() for path in sorted(home.glob("output-*"), key=lambda path: int(path.name[7:]))]
    assert done.returncode == 0, f"{lines[len(outputs) - 1]}\n{outputs[-1]}\n{done.stderr}"
    return outputs


def test_every_command_of_the_cluster_page_works(cluster: Cluster) -> None:
    """docs/cluster.md, word for word in one shell, by the second user of the group, with umask 077 and $SCRATCH in
    site.env. The first user has built the image, and uses what is in the store afterwards.

    `sbatch` waits for its job, which does not have the store that the page exports. The acceptance run, which no GPU
    could pass here, has a test of its own; packages come from a folder instead of an index.
    """
    scratch = cluster.home / "scratch of a group"
    store = scratch / "ftlib"
    scratch.mkdir()
    shutil.chown(scratch, USER, USER)
    first = {"FTLIB_STORE": store, "FTLIB_GROUP": USER}
    made = cluster.shell("umask 077; source jobs/lib.sh; make_store images", **first)  # as containers/build.sh
    assert made.returncode == 0, made.stderr
    os.link(cluster.image, store / "images" / "ftlib.sif")
    walk([f"rm -rf ~/ftlib ~/ftlib-login ~/published; cp -r '{cluster.home}/ftlib' ~/published; cd ~/published",
          "git init -q && git add -A && git -c user.name=me -c user.email=me commit -qm published"])  # fmt: skip

    page = (REPOSITORY / "docs" / "cluster.md").read_text()
    lines = [line for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
    assert lines[0].startswith("git clone") and lines[1].startswith("cp jobs/site.env.example")
    edit = f"s|^FTLIB_STORE=.*|FTLIB_STORE=$SCRATCH/ftlib|; s|^#FTLIB_GROUP=.*|FTLIB_GROUP={USER}|"
    later = next(number for number, line in enumerate(lines) if line.startswith("python3 -m venv"))
    session = [
        f"git config --global url.$HOME/published.insteadOf {lines[0].split()[2]}",
        'sbatch() { [[ $* == *build.sbatch || $* == *acceptance.sbatch ]] || env -u FTLIB_STORE sbatch --wait "$@"; }',
        *lines[:2],
        f"sed -i '{edit}' jobs/site.env",
        *lines[2:later],
        "unset FTLIB_STORE",
        *lines[later:],
    ]
    packages = {"PIP_NO_INDEX": 1, "PIP_FIND_LINKS": cluster.login.parents[1] / "wheels"}
    try:
        told = dict(zip(session, walk(session, SCRATCH=scratch, OMP_NUM_THREADS=1, **packages), strict=True))
    finally:
        subprocess.run(["scancel", "--user", MEMBER], check=False)
    submit = next(line for line in lines if line.startswith("ftlib submit") and "--dry-run" not in line)
    assert "4 runs: 4 queued or running" in told[submit], "the second time it submits nothing"

    run = cluster.run("digits", store / "runs" / MEMBER)
    assert json.loads((run / "DONE").read_text())["step"] == 444
    scores, before = (
        json.loads((run / f"eval/digits/test/{when}/scores.json").read_text()) for when in ("after", "before")
    )
    assert scores["value"] >= 0.95 and before["value"] <= 0.2
    assert json.loads((run / "eval/digits/train/after/scores.json").read_text())["n"] == 1168
    (log,) = Path(f"/home/{MEMBER}/ftlib").glob("ftlib-train-*.log")
    assert re.search(r"^step: 444/444   lr: 0\.00000   loss: 0\.\d{4}$", log.read_text(), re.MULTILINE)
    assert "Traceback" not in log.read_text()
    steps = ["sacct", "-nPo", "JobName,State", "-j", log.stem.rpartition("-")[2]]
    shown = subprocess.run(steps, capture_output=True, text=True).stdout
    assert all(f"{command}|COMPLETED" in shown for command in ("stage", "train", "evaluate"))
    assert "prepare|" not in shown and "already prepared" in log.read_text(), "no step of its own"
    predict = next(line for line in lines if "ftlib predict" in line)
    assert told[predict].splitlines()[-1] == "0"
    planned = "jobs/run.sh ftlib plan configs/digits.yaml --gpu 12GiB --json"
    by_hand = predict.replace(
        "jobs/run.sh", 'singularity exec --nv --bind "$FTLIB_STORE" "$FTLIB_STORE/images/ftlib.sif"'
    )
    timed = "jobs/run.sh ftlib plan configs/digits.yaml --time --json 2> /dev/null"
    plan, answer, speed = walk([f"cd ~/ftlib; {planned} 2> /dev/null", by_hand, timed], FTLIB_STORE=store)
    assert json.loads(plan)["fits"] is True and answer.splitlines()[-1] == "0"
    assert json.loads(speed)["device"] == "the CPU" and json.loads(speed)["total_steps"] == 444

    for command in ("stage", "prepare", "train"):
        what = f"umask 077; jobs/run.sh ftlib {command} configs/digits.yaml training.max_steps=2"
        done = cluster.shell(what, FTLIB_STORE=store)
        assert done.returncode == 0, f"{command}: {done.stderr}"
    assert {path.owner() for path in (store / "prepared").iterdir()} == {MEMBER}, "prepared once for both"
    assert (store / "runs" / USER / "digits").is_dir()
    assert (store / "runs" / MEMBER).stat().st_mode & 0o077 == 0, "runs are private"


@pytest.mark.parametrize(("times", "limits", "epochs"), [(2, 1, 16), pytest.param(20, 8, 320, marks=pytest.mark.long)])
def test_interrupted_runs_end_like_an_undisturbed_one(cluster: Cluster, times: int, limits: int, epochs: int) -> None:
    """Preempted by a higher partition at random moments, and hit by its time limit."""
    runs = {name: cluster.home / f"{name}-{times}" for name in ("straight", "preempted", "limited")}
    what = f"jobs/train.sbatch {LONG} training.num_train_epochs={epochs}"
    jobs = {
        name: cluster.sbatch(f"--time=120 --nodelist={node} {what}", FTLIB_RUNS=runs[name])
        for name, node in (("straight", "n2"), ("preempted", "n1"))
    }
    moments = sorted(random.sample(range(20, 29 * epochs), times))
    print(f"preempting after steps {moments}")
    for moment in moments:
        cluster.wait_until(lambda at=moment: cluster.steps("long", runs["preempted"]) >= at, f"step {moment}", 900)
        high = cluster.sbatch("--partition=high --nodelist=n1 --exclusive --output=/dev/null --wrap 'sleep 1'")
        assert cluster.wait(high) == "COMPLETED"

    job = cluster.sbatch(f"--time=120 --signal=B:USR1@30 --nodelist=n2 {what}", FTLIB_RUNS=runs["limited"])
    jobs["limited"] = job
    met = lambda: cluster.log(job).count("saved before the time limit; requeueing")  # noqa: E731
    for number in range(1, limits + 1):
        step = cluster.steps("long", runs["limited"]) + 20
        cluster.wait_until(lambda at=step: cluster.steps("long", runs["limited"]) >= at, f"step {step}", 300)
        limit_comes_soon(job)
        over = lambda times=number: met() == times or cluster.state(job) == "COMPLETED"  # noqa: E731
        cluster.wait_until(over, f"time limit {number}")
        assert met() == number, "the run was over before its time limit: it needs more epochs on this machine"
        subprocess.run(["scontrol", "update", f"JobId={job}", "TimeLimit=120"], check=False)
    for name in jobs:
        assert cluster.wait(jobs[name], 300 * times) == "COMPLETED", f"{name}\n{cluster.log(jobs[name])}"
    straight = cluster.run("long", runs["straight"])
    for name, signal, least in (("preempted", "SIGTERM", times), ("limited", "SIGUSR1", limits)):
        run = cluster.run("long", runs[name])
        assert weights(run) == weights(straight), name
        assert losses(run) == losses(straight), name
        interruptions = [event for event in history(run) if event["event"] == "preempted"]
        assert {event["signal"] for event in interruptions} == {signal}
        log = cluster.log(jobs[name])
        assert log.count(f"ended by {signal}; run the same command again to resume") >= least
        resumed = [event for event in history(run) if event["event"] == "start" and event["step"]]
        assert log.count("resuming from the checkpoint of step") == len(resumed) >= least - 1
        print(f"{name}: {len(interruptions)} interruptions, {len(resumed)} resumptions, the same weights and losses")


def limit_comes_soon(job: str) -> None:
    """Shorten a running job's time limit so that 35 to 95 s are left.

    Slurm looks at it every 30 s, and signals up to 30 s earlier than `--signal` says.
    """
    shown = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True).stdout
    ran = re.search(r"RunTime=(\d+):(\d+):(\d+)", shown)
    assert ran
    hours, minutes, seconds = map(int, ran.groups())
    minutes = (3600 * hours + 60 * minutes + seconds + 35) // 60 + 1
    subprocess.run(["scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}"], check=True)


def training(cluster: Cluster, runs: Path, options: str = "", steps: int = 30, more: str = "") -> str:
    """A job that is in the middle of training."""
    job = cluster.sbatch(f"--time=30 {options} jobs/train.sbatch {LONG} {more}", FTLIB_RUNS=runs)
    cluster.wait_until(lambda: cluster.steps("long", runs) >= steps, "training to begin")
    return job


def restarts(job: str) -> int:
    shown = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True).stdout
    found = re.search(r"Restarts=(\d+)", shown)
    return int(found[1]) if found else 0


def test_cancelled_stays_cancelled_and_the_next_submission_goes_on(cluster: Cluster) -> None:
    runs = cluster.home / "cancelled"
    job = training(cluster, runs)
    cluster.shell(f"scancel {job}")
    assert cluster.wait(job).startswith("CANCELLED")
    time.sleep(10)
    assert cluster.state(job).startswith("CANCELLED")
    assert "ended by SIGTERM" in cluster.log(job) and "requeueing" not in cluster.log(job)
    done = cluster.steps("long", runs)
    again = training(cluster, runs, steps=done + 5)
    assert f"resuming from the checkpoint of step {done}" in cluster.log(again)
    cluster.shell(f"scancel {again}")


def test_killed_outright_after_a_checkpoint_it_goes_on(cluster: Cluster) -> None:
    """The processes of the running step die of SIGKILL; the batch script lives and requeues."""
    runs = cluster.home / "killed"
    job = training(cluster, runs, steps=50)
    cluster.kill_step(job, "train")
    cluster.wait_until(lambda: restarts(job) == 1, "a requeue")
    cluster.wait_until(lambda: "resuming from the checkpoint of step 40" in cluster.log(job), "it to go on")
    cluster.shell(f"scancel {job}")
    killed = [event for event in history(cluster.run("long", runs)) if event["event"] == "killed"]
    assert killed and killed[0]["reason"] == "signal 9"


def test_a_lost_node(cluster: Cluster) -> None:
    """slurmd dies; Slurm gives the job to the other node, where it takes the run over from its former self."""
    runs = cluster.home / "lost"
    job = training(cluster, runs, steps=50, more="training.num_train_epochs=100")
    shown = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True).stdout
    node = re.search(r"BatchHost=(n\d)", shown)
    assert node
    subprocess.run(["bash", "-c", f"kill -KILL $(cat '{life()}/run/{node[1]}.pid')"], check=True)
    try:
        cluster.wait_until(lambda: "resuming from the checkpoint of step" in cluster.log(job), "it to go on", 300)
        cluster.shell(f"scancel {job}")
    finally:
        bring_up()


def test_without_requeueing_nothing_is_lost(cluster: Cluster) -> None:
    runs = cluster.home / "norequeue"
    job = training(cluster, runs, "--no-requeue")
    cluster.shell(f"scancel --batch --signal=USR1 {job}")
    assert cluster.wait(job) == "FAILED"
    assert "Slurm does not requeue this job" in cluster.log(job)
    assert "submit it again to resume" in cluster.log(job)
    again = training(cluster, runs, steps=cluster.steps("long", runs) + 5)
    assert "resuming from the checkpoint" in cluster.log(again)
    cluster.shell(f"scancel {again}")


def trapping(job: str) -> bool:
    """Whether a job's batch script has come as far as its traps. Before, Slurm itself lets a signal end the job."""
    found = subprocess.run(["pgrep", "-o", "-f", f"/job0*{job}/slurm_script"], capture_output=True, text=True).stdout
    try:
        status = Path(f"/proc/{found.strip()}/status").read_text()
    except OSError:
        return False
    caught = re.search(r"^SigCgt:\s*(\w+)", status, re.MULTILINE)
    return bool(caught and int(caught[1], 16) >> SIGUSR1 - 1 & 1)


def test_signal_upon_signal_never_loses_the_job(cluster: Cluster) -> None:
    """Several a second for a minute: steps get them from their first moment on, the batch script from its traps on."""
    runs = cluster.home / "signalled"
    job = cluster.sbatch(f"--time=30 jobs/train.sbatch {LONG} training.max_steps=60", FTLIB_RUNS=runs)
    end = time.monotonic() + 60
    signalled = 0
    while time.monotonic() < end:
        if trapping(job):
            signalled += 1
            cluster.shell(f"timeout 1 scancel --batch --signal=USR1 {job}")
        cluster.shell(f"timeout 1 scancel --signal=USR1 {job}")  # where nothing runs yet, it would try again for long
        time.sleep(0.1)
    print(f"{signalled} signals to the batch script in {restarts(job) + 1} starts")
    assert signalled >= 2 and restarts(job) >= 2
    assert not cluster.state(job).startswith(("FAILED", "CANCELLED", "TIMEOUT")), cluster.log(job)
    assert cluster.wait(job) == "COMPLETED", cluster.log(job)
    assert "Traceback" not in cluster.log(job)


def test_out_of_memory_is_a_failure_with_that_reason(cluster: Cluster) -> None:
    runs = cluster.home / "memory"
    whole_split = "training.per_device_train_batch_size=1168"
    job = cluster.sbatch(f"--time=30 --mem=900M jobs/train.sbatch {LONG} {whole_split}", FTLIB_RUNS=runs)
    assert cluster.wait(job) in ("OUT_OF_MEMORY", "FAILED")
    assert "ran out of the job's memory" in cluster.log(job)
    assert restarts(job) == 0
    events = history(cluster.run("long", runs))
    assert [event["reason"] for event in events if event["event"] == "killed"] == ["out of memory"]


@pytest.mark.parametrize(
    ("settings", "site_env", "message"),
    [
        ({"FTLIB_IMAGE": "/nowhere/x.sif"}, "", "image /nowhere/x.sif is not there. Build it"),
        ({"FTLIB_IMAGE": STATE / "base.sif"}, "", "is no image of ftlib"),
        ({"FTLIB_STORE": None}, "", "FTLIB_STORE is not set"),
        ({}, "FTLIB STORE=/x", "site.env:1: expected KEY=VALUE"),
        ({"FTLIB_STORE": "/proc/x"}, "", "cannot be written to"),
    ],
)
def test_mistakes_are_told_within_seconds(
    cluster: Cluster, settings: dict[str, object], site_env: str, message: str
) -> None:
    file = cluster.home / "ftlib" / "jobs" / "site.env"
    if site_env:
        file.write_text(site_env + "\n")
    try:
        job = cluster.sbatch("--time=5 jobs/train.sbatch", **settings)
        assert cluster.wait(job, 60) == "FAILED"
    finally:
        file.unlink(missing_ok=True)
    code = subprocess.run(["sacct", "-nXPo", "ExitCode,ElapsedRaw", "-j", job], capture_output=True, text=True).stdout
    assert code.startswith("2:0|") and int(code.split("|")[1]) <= 10
    assert message in cluster.log(job)


def test_a_full_store(cluster: Cluster) -> None:
    small = cluster.home / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,mode=777", "tmpfs", small], check=True)
    try:
        job = cluster.sbatch("--time=5 jobs/train.sbatch", FTLIB_STORE=small, FTLIB_IMAGE=cluster.image)
        assert cluster.wait(job, 90) == "FAILED"
        assert re.search("no space left|storage full", cluster.log(job)), cluster.log(job)
        assert "Traceback" not in cluster.log(job)
    finally:
        subprocess.run(["umount", "-l", small], check=True)


def test_a_requeued_job_keeps_the_code_and_config_it_began_with(cluster: Cluster) -> None:
    runs = cluster.home / "pinned"
    config = cluster.home / "ftlib" / "configs" / "mine.yaml"
    config.write_text((cluster.home / "ftlib/configs/digits.yaml").read_text().replace("name: digits", "name: long"))
    code = cluster.home / "ftlib" / "ftlib" / "__init__.py"
    text = code.read_text()
    try:
        job = cluster.sbatch(f"--time=30 jobs/train.sbatch {config} checkpoint.steps=40", FTLIB_RUNS=runs)
        cluster.wait_until(lambda: cluster.steps("long", runs) >= 10, "training to begin")
        config.write_text("broken: [")
        code.write_text("raise SystemExit('edited while the job ran')\n")
        cluster.shell(f"scancel --batch --signal=USR1 {job}")
        cluster.wait_until(lambda: "resuming from the checkpoint" in cluster.log(job), "it to go on")
        cluster.shell(f"scancel {job}")
        assert "edited while" not in cluster.log(job)
    finally:
        code.write_text(text)


@pytest.mark.long
def test_the_acceptance_run(cluster: Cluster) -> None:
    """jobs/acceptance.sbatch with two tasks, rehearsed on CPUs: one JSON file, one page, no name in them."""
    job = cluster.sbatch(
        "--time=40 --gres=none --nodes=2 --ntasks-per-node=1 jobs/acceptance.sbatch", FTLIB_GPU_REHEARSAL="cpu"
    )
    assert cluster.wait(job, 1800) == "COMPLETED", cluster.log(job)
    target = cluster.home / "ftlib" / f"acceptance-{job}"
    text = target.with_suffix(".json").read_text()
    results = {line["name"]: line for line in json.loads(text)["results"]}
    assert all(line["ok"] for line in results.values())
    assert {"environment", "resume full float32", "several losses", "several kill and resume"} <= results.keys()
    assert results["several bandwidth"]["gb_per_s"]["nodes"] == 2
    assert str(cluster.home) not in text and USER not in text and not re.search(r"/(tmp|opt|home|usr)/|\bn[12]\b", text)
    assert "checks are ok" in target.with_suffix(".html").read_text()


@pytest.fixture(scope="module")
def venv() -> Iterator[Path]:
    """A venv that the user may run, with torch: Debian's Python and the packages of the one that runs the tests, which
    are mounted beside it, since the user may not be able to reach them.
    """
    folder, view = STATE / "venv", STATE / "venv-packages"
    subprocess.run(["umount", "-l", view], capture_output=True)
    view.mkdir(exist_ok=True)
    subprocess.run(["mount", "--bind", sysconfig.get_path("purelib"), view], check=True)
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run(["/usr/bin/python3", "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python3*/site-packages")
    assert packages.parent.name == Path(sysconfig.get_path("purelib")).parent.name, "the same version of Python"
    (packages / "tests.pth").write_text(f"{view}\n")
    yield folder
    subprocess.run(["umount", "-l", view], check=True)


def test_without_a_container(cluster: Cluster, venv: Path) -> None:
    """FTLIB_RUNTIME=none: time limit, preemption, scancel, requeueing and exit codes are those of a container."""
    runs = cluster.home / "bare"
    bare = {"FTLIB_RUNS": runs, "FTLIB_RUNTIME": "none", "FTLIB_VENV": venv, "FTLIB_IMAGE": "/nowhere.sif"}
    what = "configs/digits.yaml name=long checkpoint.steps=40 training.num_train_epochs=8"
    job = cluster.sbatch(f"--time=20 --nodelist=n1 jobs/ftlib.sbatch stage+prepare+train {what}", **bare)
    cluster.wait_until(lambda: cluster.steps("long", runs) >= 10, "training to begin")
    cluster.shell(f"scancel --batch --signal=USR1 {job}")
    cluster.wait_until(lambda: "saved before the time limit; requeueing" in cluster.log(job), "the save", 60)
    cluster.wait_until(lambda: cluster.log(job).count("resuming from the checkpoint") == 1, "it to go on")
    at = cluster.steps("long", runs)
    cluster.wait_until(lambda: cluster.steps("long", runs) >= at + 20, "it to train on")
    high = cluster.sbatch("--partition=high --nodelist=n1 --exclusive --output=/dev/null --wrap 'sleep 1'")
    assert cluster.wait(high) == "COMPLETED"
    assert cluster.wait(job) == "COMPLETED", cluster.log(job)
    run = cluster.run("long", runs)
    ends = [event["signal"] for event in history(run) if event["event"] == "preempted"]
    assert ends == ["SIGUSR1", "SIGTERM"] and json.loads((run / "DONE").read_text())["step"] == 296
    wrong = cluster.sbatch("--time=5 jobs/ftlib.sbatch train configs/digits.yaml task=nonsense", **bare)
    assert cluster.wait(wrong, 60) == "FAILED" and "Traceback" not in cluster.log(wrong)


def test_from_another_folder_with_memory_per_cpu(cluster: Cluster) -> None:
    """The clone is found by the script's path; the log, and the config's relative paths, belong to that folder. sbatch
    takes any form of memory, and the steps run.
    """
    folder = cluster.home / "my project"
    folder.mkdir()
    config = (
        (cluster.home / "ftlib/configs/digits.yaml").read_text().replace("root: ${store}/datasets/digits", "root: data")
    )
    (folder / "mine.yaml").write_text(config)
    subprocess.run(["chown", "-R", f"{USER}:", folder], check=True)
    options = "sbatch --parsable --wait --mem-per-cpu=700M --time=5"
    what = f"{options} '{cluster.home}/ftlib/jobs/ftlib.sbatch' stage+prepare mine.yaml"
    done = cluster.shell(f"cd '{folder}'; {what}")
    (log,) = folder.glob("ftlib-*.log")
    assert done.returncode == 0, log.read_text() + done.stderr
    assert (folder / "data" / "images").is_dir()


@contextlib.contextmanager
def no_controller(cluster: Cluster) -> Iterator[None]:
    """In the body slurmctld is down. (up.sh would start it, too, but cancel all jobs.)"""
    file = life() / "pid" / "slurmctld"
    pid = file.read_text().strip()
    subprocess.run(["kill", pid], check=True)
    try:
        cluster.wait_until(lambda: not Path(f"/proc/{pid}/exe").exists(), "slurmctld to end", 60)
        yield
    finally:
        with (life() / "log" / "slurmctld.out").open("a") as log:
            daemon = subprocess.Popen(
                ["slurmctld", "-D"], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        file.write_text(f"{daemon.pid}\n")
        answers = lambda: "is UP" in subprocess.run(["scontrol", "ping"], capture_output=True, text=True).stdout  # noqa: E731
        cluster.wait_until(answers, "slurmctld to answer", 60)


def test_the_controller_is_away_between_two_stages(cluster: Cluster) -> None:
    """`prepare` waits for it, and nothing runs twice."""
    runs, gate, hook = cluster.home / "away", cluster.home / "gate", cluster.home / "ftlib" / "jobs" / "gate.sh"
    held = f"until [[ -e '{gate}' || $* != *=prepare* ]]; do sleep 0.2; done"
    hook.write_text(f'srun() {{ {held}; exec srun "$@"; }}\n')
    what = "jobs/ftlib.sbatch stage+prepare configs/digits.yaml data.split.seed=9"  # not prepared yet
    job = cluster.sbatch(f"--time=10 {what}", FTLIB_RUNS=runs, FTLIB_HOOK=hook)
    steps = ["sacct", "-nPo", "JobName,State", "-j", job]
    shown = lambda: subprocess.run(steps, capture_output=True, text=True).stdout  # noqa: E731
    cluster.wait_until(lambda: "stage|COMPLETED" in shown(), "the first stage", 90)
    with no_controller(cluster):
        gate.touch()
        cluster.wait_until(lambda: "trying again in" in cluster.log(job), "a stage that waits", 90)
    assert cluster.wait(job, 120) == "COMPLETED", cluster.log(job)
    assert sorted(line for line in shown().splitlines() if line.startswith(("stage", "prepare"))) == [
        "prepare|COMPLETED",
        "stage|COMPLETED",
    ]
    assert "Unable to contact slurm controller" in cluster.log(job)


def test_a_limit_that_is_shorter_than_the_start_up_ends_the_job(cluster: Cluster) -> None:
    """Two starts that end in the same command, not eleven, and the log says which limit would do. Slurm's own signal
    comes up to a minute early, so that it is sent here, in the first moments of each start. One that comes while a
    command ends is for the next command.
    """
    job = cluster.sbatch(f"--time=1 jobs/train.sbatch {LONG}", FTLIB_RUNS=cluster.home / "short")
    start, end = 0, time.monotonic() + 400
    while not cluster.state(job).startswith(FINISHED):
        assert time.monotonic() < end, cluster.log(job)
        if restarts(job) == start and trapping(job):
            cluster.shell(f"scancel --batch --signal=USR1 {job}")
            start += 1
        time.sleep(0.5)
    assert cluster.state(job) == "FAILED"
    (idle,) = (cluster.home / "short").rglob("idle")
    ended = idle.read_text().split()
    assert len(ended) == 2 and ended[0] == ended[1]
    assert 1 <= cluster.log(job).count("requeueing job") <= 3  # at most stage, prepare and train once each
    told = f"{ended[0]}: two starts reached the time limit (00:01:00) before anything was saved"
    assert told in cluster.log(job)
    assert re.search(r"Request at least --time=00:0[2-9]:00 \(job.time\)", cluster.log(job)), cluster.log(job)
    ends = ["sacct", "-nXPDo", "ExitCode", "-j", job]
    assert subprocess.run(ends, capture_output=True, text=True).stdout.split()[-1] == "2:0"
