"""Runs `python3 -m ftlib …` in forks of a process that has imported torch and transformers already.

Each request is a line of JSON on stdin: `arguments`, `folder`, `environment`, `stdout`, `stderr` (paths). Each
answer is a line with the exit code. What a fork runs is `ftlib.__main__`, as Python's `-m` does, so that only the time
of importing large packages is saved; nothing of ftlib is imported here.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import signal
import sys

import accelerate  # noqa: F401
import bitsandbytes  # noqa: F401
import datasets  # noqa: F401
import peft  # noqa: F401
import PIL.Image
import pydantic.types  # noqa: F401
import torch  # noqa: F401
import transformers.models.gemma.modeling_gemma
import transformers.models.siglip.modeling_siglip  # noqa: F401
from transformers import (  # noqa: F401
    AutoModelForCausalLM,
    AutoProcessor,
    GemmaTokenizer,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    SiglipImageProcessorPil,
    Trainer,
)


def become(request: dict) -> None:
    """Run the command in this process; does not return."""
    os.setsid()
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    for number, path in ((0, os.devnull), (1, request["stdout"]), (2, request["stderr"])):
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(file, number)
        os.close(file)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(os.dup(n), mode) for n, mode in enumerate("rww"))
    sys.stderr.reconfigure(line_buffering=True)
    sys.argv = ["ftlib", *request["arguments"]]
    runpy.run_module("ftlib", run_name="__main__", alter_sys=True)


def main() -> None:
    """Answer requests until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    PIL.Image.init()
    gc.collect()
    gc.freeze()
    while line := sys.stdin.readline():
        request = json.loads(line)
        child = os.fork()
        if not child:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            become(request)
            sys.exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
