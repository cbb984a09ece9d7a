#!/bin/bash
# Many small runs one after another on the sandbox, each with a fault drawn at random (fixed seed). Stops by itself.
#
#   bash tests/soak.sh            # 20 runs: half an hour on 2 cores; not part of the tests
#   bash tests/soak.sh 5 7        # 5 runs with seed 7
#
# Prints a line for each run, then the sums. Exit status 0 only if no trial was lost and nothing was left.
set -euo pipefail

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
    sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
fi
RUNS=${1:-20}
SEED=${2:-42}
[[ $RUNS =~ ^[1-9][0-9]?$ && $SEED =~ ^[0-9]{1,4}$ ]] || { echo "ERROR: '$*': give at most 99 runs and a seed of at most 4 digits" >&2; exit 2; }
REPO=$(CDPATH="" cd -P "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
HEAD=head_node_raytune_asha_hpo.slurm
FAULTS=(none time-limit worker-cancelled raylet-killed gcs-killed search-killed head-cancelled head-killed requeued)
MOMENTS=("joined" "  started" "epoch 1/")
TRIALS=2
completed=0 lost=0 left=0 missed=0 memory_first="" drawn_first=""

DIR=$(mktemp -d /tmp/soak.XXXX)
trap 'MINI_SLURM_DIR=$DIR/slurm bash "$REPO/tests/mini_slurm.sh" down 2>/dev/null; rm -rf "$DIR"' EXIT
bash "$REPO/scripts/setup_env.sh"
mkdir "$DIR/repo"
cp -r "$REPO/scripts" "$REPO/experiments" "$DIR/repo"
find "$DIR/repo/experiments" \( -name '*.out' -o -path '*/runs/*' \) -delete   # not those of earlier jobs of the same number
ln -s "$REPO/.venv" "$DIR/repo/.venv"
"$REPO/.venv/bin/python" "$REPO/scripts/demo_assets.py" "$DIR/demo" >/dev/null
conf=$(MINI_SLURM_DIR=$DIR/slurm bash "$REPO/tests/mini_slurm.sh" up 2>/dev/null) && eval "$conf"
cd "$DIR/repo/experiments/raytune/scheduler/asha"
export MODEL_NAME=$DIR/demo/model SQUAD_DATA=$DIR/demo/squad TRAIN_SAMPLES=32 EVAL_SAMPLES=16 NUM_EPOCHS=2 NUM_SAMPLES=$TRIALS
export LR_LOWER=1e-4 LR_UPPER=5e-2 CPUS_PER_WORKER=4

until_true() {                                               # until_true SECONDS COMMAND...
    local end=$((SECONDS + $1))
    until "${@:2}"; do
        ((SECONDS < end)) || return 1
        sleep 0.2
    done
}
log_of() { echo "logs/ray_head_bloom_5epochs-$1.out"; }
log_has() { grep -q -- "$2" "$(log_of "$1")" 2>/dev/null; }
state() { scontrol show job "$1" | sed -n 's/.*JobState=\([A-Z_]*\).*/\1/p'; }
ended() { [[ $(state "$1") =~ ^(COMPLETED|FAILED|CANCELLED|TIMEOUT|NODE_FAIL)$ ]]; }
mine() {                                                     # processes of any job of this sandbox, those that left its process tree, too
    { grep -lzsFx "SLURM_CONF=$DIR/slurm/slurm.conf" /proc/[0-9]*/environ || true; } |
        { xargs -r grep -lzsE '^SLURMD_NODENAME=' || true; } | cut -d/ -f3
}
declare -A folders=()                                        # Ray's temporary folders of this sandbox: other Slurms use the same job ids
watch_run() {                                                # peak of the head's memory, and the folders, while a run works
    local folder now
    for folder in $(mine | sed 's,.*,/proc/&/cmdline,' | xargs -r cat 2>/dev/null | tr '\0' '\n' | grep -oE '/tmp/ray_[^/ ]+' | sort -u); do
        folders[$folder]=yes
    done
    now=$(memory)
    ((now <= peak)) || peak=$now
}
pending() { [[ $(state "$1") == PENDING ]]; }
ended_watched() { watch_run; ended "$1"; }
no_jobs() { [[ -z $(squeue --noheader) ]]; }
nothing_left() { no_jobs && [[ -z $(mine) ]]; }
of_role() { grep -lzsE "^HPO_OWNER=$DIR.* $1 " /proc/[0-9]*/environ | cut -d/ -f3 || true; }
kill_those() {                                               # kill_those ROLE WORD: processes of a role with a word in their command line
    local pid
    for pid in $(of_role "$1"); do
        if { tr '\0' ' ' <"/proc/$pid/cmdline"; } 2>/dev/null | grep -q -- "$2"; then kill -s KILL "$pid" 2>/dev/null || true; fi
    done
}
memory() {                                                   # MB of the head's processes
    local pid
    for pid in $(of_role head); do awk '/^RssAnon/ { print $2 }' "/proc/$pid/status" 2>/dev/null; done | awk '{ s += $1 } END { printf "%d", s / 1024 }'
}

inject() {                                                   # inject FAULT JOB
    local worker
    worker=$(sed -n 's/.*submitted worker .*: job \([0-9]*\),.*/\1/p' "$(log_of "$2")" | tail -n 1)
    case $1 in
        none) ;;
        worker-cancelled) scancel "$worker" || true ;;
        raylet-killed) kill_those worker raylet/raylet ;;
        gcs-killed) kill_those head gcs/gcs_server ;;
        search-killed) kill_those head raytune_asha_hpo.py ;;
        head-cancelled) scancel "$2" ;;
        time-limit) scontrol update JobId="$2" TimeLimit=3 ;;   # --signal=B:TERM@120: a minute after its start
        head-killed) scancel --signal=KILL --batch "$2" ;;   # the batch shell alone
        requeued)
            scontrol requeue "$2"
            if until_true 60 pending "$2"; then scontrol update JobId="$2" StartTime=now; fi
            ;;
    esac
}

