"""Slurm's reasons for which a pending job will not start until somebody changes something, and what to do."""

from __future__ import annotations

import re

_SUBMIT_AGAIN = "ftlib cancel it and submit it again"
_REMEDIES = {
    "PartitionTimeLimit": f"job.time is above the partition's limit; {_SUBMIT_AGAIN} with less time, or in another "
    "partition (a run requeues itself and resumes)",
    "PartitionNodeLimit": f"job.nodes is not allowed in this partition; {_SUBMIT_AGAIN} with other nodes",
    "PartitionConfig": f"the partition does not allow this request, account or QOS; {_SUBMIT_AGAIN} with other job.*",
    "Partition(Down|Inactive)": f"the partition is closed; wait, or {_SUBMIT_AGAIN} in another partition",
    "BadConstraints": f"no node satisfies the request; {_SUBMIT_AGAIN} with other job.constraint, gpus, cpus or mem",
    "ReqNodeNotAvail": "its nodes are down or reserved (a maintenance before the job's time limit?); wait, or request "
    "less time",
    "NodeDown": f"a node that it asks for is down; wait, or {_SUBMIT_AGAIN} without that node",
    "(Account|QOS)NotAllowed|Invalid(Account|QOS)": f"{_SUBMIT_AGAIN} with another job.account or job.qos",
    r"(Assoc|QOS)Max\w*Per(Job|Node)(Limit)?|QOSMin\w+|(Association|QOS)TimeLimit": "one job may not request that much "
    f"(or that little) with this account or QOS; {_SUBMIT_AGAIN} with other job.*",
    r"(Assoc|QOS)(Grp|Max)\w*Minutes\w*": "the account's or QOS's time is used up; ask your site, or use another "
    "job.account",
    r"(Assoc|QOS)(Grp|Max)(?!Jobs|Submit)\w+": "a limit of the account or QOS; it starts when enough other "
    "jobs have ended, and never if the limit is below this request (sacctmgr show qos, show assoc)",
    "DependencyNeverSatisfied": f"the job that it waits for failed; {_SUBMIT_AGAIN}",
    "JobHeld(User|Admin)": "it is held; scontrol release JOB, or ask your site if an administrator holds it",
    "launch failed requeued held": "its start failed, and Slurm holds it; ask your site, then scontrol release JOB",
    "Reservation(Deleted)?": "the reservation has not begun, or is gone; scontrol show reservation",
}  # fmt: skip
"""Regular expression of squeue's reason → remedy. Reasons that pass, such as Priority or Resources, have no entry."""


def pending_remedy(reason: str) -> str:
    """Return what to do about a reason that does not pass by itself; "" for others.

    Args:
        reason: as squeue prints it, such as `ReqNodeNotAvail, UnavailableNodes:n1`.
    """
    word = reason.partition(",")[0].strip("() ")
    return next((remedy for pattern, remedy in _REMEDIES.items() if re.fullmatch(pattern, word)), "")
