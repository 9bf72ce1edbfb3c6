"""Bring models and datasets of the hub into the shared store: whole and verified, or not at all.

They lie where `huggingface_hub` itself would look, `<store>/hf/hub/<kind>s--<owner>--<name>/snapshots/<commit>/`, as
plain files with a marker; `refs/<revision>` pins the commit that a revision meant when it was first staged. One process
downloads, into a working folder that the next one goes on with if it dies; others wait for it. No file locks are used.

What the hub (or HF_ENDPOINT, an internal one) does not give because it cannot be reached is looked for in HF_HUB_CACHE,
such as a read-only cache of the site.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ftlib import console, disk, files, hashes, hub
from ftlib.config import Model
from ftlib.errors import UserError
from ftlib.once import made_once
from ftlib.site import Site, site_settings

_BESIDE = ("*.json", "*.model", "*.txt", "*.jinja")
"""Config, tokenizer and processor."""


@dataclass(frozen=True)
class Remote:
    """What a repository holds.

    Attributes:
        commit: 40 hexadecimal digits.
        sizes: file → bytes.
        hashes: file → SHA-256, of those that the hub knows it of (the large ones).
        folder: where the files lie on this machine; None if they have to be downloaded.
    """

    commit: str
    sizes: Mapping[str, int]
    hashes: Mapping[str, str]
    folder: Path | None = None


def stage_model(model: Model, site: Site) -> Path:
    """The folder of a base model in the store, after bringing it there if need be; a local folder stays where it is.

    Raises:
        UserError: no such model or revision, a licence not accepted, no connection, no space, no weights.
    """
    if hub.looks_local(model.base):
        return hub.find_model(model, site)
    return _stage(hub.Repository("model", model.base, model.revision), site)


def stage_dataset(name: str, site: Site) -> Path:
    """The folder of a dataset's files in the store, after bringing them there if need be.

    Raises:
        UserError: no such dataset, a licence not accepted, no connection, no space.
    """
    return _stage(hub.Repository("dataset", name, None), site)


def _stage(repository: hub.Repository, site: Site) -> Path:
    found = hub.find_staged(repository, site)
    if found:
        return found
    with _hub_errors(repository, site):
        remote = _look(repository)
    target = hub.cache_folder(repository, site) / "snapshots" / remote.commit
    work = site.store / "hf" / "staging" / f"{target.parent.parent.name}-{remote.commit}"
    wanted = _wanted_of_model(repository, remote) if repository.kind == "model" else _wanted_of_dataset(remote)

    def look() -> Path | None:
        return target if files.is_complete(target) else None

    def bring() -> Path:
        _bring(repository, remote, wanted, work / "files", target, site)
        return target

    made_once(work, look, bring, f"{repository.kind} {repository.name}")
    if not hub.is_commit(repository.revision):
        files.write_text(hub.cache_folder(repository, site) / "refs" / (repository.revision or "main"), remote.commit)
    return target


def _wanted_of_model(repository: hub.Repository, remote: Remote) -> list[str]:
    """Config, tokenizer, processor, and the weights once: many repositories hold them in several formats."""

    def matching(patterns: tuple[str, ...]) -> list[str]:
        return [name for name in remote.sizes if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]

    for patterns in hub.WEIGHTS:
        weights = [name for name in matching(patterns) if "/" not in name]
        if weights:
            return [name for name in matching(_BESIDE) if "/" not in name] + weights
    looked_for = ", ".join(name for patterns in hub.WEIGHTS for name in patterns)
    raise UserError(f"model {repository.name}: no weights in it; looked for {looked_for}")


def _wanted_of_dataset(remote: Remote) -> list[str]:
    return [name for name in remote.sizes if not name.startswith(".git")]


def _look(repository: hub.Repository) -> Remote:
    """What the hub holds; without a connection, what HF_HUB_CACHE does."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api = HfApi(endpoint=site_settings().get("HF_ENDPOINT"))
    try:
        info = api.repo_info(repository.name, repo_type=repository.kind, revision=repository.revision)
        commit = str(info.sha)
        tree = api.list_repo_tree(repository.name, recursive=True, revision=commit, repo_type=repository.kind)
        entries = [entry for entry in tree if isinstance(entry, RepoFile)]
    except Exception as error:
        mirror = _mirrored(repository) if hub.is_unreachable(error) else None
        if mirror is None:
            raise
        return mirror
    hashes = {entry.path: entry.lfs.sha256 for entry in entries if entry.lfs}
    return Remote(commit, {entry.path: entry.size for entry in entries}, hashes)


def _mirrored(repository: hub.Repository) -> Remote | None:
    """What a cache that others keep holds of it."""
    from huggingface_hub import constants

    cache = Path(site_settings().get("HF_HUB_CACHE") or constants.HF_HUB_CACHE)
    commit = hub.pinned_commit(cache / hub.cache_name(repository), repository.revision)
    folder = cache / hub.cache_name(repository) / "snapshots" / (commit or "")
    if commit is None or not folder.is_dir():
        return None
    present = [path for path in folder.rglob("*") if path.is_file() and path.name != files.MARKER]
    if repository.kind == "model":
        _require_whole(repository, folder, {path.name for path in present})
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in present}
    blobs = {name: blob for name in sizes if (blob := hashes.blob_name(folder / name))}
    return Remote(commit, sizes, blobs, folder)


