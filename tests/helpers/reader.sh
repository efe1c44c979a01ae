# What a reader's commands are run by: sourced before them, with $INSTALLER and $PORT.

set -Eeuo pipefail
shopt -s inherit_errexit
trap 'echo "failed: $BASH_COMMAND" >&2' ERR
trap 'kill $server "${workers[@]}" 2>/dev/null || true' EXIT
server="" served="" workers=()

# Installs in place of pip, from its cache, if it is there.
pip() {
    if [ -n "$INSTALLER" ] && [ "$1" = install ]; then
        command "$INSTALLER" pip install --quiet --python "$VIRTUAL_ENV/bin/python" "${@:2}"
    else
        python -m pip "$@"
    fi
}

# Says on stderr what came, from within "$(…)" too.
curl() {
    command curl --max-time 30 --write-out '%{stderr}\nanswered %{http_code}\n' "$@"
}

# Runs a server until the next one, which takes its port.
serve() {
    if [ "$served" = "$*" ] && kill -0 "$server"; then return; fi
    if [ -n "$server" ]; then stop "$server"; fi
    "$@" &
    server=$! served="$*"
    # First without curl, which takes as much time to start as all the rest.
    until (: <"/dev/tcp/127.0.0.1/$PORT") 2>&- &&
        command curl --silent --output /dev/null --max-time 60 "http://127.0.0.1:$PORT/"; do
        is_running "$server"
        sleep 0.05
    done
}

# Runs a process beside the others, until the end.
work() {
    "$@" &
    workers+=("$!")
    # Where the system says which signals are caught: until it has prepared for its end.
    if [ ! -r "/proc/$!/status" ]; then return; fi
    until ((0x$(sed -n 's/^SigCgt:\s*//p' "/proc/$!/status") >> 14 & 1)); do
        is_running "$!"
        sleep 0.05
    done
}

is_running() {
    kill -0 "$1" || { echo "it has ended by itself" >&2; exit 1; }
}

stop() {
    is_running "$1"
    kill "$1"
    local status=0
    wait "$1" || status=$?
    [ "$status" = 0 ] || [ "$status" = 143 ] # SIGTERM, raised again
}

stop_all() {
    for process in $server "${workers[@]}"; do stop "$process"; done
    server="" workers=()
}
