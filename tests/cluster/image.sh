#!/usr/bin/env bash
# Build the image as a user does, by `sbatch jobs/build.sbatch`: --fakeroot, an ordinary user, containers/ftlib.def. Only
# its base (a Debian made by up.sh) and the package index are this machine's.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
state=${FTLIB_CLUSTER_STATE:-/var/lib/ftlib-cluster}
root=$(cd "$here/../.." && pwd)
inputs=(containers setup.cfg pyproject.toml ftlib configs)
wanted=$(cd "$root" && git ls-files -z "${inputs[@]}" | xargs -0 sha256sum | sha256sum | cut -d' ' -f1)
if [[ -e $state/ftlib.sif && $(cat "$state/ftlib.sif.inputs" 2> /dev/null) == "$wanted" ]]; then
    echo "image: $state/ftlib.sif is up to date"
    exit
fi
work=$(mktemp -d "$state/build.XXXXXX")
trap 'rm -rf "$work"' EXIT
source "$root/jobs/lib.sh"
mkdir "$work/source" "$work/store"
copy_tracked "$root" "$work/source"
chown -R ftuser: "$work"
settings=(HOME=/home/ftuser BOOTSTRAP=localimage BASE="$state/base.sif" FTLIB_STORE="$work/store" FTLIB_TMP="$work")
# zstd at level 1 packs in a seventh of gzip's time, and each job reads the image faster.
settings+=(APPTAINER_MKSQUASHFS_ARGS="-comp zstd -Xcompression-level 1")
if [[ -n ${PIP_CERT:-} ]]; then settings+=(CA_FILE="$PIP_CERT"); fi
if [[ -d ${PIP_FIND_LINKS:-} ]]; then settings+=(WHEELS="$PIP_FIND_LINKS"); fi
if [[ -n ${PIP_INDEX_URL:-} ]]; then settings+=(INDEX_URL="$PIP_INDEX_URL"); fi
submit="cd '$work/source' && sbatch --wait --mem=8G --open-mode=append --output=logs/build.log jobs/build.sbatch"
echo "image: building $state/ftlib.sif in a job by containers/ftlib.def (several minutes); the job's output:"
mkdir -p "$work/source/logs" && touch "$work/source/logs/build.log" && chown -R ftuser: "$work/source/logs"
tail -n +1 -f --pid=$$ "$work/source/logs/build.log" | sed -u 's/^/image: /' &
if ! runuser -u ftuser -- env "${settings[@]}" bash -c "$submit" || [[ ! -e $work/store/images/ftlib.sif ]]; then
    echo "image: the build failed, see its output above" >&2
    exit 1
fi
mv "$work/store/images/ftlib.sif" "$state/ftlib.sif"
echo "$wanted" > "$state/ftlib.sif.inputs"
echo "image: built $state/ftlib.sif in $SECONDS s"
