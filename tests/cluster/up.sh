#!/usr/bin/env bash
# Brings up a real Slurm (two nodes on this host, accounting) and a real Apptainer for tests; see README.md.
# SLURM=24.11 in the environment takes Debian 13's Slurm instead. Can be run again at any time: it does only what is missing.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$here/common.sh"
# shellcheck source-path=SCRIPTDIR source=../debian.sh
. "$here/../debian.sh"

PACKAGES=(slurm-wlm slurm-client slurmdbd munge mariadb-server
  squashfs-tools uidmap squashfuse fuse2fs fuse-overlayfs fuse3 patchelf mmdebstrap ca-certificates)
LIBS=/usr/local/lib/apptainer-libs
TEST_USER=ftuser
MEMBER=ftmember # the second user of the group

as_user() { runuser -l "$TEST_USER" -c "$*"; }

install_packages() {
  local policy=/usr/sbin/policy-rc.d states
  states=$(dpkg-query -W -f '${db:Status-Status}\n' "${PACKAGES[@]}" 2>/dev/null) &&
    [[ $(sort -u <<<"$states") == installed ]] && return
  say "install packages"
  if [[ ! -e $policy ]]; then # or the packages would start daemons with the wrong configuration
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
    trap 'rm -f /usr/sbin/policy-rc.d' EXIT
  fi
  export DEBIAN_FRONTEND=noninteractive
  {
    dpkg --configure -a
    apt-get -o DPkg::Lock::Timeout=180 update
    apt-get -o DPkg::Lock::Timeout=180 install -y --no-install-recommends "${PACKAGES[@]}"
  } >"$STATE/log/apt.out" 2>&1 </dev/null || die "apt-get: see $STATE/log/apt.out"
}

