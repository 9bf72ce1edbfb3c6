#!/usr/bin/env bash
# make gpu: the acceptance run, with this Python's torch; packages in .gpu-wheels/ come before the installed ones.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
if [[ -d .gpu-wheels ]]; then
  packages=$(mktemp -d)
  trap 'rm -rf "$packages"' EXIT
  for wheel in .gpu-wheels/*.whl; do "$python" -m zipfile -e "$wheel" "$packages"; done
  export PYTHONPATH="$packages${PYTHONPATH:+:$PYTHONPATH}"
fi
"$python" -m tests.gpu "$@"
