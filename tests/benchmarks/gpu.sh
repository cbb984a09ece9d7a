#!/bin/bash
# What the exercise makes of this machine's GPUs: start, precisions, training step, sharing, memory, turnover.
#
#   bash tests/benchmarks/gpu.sh             # at most ten minutes; one GPU is enough, two are used
#
# The model is BLOOM's 560M configuration with random weights, made here: nothing is downloaded. Nothing else should run.
set -euo pipefail

REPO=$(CDPATH="" cd -P "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# shellcheck source=SCRIPTDIR/../../scripts/job/ray_job.sh
source "$REPO/scripts/job/ray_job.sh"
choose_python
WORK=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf "$WORK"' EXIT

WORKERS_PER_TRIAL=1 look_at_node
((GPUS > 0)) || fail "no GPU that PyTorch can use on this machine"
W=$((GPUS > 1 ? 2 : 1))
prepare_training
date +%F
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | head -n "$W"
python -c 'import torch, deepspeed, ray, transformers as t; print("torch", torch.__version__, "deepspeed", deepspeed.__version__, "ray", ray.__version__, "transformers", t.__version__)' 2>/dev/null

python -m torch.distributed.run --standalone --nproc_per_node="$W" "$REPO/tests/benchmarks/gpu.py" "$WORK" 2>"$WORK/errors" ||
    fail "gpu.py: $(grep -E '^[A-Za-z_.]*Error|^ERROR' "$WORK/errors" | tail -n 1)"

echo
echo "Trials that share the first GPU (the first of four asks for too much): each one's samples/s, and all together"
for trials in 1 2 4 8; do
    fits=$(MODEL_PARAMETERS=559214592 python "$REPO/scripts/job/worker_capacity.py" --slots --W 1 --Cw 1 --Cnode 100 \
        --Gnode 1 --Mw 0 --Gw "$(python -c "print(1 / $trials)")" --Mcard "$CARD")
    [[ $fits == "$trials" ]] || { echo "$trials: $fits"; break; }
    for ((i = 1; i <= trials; i++)); do
        RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT=$(free_port) CUDA_VISIBLE_DEVICES=0 \
            timeout 400 python "$REPO/tests/benchmarks/gpu.py" "$WORK" "$i" "$trials" >"$WORK/share-$trials-$i" 2>"$WORK/errors-$i" &
    done
    wait
    awk -v n="$trials" '{ sum += $1; print n ": " $0 } END { print n ": together " sum " samples/s" }' \
        "$WORK/share-$trials"-*
done

echo
echo "A search with that model, three trials of up to two epochs: memory of the first card, each 0.2 s"
echo
(while sleep 0.2; do nvidia-smi --id=0 --query-gpu=memory.used --format=csv,noheader,nounits; done) >"$WORK/memory" &
(
    export MODEL_NAME=$WORK/model SQUAD_DATA=$WORK/squad TRAIN_SAMPLES=64 EVAL_SAMPLES=16 NUM_SAMPLES=3 NUM_EPOCHS=2 WORKERS_PER_TRIAL=$W
    cd "$REPO/experiments/raytune/scheduler/asha"
    bash head_node_raytune_asha_hpo.slurm | grep -E 'ERROR|this node|search \|'
)
echo "MiB, and how many looks in a row found it: $(uniq -c "$WORK/memory" | awk '{ printf "%s%s (%s)", sep, $2, $1; sep = ", " }')"

echo
python "$REPO/tests/benchmarks/quickstart.py"
