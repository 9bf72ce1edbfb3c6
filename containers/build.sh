#!/usr/bin/env bash
# Build the image from containers/ftlib.def.
#
#   containers/build.sh [--new-base] [IMAGE]     default: $FTLIB_STORE/images/ftlib.sif
#   containers/build.sh --render FILE            only write a definition without build arguments, for other builders
#
# From the environment or jobs/site.env: BOOTSTRAP, BASE (base image), INDEX_URL (package index), CA_FILE (certificate of a
# site's caching index), WHEELS (folder of wheels for building offline). Temporary files go to local disk, the cache of
# layers to the store. INDEX_URL may hold a password: it is in pip.conf, bound to /mnt while pip runs, and neither in the
# definition nor in the image. Other builders bind a pip.conf of their own there.
#
# The image's labels name the digest of the base image, the lock, the GPU architectures of torch and all packages. An image
# is rebuilt from the same digest; --new-base accepts another one.
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
    echo "DIGEST=$digest"
    echo "REVISION=$(git -C "$root" describe --always --dirty=+changes 2>/dev/null || echo unknown)"
}

# Print the digest of the base image: of a file its own, of a name with a digest that, else the one that its registry names
# now; "unknown" if it does not.
base_digest() {
    local base=$1 tag=latest host=registry-1.docker.io answer token name
    local manifests='application/vnd.oci.image.index.v1+json, application/vnd.docker.distribution.manifest.list.v2+json'
    manifests+=', application/vnd.oci.image.manifest.v1+json, application/vnd.docker.distribution.manifest.v2+json'
    if [[ ${BOOTSTRAP:-docker} == localimage && -f $base ]]; then echo "sha256:$(sha256sum < "$base" | cut -d ' ' -f 1)"; return; fi
    if [[ $base == *@sha256:* ]]; then echo "${base##*@}"; return; fi
    if [[ ${BOOTSTRAP:-docker} != docker ]] || ! command -v curl > /dev/null; then echo unknown; return; fi
    name=$base
    if [[ ${name##*/} == *:* ]]; then tag=${name##*:}; fi
    name=$(untagged "$name")
    if [[ ${name%%/*} == *[.:]* && $name == */* ]]; then host=${name%%/*} name=${name#*/}; fi
    if [[ $host == registry-1.docker.io && $name != */* ]]; then name=library/$name; fi
    local ask=(curl -sI --max-time 20 -H "Accept: $manifests") url=https://$host/v2/$name/manifests/$tag
    answer=$("${ask[@]}" "$url" | tr -d '\r') || true
    if [[ ${answer,,} =~ www-authenticate:\ bearer\ ([^$'\n']*) ]]; then
        answer=${answer#*[Bb]earer }
        answer=${answer%%$'\n'*}
        [[ $answer =~ realm=\"([^\"]*)\" ]] && token=${BASH_REMATCH[1]}
        [[ $answer =~ service=\"([^\"]*)\" ]] && token+="?service=${BASH_REMATCH[1]}&scope=repository:$name:pull"
        token=$(curl -s --max-time 20 "$token" | sed -nE 's/.*"token" *: *"([^"]*)".*/\1/p') || true
        answer=$("${ask[@]}" -H "Authorization: Bearer $token" "$url" | tr -d '\r') || true
    fi
    if [[ ${answer,,} =~ docker-content-digest:\ (sha256:[0-9a-f]{64}) ]]; then echo "${BASH_REMATCH[1]}"; else echo unknown; fi
}

untagged() { # NAME[:TAG][@DIGEST]
    local name=${1%%@*}
    if [[ ${name##*/} == *:* ]]; then name=${name%:*}; fi
    echo "$name"
}

# Refuse to rebuild an image from another base than before.
require_same_base() { # IMAGE
    local before
    before=$("$container" inspect --labels "$1" 2>/dev/null | sed -n 's/^org\.ftlib\.base\.digest: //p') || true
    if [[ -z $before || $before == unknown || $before == "$digest" ]]; then return; fi
    die "$1 was built from $before, and the base image ($BASE) is ${digest/unknown/of unknown digest} now." \
        "To keep the old base: BASE=$(untagged "$BASE")@$before; to take the new one: --new-base"
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
    local container image new_base=
    check_arguments
    if [[ -z ${BASE:-} ]]; then BASE=$(sed -n 's/^ *BASE=//p' "$root/containers/ftlib.def"); fi
    digest=unknown
    if [[ $BASE == *@sha256:* ]]; then digest=${BASE##*@}; fi
    if [[ ${1:-} == --new-base ]]; then new_base=1; shift; fi
    if [[ ${1:-} == --render ]]; then
        [[ $# == 2 ]] || die "--render needs a file name"
        gather "$root/build/context"
        render "$root/build/context" > "$2"
        return
    fi
    container=$(find_container) || die "neither apptainer nor singularity is in PATH"
    image=${1:-${FTLIB_IMAGE:-${FTLIB_STORE:?set it in jobs/site.env, or name the image}/images/ftlib.sif}}
    digest=$(base_digest "$BASE")
    if [[ -e $image && -z $new_base ]]; then require_same_base "$image"; fi
    if [[ $digest == unknown ]]; then
        echo "build.sh: the registry does not tell the digest of $BASE; to pin it: BASE=NAME@sha256:…" >&2
    elif [[ ${BOOTSTRAP:-docker} == docker && $BASE != *@* ]]; then
        BASE=$(untagged "$BASE")@$digest # what was looked up
    fi
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
