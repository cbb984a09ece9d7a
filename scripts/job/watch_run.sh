# shellcheck shell=bash
# The head's worker jobs, and what it watches while a run is under way: them, Ray, the disk, the search; and the run
# that it continues. Sourced by head_node_raytune_asha_hpo.slurm, after ray_job.sh.

WORKER_JOBS=()                                         # ids of the worker jobs, in the order of their submission
REPLACED=0                                             # how many worker jobs were submitted in place of ones that ended
FRUITLESS=0 REFUSED=0                                  # since one last joined: how many left before that; were refused
declare -A ANNOUNCED=() ENDED=() TOLD=()               # workers that joined; that ended too early; reasons told
QUEUE=""                                               # "job state reason" of the workers there, as of the last look
NEXT_LOOK=0 NEXT_WRITE=0                               # seconds; when to look at the queue and at the disk again
JOINED="" SERVING=""                                   # has any worker joined yet? was one serving at the last look?
HANDED_OVER=""
handed_over() { [[ -n $HANDED_OVER ]]; }               # does another start of a head go on with this run?
LAST_SERVED=0 NEXT_TOLD=10                             # seconds: when one last served; waited until a line tells

# ---- Which run is it? ------------------------------------------------------------------------------------------------
which_run() {                                          # a new one, or one to continue: then RESUME becomes its folder
    local folder other
    if [[ ${SLURM_RESTART_COUNT:-0} != 0 ]]; then      # Slurm has requeued this job
        for folder in "$EXERCISE/runs/$JOB" "$EXERCISE/runs/$JOB"-*; do
            if recorded settings "$folder" && [[ $(last_job "$folder") == "$JOB" ]]; then RESUME=$folder; fi
        done
    fi
    [[ -n ${RESUME:-} ]] || return 0
    [[ -d $RESUME || ! -d $EXERCISE/$RESUME ]] || RESUME=$EXERCISE/$RESUME
    [[ -d $RESUME ]] || return 0                       # check_inputs.py says that it is not there
    folder=$EXERCISE/runs/$(basename "$(cd "$RESUME" && pwd)")   # as it is called here: runs/ may be a link
    [[ $RESUME -ef $folder ]] || fail "RESUME=$RESUME: is not a folder of $EXERCISE/runs; give runs/<jobid>"
    export RESUME=$folder
    other=$(last_job "$RESUME")
    if ! is_over "$other" || { [[ -n $other ]] && grep -qzsE "^HPO_OWNER=.* $other$" /proc/[0-9]*/environ; }; then
        fail "RESUME=$RESUME: job $other still works on this run; wait for its end, or scancel $other"
    fi
}

last_job() { cat "$(printf '%s\n' "$1"/head-* | sort -V | tail -n 1)/job" 2>/dev/null || true; }   # of a run folder

is_over() {                                            # is_over JOB: of the last job of the run in RESUME
    local state
    [[ $1 =~ ^[0-9]+$ && $1 != "$JOB" ]] && command -v squeue >/dev/null || return 0
    state=$(state_of "$1" 60) || fail "RESUME=$RESUME: squeue does not say whether job $1 still works on this run;" \
        "try again when it answers"
    is_end "$state"
}

# ---- The search ------------------------------------------------------------------------------------------------------
watch_search() {                                       # until the search ends; returns its exit status
    local status=0
    LAST_SERVED=$SECONDS
    while kill -0 "$SEARCH" 2>/dev/null; do
        sleep 1 &
        wait -n "$SEARCH" $! 2>/dev/null || true       # whichever ends first
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
    if is_superseded; then
        say "this run has been started again elsewhere (see head-* in $RUN_DIR), so this head ends"
        HANDED_OVER=yes
        return 1
    elif ! kill -0 "$RAY" 2>/dev/null; then
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
    { head -c 65536 /dev/zero >"$HEAD_DIR/room" || status=1; } 2>/dev/null   # so that its listing is fresh, too
    rm -f "$HEAD_DIR/room"
    return "$status"
}

