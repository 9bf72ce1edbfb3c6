"""Sweeps on the cluster, submitted from a login environment without torch by an ordinary user, run in the image."""

from __future__ import annotations

import json
import random
import re
import subprocess
import time
from pathlib import Path

import pytest

from ftlib.core import files, jsonl
from tests.cluster.conftest import Cluster, history, members, weights

POINTS = [(0, "{prefix}", 0), (1, "{prefix}", 0), (0, "say it: {prefix}", 0), (0, "{prefix}", 1)]
"""Seed, prompt and seed of the split of each run."""
SHORT = "training.num_train_epochs=2 checkpoint.steps=20 evaluation.splits='[valid]'"
"""74 steps."""
SMALL = "job.cpus=1 job.gpus=0 job.mem=1400M"


def wait_for_all(cluster: Cluster, runs: Path, name: str, count: int, seconds: float = 1500) -> None:
    """Until every run of a sweep has its scores."""
    whole = lambda: sum(files.is_complete(run / "eval/digits/valid/after") for run in members(runs, name))  # noqa: E731
    cluster.wait_until(lambda: whole() == count, f"{count} runs of {name}", seconds)


def output(cluster: Cluster, name: str) -> str:
    return "".join(path.read_text() for path in (cluster.home / "ftlib/logs" / name).glob("*_log.out"))


def test_two_seeds_two_prompts_two_splits(cluster: Cluster) -> None:
    runs = cluster.home / "sweep"
    points = [{"seed": seed, "data.prompt": prompt, "data.split.seed": split} for seed, prompt, split in POINTS]
    what = f"configs/digits.yaml name=four {SHORT} {SMALL} job.cpus=2 'sweep.list={json.dumps(points)}'"
    (job,) = cluster.submit(what, FTLIB_RUNS=runs)
    again = cluster.ftlib(f"submit {what}", FTLIB_RUNS=runs)
    assert (again.returncode, again.stdout) == (0, "") and "4 runs: 4 queued or running" in again.stderr
    wait_for_all(cluster, runs, "four", 4)
    assert len(members(runs, "four")) == 4
    cluster.wait_until(lambda: cluster.state(job) == "COMPLETED", "the array's end")

    # The base model is asked once for each prompt and split, whatever the seed.
    assert len(list((runs / ".before").glob("*/evaluation/scores.json"))) == 3
    before = [json.loads((run / "eval/digits/valid/before/scores.json").read_text()) for run in members(runs, "four")]
    assert len({(one["settings"]["prompt"], one["settings"]["fingerprint"]) for one in before}) == 3
    assert output(cluster, "four").count("on valid: 0/") <= 7  # 4 after, 3 before

    again = cluster.ftlib(f"submit {what}", FTLIB_RUNS=runs)
    assert (again.returncode, again.stdout) == (0, "") and "4 runs: 4 finished" in again.stderr

    two, merged = " ".join(f"'{run}'" for run in members(runs, "four")[:2]), cluster.store / "merged"
    words = f"--base ftlib/tiny-paligemma --model {two} --method ties -o '{merged}'"
    merging = cluster.sbatch(f"--time=10 jobs/merge.sbatch {words}", FTLIB_RUNS=runs)
    assert cluster.wait(merging) == "COMPLETED", cluster.log(merging)
    assert json.loads((merged / "merge.json").read_text())["recipe"]["method"] == "ties"

    subprocess.run(["rm", "-r", members(runs, "four")[3]], check=True)
    (job,) = cluster.submit(what, FTLIB_RUNS=runs)
    wait_for_all(cluster, runs, "four", 4)
    assert cluster.wait(job) == "COMPLETED"
    shown = subprocess.run(["sacct", "-nXPo", "JobID", "-j", job], capture_output=True, text=True).stdout
    assert shown.split() == [job], "one run, no array"


