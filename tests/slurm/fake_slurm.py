"""Programs named like Slurm's that answer from files, for a PATH of their own."""

from __future__ import annotations

from pathlib import Path

SBATCH = """\
#!/bin/bash
here=$(dirname "$0")
number=$(($(ls "$here" | grep -c '^script-') + 71))
from=$(cat "$here/refused-from" 2> /dev/null || echo 0)
if [[ -e $here/refusal && $number -ge $from ]]; then cat "$here/refusal" >&2; exit 1; fi
cp "$1" "$here/script-$number"
env > "$here/environment-$number"
echo "Submitted batch job $number"
"""
ANSWER = """\
#!/bin/bash
here=$(dirname "$0")
echo "$@" >> "$here/asked-$(basename "$0")"
cat "$here/$(basename "$0").answer" 2> /dev/null || { echo "Unable to contact slurm controller" >&2; exit 1; }
"""


class FakeSlurm:
    """A folder for PATH; `answers` sets what a program prints, None that it fails."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        for name in ("srun", "sacct", "squeue", "scontrol", "sacctmgr", "scancel", "sbatch"):
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

    def environment(self, number: int) -> dict[str, str]:
        """What sbatch inherited."""
        lines = (self.folder / f"environment-{number}").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)
