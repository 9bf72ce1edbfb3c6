#!/usr/bin/env bash
# Runs ftlib commands in the container (or another runtime, FTLIB_RUNTIME) and in Slurm jobs: signals, exit codes,
# requeueing.
#
# By hand:          jobs/run.sh ftlib COMMAND …     enters the container and runs the command
# In a batch job:   source jobs/run.sh; run_job COMMAND+COMMAND … ARGUMENTS…
# By ftlib submit:  source jobs/run.sh; run_submitted COMMAND+COMMAND … python3 FILE -u -m submitit.core._submit FOLDER
# Exit codes of a job: 0 done · 2 user error · 75 saved, resume later · 76 another task died · 137 killed · else failed.
# Near the time limit (USR1): the command saves and exits with 75, and this script requeues the job. Preempted or
# cancelled (TERM): the command saves and exits with 75. A cancelled job stays cancelled; a preempted one is requeued by
# Slurm, or by this script, because Slurm does not requeue a job that ends within the partition's GraceTime. Killed: the
# job is requeued if it wrote a checkpoint or evaluated a batch since its last start, but not if it ran out of memory;
# preempted while it starts, it is requeued in any case.

jobs=${FTLIB_JOBS:-$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)}
root=$(dirname "$jobs")
source "$jobs/lib.sh"

fail() { echo "ftlib: $*" >&2; exit 2; }