say_why_it_failed() {                                  # say_why_it_failed STATUS: one line; a trace is for programmers
    local errors=$RAY_TMP/search.err cause
    NEXT_WRITE=0
    if ! room_is_left; then
        echo "ERROR: $(no_room "$RUN_DIR")"
    elif (($1 > 128)); then
        say "the search was ended by signal $(($1 - 128))$( (($1 != 137)) || echo ": out of memory?")$(likely_cause)"
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
    local said left job="" tries=0 options=(--parsable --export=ALL --chdir="$EXERCISE")
    cd "$EXERCISE" || return 1
    # A worker's time is what is left of this job's: 1-02:03:04; or UNLIMITED, INVALID ...
    left=$(ask squeue --noheader --jobs="$JOB" --Format=JobID:20,TimeLeft:20 | sed -nE "s/^$JOB +//p" | xargs)
    [[ ! $left =~ ^[0-9:-]+$ ]] || options+=(--time="$left")
    until said=$(timeout 60 sbatch "${options[@]}" worker_node_raytune_asha_hpo.slurm "$HEAD_DIR" "$JOB" 2>&1); do
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
        [[ $command != *" $HEAD_DIR $JOB" || " ${WORKER_JOBS[*]} " == *" $id "* ]] || { echo "$id"; break; }
    done <<<"$queue"
}

check_capacity() {                                     # of the first worker job; if Slurm is too busy, the worker tells
    local record said
    record=$(ask scontrol show job "${WORKER_JOBS[0]}") || return 0
    said=$(python "$REPO/scripts/job/worker_capacity.py" --record --nodes "$WORKER_NODES" <<<"$record") ||
        { echo "$said"; return 1; }
    echo "$said"
    SLOTS=$(sed -nE 's/^capacity: .*, ([0-9]+) on .*/\1/p' <<<"$said")
    Gw=$(sed -nE 's/.*T\*W\*Gw = [0-9]+\*[0-9]+\*([0-9.]+) .*/\1/p' <<<"$said")
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
    queue=$(timeout 10 squeue --noheader --me --format='%i %T %r' 2>/dev/null) || return 1
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
        [[ -n ${ANNOUNCED[$job]:-} ]] || FRUITLESS=$((FRUITLESS + 1))
        rm -f "$HEAD_DIR/joined-$job"
        cause=$(last_words "$job")
        say "worker job $job has ended before the search: $cause"
        tell_cost "$job" "$cause" || true
    done
}

last_words() {                                         # of a worker job: its error, or where to look
    local log=logs/ray_worker_bloom_5epochs-$1.out
    grep -h '^ERROR' "$EXERCISE/$log" 2>/dev/null | tail -n 1 | grep . || echo "see $log"
}

joined_files() {                                       # are there any?
    local files=("$HEAD_DIR"/joined-*)
    [[ ${files[0]} != */joined-\* ]]
}

