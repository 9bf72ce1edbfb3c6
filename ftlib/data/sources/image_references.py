"""References of images in rows: paths, `data:` URIs, and https URLs. The images of the last two are files below the
dataset's folder: those of `data:` URIs are written when rows are read (not by `prepare --check`), those of URLs are
downloaded by `stage_urls`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import importlib.util
import os
import posixpath
import re
import tempfile
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote_to_bytes

from ftlib.config.schema import Data
from ftlib.core import files, log
from ftlib.data.example import raise_all
from ftlib.data.images import MAX_BYTES, image_path, image_size
from ftlib.errors import UserError
from ftlib.hub.urls import DownloadError, download, without_query

EMBEDDED = ".images/embedded"
"""Folder below `data.root` for images of `data:` URIs; a file is named by its SHA-256."""


DOWNLOADED = ".images/urls"
"""Folder below `data.root` for downloaded images; a file is named by the SHA-256 of its URL. Beside it is a JSON file
with the URL without its query string, and the SHA-256 of the content."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{1,19})://")

_embedded_in: Path | None = None
"""Where images of `data:` URIs are written instead of the dataset's folder, see `without_writing`."""

_AT_ONCE = 8
_collected: set[str] | None = None
"""The URLs that `_collect` finds."""


class ImageLocator:
    """Turns the references of a dataset's images into paths relative to its root."""

    def __init__(self, data: Data) -> None:
        self._root = Path(data.root)
        self._allow_urls = data.allow_urls

    def __call__(self, reference: str) -> str:
        """Return the path of an image.

        Raises:
            ValueError: the reference cannot be used.
            UserError: a `data:` URI, and the dataset's folder cannot be written.
        """
        scheme = reference.partition(":")[0].lower() if ":" in reference[:9] else ""
        if scheme == "data":
            return self._embedded(_content_of_uri(reference))
        if scheme in ("http", "https"):
            return self._downloaded(reference)
        if scheme == "file":
            place = reference[len("file:") :].removeprefix("//")
            place = place.removeprefix("localhost") if place.startswith("localhost/") else place
            return posixpath.normpath(unquote_to_bytes(place).decode(errors="replace"))
        if found := _SCHEME.match(reference):
            raise ValueError(f"an image is a URL of {found[1]}; only https URLs are downloaded")
        return posixpath.normpath(reference)

    def _embedded(self, content: bytes) -> str:
        """Write an image unless it is there already; several processes may read the same rows."""
        name = f"{EMBEDDED}/{hashlib.sha256(content).hexdigest()}"
        target = row_image_path(self._root, name)
        if not target.is_file() or target.stat().st_size != len(content):
            _write(target, content)
        return name

    def _downloaded(self, url: str) -> str:
        if not url.lower().startswith("https:"):
            raise ValueError("an image is a URL of http; only https URLs are downloaded")
        if not self._allow_urls:
            raise ValueError("an image is a URL; set data.allow_urls: true, and `ftlib stage CONFIG` downloads it")
        name = name_of_url(url)
        if _collected is not None:
            _collected.add(url)
        elif not (self._root / name).is_file():
            raise ValueError(f"the image {without_query(url)} is not downloaded; run `ftlib stage CONFIG`")
        return name


@contextmanager
def without_writing() -> Iterator[None]:
    """In the body, images of `data:` URIs are written into a temporary folder; the dataset's folder is not changed."""
    global _embedded_in
    with tempfile.TemporaryDirectory() as folder:
        _embedded_in = Path(folder)
        try:
            yield
        finally:
            _embedded_in = None


def row_image_path(root: Path, name: str) -> Path:
    """Return the path of an image of a dataset, of a `data:` URI too in the body of `without_writing`.

    Raises:
        UserError: the path is outside the data folder.
    """
    if _embedded_in and name.startswith(f"{EMBEDDED}/"):
        return _embedded_in / posixpath.basename(name)
    return image_path(root, name)


def name_of_url(url: str) -> str:
    """Return the path of a downloaded image."""
    return f"{DOWNLOADED}/{hashlib.sha256(url.encode()).hexdigest()}"


def stage_urls(data: Data, read: Callable[[], object], fetch: Callable[[str, int], bytes] = download) -> int:
    """Download the images that a dataset's rows name by URL, unless they are there.

    Args:
        read: reads all rows.
        fetch: (URL, largest number of bytes) → content.

    Returns:
        The number of URLs.

    Raises:
        UserError: URLs that cannot be downloaded, or are no images (only reported with `on_bad: skip`).
    """
    with _collect() as urls:
        read()
    root = Path(data.root)
    missing = [url for url in sorted(urls) if not _is_complete(root / name_of_url(url))]

    def stage(url: str) -> str:
        try:
            _stage(url, root / name_of_url(url), data.max_pixels, fetch)
        except DownloadError as error:
            return str(error)
        except UserError as error:
            return f"{without_query(url)}: {error.problem}"
        return ""

    faults = []
    with ThreadPoolExecutor(_AT_ONCE) as pool, log.progress("downloading images", len(missing)) as update:
        for number, fault in enumerate(pool.map(stage, missing), 1):
            faults += [fault] if fault else []
            update(number, "")
    if data.on_bad == "stop":
        raise_all(faults, "Fix these rows, or skip them with data.on_bad=skip; the other images are kept.")
    elif faults:
        log.warning(f"{len(faults)} images could not be downloaded, such as {faults[0]}")
    return len(urls)


@contextmanager
def _collect() -> Iterator[set[str]]:
    """In the body, rows with URLs are valid, and their URLs are collected."""
    global _collected
    _collected = set()
    try:
        yield _collected
    finally:
        _collected = None


def _stage(url: str, target: Path, max_pixels: int | None, fetch: Callable[[str, int], bytes]) -> None:
    content = fetch(url, MAX_BYTES)
    temporary = target.with_name(f"{files.TEMPORARY_PREFIX}{uuid.uuid4().hex}")  # another process may stage it too
    try:
        _write(temporary, content)
        try:
            if importlib.util.find_spec("PIL"):  # otherwise `ftlib prepare` checks it
                image_size(temporary, max_pixels)
        except UserError as error:
            raise UserError(error.problem.replace(str(temporary), "the content")) from None
        known = {"url": without_query(url), "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        files.write_json(target.with_name(f"{target.name}.json"), known)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _is_complete(image: Path) -> bool:
    """Whether an image is there with the content that was downloaded."""
    known = image.with_name(f"{image.name}.json")
    return image.is_file() and known.is_file() and files.read_json(known)["sha256"] == files.file_sha256(image)


def _write(target: Path, content: bytes) -> None:
    with files.storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        number, temporary = tempfile.mkstemp(dir=target.parent, prefix=files.TEMPORARY_PREFIX)
        with os.fdopen(number, "wb") as file:
            file.write(content)
            os.fchmod(file.fileno(), target.parent.stat().st_mode & 0o666)
        Path(temporary).replace(target)


def is_extracted(name: str) -> bool:
    """Whether an image's path is below the folder that ftlib writes."""
    return name.startswith(".images/")


def _content_of_uri(uri: str) -> bytes:
    """Return the bytes of a `data:` URI (RFC 2397).

    Raises:
        ValueError: it is no image, or is malformed.
    """
    header, comma, body = uri.partition(",")
    kind, *options = header[len("data:") :].lower().split(";")
    if not comma or not kind.startswith("image/"):
        raise ValueError(f"a data: URI must hold an image, got {header[:40]!r}")
    if "base64" not in options:
        return unquote_to_bytes(body)
    try:
        return base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("the base64 of a data: URI is malformed") from None