unpack_slurm() { # 24.11 is Debian 13's; its programs run with that Debian's C library
  local root=$LIFE/root libraries program
  [[ $LIFE != "$STATE" && ! -e $LIFE/root.done ]] || return 0
  say "unpack Slurm 24.11"
  rm -rf --one-file-system "$root"
  apt-config dump | grep '^Acquire::' >"$LIFE/apt"
  mmdebstrap --variant=extract --aptopt="$LIFE/apt" --include=slurm-wlm,slurm-client,slurmdbd,slurm-wlm-mysql-plugin \
    trixie "$root" "$(mirror)" >"$LIFE/log/slurm.out" 2>&1 </dev/null || die "Slurm 24.11: see $LIFE/log/slurm.out"
  libraries=$(echo "$root"/usr/lib/*-linux-gnu)
  for program in "$root"/usr/bin/s* "$root"/usr/sbin/slurm*; do
    [[ $(patchelf --print-needed "$program" 2>/dev/null) == *libslurmfull.so* ]] || continue
    patchelf --set-interpreter "$(echo "$libraries"/ld-linux-*)" --force-rpath \
      --set-rpath "$libraries/slurm-wlm:$libraries" "$program"
  done
  touch "$LIFE/root.done"
}

link_slurm() { # its programs come before those of 22.05, until down.sh
  local folder program
  [[ $LIFE != "$STATE" ]] || return 0
  for folder in bin sbin; do
    for program in "$LIFE/root/usr/$folder"/s*; do
      [[ $(patchelf --print-rpath "$program" 2>/dev/null) == "$LIFE"/* ]] || continue
      ln -sf "$program" "/usr/local/$folder/$(basename "$program" -wlm)"
    done
  done
  hash -r
  [[ $(sinfo --version) == *" 24.11."* ]] || die "Slurm 24.11 does not start"
}

install_apptainer() { # Debian has it in unstable only, built for a newer C library than Debian 12's
  apptainer --version >/dev/null 2>&1 && [[ -e /usr/bin/singularity ]] && return
  say "install Apptainer"
  local tmp=$STATE/apptainer uri program options
  uri=$(mirror)
  rm -rf "$tmp"
  mkdir -p "$tmp"/{lists,cache/archives}/partial "$LIBS"
  chown -R _apt "$tmp"
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $uri unstable main" >"$tmp/sources"
  options=(-o Dir::Etc::sourcelist="$tmp/sources" -o Dir::Etc::sourceparts=-
    -o Dir::State::lists="$tmp/lists" -o Dir::Cache="$tmp/cache" -o Acquire::Languages=none)
  (
    cd "$tmp"
    apt-get "${options[@]}" update && apt-get "${options[@]}" download apptainer libc6 libseccomp2 libsqlite3-0
  ) >"$STATE/log/apptainer.out" 2>&1 || die "download of Apptainer: see $STATE/log/apptainer.out"
  dpkg -x "$tmp"/apptainer_*.deb "$tmp/root"
  for library in "$tmp"/lib*.deb; do dpkg -x "$library" "$tmp/libs"; done
  cp -a "$tmp"/libs/usr/lib/*-linux-gnu/*.so* "$LIBS/"
  for program in "$tmp/root/usr/bin/apptainer" "$tmp"/root/usr/lib/*/apptainer/bin/starter; do
    patchelf --set-interpreter "$(echo "$LIBS"/ld-linux-*)" --force-rpath --set-rpath "$LIBS" "$program"
  done
  cp -a "$tmp/root/usr" "$tmp/root/etc" "$tmp/root/var" / # to the usual places: it finds its files from where it lies
  ln -sf apptainer /usr/bin/singularity
  rm -rf "$tmp"
  apptainer --version >/dev/null || die "Apptainer does not start"
}

make_users() {
  local name
  for name in "$TEST_USER" "$MEMBER"; do
    id "$name" >/dev/null 2>&1 || { say "make user $name"; useradd -m -s /bin/bash "$name"; }
  done
  grep -q "^$TEST_USER:" /etc/subuid || usermod --add-subuids 1000000-1065535 "$TEST_USER"
  grep -q "^$TEST_USER:" /etc/subgid || usermod --add-subgids 1000000-1065535 "$TEST_USER"
  id -nG "$MEMBER" | grep -qw "$TEST_USER" || usermod -aG "$TEST_USER" "$MEMBER"
}

make_devices() {
  local i
  [[ -e /dev/fuse ]] || mknod /dev/fuse c 10 229
  chmod 0666 /dev/fuse
  for i in 0 1; do # jobs of 24.11 may open only theirs, which cannot be /dev/null: the numbers are those of absent GPUs
    [[ -c $LIFE/dev/gpu$i ]] || if [[ $LIFE == "$STATE" ]]; then
      mknod -m 0666 "$LIFE/dev/gpu$i" c 1 3
    else
      mknod -m 0666 "$LIFE/dev/gpu$i" c 195 "$((240 + i))"
    fi
  done
}

make_image() {
  [[ -s $STATE/base.sif ]] && return
  say "build base.sif"
  local root=$STATE/base-root
  rm -f "$STATE/base.sif.new"
  {
    make_root "$root" python3 python3-venv python3-pip ca-certificates &&
      apptainer build "$STATE/base.sif.new" "$root"
  } >"$STATE/log/image.out" 2>&1 </dev/null || die "base image: see $STATE/log/image.out"
  mv "$STATE/base.sif.new" "$STATE/base.sif"
  rm -rf "$root"
}

has_cgroup_v2() { grep -qw memory /sys/fs/cgroup/cgroup.controllers 2>/dev/null; }

adapt_to_newer() { # adapt_to_newer FOLDER: the configuration of 22.05 to 24.11
  local folder=$1 plugins systemd=no
  plugins=$(echo "$LIFE"/root/usr/lib/*-linux-gnu/slurm-wlm)
  echo "PluginDir=$plugins" | tee -a "$folder/slurm.conf" >>"$folder/slurmdbd.conf"
  echo "AccountingStorageEnforce=limits,qos" >>"$folder/slurm.conf"
  sed -i -e '/^CgroupAutomount=/d' -e 's/^ConstrainDevices=.*/ConstrainDevices=yes/' -e '/^# /s/, and the GPUs.*/./' \
    "$folder/cgroup.conf"
  if has_cgroup_v2; then
    [[ -d /run/systemd/system ]] || systemd=yes
    sed -i -e 's|^CgroupPlugin=.*|CgroupPlugin=cgroup/v2|' "$folder/cgroup.conf"
    echo "IgnoreSystemd=$systemd" >>"$folder/cgroup.conf"
  fi
}

configure() {
  local new=$LIFE/config file old
  old=$(sed -n 's|^StateSaveLocation=\(.*\)/slurmctld$|\1|p' /etc/slurm/slurm.conf 2>/dev/null || true)
  [[ -n $old || ! -s /etc/slurm/slurm.conf ]] || die "/etc/slurm/slurm.conf belongs to another cluster"
  for file in n1 n2; do # for `scontrol show hostnames` and srun
    grep -qw "$file" /etc/hosts || echo "127.0.0.1 $file" >>/etc/hosts
  done
  rm -rf "$new"
  mkdir -p "$new"
  for file in "$here"/*.conf.in; do
    sed -e "s|@STATE@|$LIFE|g" -e "s|@HOST@|$(hostname -s)|g" "$file" >"$new/$(basename "$file" .in)"
  done
  [[ $LIFE == "$STATE" ]] || adapt_to_newer "$new"
  chmod 0600 "$new/slurmdbd.conf" # slurmdbd insists
  for file in "$new"/*; do
    cmp -s "$file" "/etc/slurm/${file##*/}" && continue
    say "new configuration"
    [[ -z $old ]] || FTLIB_CLUSTER_STATE=${old%/"$NEWER"} "$here/down.sh"
    cp -p "$new"/* /etc/slurm/
    return
  done
}

start() { # start NAME COMMAND...: detached, so that it neither holds the caller's pipes and locks nor dies with it
  local name=$1 fd
  shift
  alive "$name" && return
  say "start $name"
  rm -f "$LIFE/verified"
  (
    for fd in /proc/"$BASHPID"/fd/*; do
      fd=${fd##*/}
      if ((fd > 2)); then eval "exec $fd>&-"; fi
    done
    exec setsid "$@" </dev/null >>"$LIFE/log/$name.out" 2>&1
  ) &
  echo $! >"$LIFE/pid/$name"
}