def _require_whole(repository: hub.Repository, folder: Path, names: set[str]) -> None:
    """A cache holds what somebody once asked for, which may have been the weights alone.

    Raises:
        UserError: no config or no tokenizer.
    """
    for what, patterns in {"config": ("config.json",), "tokenizer": hub.TOKENIZERS}.items():
        if not any(fnmatch.filter(names, pattern) for pattern in patterns):
            problem = f"model {repository.name}: the hub cannot be reached, and {folder} holds no {what} of it"
            raise UserError(problem, "Run `ftlib stage CONFIG` where the hub can be reached.")


def _bring(
    repository: hub.Repository, remote: Remote, wanted: list[str], folder: Path, target: Path, site: Site
) -> None:
    """Fill the working folder, which this process owns, and publish it."""
    size = sum(remote.sizes[name] for name in wanted)
    there = sum((folder / name).stat().st_size for name in wanted if (folder / name).is_file())
    disk.require_space(site.store, size - there)
    console.say(f"{repository.kind} {repository.name}: {len(wanted)} files, {size / 1e9:.2f} GB")
    with files.storage_errors(folder), _hub_errors(repository, site):
        if remote.folder:
            _copy(remote.folder, wanted, folder)
        else:
            _download(repository, remote, wanted, folder)
    for name in wanted:
        _verify(folder / name, remote.sizes[name], remote.hashes.get(name))
    _require_shards(repository, folder, wanted)
    with files.publish_folder(target) as temporary:
        for name in wanted:
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(folder / name, temporary / name)
    hashes.remember(
        target, {name: entry["sha256"] for name, entry in files.read_json(target / files.MARKER).items()}, site
    )
    shutil.rmtree(folder)


def _copy(source: Path, wanted: list[str], folder: Path) -> None:
    for name in console.tracked(wanted, "file"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if not (folder / name).exists():
            shutil.copyfile(source / name, folder / f"{name}{files.TEMPORARY}")
            (folder / f"{name}{files.TEMPORARY}").replace(folder / name)


def _download(repository: hub.Repository, remote: Remote, wanted: list[str], folder: Path) -> None:
    """What is there already is kept."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    snapshot_download(
        repository.name,
        repo_type=repository.kind,
        revision=remote.commit,
        local_dir=folder,
        allow_patterns=wanted,
        endpoint=site_settings().get("HF_ENDPOINT"),
    )


def _verify(path: Path, size: int, sha256: str | None) -> None:
    """Refuse, and remove, what is not what the hub says it holds.

    Raises:
        UserError: another size or content.
    """
    if path.stat().st_size != size or (sha256 and files.sha256(path) != sha256):
        path.unlink()
        problem = f"{path.name}: what was downloaded is not what the hub holds"
        raise UserError(problem, "Run the same command again; it fetches this file anew.")


def _require_shards(repository: hub.Repository, folder: Path, wanted: list[str]) -> None:
    """Weights in several files come with an index of them; a cache of others may hold some of them only.

    Raises:
        UserError: files are missing.
    """
    for index in (folder / name for name in wanted if name.endswith(".index.json")):
        named = set(files.read_json(index).get("weight_map", {}).values())
        of_this_form = any(name in wanted for name in named)
        if of_this_form and (missing := sorted(named - set(wanted))):
            raise UserError(f"{repository.kind} {repository.name}: {len(missing)} files are missing: {missing[0]} …")


@contextlib.contextmanager
def _hub_errors(repository: hub.Repository, site: Site) -> Iterator[None]:
    """Turn the hub's errors into plain words; none of them holds the token."""
    from huggingface_hub import errors

    what = f"{repository.kind} {repository.name}"
    login = "log in with `hf auth login`, or set HF_TOKEN_PATH to a file of mode 0600 with a token"
    try:
        yield
    except UserError:
        raise
    except errors.GatedRepoError:
        remedy = f"Accept it on the {repository.kind}'s page, then {login}."
        raise UserError(f"{what}: its licence has to be accepted first", remedy) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{what}: no revision {repository.revision}") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        problem = f"{what}: no such {repository.kind} on the hub: {str(error).splitlines()[0]}"
        raise UserError(problem, f"If it is private, {login}.") from None
    except errors.HfHubHTTPError as error:
        raise UserError(f"{what}: the hub refuses: {str(error).splitlines()[0]}", "Try again later.") from None
    except Exception as error:
        if not hub.is_unreachable(error):
            raise
        place = hub.cache_folder(repository, site)
        problem = f"{what} is not in the store ({place}), and the hub cannot be reached: {str(error).splitlines()[0]}"
        remedy = "Run `ftlib stage CONFIG` where the hub can be reached, such as the login node, or set HF_ENDPOINT."
        raise UserError(problem, remedy) from None
