#!/usr/bin/env bash
# Build the image as an ordinary user with --fakeroot, from containers/ftlib.def on the Debian base that up.sh made.
# The base and the package index are this machine's; everything else is what a real site builds.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
state=${FTLIB_CLUSTER_STATE:-/var/lib/ftlib-cluster}
root=$(cd "$here/../.." && pwd)
inputs=(containers setup.cfg pyproject.toml ftlib configs)
wanted=$(cd "$root" && git ls-files -z "${inputs[@]}" | xargs -0 sha256sum | sha256sum | cut -d' ' -f1)
if [[ -e $state/ftlib.sif && $(cat "$state/ftlib.sif.inputs" 2>/dev/null) == "$wanted" ]]; then
    echo "image: $state/ftlib.sif is up to date"
    exit
fi
work=$(mktemp -d "$state/build.XXXXXX")
trap 'rm -rf "$work"' EXIT
source "$root/jobs/lib.sh"
mkdir "$work/source" "$work/store"
copy_tracked "$root" "$work/source"
cp -r "$root/.git" "$work/source/.git"
chown -R ftuser: "$work"
settings=(BOOTSTRAP=localimage BASE="$state/base.sif" FTLIB_STORE="$work/store" FTLIB_TMP="$work" HOME="$work")
if [[ -n ${PIP_CERT:-} ]]; then settings+=(CA_FILE="$PIP_CERT"); fi
if [[ -d ${PIP_FIND_LINKS:-} ]]; then settings+=(WHEELS="$PIP_FIND_LINKS"); fi
if [[ -n ${PIP_INDEX_URL:-} ]]; then settings+=(INDEX_URL="$PIP_INDEX_URL"); fi
runuser -u ftuser -- env "${settings[@]}" bash -c "git config --global safe.directory '*'; cd '$work/source' && containers/build.sh"
mv "$work/store/images/ftlib.sif" "$state/ftlib.sif"
echo "$wanted" > "$state/ftlib.sif.inputs"
echo "image: built $state/ftlib.sif"
