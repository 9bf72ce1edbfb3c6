"""Slurm client: job states, limits, cancellation. Takes job IDs and returns plain records.

Every query is one call for all jobs, has a time-out, and has three results: found, not found (the ID is missing from
the result) and `SlurmUnavailable`. Queries that need several programs start them at the same time. The commands and
their output formats are those of sacct(1), squeue(1), scontrol(1), sacctmgr(1) and scancel(1) of Slurm 22.05 to 24.11.
"""

from __future__ import annotations

import getpass
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from dataclasses import dataclass, replace

from ftlib.core import log
from ftlib.runs.usage import Allocation

TIMEOUT_SECONDS = 60.0
_SECONDS_UNTIL_PROGRESS = 2.0
_DAY = 86400.0

Runner = Callable[[Sequence[str]], "subprocess.CompletedProcess[str]"]
"""Runs a program and returns its output.

Raises:
    OSError: there is no such program.
    subprocess.TimeoutExpired: no answer.
"""

WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT")
RUNNING = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING")

_INHERITED = re.compile(r"SLURM_(?!CONF$)|SBATCH_|SRUN_|SALLOC_|PMIX?_|SUBMITIT_")
_SACCT_FIELDS = "JobID,State,ExitCode,Reason,NodeList,ElapsedRaw"
_ALLOCATION_FIELDS = "JobID,State,ElapsedRaw,Start,Submit,TotalCPU,AllocTRES,TRESUsageInAve"
_ASSOCIATION = ("account", "partition", "defaultqos", "maxsubmitjobs", "maxwall", "maxtres")
_QOS = ("name", "maxsubmitpu", "maxwall", "maxtres", "maxtrespu", "flags")
_SQUEUE_FORMAT = "%i|%T|%r|%N|%M|%a|%P|%q|%j"
_NO_ACCOUNTING = re.compile(r"accounting storage is disabled|is not in PATH")


_AWAY = re.compile(
    "timed out|Unable to contact slurm controller|Zero Bytes were transmitted|[Cc]ommunication|connection failure"
    "|Connection (?:refused|reset)|Transport endpoint|Message (?:receive|send) failure|Unexpected message"
)


def is_away(answer: str) -> bool:
    """Whether an error means that the controller did not answer; it may have done what it was asked for."""
    return bool(_AWAY.search(answer))


class SlurmUnavailable(Exception):
    """Slurm is not installed, does not respond in time, or returns an error.

    Attributes:
        remedy: what the user can do.
    """

    def __init__(self, problem: str, installed: bool = True) -> None:
        super().__init__(problem)
        self.remedy = (
            "Wait until it responds, then run the same command again; if it stays away, ask your site."
            if installed
            else "On a machine without Slurm: --executor local. On a cluster, load Slurm's module."
        )


@dataclass(frozen=True)
class JobAttempt:
    """One start of a job.

    Attributes:
        state: Slurm's state, such as RUNNING or OUT_OF_MEMORY.
        exit_code: of the batch script; None while unknown.
        reason: Slurm's reason for waiting; may be empty.
        node: its node; empty before it starts.
        seconds: run time.
        by: UID of the user who cancelled it; empty if Slurm did, and without accounting.
    """

    state: str
    exit_code: int | None
    reason: str
    node: str
    seconds: int
    by: str = ""


@dataclass(frozen=True)
class Job:
    """A job or one element of an array.

    Attributes:
        attempts: oldest first; more than one after a requeue. Without accounting, only the newest.
    """

    attempts: tuple[JobAttempt, ...]

    @property
    def last_attempt(self) -> JobAttempt:
        return self.attempts[-1]

    @property
    def is_active(self) -> bool:
        """Whether it is pending or running."""
        return self.last_attempt.state in WAITING or self.last_attempt.state in RUNNING


@dataclass(frozen=True)
class NodeKind:
    """CPUs, memory in MiB and GPUs of a node."""

    cpus: int
    memory: float
    gpus: int


@dataclass(frozen=True)
class _Queued:
    """A row of squeue: a job or an element of an array."""

    job: str
    attempt: JobAttempt
    account: str
    partition: str
    qos: str
    name: str


