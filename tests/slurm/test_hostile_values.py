"""Values of a config, of settings and of folders that would end in a batch script: none of them is run by it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import get_args

import pytest

from ftlib.config.loader import load_experiment
from ftlib.config.schema import SbatchOption
from ftlib.core.paths import Site, read_site_env
from ftlib.core.text import one_line_error
from ftlib.errors import UserError
from ftlib.slurm.executors import Submission, render_scripts, setup_lines
from ftlib.slurm.jobspec import JobSpec
from tests.test_host_script import bash

SITE = Site(Path("/s"), Path("/r"))
WORDS = ("gpu_type", "partition", "account", "qos", "constraint", "exclude", "mail_type", "mail_user")
KEYS = ("name", "job.mem", "job.time", *(f"job.{word}" for word in WORDS))
KEYS += tuple(f"job.sbatch.{option}" for option in get_args(SbatchOption))
FROM_SITE = [f"SBATCH_{word.upper()}" for word in ("partition", "account", "qos", "constraint")]
FROM_SITE += [f"SBATCH_{option.upper().replace('-', '_')}" for option in get_args(SbatchOption)]
BREAKS = ("x'\ntouch executed\n'", 'x"\ntouch executed\n"', "x\ntouch executed", "x\r\ntouch executed\r\n", "x\n")
CONTROLS = ("a\x00b", "a\x1b]0;title\x07", "a\x7fb", "a\x85b", "a\u2028b", "a\ud800b", "a\tb")
"""Refused even where they would end no line."""
ESCAPES = ("x\\", "\\' ' --export=ALL,BASH_ENV=/evil #", '\\" " --wrap=x')
"""Refused in an option of sbatch, which takes the backslash for an escape."""
QUOTED = (
    "x'; touch executed; '",
    '"$(touch executed)"',
    "`touch executed`",
    "$(touch executed)",
    "#x",
    "--x=y z",
)
"""One line each: quoted, they stay text."""


def written(config_file: Path, key: str, value: str) -> Path:
    """A config with the value at a dotted key, in YAML's own escapes."""
    escaped = "".join(f"\\u{ord(letter):04x}" for letter in value)
    names = key.split(".")
    lines = [line for line in config_file.read_text().splitlines() if not line.startswith(f"{names[0]}:")]
    lines += ["  " * depth + f"{name}:" for depth, name in enumerate(names)]
    lines[-1] += f' "{escaped}"'
    config_file.write_text("\n".join(lines) + "\n")
    return config_file


def plan(spec: JobSpec, folder: Path, frozen: dict[str, str]) -> Submission:
    tasks = [[["train", "/r/tiny/0/config.yaml"]]]
    return Submission(spec, tasks, [["train"]], None, folder, setup_lines(Path("/r/.jobs/code-1"), frozen), 3)


@pytest.mark.parametrize("key", KEYS)
def test_a_line_break_in_a_config_is_refused_with_its_line(config_file: Path, key: str) -> None:
    plain = config_file.read_text()
    for value in (*BREAKS, *CONTROLS, *ESCAPES):
        config_file.write_text(plain)
        path = written(config_file, key, value)
        number = len(path.read_text().splitlines())
        with pytest.raises(UserError) as caught:
            load_experiment(path, [], SITE, {})
        assert f"{path}:{number}: {key}: " in caught.value.problem
        assert all(letter.isprintable() or letter == "\n" for letter in caught.value.problem)


def test_a_line_break_of_a_variable_or_the_command_line_is_refused(config_file: Path) -> None:
    with pytest.raises(UserError, match=r"command line: job\.sbatch\.comment: must be one line"):
        load_experiment(config_file, ['job.sbatch={comment: "${NOTE}"}'], SITE, {"NOTE": BREAKS[0]})
    with pytest.raises(UserError, match=r"command line: job\.sbatch\.comment: must be one line"):
        load_experiment(config_file, [f"job.sbatch.comment='{BREAKS[1]}\n\n'"], SITE, {})


@pytest.mark.parametrize("name", FROM_SITE)
def test_a_line_break_in_a_setting_is_refused(config_file: Path, name: str) -> None:
    config = load_experiment(config_file, [], SITE, {}).config
    for value in (*BREAKS, *ESCAPES):
        with pytest.raises(UserError, match=f"^{name}: must be (one line|without backslashes)"):
            JobSpec.of(config, {name: value})


def as_sbatch_reads(line: str) -> list[str]:
    """The arguments of an #SBATCH line (sbatch's _get_argument): a backslash escapes anywhere, # ends the line."""
    found: list[str] = []
    argument, quote, escaped = "", "", False
    for letter in line.removeprefix("#SBATCH") + " ":
        if escaped:
            argument, escaped = argument + letter, False
        elif letter == "\\":
            escaped = True
        elif quote:
            argument, quote = (argument, "") if letter == quote else (argument + letter, quote)
        elif letter in "'\"":
            quote = letter
        elif letter.isspace() or letter == "#":
            found += [argument] if argument else []
            argument = ""
            if letter == "#":
                break
        else:
            argument += letter
    assert not quote
    return found


