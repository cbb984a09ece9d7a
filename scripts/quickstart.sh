#!/bin/bash
# The whole exercise on this machine, no cluster and no GPU needed: environment, demo model and data, search, result.
#
#   bash scripts/quickstart.sh
#   NUM_SAMPLES=4 LR_UPPER=1e-2 bash scripts/quickstart.sh       # every variable of the exercise works here too
[[ $(<"$0") != *$'\r'* ]] || { echo "ERROR: Windows line ends; clone on Linux, or dos2unix $0" >&2; exit 1; }  # \r
set -euo pipefail

REPO=$(CDPATH="" cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ ${1:-} == --help || ${1:-} == -h ]]; then
    sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
fi

bash "$REPO/scripts/setup_env.sh"
"$REPO/.venv/bin/python" "$REPO/scripts/demo_assets.py" "$REPO/.demo"

# The demo model is tiny and starts from random weights, so it learns at higher rates than BLOOM-560M does.
export MODEL_NAME=${MODEL_NAME:-$REPO/.demo/model} SQUAD_DATA=${SQUAD_DATA:-$REPO/.demo/squad}
export TRAIN_SAMPLES=${TRAIN_SAMPLES:-160} EVAL_SAMPLES=${EVAL_SAMPLES:-50}
export LR_LOWER=${LR_LOWER:-1e-4} LR_UPPER=${LR_UPPER:-5e-2}
# One process and one CPU, or GPU, for each trial: so many of them at once as there are.
export WORKERS_PER_TRIAL=${WORKERS_PER_TRIAL:-1} CPUS_PER_WORKER=${CPUS_PER_WORKER:-1}
exec bash "$REPO/experiments/raytune/scheduler/asha/head_node_raytune_asha_hpo.slurm"
