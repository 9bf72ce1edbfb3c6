# Read by up.sh and down.sh.
# shellcheck shell=bash
set -euo pipefail
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8
unset SLURM_CONF
STATE=${FTLIB_CLUSTER_STATE:-/var/lib/ftlib-cluster}
NEWER=slurm-24.11
case ${SLURM:-22.05} in
  22.05) LIFE=$STATE ;;        # what belongs to one version: its spool, logs, pid files, database
  24.11) LIFE=$STATE/$NEWER ;; # its programs, too
  *) echo "cluster: FAILED: SLURM is 22.05 or 24.11" >&2; exit 1 ;;
esac

say() { echo "cluster: $*"; }
die() { say "FAILED: $*" >&2; exit 1; }

alive() { # alive NAME: does the process in NAME's pid file run, and is it really that daemon?
  local pid
  pid=$(cat "$LIFE/pid/$1" 2>/dev/null) && [[ -e /proc/$pid/exe && $(cat "/proc/$pid/comm") == "${1%-n?}" ]] # no exe: a zombie
}

wait_for() { # wait_for SECONDS WHAT COMMAND...
  local end=$((SECONDS + $1)) what=$2
  shift 2
  until "$@" >/dev/null 2>&1; do
    ((SECONDS < end)) || die "no $what in time; see $LIFE/log"
    sleep 0.3
  done
}

((EUID == 0)) || die "must run as root"