def test_what_is_refused_would_have_been_options(config_file: Path) -> None:
    config = load_experiment(config_file, [], SITE, {}).config
    job = config.job.model_copy(update={"sbatch": {"comment": ESCAPES[1]}})
    spec = JobSpec.of(config.model_copy(update={"job": job}), {})
    (script, _), *_ = render_scripts(plan(spec, Path("/work"), {}))
    (line,) = [line for line in script.splitlines() if line.startswith("#SBATCH --comment")]
    assert "--export=ALL,BASH_ENV=/evil" in as_sbatch_reads(line)


def test_a_line_break_in_a_folder_or_a_frozen_setting_is_refused(config_file: Path) -> None:
    spec = JobSpec.of(load_experiment(config_file, [], SITE, {}).config, {})
    for value in BREAKS:
        with pytest.raises(UserError, match=r"^the folder of the jobs' output: must be one line"):
            render_scripts(plan(spec, Path("/work") / value / "logs", {}))
        with pytest.raises(UserError, match=r"^FTLIB_BINDS: must be one line"):
            plan(spec, Path("/work"), {"FTLIB_BINDS": value})


@pytest.mark.parametrize("value", QUOTED)
def test_one_line_stays_text_in_the_script(config_file: Path, tmp_path: Path, value: str) -> None:
    """The script that submitit writes, run by bash with another jobs/run.sh."""
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "run.sh").write_text('run_submitted() { printf "%s\\n" "$FTLIB_BINDS" "${@: -1}"; }\n')
    sbatch = dict.fromkeys(get_args(SbatchOption), value)
    config = load_experiment(config_file, [], SITE, {}).config
    job = config.job.model_copy(update={"sbatch": sbatch, **dict.fromkeys(WORDS, value)})
    spec = JobSpec.of(config.model_copy(update={"job": job}), {})
    setup = setup_lines(tmp_path, {"FTLIB_BINDS": value})
    (script, _), *_ = render_scripts(
        Submission(spec, [[["train", "c.yaml"]]], [["train"]], None, tmp_path / "logs" / value, setup, 3)
    )
    done = subprocess.run(["bash"], input=script, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{value}\n{tmp_path / 'logs' / value}\n"), done.stderr
    assert not (tmp_path / "executed").exists()
    for line in script.splitlines():
        if line.startswith("#SBATCH"):
            (argument,) = as_sbatch_reads(line)
            option, _, rest = argument.removeprefix("--").partition("=")
            assert rest == value or option not in sbatch
    assert all(line.startswith("#SBATCH --") for line in script.splitlines()[3 : 4 + len(sbatch)])


@pytest.mark.parametrize("letter", ["\x0c", "\x1b", "\x7f", "\x1c", "\u2028", "\x85"])
def test_site_env_holds_no_control_characters(tmp_path: Path, letter: str) -> None:
    """Nor is one of them the end of a line: jobs/run.sh would read another value."""
    file = tmp_path / "site.env"
    file.write_text(f"A=1\nB=1{letter}FTLIB_STORE=/elsewhere\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"site\.env:2: B: must be one line"):
        read_site_env(file)
    if letter.isascii():
        done = bash(f"source jobs/lib.sh; read_site_env '{file}'")
        assert done.returncode == 2 and f"{file}:2: B: must be one line without control characters" in done.stderr


@pytest.mark.parametrize("name", ["FTLIB_STORE", "FTLIB_IMAGE", "FTLIB_BINDS"])
def test_paths_for_the_container_are_one_line(tmp_path: Path, name: str) -> None:
    done = bash("jobs/run.sh ftlib doctor", **{"FTLIB_STORE": str(tmp_path), name: f"{tmp_path}/a\nb"})
    assert done.returncode == 2 and f"ftlib: {name}: a path with a control character" in done.stderr


@pytest.mark.parametrize("name", ["BASE", "INDEX_URL", "BOOTSTRAP"])
@pytest.mark.parametrize(
    "value", ['x"; touch executed; "', "$(touch executed)", "`touch executed`", "x\ntouch executed"]
)
def test_build_arguments_end_in_shell_lines_of_the_definition(tmp_path: Path, name: str, value: str) -> None:
    done = bash(f"containers/build.sh --render '{tmp_path}/x.def'", **{name: value})
    assert done.returncode == 2 and f"build.sh: {name}: control characters" in done.stderr
    assert not (tmp_path / "x.def").exists()


def test_ordinary_text_is_one_line() -> None:
    for text in ("", "naïve – Größe 雪 😀", "a b'c\"d$e`f\\g"):
        assert one_line_error(text) is None
