"""Relative paths count from the config's folder; below the store they are stored so that it may move."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from ftlib.config.loader import Experiment, load_experiment, load_section
from ftlib.core import files
from ftlib.core.paths import Site, find_site
from ftlib.data.dataset import possible_folders
from ftlib.merging.recipe import Recipe
from ftlib.runs import run as runs
from tests.conftest import FULL, LORA

Ftlib = Callable[..., tuple[int, str, str]]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    (tmp_path / "store" / "models" / "own").mkdir(parents=True)
    return Site(tmp_path / "store", tmp_path / "store" / "runs")


@pytest.fixture
def load(tmp_path: Path, site: Site, write_config: Callable[..., Path]) -> Callable[..., Experiment]:
    """A config in `configs/` on a base, a root and a warm start, loaded from another folder, `elsewhere`."""

    def loaded(base: str = "m", root: str = "d", warm: str = "", *overrides: str) -> Experiment:
        (tmp_path / "configs").mkdir(exist_ok=True)
        text = write_config(base=f'"{base}"', root=root).read_text() + (f"warm_start: {warm}\n" if warm else "")
        path = tmp_path / "configs" / "x.yaml"
        path.write_text(text)
        return load_experiment(path, overrides, site, {})

    return loaded


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def saved(experiment: Experiment) -> list[str | None]:
    fields = yaml.safe_load(experiment.to_yaml())
    return [fields["model"]["base"], fields["data"]["root"], fields["warm_start"]]


def test_relative_paths_count_from_the_config_s_folder(load: Callable[..., Experiment], tmp_path: Path) -> None:
    home = tmp_path / "configs"
    experiment = load("./m", "d", "../runs/a")
    assert saved(experiment) == [str(home / "m"), str(home / "d"), str(tmp_path / "runs" / "a")]
    assert [experiment.config.model.base, experiment.config.data.root] == [str(home / "m"), str(home / "d")]


def test_in_a_job_they_count_from_the_folder_of_the_original(
    load: Callable[..., Experiment], site: Site, tmp_path: Path
) -> None:
    """jobs/run.sh copies the config, and notes its folder beside the copy."""
    original = load("./m", "d")
    job = tmp_path / "12"
    job.mkdir()
    shutil.copy(tmp_path / "configs" / "x.yaml", job / "config.yaml")
    (job / "config.folder").write_text(f"{tmp_path}/configs\n")
    assert load_experiment(job / "config.yaml", (), site, {}).identity == original.identity


def test_those_of_overrides_count_from_the_current_folder(load: Callable[..., Experiment], elsewhere: Path) -> None:
    experiment = load("./m", "d", "", "model.base=./m", "data={source: jsonl, root: d}")
    assert saved(experiment)[:2] == [str(elsewhere / "m"), str(elsewhere / "d")]


def test_names_of_models_and_runs_are_no_paths_unless_a_folder_is_there(
    load: Callable[..., Experiment], tmp_path: Path, elsewhere: Path
) -> None:
    for folder in (elsewhere, elsewhere / "google"):
        (folder / "paligemma").mkdir(parents=True)
    (tmp_path / "configs" / "digits").mkdir(parents=True)
    assert saved(load("google/paligemma", "d", "digits"))[::2] == ["google/paligemma", "digits"]
    (tmp_path / "configs" / "google" / "paligemma").mkdir(parents=True)
    files.write_json(tmp_path / "configs" / "digits" / "config.json", {})
    home = tmp_path / "configs"
    assert saved(load("google/paligemma", "d", "digits"))[::2] == [str(home / "google/paligemma"), str(home / "digits")]
    (home / "ftlib" / "tiny-paligemma").mkdir(parents=True)
    assert saved(load("ftlib/tiny-paligemma"))[0] == "ftlib/tiny-paligemma"


def test_what_is_below_the_store_is_stored_so_however_it_is_written(
    load: Callable[..., Experiment], tmp_path: Path, site: Site
) -> None:
    (tmp_path / "mount").symlink_to(site.store)
    ways = [
        "${store}/models/own",
        str(site.store / "models" / "own"),
        "../store/models/own",
        str(tmp_path / "mount/models/own"),
    ]
    loaded = [load(way) for way in ways]
    assert {saved(each)[0] for each in loaded} == {"${store}/models/own"}
    assert len({each.identity for each in loaded}) == 1
    assert {each.config.model.base for each in loaded} == {str(site.store / "models" / "own")}


def test_a_run_that_version_0_1_named_by_an_absolute_path_is_found(
    load: Callable[..., Experiment], site: Site, tmp_path: Path
) -> None:
    """Then the hash was of paths as they were written."""
    experiment = load(str(site.store / "models" / "own"))
    old = next(name for name in experiment.names if name.raw["model"]["base"] == str(site.store / "models" / "own"))
    assert old.identity != experiment.identity
    config = site.runs / "tiny" / old.identity / "config.yaml"
    files.write_text(config, experiment.to_yaml(old.identity))
    before = config.read_text()
    assert runs.create_run(experiment, site).folder == config.parent
    assert config.read_text() == before, "the code that it has pinned computes its name from it"
    assert load_experiment(config, [], site, {}).identity == old.identity
    assert runs.run_for(load("${store}/models/own"), site).folder == config.parent


def test_a_run_that_version_0_1_named_by_a_relative_path_is_found_from_where_it_was_made(
    load: Callable[..., Experiment], site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "configs").mkdir()
    monkeypatch.chdir(tmp_path / "configs")
    experiment = load("./m")
    old = next(name for name in experiment.names if name.raw["model"]["base"] == "./m")
    config = site.runs / "tiny" / old.identity / "config.yaml"
    files.write_text(config, experiment.to_yaml(old.identity))
    assert runs.run_for(experiment, site).folder == config.parent
    assert load_experiment(config, [], site, {}).config.model.base == str(tmp_path / "configs" / "m")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert runs.run_for(load("./m"), site).folder != config.parent, "then it was another folder's model"


def test_paths_of_merges(site: Site, tmp_path: Path, elsewhere: Path) -> None:
    path = tmp_path / "configs" / "merge.yaml"
    (path.parent / "a").mkdir(parents=True)
    files.write_json(path.parent / "a" / "config.json", {})
    path.write_text("base: ../store/models/own\nmodels: [{model: a}, {model: other}]\nmethod: linear\noutput: out\n")
    recipe = load_section(Recipe, path, [], site)
    assert [recipe.base, recipe.output] == [str(site.store / "models" / "own"), str(path.parent / "out")]
    assert [each.model for each in recipe.models] == [str(path.parent / "a"), "other"]
    assert load_section(Recipe, path, ["output=out"], site).output == str(elsewhere / "out")


@pytest.mark.parametrize("way", ["moved", "symbolic link"])
def test_a_store_at_another_path_goes_on(
    store: Path, write_config: Callable[..., Path], shared: Path, ftlib: Ftlib, monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path, way: str,
) -> None:  # fmt: skip
    """Base and data are below it, the config names them by absolute paths of the first one."""
    shutil.copytree(shared / "model", store / "models" / "own")
    shutil.copytree(shared / "data", store / "datasets" / "own")
    config = write_config(LORA, base=str(store / "models" / "own"), root=str(store / "datasets" / "own"))
    for command in (["prepare", config], ["train", config], ["evaluate", "tiny"]):
        code, _, error = ftlib(*command)
        assert code == 0, error
    (before,) = find_site().runs.glob("tiny/*")
    place = tmp_path / "mnt" / "store"
    place.parent.mkdir()
    if way == "moved":
        store.rename(place)
        config.write_text(config.read_text().replace(str(store), str(place)))
    else:
        place.symlink_to(store)
    monkeypatch.setenv("FTLIB_STORE", str(place))
    run = find_site().runs / "tiny" / before.name
    made = {folder.name for folder in place.glob("prepared/*")}
    assert "already prepared" in ftlib("prepare", config)[2]
    assert "already finished" in ftlib("train", config)[2]
    code, _, error = ftlib("evaluate", "tiny")
    assert code == 0 and error.count("already evaluated") == 2, error
    warm = ftlib("train", config, "warm_start=tiny", "seed=4")
    assert warm[0] == 0, warm[2]
    (run / "DONE").unlink()  # and one that was not finished goes on
    shutil.rmtree(run / "adapter")
    code, _, error = ftlib("train", config)
    assert code == 0 and "resuming from the checkpoint of step 12" in error
    assert {folder.name for folder in place.glob("prepared/*")} == made
    assert len(list(run.parent.iterdir())) == 2


def test_roots_outside_the_store_count_by_their_content(
    store: Path, write_config: Callable[..., Path], shared: Path, ftlib: Ftlib, tmp_path: Path
) -> None:
    first, same, other = (shutil.copytree(shared / "data", tmp_path / name) for name in ("a", "b", "c"))
    images = sorted(other.rglob("*.png"))
    contents = [image.read_bytes() for image in images]
    for image, content in zip(images, [*contents[1:], contents[0]], strict=True):
        image.write_bytes(content)
    places = []
    for root in (first, same, other, first, other):
        code, out, error = ftlib("prepare", write_config(FULL, root=str(root)))
        assert code == 0, error
        places.append(out.strip())
    assert places[0] == places[1] == places[3] != places[2] == places[4]
    assert len(list(store.glob("prepared/*"))) == 2


def test_data_that_version_0_1_prepared_are_found(
    store: Path, write_config: Callable[..., Path], shared: Path, ftlib: Ftlib
) -> None:
    """Then the folder's name was the hash of an absolute path, also below the store."""
    shutil.copytree(shared / "data", store / "datasets" / "own")
    for root in ("${store}/datasets/own", str(shared / "data")):
        path = write_config(FULL, root=f'"{root}"')
        assert ftlib("prepare", path)[0] == 0
        by_content, by_path = possible_folders(load_experiment(path, [], find_site()).config, find_site())
        by_content.rename(by_path)
        facts = files.read_json(by_path / "data.json")
        with files.atomic_directory(by_path) as folder:
            shutil.copytree(by_path, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(files.COMPLETE_MARKER))
            left = {key: value for key, value in facts.items() if key not in ("format", "root", "content")}
            files.write_json(folder / "data.json", left)
        code, out, error = ftlib("prepare", path)
        assert code == 0 and "already prepared" in error and out.strip() == str(by_path)
