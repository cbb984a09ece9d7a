# shellcheck shell=bash
# What the .slurm scripts share: log, record, the node's resources, starting Ray, and ending exactly what they started.
# They set ROLE (head, worker, manual or save) and REPO (top of the repository) before they source this file, RUN_DIR
# once there is a run folder, and HEAD_DIR, the folder in it of one start of a head and its workers. It sets JOB: this
# job's name, unique on the cluster (Slurm job id, or local-...).

# shellcheck source=SCRIPTDIR/environment.sh
source "$REPO/scripts/job/environment.sh"
export ON_SLURM=""                                     # started by sbatch? Then Slurm runs a copy of this name; inside
[[ ${0##*/} != slurm_script ]] || ON_SLURM=yes         # salloc or JupyterHub there is a job id, and nothing to submit
on_slurm() { [[ -n $ON_SLURM ]]; }
JOB=local-$(date +%m%d-%H%M%S)-$$
! on_slurm || JOB=$SLURM_JOB_ID
RECORD="" AT="" TEE="" WATCH="" RAY="" RAY_TMP="" HEAD_ADDRESS="" HEAD_DIR=""   # not somebody else's variables
PATIENCE=60                                            # seconds for a controller that is too busy to answer

# ---- The log ---------------------------------------------------------------------------------------------------------
open_log() {                                           # open_log logs/NAME: sets LOG, the file of --output
    LOG=$(readlink "/proc/$$/fd/1")
    if ! on_slurm; then                                # terminal and log file, as Slurm would write it
        LOG=$1-$JOB.out
        exec > >(trap '' HUP; exec tee -ip "$LOG") 2>&1   # goes on writing when the terminal is closed
        TEE=$!                                         # finish waits for it
    fi
}

banner() {                                             # banner START|FINISH; for the record: this MOMENT, and as TEXT
    MOMENT=$(date +%s.%3N)
    TEXT=$(date -d "@$MOMENT" '+%Y-%m-%d %H:%M:%S %Z')
    printf '===== JOB %s %-6s : %s =====\n' "$JOB" "$1" "$TEXT"
}

say() {                                                # one line of the log, with time, role and host
    printf '%s %s %s | %s\n' "$(date +%T)" "$ROLE" "${SLURMD_NODENAME:-$(hostname -s)}" "$*"
}

fail() {                                               # the cause and the fix, then the end
    printf 'ERROR: %s\n' "$*" >&2
    exit 1
}

# on_signal COMMAND SIGNAL...: a trap. If the signal comes at a $(...), bash 5.2 reads it as a part of that, up to a
# parenthesis; and without one it does nothing.
on_signal() { trap "$1"$'\n)' "${@:2}"; }

frame_the_log() {                                      # START now, FINISH in every ending but kill -9
    trap finish EXIT
    on_signal "exit 143" TERM
    on_signal "exit 130" INT
    on_signal "exit 129" HUP                           # the terminal was closed
    banner START
    own_folder
}

# Unix sockets allow 107 characters, of which Ray needs about 60: a short folder, on a local disk, ours alone. Ray opens
# its own folder to all users, so that one lies inside. What libraries leave behind goes with it.
own_folder() {
    { RAY_TMP=$(mktemp -d "/tmp/ray_$JOB.XXXX") && mkdir "$RAY_TMP/tmp" &&
        head -c 20000000 /dev/zero >"$RAY_TMP/tmp/room"; } 2>/dev/null ||
        fail "/tmp of ${SLURMD_NODENAME:-$(hostname -s)} has no room for 20 MB; remove what is yours there, or ask your site"
    rm "$RAY_TMP/tmp/room"
    export RAY_TMP                                     # for container/python
}

finish() {                                             # first the script's own before_finish STATUS, if it has one
    local status=$?
    trap '' TERM INT HUP                               # a second signal must not cut the clean-up short
    set +e
    disown -a                                          # else bash reports in the log what a signal has ended
    PATIENCE=3                                         # Slurm kills what is still there 30 s (KillWait) after TERM
    ! declare -F before_finish >/dev/null || before_finish "$status"
    end_owned
    banner FINISH
    AT=$MOMENT record finished status: "$status" finish "$TEXT"
    if [[ -n $TEE ]]; then
        exec >&- 2>&-                                  # tee ends once nobody writes to it: then the log is complete
        wait "$TEE"
    fi
    exit "$status"
}

# ---- The run folder and its record -----------------------------------------------------------------------------------
no_room() {                                            # no_room FOLDER: what to tell the user
    echo "cannot write to the run folder $1; is the disk full, or the quota reached?"
}

new_folder() {                                         # new_folder HERE: prints the path of a new run's folder
    local folder=$1/runs/$JOB                          # Slurm can give a job id again, say in a new sandbox
    [[ ! -e $folder ]] || folder+=-$(date +%m%d-%H%M%S)
    echo "$folder"
}

publish() {                                            # publish NAME: its input as a file, whole from the beginning
    { cat >"$HEAD_DIR/.$1" && mv "$HEAD_DIR/.$1" "$HEAD_DIR/$1"; } 2>/dev/null || fail "$(no_room "$RUN_DIR")"
}

# What one node tells the other by a file in HEAD_DIR. A network file system that has been asked for a file believes for
# up to a minute that there is none. So nobody asks for it by name before it is in the listing of its folder.
is_told() {                                            # is_told NAME
    local file
    for file in "$HEAD_DIR"/*; do [[ ${file##*/} != "$1" ]] || return 0; done
    return 1
}

