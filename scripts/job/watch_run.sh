# shellcheck shell=bash
# The head's worker jobs, and what it watches while a run is under way: them, Ray, the disk, the search; and the run
# that it continues. Sourced by head_node_raytune_asha_hpo.slurm, after ray_job.sh.

WORKER_JOBS=()                                         # ids of the worker jobs, in the order of their submission
REPLACEMENTS=3                                         # worker jobs submitted for each node in place of ones that ended
REPLACED=0 REPLACEMENT_TRIES=0                         # how many were; how often sbatch was asked, and may have refused
declare -A ANNOUNCED=() ENDED=() TOLD=()               # workers that joined; that ended too early; reasons told
QUEUE=""                                               # "job state reason" of the workers there, as of the last look
NEXT_LOOK=0 NEXT_WRITE=0                               # seconds; when to look at the queue and at the disk again
JOINED="" SERVING=""                                   # has any worker joined yet? was one serving at the last look?
LAST_SERVED=0 NEXT_TOLD=10                             # seconds: when one last served; waited until a line tells

# ---- Which run is it? ------------------------------------------------------------------------------------------------
which_run() {                                          # a new one, or one to continue: then RESUME becomes its folder
    local folder other queue=""
    if [[ ${SLURM_RESTART_COUNT:-0} != 0 ]]; then      # Slurm has requeued this job
        for folder in "$EXERCISE/runs/$JOB" "$EXERCISE/runs/$JOB"-*; do
            if recorded settings "$folder" && [[ $(<"$folder/job") == "$JOB" ]]; then RESUME=$folder; fi
        done
    fi
    [[ -n ${RESUME:-} ]] || return 0
    [[ -d $RESUME || ! -d $EXERCISE/$RESUME ]] || RESUME=$EXERCISE/$RESUME
    [[ -d $RESUME ]] || return 0                       # check_inputs.py says that it is not there
    folder=$EXERCISE/runs/$(basename "$(cd "$RESUME" && pwd)")   # as it is called here: runs/ may be a link
    [[ $RESUME -ef $folder ]] || fail "RESUME=$RESUME: is not a folder of $EXERCISE/runs; give runs/<jobid>"
    export RESUME=$folder
    other=$(cat "$RESUME/job" 2>/dev/null) || other=""
    if [[ $other =~ ^[0-9]+$ && $other != "$JOB" ]] && command -v squeue >/dev/null; then
        queue=$(ask squeue --noheader --me --format=%i) ||
            fail "RESUME=$RESUME: squeue does not say whether job $other still works on this run;" \
                "if it does not, rm $RESUME/job"
    fi
    if [[ -n $other ]] && { grep -qx "$other" <<<"$queue" || grep -qzsE "^HPO_OWNER=.* $other$" /proc/[0-9]*/environ; }
    then
        fail "RESUME=$RESUME: job $other still works on this run; wait for its end, or scancel $other"
    fi
    rm -f "$RESUME"/{shutdown.txt,address} "$RESUME"/joined-*
}

# ---- The search ------------------------------------------------------------------------------------------------------
watch_search() {                                       # until the search ends; returns its exit status
    local status=0
    LAST_SERVED=$SECONDS
    while kill -0 "$SEARCH" 2>/dev/null; do
        sleep 1 &
        wait -n "$SEARCH" "$RAY" $! 2>/dev/null || true   # whichever ends first
        if ! run_can_go_on; then
            kill "$SEARCH" 2>/dev/null
            sleep 5 &
            wait -n "$SEARCH" $! 2>/dev/null           # before_finish kills a search that does not end
            return 1
        fi
    done
    { wait "$SEARCH" || status=$?; } 2>/dev/null       # without bash's own line about a killed process
    ((status == 0)) || say_why_it_failed "$status"
    return "$status"
}

run_can_go_on() {
    if ! kill -0 "$RAY" 2>/dev/null; then
        say "the Ray head ended$(likely_cause); its last words are in $RAY_LOG"
        return 1
    elif ! room_is_left; then
        echo "ERROR: $(no_room "$RUN_DIR")"
        return 1
    elif on_slurm; then
        announce_workers
        mind_workers
    fi
}

