#!/bin/bash
# The test command: sets up all that the tests need on a Debian or Ubuntu machine, then lints and runs them.
#
#   bash tests/run.sh                       # everything
#   bash tests/run.sh -k objective          # what follows goes to pytest
#
# As root it installs Slurm, shellcheck, Chromium and bindfs from the distribution's packages if they are missing;
# else it says how.
set -euo pipefail

REPO=$(CDPATH="" cd -P "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$REPO"
# Settings of the person who runs the tests must not reach them.
unset LR_LOWER LR_UPPER BS_CHOICES WD_CHOICES WORKER_NODES NUM_SAMPLES NUM_EPOCHS MODEL_NAME SQUAD_DATA \
    TRAIN_SAMPLES EVAL_SAMPLES CHAT_TEMPLATE WORKERS_PER_TRIAL CPUS_PER_WORKER GPUS_PER_WORKER MEMORY_PER_WORKER PRECISION \
    SEARCH_SCRIPT WORKER_DEADLINE SEED RESUME NODE_ADDRESS "${!MINI_SLURM_@}" "${!RAY_@}" "${!SLURM_@}" "${!SBATCH_@}"

bash scripts/setup_env.sh

missing=()                                                   # Slurm is installed by mini_slurm.sh
for tool in shellcheck chromium bindfs; do
    command -v "$tool" >/dev/null || missing+=("$tool")
done
if ((${#missing[@]})); then
    if ((UID != 0)); then
        echo "ERROR: ${missing[*]} missing; run: sudo apt-get install -y ${missing[*]}" >&2
        exit 1
    fi
    (apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${missing[@]}") >&2
fi

.venv/bin/ruff check --extend-select E501 --line-length 120 .
git ls-files -z '*.sh' '*.slurm' .ci/run | xargs -0 shellcheck -x
# Two files at a time: much of it is waiting. Those that take longest first, so that at the end both are busy.
exec .venv/bin/python -m pytest -p no:cacheprovider -n 2 --dist loadfile --no-loadscope-reorder "$@" \
    tests/test_{run,faults,exercises,fast_trials,architectures,neighbours,training,nobody_let_in}.py tests/test_*.py
