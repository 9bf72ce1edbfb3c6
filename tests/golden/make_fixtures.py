"""Make fixtures/old.tar.gz: a store with runs as the code of one commit leaves them, for test_old_state.py.

    git worktree add /tmp/then COMMIT && python3 tests/golden/make_fixtures.py /tmp/then

Everything is made by that commit's commands, in a copy of its package with one more comment, so that the code which the
interrupted run has pinned is never the code that goes on with it. Interrupted are a training (after a checkpoint), an
evaluation and a merge, by SIGKILL. fixtures/README.md tells the commit; undisturbed.json holds the losses of the same
training without an interruption.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

PLACE = Path("/tmp/ftlib-golden")
"""The same whoever makes it, since submitted jobs name absolute paths."""

STORE, RUNS = PLACE / "store", PLACE / "store" / "runs" / "alice"
FIXTURES = Path(__file__).parent / "fixtures"

LONG_AGO = 1735689600
"""2025 began."""

CONFIG = """\
name: old
task: classify
seed: 0
model: {family: paligemma, base: "${store}/models/small"}
adapter: {method: lora, r: 2, alpha: 4, dropout: 0.1, freeze: []}
data:
  source: jsonl
  root: ${store}/datasets/small
  split: {valid: 0.2, test: 0.2, seed: 0}
training: {max_steps: 12, per_device_train_batch_size: 4, learning_rate: 1.0e-2, warmup_steps: 2}
checkpoint: {steps: 3, keep: 2}
evaluation: {splits: [valid, test], max_new_tokens: 2, batch_size: 4}
"""

DIES = """
import os, signal, sys
fragment, number = sys.argv[1], int(sys.argv[2])
count = 0
def hook(event, arguments):
    global count
    if event == "open" and fragment in str(arguments[0]) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
from ftlib.__main__ import main
sys.exit(main(sys.argv[3:]))
"""
"""Ends at the n-th time that a file is opened for writing whose path holds a word."""

SBATCH = """\
#!/bin/bash
echo "Submitted batch job 71"
"""


def ftlib(*words: object, program: tuple[str, ...] = ("-m", "ftlib"), code: int = 0, **environment: str) -> str:
    """Run the old code's command; its stdout."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FTLIB_", "SLURM", "SBATCH_"))}
    own = {"FTLIB_STORE": str(STORE), "FTLIB_RUNS": str(RUNS), "PYTHONPATH": str(PLACE / "checkout")}
    own |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "SLURMD_NODENAME": "node1", "HF_HUB_OFFLINE": "1"}
    own |= {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *program, *map(str, words)],
        cwd=PLACE,
        env={**kept, **own, **environment},
        capture_output=True,
        text=True,
    )
    print(f"$ ftlib {' '.join(map(str, words))}\n{done.stderr}")
    assert done.returncode == code, done.returncode
    return done.stdout


def dies(fragment: str, number: int, *words: object) -> None:
    """Run a command that is killed on its way."""
    ftlib(fragment, str(number), *words, program=("-c", DIES), code=-9)


def make_material() -> None:
    """models/small: a PaliGemma of width 16 with random weights; datasets/small: 60 digits."""
    import torch
    from transformers import AutoProcessor, PaliGemmaConfig, PaliGemmaForConditionalGeneration

    (PLACE / "tiny.yaml").write_text(
        CONFIG.replace('"${store}/models/small"', "ftlib/tiny-paligemma")
        .replace("source: jsonl", "source: digits")
        .replace("datasets/small", "datasets/digits")
    )
    ftlib("stage", PLACE / "tiny.yaml")
    tiny = STORE / "models" / "ftlib" / "tiny-paligemma"
    config = json.loads((tiny / "config.json").read_text())
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config["projection_dim"] = config["vision_config"]["projection_dim"] = 16
    config["vision_config"].update(small)
    config["text_config"].update(small, head_dim=8, layer_types=["full_attention"])
    torch.manual_seed(0)
    model = PaliGemmaForConditionalGeneration(PaliGemmaConfig.from_dict(config))
    model.save_pretrained(STORE / "models" / "small")
    AutoProcessor.from_pretrained(tiny).save_pretrained(STORE / "models" / "small")
    digits, ours = STORE / "datasets" / "digits", STORE / "datasets" / "small"
    (ours / "images").mkdir(parents=True)
    lines = (digits / "data.jsonl").read_text().splitlines(keepends=True)[:60]
    (ours / "data.jsonl").write_text("".join(lines))
    for line in lines:
        image = json.loads(line)["image"]
        shutil.copyfile(digits / image, ours / image)
    shutil.rmtree(digits)
    shutil.rmtree(tiny.parent)


