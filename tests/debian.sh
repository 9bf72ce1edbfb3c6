# Read by fresh.sh and cluster/up.sh: Debian 12 root file systems from where this machine itself installs packages.
# shellcheck shell=bash

mirror() { # the machine's own Debian mirror
  # shellcheck disable=SC2016
  apt-get indextargets --no-release-info --format '$(REPO_URI)' 'Created-By: Packages' 'Release: bookworm' | head -n 1 | grep . ||
    die "no Debian 12 mirror among apt's sources"
}

make_root() { # make_root FOLDER PACKAGES...: apt fetches in it as it does here, by its proxies and without dates if so
  local folder=$1 uri
  shift
  uri=$(mirror)
  rm -rf --one-file-system "$folder"
  apt-config dump | grep '^Acquire::' >"$folder.apt"
  mmdebstrap --variant=minbase --aptopt="$folder.apt" --include="$(IFS=,; echo "$*")" bookworm "$folder" "$uri"
  rm "$folder.apt"
}
