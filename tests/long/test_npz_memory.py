"""A large checkpoint is converted in little memory. Run by `make long`."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from ftlib.models import big_vision
from tests.models.test_big_vision import TOKENIZER, released

CONVERT = """
import json, resource, sys, time
from pathlib import Path
from ftlib.config.npz_checkpoints import NpzCheckpoint
from ftlib.models import big_vision
npz, tokenizer, folder = map(Path, sys.argv[1:])
before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
big_vision.convert(NpzCheckpoint(npz, "", str(tokenizer), "", folder), tokenizer, folder)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"before": before * 1024, "after": after * 1024, "seconds": time.monotonic() - began}))
"""


@pytest.mark.long
def test_peak_memory(tmp_path: Path) -> None:
    """PaliGemma 3B's own layers, six of them, and its table, in bfloat16: 3.2 GB."""
    npz, folder = tmp_path / "large.npz", tmp_path / "model"
    folder.mkdir()
    noise = np.random.default_rng(0).bytes(1 << 22)
    arrays = released(6, 2048, 16384, 8, 1, 256, 256)
    with zipfile.ZipFile(npz, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"params/{name}.npy", "w", force_zip64=True) as file:
                header = {"descr": "<V2", "fortran_order": False, "shape": array.shape}
                np.lib.format.write_array_header_1_0(file, header)
                for start in range(0, array.nbytes, len(noise)):
                    file.write(noise[: array.nbytes - start])
    command = [sys.executable, "-c", CONVERT, str(npz), str(TOKENIZER), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    print(f"{npz.stat().st_size:,} bytes:", found)
    layout = big_vision.match_arrays(arrays, npz)
    assert (folder / "model.safetensors").stat().st_size > layout.nbytes > 3e9
    largest = max(source.array.nbytes // len(source.prefixes) for source in layout.sources if source.layers)
    assert found["after"] < found["before"] + 4 * largest + 2**28
