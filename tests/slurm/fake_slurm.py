"""Programs named like Slurm's that answer from files, for a PATH of their own."""

from __future__ import annotations

from pathlib import Path

SBATCH = """\
#!/bin/bash
here=$(dirname "$0")
if [[ $1 == --test-only ]]; then
    echo "$@" >> "$here/asked-sbatch"
    cat "$here/test-only" >&2 2> /dev/null
    [[ ! -e $here/test-only ]]; exit
fi
number=$(($(ls "$here" | grep -c '^script-') + 71))
from=$(cat "$here/refused-from" 2> /dev/null || echo 0)
if [[ -e $here/refusal && $number -ge $from ]]; then cat "$here/refusal" >&2; exit 1; fi
cp "$1" "$here/script-$number"
env > "$here/environment-$number"
name=$(sed -n 's/^#SBATCH --job-name=//p' "$1")
if [[ -e $here/lost ]]; then
    last=$(sed -nE 's/^#SBATCH --array=0-([0-9]+).*/\\1/p' "$1")
    if [[ -z $last ]]; then echo "$number|PENDING|Priority||0:00|lab|low|normal|$name" >> "$here/ghosts"; fi
    for element in $(seq 0 ${last:--1}); do
        echo "${number}_$element|PENDING|Priority||0:00|lab|low|normal|$name" >> "$here/ghosts"
    done
    if [[ $(cat "$here/lost") == killed ]]; then kill -9 $PPID; exit; fi
    cat "$here/lost" >&2
    exit 1
fi
echo "Submitted batch job $number"
"""
ANSWER = """\
#!/bin/bash
here=$(dirname "$0")
echo "$@" >> "$here/asked-$(basename "$0")"
if [[ $(basename "$0") == squeue ]]; then cat "$here/ghosts" 2> /dev/null; fi
cat "$here/$(basename "$0").answer" 2> /dev/null || { echo "Unable to contact slurm controller" >&2; exit 1; }
"""


def queued(job: str, state: str = "PENDING", reason: str = "Priority", name: str = "tiny") -> str:
    """A row of squeue's answer."""
    return f"{job}|{state}|{reason}||0:00|lab|low|normal|{name}\n"


class FakeSlurm:
    """A folder for PATH; `answers` sets what a program prints, None that it fails."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        for name in ("srun", "sacct", "squeue", "scontrol", "sinfo", "sacctmgr", "scancel", "sbatch"):
            path = folder / name
            path.write_text(SBATCH if name == "sbatch" else ANSWER)
            path.chmod(0o755)
        self.answers(scontrol="MaxArraySize = 1001\n", sacct="", squeue="")

    def answers(self, **texts: str | None) -> None:
        for name, text in texts.items():
            path = self.folder / f"{name}.answer"
            if text is None:
                path.unlink(missing_ok=True)
            else:
                path.write_text(text)

    def scripts(self) -> list[str]:
        """The scripts that sbatch got, in order."""
        return [path.read_text() for path in sorted(self.folder.glob("script-*"))]

    def asked(self, program: str) -> list[str]:
        """The arguments of each call of a program."""
        path = self.folder / f"asked-{program}"
        return path.read_text().splitlines() if path.exists() else []

    def environment(self, number: int) -> dict[str, str]:
        """What sbatch inherited."""
        lines = (self.folder / f"environment-{number}").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)
