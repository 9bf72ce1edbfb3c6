"""A root outside the store is a path in a run's name; the same data at another path are the same run all the same."""

from __future__ import annotations

import contextlib
import functools
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ftlib.cli import train
from ftlib.config import yaml12
from ftlib.config.loader import Experiment, load_experiment
from ftlib.config.schema import Data
from ftlib.core import files, jsonl
from ftlib.core.paths import Site, find_site
from ftlib.data import dataset, moved
from ftlib.runs import run as runs
from ftlib.runs.pinning import pin_data
from ftlib.runs.run import Run
from tests.conftest import LORA
from tests.training.test_resume import outcome

Ftlib = Callable[..., tuple[int, str, str]]
Begin = Callable[[Path], Run]
Known = Callable[..., Experiment]
SAME = "the same data is now at"


@pytest.fixture
def root(shared: Path, tmp_path: Path) -> Path:
    """Data outside the store that may be moved."""
    return Path(shutil.copytree(shared / "data", tmp_path / "disk" / "data"))


@pytest.fixture
def ok(ftlib: Ftlib) -> Callable[..., str]:
    """Run a command that must succeed, and return what it says on stderr."""

    def run(*command: object) -> str:
        code, _, error = ftlib(*command)
        assert code == 0, error
        return error

    return run


@pytest.fixture
def configured(store: Path, root: Path, write_config: Callable[..., Path]) -> Callable[..., Path]:
    return functools.partial(write_config, LORA)


@pytest.fixture
def begin(ok: Callable[..., str]) -> Begin:
    """A run that has got as far as to note its data."""

    def begun(config: Path) -> Run:
        ok("prepare", config)
        experiment = load_experiment(config, [], find_site())
        run = runs.create_run(experiment, find_site())
        found = dataset.open_prepared(experiment.config, find_site())
        pin_data(run, found.metadata, found.folder.name)
        return run

    return begun


@pytest.fixture
def known() -> Known:
    def load(config: Path, *overrides: str) -> Experiment:
        site = find_site()
        [experiment] = moved.match_existing_runs([load_experiment(config, overrides, site)], site)
        return experiment

    return load


def all_runs() -> list[Run]:
    return runs.find_runs(["tiny"], find_site())


def put_elsewhere(root: Path, way: str) -> Path:
    place = root.parent.parent / "mnt" / "data"
    place.parent.mkdir()
    if way == "moved":
        root.rename(place)
    elif way == "copied":
        shutil.copytree(root, place)
    else:
        place.symlink_to(root)
    return place


def stop_at(step: int, config: Path, ftlib: Ftlib, monkeypatch: pytest.MonkeyPatch) -> None:
    from ftlib.training import train as training_train

    log_step = training_train._log_step

    def stopping(*arguments: object, **named: object) -> None:
        log_step(*arguments, **named)
        if jsonl.read_jsonl_log(all_runs()[0].metrics)[-1]["step"] == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training_train, "_log_step", stopping)
        assert ftlib("train", config)[0] == 130