@dataclass(frozen=True)
class JobLimit:
    """What accounting allows one job.

    Attributes:
        where: whose limit it is.
        limit: MaxWall, MaxTRESPerJob or MaxTRESPerUser.
        resource: time, or a TRES such as cpu, mem, node, gres/gpu or gres/gpu:a100.
        amount: as sacctmgr prints it.
    """

    where: str
    limit: str
    resource: str
    amount: str


@dataclass(frozen=True)
class _AccountingRules:
    """The user's associations, and QOS by name, as rows of sacctmgr; empty, and not `known`, if nothing is enforced."""

    known: bool
    associations: Sequence[Mapping[str, str]]
    qos: Mapping[str, Mapping[str, str]]

    def association(self, account: str | None, partition: str | None) -> Mapping[str, str] | None:
        """Return the association of a job; None if it depends on Slurm's defaults."""
        fits = [
            row
            for row in self.associations
            if row["account"] == (account or row["account"]).lower()
            and row["partition"] in ("", partition or row["partition"])
        ]
        if partition and len({row["account"] for row in fits}) == 1:
            fits = [row for row in fits if row["partition"]] or fits  # one with a partition takes precedence
        return fits[0] if len(fits) == 1 else None


def clean_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without variables of a surrounding job and the user's SBATCH_* settings."""
    return {name: value for name, value in environment.items() if not _INHERITED.match(name)}


