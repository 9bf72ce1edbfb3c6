#!/usr/bin/env bash
# make gpu-wheels: what a GPU machine without a package registry needs beside its own torch, as wheels in .gpu-wheels/
# (some 55 MB). `make gpu` unpacks them into a temporary folder and installs nothing.
#   GPU_PYTHON=3.12  GPU_CUDA=130     the machine's Python, and the CUDA version of its torch (13.0)
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${GPU_PYTHON:-3.12} cuda=${GPU_CUDA:-130} target=.gpu-wheels
packages=(transformers==5.23.0 peft==0.21.2 bitsandbytes==0.50.2 pydantic==2.14.3 pydantic_core==2.50.4
  annotated_types==0.8.0 typing_inspection==0.4.5 typing_extensions rapidfuzz==3.14.6 submitit==1.5.4
  datasets==5.2.0 pyarrow==26.0.1 pandas==3.1.1 python-dateutil six dill multiprocess xxhash)
platforms=()
for number in 2_17 2_24 2_27 2_28 2_31 2_34; do platforms+=(--platform "manylinux_${number}_x86_64"); done
rm -rf "$target" && mkdir "$target"
"${PYTHON:-python3}" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
  --python-version "$python" --implementation cp --platform manylinux2014_x86_64 "${platforms[@]}" \
  -d "$target" "${packages[@]}"
# Smaller, since little can be carried: without the libraries of other versions of CUDA (bitsandbytes), without tests and
# headers and what reading files does not need (pyarrow, pandas), and compressed as hard as zip files can be.
"${PYTHON:-python3}" - "$target" "$cuda" <<'PY'
import pathlib, re, sys, zipfile

folder, cuda = pathlib.Path(sys.argv[1]), sys.argv[2]
unneeded = re.compile(r"/tests?/|/include/|\.(pyx|pxd|pxi|h|cc|hpp)$|libarrow_flight|_flight\.")
for wheel in sorted(folder.glob("*.whl")):
    kept = wheel.with_suffix(".kept")
    with zipfile.ZipFile(wheel) as full, zipfile.ZipFile(kept, "w", zipfile.ZIP_LZMA) as smaller:
        for name in full.namelist():
            other_cuda = wheel.name.startswith("bitsandbytes") and name.endswith(".so") and not (
                f"_cuda{cuda}.so" in name or "_cpu.so" in name
            )
            if not other_cuda and not unneeded.search(f"/{name}"):
                smaller.writestr(name, full.read(name))
    kept.replace(wheel)
print(f"{folder}: {sum(path.stat().st_size for path in folder.iterdir()) / 2**20:.1f} MiB")
PY