RANDOM=$SEED
for ((run = 1; run <= RUNS; run++)); do
    fault=${FAULTS[RANDOM % ${#FAULTS[@]}]} moment=${MOMENTS[RANDOM % ${#MOMENTS[@]}]} begin=$SECONDS parts=1 peak=0
    job=$(sbatch --parsable "$HEAD")
    until_true 180 log_has "$job" "$moment" || { echo "run $run: '$moment' did not come"; missed=$((missed + 1)); }
    inject "$fault" "$job"
    until_true 300 ended_watched "$job" || scancel "$job" || true
    folder=$(ls -d runs/"$job" 2>/dev/null || true)
    while ! log_has "$job" "Best Trial Result" && ((parts < 4)) && [[ -n $folder ]]; do   # a student submits the line at the log's end
        until_true 60 nothing_left || true
        parts=$((parts + 1))
        if grep -qs '"event": "settings"' "$folder/events.jsonl"; then export RESUME=$folder; fi
        job=$(sbatch --parsable "$HEAD")
        unset RESUME
        until_true 300 ended_watched "$job" || scancel "$job" || true
    done
    # Rows of the last table: each trial once, ended, with a loss; and all runs draw the same configurations (one SEED).
    rows=$(tac "$(log_of "$job")" | sed '/ START /q' | grep -E '^\| TorchTrainer_\S+ +\| TERMINATED ' || true)
    done_trials=$(awk -F'|' '$8 >= 1 && $10 ~ /[0-9]/ && !seen[$2]++' <<<"$rows" | wc -l)
    drawn=$(awk -F'|' '{ print $5, $6, $7 }' <<<"$rows" | sort)
    [[ -n $drawn_first ]] || drawn_first=$drawn
    ((done_trials >= TRIALS)) || lost=$((lost + TRIALS - done_trials))
    if ((done_trials == TRIALS)) && [[ $drawn == "$drawn_first" ]]; then completed=$((completed + 1)); fi
    [[ -n $memory_first ]] || memory_first=$peak
    memory_last=$peak
    until_true 60 nothing_left || true
    rest=$(($(mine | wc -l) + $(squeue --noheader | wc -l) + $(for folder in "${!folders[@]}"; do [[ ! -e $folder ]] || echo "$folder"; done | wc -l)))
    left=$((left + rest))
    echo "run $run/$RUNS: $fault at '${moment# *}': $done_trials of $TRIALS trials, $parts job(s), $((SECONDS - begin)) s, left behind: $rest"
done
echo "runs completed: $completed of $RUNS; trials lost: $lost; processes, folders and jobs left: $left; head memory: first run $memory_first MB, last $memory_last MB"
((completed == RUNS && lost == 0 && left == 0 && missed == 0))
