"""A file with `sweep:` in, checked runs out; mistakes name their lines."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from ftlib.config.loader import load_experiment, read_raw_config
from ftlib.core.paths import Site
from ftlib.errors import UserError
from ftlib.slurm.sweep import SweepRun, expand_sweep

SITE = Site(Path("/s"), Path("/r"))


@pytest.fixture
def members(tmp_path: Path, config_file: Path) -> Callable[..., list[SweepRun]]:
    """The runs of the config with a sweep at its end; the sweep's first key is in line 11."""

    def load(sweep: str, *overrides: str) -> list[SweepRun]:
        path = tmp_path / "sweep.yaml"
        indented = ["  " + line for line in sweep.strip().splitlines()]
        path.write_text(config_file.read_text() + "\n".join(["sweep:", *indented]) + "\n")
        return expand_sweep(read_raw_config(path, overrides), SITE, {})

    return load


def fault(members: Callable[..., list[SweepRun]], sweep: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        members(sweep, *overrides)
    return re.sub(r"\S*/sweep\.yaml", "FILE", caught.value.problem)


def test_a_grid_is_every_combination_in_the_order_of_the_file(members: Callable[..., list[SweepRun]]) -> None:
    found = members("seed: [5, 6]\ndata.prompt: ['{prefix}', 'q: {prefix}']\ndata: {split: {seed: [1, 2]}}")
    configs = [member.experiment.config for member in found]
    assert [(one.seed, one.data.prompt, one.data.split.seed) for one in configs] == [
        (seed, prompt, split) for seed in (5, 6) for prompt in ("{prefix}", "q: {prefix}") for split in (1, 2)
    ]
    assert found[3].label == "seed=5 data.prompt=q: {prefix} data.split.seed=2"
    assert len({member.experiment.identity for member in found}) == 8


def test_a_point_is_the_run_that_its_values_make_by_hand(
    members: Callable[..., list[SweepRun]], config_file: Path, tmp_path: Path
) -> None:
    point = members("seed: [9]\ntraining.learning_rate: [3.0e-5]")[0].experiment
    by_hand = load_experiment(config_file, ["seed=9", "training.learning_rate=3e-5"], SITE, {})
    assert point == by_hand
    saved = tmp_path / "saved.yaml"
    saved.write_text(point.to_yaml())
    assert load_experiment(saved, [], SITE, {}) == by_hand


def test_a_list_crossed_with_a_grid(members: Callable[..., list[SweepRun]]) -> None:
    found = members("seed: [1, 2]\nlist:\n- {training.max_steps: 3}\n- {training.max_steps: 4, data.on_bad: skip}")
    assert [member.label for member in found] == [
        "seed=1 training.max_steps=3",
        "seed=1 training.max_steps=4 data.on_bad=skip",
        "seed=2 training.max_steps=3",
        "seed=2 training.max_steps=4 data.on_bad=skip",
    ]
    assert [member.experiment.config.data.on_bad for member in found] == ["stop", "skip"] * 2


RANDOM = """\
random:
  count: COUNT
  seed: 1
  draw:
    training.learning_rate: {log_uniform: [1.0e-5, 1.0e-1]}
    training.weight_decay: {uniform: [0, 0.2]}
    training.max_steps: [3, 4]
"""


def test_random_draws_stay_when_more_are_asked_for(members: Callable[..., list[SweepRun]]) -> None:
    many = members(RANDOM.replace("COUNT", "200"))
    assert [member.label for member in members(RANDOM.replace("COUNT", "5"))] == [member.label for member in many[:5]]
    settings = [member.experiment.config.training for member in many]
    rates = [math.log10(one["learning_rate"]) for one in settings]
    assert -5 <= min(rates) < -4.8 and -1.2 < max(rates) <= -1
    assert -3.3 < sum(rates) / 200 < -2.7
    assert 0 <= min(one["weight_decay"] for one in settings) < 0.01
    assert 80 < sum(one["max_steps"] == 3 for one in settings) < 120
    assert members(RANDOM.replace("COUNT", "5").replace("seed: 1", "seed: 2"))[0].label != many[0].label


def test_random_draws_are_all_different(members: Callable[..., list[SweepRun]]) -> None:
    choices = "random: {count: COUNT, draw: {seed: [1, 2, 3], adapter.freeze: [[], [vision]]}}"
    assert len({member.label for member in members(choices.replace("COUNT", "6"))}) == 6
    found = fault(members, choices.replace("COUNT", "7"))
    assert found == "FILE:11: sweep.random: count is 7, but draw has only 6 points"


def test_without_a_sweep_there_is_one_run(config_file: Path) -> None:
    (only,) = expand_sweep(read_raw_config(config_file, []), SITE, {})
    assert only.label == "" and only.experiment == load_experiment(config_file, [], SITE, {})


def test_the_command_line_may_change_a_sweep(members: Callable[..., list[SweepRun]]) -> None:
    assert len(members("seed: [1, 2]", "sweep.seed=[1, 2, 3]")) == 3
    assert len(members("seed: [1, 2]", "sweep=null")) == 1
    assert fault(members, "seed: [1]", "sweep.seed=[1, -1]") == "command line: seed: must be at least 0, got -1"


def test_every_fault_of_every_point_once_with_its_line(members: Callable[..., list[SweepRun]]) -> None:
    found = fault(members, "seed: [1, -2,\n  x]\ntraning.max_steps: [1, 2]\nlist:\n- {data.root: 7}")
    assert sorted(found.splitlines()) == [
        "FILE:11: seed: must be at least 0, got -2",
        "FILE:12: seed: must be a whole number, got 'x'",
        "FILE:13: traning: unknown key; did you mean training?",
        "FILE:15: data.root: must be text, got 7",
    ]


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ("seed: 3", "FILE:11: sweep.seed: must be a list of values"),
        ("seed: []", "FILE:11: sweep.seed: must be a list of values"),
        ("seed: [1]\njob.gpus: [0, 1]", "FILE:12: job.gpus: all runs of a sweep share it"),
        ("name: [a, b]", "FILE:11: name: all runs of a sweep share it"),
        ("seed: [1]\nlist:\n- {seed: 2}", "FILE:11: sweep: seed is set twice in one point"),
        ("list: {seed: 1}", "FILE:11: sweep.list: must be a list of mappings, one for each point"),
        ("random: {count: 2}", "FILE:11: sweep.random: must have count and draw, and may have seed"),
        ("random: {count: 0, draw: {}}", "FILE:11: sweep.random: count (at least 1) and seed must be whole numbers"),
        ("random:\n  count: 1\n  draw:\n    seed: {normal: [0, 1]}",
         "FILE:14: sweep.random.draw.seed: must be a list, "
         "uniform: [low, high] or log_uniform: [low, high] with 0 < low"),
        ("random:\n  count: 1000000000\n  draw: {training.weight_decay: {uniform: [0, 1]}}",
         "FILE:12: sweep.random.count: must be at most 5,000, got 1000000000"),
        ("seed: {a: [1], b: [1]}\nlist: [{x: 1}, {x: 2}]\ndata:\n  split: {seed: [" + "1, " * 2501 + "]}",
         "FILE:10: sweep: 1 x 1 x 2501 x 2 points: too many runs"),
        ("seed: [" + "1, " * 5001 + "]", "FILE:10: sweep: 5001 points: too many runs"),
        ("name.x: [1]", "FILE:11: name.x: all runs of a sweep share it"),
        ("seed.x: [1]", "FILE:11: seed.x: there is no such section"),
    ],
)  # fmt: skip
def test_mistakes_in_the_sweep_itself(members: Callable[..., list[SweepRun]], sweep: str, message: str) -> None:
    assert fault(members, sweep) == message


def test_points_that_are_the_same_run_are_refused(members: Callable[..., list[SweepRun]]) -> None:
    found = fault(members, "evaluation.num_beams: [1, 4]")
    assert found == "FILE:10: sweep: duplicate points: evaluation.num_beams=1 / evaluation.num_beams=4"
    assert "duplicate points" in fault(members, "seed: [1, 1]")


@pytest.mark.parametrize("command", ["train", "prepare", "evaluate", "stage"])
def test_other_commands_say_what_to_do(
    command: str, ftlib: Callable[..., tuple[int, str, str]], config_file: Path
) -> None:
    code, _, err = ftlib(command, config_file, "sweep.seed=[1, 2]")
    assert code == 2
    assert "sweep: this config defines several runs" in err and "ftlib submit" in err and "sweep=null" in err
