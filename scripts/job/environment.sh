# shellcheck shell=bash
# What a job's environment is, whatever the site, its modules and the user's shell have set. Sourced by ray_job.sh.

if [[ $OSTYPE != linux* ]]; then
    echo "ERROR: OSTYPE=$OSTYPE: this runs on Linux only; on Windows use WSL2, on a Mac another machine" >&2
    exit 1
fi

# What other programs print is read here, so it must look the same everywhere.
export LC_ALL=C.UTF-8
unset "${!SQUEUE_@}" "${!SINFO_@}" "${!GREP_@}" SLURM_TIME_FORMAT LANGUAGE POSIXLY_CORRECT BASH_ENV CDPATH GLOBIGNORE
if [[ -n ${LD_PRELOAD:-} && -n $(env true 2>&1) ]]; then  # else each process complains
    echo "LD_PRELOAD=$LD_PRELOAD cannot be loaded on this node, so it is unset"
    unset LD_PRELOAD
fi
# A worker job is submitted by the lines of its file; only the site's defaults for resources stay.
unset SBATCH_WAIT SBATCH_ARRAY_INX SBATCH_EXPORT SBATCH_OUTPUT SBATCH_ERROR SBATCH_INPUT \
    SBATCH_JOB_NAME SBATCH_OPEN_MODE
# What would change the training, or how its processes find one another. A trial trains within one node: the network
# that a site names for training across nodes is not needed, and if this node lacks it, no trial would start.
unset "${!RAY_@}" "${!TUNE_@}" "${!OMP_@}" "${!KMP_@}" "${!GOMP_@}" "${!MKL_@}" "${!OMPI_@}" "${!PMI_@}" \
    "${!PMIX_@}" "${!MV2_@}" "${!ACCELERATE_@}" "${!FSDP_@}" "${!TORCHELASTIC_@}" "${!DS_@}" MASTER_ADDR MASTER_PORT \
    RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME TP_SOCKET_IFNAME MPLBACKEND
if [[ -n ${ROCR_VISIBLE_DEVICES:-} ]]; then             # Slurm's name of AMD's GPUs, with which Ray does not start
    export HIP_VISIBLE_DEVICES=${HIP_VISIBLE_DEVICES:-$ROCR_VISIBLE_DEVICES}
    unset ROCR_VISIBLE_DEVICES
fi
# Python: the course's environment, and no packages from elsewhere in place of its own, such as those of ~/.local.
for variable in "${!PYTHON@}"; do
    [[ $variable == PYTHON || $variable == PYTHONPATH ]] || unset "$variable"
done
export PYTHONNOUSERSITE=1

check_container() {                                    # what a run needs of it beyond the packages
    local same said look='import os, sys; os.stat(sys.argv[1]); print(input(), *map(os.readlink, sys.argv[2:]))'
    same="stdin $(readlink /proc/self/ns/pid) $(readlink /proc/self/ns/net)"
    said=$(python -c "$look" "$REPO" /proc/self/ns/{pid,net} <<<stdin 2>&1 | tail -n 1) || true
    [[ $said == "$same" ]] ||
        fail "CONTAINER=$CONTAINER: inside are not the same /tmp, $REPO, standard input, network and process ids" \
            "($said); see \"In a container\" in INSTRUCTORS.md"
}

check_venv() {                                         # this node can lack its Python, or a library of that
    local python=$REPO/.venv/bin/python said
    said=$(env "$python" -c "" 2>&1) ||
        fail "${SLURMD_NODENAME:-$(hostname -s)}: ${said##*$'\n'} ($(readlink -m "$python")); take one that all" \
            "nodes have: rm -rf $REPO/.venv; PYTHON=/usr/bin/python3 bash $REPO/scripts/setup_env.sh"
}