def make_runs(config: Path) -> None:
    """Of `old`, seed 0 is done, 1 half evaluated, 2 half trained; others answer by choice, diverged, or are queued."""
    ftlib("prepare", config)
    for seed in (0, 1):
        ftlib("train", config, f"seed={seed}")
    identities = {json.loads(line.split(": ")[1]): path.parent.name for path in RUNS.glob("old/*/config.yaml")
                  for line in path.read_text().splitlines() if line.startswith("seed: ")}  # fmt: skip
    ftlib("evaluate", f"old/{identities[0]}")
    ftlib("train", config, "name=chosen", "evaluation.decode=choose")
    ftlib("evaluate", "chosen")
    dies("/answers-", 2, "evaluate", f"old/{identities[1]}")
    dies("/metrics.jsonl", 8, "train", config, "seed=2")
    ftlib("train", config, "name=diverged", "guard.max_loss=1", "guard.restarts=1", code=1)
    models = [f"old/{identities[seed]}" for seed in (0, 1)]
    merge = ["merge", "--base", STORE / "models" / "small", "--model", *models, "--method", "ties"]
    dies("/merge.json", 1, *merge, "-o", PLACE / "merged")
    (PLACE / "bin").mkdir()
    (PLACE / "bin" / "sbatch").write_text(SBATCH)
    for name in ("srun", "squeue", "sacct", "scontrol", "sacctmgr"):
        (PLACE / "bin" / name).write_text("#!/bin/bash\n[[ $0 != */scontrol ]] || echo 'MaxArraySize = 1001'\n")
    for program in (PLACE / "bin").iterdir():
        program.chmod(0o755)
    ftlib("submit", config, "name=queued", PATH=f"{PLACE / 'bin'}:{os.environ['PATH']}")
    ftlib("train", config, "seed=2", FTLIB_RUNS=str(PLACE / "undisturbed"))


def leave_out() -> None:
    """What no test needs, and what tells of the machine that this was made on."""
    for name in ("bin", "checkout", "tiny.yaml", "undisturbed", "store/hf", "store/cache", "store/images"):
        path = PLACE / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(RUNS / ".jobs")
    for code in RUNS.glob("*/*/code"):
        if (code.parent / "DONE").exists() or code.parent.parent.name == "diverged":
            shutil.rmtree(code)
    for path in RUNS.glob("*/*/environment.json"):
        starts = json.loads(path.read_text())
        known = {"platform": "Linux", "host": "node1"}
        path.write_text(json.dumps([{**start, **known} for start in starts], indent=1) + "\n")
    set_back()
    (torn,) = PLACE.glob("merged.tmp-*")
    torn.rename(torn.with_name(torn.name.replace(socket.gethostname(), "node1")))


def set_back() -> None:
    """What is told of times begins with 2025, so that it is long ago by every clock."""
    logs = [path for path in RUNS.rglob("*") if path.name in ("history.jsonl", "environment.json")]
    told = [float(time) for path in logs for time in re.findall(r'"time": ([0-9.]+)', path.read_text())]
    for path in logs:
        text = path.read_text()
        path.write_text(
            re.sub(r'(?<="time": )[0-9.]+', lambda m: str(round(float(m[0]) - min(told) + LONG_AGO, 3)), text)
        )


def main() -> None:
    """Make the fixtures of a checkout."""
    checkout = Path(sys.argv[1]).absolute()
    commit = subprocess.check_output(["git", "-C", checkout, "rev-parse", "--short=12", "HEAD"], text=True).strip()
    changed = subprocess.check_output(["git", "-C", checkout, "status", "--porcelain", "ftlib"], text=True)
    assert not changed, f"{checkout}: ftlib is not as it was committed"
    PLACE.mkdir()
    try:
        left_out = shutil.ignore_patterns("__pycache__")
        for part in ("ftlib", "jobs"):
            shutil.copytree(checkout / part, PLACE / "checkout" / part, ignore=left_out)
        with (PLACE / "checkout" / "ftlib" / "__init__.py").open("a") as file:
            file.write("# of tests/golden/make_fixtures.py\n")
        (PLACE / "old.yaml").write_text(CONFIG)
        make_material()
        make_runs(PLACE / "old.yaml")
        (metrics,) = (PLACE / "undisturbed").glob("old/*/metrics.jsonl")
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        FIXTURES.mkdir(exist_ok=True)
        (FIXTURES / "undisturbed.json").write_text(json.dumps(lines, indent=1) + "\n")
        leave_out()
        with tarfile.open(FIXTURES / "old.tar.gz", "w:gz") as archive:
            archive.add(PLACE, arcname=".", filter=_nobodys)
        told = f"Made by `tests/golden/make_fixtures.py` with the code of commit {commit}. Tests go on with it.\n"
        (FIXTURES / "README.md").write_text(told)
    finally:
        shutil.rmtree(PLACE)


def _nobodys(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.mtime = LONG_AGO
    member.uname = member.gname = ""
    return member


if __name__ == "__main__":
    main()
