"""torch.compile: static shapes, recompilation limits that raise an error, and a compile cache that is kept.

By default dynamo compiles a function at most 8 times. Beyond that it silently runs it in eager mode, and the job takes
several times as long. Here the limit is the number of programs that can be needed, and exceeding it is an error.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ftlib.config.schema import Config
from ftlib.core import log
from ftlib.core.files import json_sha256
from ftlib.core.gpu import gpu_name
from ftlib.errors import UserError
from ftlib.models.attention import dynamo_setting_name

_SIZES_PER_SHAPE = 4
"""Batch sizes for each shape: a micro-batch, the last one of an epoch, one padding row, the rest after splitting."""

_SPARE_PROGRAMS = 2
"""Programs for each shape: one is needed, another after a guard failed."""

_ANY_SHAPE = 32
"""Programs with dynamic shapes; batches of one row or one sequence are compiled separately."""


ContextFactory = Callable[[], AbstractContextManager[Any]]
"""Returns a context in which dynamo compiles with these settings."""


def prepare_to_compile(config: Config, lengths: int | None) -> ContextFactory:
    """Return the context in which dynamo compiles training steps; programs of earlier models are discarded.

    Use it for training steps only: evaluation batches have any shape, and flex attention is compiled for them too.

    Args:
        lengths: the number of row lengths that batches can have, each compiled on its own; None: dynamic shapes.
    """
    import torch._dynamo

    torch._dynamo.reset()
    halvings = config.micro_batch_size.bit_length() if config.batch.auto else 1
    programs = _SPARE_PROGRAMS * lengths * _SIZES_PER_SHAPE * halvings if lengths else _ANY_SHAPE
    chosen = {
        "automatic_dynamic_shapes": lengths is None,
        dynamo_setting_name("recompile_limit", "cache_size_limit"): programs,
        dynamo_setting_name("accumulated_recompile_limit", "accumulated_cache_size_limit"): max(256, programs),
        dynamo_setting_name("fail_on_recompile_limit_hit", "fail_on_cache_limit_hit"): True,
    }
    return partial(torch._dynamo.config.patch, chosen)


@contextlib.contextmanager
def limit_recompiles() -> Iterator[None]:
    """
    Raises:
        UserError: a function needs more programs than `prepare_to_compile` allowed.
    """
    try:
        yield
    except Exception as error:
        if type(error).__name__ not in ("FailOnRecompileLimitHit", "FailOnCacheLimitHit"):  # the latter before 2.7
            raise
        problem = "training.torch_compile: recompilation limit reached; torch would continue uncompiled"
        remedy = (
            "Set TORCH_LOGS=recompiles in the job's environment and start it again (it resumes): torch then logs why. "
            "Or train without training.torch_compile; that is a different run."
        )
        raise UserError(problem, remedy) from error


# The compile cache: programs of torch.compile are kept in the run folder between the starts of a run.
# torch's own caches are on the node's disk and are lost with the job, because file locks and many small files work
# badly on shared storage. Their content is kept as one file: written at checkpoints, loaded at the next start, removed
# at the end of training. Whoever can write that file can run code as this user, so its folder is private (0700), and a
# file that another user may have written is not read. Without such a folder, or before torch 2.7, every start compiles
# again.

_DIGEST = hashlib.sha256().digest_size


class CompileCache:
    """The compiled programs of a run's training, stored in the run folder.

    Args:
        folder: used for nothing else; created by the first `save`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._graphs = 0

    def load(self) -> None:
        """Load stored programs for these versions and this GPU into torch's caches, if there are any."""
        if not hasattr(torch.compiler, "load_cache_artifacts"):
            return
        try:
            content = self._read()
        except FileNotFoundError:
            return
        except OSError as error:
            log.warning(f"{self._folder}: compile cache not used: {error.strerror or error}")
            return
        digest, programs = content[:_DIGEST], content[_DIGEST:]
        if hashlib.sha256(programs).digest() == digest:
            torch.compiler.load_cache_artifacts(programs)

    def save(self) -> None:
        """Store new programs since the last call, if any; errors of the file system are ignored."""
        if "torch._dynamo" not in sys.modules or not hasattr(torch.compiler, "save_cache_artifacts"):
            return
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        found = torch.compiler.save_cache_artifacts() if graphs != self._graphs else None
        self._graphs = graphs
        if found:
            with contextlib.suppress(OSError):
                self._write(hashlib.sha256(found[0]).digest() + found[0])

    def clear(self) -> None:
        """Remove the cache once the run is done."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _read(self) -> bytes:
        with self._opened() as folder:
            handle = os.open(_name(), os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder)
            with os.fdopen(handle, "rb") as file:
                _require_private(handle)
                return file.read()

    def _write(self, content: bytes) -> None:
        """Write `content` unless the existing file is larger: then this start has not compiled all programs yet."""
        self._folder.mkdir(mode=0o700, exist_ok=True)
        name = _name()
        temporary = f"{name}.{os.getpid()}"
        with self._opened() as folder:
            with contextlib.suppress(FileNotFoundError):
                if os.stat(name, dir_fd=folder, follow_symlinks=False).st_size >= len(content):
                    return
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=folder)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(content)
                os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
            except BaseException:
                os.unlink(temporary, dir_fd=folder)
                raise

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        """Yield a descriptor of the folder, so that all access is to the folder whose permissions were checked."""
        handle = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            _require_private(handle)
            yield handle
        finally:
            os.close(handle)


def open_compile_cache(folder: Path) -> CompileCache | None:
    """Return the compile cache on a GPU; None on a CPU, because programs for one CPU may not run on another."""
    return CompileCache(folder) if torch.cuda.is_available() else None


def _require_private(handle: int) -> None:
    """
    Raises:
        PermissionError: it belongs to another user, or others can read or write it.
    """
    facts = os.fstat(handle)
    if facts.st_uid != os.getuid() or stat.S_IMODE(facts.st_mode) & 0o077:
        raise PermissionError(0, "other users may have written it")


def _name() -> str:
    """Return the file name for these versions on this type of GPU and CPU."""
    triton = [str(part.version) for part in importlib.metadata.distributions(name="triton")]
    machine = [platform.machine(), torch.backends.cpu.get_cpu_capability()]
    return json_sha256([sys.version, torch.__version__, *triton, gpu_name() or "", *machine])[:16]