choose_python() {                                      # of the container, the repository's .venv, or the active one
    if [[ -n ${CONTAINER:-} ]]; then
        export CONTAINER PATH="$REPO/scripts/job/container:$PATH"
        check_container
    elif [[ -e $REPO/.venv || -L $REPO/.venv ]]; then
        check_venv
        export PATH="$REPO/.venv/bin:$PATH"
    fi
    [[ $(command -v python) != *" "* ]] ||
        fail "$(command -v python): Ray does not start from a path with a space; rename or move that folder"
    command -v python >/dev/null || fail "no python found; run: bash $REPO/scripts/setup_env.sh"
    if [[ -n ${PYTHONPATH:-} ]]; then                  # a module's, say: it serves what the environment does not have
        export PYTHONPATH
        PYTHONPATH=$(env -u PYTHONPATH python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'):$PYTHONPATH
    fi
}

prepare_training() {                                   # every process that trains
    # Other scripts, and the processes of Ray, import the lesson.
    export PYTHONPATH="$REPO/scripts/raytune_hpo/raytune_asha_scheduler${PYTHONPATH:+:$PYTHONPATH}"
    export GLOO_SOCKET_IFNAME=lo NCCL_SOCKET_IFNAME=lo # a trial does not leave its node: no other network can be wrong
    export PYTORCH_NVML_BASED_CUDA_CHECK=1             # asking whether there are GPUs must not initialise CUDA
    export TORCHDYNAMO_DISABLE=1                       # else DeepSpeed loads torch's compiler: 1.3 s a process
    # On CPUs glibc keeps freed memory: fresh pages took a third of a step. With GPUs, the first copy of the model, too.
    [[ ${Gw:-0} != 0 ]] || export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1
    export GOMP_SPINCOUNT=1000                         # else trials that share cores can take 30 times as long
    export TOKENIZERS_PARALLELISM=false                # else it warns at every fork
    export TRANSFORMERS_VERBOSITY=error HF_HUB_DISABLE_PROGRESS_BARS=1   # the log is for results
}

prepare_cluster() {                                    # prepare_cluster ADDRESS...: Ray's processes; no proxy to these
    no_proxy=$(IFS=,; echo "${no_proxy:+$no_proxy,}localhost,127.0.0.1,$*")
    export no_proxy NO_PROXY=$no_proxy no_grpc_proxy=$no_proxy
    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$HEAD_DIR/token"   # who cannot read the file cannot connect
    # A node that does not answer for 18 s, its cable being out, say, is given up. It bears to be without head as long.
    export RAY_health_check_period_ms=1000 RAY_health_check_timeout_ms=2000 RAY_health_check_failure_threshold=6
    export RAY_gcs_rpc_server_reconnect_timeout_s=20
    export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0     # and at once when they are told to
    export RAY_SCHEDULER_EVENTS=0 RAY_USAGE_STATS_ENABLED=0           # nothing in the log that is not for students
    export DASHBOARD_METRIC_PORT=-1 RAY_enable_metrics_collection=0   # no ports: these would ask nobody for the token
    export RAY_prestart_worker_first_driver=0          # start processes when a trial needs them, not while nodes join
    export RAY_TRAIN_METRICS_ENABLED=0                 # nobody collects them
    export RAY_TRAIN_HEALTH_CHECK_INTERVAL_S=0.2       # a report reaches Tune within half a second instead of two
    # Imports from a busy shared file system can take minutes, and are no error.
    export RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S=600 RAY_worker_register_timeout_seconds=600
    export RAY_agent_register_timeout_ms=600000 RAY_DASHBOARD_STARTUP_TIMEOUT_S=600
    export RAY_DASHBOARD_SUBPROCESS_MODULE_WAIT_READY_TIMEOUT=600
    # Ray would count all memory of the node, other users' too, and kill trials. Slurm minds that of the job.
    [[ -z $ON_SLURM ]] || export RAY_memory_monitor_refresh_ms=0
    export RAY_TRAIN_ENABLE_PRINT_PATCH=0              # else every line of a worker appears twice
    export RAY_TRAIN_ENABLE_PREEMPTION_WATCHER=0       # it asks for notices that only clouds send
    export TUNE_WARN_THRESHOLD_S=60                    # no warnings that the machine is busy: it is
}