room_is_left() {                                       # in the run folder: Ray goes on without, and loses files
    ((SECONDS >= NEXT_WRITE)) || return 0
    NEXT_WRITE=$((SECONDS + 10))
    local status=0
    { head -c 65536 /dev/zero >"$RUN_DIR/room" || status=1; } 2>/dev/null
    rm -f "$RUN_DIR/room"
    return "$status"
}

say_why_it_failed() {                                  # say_why_it_failed STATUS: one line; a trace is for programmers
    local errors=$RAY_TMP/search.err cause
    NEXT_WRITE=0
    if ! room_is_left; then
        echo "ERROR: $(no_room "$RUN_DIR")"
    elif (($1 > 128)); then
        say "the search was ended by signal $(($1 - 128))$( (($1 != 137)) || echo ": out of memory?")"
    elif ! grep '^ERROR: ' "$errors" && cause=$(last_error "$errors"); then
        cp "$errors" "$RUN_DIR" 2>/dev/null
        echo "ERROR: the search failed: $cause (full trace: $RUN_DIR/search.err)"
    fi
}

# ---- The worker jobs -------------------------------------------------------------------------------------------------
submit_worker() {
    local job n=$((${#WORKER_JOBS[@]} + 1))
    job=$(sbatch_worker) || return 1
    WORKER_JOBS+=("$job")
    say "submitted worker $n/$((n > WORKER_NODES ? n : WORKER_NODES)): job $job," \
        "log logs/ray_worker_bloom_5epochs-$job.out"
}

sbatch_worker() {                                      # prints the job's id, whatever a site adds to it
    local said job="" tries=0
    cd "$EXERCISE" || return 1
    until said=$(sbatch --parsable --export=ALL --chdir="$EXERCISE" \
        worker_node_raytune_asha_hpo.slurm "$RUN_DIR" "$JOB" 2>&1); do
        { is_busy "$said" && ((++tries < 10)); } || break
        say "sbatch: $(tail -n 1 <<<"$said"); trying again" >&2
        sleep 5                                        # it may have been submitted all the same
        job=$(unknown_worker) || break
        [[ -z $job ]] || break
    done
    job=${job:-$(job_id "$said")}
    [[ -n $job ]] || { echo "$said" >&2; return 1; }
    echo "$job"
}

unknown_worker() {                                     # prints the id of a worker job of this run not in WORKER_JOBS
    local queue id command
    queue=$(ask squeue --noheader --me --format='%i %o') || return 1
    while read -r id command; do
        [[ $command != *" $RUN_DIR $JOB" || " ${WORKER_JOBS[*]} " == *" $id "* ]] || { echo "$id"; break; }
    done <<<"$queue"
}

check_capacity() {                                     # of the first worker job; if Slurm is too busy, the worker tells
    local record said
    record=$(ask scontrol show job "${WORKER_JOBS[0]}") || return 0
    said=$(python "$REPO/scripts/job/worker_capacity.py" --record --nodes "$WORKER_NODES" <<<"$record") ||
        { echo "$said"; return 1; }
    echo "$said"
    SLOTS=$(sed -nE 's/^capacity: .*, ([0-9]+) on .*/\1/p' <<<"$said")
    Gw=$(sed -nE 's/.*T\*W\*Gw = [0-9]+\*[0-9]+\*([0-9]+) .*/\1/p' <<<"$said")
}

forecast() {                                           # of a new search by the lesson, while Ray starts
    [[ -n ${SLOTS:-} && -z ${SEARCH_SCRIPT:-}${RESUME:-} ]] || return 0
    (owned timeout 60 nice python "$REPO/scripts/job/forecast.py" --slots "$SLOTS" --Gw "$Gw" 2>/dev/null) |
        while IFS= read -r line; do
            say "$line"
            recorded forecast "$RUN_DIR" || record forecast text "${line#forecast: }"   # the first line: epochs
        done
}

queued_workers() {                                     # prints QUEUE anew; 1: Slurm is busy
    local queue
    ((${#WORKER_JOBS[@]} > 0)) || return 0
    queue=$(squeue --noheader --me --format='%i %T %r' 2>/dev/null) || return 1
    grep -E "^($(IFS='|'; echo "${WORKER_JOBS[*]}")) " <<<"$queue" || true
}

look_at_queue() {                                      # sets QUEUE, every ten seconds; 1: not now, or Slurm is busy
    local job state reason
    ((SECONDS >= NEXT_LOOK)) || return 1
    NEXT_LOOK=$((SECONDS + 10))
    QUEUE=$(queued_workers) || return 1
    while read -r job state reason; do                 # why a worker does not start yet, each reason once
        [[ $state == PENDING && $reason != None && -z ${TOLD[$job $reason]:-} ]] || continue
        TOLD[$job $reason]=yes
        say "worker job $job is PENDING: $reason (what that means: TROUBLESHOOTING.md)"
    done <<<"$QUEUE"
}

tell_who_ended() {                                     # tell_who_ended JOB...: those no longer in the queue, each once
    local job cause
    for job in "$@"; do
        if [[ -n ${ENDED[$job]:-} ]] || grep -q "^$job " <<<"$QUEUE"; then continue; fi
        ENDED[$job]=yes
        cause=$(last_words "$job")
        say "worker job $job has ended before the search: $cause"
        tell_cost "$job" "$cause" || true
    done
}

last_words() {                                         # of a worker job: its error, or where to look
    local log=logs/ray_worker_bloom_5epochs-$1.out
    grep -h '^ERROR' "$EXERCISE/$log" 2>/dev/null | tail -n 1 | grep . || echo "see $log"
}

announce_workers() {                                   # "worker 1/2 joined", once each
    local file job node cpus gpus slots words
    for file in "${!ANNOUNCED[@]}"; do
        [[ -e $file ]] || unset "ANNOUNCED[$file]"     # Slurm has requeued it
    done
    for file in "$RUN_DIR"/joined-*; do
        [[ -e $file && -z ${ANNOUNCED[$file]:-} ]] || continue
        ANNOUNCED[$file]=yes JOINED=yes SERVING=yes
        job=${file##*/joined-}
        [[ " ${WORKER_JOBS[*]} " == *" $job "* ]] || WORKER_JOBS+=("$job")   # a user has submitted it: now it is ours
        read -r node cpus gpus slots words <"$file"
        say "worker ${#ANNOUNCED[@]}/${#WORKER_JOBS[@]} joined: job $job on $node, $words, $slots trial(s) at once"
        record_worker "$job" "$node" "$cpus" "$gpus" "$slots" "$words"
    done
}

# Replaces workers that ended too early, REPLACEMENTS times for each node; their trials start again on others by
# themselves. 1: no worker can come any more, or none has served for WORKER_DEADLINE seconds. If none has ever joined,
# that is the end.
mind_workers() {
    local job waited what="another worker"
    [[ -n $JOINED ]] || what="the first worker to join"
    [[ -z $SERVING ]] || LAST_SERVED=$SECONDS NEXT_TOLD=10
    waited=$((SECONDS - LAST_SERVED))
    if ((waited > WORKER_DEADLINE)); then
        echo "ERROR: waited $WORKER_DEADLINE s (WORKER_DEADLINE) for $what; giving up"
        [[ -n $JOINED ]] || exit 1
        return 1
    elif ((waited >= NEXT_TOLD)); then
        say "waiting for $what: $NEXT_TOLD s of $WORKER_DEADLINE s"
        NEXT_TOLD=$((NEXT_TOLD / 60 * 60 + 60))
    fi
    look_at_queue || return 0
    if [[ -z $JOINED ]]; then
        tell_who_ended "${WORKER_JOBS[@]:0:${#WORKER_JOBS[@]}-1}"
        [[ -n $QUEUE ]] || compgen -G "$RUN_DIR/joined-*" >/dev/null ||
            fail "no worker joined and none is queued; the last one says: $(last_words "${WORKER_JOBS[-1]}")"
        return 0
    fi
    tell_who_ended "${WORKER_JOBS[@]}"
    while ((REPLACED < ${#ENDED[@]} && REPLACEMENT_TRIES < REPLACEMENTS * WORKER_NODES)); do
        REPLACEMENT_TRIES=$((REPLACEMENT_TRIES + 1))
        submit_worker || { say "sbatch refused to replace it (its message is above)"; break; }   # tried again
        REPLACED=$((REPLACED + 1))
    done
    SERVING=""
    for job in "${WORKER_JOBS[@]}"; do
        [[ ! -e $RUN_DIR/joined-$job ]] || ! grep -q "^$job RUNNING" <<<"$QUEUE" || SERVING=yes
    done
    if ((${#ENDED[@]} == ${#WORKER_JOBS[@]} && REPLACEMENT_TRIES == REPLACEMENTS * WORKER_NODES)); then
        say "no worker is left, and $REPLACED have been replaced already"
        return 1
    fi
}

cancel_workers() { ((${#WORKER_JOBS[@]} == 0)) || scancel --quiet "${WORKER_JOBS[@]}" 2>/dev/null; }

release_workers() {                                    # the workers leave, and the log tells what they have cost
    local job deadline=$((SECONDS + 15))
    touch "$RUN_DIR/shutdown.txt"
    while ((SECONDS < deadline)) && some_workers_left; do
        sleep 0.3
    done
    ! some_workers_left || cancel_workers
    for job in "${WORKER_JOBS[@]}"; do
        [[ -n ${ENDED[$job]:-} ]] || tell_cost "$job" || break   # near a time limit nobody can be asked again
    done
    WORKER_JOBS=()                                     # once
}

some_workers_left() { ! QUEUE=$(queued_workers) || [[ -n $QUEUE ]]; }   # or Slurm is busy, so nobody knows

tell_cost() {                                          # tell_cost JOB [CAUSE]: of one that ended; 1: Slurm is busy
    local said seconds="" time='StartTime=([0-9T:-]+) EndTime=([0-9T:-]+)'
    said=$(scontrol show job "$1" 2>&1) || ! is_busy "$said" || return 1
    if [[ $said != *JobState=RUNNING* && $said =~ $time ]]; then
        seconds=$(($(date -d "${BASH_REMATCH[2]}" +%s) - $(date -d "${BASH_REMATCH[1]}" +%s)))
        say "worker job $1 held its node for $seconds s, by Slurm's record"
    fi
    [[ -z $seconds${2:-} ]] || record worker_ended job "$1" ${seconds:+seconds: "$seconds"} ${2:+cause "$2"}
}

# ---- What to tell the user -------------------------------------------------------------------------------------------
how_to_look_inside() {                                 # ready to paste on your own computer while the job runs
    local port jump=""
    ! on_slurm || jump="-J $(id -un)@${SLURM_SUBMIT_HOST:-login-node} "
    port=$(grep -o '127\.0\.0\.1:[0-9]*' "$RAY_LOG" | head -n 1 | cut -d: -f2) || return 0
    say "dashboard: ssh -N -L 8265:127.0.0.1:$port $jump$(id -un)@$(hostname)"
    say "           then open http://localhost:8265; it asks for the token in $RUN_DIR/token"
    say "curves: $(command -v python) -m tensorboard.main --logdir $RUN_DIR/tune"
}

say_how_it_ended() {                                   # say_how_it_ended STATUS: and how to continue
    local record end submit=bash
    ! on_slurm || submit=sbatch
    # Slurm sends TERM for scancel, too, but then the job is no longer RUNNING.
    if (($1 == 143)) && on_slurm && record=$(ask scontrol show job "$JOB") && [[ $record =~ EndTime=([0-9T:-]+) ]]; then
        end=${BASH_REMATCH[1]}
        if [[ $record == *Reason=TimeLimit* || $record == *JobState=RUNNING* ]] &&
            (($(date -d "$end" +%s) - $(date +%s) < 900)); then
            say "the time limit of this job, $end, has come near (#SBATCH --time; sbatch --time=... sets another)"
        fi
    fi
    say "ended with exit status $1"
    ! recorded settings "$RUN_DIR" ||
        say "continue with: RESUME=runs/${RUN_DIR##*/} $submit head_node_raytune_asha_hpo.slurm"
}
