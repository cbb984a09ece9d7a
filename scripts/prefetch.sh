#!/bin/bash
# On a login node: puts model and data into a folder, for a run on nodes that cannot reach the Hugging Face hub.
#
#   exports=$(bash scripts/prefetch.sh) && eval "$exports"              # fetch; set the variables; then sbatch as usual
#   MODEL_NAME=bigscience/bloom-1b1 bash scripts/prefetch.sh /scratch/course      # another model, another folder
#
# MODEL_NAME and SQUAD_DATA are hub ids or local folders, as for a run; local ones stay where they are. The folder
# (default: prefetched, at the top of the repository) must be one that the compute nodes see. Files that it holds already
# are not fetched again, so a fetch that was cut short goes on with the next call. Prints the export lines of the run on
# stdout, everything else on stderr. Exit status 0 only if a run would find all that it needs; 2 with one line for each
# thing that is wrong.
set -euo pipefail

REPO=$(CDPATH="" cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
CHECK=$REPO/scripts/job/check_inputs.py

fail() {
    printf 'ERROR: %s\n' "$*" >&2
    exit 2
}

case ${1:-} in
    -h | --help) sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 0 ;;
    -*) fail "$1: no such option; see: bash scripts/prefetch.sh --help" ;;
esac
(($# <= 1)) || fail "$*: give one folder, in quotes if its name has spaces"
FOLDER=${1:-$REPO/prefetched}
set +eu                                                      # conda and modules break under it
# shellcheck source=SCRIPTDIR/../experiments/site.sh
source "$REPO/experiments/site.sh"                           # the environment of the jobs
set -eu
# shellcheck source=SCRIPTDIR/job/environment.sh
source "$REPO/scripts/job/environment.sh"
choose_python
unset RESUME                                                 # of a run that is to be continued; it has its own settings
export ON_SLURM=later                                        # trials will run on Slurm's nodes: not too large for this one

settings=$(python "$CHECK" --get MODEL_NAME SQUAD_DATA)      # checks all variables, and makes folders absolute
{ read -r MODEL_NAME; read -r SQUAD_DATA; } <<<"$settings"
{ mkdir -p "$FOLDER" && [[ -w $FOLDER ]]; } 2>/dev/null ||
    fail "FOLDER='$FOLDER': cannot be made or written to; give another one"
FOLDER=$(CDPATH="" cd "$FOLDER" && pwd)
exec 9>"$FOLDER/.lock"                                       # two at once take turns, if the file system has locks
flock --nonblock -E 75 9 2>/dev/null || (($? != 75)) || {
    echo "waiting for another prefetch.sh that fills $FOLDER, at most an hour" >&2
    flock --wait 3600 9 || fail "FOLDER='$FOLDER': another prefetch.sh has been filling it for an hour; wait for its end, or end it"
}
paths=$(python "$REPO/scripts/prefetch.py" "$MODEL_NAME" "$SQUAD_DATA" "$FOLDER")
{ read -r MODEL_NAME; read -r SQUAD_DATA; } <<<"$paths"
export MODEL_NAME SQUAD_DATA HF_HUB_OFFLINE=1
settings=$(python "$CHECK")                                  # opens all of it, as the check of a run does
printf 'a run would use:\n%s\n' "$settings" >&2
printf 'export MODEL_NAME=%q\nexport SQUAD_DATA=%q\nexport HF_HUB_OFFLINE=1\n' "$MODEL_NAME" "$SQUAD_DATA"