start_database() {
  if [[ ! -d $LIFE/mysql ]]; then
    say "make the accounting database"
    rm -rf "$LIFE/mysql.new"
    mariadb-install-db --user=mysql --datadir="$LIFE/mysql.new" --skip-test-db >"$LIFE/log/mysql.out" 2>&1
    mv "$LIFE/mysql.new" "$LIFE/mysql"
  fi
  install -d -o mysql -g mysql /run/mysqld
  start mariadbd mariadbd --no-defaults --user=mysql --datadir="$LIFE/mysql" --socket=/run/mysqld/mysqld.sock \
    --skip-networking --innodb-flush-log-at-trx-commit=0 --innodb-lock-wait-timeout=900
  wait_for 30 "answer from mariadb" mariadb-admin ping
}

start_slurm() {
  local node user cold='' stepd=()
  [[ $LIFE == "$STATE" ]] || stepd=(-d /usr/local/sbin/slurmstepd) # not the one of 22.05 in the place that Debian gives it
  install -d -o munge -g munge /run/munge
  start munged setpriv --reuid=munge --regid=munge --init-groups munged --foreground
  wait_for 20 "answer from munge" bash -c 'munge -n | unmunge'
  start_database
  start slurmdbd slurmdbd -D
  wait_for 60 "answer from slurmdbd" sacctmgr -n list cluster
  for user in "$TEST_USER" "$MEMBER" nobody; do
    [[ -z $(sacctmgr -n list assoc user="$user" cluster=ftlib) ]] || continue
    say "add $user to the accounting"
    sacctmgr -i add cluster ftlib >/dev/null || true # fails when it is there
    sacctmgr -i add account tests >/dev/null || true
    sacctmgr -i add user "$user" account=tests >/dev/null
  done
  alive slurmctld || cold=yes
  start slurmctld slurmctld -D
  for node in n1 n2; do start "slurmd-$node" slurmd -D -N "$node" "${stepd[@]}"; done
  wait_for 60 "answer from slurmctld" bash -c 'scontrol ping | grep -q "is UP"'
  wait_for 60 "nodes" nodes_ready
  [[ -z $cold ]] || scancel --user="$TEST_USER" # jobs of an earlier life would come back
}

nodes_ready() {
  local states
  states=$(sinfo -h -N -p low -o %T | sort -u)
  if grep -qE 'down|drain|inval' <<<"$states"; then scontrol update nodename=n[1-2] state=resume || true; fi
  ! grep -qvxE 'idle|mixed|allocated|completing' <<<"$states"
}

verify() {
  sinfo -h -N -p low -o 'cluster: node %N %T %c CPUs %m MB %G'
  [[ -e $LIFE/verified ]] && return
  local node out job
  for node in n1 n2; do
    out=$(as_user "srun --immediate=90 -t 2 -p low -w $node --gres=gpu:1 bash -c 'echo \$SLURM_JOB_ID; apptainer -q exec $STATE/base.sif python3 --version'") ||
      die "no job with Apptainer runs on $node: $out"
    job=${out%%$'\n'*}
    say "job $job on $node: ${out#*$'\n'}"
    wait_for 30 "job $job in sacct" bash -c "sacct -X -n -j $job -o state | grep -q COMPLETED"
  done
  as_user "apptainer -q exec $STATE/base.sif python3 -c pass" || die "Apptainer does not run outside of jobs"
  touch "$LIFE/verified"
}

[[ -d /sys/fs/cgroup/memory ]] || { [[ $LIFE != "$STATE" ]] && has_cgroup_v2; } ||
  die "needs cgroups with the memory controller, of version 1 for Slurm 22.05"
mkdir -p "$STATE/log" "$LIFE"/{log,run,pid,dev,slurmctld,spool/n1,spool/n2}
chmod 0755 "$STATE" "$LIFE"
exec 9>"$STATE/lock"
flock -w 900 9 || die "another up.sh has been running for 15 minutes"
install_packages
make_users
make_devices
unpack_slurm
configure
link_slurm
install_apptainer
start_slurm
make_image
verify
say "$(sinfo --version) is up after $SECONDS s"