def run_program(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a Slurm command; the default `Runner`."""
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)


class Slurm:
    """A Slurm client; tests replace `run` by a function that returns the commands' output.

    The user's own queue, limits and Slurm's configuration are asked for once, and remembered.
    """

    def __init__(self, run: Runner = run_program) -> None:
        self._run = run
        self._own_queue: list[_Queued] | None = None
        self._rules: _AccountingRules | None = None
        self._config: str | None = None

    def jobs(self, ids: Iterable[str], own: bool = False) -> dict[str, Job]:
        """Return jobs by ID, such as 12 or 12_3; jobs that Slurm does not know are missing.

        Args:
            own: they are this user's jobs; squeue then lists the user's queue, which later queries read, too.

        Raises:
            SlurmUnavailable: squeue does not respond, and sacct does not know every job.
        """
        wanted = list(dict.fromkeys(ids))
        if not wanted:
            return {}
        listed = _array_job_ids(wanted)
        accounting: str | SlurmUnavailable
        queue: list[_Queued] | SlurmUnavailable
        sacct = ("sacct", "-nPXD", "-o", _SACCT_FIELDS, "-j", listed)
        if own and self._own_queue is not None:
            accounting, queue = self._ask(sacct)[0], self._own_queue
        else:
            accounting, text = self._ask(sacct, _squeue_command(own, listed))
            queue = text if isinstance(text, SlurmUnavailable) else _queued(text)
            if own and not isinstance(queue, SlurmUnavailable):
                self._own_queue = queue
        recorded = {} if isinstance(accounting, SlurmUnavailable) else _jobs(list(_accounted(accounting)), wanted)
        if isinstance(queue, SlurmUnavailable):
            if set(recorded) != set(wanted):
                also = f"; {accounting}" if isinstance(accounting, SlurmUnavailable) else ""
                raise SlurmUnavailable(f"{queue}{also}")
            log.warning(f"{queue}: the states of jobs are those of Slurm's accounting")
            return recorded
        if isinstance(accounting, SlurmUnavailable) and not _NO_ACCOUNTING.search(str(accounting)):
            log.warning(f"{accounting}: what became of jobs that ended some minutes ago is not known")
        waiting = _jobs([(row.job, row.attempt) for row in queue], wanted)
        return recorded | {
            name: _with_queue(recorded[name], job) if name in recorded else job for name, job in waiting.items()
        }

    def waiting_reasons(self, ids: Sequence[str]) -> dict[str, list[str]]:
        """Return why jobs wait that have just been submitted: ID (of an array without index) → Slurm's reasons.

        Raises:
            SlurmUnavailable: squeue does not respond.
        """
        found: dict[str, list[str]] = {}
        for row in _queued(self._answer(*_squeue_command(False, ",".join(ids)))):
            job = row.job.partition("_")[0]
            if row.attempt.state in WAITING and job in ids and row.attempt.reason not in found.setdefault(job, []):
                found[job].append(row.attempt.reason)
        return found

    def find_by_name(self, names: Sequence[str], since: float) -> dict[str, str]:
        """Return the user's jobs of some names, waiting, running or ended: name → ID, of an array without index.

        Args:
            since: seconds since 1970; older jobs need not be found.

        Raises:
            SlurmUnavailable: squeue does not respond, and sacct does not know every name.
        """
        day = time.strftime("%Y-%m-%d", time.localtime(since - _DAY))
        asked = ("sacct", "-nPX", "-S", day, "-o", "JobID,JobName", "--name", ",".join(names))
        accounting, queue = self._ask(asked, _squeue_command(own=True))
        found: dict[str, str] = {}
        if not isinstance(accounting, SlurmUnavailable):
            for line in accounting.splitlines():
                job, name = line.split("|", 1)
                found[name] = job.partition("_")[0]
        if not isinstance(queue, SlurmUnavailable):
            found |= {row.name: row.job.partition("_")[0] for row in _queued(queue)}
        found = {name: found[name] for name in names if name in found}
        if isinstance(queue, SlurmUnavailable) and len(found) < len(names):
            raise queue
        return found

    def allocations(self, ids: Iterable[str]) -> list[Allocation]:
        """Return every start of jobs on their nodes, the oldest first: with resources, CPU time, and wait in the queue.

        Jobs that accounting does not know are missing.

        Raises:
            SlurmUnavailable: accounting does not respond, or there is none.
        """
        wanted = list(dict.fromkeys(ids))
        if not wanted:
            return []
        text = self._answer("sacct", "-nPD", "-o", _ALLOCATION_FIELDS, "-j", _array_job_ids(wanted))
        return [one for one in _allocations(text) if one.job in wanted]

    def cancel(self, ids: Sequence[str]) -> None:
        """Cancel jobs; jobs that have ended are ignored.

        Raises:
            SlurmUnavailable: Slurm does not respond, or returns an error.
        """
        self._answer("scancel", *ids)

    def max_array_size(self) -> int:
        """Return the maximum number of elements of an array; 1 if arrays are disabled.

        Raises:
            SlurmUnavailable: no answer.
        """
        config = self._config or self._answer("scontrol", "show", "config")
        found = re.search(r"^MaxArraySize\s*=\s*(\d+)", config, re.MULTILINE)
        return max(1, int(found[1])) if found else 1001

    def partitions(self) -> tuple[dict[str, dict[str, str]], dict[str, list[NodeKind]]]:
        """Return the settings of each partition, named as by scontrol, and the kinds of its nodes; empty if unknown."""
        shown, listed = self._ask(("scontrol", "show", "partition", "-o"), ("sinfo", "-h", "-e", "-o", "%P|%c|%m|%G"))
        partitions: dict[str, dict[str, str]] = {}
        nodes: dict[str, list[NodeKind]] = {}
        if not isinstance(shown, SlurmUnavailable):
            for line in shown.splitlines():
                if facts := dict(re.findall(r"(\w+)=(\S*)", line) if line.startswith("PartitionName=") else ()):
                    partitions[facts["PartitionName"]] = facts
        if not isinstance(listed, SlurmUnavailable):
            for line in listed.splitlines():
                if found := re.fullmatch(r"([^|]+?)\*?\|(\d+)\+?\|(\d+)\+?\|(.*)", line):
                    gpus = sum(int(number) for number in re.findall(r"\bgpu(?::[^:,()]+)?:(\d+)", found[4]))
                    nodes.setdefault(found[1], []).append(NodeKind(int(found[2]), float(found[3]), gpus))
        return partitions, nodes

    def remaining_submit_quota(self, account: str | None, partition: str | None, qos: str | None) -> int | None:
        """Return how many more jobs this user may submit now; None if there is no limit or it is unknown.

        The limits are MaxSubmitJobs of the association and MaxSubmitJobsPerUser of the QOS that the jobs will have;
        every element of an array counts.

        Raises:
            SlurmUnavailable: squeue does not respond. Without accounting there are no limits.
        """
        rules = self._accounting_rules()
        if not rules.known or (own := rules.association(account, partition)) is None:
            return None
        used_qos = qos or own["defaultqos"]
        left = []
        if (limit := own["maxsubmitjobs"]).isdigit():
            left.append(int(limit) - self._count_queued(account=own["account"], partition=own["partition"]))
        if (of_this_qos := rules.qos.get(used_qos, {}).get("maxsubmitpu", "")).isdigit():
            left.append(int(of_this_qos) - self._count_queued(qos=used_qos))
        return max(0, min(left)) if left else None

    def job_limits(
        self, account: str | None, partition: str | None, qos: str | None, partition_qos: str | None
    ) -> list[JobLimit]:
        """Return what accounting allows one job; empty without limits, if they are not enforced, and if unknown.

        Of each limit the one counts that Slurm takes: of the partition's QOS, the job's QOS, the association (which
        includes those of its account), in this order; with the flag OverPartQOS the job's QOS comes first.
        MaxTRESPerUser of a QOS counts whatever the association says.
        """
        rules = self._accounting_rules()
        own = rules.association(account, partition)
        name = qos or (own["defaultqos"] if own else "")
        places = [(f"QOS {each}", rules.qos[each]) for each in (partition_qos or "", name) if each in rules.qos]
        if "OverPartQOS" in rules.qos.get(name, {}).get("flags", ""):
            places.reverse()
        if own:
            places.append((f"your association with account {own['account']}", own))
        found: dict[tuple[str, str], JobLimit] = {}
        for where, row in places:
            for limit, key in (("MaxWall", "maxwall"), ("MaxTRESPerJob", "maxtres"), ("MaxTRESPerUser", "maxtrespu")):
                text = row.get(key, "")
                amounts = {"time": text} if limit == "MaxWall" and text else _tres_texts(text)
                for resource, amount in amounts.items():
                    found.setdefault((limit, resource), JobLimit(where, limit, resource, amount))
        return list(found.values())

    def _accounting_rules(self) -> _AccountingRules:
        """Return the user's associations and all QOS, which are asked for once."""
        if self._rules is None:
            own, every, config = self._ask(
                ("sacctmgr", "-nP", "show", "assoc", f"user={getpass.getuser()}", f"format={','.join(_ASSOCIATION)}"),
                ("sacctmgr", "-nP", "show", "qos", f"format={','.join(_QOS)}"),
                ("scontrol", "show", "config"),
            )
            self._config = config if isinstance(config, str) else None
            enforced = re.search(r"^AccountingStorageEnforce\s*=\s*(\S+)", self._config or "", re.MULTILINE)
            unused = enforced and not re.search(r"\b(limits|safe|all)\b", enforced[1])
            if isinstance(own, str) and isinstance(every, str) and not unused:
                associations = [dict(zip(_ASSOCIATION, line.split("|"), strict=False)) for line in own.splitlines()]
                qos = [dict(zip(_QOS, line.split("|"), strict=False)) for line in every.splitlines()]
                self._rules = _AccountingRules(True, associations, {row["name"]: row for row in qos})
            else:
                self._rules = _AccountingRules(False, [], {})
        return self._rules

    def has_jobs(self) -> bool:
        """Return whether this user has jobs that are queued or running.

        Raises:
            SlurmUnavailable: Slurm does not respond.
        """
        return self._count_queued() > 0

    def _count_queued(self, account: str = "", partition: str = "", qos: str = "") -> int:
        """Count the user's waiting and running jobs; an empty argument fits all."""
        if self._own_queue is None:
            self._own_queue = _queued(self._answer(*_squeue_command(own=True)))
        return sum(
            row.attempt.state in (*WAITING, *RUNNING)
            and account.lower() in ("", row.account.lower())
            and partition in ("", *row.partition.split(","))
            and qos in ("", row.qos)
            for row in self._own_queue
        )

    def _answer(self, *command: str) -> str:
        """Return what one program prints.

        Raises:
            SlurmUnavailable: it is not there, does not respond, or fails.
        """
        (answer,) = self._ask(command)
        if isinstance(answer, SlurmUnavailable):
            raise answer
        return answer

    def _ask(self, *commands: Sequence[str]) -> list[str | SlurmUnavailable]:
        """Run programs at the same time; one that takes long is named while the user waits for it."""
        with futures.ThreadPoolExecutor(len(commands)) as pool:
            asked = [pool.submit(self._run_program, command) for command in commands]
            if futures.wait(asked, _SECONDS_UNTIL_PROGRESS).not_done:
                names = [command[0] for command, each in zip(commands, asked, strict=True) if not each.done()]
                log.info(f"waiting for {' and '.join(dict.fromkeys(names))} (Slurm), {TIMEOUT_SECONDS:.0f} s at most")
            return [each.result() for each in asked]

    def _run_program(self, command: Sequence[str]) -> str | SlurmUnavailable:
        try:
            done = self._run(command)
        except subprocess.TimeoutExpired:
            return SlurmUnavailable(f"{command[0]} does not answer within {TIMEOUT_SECONDS:.0f} s")
        except OSError:
            return SlurmUnavailable(f"{command[0]} is not in PATH", installed=False)
        if done.returncode and command[0] == "squeue" and "Invalid job id" in done.stderr:
            return ""
        if done.returncode:
            return SlurmUnavailable(f"{command[0]}: {done.stderr.strip() or f'exit code {done.returncode}'}")
        return done.stdout


def _squeue_command(own: bool, job_ids: str = "") -> tuple[str, ...]:
    where = ("-u", getpass.getuser()) if own else ("-j", job_ids)
    return ("squeue", "-h", "-r", "-t", "all", "-o", _SQUEUE_FORMAT, *where)


def _queued(text: str) -> list[_Queued]:
    rows = []
    for line in text.splitlines():
        job, state, reason, node, elapsed, account, partition, qos, name = line.split("|", 8)
        attempt = JobAttempt(state, None, _reason(reason), node, _seconds(elapsed))
        rows.append(_Queued(job, attempt, account, partition, qos, name))
    return rows


def _accounted(text: str) -> Iterator[tuple[str, JobAttempt]]:
    """Yield jobs from sacct's answer; -D includes attempts before a requeue."""
    for line in text.splitlines():
        name, state, code, reason, node, seconds = line.split("|")
        node = "" if node == "None assigned" else node
        known = None if state in WAITING or state in RUNNING else int(code.partition(":")[0])
        word, _, by = state.partition(" by ")
        yield name, JobAttempt(word, known, _reason(reason), node, int(seconds or 0), by)


def _with_queue(recorded: Job, queued: Job) -> Job:
    """Return a job of sacct with its state in squeue, which knows of changes, and of reasons for waiting, first."""
    now, last = queued.last_attempt, recorded.last_attempt
    if not queued.is_active or (now.state == "COMPLETING" and not recorded.is_active):
        return recorded
    if recorded.is_active:
        return Job((*recorded.attempts[:-1], replace(now, node=now.node or last.node)))
    return Job((*recorded.attempts, now))


def _allocations(text: str) -> list[Allocation]:
    """Return the allocations in sacct's rows: each job's row is followed by those of its steps."""
    found: list[Allocation] = []
    watched: list[list[float]] = []
    for line in text.splitlines():
        name, state, elapsed, start, submit, cpu, tres, use = line.split("|")
        if "." in name:
            utilization = _tres(use).get("gres/gpuutil")
            if found and name.startswith(f"{found[-1].job}.") and utilization is not None:
                watched[-1].append(utilization)
            continue
        begun, sent = _timestamp(start), _timestamp(submit)
        if begun is None:  # it has not started
            continue
        given, active = _tres(tres), state in RUNNING
        one = Allocation(
            job=name,
            start=begun,
            end=begun + int(elapsed or 0),
            queued=max(0.0, begun - sent) if sent is not None else 0.0,
            gpus=_gpus(given),
            cpus=int(given["cpu"]) if "cpu" in given else None,
            cpu_seconds=None if active else _cpu_seconds(cpu),
        )
        found.append(one)
        watched.append([])
    means = [sum(values) / len(values) if values else None for values in watched]
    whole = [replace(one, gpu_utilization=mean) for one, mean in zip(found, means, strict=True)]
    return sorted(whole, key=lambda one: one.start)


def _tres_texts(text: str) -> dict[str, str]:
    """Return the amounts of a TRES list such as cpu=8,gres/gpu:a100=2,mem=16G."""
    return {name: value for name, _, value in (part.partition("=") for part in text.split(",")) if value}


def _tres(text: str) -> dict[str, float]:
    """Return the numbers of a TRES list such as billing=1,cpu=8,gres/gpu:a100=2,mem=16G (tres.html of Slurm's manual);
    sizes are left out."""
    numbers = re.compile(r"\d+(\.\d+)?")
    return {name: float(value) for name, value in _tres_texts(text).items() if numbers.fullmatch(value)}


def _gpus(given: Mapping[str, float]) -> int | None:
    """Return the number of GPUs; None where the site does not account for them (AccountingStorageTRES)."""
    typed = [int(value) for name, value in given.items() if name.startswith("gres/gpu:")]
    return int(given["gres/gpu"]) if "gres/gpu" in given else sum(typed) if typed else None


def _timestamp(text: str) -> float | None:
    """Return sacct's local time in seconds since 1970; None for Unknown and None."""
    try:
        return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))
    except ValueError:
        return None


