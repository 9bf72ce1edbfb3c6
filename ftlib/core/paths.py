"""The paths of this site: the shared store, the runs, the image.

`jobs/site.env` contains `KEY=VALUE` lines (`jobs/run.sh` reads the same file); the environment overrides it.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import pwd
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ftlib.core import redaction, trust
from ftlib.core.text import one_line_error
from ftlib.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
_LINE = re.compile(r"\s*([A-Z][A-Z0-9_]*)=(.*)", re.DOTALL)
_EXPANDED = ("HOME", "USER", "SCRATCH", "WORK")
"""What people write in paths and what means the same on a login node and in a job."""

_PATHS = {"FTLIB_STORE", "FTLIB_RUNS", "FTLIB_IMAGE", "FTLIB_TMP", "FTLIB_HOOK", "FTLIB_BINDS"} | {
    "FTLIB_VENV",
    "HF_HUB_CACHE",
    "CA_FILE",
    "WHEELS",
}


@dataclass(frozen=True)
class Site:
    """The two roots on shared storage.

    Attributes:
        store: shared with a group, if it has one: `hf/` (HF_HOME), `models/`, `datasets/`, `prepared/`.
        runs: the user's run folders.
    """

    store: Path
    runs: Path


def read_site_env(path: Path, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Read the `KEY=VALUE` lines of jobs/site.env, without the keys that the environment has already.

    A value may stand in quotes; ` #` begins a comment. Of a shell's expansions there are `$HOME`, `$USER`, `$SCRATCH`,
    `$WORK`, keys of lines above and, at the beginning of a path, `~`; none in single quotes, and nothing else is
    understood. Paths are absolute. jobs/lib.sh has the same rules in bash.

    Raises:
        UserError: unreadable file, or a line that is not understood.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    values: dict[str, str] = {}
    numbers: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _LINE.fullmatch(line.removesuffix("\r"))
        if not match:
            raise UserError(f"{path}:{number}: expected KEY=VALUE, got {line.partition('=')[0].strip()!r}")
        key, text = match.groups()
        if key in numbers:
            raise UserError(f"{path}:{number}: {key}: is set in line {numbers[key]} already")
        numbers[key] = number
        if key in environment:
            continue
        known = {name: environment[name] for name in _EXPANDED if environment.get(name)}
        with contextlib.suppress(KeyError):  # a user without a name
            known.setdefault("USER", pwd.getpwuid(os.getuid()).pw_name)
        known |= {name: value for name, value in {**values, **environment}.items() if name in numbers}
        try:
            values[key] = _site_env_value(key, text, known)
        except ValueError as error:
            raise UserError(f"{path}:{number}: {key}: {error}") from None
    return values


def _site_env_value(key: str, text: str, known: Mapping[str, str]) -> str:
    """The value of a line.

    Args:
        known: what `$NAME` may stand for.

    Raises:
        ValueError: what is wrong with it.
    """
    quote = ""
    if quoted := re.fullmatch(r"\s*(['\"])(.*)", text, re.DOTALL):
        quote, text = quoted.groups()
        text, closing, after = text.partition(quote)
        if not closing or not re.match(r"\s*$|\s+#", after):
            raise ValueError("quotes belong around the whole value")
    else:
        text = re.split(r"\s#", text, maxsplit=1)[0].strip()
        if "'" in text or '"' in text:
            raise ValueError("quotes belong around the whole value")
    literally = "put the value in single quotes to have it as it is"
    if quote != "'":
        if "\\" in text or "`" in text:
            raise ValueError(f"\\ and ` have no meaning here; {literally}")

        def expand(match: re.Match[str]) -> str:
            name = match["braced"] or match["plain"]
            if not name or (name not in _EXPANDED and name not in known):
                names = ", ".join(f"${name}" for name in _EXPANDED)
                raise ValueError(f"only {names} and keys of lines above are expanded; {literally}")
            if name not in known:
                raise ValueError(f"${name} is not set here")
            return known[name]

        text = re.sub(r"\$(?:\{(?P<braced>[A-Za-z_][A-Za-z0-9_]*)\}|(?P<plain>[A-Za-z_][A-Za-z0-9_]*))?", expand, text)
    if one_line_error(text):
        raise ValueError("must be one line without control characters")
    if key not in _PATHS:
        return text
    parts = text.split(":") if key == "FTLIB_BINDS" else [text]
    for number, part in enumerate(parts):
        if not quote and (part == "~" or part.startswith("~/")):
            if "HOME" not in known:
                raise ValueError("$HOME is not set here")
            parts[number] = part = known["HOME"] + part[1:]
        if part and not part.startswith("/"):
            raise ValueError(f"must be an absolute path, not '{part}'")
    return ":".join(parts)


def site_settings(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The settings of jobs/site.env (of the current folder, else of the repository), overridden by the environment.

    Raises:
        UserError: it cannot be read, or others could have written it (a setting can name a script that is run).
    """
    for folder in (Path.cwd(), REPOSITORY):
        if (folder / "jobs" / "site.env").exists():
            file = folder / "jobs" / "site.env"
            # The owner of this code may also own its settings.
            code = Path(__file__).stat().st_uid
            trust.require_trusted(file, "jobs/site.env", trust.trusted_uids() | {code}, folder)
            settings = read_site_env(file, environment)
            redaction.add_site_settings(settings)
            return {**settings, **environment}
    return dict(environment)


def find_site(environment: Mapping[str, str] = os.environ) -> Site:
    """Find the store and the runs folder.

    `FTLIB_STORE` and `FTLIB_RUNS` (default `<store>/runs/$USER`). Without a store: `./store` outside Slurm; inside
    Slurm that would be a node's random working folder, so it is an error.

    Raises:
        UserError: inside Slurm without FTLIB_STORE.
    """
    settings = site_settings(environment)
    store_text = settings.get("FTLIB_STORE", "")
    if not store_text and "SLURM_JOB_ID" in environment:
        raise UserError(
            "FTLIB_STORE is not set, and inside a Slurm job there is no safe default",
            "Set it in jobs/site.env (copy jobs/site.env.example) to a folder on shared storage.",
        )
    store = Path(store_text or "store").expanduser().absolute()
    runs_text = settings.get("FTLIB_RUNS", "")
    runs = Path(runs_text).expanduser().absolute() if runs_text else store / "runs" / getpass.getuser()
    return Site(store=store, runs=runs)


STORE = "${store}"


def stored_path(path: Path, store: Path) -> str:
    """A path in its stored form, with `${store}`, also where it leads there through a link or another mount point.

    Args:
        path: absolute.
    """
    if path.is_relative_to(store):
        return _below(path.relative_to(store))
    for parent in (path, *path.parents):
        with contextlib.suppress(PermissionError):  # an unreadable folder cannot lead into the store
            if parent.exists() and store.exists() and parent.samefile(store):
                return _below(path.relative_to(parent))
    return str(path)


def _below(rest: Path) -> str:
    return f"{STORE}/{rest}" if rest.parts else STORE
