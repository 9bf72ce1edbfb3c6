# Shared by jobs/run.sh and containers/build.sh; sourced, never run.

# Literal KEY=VALUE lines into the environment, which wins where it has the key already. Nothing is expanded.
read_site_env() {
    local file=$1 line key value number=0
    if [[ ! -e $file ]]; then return 0; fi
    if [[ ! -r $file ]]; then echo "ftlib: $file cannot be read" >&2; return 2; fi
    while IFS= read -r line || [[ -n $line ]]; do
        number=$((number + 1))
        line=${line%$'\r'}
        if [[ $line =~ ^[[:space:]]*(#.*)?$ ]]; then continue; fi
        if [[ ! $line =~ ^[[:space:]]*([A-Z][A-Z0-9_]*)=(.*[^[:space:]])?[[:space:]]*$ ]]; then
            echo "ftlib: $file:$number: expected KEY=VALUE, got '$line'" >&2
            return 2
        fi
        key=${BASH_REMATCH[1]} value=${BASH_REMATCH[2]}
        if [[ ${#value} -gt 1 && ${value:0:1} == "${value: -1}" && ${value:0:1} == [\'\"] ]]; then value=${value:1:-1}; fi
        if [[ -z ${!key+set} ]]; then export "$key=$value"; fi
    done < "$file"
}

find_container() { # apptainer, or singularity
    command -v apptainer || command -v singularity
}

# Tracked files of a checkout with their uncommitted changes; without git, everything but what a build leaves.
copy_tracked() {
    local from=$1 to=$2
    if git -C "$from" rev-parse --git-dir > /dev/null 2>&1; then
        (cd "$from" && git ls-files -z | while IFS= read -r -d '' name; do
            if [[ -e $name ]]; then printf '%s\0' "$name"; fi
        done | tar --null -T - -cf -) | tar -xf - -C "$to"
    else
        tar -C "$from" --exclude=.venv --exclude=build --exclude=store --exclude=logs -cf - . | tar -xf - -C "$to"
    fi
}
