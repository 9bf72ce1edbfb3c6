#!/usr/bin/env bash
# Build the image from containers/ftlib.def.
#
#   containers/build.sh [IMAGE]         default: $FTLIB_STORE/images/ftlib.sif
#   containers/build.sh --render FILE   only write a definition without build arguments, for other builders
#
# From the environment or jobs/site.env: BOOTSTRAP, BASE (base image), INDEX_URL (package index), CA_FILE (certificate of a
# site's caching index), WHEELS (folder of wheels for building offline). Temporary files go to local disk, the cache of
# layers to the store. INDEX_URL may hold a password: it is in pip.conf, bound to /mnt while pip runs, and neither in the
# definition nor in the image. Other builders bind a pip.conf of their own there.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/jobs/lib.sh"
umask 022 # the image can be read, and not written, by others
read_site_env "$root/jobs/site.env"

die() { echo "build.sh: $*" >&2; exit 2; }

# Tracked files with their uncommitted changes, the CA file if there is one.
gather() {
    local context=$1
    rm -rf "$context" && mkdir -p "$context"
    copy_tracked "$root" "$context"
    : > "$context/ca.crt"
    if [[ -n ${CA_FILE:-} ]]; then cp "$CA_FILE" "$context/ca.crt" || die "CA_FILE=$CA_FILE cannot be read"; fi
}

# Build arguments are written into the definition and its shell commands.
check_arguments() {
    local name
    for name in BOOTSTRAP BASE INDEX_URL; do
        [[ ${!name:-} != *[[:cntrl:]\"\'\`\$\\]* ]] || die "$name: control characters, quotes, \$ and \\ have no place in it"
    done
}

arguments() { # NAME=VALUE of every build argument that is set
    local name
    for name in BOOTSTRAP BASE; do
        if [[ -n ${!name:-} ]]; then echo "$name=${!name}"; fi
    done
    echo "CONTEXT=$1"
    echo "REVISION=$(git -C "$root" describe --always --dirty=+changes 2>/dev/null || echo unknown)"
}

render() { # the definition with every {{ NAME }} filled in, and without %arguments
    local context=$1 line text
    text=$(sed '/^%arguments/,/^$/d' "$root/containers/ftlib.def")
    while IFS= read -r line; do
        text=${text//"{{ ${line%%=*} }}"/${line#*=}}
    done < <(arguments "$context"; sed -n '/^%arguments/,/^$/s/^ *\([A-Z_]*=.*\)/\1/p' "$root/containers/ftlib.def")
    printf '%s\n' "$text"
}

main() {
    local container image
    check_arguments
    if [[ ${1:-} == --render ]]; then
        [[ $# == 2 ]] || die "--render needs a file name"
        gather "$root/build/context"
        render "$root/build/context" > "$2"
        return
    fi
    container=$(find_container) || die "neither apptainer nor singularity is in PATH"
    image=${1:-${FTLIB_IMAGE:-${FTLIB_STORE:?set it in jobs/site.env, or name the image}/images/ftlib.sif}}
    scratch=$(mktemp -d "${FTLIB_TMP:-/tmp}/ftlib-build.XXXXXX")
    trap 'rm -rf "$scratch" "${beside:-$scratch}"' EXIT
    gather "$scratch/context"
    render "$scratch/context" > "$scratch/ftlib.def"
    if [[ -n ${FTLIB_STORE:-} ]]; then make_store images cache; fi
    mkdir -p "$(dirname "$image")" "$scratch/tmp"
    export APPTAINER_TMPDIR=$scratch/tmp SINGULARITY_TMPDIR=$scratch/tmp
    if [[ -n ${FTLIB_STORE:-} ]]; then
        # Layers of others would become part of the image: each user has a cache of their own.
        export APPTAINER_CACHEDIR=$FTLIB_STORE/cache/container-$(id -un)
        export SINGULARITY_CACHEDIR=$APPTAINER_CACHEDIR
        make_folder "$APPTAINER_CACHEDIR" 700 && [[ -O $APPTAINER_CACHEDIR ]] || die "$APPTAINER_CACHEDIR is not yours"
    fi
    local bind=()
    mkdir -p "$scratch/mnt"
    if [[ -n ${INDEX_URL:-} ]]; then
        (umask 077; printf '[global]\nindex-url = %s\n' "$INDEX_URL" > "$scratch/mnt/pip.conf")
        bind=(--bind "$scratch/mnt:/mnt")
        unset INDEX_URL
    fi
    if [[ -n ${WHEELS:-} ]]; then
        [[ -d $WHEELS ]] || die "WHEELS=$WHEELS is no folder"
        mkdir -p "$scratch/mnt/wheels"
        cp "$WHEELS"/*.whl "$scratch/mnt/wheels/"
        bind=(--bind "$scratch/mnt:/mnt")
    fi
    "$container" build --fakeroot "${bind[@]}" "$scratch/ftlib.sif" "$scratch/ftlib.def"
    beside=$(mktemp -d "$image.tmp-XXXXXX") # the group may write there: no name that somebody could foresee
    cp "$scratch/ftlib.sif" "$beside/ftlib.sif"
    mv -T "$beside/ftlib.sif" "$image"
    echo "built $image"
}

main "$@"