def _cpu_seconds(text: str) -> float:
    """Return sacct's CPU time, [D-[H:]]M:S[.milliseconds] (of less than an hour M:S.mmm), in seconds."""
    whole, _, fraction = text.partition(".")
    return _seconds(whole) + (float(f"0.{fraction}") if fraction.isdigit() else 0.0)


def _reason(text: str) -> str:
    return "" if text == "None" else text


def _seconds(elapsed: str) -> int:
    """Return squeue's used time, [D-][[H:]M:]S, in seconds; INVALID and the like are 0."""
    days, _, rest = elapsed.rpartition("-")
    total = 0
    for field in rest.split(":"):
        if not field.isdigit():
            return 0
        total = total * 60 + int(field)
    return int(days or 0) * 86400 + total


def _array_job_ids(names: Sequence[str]) -> str:
    return ",".join(dict.fromkeys(name.partition("_")[0] for name in names))


def _jobs(rows: Sequence[tuple[str, JobAttempt]], wanted: Sequence[str]) -> dict[str, Job]:
    """Return jobs by ID. Pending elements of an array share a row such as 12_[3-7,9%4]; started ones have own rows."""
    own: dict[str, list[JobAttempt]] = {}
    shared: list[tuple[str, str, JobAttempt]] = []
    for name, attempt in rows:
        master, bracket, elements = name.partition("_[")
        if bracket:
            shared.append((master, elements, attempt))
        else:
            own.setdefault(name, []).append(attempt)
    for name in wanted:
        master, _, element = name.partition("_")
        for other, elements, attempt in shared:
            if name not in own and master == other and element and _contains_element(elements, int(element)):
                own[name] = [attempt]
    return {name: Job(tuple(own[name])) for name in wanted if name in own}


def _contains_element(elements: str, number: int) -> bool:
    """Whether `3-7,9,12-20:2%4]` contains a number; dots at the end of a shortened list match all higher numbers."""
    for part in elements.rstrip("]").partition("%")[0].split(","):
        if "..." in part:
            return True
        found = re.fullmatch(r"(\d+)(?:-(\d+))?(?::(\d+))?", part)
        if found:
            first, last, step = int(found[1]), int(found[2] or found[1]), int(found[3] or 1)
            if number in range(first, last + 1, step):
                return True
    return False