@pytest.mark.parametrize("way", ["moved", "symbolic link"])
def test_a_half_trained_run_goes_on_with_its_data_at_another_path(
    configured: Callable[..., Path], root: Path, ok: Callable[..., str], ftlib: Ftlib, tmp_path: Path, way: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config = configured(root=str(root))
    ok("prepare", config)
    monkeypatch.setenv("FTLIB_RUNS", str(tmp_path / "straight"))
    ok("train", config)
    (straight,) = all_runs()
    monkeypatch.setenv("FTLIB_RUNS", str(tmp_path / "broken"))
    stop_at(7, config, ftlib, monkeypatch)
    (run,) = all_runs()
    place = put_elsewhere(root, way)
    config = configured(root=str(place))
    told = f"tiny: {SAME} {place}; resuming the existing run"
    assert ok("stage", config).count(told) == 1
    error = ok("prepare", config)
    assert error.count(told) == 1 and "already prepared" in error
    error = ok("train", config)
    assert error.count(told) == 1 and "resuming from the checkpoint of step 6" in error
    assert all_runs() == [run] and outcome(run) == outcome(straight)
    assert "already finished" in ok("train", config)
    assert ok("evaluate", config).count(told) == 1
    assert SAME not in ok("evaluate", "tiny", "--split", "test"), "its folder knows where the data are"
    assert (run.evaluation_folder("jsonl", "test", "after") / "scores.json").exists()
    ok("report", "tiny")
    assert all_runs() == [run]
    assert load_experiment(run.config_file, [], find_site()).config.data.root == str(place)
    assert str(root) in run.config_file.read_text(), "its name is computed from it"
    if way == "moved":
        place.rename(root)
    assert SAME not in ok("train", configured(root=str(root)))
    assert load_experiment(run.config_file, [], find_site()).config.data.root == str(root)


def test_submit_sends_the_run_that_is_there(
    configured: Callable[..., Path], root: Path, ok: Callable[..., str], ftlib: Ftlib, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    config = configured(root=str(root))
    ok("prepare", config)
    stop_at(7, config, ftlib, monkeypatch)
    (run,) = all_runs()
    place = put_elsewhere(root, "moved")
    config = configured(root=str(place))
    code, out, error = ftlib("submit", config, "--executor", "debug", "--dry-run", "--retry")
    assert code == 0 and error.count(SAME) == 1 and f"# {runs.run_name(run, find_site())}" in out.splitlines(), out
    assert not run.data_paths.exists()
    assert SAME in ok("submit", config, "--executor", "debug", "--retry")
    assert all_runs() == [run] and run.done_marker.exists()
    assert [event["step"] for event in jsonl.read_jsonl_log(run.history) if event["event"] == "start"] == [0, 6]
    assert "1 run: 1 finished" in ok("submit", config, "--executor", "debug")
    code, _, error = ftlib("submit", config, f"sweep.data.root=[{root}, {place}]")
    assert code == 2 and "duplicate points" in error


def test_older_pinned_code_is_given_the_run_s_own_config(
    configured: Callable[..., Path], root: Path, ok: Callable[..., str], begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would know no run by the new path, and begin another."""
    run = begin(configured(root=str(root)))
    config = configured(root=str(put_elsewhere(root, "symbolic link")))
    asked: list[list[str]] = []

    def leave(run: Run, site: Site, arguments: list[str]) -> None:
        asked.append(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "exec_pinned_code", leave)
    for one in (config, run.config_file):
        with contextlib.suppress(AssertionError):
            ok("train", one, "job.mem=3G")
    assert asked == [["train", str(run.config_file)]] * 2
    assert "mem: 3G" in run.config_file.read_text()


def test_of_several_places_a_run_takes_the_last_one_that_is_there(
    configured: Callable[..., Path], root: Path, begin: Begin, known: Known
) -> None:
    run = begin(configured(root=str(root)))
    place = put_elsewhere(root, "copied")
    assert runs.create_run(known(configured(root=str(place))), find_site()) == run

    def used() -> str:
        return load_experiment(run.config_file, [], find_site()).config.data.root

    assert used() == str(place)
    shutil.rmtree(place)
    assert used() == str(root)
    shutil.rmtree(root)
    assert used() == str(root)


@pytest.mark.parametrize("what", ["annotations", "images"])
def test_other_data_at_the_new_path_are_a_new_run(
    configured: Callable[..., Path], root: Path, ok: Callable[..., str], begin: Begin, what: str
) -> None:
    run = begin(configured(root=str(root)))
    place = put_elsewhere(root, "copied")
    if what == "annotations":
        lines = (place / "data.jsonl").read_text().splitlines(keepends=True)
        (place / "data.jsonl").write_text("".join(lines[:-5]))
    else:
        images = sorted(place.rglob("*.png"))
        contents = [image.read_bytes() for image in images]
        for image, content in zip(images, [*contents[1:], contents[0]], strict=True):
            image.write_bytes(content)
    config = configured(root=str(place))
    for command in ("stage", "prepare", "train", "train", "evaluate"):
        assert SAME not in ok(command, config)
    assert len(all_runs()) == 2 and not run.done_marker.exists()


def test_runs_with_other_settings_are_others(
    configured: Callable[..., Path], root: Path, begin: Begin, known: Known, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor are data compared for them, or where there is no run of the name."""
    run = begin(configured(root=str(root)))
    config = configured(root=str(put_elsewhere(root, "moved")))
    assert runs.run_for(known(config), find_site()) == run
    monkeypatch.setattr(moved, "same_data", lambda *_: pytest.fail("nothing to compare"))
    for override in ("seed=4", "data.split.seed=1", "training.learning_rate=1.0e-3", "name=other", "data.file=x.jsonl"):
        assert not known(config, override).data_locations


def test_of_two_runs_with_the_same_data_the_finished_one_is_meant(
    configured: Callable[..., Path], root: Path, store: Path, tmp_path: Path, begin: Begin, known: Known
) -> None:
    """As there may be of times when each path had its own."""
    copies = [Path(shutil.copytree(root, tmp_path / name)) for name in ("a", "b")]
    begun = [begin(configured(root=str(copy))) for copy in copies]
    for run in begun:
        run.done_marker.write_text("{}")
        assert runs.run_for(known(configured(root=str(root))), find_site()) == run
        run.done_marker.unlink()
    for copy, run in zip(copies, begun, strict=True):
        assert runs.run_for(known(configured(root=str(copy))), find_site()) == run


def test_the_login_node_needs_no_torch_for_it(configured: Callable[..., Path], root: Path, begin: Begin) -> None:
    begin(configured(root=str(root)))
    config = configured(root=str(put_elsewhere(root, "moved")))
    heavy = "torch", "transformers", "datasets", "pyarrow", "PIL", "peft", "safetensors"
    program = f"""
import sys
sys.modules.update(dict.fromkeys({heavy}))
from ftlib.__main__ import main
sys.exit(main(["submit", {str(config)!r}, "--executor", "local", "--dry-run"]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and SAME in done.stderr, done.stderr


def test_data_below_the_store_are_known_by_their_path(
    configured: Callable[..., Path], root: Path, store: Path, begin: Begin, known: Known
) -> None:
    for name in ("a", "b"):
        shutil.copytree(root, store / "datasets" / name)
    begin(configured(root='"${store}/datasets/a"'))
    assert not known(configured(root='"${store}/datasets/b"')).data_locations


def test_a_config_whose_data_are_not_there_is_named_as_ever(
    configured: Callable[..., Path], root: Path, ok: Callable[..., str], ftlib: Ftlib, begin: Begin
) -> None:
    run = begin(configured(root=str(root)))
    nowhere = configured(root=str(root.parent / "nowhere"))
    assert SAME not in ok("stage", nowhere)
    code, _, error = ftlib("prepare", nowhere)
    assert code == 2 and "no such file" in error and all_runs() == [run]


def test_equal_rows_count_where_a_run_s_notes_tell_no_more(
    configured: Callable[..., Path], root: Path, ok: Callable[..., str], begin: Begin, known: Known
) -> None:
    """As the notes of version 0.1; or its prepared data are gone, and others have been made."""
    run = begin(configured(root=str(root)))
    noted = files.read_json(run.data)
    files.write_json(run.data, {key: noted[key] for key in ("source", "splits", "labels")})
    shutil.rmtree(find_site().store / "prepared")
    config = configured(root=str(put_elsewhere(root, "moved")))
    assert SAME not in ok("prepare", config)
    assert runs.run_for(known(config), find_site()) == run


@pytest.mark.parametrize("what", ["mixture", "parts", "file"])
def test_roots_of_mixtures_and_of_parts_and_files(
    configured: Callable[..., Path], root: Path, begin: Begin, known: Known, what: str
) -> None:
    """Parts' own roots and files may be absolute, too."""

    def written(place: Path) -> Path:
        config = configured(root=str(root if what == "file" else place))
        at = "." if what == "mixture" else place
        parts = f"[{{name: a, source: jsonl, root: {at}}}, {{name: b, source: jsonl, root: {at}}}]"
        more = f"jsonl\n  file: {place}/data.jsonl" if what == "file" else f"mixture\n  parts: {parts}"
        config.write_text(config.read_text().replace("source: jsonl", f"source: {more}", 1))
        return config

    run = begin(written(root))
    place = put_elsewhere(root, "symbolic link")
    experiment = load_experiment(written(place), [], find_site())
    assert runs.run_for(experiment, find_site()) != run
    found = known(written(place))
    assert runs.run_for(found, find_site()) == run
    assert found.config == experiment.config
    assert runs.create_run(found, find_site()) == run
    assert load_experiment(run.config_file, [], find_site()).config.data == experiment.config.data


@pytest.mark.parametrize(
    "prompt", ["one\n\ndata: x\n\n  two {prefix}", "# {prefix}", "データ:\n{prefix}", "{prefix}" * 200]
)
def test_of_saved_configs_only_the_data_section_is_parsed_and_an_equal_one_once(
    prompt: str, configured: Callable[..., Path], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(root=str(root))
    saved = [
        runs.create_run(load_experiment(config, [f"seed={seed}", f"data.prompt={prompt!r}"], find_site()), find_site())
        for seed in range(3)
    ]
    moved._locations_in.cache_clear()
    parsed: list[str] = []
    load = yaml12.load
    monkeypatch.setattr(yaml12, "load", lambda text, source: (parsed.append(text), load(text, source))[1])
    found = {moved._saved_locations(run.config_file) for run in saved}
    assert [text[:6] for text in parsed] == ["data:\n"]
    whole = load(saved[0].config_file.read_text(), "")[0]
    assert load(parsed[0], "")[0] == {"data": whole["data"]}
    assert found == {tuple(Data.model_validate(whole["data"]).locations.items())}
    assert ("root", str(root)) in next(iter(found))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"name: x\nbase: &place /disk\ndata: {source: jsonl, root: /d}\n", ("root", "/d")),
        (b"base: &place /disk\ndata:\n  source: jsonl\n  root: *place\n", ("root", "/disk")),
        (b"data:\n  source: jsonl\n  root: /d\n# a note\n  file: /x", ("file", "/x")),
        (b"data:\n  source: jsonl\n  root: /d\n  file: /x", ("file", "/x")),
        (b"data:\n  root: \xff\n", None),
        (None, None),
    ],
)
def test_a_config_that_is_written_by_hand_is_read_whole(
    content: bytes | None, expected: tuple[str, str] | None, tmp_path: Path
) -> None:
    file = tmp_path / "config.yaml"
    if content is not None:
        file.write_bytes(content)
    found = moved._saved_locations(file)
    assert expected in found if expected else found == ()
