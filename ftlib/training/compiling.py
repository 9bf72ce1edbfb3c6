"""torch.compile: one program for each of a few shapes, and a plain end where torch would go on uncompiled.

Dynamo keeps at most 8 programs of a function. Beyond that it runs the function as it is, with a warning at most: a job
that was sized for compiled speed then takes its time several times over. So as many programs are allowed as can be
needed, and one more is an error.
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
"""Rows at once: a micro-batch, the rest of an epoch, the one row of a rank that has none left, what halving leaves."""

_SPARE_PROGRAMS = 2
"""Programs for each shape; one is needed, another where something that a program relies on has changed."""

_ANY_SHAPE = 32
"""Programs where torch makes them for any shape: after the second shape, but anew for one row or one sequence."""


ContextFactory = Callable[[], AbstractContextManager[Any]]
"""Makes a context in which dynamo compiles as it is told here."""


def prepare_to_compile(config: Config, lengths: int | None) -> ContextFactory:
    """How dynamo compiles a model's training steps; programs of earlier models are forgotten.

    It is for training steps alone: questions have any length and number, and flex attention is compiled for them too.

    Args:
        lengths: how many row lengths batches can have, each to be compiled by itself; None: any, in programs that serve
            them all.
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
        UserError: what is compiled inside needs more programs than `prepare_to_compile` allowed.
    """
    try:
        yield
    except Exception as error:
        if type(error).__name__ not in ("FailOnRecompileLimitHit", "FailOnCacheLimitHit"):  # the second before 2.7
            raise
        problem = "training.torch_compile: torch compiled one function again and again, and would go on uncompiled"
        remedy = (
            "Set TORCH_LOGS=recompiles in the job's environment and start it again (it resumes): torch then says why. "
            "Or train without training.torch_compile; that is another run."
        )
        raise UserError(problem, remedy) from error


# Programs of torch.compile, kept in the run folder from one start of a run to the next.
#
# torch's own caches lie on the node's disk and are gone with the job: file locks and many small files do badly on
# shared storage. What is in them is kept as one file, written at checkpoints, put back at the next start and removed
# with the end of training. Whoever can write that file has code run in this user's name: its folder is the user's alone
# (0700), and what somebody else may have written is not read. Without such a folder, or with a torch before 2.7,
# programs are compiled anew at every start.

_DIGEST = hashlib.sha256().digest_size


class CompileCache:
    """The programs that a run's training was compiled to.

    Args:
        folder: for them alone; it is made when there is something to keep.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._graphs = 0

    def load(self) -> None:
        """Put the programs that were compiled by these versions for this GPU into torch's caches, if there are any."""
        if not hasattr(torch.compiler, "load_cache_artifacts"):
            return
        try:
            content = self._read()
        except FileNotFoundError:
            return
        except OSError as error:
            log.warning(f"{self._folder}: the programs of torch.compile are not used: {error.strerror or error}")
            return
        digest, programs = content[:_DIGEST], content[_DIGEST:]
        if hashlib.sha256(programs).digest() == digest:
            torch.compiler.load_cache_artifacts(programs)

    def save(self) -> None:
        """Keep what was compiled since the last call, if anything was; that it cannot be written hinders nothing."""
        if "torch._dynamo" not in sys.modules or not hasattr(torch.compiler, "save_cache_artifacts"):
            return
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        found = torch.compiler.save_cache_artifacts() if graphs != self._graphs else None
        self._graphs = graphs
        if found:
            with contextlib.suppress(OSError):
                self._write(hashlib.sha256(found[0]).digest() + found[0])

    def clear(self) -> None:
        """Remove them: the run is done."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _read(self) -> bytes:
        with self._opened() as folder:
            handle = os.open(_name(), os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder)
            with os.fdopen(handle, "rb") as file:
                _require_private(handle)
                return file.read()

    def _write(self, content: bytes) -> None:
        """What holds less than the file does is not written: this start has not come to all programs yet."""
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
        """A handle of the folder: what is done by it is done to the very folder that was found private."""
        handle = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            _require_private(handle)
            yield handle
        finally:
            os.close(handle)


def open_compile_cache(folder: Path) -> CompileCache | None:
    """Of training on a GPU; None on a CPU, since programs for one CPU may not suit the next."""
    return CompileCache(folder) if torch.cuda.is_available() else None


def _require_private(handle: int) -> None:
    """
    Raises:
        PermissionError: a file or folder is somebody else's, or others may write there or look into it.
    """
    facts = os.fstat(handle)
    if facts.st_uid != os.getuid() or stat.S_IMODE(facts.st_mode) & 0o077:
        raise PermissionError(0, "others may have written them")


def _name() -> str:
    """Of the file for these versions on this kind of GPU and CPU; to torch's own keys the versions belong too."""
    triton = [str(part.version) for part in importlib.metadata.distributions(name="triton")]
    machine = [platform.machine(), torch.backends.cpu.get_cpu_capability()]
    return json_sha256([sys.version, torch.__version__, *triton, gpu_name() or "", *machine])[:16]