# Read the site settings and prepare the runtime. Sets three arrays: `enter`, which runs a command from this script;
# `container`, the same within a step of Slurm; `step_options`, the options of srun that it needs.
enter_runtime() {
    local name mounts='' bound=()
    umask g-w,o-w # others cannot write to files of this script
    read_site_env "$jobs/site.env" || exit 2
    if [[ -n ${FTLIB_HOOK:-} ]]; then
        require_trusted FTLIB_HOOK "$FTLIB_HOOK" "${FTLIB_STORE:-/}" || exit 2
        source "$FTLIB_HOOK" || fail "FTLIB_HOOK=$FTLIB_HOOK failed"
    fi
    runtime=${FTLIB_RUNTIME:-apptainer}
    [[ $runtime == apptainer || $runtime == none || $runtime == pyxis ]] ||
        fail "FTLIB_RUNTIME=$runtime must be apptainer, none or pyxis"
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
    # The store may be read-only, but not the runs folder.
    make_store $([[ $FTLIB_RUNS != "$FTLIB_STORE"/runs/* ]] || echo runs) && make_runs ||
        fail "FTLIB_STORE=$FTLIB_STORE or FTLIB_RUNS=$FTLIB_RUNS cannot be written to"
    if [[ $runtime == none ]]; then require_python; else require_image; fi

    job_tmp=$(mktemp -d "${FTLIB_TMP:-${SLURM_TMPDIR:-/tmp}}/ftlib.XXXXXX") || fail "no local temporary folder"
    trap 'rm -rf "$job_tmp"' EXIT
    mkdir "$job_tmp/tmp" "$job_tmp/notes"
    # Compile caches must not be shared between nodes or inherited; training stores their content between the starts of a
    # run (ftlib/training/compiling.py). Jobs do not access the hub.
    to_runtime FTLIB_STORE "$FTLIB_STORE"
    to_runtime FTLIB_RUNS "$FTLIB_RUNS"
    # The container does not know the names of users and groups.
    if [[ -n ${FTLIB_GROUP:-} ]]; then to_runtime FTLIB_GROUP "$(store_group)"; fi
    if [[ -n ${FTLIB_OWNER:-} ]]; then to_runtime FTLIB_OWNER "$(user_number "$FTLIB_OWNER")"; fi
    to_runtime FTLIB_JOB_TMP "$job_tmp/notes"
    to_runtime TMPDIR "$job_tmp/tmp"
    to_runtime TRITON_CACHE_DIR "$job_tmp/tmp/triton"
    to_runtime TORCHINDUCTOR_CACHE_DIR "$job_tmp/tmp/inductor"
    to_runtime HF_TOKEN_PATH "${HF_TOKEN_PATH:-${HF_HOME:-$HOME/.cache/huggingface}/token}" # private, never in the store
    to_runtime HF_HOME "$FTLIB_STORE/hf"
    to_runtime PYTHONNOUSERSITE 1
    use_code "$root"
    to_runtime PYTHONUNBUFFERED 1
    if [[ -n ${SLURM_JOB_ID:-} ]]; then to_runtime HF_HUB_OFFLINE 1; fi
    while IFS= read -r name; do
        [[ $runtime == none || $name != *[,:]* ]] || fail "$name: a path with a comma or a colon cannot be bound into a container"
        bound+=("$name")
    done < <(printf '%s\n' "$FTLIB_STORE" "$FTLIB_RUNS" "$root" "$job_tmp"; tr : '\n' <<< "$PWD${FTLIB_BINDS:+:$FTLIB_BINDS}")
    step_options=() container=()
    case $runtime in
        apptainer)
            container=("$(find_container)" --silent exec --nv)
            for name in "${bound[@]}"; do container+=(--bind "$name"); done
            container+=(--pwd "$PWD" "$FTLIB_IMAGE")
            enter=("${container[@]}")
            ;;
        pyxis)
            step_options=(--container-image="$FTLIB_IMAGE" --container-workdir="$PWD" --no-container-mount-home)
            for name in "${bound[@]}"; do mounts+=,$name:$name; done
            step_options+=(--container-mounts="${mounts#,}")
            container=(env PATH=/opt/ftlib/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin)
            enter=(srun --nodes=1 --ntasks=1 --ntasks-per-node=1 "${step_options[@]}" "${container[@]}")
            ;;
        none) enter=() ;;
    esac
}

require_image() {
    local program
    if [[ $runtime == apptainer ]]; then
        program=$(find_container) || fail "neither apptainer nor singularity is in PATH; load it in FTLIB_HOOK"
    fi
    [[ -r $FTLIB_IMAGE ]] || fail "image $FTLIB_IMAGE is not there. Build it: sbatch jobs/build.sbatch"
    require_trusted "the image" "$FTLIB_IMAGE" || exit 2
    require_pinned_image
    if [[ $runtime == pyxis ]]; then return; fi
    "$program" inspect --labels "$FTLIB_IMAGE" 2>/dev/null | grep -q '^org\.ftlib\.revision' ||
        fail "$FTLIB_IMAGE is no image of ftlib. Build one: sbatch jobs/build.sbatch"
}

# Without a container: the python3 of FTLIB_VENV, or the one that FTLIB_HOOK has put into PATH.
require_python() {
    local missing
    if [[ -n ${FTLIB_VENV:-} ]]; then
        [[ -x $FTLIB_VENV/bin/python3 ]] || fail "FTLIB_VENV=$FTLIB_VENV: there is no bin/python3 in it"
        require_trusted FTLIB_VENV "$FTLIB_VENV" || exit 2
        export PATH=$FTLIB_VENV/bin:$PATH
        unset PYTHONPATH # of modules that FTLIB_HOOK has loaded: for another Python
    fi
    # PYTHONNOUSERSITE: packages in the home folder do not count.
    missing=$(PYTHONNOUSERSITE=1 python3 -c 'import importlib.util, sys
sys.path[:] = filter(None, sys.path) # not the working folder
if sys.version_info < (3, 10): print("Python 3.10 or newer")
print(*(name for name in ("torch", "transformers", "peft", "datasets", "submitit") if not importlib.util.find_spec(name)))' 2>&1) ||
        fail "python3 does not start: $missing"
    [[ -z ${missing//[[:space:]]/} ]] || fail "$(command -v python3) lacks ${missing//$'\n'/ }. Without a container," \
        "FTLIB_VENV in jobs/site.env names a venv with ftlib's packages, or FTLIB_HOOK loads a module that has them."
}

# The user's runs folder; the group can read it with FTLIB_SHARE_RUNS=1, if the store is shared.
make_runs() {
    local group mode=700
    group=$(store_group) || return
    if [[ -n $group && ${FTLIB_SHARE_RUNS:-0} != 0 ]]; then mode=2750; fi
    make_folder "$FTLIB_RUNS" "$mode" "$group" && make_folder "$FTLIB_RUNS/.jobs" 700
}

# Check the image's digest, if FTLIB_IMAGE_SHA256 is set. Computed once; <runs>/.jobs/image stores the result.
require_pinned_image() {
    local known=$FTLIB_RUNS/.jobs/image facts
    if [[ -z ${FTLIB_IMAGE_SHA256:-} ]]; then return 0; fi
    facts="$FTLIB_IMAGE_SHA256 $(stat -L -c '%d %i %s %y %z' "$FTLIB_IMAGE")"
    if [[ -O $known && $(< "$known") == "$facts" ]]; then return 0; fi
    [[ $(sha256sum < "$FTLIB_IMAGE") == "$FTLIB_IMAGE_SHA256 "* ]] ||
        fail "$FTLIB_IMAGE is not the image that FTLIB_IMAGE_SHA256 names"
    echo "$facts" > "$known"
}

# Set a variable for what runs in the runtime. For a container both names, because the image's environment takes precedence
# over the host's.
to_runtime() {
    if [[ $runtime == apptainer ]]; then export "APPTAINERENV_$1=$2" "SINGULARITYENV_$1=$2"; else export "$1=$2"; fi
}

# Let commands run the code in FOLDER, which takes precedence over an installed ftlib. Sets the array `ftlib`: the program.
use_code() {
    ftlib=(ftlib)
    if [[ $runtime != none ]]; then to_runtime PYTHONPATH "$1"; return; fi
    site_pythonpath=${site_pythonpath-${PYTHONPATH:-}} # of a module
    export PYTHONPATH=$1${site_pythonpath:+:$site_pythonpath}
    ftlib=(python3 "$1/ftlib/run_module.py" -m ftlib) # the venv may have no ftlib of its own
}

# Pin the code and the config of the job's first start; a requeued job uses the same. See ftlib/runs/pinning.py.
pin() { # CONFIG FOLDER…: more folders of the clone than ftlib/ and jobs/
    local code new
    pinned=$FTLIB_RUNS/.jobs/$SLURM_JOB_ID
    if [[ ${SLURM_RESTART_COUNT:-0} == 0 || ! -e $pinned/code ]]; then
        code=$("${enter[@]}" python3 "$root/ftlib/run_module.py" -m ftlib.runs.pinning "$root" "${@:2}") || exit
        rm -rf "$pinned" "$pinned".tmp-*
        new=$(mktemp -d "$pinned.tmp-XXXXXX") && ln -s "$code" "$new/code" ||
            fail "$FTLIB_RUNS: cannot be written to (storage full?)"
        if [[ -f ${1:-} ]]; then # relative paths in it count from its own folder
            cp "$1" "$new/config.yaml" && (cd "$(dirname "$1")" && pwd) > "$new/config.folder" ||
                fail "$1 cannot be copied to $FTLIB_RUNS"
        fi
        mv -T "$new" "$pinned"
    fi
    require_trusted "the code of this job" "$pinned/code" || exit 2
    use_code "$pinned/code"
}

# Print this job's ID as scontrol takes it. (The plain ID of an array's last element means the whole array.)
slurm_id() { echo "${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}"; }

requeue() { # REASON
    local id answer first step since=$SECONDS tries=0
    id=$(slurm_id)
    if read -r first step 2>/dev/null < "$job_tmp/notes/pace"; then
        echo "$((first - $(date +%s) + SECONDS)) $step" > "$pinned/pace" # seconds until the first step, and of a step
    fi
    if [[ -e $job_tmp/notes/checkpointed ]]; then rm -f "$pinned/idle"; else stop_if_limit_is_too_short; fi
    if (( ${SLURM_RESTART_COUNT:-0} >= ${FTLIB_MAX_REQUEUES:-100} )); then
        echo "ftlib: requeued ${SLURM_RESTART_COUNT} times already (FTLIB_MAX_REQUEUES); submit it again to resume" >&2
        exit 75
    fi
    echo "ftlib: $1; requeueing job $id" >&2
    until scontrol requeue "$id" > "$job_tmp/answer" 2>&1; do
        if ! controller_away "$job_tmp/answer" || ! wait_for_controller "$since" $((tries++)); then
            answer=$(< "$job_tmp/answer")
            echo "ftlib: Slurm does not requeue this job ($answer). Nothing is lost: submit it again to resume." >&2
            exit 75
        fi
    done
    sleep 300 & # until Slurm ends this script; in the background, so that the trap for TERM runs at once
    wait $!
    exit 75
}

# Whether srun or scontrol failed because Slurm's controller did not answer, by its messages in FILE.
controller_away() {
    local said='Unable to contact slurm controller|Socket timed out on send/recv|Zero Bytes were transmitted'
    if (( ${#again[@]} > 0 )); then said+='|Unable to create step .*busy'; fi
    grep -qE "$said|[Cc]ontroller (is )?in standby mode" "$1" 2>/dev/null
}

controller_patience=600 # seconds

# Wait before the controller is asked again. Fails after $controller_patience seconds, and when the job is cancelled.
wait_for_controller() { # $SECONDS at the first try, number of earlier tries
    local pause=$(( $2 < 5 ? 2 << $2 : 30 ))
    if [[ $term == 1 ]] || (( SECONDS - $1 + pause > controller_patience )); then return 1; fi
    echo "ftlib: Slurm's controller does not answer; trying again in $pause s" >&2
    sleep "$pause" &
    wait $! # a signal interrupts it
}

# Print the seconds until the time limit, and the limit in seconds; nothing if there is none.
time_limit() {
    local shown
    shown=$(timeout 30 scontrol show job "$(slurm_id)" 2>/dev/null)
    [[ $shown =~ StartTime=([^[:space:]]+)\ EndTime=([0-9][^[:space:]]+) ]] || return 0
    shown=$(date -d "${BASH_REMATCH[1]}" +%s) && echo $(($(date -d "${BASH_REMATCH[2]}" +%s) - $(date +%s))) \
        $(($(date -d "${BASH_REMATCH[2]}" +%s) - shown))
}

clock() { printf '%02d:%02d:%02d' $(($1 / 3600)) $(($1 / 60 % 60)) $(($1 % 60)); }

# End the job instead of requeueing it if this start is the second one in a row that the time limit ends in the same
# command before it has saved anything. A preemption is no such start, nor a USR1 long before the limit.
stop_if_limit_is_too_short() {
    local left limit used=$SECONDS pace startup step needed told
    if being_preempted; then return; fi
    read -r left limit <<< "$(time_limit)"
    if [[ -z $limit ]] || (( left > 300 && left > limit / 2 )); then return; fi
    if [[ $(tail -n 1 "$pinned/idle" 2>/dev/null) != "$command" ]]; then : > "$pinned/idle"; fi
    echo "$command" >> "$pinned/idle"
    if (( $(wc -l < "$pinned/idle") < 2 )); then return; fi
    if pace=$(cat "$pinned/pace" 2>/dev/null); then
        read -r startup step <<< "$pace"
        needed=$((startup + 2 * step + left)) told="start-up took $startup s and a step $step s in an earlier start"
    fi
    if (( ${needed:-0} <= limit )); then needed=$((2 * used + left)) told="start-up takes more than $used s"; fi
    if (( needed <= limit )); then needed=$((limit + 60)); fi # USR1 was sent early
    needed=$(clock $(((needed + 59) / 60 * 60)))
    told="two starts reached the time limit ($(clock "$limit")) before anything was saved: $told, and the job must save"
    told+=" $left s before the limit. Request at least --time=$needed (job.time)"
    note failed 2 "$told"
    echo "ftlib: $command: $told, and submit it again; it is not requeued." >&2
    exit 2
}

# Append an event to the history of the active run.
note() {
    local run
    run=$(cat "$job_tmp/notes/run" 2>/dev/null) || return 0
    if [[ -n $(tail -c 1 "$run/history.jsonl" 2>/dev/null) ]]; then echo >> "$run/history.jsonl"; fi # after an incomplete line
    printf '{"event": "%s", "time": %s, "host": "%s", "job": "%s", "command": "%s", "exit": %d, "reason": "%s"}\n' \
        "$1" "$(date +%s)" "${SLURMD_NODENAME:-$(hostname)}" "$(slurm_id)" "$command" "$2" "$3" >> "$run/history.jsonl"
}

# Wait for srun; forward USR1 when the command's handlers are installed (before, it would kill srun or Python).
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
        if (( code > 128 )) && kill -0 "$1" 2>/dev/null; then continue; fi # a trap interrupted wait
        srun_code=$code
        # srun ended during a trap: its exit code is lost, but the command has left a note
        if (( code == 138 || code == 143 )) && [[ -e $job_tmp/notes/signal ]]; then code=75; fi
        return
    done
}

# Whether the step was killed by the OOM killer. srun's exit code is 1 or 137 then, so check its messages.
out_of_memory() { grep -qE 'oom[-_ ]kill|Out Of Memory' "$job_tmp/stderr" 2>/dev/null; }

# Whether bitsandbytes ended the process because memory ran out; only its message shows it.
out_of_memory_in_bitsandbytes() { grep -qE '^Error out of memory at line [0-9]+ in file ' "$job_tmp/stderr" 2>/dev/null; }

# Print the rank that NCCL's watchdog ended (signal 6) because it waited for another rank until the timeout.
waited_in_vain() {
    local said='.*Rank ([0-9]+)\].*Watchdog caught collective operation timeout: WorkNCCL\(.*Timeout\(ms\)=([0-9]+)\).*'
    sed -nE "s/$said/rank \1 timed out after \2 ms waiting for another rank (NCCL)/p" "$job_tmp/stderr" 2>/dev/null | head -n 1
}

# Print the memory that Slurm allocated to this job.
memory_given() {
    if [[ ${SLURM_MEM_PER_NODE:-0} != 0 ]]; then echo "it has $SLURM_MEM_PER_NODE MiB a node, /dev/shm and tmpfs included"; return; fi
    if [[ ${SLURM_MEM_PER_CPU:-0} != 0 ]]; then
        echo "it has $((SLURM_MEM_PER_CPU * ${SLURM_CPUS_ON_NODE:-1})) MiB a node, $SLURM_MEM_PER_CPU MiB for each CPU," \
            "/dev/shm and tmpfs included"
        return
    fi
    echo "/dev/shm and tmpfs count"
}

# Print how the task ended that ended first, from srun's messages: "n2: task 3: Killed". Tasks that exited because another
# one died (76), or because they were told to save (75), may be reported earlier.
first_ended() {
    (( ${SLURM_NTASKS:-1} > 1 )) || return 0
    sed -nE 's/^srun: error: (.+: tasks? [0-9,-]+: .+)/\1/p' "$job_tmp/stderr" 2>/dev/null |
        grep -vE ': Exited with exit code 7[56]$' | head -n 1
}

# Whether a job of higher priority preempts this one. (A cancelled job is no longer RUNNING.)
being_preempted() {
    local shown
    shown=$(timeout 30 scontrol show job "$(slurm_id)" 2>/dev/null) || return 1
    [[ $shown == *JobState=RUNNING* && $shown == *" PreemptTime="* && $shown != *" PreemptTime=None"* ]]
}

run_step() { # COMMAND LINE…: one ftlib command and what runs it in the container; returns only if it is done
    local command=$1 code srun_code killed waited copy tasks=() since=$SECONDS tries=0 again=()
    shift
    # train, evaluate and the check of several GPUs use one task per GPU; other commands are a single process.
    if [[ $command != train && $command != evaluate && $command != several ]]; then tasks=(--nodes=1 --ntasks=1 --ntasks-per-node=1); fi
    while :; do
        rm -f "$job_tmp"/notes/* "$job_tmp"/stderr*
        # srun's messages are copied to a file, from which the reason of a failure is read. The copying process ignores
        # signals; the file is complete when it has ended.
        mkfifo "$job_tmp/stderr.pipe" || fail "$job_tmp cannot be written to"
        (trap '' TERM INT USR1 HUP; exec tee "$job_tmp/stderr" < "$job_tmp/stderr.pipe" >&2) &
        copy=$!
        # --mem=0: the memory of the job, whichever of Slurm's options asked for it. SIGUSR1 is ignored until Python's handler
        # is installed, so that it cannot kill the command.
        srun "${tasks[@]}" "${step_options[@]}" "${again[@]}" --mem=0 --kill-on-bad-exit=1 --wait=60 --job-name="$command" \
            bash -c 'trap "" USR1; : > "$1/notes/begun"; shift; exec "$@"' ftlib "$job_tmp" "${container[@]}" "$@" \
            2> "$job_tmp/stderr.pipe" &
        wait_for $!
        while kill -0 "$copy" 2>/dev/null; do wait "$copy"; done # a trap interrupts `wait`
        # A step that has begun must not run twice.
        if [[ $code == 0 || -e $job_tmp/notes/begun ]] || ! controller_away "$job_tmp/stderr"; then break; fi
        if [[ $usr1 == 1 ]]; then requeue "the time limit came while Slurm's controller did not answer"; fi
        if ! wait_for_controller "$since" $((tries++)); then
            echo "ftlib: $command was not started, because Slurm's controller did not answer. Nothing is lost: submit it" \
                "again to resume." >&2
            exit 75
        fi
        again=(--immediate=10) # a controller that has just started calls the nodes busy, and srun would wait for minutes
    done
    # When a task fails, Slurm ends the others by SIGTERM: their messages are not the reason, and their note of that signal
    # does not mean that the job was told to save.
    killed=$(first_ended)
    case $killed in
        *": Exited with exit code "*) code=${killed##* } killed= ;;
        '' | *": Terminated" | *": User defined signal"*) ;;
        *) code=$srun_code killed=${killed%: Killed} ;;
    esac
    if [[ -z $killed && -e $job_tmp/notes/failed ]]; then code=$(< "$job_tmp/notes/failed"); fi
    case $code in
        0)
            if grep -q "^srun: error: Node failure on " "$job_tmp/stderr"; then exit 1; fi # Slurm starts the job again
            return
            ;;
        2) exit 2 ;;
        75)
            if [[ $usr1 == 1 || $(cat "$job_tmp/notes/signal" 2>/dev/null) == SIGUSR1 ]]; then requeue "saved before the time limit"; fi
            if being_preempted; then requeue "saved before a preemption"; fi
            echo "ftlib: saved and ended" >&2
            exit 75
            ;;
    esac
    if [[ $term == 1 ]]; then exit "$code"; fi # cancelled before its handlers were installed
    if being_preempted; then requeue "preempted during its start"; fi
    if (( code == 138 )); then requeue "USR1 came before the first handler was installed"; fi
    if out_of_memory_in_bitsandbytes; then
        note failed "$code" "out of memory in bitsandbytes"
        echo "ftlib: $command: bitsandbytes ran out of memory, on the GPU or for paging to the host. Set batch.auto: true," \
            "or a smaller training.per_device_train_batch_size (evaluation.batch_size), or request a larger GPU or more memory (job.mem)" >&2
        exit "$code"
    fi
    if out_of_memory; then
        note killed "$code" "out of memory"
        echo "ftlib: $command ran out of the job's memory ($(memory_given)); request more: job.mem, or sbatch --mem=…" >&2
        exit "$code"
    fi
    if (( code > 128 )); then
        waited=$(waited_in_vain)
        note killed "$code" "${waited:-${killed:-signal $((code - 128))}}"
        if [[ -n $waited ]]; then
            echo "ftlib: $waited: that rank hung or died, see its output; training.ddp_timeout sets the timeout" >&2
        elif [[ -n $killed ]]; then
            echo "ftlib: $killed: killed; if the job ran out of memory ($(memory_given)), request more: job.mem, or sbatch --mem=…" >&2
        fi
        if [[ -e $job_tmp/notes/checkpointed ]]; then requeue "$command was killed after a checkpoint"; fi
        echo "ftlib: $command was killed (signal $((code - 128))) before its first checkpoint of this start" >&2
    fi
    exit "$code"
}

# Prepare several nodes: MASTER_ADDR is the first node, and every node needs the job's temporary folder, which the
# container binds. This script cannot read the notes on other nodes (how a rank failed); it then uses srun's exit code.
spread_over_nodes() {
    local each=(srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1) first
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST") && [[ -n $first ]] || fail "scontrol does not list this job's nodes"
    to_runtime MASTER_ADDR "${first%%$'\n'*}"
    # The name is not secret at this point: if another user has created the folder, the job fails.
    "${each[@]}" bash -c 'mkdir -m 700 "$1" 2>/dev/null || [[ -O $1 && ! -L $1 ]] && mkdir -p "$1/tmp" "$1/notes"' \
        ftlib "$job_tmp" || fail "$job_tmp cannot be made on every node"
    trap 'timeout 30 '"${each[*]}"' rm -rf "$job_tmp"; rm -rf "$job_tmp"' EXIT
}

enter_job() {
    export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} SLURM_EXPORT_ENV=ALL
    local started
    started=$(date +%s)
    if [[ -n ${SLURM_GPUS_PER_TASK:-} ]]; then
        fail "--gpus-per-task: every task would see its own GPU as device 0, and NCCL could not use peer-to-peer between" \
            "them. Request --gres=gpu:N (or --gpus-per-node=N) and --ntasks-per-node=N."
    fi
    if [[ ${CUDA_VISIBLE_DEVICES:-} == *MIG* ]] && (( ${SLURM_NTASKS:-1} > 1 )); then
        fail "several tasks on MIG slices: NCCL does not connect them. Request one (job.gpus: 1), or whole GPUs."
    fi
    enter_runtime
    to_runtime FTLIB_JOB_STARTED "$started" # the history counts GPU-hours from here
    # Every task sees all GPUs of its node and takes the one of its local rank, whatever the site's default is.
    if [[ -n ${SLURM_GPUS_ON_NODE:-} ]]; then step_options+=(--gpu-bind=none); fi
    to_runtime PYTHONSAFEPATH 1 # Python 3.11 and later: subprocesses of libraries import no modules from the working directory
    if (( ${SLURM_JOB_NUM_NODES:-1} > 1 )); then spread_over_nodes; fi
    if [[ -f /proc/$$/fd/2 ]]; then to_runtime FTLIB_LOG "$(readlink "/proc/$$/fd/2")"; fi # for `ftlib logs`
}

# As run_step, unless the command was run to its end in an earlier start of this job, or by the command before it: `ftlib
# stage` also does what `ftlib prepare` does if the data are prepared already. The commands themselves report that: srun
# ends with 0, too, when it loses a node.
run_once() { # FOLLOWING COMMAND LINE…
    local following=$1
    shift
    if grep -qx "$1" "$pinned/done" 2>/dev/null; then return; fi
    to_runtime FTLIB_FOLLOWING "$following"
    run_step "$@"
    grep -x -e "$1" -e "${following:-$1}" "$job_tmp/notes/done" >> "$pinned/done" 2>/dev/null || true # not what they called
}

run_job() { # COMMAND+COMMAND… CONFIG|RUN ARGUMENTS…
    [[ $# -gt 0 ]] || fail "usage: sbatch jobs/ftlib.sbatch COMMAND …"
    local left=$1+ command
    shift
    enter_job
    pin "${1:-}"
    if [[ -f $pinned/config.yaml ]]; then set -- "$pinned/config.yaml" "${@:2}"; fi
    while [[ -n $left ]]; do
        command=${left%%+*} left=${left#*+}
        run_once "${left%%+*}" "$command" "${ftlib[@]}" "$command" "$@"
    done
    rm -rf "$pinned"
}

# COMMAND+COMMAND… LINE…: the line is submitit's; the pickled function has the command's arguments. The code is
# already in a snapshot, the config in the run folder.
run_submitted() {
    local left=$1+ command
    shift
    enter_job
    to_runtime SUBMITIT_EXECUTOR slurm
    pinned=$FTLIB_RUNS/.jobs/$SLURM_JOB_ID
    if [[ ${SLURM_RESTART_COUNT:-0} == 0 ]]; then rm -rf "$pinned"; fi # left by an earlier job with this ID
    mkdir -p "$pinned" || fail "FTLIB_RUNS=$FTLIB_RUNS cannot be written to"
    require_trusted "the snapshot of the code" "$root" && require_trusted "what was submitted" "${*: -1}" || exit 2
    while [[ -n $left ]]; do
        command=${left%%+*} left=${left#*+}
        to_runtime FTLIB_STEP "$command"
        run_once "${left%%+*}" "$command" "$@"
    done
    rm -rf "$pinned"
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
    [[ ${1:-} == ftlib || ${1:-} == python3 ]] || fail "usage: jobs/run.sh ftlib COMMAND …"
    enter_runtime
    if [[ $1 == ftlib ]]; then set -- "${ftlib[@]}" "${@:2}"; fi
    "${enter[@]}" "$@"
fi
