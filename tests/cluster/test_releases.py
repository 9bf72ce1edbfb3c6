"""Official releases on a real Slurm, in the real container: one config of each model family."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from ftlib.config.schema import Data
from ftlib.data.example import Example
from ftlib.data.sources.registry import iter_examples
from tests.cli.test_mixture import SMALL, instruction_sets
from tests.cluster.conftest import USER, Cluster
from tests.data.sources import releases
from tests.models import tiny_causal


def captions(root: Path) -> Path:
    """COCO's own files and folders, with pictures."""
    made = releases.coco_captions(root)
    rows = [row for row in iter_examples(Data(source="coco_captions", root=str(made))) if isinstance(row, Example)]
    releases.draw(made, rows)
    return made


@pytest.fixture
def place(cluster: Cluster) -> Path:
    """A folder in the store, which the container sees."""
    folder = cluster.store / "releases"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


@pytest.mark.parametrize("name", ["coco_captions", "opencalm_3b"])
def test_a_release_goes_through_the_jobs(cluster: Cluster, place: Path, shared: Path, name: str) -> None:
    if name == "coco_captions":
        root, few = captions(place), ["data.split.valid=1", "training.bf16=false", "model.max_length=null"]
        shutil.copytree(shared / "model", place / "base")
    else:
        root, few = instruction_sets(place), []
        tiny_causal.save("gpt_neox", place / "base")
    subprocess.run(["chown", "-R", f"{USER}:", place], check=True)
    small = [f"model.base={place / 'base'}", f"data.root={root}", *SMALL, *few, "evaluation.before=false"]
    settings = " ".join(
        f"'{setting}'" for setting in dict.fromkeys(small) if setting != "training.fp16=false" or not few
    )
    job = cluster.sbatch(f"--time=20 jobs/train.sbatch configs/{name}.yaml {settings}")
    assert cluster.wait(job) == "COMPLETED", cluster.log(job)
    run = cluster.run(name)
    assert json.loads((run / "DONE").read_text())["step"] == 2
    assert list(run.glob("eval/*/*/after/scores.json")), cluster.log(job)
    shown = f"--image '{next(root.rglob('*.jpg'))}'" if name == "coco_captions" else "--context 文脈"
    asked = cluster.shell(f"jobs/run.sh ftlib predict {name} --prompt question {shown}")
    assert asked.returncode == 0, asked.stderr
