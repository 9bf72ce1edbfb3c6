"""The client against literal answers of the programs, as Slurm 22.05 gave them."""

import subprocess
from collections.abc import Sequence

import pytest

from ftlib.slurm.client import Slurm, SlurmUnavailable, clean_environment

SACCT = """\
223|REQUEUED|0:0|None|n1|28
223|CANCELLED by 1001|0:0|BeginTime|n1|14
244|FAILED|75:0|None|n1|27
260_0|COMPLETED|0:0|None|n1|21
260_1|RUNNING|0:0|JobArrayTaskLimit|n2|4
260_[1-4,7,10-20:5%2]|PENDING|0:0|JobArrayTaskLimit|None assigned|0
"""
SQUEUE = "260_1|RUNNING|None|n2|1-00:01:05\n260_2|PENDING|Priority||0:00\n"


class Programs:
    """Answers by program name; remembers what was asked."""

    def __init__(self, **answers: str | tuple[int, str] | Exception) -> None:
        self.answers = answers
        self.asked: list[list[str]] = []

    def __call__(self, command: Sequence[str]) -> "subprocess.CompletedProcess[str]":
        self.asked.append(list(command))
        answer = self.answers.get(command[0], FileNotFoundError(command[0]))
        if isinstance(answer, Exception):
            raise answer
        code, stderr = (0, "") if isinstance(answer, str) else answer
        return subprocess.CompletedProcess(command, code, answer if isinstance(answer, str) else "", stderr)


def test_one_question_for_all_jobs_and_all_their_attempts() -> None:
    programs = Programs(sacct=SACCT, squeue="")
    found = Slurm(programs).jobs(["223", "244", "260_0", "260_1", "260_3", "260_15", "260_5", "999"])
    assert programs.asked == [
        ["sacct", "-nPXD", "-o", "JobID,State,ExitCode,Reason,NodeList,ElapsedRaw", "-j", "223,244,260,999"],
        ["squeue", "-h", "-r", "-t", "all", "-o", "%i|%T|%r|%N|%M", "-j", "260,999"],
    ]
    assert [attempt.state for attempt in found["223"].attempts] == ["REQUEUED", "CANCELLED"]
    assert found["223"].last_attempt.by == "1001"
    assert found["244"].last_attempt.exit_code == 75 and not found["244"].is_active
    assert (found["260_1"].last_attempt.node, found["260_1"].last_attempt.exit_code, found["260_1"].is_active) == (
        "n2",
        None,
        True,
    )
    assert found["260_3"].last_attempt.reason == "JobArrayTaskLimit" and found["260_3"].is_active
    assert found["260_15"].last_attempt.node == ""
    assert "260_5" not in found and "999" not in found


def test_a_job_that_accounting_has_not_heard_of_yet_is_found_in_the_queue() -> None:
    programs = Programs(sacct=SACCT, squeue="261_0|PENDING|Priority||0:00\n")
    found = Slurm(programs).jobs(["244", "261_0"])
    assert found["261_0"].is_active and found["244"].last_attempt.exit_code == 75
    assert programs.asked[-1][-1] == "261"


def test_a_list_that_slurm_cut_short_holds_the_rest() -> None:
    assert Slurm(Programs(sacct="7_[0-3,9,...]|PENDING|0:0|None|None assigned|0\n")).jobs(["7_500"])["7_500"].is_active


@pytest.mark.parametrize("accounting", [(1, "Slurm accounting storage is disabled"), FileNotFoundError("sacct")])
def test_without_accounting_squeue_is_asked(accounting: tuple[int, str] | Exception) -> None:
    found = Slurm(Programs(sacct=accounting, squeue=SQUEUE)).jobs(["260_1", "260_2", "9"])
    assert found["260_1"].last_attempt.seconds == 86465 and found["260_2"].last_attempt.reason == "Priority"
    assert "9" not in found


def test_not_found_is_not_unreachable() -> None:
    gone = (1, "slurm_load_jobs error: Invalid job id specified")
    assert Slurm(Programs(sacct=(1, "disabled"), squeue=gone)).jobs(["9"]) == {}
    assert Slurm(Programs(sacct="", squeue=gone)).jobs(["9"]) == {}
    for answer in (FileNotFoundError("x"), subprocess.TimeoutExpired("squeue", 60), (1, "Unable to contact slurm")):
        with pytest.raises(SlurmUnavailable, match="squeue"):
            Slurm(Programs(sacct=answer, squeue=answer)).jobs(["9"])


def test_nothing_asked_for_nothing() -> None:
    programs = Programs()
    assert Slurm(programs).jobs([]) == {} and not programs.asked


def test_limits() -> None:
    config = "MaxArraySize            = 501\nMaxJobCount             = 10000\n"
    assert Slurm(Programs(scontrol=config)).max_array_size() == 501
    assert Slurm(Programs(scontrol="MaxArraySize = 0\n")).max_array_size() == 1


