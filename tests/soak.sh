#!/bin/bash
# Many small runs one after another on the sandbox, each with a fault drawn at random (fixed seed). Stops by itself.
#
#   bash tests/soak.sh            # 20 runs: half an hour on 2 cores; not part of the tests. As root
#   bash tests/soak.sh 5 7        # 5 runs with seed 7
#
# Prints a line for each run, then the sums. Exit status 0 only if no trial was lost and nothing was left.
set -euo pipefail

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
    sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
fi
RUNS=${1:-20} SEED=${2:-42}
REPO=$(CDPATH="" cd -P "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
HEAD=head_node_raytune_asha_hpo.slurm
FAULTS=(none time-limit worker-cancelled raylet-killed gcs-killed search-killed head-cancelled head-killed requeued
    worker-power-cut worker-cable-cut head-power-cut head-cable-cut)
MOMENTS=("joined" "  started" "epoch 1/")
TRIALS=2 completed=0 lost=0 left=0 missed=0 memory_first=""

DIR=$(mktemp -d /tmp/soak.XXXX)
export MINI_SLURM_DIR=$DIR/slurm MINI_SLURM_SHARED=$DIR MINI_SLURM_FIRST_JOB=$(($$ % 9000 * 1000 + 1))
sandbox() { bash "$REPO/tests/mini_slurm.sh" "$@" 2>/dev/null; }
trap 'sandbox down; rm -rf "$DIR"' EXIT
bash "$REPO/scripts/setup_env.sh"
mkdir "$DIR/repo"
cp -r "$REPO/scripts" "$REPO/experiments" "$DIR/repo"
find "$DIR/repo/experiments" \( -name '*.out' -o -path '*/runs/*' \) -delete   # those of earlier jobs
ln -s "$REPO/.venv" "$DIR/repo/.venv"
"$REPO/.venv/bin/python" "$REPO/scripts/demo_assets.py" "$DIR/demo" >/dev/null
conf=$(sandbox up) && eval "$conf"
sandbox on head true || { echo "the sandbox's nodes are no machines of their own here (see mini_slurm.sh)" >&2; exit 2; }
in_tmp() { ls -d "$DIR"/slurm/nodes/*/tmp/*; }               # of all nodes
shared=$(in_tmp)
cd "$DIR/repo/experiments/raytune/scheduler/asha"
export MODEL_NAME=$DIR/demo/model SQUAD_DATA=$DIR/demo/squad TRAIN_SAMPLES=32 EVAL_SAMPLES=16 NUM_EPOCHS=2
export NUM_SAMPLES=$TRIALS LR_LOWER=1e-4 LR_UPPER=5e-2 CPUS_PER_WORKER=4

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
pending() { [[ $(state "$1") == PENDING ]]; }
mine() {                                                     # processes of this sandbox's jobs, also outside their tree
    { grep -lzsFx "SLURM_CONF=$DIR/slurm/slurm.conf" /proc/[0-9]*/environ || true; } |
        { xargs -r grep -lzsE '^SLURMD_NODENAME=' || true; } | cut -d/ -f3
}
nothing_left() { [[ -z $(squeue --noheader)$(mine) ]]; }
of_role() { grep -lzsE "^HPO_OWNER=$DIR.* $1 " /proc/[0-9]*/environ | cut -d/ -f3 || true; }
kill_those() {                                               # kill_those ROLE WORD: those with it in their command line
    local pid
    for pid in $(of_role "$1"); do
        ! grep -qs -- "$2" "/proc/$pid/cmdline" || kill -s KILL "$pid"
    done
}
ended() {                                                    # also notes the head's peak of memory
    local now
    now=$(of_role head | sed 's,.*,/proc/&/status,' | xargs -r grep -hs ^RssAnon | awk '{ kb += $2 } END { print kb }')
    ((now / 1024 <= peak)) || peak=$((now / 1024))
    [[ $(state "$1") =~ ^(COMPLETED|FAILED|CANCELLED|TIMEOUT|NODE_FAIL)$ ]]
}

requeued() { until_true 90 pending "$1" && scontrol update JobId="$1" StartTime=now; }
inject() {                                                   # inject FAULT JOB
    local worker node
    worker=$(sed -n 's/.*submitted worker .*: job \([0-9]*\),.*/\1/p' "$(log_of "$2")" | tail -n 1)
    node=$(scontrol show job "$worker" | sed -n 's/^ *NodeList=//p')
    case $1 in
        worker-cancelled) scancel "$worker" ;;
        raylet-killed) kill_those worker raylet/raylet ;;
        gcs-killed) kill_those head gcs/gcs_server ;;
        search-killed) kill_those head raytune_asha_hpo.py ;;
        head-cancelled) scancel "$2" ;;
        time-limit) scontrol update JobId="$2" TimeLimit=3 ;;   # --signal=B:TERM@120: a minute after its start
        head-killed) scancel --signal=KILL --batch "$2" ;;   # the batch shell alone
        requeued) scontrol requeue "$2" && requeued "$2" ;;
        worker-power-cut) off=$node && sandbox power-off "$node" ;;
        worker-cable-cut) sandbox cut "$node"; sleep 30; sandbox heal "$node" ;;
        head-power-cut) sandbox power-off head; sleep 10; sandbox restart head && requeued "$2" ;;
        head-cable-cut) sandbox cut head; sleep 10; sandbox heal head ;;
    esac
}

RANDOM=$SEED
for ((run = 1; run <= RUNS; run++)); do
    fault=${FAULTS[RANDOM % ${#FAULTS[@]}]} moment=${MOMENTS[RANDOM % ${#MOMENTS[@]}]} begin=$SECONDS parts=1 peak=0 off=""
    job=$(sbatch --parsable "$HEAD")
    until_true 180 log_has "$job" "$moment" || { echo "run $run: '$moment' did not come"; missed=$((missed + 1)); }
    inject "$fault" "$job" || true                           # it may have ended meanwhile
    folder=runs/$job
    while true; do
        until_true 300 ended "$job" || scancel "$job" || true
        [[ -z $off ]] || sandbox restart "$off"
        until_true 60 nothing_left || true
        if log_has "$job" "Best Trial Result" || ((parts == 4)) || [[ ! -d $folder ]]; then break; fi
        parts=$((parts + 1))                                 # as a student continues it
        if grep -qs '"event": "settings"' "$folder/events.jsonl"; then export RESUME=$folder; fi
        job=$(sbatch --parsable "$HEAD")
        unset RESUME
    done
    # Rows of the last table: each trial once, ended, with a loss.
    rows=$(tac "$(log_of "$job")" | sed '/ START /q' | grep -E '^\| TorchTrainer_\S+ +\| TERMINATED ' || true)
    done_trials=$(awk -F'|' '$8 >= 1 && $10 ~ /[0-9]/ && !seen[$2]++' <<<"$rows" | wc -l)
    completed=$((completed + (done_trials == TRIALS)))
    lost=$((lost + TRIALS - done_trials))
    memory_first=${memory_first:-$peak}
    rest=$({ mine; squeue --noheader; in_tmp; } | grep -vcxF -- "$shared" || true)
    left=$((left + rest))
    echo "run $run/$RUNS: $fault at '${moment# *}': $done_trials of $TRIALS trials, $parts job(s)," \
        "$((SECONDS - begin)) s, left behind: $rest"
done
echo "runs completed: $completed of $RUNS; trials lost: $lost; processes, folders and jobs left: $left;" \
    "head memory: first run $memory_first MB, last $peak MB"
((completed == RUNS && lost == 0 && left == 0 && missed == 0))
