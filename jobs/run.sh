#!/usr/bin/env bash
# The one place that knows Slurm, the container, signals and requeueing.
#
# By hand:          jobs/run.sh ftlib COMMAND …     enters the container and runs the command
# In a batch job:   source jobs/run.sh; run_job COMMAND+COMMAND … ARGUMENTS…
# By ftlib submit:  source jobs/run.sh; run_submitted COMMAND+COMMAND … python3 FILE -u -m submitit.core._submit FOLDER
#
# A job answers: 0 done · 2 the user's mistake · 75 saved, go on later · 76 another task is gone · 137 killed · anything
# else a failure.
# Time limit near (USR1) → the command saves and says 75 → this script requeues. Preempted or cancelled (TERM) → the
# command saves and says 75; a cancelled job stays cancelled, a preempted one is requeued: by Slurm, or by this script,
# since Slurm leaves alone what ends within its partition's GraceTime. Killed outright → requeued only if a checkpoint
# came after the last start.

jobs=${FTLIB_JOBS:-$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)}
root=$(dirname "$jobs")
source "$jobs/lib.sh"

fail() { echo "ftlib: $*" >&2; exit 2; }

# Site settings, image, and what the container sees. Sets the array `container`.
enter_container() {
    local program name
    umask g-w,o-w # nothing that this script makes can be written to by others
    read_site_env "$jobs/site.env" || exit 2
    if [[ -n ${FTLIB_HOOK:-} ]]; then
        require_trusted FTLIB_HOOK "$FTLIB_HOOK" "${FTLIB_STORE:-/}" || exit 2
        source "$FTLIB_HOOK" || fail "FTLIB_HOOK=$FTLIB_HOOK failed"
    fi
    if [[ -z ${FTLIB_STORE:-} ]]; then
        if [[ -n ${SLURM_JOB_ID:-} ]]; then
            fail "FTLIB_STORE is not set, and inside a Slurm job there is no safe default. Set it in jobs/site.env."
        fi
        FTLIB_STORE=$PWD/store
    fi
    FTLIB_RUNS=${FTLIB_RUNS:-$FTLIB_STORE/runs/$(id -un)}
    FTLIB_IMAGE=${FTLIB_IMAGE:-$FTLIB_STORE/images/ftlib.sif}
    for name in FTLIB_STORE FTLIB_RUNS FTLIB_IMAGE; do
        [[ ${!name} == /* ]] || fail "$name=${!name} must be an absolute path"
    done
    for name in FTLIB_STORE FTLIB_RUNS FTLIB_IMAGE FTLIB_BINDS FTLIB_TMP PWD root; do
        [[ ${!name:-} != *[[:cntrl:]]* ]] || fail "$name: a path with a control character cannot be handed to the container"
    done
    # The store may be read-only, but not where runs go.
    make_store $([[ $FTLIB_RUNS != "$FTLIB_STORE"/runs/* ]] || echo runs) && make_runs ||
        fail "FTLIB_STORE=$FTLIB_STORE or FTLIB_RUNS=$FTLIB_RUNS cannot be written to"
    program=$(find_container) || fail "neither apptainer nor singularity is in PATH; load it in FTLIB_HOOK"
    [[ -r $FTLIB_IMAGE ]] || fail "image $FTLIB_IMAGE is not there. Build it: sbatch jobs/build.sbatch"
    require_trusted "the image" "$FTLIB_IMAGE" || exit 2
    require_pinned_image
    "$program" inspect --labels "$FTLIB_IMAGE" 2>/dev/null | grep -q '^org\.ftlib\.revision' ||
        fail "$FTLIB_IMAGE is no image of ftlib. Build one: sbatch jobs/build.sbatch"

    job_tmp=$(mktemp -d "${FTLIB_TMP:-${SLURM_TMPDIR:-/tmp}}/ftlib.XXXXXX") || fail "no local temporary folder"
    trap 'rm -rf "$job_tmp"' EXIT
    mkdir "$job_tmp/tmp" "$job_tmp/notes"
    # Compile caches must never be shared between nodes or inherited: between two starts of a run, training itself keeps
    # what is in them (ftlib/training/compiling.py). Jobs never reach the hub.
    to_container FTLIB_STORE "$FTLIB_STORE"
    to_container FTLIB_RUNS "$FTLIB_RUNS"
    # Names of users and groups are not known inside.
    if [[ -n ${FTLIB_GROUP:-} ]]; then to_container FTLIB_GROUP "$(store_group)"; fi
    if [[ -n ${FTLIB_OWNER:-} ]]; then to_container FTLIB_OWNER "$(user_number "$FTLIB_OWNER")"; fi
    to_container FTLIB_JOB_TMP "$job_tmp/notes"
    to_container TMPDIR "$job_tmp/tmp"
    to_container TRITON_CACHE_DIR "$job_tmp/tmp/triton"
    to_container TORCHINDUCTOR_CACHE_DIR "$job_tmp/tmp/inductor"
    to_container HF_HOME "$FTLIB_STORE/hf"
    to_container HF_TOKEN_PATH "${HF_TOKEN_PATH:-${HF_HOME:-$HOME/.cache/huggingface}/token}" # private, never in the store
    to_container PYTHONNOUSERSITE 1
    to_container PYTHONPATH "$root" # this checkout's code over the image's
    to_container PYTHONUNBUFFERED 1
    if [[ -n ${SLURM_JOB_ID:-} ]]; then to_container HF_HUB_OFFLINE 1; fi
    container=("$program" --silent exec --nv)
    while IFS= read -r name; do
        [[ $name != *[,:]* ]] || fail "$name: a path with a comma or a colon cannot be bound into a container"
        container+=(--bind "$name")
    done < <(printf '%s\n' "$FTLIB_STORE" "$FTLIB_RUNS" "$root" "$job_tmp"; tr : '\n' <<< "$PWD${FTLIB_BINDS:+:$FTLIB_BINDS}")
    container+=(--pwd "$PWD" "$FTLIB_IMAGE")
}

# The user's own folder: the group may read it with FTLIB_SHARE_RUNS=1, if the store is shared.
make_runs() {
    local group mode=700
    group=$(store_group) || return
    if [[ -n $group && ${FTLIB_SHARE_RUNS:-0} != 0 ]]; then mode=2750; fi
    make_folder "$FTLIB_RUNS" "$mode" "$group" && make_folder "$FTLIB_RUNS/.jobs" 700
}

# The image's digest, if FTLIB_IMAGE_SHA256 names one. Read once: <runs>/.jobs/image remembers the file that had it.
require_pinned_image() {
    local known=$FTLIB_RUNS/.jobs/image facts
    if [[ -z ${FTLIB_IMAGE_SHA256:-} ]]; then return 0; fi
    facts="$FTLIB_IMAGE_SHA256 $(stat -L -c '%d %i %s %y %z' "$FTLIB_IMAGE")"
    if [[ -O $known && $(< "$known") == "$facts" ]]; then return 0; fi
    [[ $(sha256sum < "$FTLIB_IMAGE") == "$FTLIB_IMAGE_SHA256 "* ]] ||
        fail "$FTLIB_IMAGE is not the image that FTLIB_IMAGE_SHA256 names"
    echo "$facts" > "$known"
}

# Both names, since the image's own environment would win over the host's.
to_container() { export "APPTAINERENV_$1=$2" "SINGULARITYENV_$1=$2"; }

# The code and the config that this job first started with; a requeued job goes on with them. How code is pinned:
# ftlib/runs/pinning.py.
pin() { # CONFIG FOLDER…: more folders of the clone than ftlib/ and jobs/
    local code new
    pinned=$FTLIB_RUNS/.jobs/$SLURM_JOB_ID
    if [[ ${SLURM_RESTART_COUNT:-0} == 0 || ! -e $pinned/code ]]; then
        code=$("${container[@]}" python3 "$root/ftlib/run_module.py" -m ftlib.runs.pinning "$root" "${@:2}") || exit
        rm -rf "$pinned" "$pinned".tmp-*
        new=$(mktemp -d "$pinned.tmp-XXXXXX") && ln -s "$code" "$new/code" ||
            fail "$FTLIB_RUNS: cannot be written to (storage full?)"
        if [[ -f ${1:-} ]]; then cp "$1" "$new/config.yaml" || fail "$1 cannot be copied to $FTLIB_RUNS"; fi
        mv -T "$new" "$pinned"
    fi
    require_trusted "the code of this job" "$pinned/code" || exit 2
    to_container PYTHONPATH "$pinned/code"
}

requeue() {
    local id=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID} answer
    id=${id:-$SLURM_JOB_ID}
    # What was not saved is done again: without progress that must end some time.
    if [[ -e $job_tmp/notes/checkpointed ]]; then rm -f "$pinned/idle"; else echo >> "$pinned/idle"; fi
    if [[ -e $pinned/idle && $(wc -l < "$pinned/idle") -gt 10 ]]; then
        echo "ftlib: no progress in the last 10 starts; ask for more time, or save more often (checkpoint.steps)" >&2
        exit 75
    fi
    if (( ${SLURM_RESTART_COUNT:-0} >= ${FTLIB_MAX_REQUEUES:-100} )); then
        echo "ftlib: requeued ${SLURM_RESTART_COUNT} times already (FTLIB_MAX_REQUEUES); submit it again to go on" >&2
        exit 75
    fi
    echo "ftlib: $1; requeueing job $id" >&2
    if answer=$(scontrol requeue "$id" 2>&1); then
        sleep 300 & # Slurm ends this script; in the background, so that its TERM is heard at once
        wait $!
        exit 75
    fi
    echo "ftlib: Slurm does not requeue this job ($answer). Nothing is lost: submit it again and it goes on." >&2
    exit 75
}

# Add a line to the history of the run that was at work.
note() {
    local run job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
    run=$(cat "$job_tmp/notes/run" 2>/dev/null) || return 0
    if [[ -n $(tail -c 1 "$run/history.jsonl" 2>/dev/null) ]]; then echo >> "$run/history.jsonl"; fi # after a torn line
    printf '{"event": "%s", "time": %s, "host": "%s", "job": "%s", "command": "%s", "exit": %d, "reason": "%s"}\n' \
        "$1" "$(date +%s)" "${SLURMD_NODENAME:-$(hostname)}" "${job:-$SLURM_JOB_ID}" "$command" "$2" "$3" >> "$run/history.jsonl"
}

# Wait for srun; pass a USR1 on once the command's handlers stand (before, it would kill srun or Python).
wait_for() {
    local passed=0
    while :; do
        if [[ $usr1 == 1 && $passed == 0 && -e $job_tmp/notes/ready ]]; then
            kill -USR1 "$1" 2>/dev/null
            passed=1
        fi
        if [[ $usr1 == 1 && $passed == 0 ]]; then
            if kill -0 "$1" 2>/dev/null; then sleep 0.2; continue; fi
        fi
        wait "$1"
        code=$?
        if (( code > 128 )) && kill -0 "$1" 2>/dev/null; then continue; fi # a trap woke us, not the end
        # srun ended in the very moment of a trap: its own code is lost, but the command's note is not
        if (( code == 138 || code == 143 )) && [[ -e $job_tmp/notes/signal ]]; then code=75; fi
        return
    done
}

# Did the kernel kill this step for its memory? srun's exit code is 1 or 137 then; only its words tell.
out_of_memory() { grep -qE 'oom[-_ ]kill|Out Of Memory' "$job_tmp/stderr" 2>/dev/null; }

# bitsandbytes ends a process that finds no memory by itself; only its words tell.
out_of_memory_in_bitsandbytes() { grep -qE '^Error out of memory at line [0-9]+ in file ' "$job_tmp/stderr" 2>/dev/null; }

# Of several tasks one that waited for the others until NCCL's watchdog ended it, with signal 6.
waited_in_vain() {
    local said='.*Rank ([0-9]+)\].*Watchdog caught collective operation timeout: WorkNCCL\(.*Timeout\(ms\)=([0-9]+)\).*'
    sed -nE "s/$said/rank \1 waited \2 ms in vain for another (NCCL)/p" "$job_tmp/stderr" 2>/dev/null | head -n 1
}

# What Slurm gave this job, in words.
memory_given() {
    if [[ ${SLURM_MEM_PER_NODE:-0} != 0 ]]; then echo "it has $SLURM_MEM_PER_NODE MiB a node, /dev/shm and tmpfs included"; return; fi
    if [[ ${SLURM_MEM_PER_CPU:-0} != 0 ]]; then echo "it has $SLURM_MEM_PER_CPU MiB a CPU, /dev/shm and tmpfs included"; return; fi
    echo "/dev/shm and tmpfs count"
}

# Of several tasks the one whose end came first, if it was killed: "n2: task 3", from srun's words. Those that saw another
# one go (76), or were told to save and end (75), may be faster than the word of its end.
first_killed() {
    local first
    (( ${SLURM_NTASKS:-1} > 1 )) || return 0
    first=$(sed -nE 's/^srun: error: (.+: tasks? [0-9,-]+: .+)/\1/p' "$job_tmp/stderr" 2>/dev/null |
        grep -vE ': Exited with exit code 7[56]$' | head -n 1)
    if [[ $first != *": Exited with "* ]]; then echo "${first%: Killed}"; fi
}

# Is a partition of higher priority taking this job's place? (A cancelled job is no longer RUNNING.)
being_preempted() {
    local shown
    shown=$(timeout 30 scontrol show job "$SLURM_JOB_ID" 2>/dev/null) || return 1
    [[ $shown == *JobState=RUNNING* && $shown == *" PreemptTime="* && $shown != *" PreemptTime=None"* ]]
}

run_step() { # COMMAND LINE…: one ftlib command and what runs it in the container; returns only if it is done
    local command=$1 code killed waited copy tasks=()
    shift
    rm -f "$job_tmp"/notes/* "$job_tmp"/stderr*
    # A task for each GPU trains, evaluates and checks several GPUs; everything else is one process's work.
    if [[ $command != train && $command != evaluate && $command != several ]]; then tasks=(--nodes=1 --ntasks=1 --ntasks-per-node=1); fi
    # What srun says is copied into a file, from which the reason of a failure is read. The copy outlives every signal, and
    # is complete when it has ended.
    mkfifo "$job_tmp/stderr.pipe" || fail "$job_tmp cannot be written to"
    (trap '' TERM INT USR1 HUP; exec tee "$job_tmp/stderr" < "$job_tmp/stderr.pipe" >&2) &
    copy=$!
    # SIGUSR1 is ignored until Python's own handler stands: from the first moment a signal must not kill it.
    srun "${tasks[@]}" --kill-on-bad-exit=1 --wait=60 --job-name="$command" bash -c 'trap "" USR1; exec "$@"' ftlib \
        "${container[@]}" "$@" 2> "$job_tmp/stderr.pipe" &
    wait_for $!
    while kill -0 "$copy" 2>/dev/null; do wait "$copy"; done # a trap interrupts `wait`
    # When one task ends badly Slurm ends the others; what they then say is not the reason.
    killed=$(first_killed)
    if [[ -z $killed && -e $job_tmp/notes/failed ]]; then code=$(< "$job_tmp/notes/failed"); fi
    case $code in
        0) return ;;
        2) exit 2 ;;
        75)
            if [[ $usr1 == 1 || $(cat "$job_tmp/notes/signal" 2>/dev/null) == SIGUSR1 ]]; then requeue "saved before the time limit"; fi
            if being_preempted; then requeue "saved before a preemption"; fi
            echo "ftlib: saved and ended" >&2
            exit 75
            ;;
    esac
    if [[ $term == 1 ]]; then exit "$code"; fi # cancelled before its handlers stood
    if being_preempted; then requeue "preempted before its start was over"; fi
    if (( code == 138 )); then requeue "USR1 came before the first handler stood"; fi
    if out_of_memory_in_bitsandbytes; then
        note failed "$code" "out of memory in bitsandbytes"
        echo "ftlib: $command: bitsandbytes found no memory, on the GPU or for what it pages out to the host. Set batch.auto: true," \
            "or a smaller training.per_device_train_batch_size (evaluation.batch_size), or ask for a larger GPU or more memory (job.mem)" >&2
        exit "$code"
    fi
    if out_of_memory; then
        note killed "$code" "out of memory"
        echo "ftlib: $command ran out of the job's memory ($(memory_given)); ask for more: sbatch --mem=…" >&2
        exit "$code"
    fi
    if (( code > 128 )); then
        waited=$(waited_in_vain)
        note killed "$code" "${waited:-${killed:-signal $((code - 128))}}"
        if [[ -n $waited ]]; then
            echo "ftlib: $waited: it hung or died, as its own output may tell; training.ddp_timeout is how long the others wait" >&2
        elif [[ -n $killed ]]; then
            echo "ftlib: $killed: killed; if that was for the job's memory ($(memory_given)), ask for more: sbatch --mem=…" >&2
        fi
        if [[ -e $job_tmp/notes/checkpointed ]]; then requeue "$command was killed after a checkpoint"; fi
        echo "ftlib: $command was killed (signal $((code - 128))) before its first checkpoint of this start" >&2
    fi
    exit "$code"
}

# Ranks meet at the first node. The container binds the job's temporary folder, so every node needs one; what is noted in
# those of other nodes (how a rank there failed) this script does not see: it then goes by what srun answers.
spread_over_nodes() {
    local each=(srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1) first
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST") && [[ -n $first ]] || fail "scontrol does not name this job's nodes"
    to_container MASTER_ADDR "${first%%$'\n'*}"
    # Its name is known by now: where somebody else has made it first, the job ends.
    "${each[@]}" bash -c 'mkdir -m 700 "$1" 2>/dev/null || [[ -O $1 && ! -L $1 ]] && mkdir -p "$1/tmp" "$1/notes"' \
        ftlib "$job_tmp" || fail "$job_tmp cannot be made on every node"
    trap 'timeout 30 '"${each[*]}"' rm -rf "$job_tmp"; rm -rf "$job_tmp"' EXIT
}

enter_job() {
    export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} SLURM_EXPORT_ENV=ALL
    enter_container
    to_container PYTHONSAFEPATH 1 # Python 3.11 and later: what libraries start finds no modules in the working folder
    if (( ${SLURM_JOB_NUM_NODES:-1} > 1 )); then spread_over_nodes; fi
    if [[ -f /proc/$$/fd/2 ]]; then to_container FTLIB_LOG "$(readlink "/proc/$$/fd/2")"; fi # for `ftlib logs`
}

run_job() { # COMMAND+COMMAND… CONFIG|RUN ARGUMENTS…
    [[ $# -gt 0 ]] || fail "usage: sbatch jobs/ftlib.sbatch COMMAND …"
    local commands=$1 command
    shift
    cd "$root" || exit 2
    enter_job
    pin "${1:-}"
    if [[ -f $pinned/config.yaml ]]; then set -- "$pinned/config.yaml" "${@:2}"; fi
    for command in ${commands//+/ }; do
        run_step "$command" ftlib "$command" "$@"
    done
    rm -rf "$pinned"
}

# COMMAND+COMMAND… LINE…: the line is submitit's own; the pickled function finds the command's arguments. The code lies
# in a snapshot already, the config in the run folder.
run_submitted() {
    local commands=$1 command
    shift
    enter_job
    to_container SUBMITIT_EXECUTOR slurm
    pinned=$FTLIB_RUNS/.jobs/$SLURM_JOB_ID
    if [[ ${SLURM_RESTART_COUNT:-0} == 0 ]]; then rm -rf "$pinned"; fi # of an earlier job with this number
    mkdir -p "$pinned" || fail "FTLIB_RUNS=$FTLIB_RUNS cannot be written to"
    require_trusted "the snapshot of the code" "$root" && require_trusted "what was submitted" "${*: -1}" || exit 2
    for command in ${commands//+/ }; do
        to_container FTLIB_STEP "$command"
        run_step "$command" "$@"
    done
    rm -rf "$pinned"
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
    [[ ${1:-} == ftlib || ${1:-} == python3 ]] || fail "usage: jobs/run.sh ftlib COMMAND …"
    enter_container
    "${container[@]}" "$@"
fi