@pytest.mark.parametrize(
    ("where", "room"),
    [
        (("lab", "gpu", "debug"), 1),
        (("lab", "gpu", "normal"), 46),
        (("lab", "gpu", None), 46),
        (("lab", "long", None), 6),
        (("lab", None, None), None),
        (("Other", None, "debug"), 1),
        (("other", None, None), None),
        ((None, "gpu", "debug"), None),
        ((None, "long", None), None),
        (("none", None, None), None),
    ],
)
def test_room_is_what_the_limits_of_these_very_jobs_leave(
    where: tuple[str | None, str | None, str | None], room: int | None
) -> None:
    answers = {
        ("assoc", "account,partition,defaultqos,maxsubmitjobs"): "lab||normal|50\nlab|long|normal|9\nother|||\n",
        ("qos", "name,maxsubmitpu"): "normal|\ndebug|2\n",
        ("-A", "lab"): "1\n2_0\n2_1\n3\n",
        ("-A", "lab", "-p", "long"): "1\n2_0\n2_1\n",
        ("-q", "debug"): "3\n",
    }

    def answer(command: Sequence[str]) -> "subprocess.CompletedProcess[str]":
        key = (command[3], command[-1].removeprefix("format=")) if command[0] == "sacctmgr" else tuple(command[5:-2])
        return subprocess.CompletedProcess(command, 0, answers[key], "")

    assert Slurm(answer).remaining_submit_quota(*where) == room
    assert Slurm(Programs()).remaining_submit_quota(*where) is None


def test_cancel() -> None:
    programs = Programs(scancel="")
    Slurm(programs).cancel(["1", "2_3"])
    assert programs.asked == [["scancel", "1", "2_3"]]
    with pytest.raises(SlurmUnavailable, match="scancel is not in PATH"):
        Slurm(Programs()).cancel(["1"])


def test_what_a_surrounding_job_imposes_is_left_out() -> None:
    inherited = {"SLURM_JOB_ID": "1", "SLURM_CONFIG_X": "1", "SBATCH_PARTITION": "p", "PMI_RANK": "0", "PMIX_ID": "0",
                 "SRUN_CPUS_PER_TASK": "2"}  # fmt: skip
    kept = {"SLURM_CONF": "/etc/slurm.conf", "PATH": "/bin", "FTLIB_STORE": "/s"}
    assert clean_environment({**inherited, **kept}) == kept


ALLOCATIONS = """\
95|REQUEUED|45|2026-11-29T06:14:50|2026-11-29T06:14:50|00:28.262|billing=1,cpu=1,gres/gpu=1,mem=2500M,node=1|
95.batch|FAILED|45|2026-11-29T06:14:50|2026-11-29T06:14:50|00:01.313|cpu=1,gres/gpu=1,mem=2500M|cpu=00:00:01
95.2|FAILED|38|2026-11-29T06:14:57|2026-11-29T06:14:57|00:23.899|cpu=1,gres/gpu=1,mem=2500M|cpu=00:00:22
95|COMPLETED|85|2026-11-29T06:17:42|2026-11-29T06:17:26|01:22.856|billing=1,cpu=1,gres/gpu=1,mem=2500M,node=1|
96|RUNNING|9|2026-11-29T06:18:00|2026-11-29T06:17:00|00:00:00|billing=4,cpu=4,mem=8G,node=1|
97|PENDING|0|Unknown|2026-11-29T06:18:00|00:00:00||
"""
"""As Slurm 22.05 printed it; the rows of other steps are left out, and 96 and 97 were added."""


def test_allocations_are_starts_on_nodes() -> None:
    programs = Programs(sacct=ALLOCATIONS)
    first, second, third = Slurm(programs).allocations(["95", "96", "97"])
    assert programs.asked == [
        [
            "sacct",
            "-nPD",
            "-o",
            "JobID,State,ElapsedRaw,Start,Submit,TotalCPU,AllocTRES,TRESUsageInAve",
            "-j",
            "95,96,97",
        ]
    ]
    assert [(one.job, one.seconds, one.queued, one.gpus, one.cpus) for one in (first, second, third)] == [
        ("95", 45, 0, 1, 1), ("95", 85, 16, 1, 1), ("96", 9, 60, None, 4)]  # fmt: skip
    assert (first.cpu_seconds, second.cpu_seconds, third.cpu_seconds) == (28.262, 82.856, None)
    assert second.start - first.start == 172 and Slurm(programs).allocations([]) == []


def test_what_a_site_accounts_for() -> None:
    """Only GPUs of a type; GPU utilization, where it is collected; days of CPU time."""
    rows = "8_1|COMPLETED|100|2026-11-29T06:00:00|None|1-02:00:01|cpu=8,gres/gpu:a100=2|\n" + "".join(
        f"8_1.{step}|COMPLETED|50|2026-11-29T06:00:00|None|00:01|cpu=8|gres/gpumem=1G,gres/gpuutil={use}\n"
        for step, use in enumerate((80, 60))
    )
    (found,) = Slurm(Programs(sacct=rows)).allocations(["8_1"])
    assert (found.gpus, found.gpu_utilization, found.cpu_seconds, found.queued) == (2, 70, 26 * 3600 + 1, 0)