@pytest.mark.long
def test_interrupted_members_end_like_undisturbed_ones(cluster: Cluster) -> None:
    """At random moments: a preemption of the whole array, and for each element the signal of its time limit."""
    runs = {name: cluster.home / f"sweep-{name}" for name in ("straight", "disturbed")}
    many = f"configs/digits.yaml name=pair {SHORT} training.num_train_epochs=6 {SMALL} 'sweep.seed=[0,1]'"
    jobs = {}
    for name, node in (("straight", "n2"), ("disturbed", "n1")):
        (jobs[name],) = cluster.submit(f"{many} 'job.sbatch={{nodelist: {node}}}'", FTLIB_RUNS=runs[name])

    def steps(index: int) -> int:
        found = members(runs["disturbed"], "pair")
        return len(jsonl.read_jsonl_log(found[index] / "metrics.jsonl")) if len(found) == 2 else 0

    element = {run: history(run)[0]["job"] for run in members(runs["disturbed"], "pair")}
    for index, (run, job) in enumerate(element.items()):
        moment = random.randrange(10, 60)
        cluster.wait_until(lambda at=moment, of=index: steps(of) >= at, f"step {moment} of {run.name}", 600)
        cluster.shell(f"scancel --batch --signal=USR1 {job}")
    moment = random.randrange(80, 120)
    cluster.wait_until(lambda: max(steps(0), steps(1)) >= moment, f"step {moment}", 900)
    high = cluster.sbatch("--partition=high --nodelist=n1 --exclusive --output=/dev/null --wrap 'sleep 1'")
    assert cluster.wait(high) == "COMPLETED"
    for folder in runs.values():
        wait_for_all(cluster, folder, "pair", 2, 900)
    pairs = zip(members(runs["disturbed"], "pair"), members(runs["straight"], "pair"), strict=True)
    for run, other in pairs:
        assert run.name == other.name and weights(run) == weights(other)
        assert "SIGUSR1" in signals(run) and not signals(other)
    assert any("SIGTERM" in signals(run) for run in members(runs["disturbed"], "pair"))


def signals(run: Path) -> list[object]:
    return [event["signal"] for event in history(run) if event["event"] == "preempted"]


def test_a_cancelled_array_stays_cancelled_and_goes_on_when_submitted_again(cluster: Cluster) -> None:
    runs = cluster.home / "sweep-cancelled"
    what = f"configs/digits.yaml name=two {SHORT} {SMALL} training.num_train_epochs=40 'sweep.seed=[0,1]'"
    (job,) = cluster.submit(what, FTLIB_RUNS=runs)
    begun = lambda: all(len(jsonl.read_jsonl_log(run / "metrics.jsonl")) >= 25 for run in members(runs, "two"))  # noqa: E731
    cluster.wait_until(begun, "both to train", 600)
    cluster.shell(f"scancel {job}")
    cluster.wait_until(lambda: states(job) == {"CANCELLED"}, "both to be cancelled")
    time.sleep(20)
    assert states(job) == {"CANCELLED"}
    done = {run.name: len(jsonl.read_jsonl_log(run / "metrics.jsonl")) for run in members(runs, "two")}
    (again,) = cluster.submit(what, FTLIB_RUNS=runs)
    went_on = lambda run: [event["step"] for event in history(run) if event["event"] == "start"] == [0, done[run.name]]  # noqa: E731
    cluster.wait_until(lambda: all(map(went_on, members(runs, "two"))), "both to go on where they were saved", 600)
    cluster.shell(f"scancel {again}")


def states(job: str) -> set[str]:
    """The newest state of every element."""
    shown = subprocess.run(["sacct", "-nXPo", "State", "-j", job], capture_output=True, text=True).stdout
    return {line.split()[0] for line in shown.splitlines()}


