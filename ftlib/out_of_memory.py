"""Out of memory, of the GPU or of the host: recognized in all its forms, told as what the user can do about it.

torch raises OutOfMemoryError only where its own allocator has no room. Others fail in their own words: the CUDA driver
(torch.AcceleratorError), cuBLAS, cuDNN and NCCL (RuntimeError), torch's allocator of host memory (RuntimeError), numpy
and Python (MemoryError), the system (OSError with ENOMEM). cuDNN, cuSOLVER and cuFFT speak of an internal error where
a GPU is full. torch is not imported here: errors are told by their names and words.
"""

from __future__ import annotations

import contextlib
import errno
import re
import sys
from collections.abc import Iterator

from ftlib.errors import UserError
from ftlib.job_memory import job_memory

SMALLER_MODEL = "Set model.quantization: nf4, or take a larger GPU; `ftlib plan CONFIG --gpu SIZE` says what would fit."
MORE_MEMORY = "Ask for more memory: job.mem (sbatch --mem=…)."

_HOST = re.compile(
    r"DefaultCPUAllocator|can(no|')t allocate memory|\bos error 12\b|\bstd::bad_alloc\b"
    r"|\b_?(Array)?MemoryError\b|HOST_ALLOCATION_FAILED",
    re.IGNORECASE,
)
_ANY = re.compile(
    # the driver, torch, NCCL ("Cuda failure 2 'out of memory'"), Triton, bitsandbytes
    r"\bout of memory\b|\bOutOfMemoryError\b"
    # CUBLAS_, CUDNN_, CUSOLVER_, CUSPARSE_STATUS_ALLOC_FAILED; cuDNN 9: …_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED
    r"|_ALLOC(ATION)?_FAILED\b"
    # a library's handle that finds no room for its workspace
    r"|STATUS_NOT_INITIALIZED when calling `?cu\w+Create\b"
    rf"|{_HOST.pattern}",
    re.IGNORECASE,
)

_PERHAPS = re.compile(r"\b(CUBLAS|CUDNN|CUSOLVER|CUSPARSE)_STATUS_INTERNAL_ERROR\b|\bCUFFT_INTERNAL_ERROR\b")
"""What cuDNN, cuSOLVER and cuFFT say on a full GPU (seen on an H200), and of other faults too."""

_FULL = 512 << 20
"""Bytes of a GPU that nobody has taken: with fewer it is full. Libraries take theirs beside torch's allocator."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or the one that it was raised from, says that memory ran out."""
    if isinstance(error, UserError):
        return False
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    if "OutOfMemoryError" in {kind.__name__ for kind in type(error).__mro__} or _ANY.search(str(error)):
        return True
    if _PERHAPS.search(str(error)) and _gpu_is_full():
        return True
    return error.__cause__ is not None and is_out_of_memory(error.__cause__)


def _gpu_is_full() -> bool:
    """Asked only after an error on a GPU, so that torch is there; a GPU that failed otherwise does not answer."""
    torch = sys.modules.get("torch")
    try:
        return torch is not None and torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < _FULL
    except RuntimeError:
        return False


@contextlib.contextmanager
def enough_memory(remedy: str = SMALLER_MODEL, host: str = MORE_MEMORY, doing: str = "") -> Iterator[None]:
    """Inside, memory may run out.

    Args:
        remedy: what helps against too little GPU memory; without one, that of a model that does not fit.
        host: what helps against too little memory of the host.
        doing: what it ran out with, such as "with a batch of 8 questions".

    Raises:
        UserError: it did.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        of_host, words = _tell(error)
        where = " ".join(filter(None, ["out of memory" if of_host else "out of GPU memory", doing]))
        told = ": ".join(filter(None, [where, words]))
        raise UserError(f"{told}; {job_memory()}" if of_host else told, host if of_host else remedy) from None


def _tell(error: BaseException) -> tuple[bool, str]:
    """Whether it was the host's memory, and the line of an error that says so."""
    lines = str(error).splitlines()
    words = next((line.strip() for line in lines if _ANY.search(line)), "")
    if not words and error.__cause__ is not None and is_out_of_memory(error.__cause__):
        return _tell(error.__cause__)
    of_host = isinstance(error, (MemoryError, OSError)) or bool(_HOST.search(words))
    return of_host, words or (lines[0] if lines else "")
