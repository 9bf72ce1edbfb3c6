"""Programs of torch.compile, kept in the run folder from one start of a run to the next.

torch's own caches lie on the node's disk and are gone with the job: file locks and many small files do badly on shared
storage. What is in them is kept as one file, written at checkpoints, put back at the next start and removed with the
end of training. Whoever can write that file has code run in this user's name: its folder is the user's alone (0700),
and what somebody else may have written is not read. Without such a folder, or with a torch before 2.7, programs are
compiled anew at every start.
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
from collections.abc import Iterator
from pathlib import Path

import torch

from ftlib import console
from ftlib.files import fingerprint

_DIGEST = hashlib.sha256().digest_size


class KeptPrograms:
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
            console.say(f"{self._folder}: the programs of torch.compile are not used: {error.strerror or error}")
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

    def forget(self) -> None:
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


def kept_programs(folder: Path) -> KeptPrograms | None:
    """Of training on a GPU; None on a CPU, since programs for one CPU may not suit the next."""
    return KeptPrograms(folder) if torch.cuda.is_available() else None


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
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    machine = [platform.machine(), torch.backends.cpu.get_cpu_capability()]
    return fingerprint([sys.version, torch.__version__, *triton, gpu, *machine])[:16]
