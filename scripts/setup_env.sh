#!/bin/bash
# Creates the virtual environment .venv at the top of the repository, or updates it to requirements.txt.
#
#   bash scripts/setup_env.sh               # minutes the first time, a moment after that
#   PYTHON=python3.12 bash scripts/setup_env.sh
set -euo pipefail

REPO=$(CDPATH="" cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-python3}
STAMP=$REPO/.venv/installed_requirements.txt                 # a copy of what was installed, written last

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
    sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
fi

fail() {
    printf 'ERROR: %s\n' "$*" >&2
    exit 1
}

make_venv() {
    "$PYTHON" -m venv "$REPO/.venv" >"$REPO/.venv.log" 2>&1
}

[[ $REPO != *" "* ]] || fail "$REPO: Ray does not start from a path with a space; rename or move that folder"
# shellcheck source=SCRIPTDIR/job/environment.sh
source "$REPO/scripts/job/environment.sh"
exec 9>"$REPO/.venv.lock"                                    # two at once take turns, where there are locks
flock 9 2>/dev/null || true
if ! cmp -s "$REPO/requirements.txt" "$STAMP"; then
    command -v "$PYTHON" >/dev/null || fail "PYTHON=$PYTHON: no such command; install Python 3.10 or newer"
    version=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "PYTHON=$PYTHON is Python $version; use 3.10 or newer: PYTHON=python3.11 bash scripts/setup_env.sh"
    if ! make_venv; then                                     # Debian and Ubuntu have the module in a package of its own
        if ((UID == 0)) && command -v apt-get >/dev/null; then
            (apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y "python$version-venv") \
                >>"$REPO/.venv.log" 2>&1 || true
        fi
        rm -rf "$REPO/.venv"
        make_venv || fail "cannot create a virtual environment (see .venv.log);" \
            "on Debian or Ubuntu: sudo apt-get install python$version-venv"
    fi
    echo "installing packages into $REPO/.venv (a few minutes, log: .venv.log)" >&2
    "$REPO/.venv/bin/python" -m pip install -r "$REPO/requirements.txt" >>"$REPO/.venv.log" 2>&1 ||
        fail "pip could not install requirements.txt for Python $version:" \
            "$(grep -m1 -i error "$REPO/.venv.log" || tail -n1 "$REPO/.venv.log")"
    cp "$REPO/requirements.txt" "$STAMP"
fi
check_venv
echo "environment ready: $REPO/.venv" >&2
