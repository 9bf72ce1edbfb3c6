# Functions for jobs/run.sh and containers/build.sh; sourced, not executed.

# Read jobs/site.env into the environment; existing variables take precedence. Rules and messages are the same as in
# read_site_env of ftlib/core/paths.py.
read_site_env() {
    local file=$1 line key number=0 REPLY
    local -A lines=()
    if [[ ! -e $file ]]; then return 0; fi
    if [[ ! -r $file ]]; then echo "ftlib: $file cannot be read" >&2; return 2; fi
    require_trusted jobs/site.env "$file" "$(dirname "$(dirname "$file")")" || return 2
    while IFS= read -r line || [[ -n $line ]]; do
        number=$((number + 1))
        line=${line%$'\r'}
        if [[ $line =~ ^[[:space:]]*(#.*)?$ ]]; then continue; fi
        if [[ ! $line =~ ^[[:space:]]*([A-Z][A-Z0-9_]*)=(.*)$ ]]; then
            [[ ${line%%=*} =~ ^[[:space:]]*(.*[^[:space:]])?[[:space:]]*$ ]]
            echo "ftlib: $file:$number: expected KEY=VALUE, got '${BASH_REMATCH[1]}'" >&2
            return 2
        fi
        key=${BASH_REMATCH[1]}
        if [[ -n ${lines[$key]:-} ]]; then
            echo "ftlib: $file:$number: $key: is set in line ${lines[$key]} already" >&2
            return 2
        fi
        lines[$key]=$number
        if [[ -n ${!key+set} ]]; then continue; fi
        site_env_value "$key" "${BASH_REMATCH[2]}" || { echo "ftlib: $file:$number: $key: $REPLY" >&2; return 2; }
        export "$key=$REPLY"
    done < "$file"
}

# KEY TEXT: sets REPLY to the value of a line of site.env, or fails with REPLY as the error. Only for read_site_env, whose
# `lines` are the keys above.
site_env_value() {
    local key=$1 text=$2 quote='' after found='' name part
    if [[ $text =~ ^[[:space:]]*([\'\"])(.*)$ ]]; then
        quote=${BASH_REMATCH[1]} text=${BASH_REMATCH[2]}
        after=${text#*"$quote"}
        if [[ $text != *"$quote"* || ! $after =~ ^[[:space:]]*$|^[[:space:]]+\# ]]; then
            REPLY="quotes belong around the whole value"
            return 1
        fi
        text=${text%%"$quote"*}
    else
        text=${text%%[[:space:]]#*}
        [[ $text =~ ^[[:space:]]*(.*[^[:space:]])?[[:space:]]*$ ]]
        text=${BASH_REMATCH[1]}
        if [[ $text == *[\'\"]* ]]; then REPLY="quotes belong around the whole value"; return 1; fi
    fi
    if [[ $quote != "'" ]]; then
        if [[ $text == *[\\\`]* ]]; then REPLY="\\ and \` have no meaning here; put the value in single quotes to have it as it is"; return 1; fi
        while [[ $text == *\$* ]]; do
            if [[ ! $text =~ ^([^\$]*)\$(\{([A-Za-z_][A-Za-z0-9_]*)\}|([A-Za-z_][A-Za-z0-9_]*))(.*)$ ]]; then name=; else
                found+=${BASH_REMATCH[1]} name=${BASH_REMATCH[3]}${BASH_REMATCH[4]} text=${BASH_REMATCH[5]}
            fi
            if [[ -z $name || ( ! $name =~ ^(HOME|USER|SCRATCH|WORK)$ && -z ${lines[$name]:-} ) ]]; then
                REPLY="only \$HOME, \$USER, \$SCRATCH, \$WORK and keys of lines above are expanded; put the value in single quotes to have it as it is"
                return 1
            fi
            if [[ $name == USER && -z ${USER:-} ]]; then found+=$(id -un); continue; fi
            if [[ -z ${!name:-} && -z ${lines[$name]:-} ]]; then REPLY="\$$name is not set here"; return 1; fi
            found+=${!name}
        done
        text=$found$text
    fi
    if [[ $text == *[[:cntrl:]]* ]]; then REPLY="must be one line without control characters"; return 1; fi
    REPLY=$text
    if [[ ! $key =~ ^(FTLIB_(STORE|RUNS|IMAGE|TMP|HOOK|BINDS|VENV)|HF_HUB_CACHE|CA_FILE|WHEELS)$ ]]; then return 0; fi
    REPLY=
    while [[ -n $text ]]; do
        if [[ $key == FTLIB_BINDS ]]; then part=${text%%:*}; else part=$text; fi
        text=${text#"$part"}
        if [[ -z $quote && ( $part == "~" || $part == "~/"* ) ]]; then
            if [[ -z ${HOME:-} ]]; then REPLY="\$HOME is not set here"; return 1; fi
            part=$HOME${part#"~"}
        fi
        if [[ -n $part && $part != /* ]]; then REPLY="must be an absolute path, not '$part'"; return 1; fi
        REPLY+=$part${text:0:1}
        text=${text:1}
    done
}

# The rules for permissions of folders and for trusted code are the same as in ftlib/core/permissions.py and
# ftlib/core/trust.py.

# Print the ID of the group that $FTLIB_STORE is shared with; nothing for a private store.
store_group() {
    local folder=$FTLIB_STORE found
    if [[ -n ${FTLIB_GROUP:-} ]]; then
        found=$(getent group "$FTLIB_GROUP" | cut -d: -f3)
        if [[ -z $found && $FTLIB_GROUP == +([0-9]) ]]; then found=$FTLIB_GROUP; fi
        if [[ -z $found ]]; then echo "ftlib: FTLIB_GROUP=$FTLIB_GROUP: no such group" >&2; return 2; fi
        echo "$found"
    elif [[ -d $folder ]]; then
        find "$folder" -maxdepth 0 \( -perm -2000 -o -perm -0020 \) -printf '%G\n'
    else
        find "$(dirname "$folder")" -maxdepth 0 -perm -2000 -printf '%G\n' 2>/dev/null || true
    fi
}

make_folder() { # FOLDER MODE [GROUP]: created atomically with its mode; an existing folder is not changed
    local new mode=$2
    if [[ -d $1 ]]; then return 0; fi
    mkdir -p "$(dirname "$1")" && new=$(mktemp -d "$1.tmp-XXXXXX") || return
    if [[ -n ${3:-} && $(stat -c %g "$new") != "$3" ]]; then
        chgrp "$3" "$new" || mode=700 # not shared with another group
    fi
    chmod "$mode" "$new"
    mv -T "$new" "$1" 2>/dev/null || rmdir "$new"
    [[ -d $1 ]]
}

make_store() { # FOLDER…: create the store and these folders in it
    local group mode=700 name
    group=$(store_group) || return
    if [[ -n $group ]]; then mode=3770; fi
    if [[ ! -d $FTLIB_STORE && -z $group ]]; then
        echo "ftlib: $FTLIB_STORE: nobody else can use this store. To share it: FTLIB_GROUP=… in jobs/site.env, then" \
            "\`ftlib doctor\` tells the commands" >&2
    fi
    make_folder "$FTLIB_STORE" "$mode" "$group" || return
    if [[ $(stat -c %A "$FTLIB_STORE") == *r-[xt] ]]; then mode=$((mode + 5)); fi # others can read it
    for name; do make_folder "$FTLIB_STORE/$name" "$mode" "$group" || return; done
}

user_number() { # NAME or ID
    if [[ $1 == +([0-9]) ]]; then echo "$1"; else id -u "$1"; fi
}

# Check that all of PATH is owned by this user, root, the owner of TOP (the store) or FTLIB_OWNER, and that nobody else can
# write to it or replace it. Parents are checked up to TOP; outside of TOP, only the nearest.
require_trusted() { # WHAT PATH [TOP]
    local what=$1 path top=${3:-$FTLIB_STORE} owner named others replaced user group found fix
    path=$(realpath -e "$2" 2>/dev/null) || { echo "ftlib: $what: $2 is not there" >&2; return 2; }
    owner=(-uid "$EUID" -o -uid 0)
    if [[ -d $top ]]; then
        top=$(realpath "$top")
        owner+=(-o -uid "$(stat -c %u "$top")")
    fi
    if [[ -n ${FTLIB_OWNER:-} ]]; then
        named=$(user_number "$FTLIB_OWNER") || return 2
        owner+=(-o -uid "$named")
    fi
    if [[ $path != "$top"/* && -n ${FTLIB_RUNS:-} && $path == "$(realpath "$FTLIB_RUNS")"/* ]]; then top=$(realpath "$FTLIB_RUNS"); fi
    others=(-perm -0002 -o -perm -0020)
    # A private group with only this user does not count as others.
    user=$(id -un 2>/dev/null) group=$(id -g)
    if [[ $(getent group "$group" 2>/dev/null) == "$user:"*":$group:"?("$user") ]]; then others+=(! -gid "$group"); fi
    found=$(find "$2" "$path" ! \( "${owner[@]}" \) -printf '%p is owned by %u\n' -quit)
    fix="Use one of your own; or, if that user may run code in your name, set FTLIB_OWNER in jobs/site.env."
    if [[ -z $found ]]; then
        found=$(find "$path" ! -type l \( "${others[@]}" \) -printf '%p can be written to by others\n' -quit)
        fix="chmod -R go-w '$path'"
    fi
    while [[ -z $found ]]; do
        path=$(dirname "$path")
        replaced=(! \( "${owner[@]}" \) -o ! -perm -1000 \( "${others[@]}" \))
        # The sticky folders of the store may be owned by any of its users.
        if [[ $path == "$top" || $(dirname "$path") == "$top" ]]; then replaced=(! -perm -1000 \( "${replaced[@]}" \)); fi
        found=$(find "$path" -maxdepth 0 \( "${replaced[@]}" \) -printf 'others can replace what is in %p\n')
        if [[ $path == "$top" || $path != "$top"/* ]]; then break; fi
    done
    if [[ -z $found ]]; then return 0; fi
    if [[ $found == "others can replace"* ]]; then
        fix="chmod go-w '$path'"
        if [[ $path == "$top" || $(dirname "$path") == "$top" ]]; then fix="chmod +t '$path'"; fi
    fi
    echo "ftlib: $what is not used: $found: $fix" >&2
    return 2
}

find_container() { # apptainer, or singularity
    command -v apptainer || command -v singularity
}

# Copy the tracked files of a checkout with uncommitted changes; without git, everything except build outputs.
copy_tracked() {
    local from=$1 to=$2
    if git -C "$from" rev-parse --git-dir > /dev/null 2>&1; then
        (cd "$from" && git ls-files -z | while IFS= read -r -d '' name; do
            if [[ -e $name ]]; then printf '%s\0' "$name"; fi
        done | tar --null -T - -cf -) | tar -xf - -C "$to"
    else
        tar -C "$from" --exclude=.venv --exclude=build --exclude=store --exclude=logs --exclude='./*.log' -cf - . | tar -xf - -C "$to"
    fi
}
