"""Turns out-of-memory errors, of the GPU or of the host, into user-facing messages.

torch raises OutOfMemoryError only where its own allocator fails. Other parts raise other errors: the CUDA driver
(torch.AcceleratorError), cuBLAS, cuDNN and NCCL (RuntimeError), torch's allocator of host memory (RuntimeError), numpy
and Python (MemoryError), the system (OSError with ENOMEM). cuDNN, cuSOLVER and cuFFT report an internal error where a
GPU is full. torch is not imported here: errors are recognized by type name and message.
"""

from __future__ import annotations

import contextlib
import errno
import re
import sys
from collections.abc import Iterator

from ftlib.core.job_memory import job_memory
from ftlib.errors import UserError

SMALLER_MODEL_HINT = (
    "Set model.quantization: nf4, or take a larger GPU; `ftlib plan CONFIG --gpu SIZE` says what would fit."
)
MORE_MEMORY_HINT = "Ask for more memory: job.mem (sbatch --mem=…)."

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
    # a library's handle that cannot allocate its workspace
    r"|STATUS_NOT_INITIALIZED when calling `?cu\w+Create\b"
    rf"|{_HOST.pattern}",
    re.IGNORECASE,
)

_POSSIBLY = re.compile(r"\b(CUBLAS|CUDNN|CUSOLVER|CUSPARSE)_STATUS_INTERNAL_ERROR\b|\bCUFFT_INTERNAL_ERROR\b")
"""Messages of cuDNN, cuSOLVER and cuFFT on a full GPU (seen on an H200), but also for other faults."""

_FULL_BELOW_BYTES = 512 << 20
"""A GPU with fewer free bytes is full. Libraries allocate outside torch's allocator."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or its cause, means that memory ran out."""
    if isinstance(error, UserError):
        return False
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    if "OutOfMemoryError" in {kind.__name__ for kind in type(error).__mro__} or _ANY.search(str(error)):
        return True
    if _POSSIBLY.search(str(error)) and _gpu_is_full():
        return True
    return error.__cause__ is not None and is_out_of_memory(error.__cause__)


def _gpu_is_full() -> bool:
    """Called only after an error on a GPU, when torch is imported; a GPU that failed otherwise raises RuntimeError."""
    torch = sys.modules.get("torch")
    try:
        return torch is not None and torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < _FULL_BELOW_BYTES
    except RuntimeError:
        return False


@contextlib.contextmanager
def oom_as_user_error(
    remedy: str = SMALLER_MODEL_HINT, host: str = MORE_MEMORY_HINT, doing: str = ""
) -> Iterator[None]:
    """Turn out-of-memory errors of the body into a UserError.

    Args:
        remedy: for GPU memory; default: for a model that does not fit.
        host: remedy for the host's memory.
        doing: the action that failed, such as "with a batch of 8 questions".

    Raises:
        UserError: memory ran out.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        of_host, words = _classify(error)
        where = " ".join(filter(None, ["out of memory" if of_host else "out of GPU memory", doing]))
        told = ": ".join(filter(None, [where, words]))
        raise UserError(f"{told}; {job_memory()}" if of_host else told, host if of_host else remedy) from None


def _classify(error: BaseException) -> tuple[bool, str]:
    """Whether it was the host's memory, and the line of the error's message about it."""
    lines = str(error).splitlines()
    words = next((line.strip() for line in lines if _ANY.search(line)), "")
    if not words and error.__cause__ is not None and is_out_of_memory(error.__cause__):
        return _classify(error.__cause__)
    of_host = isinstance(error, (MemoryError, OSError)) or bool(_HOST.search(words))
    return of_host, words or (lines[0] if lines else "")