def test_a_failed_run_holds_up_no_other_in_a_chain(cluster: Cluster) -> None:
    """One of two runs has no data: its evaluation is cancelled, the other's and the report run."""
    runs = cluster.home / "sweep-chain"
    (cluster.home / "empty").mkdir()
    data = f'\'sweep.data.root=["${{store}}/datasets/digits","{cluster.home}/empty"]\''
    what = f"configs/digits.yaml name=chain {SHORT} {SMALL} {data} training.num_train_epochs=1 --then evaluate,report"
    train, evaluate, report = cluster.submit(what, FTLIB_RUNS=runs)
    cluster.wait_until(lambda: cluster.state(report) not in ("", "PENDING"), "the report", 900)
    assert [cluster.wait(f"{train}_{index}", 60) for index in (0, 1)] == ["COMPLETED", "FAILED"]
    assert cluster.wait(f"{evaluate}_0", 60) == "COMPLETED"
    # Accounting may show the element that was cancelled while it waited as N or N_[0-1%2].
    cluster.wait_until(lambda: states(evaluate) == {"COMPLETED", "CANCELLED"}, "the other to be cancelled")
    good = [run for run in members(runs, "chain") if (run / "DONE").exists()]
    assert len(good) == 1 and files.is_complete(good[0] / "eval/digits/valid/after")
    assert cluster.wait(report) == "COMPLETED", output(cluster, "chain")
    assert list((runs / "chain").glob("report.html"))


def test_a_submitted_job_runs_its_snapshot_and_no_module_of_the_folder(cluster: Cluster) -> None:
    """The clone, where `submit` is called, holds a module of a stranger; its code is edited while the job is pending,
    and another module comes while it trains.
    """
    runs, clone, executed = cluster.home / "frozen", cluster.home / "ftlib", cluster.home / "executed"
    code = clone / "ftlib" / "__init__.py"
    before = code.read_text()
    stranger = f"open({str(executed)!r}, 'a').write(__file__ + chr(10))\nraise ImportError(__file__)\n"
    try:
        (clone / "yaml.py").write_text(stranger)
        pending = "'job.sbatch={begin: now+30}'"
        (job,) = cluster.submit(f"configs/digits.yaml name=frozen {SHORT} {SMALL} {pending}", FTLIB_RUNS=runs)
        assert cluster.state(job) in ("", "PENDING")
        code.write_text(stranger)
        cluster.wait_until(lambda: cluster.steps("frozen", runs) >= 5, "training to begin", 600)
        for name in ("numpy.py", "submitit.py", "pydantic.py"):
            (clone / name).write_text(stranger)
        assert cluster.wait(job, 900) == "COMPLETED", output(cluster, "frozen")
        assert not executed.exists(), executed.read_text()
        assert files.is_complete(cluster.run("frozen", runs) / "eval/digits/valid/after")
    finally:
        code.write_text(before)
        for name in ("yaml.py", "numpy.py", "submitit.py", "pydantic.py"):
            (clone / name).unlink(missing_ok=True)


def test_from_inside_a_job(cluster: Cluster) -> None:
    """What the surrounding job has does not reach the new one."""
    runs = cluster.home / "sweep-inside"
    inner = f"submit configs/digits.yaml name=inside {SHORT} {SMALL} training.num_train_epochs=1 job.time=0:33:00"
    script = cluster.home / "inside.sh"
    script.write_text(
        f"#!/bin/bash\nexport FTLIB_RUNS='{runs}'\n"
        f"'{cluster.login.parent}/ftlib' {inner} > '{cluster.home}/inside.out'\n"
    )
    script.chmod(0o755)
    outer = cluster.sbatch(f"--time=5 --cpus-per-task=3 --mem=500M --output='{cluster.home}/inside.log' {script}")
    assert cluster.wait(outer) == "COMPLETED", (cluster.home / "inside.log").read_text()
    job = (cluster.home / "inside.out").read_text().strip()
    cluster.jobs.append(job)
    shown = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True).stdout
    assert re.search(r"NumCPUs=1\b", shown) and "TimeLimit=00:33:00" in shown and "MinMemoryNode=1400M" in shown
    assert cluster.wait(job, 600) == "COMPLETED", output(cluster, "inside")