LOOKED_AFRESH=""
look_afresh() {                                        # NFS keeps a listing, too, until this node changes the folder
    [[ $LOOKED_AFRESH == "$SECONDS" ]] || { : >"$HEAD_DIR/.look-$JOB" && rm -f "$HEAD_DIR/.look-$JOB"; } 2>/dev/null
    LOOKED_AFRESH=$SECONDS
}

# A head that Slurm has lost, and therefore started again elsewhere, may be alive: the run is that of the latest start.
is_superseded() {                                      # is there a later head-N than HEAD_DIR?
    local other
    [[ -n $HEAD_DIR ]] || return 1
    for other in "$RUN_DIR"/head-*; do
        ((${other##*-} <= ${HEAD_DIR##*-})) || return 0
    done
    return 1
}

begin_record() {                                       # begin_record KIND: from now on this job adds to it
    local name pairs=()
    RECORD=$RUN_DIR/events.jsonl
    AT=$MOMENT record started job "$JOB" script "$SCRIPT" log "$LOG" start "$TEXT" kind "$1"
    while IFS='= ' read -r _ name _; do                # export NAME=...
        [[ $name == @(SEARCH_SCRIPT|MODEL_PARAMETERS) ]] || pairs+=("$name" "${!name}")
    done <<<"$SETTINGS"
    record settings "${pairs[@]}"
    recorded settings "$RUN_DIR" || fail "$(no_room "$RUN_DIR")"
}

# record EVENT [NAME VALUE]...: one line, in one write, with the time AT or now. A value is text; that of a NAME: with a
# colon is JSON already, such as a number. If the disk is full, this line is lost and nothing else.
record() {
    [[ -n $RECORD ]] && ! is_superseded || return 0
    local name value code line
    line="{\"time\": \"$(date -u ${AT:+-d "@$AT"} +%Y-%m-%dT%H:%M:%S.%3NZ)\", \"event\": \"$1\""
    shift
    while (($#)); do
        name=$1 value=$2
        shift 2
        if [[ $name != *: ]]; then
            value=${value//\\/"\\\\"}
            value=${value//\"/"\\\""}
            while [[ $value =~ [[:cntrl:]] ]]; do
                printf -v code '\\u%04x' "'${BASH_REMATCH[0]}"
                value=${value//"${BASH_REMATCH[0]}"/"$code"}
            done
            value="\"$value\""
        fi
        line+=", \"${name%:}\": $value"
    done
    [[ ! -s $RECORD || -z $(tail -c 1 "$RECORD") ]] || line=$'\n'$line   # the last one was cut off
    { printf '%s}\n' "$line" >>"$RECORD"; } 2>/dev/null || true
}

record_worker() {                                      # record_worker JOB NODE CPUS GPUS SLOTS WORDS
    record worker_joined job "$1" node "$2" cpus: "$3" gpus: "$4" precision "${6##* }" slots: "$5" words "$6"
}

recorded() { grep -q "\"event\": \"$1\"" "$2/events.jsonl" 2>/dev/null; }   # recorded EVENT RUN_FOLDER

# ---- Slurm -----------------------------------------------------------------------------------------------------------
# ask COMMAND...: what squeue or scontrol answers. A controller that is too busy to answer is asked again for PATIENCE
# seconds. That it knows a job no more is an answer, too.
ask() {
    local answer status deadline=$((SECONDS + PATIENCE))
    until answer=$(timeout $((PATIENCE < 10 ? PATIENCE : 10)) "$@" 2>&1); do
        status=$?
        [[ $answer != *"Invalid job id"* ]] || break
        { ((status == 124)) || is_busy "$answer"; } && ((SECONDS < deadline)) || return 1
        sleep 1
    done
    printf '%s\n' "$answer"
}

# state_of JOB [PATIENCE]: its state and how often Slurm has started it again, say "RUNNING 0"; "UNKNOWN" if Slurm knows
# it no more. 1: no answer. Asked by its number: squeue's %i is another name for a job of an array, or for its part.
state_of() {
    local said
    said=$(PATIENCE=${2:-3} ask squeue --noheader --jobs="$1" --states=all --Format=JobID:20,State:20,RestartCnt:9) ||
        return 1
    awk -v job="$1" '$1 == job { state = $2 " " $3 } END { print state ? state : "UNKNOWN" }' <<<"$said"
}

# Slurm's words, and those of its libraries, for a controller that does not get to it.
is_busy() {
    grep -qiE 'timed out|unable to (contact|establish)|connection (refused|reset)|zero bytes|temporarily' <<<"$1"
}

job_id() {                                             # from sbatch's output, whatever a site adds to it
    sed -nE 's/^(Submitted batch job )?([0-9]+)(;.*| on cluster .*)?$/\2/p' <<<"$1" | tail -n 1
}

look_around() {                                        # was this job started as it is meant to be?
    local nodes
    if on_slurm && [[ ${SLURM_EXPORT_ENV:-ALL} != ALL* ]]; then
        say "WARNING: of the variables set in front of sbatch, RESUME included, none came here" \
            "but those of --export=$SLURM_EXPORT_ENV: sbatch --export=ALL"
    elif ! on_slurm && [[ -n ${SLURM_JOB_ID:-} ]]; then   # salloc, JupyterHub, a container of a job
        nodes=$(scontrol show hostnames 2>/dev/null) || true
        [[ -n ${SLURMD_NODENAME:-} || -z $nodes ]] || grep -qx "$(hostname -s)" <<<"$nodes" ||
            fail "SLURM_JOB_ID=$SLURM_JOB_ID: $(hostname -s) is not a node of this job ($(xargs <<<"$nodes"));" \
                "first srun --pty bash, or use sbatch"
        say "inside Slurm job $SLURM_JOB_ID, but not by sbatch: this node alone is used, and no jobs are submitted"
    fi
}

is_end() {                                             # is_end STATE: of state_of, one that no job comes back from?
    [[ $1 =~ ^(UNKNOWN|BOOT_FAIL|CANCELLED|COMPLETED|DEADLINE|FAILED|NODE_FAIL|OUT_OF_ME|PREEMPTED|REVOKED|TIMEOUT) ]]
}

# ---- This node -------------------------------------------------------------------------------------------------------
node_address() {                                       # the address other nodes reach this one at
    local name hosts address=${NODE_ADDRESS:-127.0.0.1}
    if [[ -z ${NODE_ADDRESS:-} ]] && on_slurm; then    # where Slurm itself reaches it; else as other nodes see it
        name=${SLURMD_NODENAME:-$(hostname -s)}
        hosts=$(ask scontrol show node "$name" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
        hosts+=" $(head_host) $(ask sinfo --noheader --Node --format=%o)"
        # shellcheck disable=SC2086  # one word a host
        address=$(python "$REPO/scripts/job/this_node.py" --address $hosts)
    fi
    echo "$address"
}

head_host() { sed -nE 's/^\[?([^]]*)\]?:[0-9]+$/\1/p' <<<"$HEAD_ADDRESS"; }   # of 10.0.0.1:6379, or [fd00::1]:6379

free_port() { python -c 'import socket; s = socket.create_server(("", 0)); print(s.getsockname()[1])'; }

# look_at_node: sets CPUS, GPUS, MEMORY, CARD (that of a GPU); Gw (GPUs of a trial's worker); NODE, in words
look_at_node() {
    local found
    found=$(python "$REPO/scripts/job/this_node.py") || exit 1
    read -r CPUS GPUS Gw MEMORY CARD NODE <<<"$found"
}

measure_node() {                                       # sets SLOTS (trials at once) and OFFER, which tells Ray, too
    local W=$WORKERS_PER_TRIAL Cw=$CPUS_PER_WORKER Csys=0 found why   # on a laptop Ray's own processes share the CPUs
    look_at_node
    ! on_slurm || Csys=2
    found=$(python "$REPO/scripts/job/worker_capacity.py" --slots --Csys "$Csys" \
        --Cnode "$CPUS" --Gnode "$GPUS" --Gw "$Gw" --Mnode "$MEMORY" --Mcard "$CARD")
    read -r SLOTS why <<<"$found"                      # why, if memory binds it
    if ((SLOTS == 0)) && ! on_slurm && [[ ${why:-} != GPUS* ]]; then
        SLOTS=1
        say "${why:-a trial asks for $((W * Cw)) CPUs and this machine has $CPUS}: one trial at a time, sharing them"
        why=""
    fi
    ((SLOTS > 0)) ||
        fail "no trial fits on this node: ${why:-it needs $Csys + $W*$Cw CPUs and $W*$Gw GPUs}; see worker_capacity.py"
    say "this node: $NODE, $SLOTS trial(s) at once${why:+: $why}"
    # shellcheck disable=SC2034  # for start_ray; Tune runs as many trials at once as there are trial_slots
    OFFER=(--num-cpus="$((SLOTS * W * Cw))" --num-gpus="$GPUS" --resources="{\"trial_slot\": $SLOTS}")
}

# share_gpus: for trials that share a GPU. They take turns on it, or compute at once by NVIDIA's MPS, where that runs. Its
# daemon has our mark: end_owned ends it.
share_gpus() {
    [[ $Gw == 0.* ]] || return 0
    local why="no nvidia-cuda-mps-control here" counted="$CPUS $GPUS" visible=${CUDA_VISIBLE_DEVICES:-} mps="$RAY_TMP/mps"
    if [[ $NODE == *MIG* ]]; then
        why="these are slices of a GPU"
    elif command -v nvidia-cuda-mps-control >/dev/null; then
        mkdir "$mps"
        export CUDA_MPS_PIPE_DIRECTORY=$mps CUDA_MPS_LOG_DIRECTORY=$mps
        if (owned timeout 30 nvidia-cuda-mps-control -d) >"$mps/said" 2>&1 </dev/null; then
            # It knows the GPUs that this job sees, and counts them anew.
            CUDA_VISIBLE_DEVICES=$(seq -s, 0 $((GPUS - 1)))
            export CUDA_VISIBLE_DEVICES
            if [[ $(python "$REPO/scripts/job/this_node.py" 2>"$mps/said") == "$counted "* ]]; then
                say "trials that share a GPU compute at the same time (MPS)"
                return 0
            fi
        fi
        why="MPS does not run here: $(tail -n 1 "$mps/said")"
        unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY CUDA_VISIBLE_DEVICES
        [[ -z $visible ]] || export CUDA_VISIBLE_DEVICES=$visible
    fi
    ! timeout 30 nvidia-smi --query-gpu=compute_mode --format=csv,noheader 2>/dev/null | grep -q Exclusive ||
        fail "GPUS_PER_WORKER=$Gw: the GPUs of this node are in exclusive mode, for one process each, and $why;" \
            "set GPUS_PER_WORKER=1"
    say "trials that share a GPU take turns: $why"
}

# ---- Ray -------------------------------------------------------------------------------------------------------------
prepare_ray() {                                        # environment and log of this job's Ray processes
    NODE_ADDRESS=$(node_address)                       # Slurm is asked once
    # shellcheck disable=SC2046  # no word, or one
    prepare_cluster "$NODE_ADDRESS" $(head_host)
    prepare_training
    # For 127.0.0.1 Ray takes an address of the network of the day, unless it is told that no other node will come.
    [[ $NODE_ADDRESS != 127.0.0.1 ]] || on_slurm || export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0
    RAY_LOG=$RUN_DIR/ray_$ROLE-$JOB.log
    : >"$RAY_LOG"
    watch_over
}

# start_ray OPTIONS...: in the background, in the foreground of a process that can be watched: $RAY
start_ray() {
    (owned python -m ray.scripts.scripts start --block --node-ip-address="$NODE_ADDRESS" --temp-dir="$RAY_TMP/r" \
        --disable-usage-stats --object-store-memory=500000000 --include-log-monitor=false \
        --dashboard-agent-listen-port=0 "$@" >"$RAY_LOG" 2>&1) &
    RAY=$!
    disown "$RAY"                                      # else bash reports in the log how it has ended
}

ray_started() {                                        # for wait_until
    kill -0 "$RAY" 2>/dev/null || fail "Ray ended at its start$(likely_cause):" \
        "$(last_error "$RAY_LOG" || tail -n 1 "$RAY_LOG") (all of it: $RAY_LOG)"
    [[ -s $RAY_TMP/r/ray_current_cluster ]]            # the head's address; the last that Ray writes, on all nodes
}

last_error() {                                         # last_error FILE: the end of a trace, which names the error
    grep -E '^[A-Za-z_.]+(Error|Exception)\b' "$1" | tail -n 1 | cut -c1-300 | grep .
}

end_ray() {                                            # once; this can take a while; end_owned ends what is left
    [[ -z $RAY ]] || kill "$RAY" 2>/dev/null || true
    RAY=""
}

likely_cause() {                                       # Ray itself only says "overloaded" or "GCS may have been killed"
    python "$REPO/scripts/job/this_node.py" --why "$(node_address)"
}

owned() {                                              # run a command whose process tree end_owned can find
    exec env HPO_OWNER="$RUN_DIR $ROLE $JOB" ${RAY_TMP:+"TMPDIR=$RAY_TMP/tmp"} \
        SPT_NOENV=1 "$@"                               # else some of Ray's write their title over the environment
}

owned_pids() {
    grep -lzxF "HPO_OWNER=$RUN_DIR $ROLE $JOB" /proc/[0-9]*/environ 2>/dev/null | cut -d/ -f3 || true
}

# Ray starts a dozen processes, some of which survive their parent. All inherit the mark that owned() set, and no other
# process has it: 'ray stop' would end every Ray process of the user on this node, other runs' too.
end_owned() {
    [[ -z $WATCH ]] || kill -s KILL "$WATCH" 2>/dev/null
    local pids signal deadline=$((SECONDS + 2))
    disown -a
    for signal in TERM KILL; do
        while pids=$(owned_pids) && [[ -n $pids ]] && ((SECONDS < deadline)); do
            # shellcheck disable=SC2086  # one word a process
            kill -s "$signal" $pids 2>/dev/null || true
            sleep 0.1
        done
        deadline=$((SECONDS + 5))
    done
    [[ -z $RAY_TMP ]] || rm -rf "$RAY_TMP"
}

# Traps do not run when this shell is killed (kill -9, out of memory). Then a second one ends what it has started.
watch_over() {
    local shell=$$
    (
        trap '' TERM INT HUP
        while kill -0 "$shell"; do sleep 1; done
        end_owned
    ) >/dev/null 2>&1 </dev/null &
    WATCH=$!
}

# wait_until SECONDS "what for" CHECK...: until CHECK succeeds. Fails at the deadline. CHECK itself calls fail when what
# it waits for can no longer come. A line after ten seconds, and then every minute, says what is waited for.
wait_until() {
    local limit=$1 what=$2 start=$SECONDS next=10
    shift 2
    until "$@"; do
        ((SECONDS - start < limit)) || fail "waited $limit s for $what; giving up"
        if ((SECONDS - start >= next)); then           # no $(...) each time: bash 5.2 fails at a signal then
            say "waiting for $what: $((SECONDS - start)) s of $limit s"
            next=$(((SECONDS - start) / 60 * 60 + 60))
        fi
        { sleep 0.2; } 2>/dev/null                     # not bash's own line if a signal ends it
    done
}
