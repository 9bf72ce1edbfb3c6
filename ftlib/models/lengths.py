"""How many tokens rows have: measured once, by all cores, for everything that depends on it and for all runs alike.

`<store>/lengths/<rows>-<tokens>.npy` holds tokens of prompt and answer, shape (rows, 2), int32. `<rows>` is a hash of a
split's rows in their order, `<tokens>` of the prompts and of the tokenizer. The model's limit is not part of it: rows
are measured whole. All of it can be removed at any time.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ftlib.config.schema import Config
from ftlib.core import files, log
from ftlib.core.paths import Site
from ftlib.core.registry import provider
from ftlib.core.wait import wait_until
from ftlib.data.dataset import PreparedDataset, lengths_folder, rows_hash
from ftlib.data.example import Example
from ftlib.data.images import image_path, image_size
from ftlib.data.prompts import PromptTemplates, render_prompt

if TYPE_CHECKING:
    from ftlib.models.encoding import Size
    from ftlib.models.registry import InputProcessor


@dataclass(frozen=True)
class ImageFolder:
    """Where a dataset's images are, and what bounds their size when they are opened (`images.open_image`)."""

    root: Path
    max_pixels: int | None

    def size(self, name: str) -> tuple[int, int]:
        """(width, height) of an image as it is opened."""
        return image_size(image_path(self.root, name), self.max_pixels)


_CHUNK = 5000
"""Rows that are tokenized together."""
_unwritten: dict[Path, NDArray[np.int32]] = {}
"""What this process has measured, where the store cannot be written."""


def length_cache_path(prepared: PreparedDataset, split: str, config: Config, folder: Path, site: Site) -> Path:
    """Where the lengths of a split's rows are kept, for all runs that use the same rows, prompts and tokenizer.

    Args:
        folder: of the base model.
    """
    import tokenizers
    import transformers

    model = {
        path.name: files.file_sha256(path)
        for path in sorted(folder.iterdir())
        if path.is_file() and path.suffix in (".json", ".model", ".txt", ".jinja")
    }
    plugin = provider("model", config.model.family, config.plugins)
    family = [config.model.family, plugin.identity] if plugin else config.model.family
    how: list[Any] = [family, config.data.templates, config.model.chat_template_arguments]
    if config.data.chat_turns == "all":  # the same rows as with `last`, but prompts end at the first answer
        how.append("all turns")
    if config.model.entry.auto_processor:
        how.append([config.model.image_arguments, config.data.max_pixels])
    tokens = files.json_sha256([model, how, [transformers.__version__, tokenizers.__version__]])[:16]
    return lengths_folder(site) / f"{rows_hash(prepared.folder, split)}-{tokens}.npy"


def cached_token_lengths(
    examples: Sequence[Example],
    templates: PromptTemplates,
    processor: InputProcessor,
    cache: Path | None = None,
    images: ImageFolder | None = None,
) -> NDArray[np.int32]:
    """Tokens of prompt and answer of every example, shape (n, 2); of several tasks of a job one measures them.

    Args:
        cache: see `length_cache_path`; without one they are measured here, where it cannot be written once a process.
        images: of the examples, where lengths depend on them (`InputProcessor.length_depends_on_image`).
    """
    if cache and not cache.exists() and not _writable(cache):
        if cache not in _unwritten:
            _unwritten[cache] = _measure(examples, templates, processor, images)
        return _unwritten[cache]
    if cache and not cache.exists() and log.is_main_process():
        with files.storage_errors(cache):
            cache.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=cache.parent, prefix=files.TEMPORARY_PREFIX) as file:
                np.save(file, _measure(examples, templates, processor, images))
                file.flush()
                os.fchmod(file.fileno(), cache.parent.stat().st_mode & 0o666)  # who may use the folder may read it
                with contextlib.suppress(FileExistsError):
                    os.link(file.name, cache)
    if cache is None:
        return _measure(examples, templates, processor, images)
    wait_until(cache.exists, poll=1)
    found: NDArray[np.int32] = np.load(cache, mmap_mode="r")
    return found


def _writable(cache: Path) -> bool:
    folder = cache.parent
    while not folder.exists():
        folder = folder.parent
    return os.access(folder, os.W_OK)


def _measure(
    examples: Sequence[Example], templates: PromptTemplates, processor: InputProcessor, images: ImageFolder | None
) -> NDArray[np.int32]:
    sizes: dict[str, Size] = {}
    if processor.length_depends_on_image and images:
        names = sorted({name for row in examples for name in row.images})
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            sizes = dict(zip(names, pool.map(images.size, names), strict=True))
    found = np.empty((len(examples), 2), dtype=np.int32)
    with log.progress("measuring rows", len(examples)) as update:
        rows = iter(examples)
        for start in range(0, len(examples), _CHUNK):
            chunk = list(itertools.islice(rows, _CHUNK))
            prompts, answers = [render_prompt(row, templates) for row in chunk], [row.suffix for row in chunk]
            shown = [[sizes.get(name, (0, 0)) for name in row.images] for row in chunk]
            of_images = (shown,) if getattr(processor, "takes_images", sizes) else ()  # a plugin's may not know
            found[start : start + len(chunk)] = processor.token_lengths(prompts, answers, *of_images)
            update(start + len(chunk), "")
    return found
