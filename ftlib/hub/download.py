"""Download models and datasets from the hub into the shared store, verified and atomically.

They are stored where `huggingface_hub` looks for them, `<store>/hf/hub/<kind>s--<owner>--<name>/snapshots/<commit>/`,
as plain files with a marker; `refs/<revision>` records the commit of a revision when it was first staged. One process
downloads, into a working folder with which the next one resumes if it dies; others wait for it. No file locks are used.

If the hub (or HF_ENDPOINT, an internal hub) cannot be reached, HF_HUB_CACHE is searched, such as a read-only cache of
the site.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ftlib.config.schema import Model
from ftlib.core import files, hashes, log, signals
from ftlib.core.lease import compute_once
from ftlib.core.paths import Site, site_settings
from ftlib.core.safetensors_header import read_safetensors_header
from ftlib.core.text import format_size
from ftlib.errors import UserError
from ftlib.hub import cache as hub_cache
from ftlib.hub.errors import hub_errors

_BESIDE_WEIGHTS = ("*.json", "*.model", "*.txt", "*.jinja", *hub_cache.TOKENIZER_FILES, *hub_cache.LICENSE_FILES)
"""Config, tokenizer, processor and licence."""

_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)(\.\w+)")


@dataclass(frozen=True)
class RepositoryListing:
    """The content of a repository.

    Attributes:
        commit: 40 hexadecimal digits.
        sizes: file → bytes.
        hashes: file → SHA-256, for the files for which the hub has one (the large ones); in a cache also git's SHA-1 of
            the small ones, by which they are stored.
        folder: of the files on this machine; None if they have to be downloaded.
    """

    commit: str
    sizes: Mapping[str, int]
    hashes: Mapping[str, str]
    folder: Path | None = None


def stage_model(model: Model, site: Site) -> Path:
    """Download a base model into the store, unless it is there; a local folder is not copied.

    Returns:
        Its folder.

    Raises:
        UserError: no such model or revision, a licence not accepted, no connection, no space, no weights.
    """
    if hub_cache.is_local_path(model.base):
        return hub_cache.find_model(model, site)
    return _stage(hub_cache.Repository("model", model.base, model.revision), site)


def stage_dataset(name: str, site: Site) -> Path:
    """Download a dataset into the store, unless it is there.

    Returns:
        The folder of its files.

    Raises:
        UserError: no such dataset, a licence not accepted, no connection, no space.
    """
    return _stage(hub_cache.Repository("dataset", name, None), site)


def _stage(repository: hub_cache.Repository, site: Site) -> Path:
    found = hub_cache.find_staged(repository, site)
    if found:
        return found
    with _hub_errors(repository, site):
        remote = _list_repository(repository)
    target = hub_cache.cache_folder(repository, site) / "snapshots" / remote.commit
    work = site.store / "hf" / "staging" / f"{target.parent.parent.name}-{remote.commit}"
    file_names = _model_files(repository, remote) if repository.kind == "model" else _dataset_files(remote)

    def find() -> Path | None:
        return target if files.is_complete(target) else None

    def download() -> Path:
        _download_to_store(repository, remote, file_names, work / "files", target, site)
        return target

    compute_once(work, find, download, f"{repository.kind} {repository.name}")
    if not hub_cache.is_commit(repository.revision):
        files.write_text(
            hub_cache.cache_folder(repository, site) / "refs" / (repository.revision or "main"), remote.commit
        )
    return target


def _model_files(repository: hub_cache.Repository, remote: RepositoryListing) -> list[str]:
    """Config, tokenizer, processor, licence, and the weights in one format: many repositories have several.

    Of an adapter the weights are the adapter's.
    """

    def matching(patterns: Sequence[str]) -> list[str]:
        return [
            name
            for name in remote.sizes
            if any(fnmatch.fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns)
        ]

    forms = hub_cache.ADAPTER_WEIGHTS if hub_cache.ADAPTER_CONFIG in remote.sizes else hub_cache.WEIGHT_PATTERNS
    for patterns in forms:
        if weights := matching(patterns):
            return list(dict.fromkeys([*matching(_BESIDE_WEIGHTS), *weights]))
    looked_for = ", ".join(name for patterns in forms for name in patterns)
    raise UserError(f"model {repository.name}: no weights in it; looked for {looked_for}")


def _dataset_files(remote: RepositoryListing) -> list[str]:
    return [name for name in remote.sizes if not name.startswith(".git")]


def find_tokenizer_file(name: str, site: Site) -> Path:
    """The tokenizer of a model that is in the store, or else in HF_HUB_CACHE.

    Raises:
        UserError: in neither.
    """
    repository = hub_cache.Repository("model", name, None)
    mirror = _hub_cache() / hub_cache.cache_name(repository)
    commit = hub_cache.pinned_commit(mirror, None)
    folders = [hub_cache.find_staged(repository, site), mirror / "snapshots" / commit if commit else None]
    for folder in filter(None, folders):
        for file in ("tokenizer.json", "tokenizer.model"):
            if (folder / file).is_file():
                return folder / file
    problem = f"model.tokenizer: {name} is neither in the store nor in the hub cache ({mirror.parent})"
    raise UserError(problem, "Stage that model first, or name a tokenizer file; see docs/models.md.")


def _hub_cache() -> Path:
    """A cache that others keep."""
    from huggingface_hub import constants

    return Path(site_settings().get("HF_HUB_CACHE") or constants.HF_HUB_CACHE)


def _list_repository(repository: hub_cache.Repository) -> RepositoryListing:
    """The content of a repository on the hub or, without a connection, in HF_HUB_CACHE."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api = HfApi(endpoint=site_settings().get("HF_ENDPOINT"))
    try:
        info = api.repo_info(repository.name, repo_type=repository.kind, revision=repository.revision)
        commit = str(info.sha)
        tree = api.list_repo_tree(repository.name, recursive=True, revision=commit, repo_type=repository.kind)
        entries = [entry for entry in tree if isinstance(entry, RepoFile)]
    except Exception as error:
        mirror = _list_cache_mirror(repository) if hub_cache.is_unreachable(error) else None
        if mirror is None:
            raise
        return mirror
    hashes = {entry.path: entry.lfs.sha256 for entry in entries if entry.lfs}
    return RepositoryListing(commit, {entry.path: entry.size for entry in entries}, hashes)


