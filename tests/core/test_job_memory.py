"""What a job's memory is, by made-up trees of /proc and /sys as kernels and Slurm make them."""

from __future__ import annotations

from pathlib import Path

import pytest

from ftlib.core.job_memory import JobMemory, job_memory

GIB = 2**30
STEP = "system.slice/slurmstepd.scope/job_7/step_0/user/task_0"


@pytest.fixture(autouse=True)
def without_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_MEM_PER_NODE", "SLURM_MEM_PER_CPU", "SLURM_CPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)


def machine(root: Path, cgroup: str, files: dict[str, str]) -> Path:
    content = {
        "proc/self/cgroup": cgroup,
        "proc/meminfo": f"MemTotal: {64 * GIB >> 10} kB\nShmem: {GIB >> 10} kB\n",
        **{f"sys/fs/cgroup/{path}": text for path, text in files.items()},
    }
    for path, text in content.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


def test_version_2_the_smallest_on_the_path_and_the_jobs_kills(tmp_path: Path) -> None:
    job = STEP.partition("/step_0")[0]
    files = {
        f"{STEP}/memory.max": "max\n",
        f"{STEP}/memory.events": "low 0\noom 1\noom_kill 1\noom_group_kill 0\n",
        f"{job}/memory.max": f"{8 * GIB}\n",
        f"{job}/memory.current": f"{5 * GIB}\n",
        f"{job}/memory.peak": f"{7 * GIB}\n",
        f"{job}/memory.stat": f"anon 5\nshmem {2 * GIB}\n",
        f"{job}/memory.events": "oom 3\noom_kill 3\n",
        "system.slice/memory.max": f"{60 * GIB}\n",
    }
    found = job_memory(machine(tmp_path, f"0::/{STEP}\n", files))
    assert found == JobMemory(8 * GIB, "memory.max of its cgroup", 7 * GIB, 2 * GIB, 3)
    assert str(found) == (
        "the job has 8.0 GiB of memory (memory.max of its cgroup), at most 7.0 GiB were in use, "
        "2.0 GiB are in /dev/shm and other tmpfs, which counts"
    )


def test_version_2_in_a_container_that_shows_its_own_cgroup_as_the_topmost(tmp_path: Path) -> None:
    files = {"memory.max": f"{3 * GIB}\n", "memory.current": f"{GIB}\n", "memory.events": "oom_kill 2\n"}
    assert job_memory(machine(tmp_path, "0::/\n", files)) == JobMemory(
        3 * GIB, "memory.max of its cgroup", GIB, None, 2
    )
    other = machine(tmp_path / "other", "0::/../../elsewhere\n", files)
    assert job_memory(other).limit == 3 * GIB


def test_version_1(tmp_path: Path) -> None:
    own = "memory/slurm/uid_0/job_7/step_0"
    files = {
        f"{own}/memory.limit_in_bytes": "9223372036854771712\n",
        f"{own}/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n",
        "memory/slurm/uid_0/job_7/memory.limit_in_bytes": f"{4 * GIB}\n",
        "memory/slurm/uid_0/job_7/memory.max_usage_in_bytes": f"{4 * GIB}\n",
        "memory/slurm/uid_0/job_7/memory.stat": "cache 1\ntotal_shmem 4096\n",
    }
    root = machine(tmp_path, f"9:name=systemd:/\n4:cpu,memory:/{own.partition('/')[2]}\n0::/\n", files)
    assert job_memory(root) == JobMemory(4 * GIB, "memory.limit_in_bytes of its cgroup", 4 * GIB, 4096, 1)


def test_without_a_limit_slurms_word_then_the_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = machine(tmp_path, f"0::/{STEP}\n", {f"{STEP}/memory.max": "max\n"})
    assert job_memory(root) == JobMemory(64 * GIB, "all of the machine's", shared=GIB)
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "1024")
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "3")
    assert job_memory(root).limit == 3 * GIB
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "2048")
    assert job_memory(root) == JobMemory(2 * GIB, "what Slurm was asked for")
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "0")  # all of the node's
    monkeypatch.delenv("SLURM_CPUS_ON_NODE")
    assert job_memory(root).limit == 64 * GIB
    assert "not known" in str(job_memory(tmp_path / "nothing"))


def test_of_this_machine() -> None:
    found = job_memory()
    assert found.limit is not None and found.limit > 1 << 28
