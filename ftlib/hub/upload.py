"""Upload a folder to the hub in one commit, without local paths and user names."""

from __future__ import annotations

import contextlib
import getpass
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftlib.config.paths import public_name
from ftlib.config.privacy import hidden_text
from ftlib.config.schema import Config, Privacy
from ftlib.core import files, log
from ftlib.core.paths import Site, site_settings
from ftlib.core.redaction import redact
from ftlib.hub import cache
from ftlib.hub.errors import hub_errors

_IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
_TEXTS = (".arrow", ".csv", ".jsonl", ".parquet", ".tsv")
_WRITTEN = (".jinja", ".json", ".md", ".txt", ".yaml", ".yml")
_VOCABULARY = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt")
"""Tokens of a tokenizer may look like paths."""

_PATH_FIELD = re.compile(r"name_or_path$|_file$|_dir$|_path$")
_PATH = re.compile(r"~|/|\.\.?/")
CARD = "README.md"


@dataclass(frozen=True)
class Upload:
    """A file to upload.

    Attributes:
        name: in the repository.
        content: its path, or its bytes.
    """

    name: str
    content: Path | bytes

    @property
    def size(self) -> int:
        """In bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


def files_to_upload(folder: Path, config: Config | None, site: Site) -> list[Upload]:
    """The files of a result folder without those that the config's `privacy` excludes; local paths are removed.

    Args:
        config: of the run; None for a merge, which has no data.
    """
    privacy = config.privacy if config else Privacy()
    kept_back = (*(() if privacy.images else _IMAGES), *(() if privacy.text else _TEXTS))
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != files.COMPLETE_MARKER]
    local = _local_paths(folder, config, site)
    uploads = [path for path in paths if path.suffix.lower() not in kept_back]
    return [Upload(str(path.relative_to(folder)), _redacted_content(path, local)) for path in uploads]


def _local_paths(folder: Path, config: Config | None, site: Site) -> re.Pattern[str]:
    """Matches paths below the folders of a run, its store and its user, or those of a merge's inputs."""
    named = [folder, site.store, site.runs, Path.home(), Path.cwd()]
    if config:
        named += [Path(config.data.root), Path(config.model.base)]
    elif (folder / cache.MERGE_RECORD).is_file():
        named += [Path(label) for label in files.read_json(folder / cache.MERGE_RECORD)["inputs"]]
    roots = {each for path in named if path.is_absolute() for each in (path, path.resolve()) if len(each.parts) > 1}
    any_root = "|".join(re.escape(root) for root in sorted(map(str, roots), key=len, reverse=True))
    return re.compile(rf"(?:{any_root})(?:/[^\s\"'`<>|()\[\],;]*|(?![\w.-]))")


def _redacted_content(path: Path, local: re.Pattern[str]) -> Path | bytes:
    """The file, or its text without local paths and secrets if it contains any."""
    if path.suffix.lower() not in _WRITTEN or path.name in _VOCABULARY:
        return path
    text = path.read_text(encoding="utf-8", errors="surrogateescape")
    content: Any = text
    if path.suffix.lower() == ".json":
        with contextlib.suppress(ValueError):
            content = json.loads(text)
    public = _without_paths(content, local)
    if public == content:
        return path
    written = public if content is text else json.dumps(public, ensure_ascii=False, indent=2)
    return str(written).encode("utf-8", "surrogateescape")


def _without_paths(value: Any, local: re.Pattern[str], key: str = "") -> Any:
    """Plain data, or a text, without local paths and secrets."""
    if isinstance(value, dict):
        return {_without_paths(name, local): _without_paths(item, local, name) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item, local, key) for item in value]
    if not isinstance(value, str):
        return value
    if _PATH_FIELD.search(key) and _PATH.match(value):
        return _name(value)
    return redact(local.sub(lambda match: _name(match[0]), value))


def _name(path: str) -> str:
    """The public name of a path; `~` for a home folder, whose name is a user's."""
    name = public_name(path)
    return "~" if name in (Path.home().name, getpass.getuser()) else name


def confirm(uploads: Sequence[Upload], config: Config | None, name: str, private: bool, yes: bool) -> bool:
    """List the files, and ask for confirmation without `yes`.

    Raises:
        UserError: standard input is not a terminal.
    """
    rows = [[upload.name, f"{upload.size:,}"] for upload in uploads]
    rows.append(["together", f"{sum(upload.size for upload in uploads):,}"])
    show = log.info if yes else log.warning  # who is asked must see it, also with -q
    show(log.format_table(["file", "bytes"], rows))
    images = [upload.name for upload in uploads if upload.name.lower().endswith(_IMAGES)]
    texts = [upload.name for upload in uploads if upload.name.lower().endswith(_TEXTS)]
    if config and config.privacy.text and hidden_text(config.data.prompt) != config.data.prompt:
        texts.append(f"the prompt, in {CARD}")
    show(f"pictures of the data: {', '.join(images) or 'none'}; text of the data: {', '.join(texts) or 'none'}")
    show(f"to: {name}; if it is new, {'private' if private else 'public: everybody can see it'}")
    return yes or log.ask("Send this?", "Add --yes to send this.")


def push(uploads: Sequence[Upload], name: str, private: bool, message: str) -> str:
    """Upload files in one commit, creating the repository if it does not exist.

    Args:
        name: OWNER/NAME, or NAME under the user's own.
        message: of the commit.

    Returns:
        The address of the repository.

    Raises:
        UserError: no login, no permission, no connection.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(endpoint=site_settings().get("HF_ENDPOINT"))
    operations = [CommitOperationAdd(upload.name, upload.content) for upload in uploads]
    with hub_errors(f"{name}: cannot be pushed", "model", unreachable="Run it where the hub can be reached."):
        address = api.create_repo(name, private=private, exist_ok=True)
        api.create_commit(address.repo_id, operations, commit_message=message)
    return str(address)
