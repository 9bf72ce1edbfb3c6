"""Hours before queueing, from the speed of finished runs."""

from __future__ import annotations

from pathlib import Path

from ftlib.config.loader import load_experiment
from ftlib.core import files, jsonl
from ftlib.core.paths import Site
from ftlib.runs.forecast import Forecast, describe_forecast, forecast
from ftlib.runs.run import Run

CONFIG = """\
name: tiny
task: classify
model: {family: paligemma, base: ftlib/tiny-paligemma}
adapter: {method: full}
data: {source: jsonl, root: "${store}/data"}
training: {max_steps: 12, per_device_train_batch_size: 10}
evaluation: {splits: [valid]}
"""


def finished(site: Site, path: Path, name: str, seconds: float, *overrides: str) -> None:
    """A run of 12 steps of 10 rows that took `seconds` a step after a start-up of 50 s."""
    experiment = load_experiment(path, [f"name={name}", *overrides], site)
    run = Run(site.runs / name / "1")
    files.write_text(run.config_file, experiment.to_yaml())
    jsonl.append_jsonl(run.history, {"event": "start", "time": 30, "allocated": 10})
    jsonl.append_jsonl(run.history, {"event": "training", "time": 60, "total": 12, "rows": 10, "tokens": None})
    for step in range(1, 13):
        jsonl.append_jsonl(run.metrics, {"step": step, "attempt": 0, "loss": 1.0, "seconds": seconds})
    files.write_json(run.done_marker, {"step": 12})


def test_hours_from_finished_runs_like_it(tmp_path: Path) -> None:
    site, path = Site(tmp_path, tmp_path / "runs"), tmp_path / "config.yaml"
    path.write_text(CONFIG)
    long = load_experiment(path, ["training.max_steps=3600"], site)
    assert forecast(long, site) is None
    told = describe_forecast([long], path, site, 3600)
    assert "unknown" in told and f"plan {path} --time" in told
    finished(site, path, "a", 2.0)
    finished(site, path, "other-gpu", 9.0, "job.gpu_type=h100")
    finished(site, path, "other-adapter", 9.0, "adapter.method=lora")
    assert forecast(long, site) == Forecast(seconds=7200.0, startup=50, gpus=1, basis="1 finished run")
    finished(site, path, "b", 4.0)
    known = forecast(long, site)
    assert known and (known.basis, known.seconds) == ("2 finished runs", 3600 / ((1 / 2 + 1 / 4) / 2))
    assert "as 2 finished runs took" in describe_forecast([long, long], path, site, 3600)


def test_what_a_time_limit_means() -> None:
    known = Forecast(seconds=7200, startup=50, gpus=4, basis="1 finished run")
    assert known.starts(3600) == 3 and known.starts(8 * 3600) == 1 and known.starts(150) == 0
    assert known.describe(8 * 3600) == "about 2 h a run (8.1 GPU-h), as 1 finished run took"
    assert known.describe(3600, 3).endswith("; job.time means 2 requeues; 3 runs: 6.1 h, 24 GPU-h")
    assert "shorter than the start-up" in known.describe(150)