def _list_cache_mirror(repository: hub_cache.Repository) -> RepositoryListing | None:
    """The content of a repository in a cache of the site; None if it is not there."""
    cache = _hub_cache()
    commit = hub_cache.pinned_commit(cache / hub_cache.cache_name(repository), repository.revision)
    folder = cache / hub_cache.cache_name(repository) / "snapshots" / (commit or "")
    if commit is None or not folder.is_dir():
        return None
    present = [path for path in folder.rglob("*") if path.is_file() and path.name != files.COMPLETE_MARKER]
    own = (cache / hub_cache.cache_name(repository)).resolve()
    if outside := [path for path in present if not path.resolve().is_relative_to(own)]:
        problem = f"{repository.kind} {repository.name}: {outside[0]} is a link to a file outside of {own}"
        raise UserError(problem, "It is not copied into the store. Ask whoever keeps this cache.")
    if repository.kind == "model":
        _require_complete(repository, folder, {path.name for path in present})
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in present}
    blobs = {name: (folder / name).resolve().name for name in sizes if (folder / name).is_symlink()}
    return RepositoryListing(
        commit, sizes, {name: blob for name, blob in blobs.items() if _BLOB.fullmatch(blob)}, folder
    )


def _require_complete(repository: hub_cache.Repository, folder: Path, names: set[str]) -> None:
    """Refuse an incomplete model: a cache has only the files that were once requested, such as the weights alone.

    Raises:
        UserError: no config or no tokenizer.
    """
    if hub_cache.ADAPTER_CONFIG in names:
        return
    tokenizers = (*hub_cache.TOKENIZER_PATTERNS, "*.tiktoken", "tekken.json")
    for what, patterns in {"config": ("config.json",), "tokenizer": tokenizers}.items():
        if not any(fnmatch.filter(names, pattern) for pattern in patterns):
            problem = f"model {repository.name}: the hub cannot be reached, and {folder} has no {what} for it"
            raise UserError(problem, "Run `ftlib stage CONFIG` where the hub can be reached.")


def _download_to_store(
    repository: hub_cache.Repository,
    remote: RepositoryListing,
    file_names: list[str],
    folder: Path,
    target: Path,
    site: Site,
) -> None:
    """Download into the working folder, of which this process holds the lease, and publish it."""
    _remove_links(folder)
    size = sum(remote.sizes[name] for name in file_names)
    there = sum((folder / name).stat().st_size for name in file_names if (folder / name).is_file())
    files.require_space(site.store, size - there)
    log.info(f"{repository.kind} {repository.name}: {len(file_names)} files, {format_size(size)}")
    signals.mark_resumable()  # files, and parts of them, are kept in the working folder
    with files.storage_errors(folder), _hub_errors(repository, site):
        if remote.folder:
            _copy(remote.folder, file_names, folder)
        else:
            _download(repository, remote, file_names, folder)
    for name in file_names:
        if remote.folder and repository.kind == "model":
            _verify_copy(folder / name, remote.hashes.get(name), remote.folder)
        _verify(folder / name, remote.sizes[name], remote.hashes.get(name))
    _require_shards(repository, folder, file_names)
    with files.atomic_directory(target) as temporary:
        for name in file_names:
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(folder / name, temporary / name)
    hashes.store_hashes(
        target, {name: entry["sha256"] for name, entry in files.read_json(target / files.COMPLETE_MARKER).items()}, site
    )
    shutil.rmtree(folder)


