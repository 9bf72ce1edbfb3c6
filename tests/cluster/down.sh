#!/usr/bin/env bash
# Ends the daemons that up.sh started, of either version of Slurm, and the jobs; leaves all files.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$here/common.sh"

no_jobs() { [[ -z $(squeue -h) ]]; }

for LIFE in "$STATE" "$STATE/$NEWER"; do
  if alive slurmctld && alive slurmd-n1 && alive slurmd-n2; then
    scancel --full --signal=KILL --state=RUNNING || true # or they would outlive slurmd
    squeue -h -o %A | xargs -r scancel || true
    wait_for 60 "end of the jobs" no_jobs
  fi
  for name in slurmd-n1 slurmd-n2 slurmctld slurmdbd mariadbd munged; do
    alive "$name" || continue
    say "stop $name"
    kill "$(cat "$LIFE/pid/$name")"
    for _ in {1..100}; do
      alive "$name" || break
      sleep 0.2
    done
    if alive "$name"; then die "$name does not stop"; fi
  done
  rm -f "$LIFE"/pid/*
done
for link in /usr/local/bin/* /usr/local/sbin/*; do # the newer version's programs, before those of the packages
  if [[ $(readlink "$link") == "$STATE/$NEWER/root/"* ]]; then rm "$link"; fi
done
say "is down"