announce_workers() {                                   # "worker 1/2 joined", once each
    local file job node cpus gpus slots words
    for file in "$HEAD_DIR"/joined-*; do
        job=${file##*/joined-}
        [[ $job != "*" && -z ${ANNOUNCED[$job]:-} ]] || continue
        ANNOUNCED[$job]=yes JOINED=yes SERVING=yes FRUITLESS=0 REFUSED=0
        [[ " ${WORKER_JOBS[*]} " == *" $job "* ]] || WORKER_JOBS+=("$job")   # a user has submitted it: now it is ours
        read -r node cpus gpus slots words <"$file"
        say "worker ${#ANNOUNCED[@]}/${#WORKER_JOBS[@]} joined: job $job on $node, $words, $slots trial(s) at once"
        record_worker "$job" "$node" "$cpus" "$gpus" "$slots" "$words"
    done
}

# Replaces workers that ended too early; their trials start again on others by themselves. But once one for each node
# has left before it joined, the next would, too. 1: no worker can come any more, or none has served for WORKER_DEADLINE
# seconds. If none has ever joined, that is the end.
mind_workers() {
    local job waited state more=yes what="another worker"
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
        [[ -n $QUEUE ]] || joined_files ||
            fail "no worker joined and none is queued; the last one says: $(last_words "${WORKER_JOBS[-1]}")"
        return 0
    fi
    tell_who_ended "${WORKER_JOBS[@]}"
    ((FRUITLESS < WORKER_NODES && REFUSED < 3)) || more=""
    if ((REPLACED < ${#ENDED[@]})) && [[ -n $more ]]; then
        state=$(state_of "$JOB") || return 0           # Slurm is busy: later
        if [[ $state != @(UNKNOWN|*" ${SLURM_RESTART_COUNT:-0}") || $state == @(PENDING|REQUEUE)* ]]; then
            say "Slurm has lost this job, and starts it again ($state); this head ends"
            HANDED_OVER=yes
            return 1
        fi
    fi
    while ((REPLACED < ${#ENDED[@]})) && [[ -n $more ]] && ! is_superseded; do
        if ! submit_worker; then                       # tried again at the next look
            say "sbatch refused to replace it (its message is above)"
            REFUSED=$((REFUSED + 1))
            break
        fi
        REPLACED=$((REPLACED + 1))
    done
    SERVING=""
    for job in "${WORKER_JOBS[@]}"; do
        [[ -z ${ANNOUNCED[$job]:-} ]] || ! grep -q "^$job RUNNING" <<<"$QUEUE" || SERVING=yes
    done
    if ((${#ENDED[@]} == ${#WORKER_JOBS[@]})) && [[ -z $more ]]; then
        say "no worker is left: $FRUITLESS in a row ended before they joined, $REFUSED were refused; see above why"
        return 1
    fi
}

cancel_workers() {                                     # cancel_workers [--state=PENDING]
    ((${#WORKER_JOBS[@]} == 0)) || timeout 3 scancel --quiet "$@" "${WORKER_JOBS[@]}" 2>/dev/null || true
}

release_workers() {                                    # within SECONDS, and the log tells what they have cost
    local job begin=$SECONDS deadline=$((SECONDS + $1))
    touch "$HEAD_DIR/shutdown.txt"
    ((${#WORKER_JOBS[@]} > 0)) || return 0
    cancel_workers --state=PENDING
    while joined_files && ((SECONDS < deadline)); do   # each removes its own
        sleep 0.2
        look_afresh
        ((SECONDS < begin + 2)) || end_ray             # who does not see the file yet notices that
    done
    # Those that had not joined yet, or could not tell, are asked for less often: Slurm is everybody's.
    until ! QUEUE=$(queued_workers) || [[ -z $QUEUE ]]; do
        ((SECONDS < deadline)) || { cancel_workers; break; }
        sleep 1
    done
    for job in "${WORKER_JOBS[@]}"; do
        [[ -n ${ENDED[$job]:-} ]] || tell_cost "$job" || break   # near a time limit nobody can be asked again
    done
    WORKER_JOBS=()                                     # once
}

tell_cost() {                                          # tell_cost JOB [CAUSE]: of one that ended; 1: Slurm is busy
    local said seconds="" time='StartTime=([0-9T:-]+) EndTime=([0-9T:-]+)'
    said=$(PATIENCE=3 ask scontrol show job "$1") || [[ -n ${2:-} ]] || return 1
    if [[ $said != *JobState=RUNNING* && $said =~ $time && ${BASH_REMATCH[1]} != "${BASH_REMATCH[2]}" ]]; then
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
    say "           then open http://localhost:8265; it asks for the token in $HEAD_DIR/token"
    say "curves: $(command -v python) -m tensorboard.main --logdir $RUN_DIR/tune"
}

say_how_it_ended() {                                   # say_how_it_ended STATUS: and how to continue
    local record end submit=bash
    ! on_slurm || submit=sbatch
    # Slurm sends TERM for scancel, too, but then the job is no longer RUNNING.
    if (($1 == 143)) && on_slurm &&                    # of an array scontrol tells all jobs
        record=$(ask scontrol show job --oneliner "$JOB" | grep "^JobId=$JOB ") &&
        [[ $record =~ EndTime=([0-9T:-]+) ]]; then
        end=${BASH_REMATCH[1]}
        if [[ $record == *Reason=TimeLimit* || $record == *JobState=RUNNING* ]] &&
            (($(date -d "$end" +%s) - $(date +%s) < 900)); then
            say "the time limit of this job, $end, has come near (#SBATCH --time; sbatch --time=... sets another)"
            fill_tables "$1" 45                        # of what it has trained so far; then there is time for FINISH
        fi
    fi
    say "ended with exit status $1"
    ! recorded settings "$RUN_DIR" ||
        say "continue with: RESUME=runs/${RUN_DIR##*/} $submit head_node_raytune_asha_hpo.slurm"
}