def _remove_links(folder: Path) -> None:
    """Remove links from the working folder: others in the group can write there and redirect the download.

    Raises:
        UserError: the folder itself is a symbolic link.
    """
    for path in (folder.parent, folder):
        if path.is_symlink():
            raise UserError(f"{path}: is a symbolic link, and downloads would be written elsewhere", "Remove it.")
    for parent, folders, names in os.walk(folder):
        for path in (Path(parent, name) for name in (*folders, *names)):
            if path.is_symlink():
                path.unlink()


def _copy(source: Path, file_names: list[str], folder: Path) -> None:
    for name in log.track(file_names, "file"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if not (folder / name).exists():
            files.copy_file(source / name, folder / name)


def _download(repository: hub_cache.Repository, remote: RepositoryListing, file_names: list[str], folder: Path) -> None:
    """Download the missing files."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if not (sys.stderr.isatty() and log.shows_progress()):
        disable_progress_bars()
    snapshot_download(
        repository.name,
        repo_type=repository.kind,
        revision=remote.commit,
        local_dir=folder,
        allow_patterns=file_names,
        endpoint=site_settings().get("HF_ENDPOINT"),
    )


def _verify(path: Path, size: int, digest: str | None) -> None:
    """Compare a downloaded file with the hub's size and hash; a wrong one is removed.

    Args:
        digest: its SHA-256, or git's SHA-1 of it; None where neither is known.

    Raises:
        UserError: size or content differ.
    """
    if path.stat().st_size != size or (digest and _digest(path, len(digest)) != digest):
        path.unlink()
        problem = f"{path.name}: checksum mismatch after download"
        raise UserError(problem, "Run the same command again to download this file again.")


def _verify_copy(path: Path, digest: str | None, source: Path) -> None:
    """Refuse, and remove, a model's file that is damaged in the cache it was copied from.

    Raises:
        UserError: another content than the cache says, or, where it does not say, weights or JSON that are cut short.
    """
    problem = "" if not digest or _digest(path, len(digest)) == digest else "its content is not what its name says"
    try:
        if not digest and path.suffix == ".safetensors":
            read_safetensors_header(path)
        elif not digest and path.suffix == ".json":
            files.read_json(path)
    except UserError as error:
        problem = error.problem.removeprefix(f"{path}: ")
    if problem:
        path.unlink()
        remedy = "Ask whoever keeps this cache to fetch it anew, or run `ftlib stage` where the hub can be reached."
        raise UserError(f"{source / path.name}: this file of the cache is damaged: {problem}", remedy)


def _digest(path: Path, length: int) -> str:
    if length == 64:
        return files.file_sha256(path)
    return hashlib.sha1(b"blob %d\0" % path.stat().st_size + path.read_bytes(), usedforsecurity=False).hexdigest()


def _require_shards(repository: hub_cache.Repository, folder: Path, file_names: list[str]) -> None:
    """Compare sharded weights with their index: a cache may have some of them only.

    Raises:
        UserError: files are missing.
    """
    for index in (folder / name for name in file_names if name.endswith(".index.json")):
        content = files.read_json(index)
        named = set((content.get("weight_map") or {}).values()) if isinstance(content, dict) else set()
        of_this_form = any(name in file_names for name in named)
        if of_this_form and (missing := sorted(named - set(file_names))):
            raise UserError(f"{repository.kind} {repository.name}: {len(missing)} files are missing: {missing[0]} …")
    for name in file_names if repository.kind == "model" else ():
        if match := _SHARD.fullmatch(name):
            stem, width, total, ending = match[1], len(match[2]), match[3], match[4]
            series = {f"{stem}-{number:0{width}d}-of-{total}{ending}" for number in range(1, int(total) + 1)}
            if missing := sorted(series - set(file_names)):
                problem = f"model {repository.name}: {len(missing)} files are missing beside {name}: {missing[0]}"
                raise UserError(f"{problem}{' …' if len(missing) > 1 else ''}")


def _hub_errors(repository: hub_cache.Repository, site: Site) -> contextlib.AbstractContextManager[None]:
    folder = hub_cache.cache_folder(repository, site)
    what = f"{repository.kind} {repository.name}"
    remedy = "Run `ftlib stage` where the hub can be reached, such as the login node, or set HF_ENDPOINT."
    return hub_errors(what, repository.kind, repository.revision, f"It is not in the store ({folder}). {remedy}")
