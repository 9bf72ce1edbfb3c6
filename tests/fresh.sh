#!/usr/bin/env bash
# fresh.sh MARKS [RAN]: a newcomer's machine, called by `make fresh`. A minimal Debian 12 with what the README names; an
# ordinary user in it, with a closed umask, in the C locale, in a path with a space and without a home to write in, clones
# the checkout, runs `make demo` and of `make test` what MARKS choose. RAN: a file for the names of the tests that ran.
# Of this machine it gets pip's configuration with the folders that this names, proxies and name servers.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
STATE=${FTLIB_FRESH_STATE:-/var/lib/ftlib-fresh}
ROOT=$STATE/root
PLACE="/srv/a newcomer"
PACKAGES=(python3 python3-venv git make ca-certificates)

say() { echo "fresh: $*"; }
die() { say "FAILED: $*" >&2; exit 1; }
. "$here/debian.sh"

host_settings() { # pip.conf of the root, and the paths that it names, one a line
  python3 -m venv "$STATE/pip"
  "$STATE/pip/bin/pip" config list | python3 -c '
import ast, configparser, pathlib, sys
settings, paths, parser = {}, {}, configparser.RawConfigParser()
for line in sys.stdin:
    name, _, value = line.partition("=")
    section, _, option = name.replace(":env:", "global").rpartition(".")
    value = ast.literal_eval(value)
    settings.setdefault(section, {})[option] = str(value)
    for word in str(value).split():
        path = pathlib.Path(word.removeprefix("file://"))
        if path.is_absolute() and path.exists() and len(path.parts) > 2:
            index = word.startswith("file://") and path.is_dir()  # its files lie beside it
            paths[path.parent if index else path] = True
parser.read_dict(settings)
with open(sys.argv[1], "w") as file:
    parser.write(file)
print(*paths, sep="\n")' "$ROOT/etc/pip.conf"
}

bind() { # bind PATH [OPTIONS]: the machine's, at the same place
  if [[ -d $1 ]]; then mkdir -p "$ROOT$1"; else mkdir -p "$(dirname "$ROOT$1")" && touch "$ROOT$1"; fi
  mount --bind "$1" "$ROOT$1"
  [[ -z ${2:-} ]] || mount -o "remount,bind,$2" "$ROOT$1"
}

furnish() { # what a machine that has booted has, the user, and a repository to clone from
  local path
  mount -t proc proc "$ROOT/proc"
  bind /sys ro
  for path in null zero full random urandom tty; do bind "/dev/$path"; done
  for path in pts shm; do mkdir -p "$ROOT/dev/$path"; done
  mount -t devpts -o newinstance,ptmxmode=0666 devpts "$ROOT/dev/pts"
  ln -sf pts/ptmx "$ROOT/dev/ptmx"
  ln -sfn /proc/self/fd "$ROOT/dev/fd"
  mount -t tmpfs -o mode=1777 tmpfs "$ROOT/dev/shm"
  for path in hosts resolv.conf; do [[ ! -e /etc/$path ]] || cp -L "/etc/$path" "$ROOT/etc/$path"; done
  host_settings >"$STATE/paths"
  while read -r path; do [[ -z $path ]] || bind "$path" ro; done <"$STATE/paths"
  chmod 0644 "$ROOT/etc/pip.conf"
  chroot "$ROOT" useradd --no-create-home newcomer
  install -d -m 0755 "$ROOT/home/newcomer" # root's
  git clone -q --bare "$here/.." "$ROOT/srv/ftlib.git"
  install -d -m 0700 "$ROOT$PLACE"
  : >"$ROOT/srv/ran"
  chroot "$ROOT" chown -R newcomer: /srv
}

as_newcomer() { # as_newcomer SCRIPT ARGUMENTS...
  local script=$1 name settings=()
  shift
  for name in http_proxy https_proxy no_proxy HTTP_PROXY HTTPS_PROXY NO_PROXY; do
    [[ -z ${!name:-} ]] || settings+=("$name=${!name}")
  done
  chroot --userspec=newcomer:newcomer --groups= "$ROOT" /usr/bin/env -i PATH=/usr/local/bin:/usr/bin:/bin LANG=C \
    HOME=/home/newcomer "${settings[@]}" bash -c "umask 077; set -eo pipefail; cd '$PLACE'; $script" newcomer "$@" </dev/null
}

main() {
  local start=$SECONDS root demo
  rm -rf --one-file-system "$STATE"
  mkdir -p "$STATE"
  [[ -z $(git -C "$here" status --porcelain --untracked-files=no) ]] || say "changes that are not committed are not in the clone"
  if ! command -v mmdebstrap >/dev/null; then
    say "install mmdebstrap"
    { apt-get -q update && DEBIAN_FRONTEND=noninteractive apt-get -qy install --no-install-recommends mmdebstrap; } >"$STATE/apt.log" 2>&1 ||
      die "apt-get: see $STATE/apt.log"
  fi
  say "make a Debian 12 with ${PACKAGES[*]}"
  make_root "$ROOT" "${PACKAGES[@]}" >"$STATE/root.log" 2>&1 </dev/null || { tail -n 20 "$STATE/root.log" >&2; die "mmdebstrap"; }
  furnish
  root=$((SECONDS - start))
  as_newcomer "git clone -q /srv/ftlib.git ftlib && cd ftlib && make demo 2>&1 | tee demo.log" || die "make demo"
  demo=$((SECONDS - start - root))
  # shellcheck disable=SC2016
  as_newcomer 'cd ftlib && FTLIB_DEMO=$PWD make test MARKS="$1" RAN=/srv/ran' "$1" || die "make test"
  [[ -z ${2:-} ]] || cp "$ROOT/srv/ran" "$2"
  say "green: $(wc -l <"$ROOT/srv/ran") tests; $root s for the root, $demo s for make demo, $((SECONDS - start - root - demo)) s for make test"
}

((EUID == 0)) || die "needs root, for chroot"
if [[ ${1:-} == inside ]]; then
  main "${@:2}"
else # in namespaces of their own: mounts and processes end with this one
  unshare --mount --pid --fork --kill-child "$0" inside "$@"
  rm -rf --one-file-system "$STATE"
fi
