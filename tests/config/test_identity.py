"""Identities, prepared keys and evaluation settings outlast new keys; changed results get a recipe."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml
from pydantic import Field

import ftlib as ftlib_package
from ftlib.config import identity
from ftlib.config.identity import RecipeChange, canonical_fields
from ftlib.config.loader import load_experiment, read_raw_config
from ftlib.config.schema import Config, Section
from ftlib.core import files
from ftlib.core.paths import Site, find_site
from ftlib.data import dataset
from ftlib.evaluation.evaluate import EvaluationRequest, evaluation_settings
from ftlib.merging.recipe import Recipe
from ftlib.reports.run_report import render
from ftlib.reports.sweep_stats import group_runs
from ftlib.runs import run as runs
from ftlib.runs.model_card import write_card
from ftlib.runs.run import Run
from ftlib.slurm.sweep import expand_sweep
from tests.conftest import REPOSITORY, start_ftlib
from tests.reports import fake_runs

Ftlib = Callable[..., tuple[int, str, str]]

GOLDEN = json.loads((REPOSITORY / "tests" / "golden" / "identities.json").read_text())
"""What each version called the runs of these configs (of a sweep, each point), oldest first. It may only grow."""

SITE = Site(Path("/store"), Path("/runs"))


def named(path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, list[str]]]:
    """For each run of a config: its possible identities, prepared folders, and the hash of its evaluation's settings.

    Datasets are not there: their content stands in as a text.
    """
    monkeypatch.setattr(dataset, "_content", lambda data: [f"annotations of {data.source} {data.file}"])
    monkeypatch.setattr(dataset, "_mask_codec_content", lambda config: [])
    found = []
    for member in expand_sweep(read_raw_config(path, []), SITE, {}):
        config = member.experiment.config
        subject = SimpleNamespace(name=config.model.base, weights_hash="digest", config=config)
        rows = SimpleNamespace(metadata={"splits": {"valid": {"fingerprint": "rows"}}}, labels=["a", "b"])
        asked = EvaluationRequest(
            cast(Any, subject), config, cast(Any, rows), without_context=config.evaluation.without_context
        )
        settings = files.json_sha256(evaluation_settings(asked, "valid", None))[:16]
        identities = [name.identity for name in member.experiment.names]
        found.append(
            {
                "identity": identities,
                "prepared": [folder.name for folder in dataset.possible_folders(config, SITE)],
                "evaluation": [settings],
            }
        )
    return found


def assert_found(known: list[dict[str, list[str]]], now: list[dict[str, list[str]]]) -> None:
    """Identities are found by all names that they ever had; data of an older format only by runs that noted them."""
    for old, new in zip(known, now, strict=True):
        assert {key for key in ("identity", "evaluation") if not set(old[key]) <= set(new[key])} == set()
        assert old["prepared"][-len(new["prepared"]) :] == new["prepared"]


@pytest.mark.parametrize("name", GOLDEN["configs"])
def test_shipped_configs_keep_their_names(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_found(GOLDEN["configs"][name], named(REPOSITORY / "configs" / name, monkeypatch))


@pytest.mark.parametrize("number", range(len(GOLDEN["generated"])))
def test_generated_configs_keep_their_names(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = GOLDEN["generated"][number]
    path = tmp_path / "generated.yaml"
    path.write_text(yaml.safe_dump(known["config"]))
    assert_found(known["runs"], named(path, monkeypatch))


class Inner(Section):
    share: float = 0.5


class Loss(Section):
    """`config.Loss` with keys of a later version: plain, and sections of their own."""

    average: str = "token"
    label_smoothing: float = 0.0
    on: str = "response"
    packing: bool = False
    later: int = 7
    inner: Inner = Inner()
    optional: Inner | None = None
    several: list[Inner] = Field(default_factory=list)


def test_a_new_key_enters_only_where_it_differs_from_its_default() -> None:
    before = {"average": "token", "label_smoothing": 0.0, "on": "response", "packing": False}
    assert canonical_fields(Loss()) == canonical_fields(Loss(later=7, inner=Inner(share=0.5))) == before
    assert canonical_fields(Loss(later=8)) == {**before, "later": 8}
    assert canonical_fields(Loss(inner=Inner(share=1.0))) == {**before, "inner": {"share": 1.0}}
    assert canonical_fields(Loss(optional=Inner())) == {**before, "optional": {}}
    assert canonical_fields(Loss(several=[Inner(), Inner(share=1.0)])) == {**before, "several": [{}, {"share": 1.0}]}


def test_the_record_of_keys_is_that_of_version_0_1() -> None:
    """Adding to it would rename runs; a key without a default would have to stand in every config anyway."""
    content = {section: sorted(keys) for section, keys in identity.ORIGINAL_KEYS.items()}
    assert files.json_sha256(content)[:16] == RECORD


RECORD = "5860eb96025b7152"


def test_saved_configs_have_no_newer_keys_at_their_defaults(write_config: Callable[..., Path]) -> None:
    """The code that an older run has pinned refuses keys that it does not know."""
    saved = yaml.safe_load(load_experiment(write_config(), [], SITE, {}).to_yaml())
    assert set(saved) == identity.ORIGINAL_KEYS["Config"] - {"sweep"}
    for section in ("model", "data", "loss", "guard", "checkpoint", "evaluation", "job"):
        assert set(saved[section]) == identity.ORIGINAL_KEYS[section.capitalize()]


def test_merges_keep_their_names() -> None:
    recipe = Recipe.model_validate(
        {"base": "b", "models": [{"model": "m"}], "method": "ties", "lambda": 0.5, "output": "o"}
    )
    assert canonical_fields(recipe, {"Recipe": ("output",)}) == {
        "base": "b", "revision": None, "models": [{"model": "m", "weight": 1.0}], "method": "ties", "density": None,
        "trim": None, "normalize": None, "lambda": 0.5, "seed": None, "layer": None, "parts": {}, "form": "model",
    }  # fmt: skip


def decays(config: Config) -> bool:
    return float(config.training.get("weight_decay", 0)) > 0


CHANGE = RecipeChange(1, "biases are not decayed", decays)


def begin(run: Run) -> None:
    """Leave what the beginning of a training leaves."""
    with files.atomic_directory(run.code) as folder:
        (folder / "some.py").write_text("code of its time")


def test_a_recipe_renames_only_the_runs_that_it_affects(
    write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_config()
    monkeypatch.setattr(identity, "RECIPES", ())
    plain, decayed = (load_experiment(path, [f"training.weight_decay={decay}"], SITE, {}) for decay in (0, 0.1))
    monkeypatch.setattr(identity, "RECIPES", (CHANGE,))
    after = [load_experiment(path, [f"training.weight_decay={decay}"], SITE, {}) for decay in (0, 0.1)]
    assert after[0] == plain
    assert after[1].identity != decayed.identity
    assert [name.recipe for name in after[1].names] == [1, 0]
    assert after[1].names[1].identity == decayed.identity


DECAY = "training.weight_decay=0.1"
ALL_BUT_LANGUAGE = "adapter={method: full, freeze: [vision, projector, embeddings]}"


@pytest.mark.parametrize(
    ("overrides", "recipes"),
    [
        ([], [4, 0]),
        (["model.dtype=bfloat16"], [4, 2, 0]),
        (["model.dtype=bfloat16", "adapter.master_weights=false"], [4, 0]),
        (["model.dtype=bfloat16", "adapter={method: lora}", DECAY], [4, 0]),
        (["model.dtype=bfloat16", "adapter={method: dora}"], [4, 0]),
        (["model.dtype=bfloat16", "adapter={method: dora}", DECAY], [4, 3, 0]),
        (["model.dtype=bfloat16", "training.bf16=true", "adapter={method: attention}", DECAY], [4, 0]),
        (["model.dtype=bfloat16", DECAY], [4, 3, 2, 0]),
        (["training.weight_decay=0"], [4, 0]),
        ([DECAY, ALL_BUT_LANGUAGE], [4, 0]),
        ([DECAY, "adapter={method: full, freeze: [embeddings]}"], [4, 3, 0]),
        ([DECAY, ALL_BUT_LANGUAGE, "model.family=causal", "task=instruct"], [4, 3, 0]),
    ],
)
def test_which_runs_have_other_weights_now(
    write_config: Callable[..., Path], overrides: list[str], recipes: list[int]
) -> None:
    """Master weights are recipe 2, what weight decay spares is recipe 3, how rows are read is recipe 4."""
    experiment = load_experiment(write_config(), overrides, SITE, {})
    assert [name.recipe for name in experiment.names] == recipes
    assert len({name.identity for name in experiment.names}) == len(recipes)


@pytest.fixture
def older(store: Path, write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Run]:
    """A config, and a run of it that was made before the code changed."""
    path = write_config(replace=("  max_steps: 12", "  max_steps: 2\n  weight_decay: 0.1"))
    monkeypatch.setattr(identity, "RECIPES", ())
    site = find_site()
    run = runs.create_run(load_experiment(path, [], site), site)
    monkeypatch.setattr(identity, "RECIPES", (CHANGE,))
    return path, run


def test_an_unfinished_run_of_an_older_recipe_goes_on_under_its_name(older: tuple[Path, Run], ftlib: Ftlib) -> None:
    path, run = older
    site = find_site()
    assert runs.run_for(load_experiment(path, [], site), site) != run, "it was never begun: nothing is lost"
    begin(run)
    config = run.config_file.read_text()
    experiment = load_experiment(path, ["job.mem=1G"], site)
    assert runs.create_run(experiment, site) == run
    assert run.config_file.read_text() == config.replace("mem: 16G", "mem: 1G")
    notice = runs.recipe_notice(experiment, site)
    assert notice and f"tiny/{run.folder.name} is of recipe 0 (changed since: biases are not decayed)" in notice
    assert "goes on with the code that it began with" in notice and "another name" in notice
    assert runs.run_for(experiment, site, new=True) != run


def test_a_finished_run_of_an_older_recipe_is_named_and_can_be_used(older: tuple[Path, Run]) -> None:
    path, run = older
    site = find_site()
    begin(run)
    files.write_json(run.done_marker, {"step": 2, "result": "model"})
    experiment = load_experiment(path, [], site)
    new = runs.run_for(experiment, site)
    assert new != run and new.folder.name == experiment.identity
    notice = runs.recipe_notice(experiment, site)
    assert notice and f"stays as it is: ftlib evaluate tiny/{run.folder.name}" in notice
    assert f"tiny/{new.folder.name} is a new run" in notice
    own = load_experiment(run.config_file, [], site)
    assert own.identity == run.folder.name and runs.run_for(own, site) == run, "its own config means it"


def test_the_recipe_is_shown(older: tuple[Path, Run], ftlib: Ftlib, tmp_path: Path) -> None:
    path, run = older
    site = find_site()
    begin(run)
    fake_runs.train(run)
    fake_runs.finish(run)
    config = load_experiment(run.config_file, [], site).config
    write_card(run, config)
    told = "Recipe 0 (changed since: biases are not decayed)."
    assert told in (run.result_folder("full") / "README.md").read_text()
    assert told in render(fake_runs.record_of(run, site), made=0.0)
    assert "recipe" not in ftlib("status")[1], "all are of the same one"
    new = runs.create_run(load_experiment(path, [], site), site)
    new.log_event("start", step=0, attempt=0, recipe=1)
    files.write_json(new.data, files.read_json(run.data))
    write_card(new, config)
    assert " Recipe 1.\n" in (new.result_folder("full") / "README.md").read_text()
    lines = [line.split()[:2] for line in ftlib("status")[1].splitlines()]
    assert lines[0] == ["run", "recipe"]
    assert sorted(lines[2:]) == sorted([[f"tiny/{run.folder.name}", "0"], [f"tiny/{new.folder.name}", "1"]])
    records = [fake_runs.record_of(each, site) for each in (run, new)]
    assert sorted(setting.values["recipe"] for setting in group_runs(records)) == ["1", "–"], "not one setting"


def test_evaluating_or_replacing_by_a_config_names_the_older_run(older: tuple[Path, Run], ftlib: Ftlib) -> None:
    path, run = older
    begin(run)
    assert f"# tiny/{run.folder.name}" in ftlib("submit", path, "--dry-run")[1]
    code, out, error = ftlib("submit", path, "--dry-run", "--replace")
    assert code == 0 and f"tiny/{run.folder.name}" not in out and "goes on with the code" not in error
    files.write_json(run.done_marker, {"step": 2, "result": "model"})
    code, _, error = ftlib("evaluate", path)
    assert code == 2 and f"ftlib evaluate tiny/{run.folder.name}" in error


def test_an_unfinished_run_is_prepared_again_by_its_own_code(older: tuple[Path, Run]) -> None:
    """Which looks for the folder by the name that it gave it."""
    path, run = older
    with files.atomic_directory(run.code) as folder:
        shutil.copytree(Path(ftlib_package.__file__).parent, folder / "ftlib")
        own = folder / "ftlib" / "data" / "dataset.py"
        own.write_text(own.read_text().replace("FORMAT = 4\n", "FORMAT = 44\n"))
    process = start_ftlib("prepare", path)
    out, error = process.communicate()
    assert process.returncode == 0 and "this run was started with a different version of ftlib" in error, error
    config = load_experiment(path, [], find_site()).config
    assert Path(out.strip()) not in dataset.possible_folders(config, find_site())
