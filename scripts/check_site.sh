#!/bin/bash
# Is this site ready for the course? Checks a login node and, by one sbatch, a head and a worker node, each got with the
# #SBATCH lines and the EDIT block of its .slurm file. Each line: ok, warning or FAILED; where; what was found; the fix.
#
#   bash scripts/check_site.sh              # on a login node; variables of the run go in front, such as MODEL_NAME=...
#   bash scripts/check_site.sh --wait 60    # minutes to wait for each node in the queue (default 10)
#
# Without Slurm it checks this machine alone. Exit status: 0 nothing FAILED, 1 something did, 2 wrong usage, 129, 130, 143
# interrupted. It ends its jobs and removes its files in every case.
set -uo pipefail

# What a run needs, with reserve for larger nodes. In brackets: measured with the demo model on a machine with 2 cores.
RUN_MB=100                                                   # run folder without checkpoints [5]
TMP_MB=1000                                                  # /tmp: Ray's folder [45], and the object store if /dev/shm is small
SHM_MB=500                                                   # /dev/shm: the object store, see start_ray
FILES=1024                                                   # open files of one process [94]
NODE_THREADS=500                                             # of Ray on a node [80; head 153]; ulimit -u counts threads
TRIAL_THREADS=300                                            # of a trial with two workers [130, in 4 processes]
LATE=10                                                      # seconds after which a shared folder is called late

REPO=$(CDPATH="" cd -P "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
EXERCISE=$REPO/experiments/raytune/scheduler/asha
HEAD=$EXERCISE/head_node_raytune_asha_hpo.slurm
WORKER=$EXERCISE/worker_node_raytune_asha_hpo.slurm
ROLE="login" RUN_DIR="" WAIT=10 EXPORT=${SBATCH_EXPORT:-ALL}
TRIALS=1 NEXT_LOOK=0 STATE=""
# shellcheck source=SCRIPTDIR/job/ray_job.sh
source "$REPO/scripts/job/ray_job.sh"                # what a run does: node_address, prepare_ray ...
export -f node_address on_slurm ask is_busy fail   # so that timeout can end them
export PYTHONDONTWRITEBYTECODE=1 PYTHONPATH="$REPO/scripts/job${PYTHONPATH:+:$PYTHONPATH}"

# ---- Lines -----------------------------------------------------------------------------------------------------------
declare -A COUNT=([ok]=0 [warning]=0 [FAILED]=0)
line() {
    COUNT[$1]=$((COUNT[$1] + 1))
    printf '%-7s  %-8s  %s\n' "$1" "${SLURMD_NODENAME:-$ROLE}" "$2"
}
ok()      { line ok "$1"; }
warning() { line warning "$1"; }
failed()  { line FAILED "$1"; }
last()    { tail -n 1 <<<"$1" | cut -c1-300; }              # of what a command has said: the cause
EDIT="in the EDIT blocks of the .slurm files"

# ---- On the login node: would Slurm run the jobs? ----------------------------------------------------------------------
check_slurm() {                                              # 1: there is no Slurm to go on with
    local tool said missing=()
    for tool in sbatch squeue scontrol scancel sinfo; do
        command -v "$tool" >/dev/null || missing+=("$tool")
    done
    if ((${#missing[@]} == 5)); then
        warning "Slurm: no sbatch here, so this machine alone is checked; on a cluster: use a login node, or module load slurm"
    elif ((${#missing[@]} > 0)); then
        failed "Slurm: not on the PATH: ${missing[*]}; fix: module load slurm, or add their folder to PATH, here and $EDIT"
    elif ! said=$(timeout 30 squeue --noheader --me --format=%i 2>&1); then
        failed "Slurm: no answer to squeue --me within 30 s: $(last "$said"); fix: ask your site if Slurm is down, or older than 20.02"
    else
        ok "Slurm: $(sbatch --version), all commands there"
        [[ $EXPORT == ALL* ]] || warning "Slurm: SBATCH_EXPORT=$EXPORT, so variables set in front of sbatch do not reach the job; fix: unset SBATCH_EXPORT, or sbatch --export=ALL"
        return 0
    fi
    return 1
}

offered() { sinfo --noheader --format="$1" 2>/dev/null | sort -u | tr '\n' ' '; }

seconds() {                                                  # of a time as Slurm writes it: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S
    awk -F- '{ n = split($NF, t, ":"); if (NF == 2) print (($1 * 24 + t[1]) * 60 + t[2]) * 60 + t[3]
               else print n == 3 ? (t[1] * 60 + t[2]) * 60 + t[3] : t[1] * 60 + t[2] }' <<<"$1"
}

check_job_file() {                                           # does Slurm take this .slurm file as it is, and can it start one day?
    local file=$1 name=${1##*/} folder=${1%/*}/logs said job record asked partition limit fix by=""
    if [[ ! -d $folder || ! -w $folder ]]; then              # then Slurm takes the job, and it ends at once without a word
        failed "$name: its log folder $folder is missing or read-only; fix: mkdir -p $folder"
    fi
    if ! said=$(cd "${file%/*}" && timeout 60 sbatch --test-only "$name" "$RUN_DIR" 0 2>&1); then
        case $said in
            *feature*) fix="change or delete the --constraint; there are: $(offered %f)" ;;
            *partition*specified*) fix="#SBATCH --partition=, one of: $(offered %R)" ;;
            *account* | *QOS*) fix="#SBATCH --account=, one of yours; see: sacctmgr show associations user=$(id -un)" ;;
            *"node configuration"*) fix="lower the GPUs or CPUs; partition, CPUs, GPUs: $(offered %R,%c,%G)" ;;
            *denied*) fix="submit from a login node, or to another partition" ;;
            *) fix="the #SBATCH lines" ;;
        esac
        failed "$name: Slurm refuses it: $(last "$(grep -v '^Try' <<<"${said:-no answer within 60 s}")"); fix: $fix$(compgen -e SBATCH_ | sed 's/^/, or the variable /' | tr -d '\n')"
        return
    fi
    # Slurm also reads variables, and they beat the lines of the file. So what counts is what it has understood.
    job=$(job_id "$(cd "${file%/*}" && timeout 60 sbatch --parsable --hold --job-name="${RUN_DIR##*/}" "$name" "$RUN_DIR" 0 2>&1)")
    record=$(timeout 60 scontrol show job "$job" 2>&1)
    timeout 30 scancel "$job"
    asked=$(grep -oP ' TimeLimit=\K\S+' <<<"$record") partition=$(grep -oP '\bPartition=\K\S+' <<<"$record")
    limit=$(timeout 30 scontrol show partition "$partition" | grep -oP ' MaxTime=\K\S+')
    [[ -z ${SBATCH_TIMELIMIT:-} ]] || by=" by the variable SBATCH_TIMELIMIT, which beats the line of the file"
    if [[ $limit == [0-9]* && $asked == [0-9]* ]] && (($(seconds "$asked") > $(seconds "$limit"))); then   # taken, and PENDING for ever
        failed "$name: its time limit is $asked$by, above that of partition $partition, $limit; fix: #SBATCH --time=$limit${by:+ and unset SBATCH_TIMELIMIT}, or another partition"
    else
        ok "$name: Slurm takes it, $(grep -o 'to start at [^ ]*' <<<"$said"): Partition=$partition TimeLimit=$asked $(grep -oE '(NumCPUs|TresPer[A-Z][a-z]+|CpusPerTres|MinMemory[A-Z]+)=\S+' <<<"$record" | tr '\n' ' ')"
    fi
}

# ---- On every machine --------------------------------------------------------------------------------------------------
check_packages() {                                           # 1: there is no Python to go on with
    local said
    said=$( (choose_python) 2>&1) || { failed "Python: ${said#ERROR: }"; return 1; }
    choose_python
    if said=$(timeout 120 python - "$REPO/requirements.txt" 2>&1 <<'PYTHON'
import sys
from importlib.metadata import distributions
from packaging.requirements import Requirement             # for it, torch 2.13.0+cu126 is a 2.13.0
from packaging.utils import canonicalize_name
there = {canonicalize_name(d.metadata["Name"]): d.version for d in distributions()}
wanted = [Requirement(line.split("#")[0].strip()) for line in open(sys.argv[1]) if line[0] not in "#-\n"]
wrong = [(w, there.get(canonicalize_name(w.name), "missing")) for w in wanted if not w.marker or w.marker.evaluate()]
wrong = [f"{w.name} {v} instead of {w.specifier}" for w, v in wrong if v == "missing" or v not in w.specifier]
sys.exit(", ".join(wrong) or None)
PYTHON
    ); then
        ok "packages: as in requirements.txt, $(python --version), $(command -v python)"
        said=$(tr : '\n' <<<"$PYTHONPATH" | grep -v -e "^$REPO/" -e "^$(dirname "$(dirname "$(command -v python)")")/" | paste -sd:)
        [[ -z $said ]] || warning "packages: PYTHONPATH has $said; a run takes those of its environment first; fix: unset PYTHONPATH $EDIT, if you can do without"
    else
        failed "packages: $(last "$said"), in $(command -v python); fix: bash scripts/setup_env.sh, or activate the environment $EDIT"
    fi
}

check_inputs() {                                             # variables, tokenizer, data and weights, as the search finds them
    local said error
    if said=$(timeout 300 python -c '
import os, sys, check_inputs
try:
    s = check_inputs.check(os.environ)
except check_inputs.InputError as error:
    sys.exit("".join(f"\nERROR: {line}" for line in str(error).splitlines()))
train, validation = check_inputs.lesson.load_squad(s)
print(f"MODEL_NAME={s.MODEL_NAME} is there, {len(train)} + {len(validation)} questions read from SQUAD_DATA={s.SQUAD_DATA}")' 2>&1); then
        ok "inputs: $(last "$said")"
    else
        while read -r error; do failed "inputs: ${error#ERROR: }"; done < <(grep '^ERROR' <<<"$said" || last "${said:-no answer within 300 s}")
    fi
}

check_disk() {                                               # check_disk FOLDER MB: room, and may we have it? Only writing tells a quota
    local folder=$1 need=$2 free used said
    read -r free used < <(df --output=avail,pcent -BM "$folder" 2>/dev/null | tail -n 1 | tr -d 'M%')
    if ((${free:-0} < need)); then
        failed "disk: $folder has ${free:-0} MB free, a run needs $need; fix: make room, or clone the repository to a larger file system"
    elif ! said=$(timeout 120 dd if=/dev/zero of="$folder/check_site.$JOB" bs=1M count=50 conv=fsync 2>&1); then
        failed "disk: 50 MB cannot be written to $folder: $(head -n 1 <<<"$said"); fix: see your quota (quota -s, lfs quota), delete or move files"
    elif ((used > 95)); then
        warning "disk: $folder is $used % full, and above 95 % Ray stores nothing there; fix: make room"
    else
        ok "disk: $folder has $free MB free, a run needs $need"
    fi
    rm -f "$folder/check_site.$JOB"
}

check_shm() {
    local free
    free=$(df --output=avail -BM /dev/shm 2>/dev/null | tail -n 1 | tr -d 'M ')
    if ((${free:-0} < SHM_MB)); then
        warning "/dev/shm has ${free:-0} MB free, Ray wants $SHM_MB and takes /tmp instead; fix: delete your old files there, or ask your site; container: --shm-size=1g"
    else
        ok "/dev/shm has $free MB free, Ray needs $SHM_MB"
    fi
}

check_limits() {
    local processes files need=$((NODE_THREADS + TRIALS * TRIAL_THREADS)) what
    processes=$(python "$REPO/scripts/job/this_node.py" --processes) files=$(ulimit -n)
    what="processes: $processes more may be started, $TRIALS trial(s) at once need $need ($NODE_THREADS for Ray, $TRIAL_THREADS a trial)"
    if [[ $processes == inf ]] || ((processes >= need)); then
        ok "$what"
    else
        failed "$what; fix: ulimit -u (now $(ulimit -u)) before sbatch and $EDIT, or ask your site, which may also limit a cgroup (pids.max)"
    fi
    if [[ $files == unlimited ]] || ((files >= FILES)); then
        ok "open files: ulimit -n $files, a run needs $FILES"
    else
        failed "open files: ulimit -n $files, a run needs $FILES; fix: ulimit -n $FILES before sbatch and $EDIT, or ask your site"
    fi
}

check_socket() {                                             # the longest name that Ray will make in its folder (prepare_ray)
    local said path=${RAY_TMP:-}/r/session_2026-12-31_23-59-59_999999_4194304/sockets/plasma_store
    if said=$(mkdir -p "${path%/*}" 2>&1 && timeout 30 python -c 'import socket, sys; socket.socket(socket.AF_UNIX).bind(sys.argv[1])' "$path" 2>&1); then
        ok "socket path: ${#path} of at most 107 characters"
    else
        failed "socket path: $(last "$said"): $path has ${#path} of at most 107 characters; fix: a shorter RAY_TMP in scripts/job/ray_job.sh"
    fi
}

check_gpus() {                                               # and trials at once, as a worker job counts them; sets TRIALS
    local said cpus gpus Gw node
    if ! said=$(timeout 120 python "$REPO/scripts/job/this_node.py" 2>&1); then
        failed "GPUs: $(last "${said:-no answer within 120 s}" | sed 's/^ERROR: //')"
        return
    fi
    read -r cpus gpus Gw node < <(last "$said")
    if ((gpus < ${SLURM_GPUS_ON_NODE:-0})); then
        warning "GPUs: PyTorch uses $gpus of the $SLURM_GPUS_ON_NODE that Slurm gives; fix: if this node has them, look at nvidia-smi"
    else
        ok "GPUs: PyTorch computes on $gpus; this node: $node"
    fi
    on_slurm || return                                       # without it trials may share CPUs
    if said=$(python "$REPO/scripts/job/worker_capacity.py" --Cnode "$cpus" --Gnode "$gpus" --Gw "$Gw" 2>&1); then
        ok "$(head -n 1 <<<"$said")"
        TRIALS=$(grep -oP '^capacity: \K\d+' <<<"$said")
        while IFS= read -r said; do ok "$said"; done < <(
            timeout 60 python "$REPO/scripts/job/forecast.py" --slots "$((TRIALS * ${WORKER_NODES:-1}))" --Gw "$Gw" 2>/dev/null)
    else
        failed "capacity: $(last "$said")"
    fi
}

# ---- Between the two nodes: each listens on a free port at its node_address, as Ray does, and says who it is -------------
# patiently SECONDS WHAT CHECK...: wait_until, but a signal is not kept waiting. Once a minute a line tells what for.
patiently() {
    (wait_until "$@") >&2 2>/dev/null &
    WAITING=$!
    wait "$WAITING"
}
arrived()         { [[ -e $RUN_DIR/$1 ]]; }                  # a file in the shared folder
listening()       { arrived "port-$ROLE" || ! kill -0 "$LISTENER" 2>/dev/null; }
called_or_ended() { arrived "port-$1" || arrived "done-$1"; }

check_address() {                                            # others can call it only if it is one of this node's
    local address
    address=$(timeout 30 bash -c node_address 2>/dev/null)
    (owned python -u - "$address" "$RUN_DIR/port-$ROLE" "$ROLE of ${RUN_DIR##*/}" 2>"$RUN_DIR/listen-$ROLE" <<'PYTHON'
import os, socket, sys
address, file, name = sys.argv[1:]
with socket.create_server((address, 0)) as server:
    with open(file + ".tmp", "w") as out:
        out.write(f"{address} {server.getsockname()[1]}\n")
    os.rename(file + ".tmp", file)
    while True:
        with server.accept()[0] as connection:
            connection.sendall(name.encode() + b"\n")
PYTHON
    ) &
    LISTENER=$!
    patiently 30 "a port" listening
    if arrived "port-$ROLE"; then
        ok "address: others are told to reach this node at $address (it has $(hostname -I))"
    else
        failed "address: ${address:-none found}: $(last "$(<"$RUN_DIR/listen-$ROLE")"); fix: NODE_ADDRESS $EDIT; this node has $(hostname -I)"
    fi
}

check_reach() {                                              # check_reach OTHER: connect to it
    local other=$1 address port said
    if ! patiently $((WAIT * 60 + 60)) "the port of the $other" called_or_ended "$other" || ! arrived "port-$other"; then
        failed "$ROLE -> $other: the $other offers no port, see its address"
        return
    fi
    read -r address port <"$RUN_DIR/port-$other"
    # shellcheck disable=SC2016  # the inner shell's $0 and $1
    said=$(timeout 10 bash -c 'exec 3<>"/dev/tcp/$0/$1" && head -n 1 <&3' "$address" "$port" 2>&1) || said=${said:-no answer within 10 s}
    if [[ $said == "$other of ${RUN_DIR##*/}" ]]; then
        ok "$ROLE -> $other: connected to $address port $port"
    else
        failed "$ROLE -> $other: $address port $port: $(head -n 1 <<<"$said" | sed 's/.*: //'); fix: ask your site to open all ports between nodes, or NODE_ADDRESS $EDIT, of the network that is open"
    fi
    touch "$RUN_DIR/reached-$other"
}

# ---- The two jobs ------------------------------------------------------------------------------------------------------
submit() {                                                   # submit head|worker: its #SBATCH lines and EDIT block, then on_node
    local file=$HEAD script
    [[ $1 == head ]] || file=$WORKER
    grep -q '^# ==== end of EDIT' "$file" || { echo "${file##*/} has lost the line \"==== end of EDIT\" that ends its EDIT block"; return 1; }
    script=$(sed '/^# ==== end of EDIT/q' "$file"; printf 'source %q\non_node %q %q %q\n' "$REPO/scripts/check_site.sh" "$1" "$RUN_DIR" "$WAIT")
    cd "$EXERCISE" && timeout 60 sbatch --parsable --job-name="${RUN_DIR##*/}" --output="$RUN_DIR/$1.out" --time="$((WAIT + 10))" <<<"$script"
}

check_submission() {                                         # the head job submits the worker, as in a run
    local said
    if said=$(submit worker 2>&1); then
        ok "jobs can be submitted from this node"
    else
        failed "jobs cannot be submitted from this node, as the head job does: $(last "$said"); fix: sbatch on the PATH $EDIT, or ask your site to allow it"
        said=""                                              # then the login node submits it
    fi
    job_id "$said" >"$RUN_DIR/job-worker.tmp" && mv "$RUN_DIR/job-worker.tmp" "$RUN_DIR/job-worker"
}

on_node() {                                                  # on_node ROLE FOLDER WAIT: all that a job does
    set +e
    ROLE=$1 RUN_DIR=$2 WAIT=$3
    [[ -z ${NODE_ADDRESS:-} ]] || export NODE_ADDRESS
    trap 'end_owned; touch "$RUN_DIR/done-$ROLE"' EXIT
    trap 'exit 143' TERM
    touch "$RUN_DIR/up-$ROLE"
    patiently 60 "an answer" arrived "ask-$ROLE" && touch "$RUN_DIR/answer-$ROLE"
    [[ $ROLE == worker ]] || check_submission
    check_packages || exit 1
    prepare_ray
    check_address
    if [[ $ROLE == worker ]]; then
        check_gpus
    fi
    check_machine
    if [[ $ROLE == worker ]]; then check_reach head; else check_reach worker; fi
    patiently 60 "the other's call" arrived "reached-$ROLE"
}

check_machine() {
    check_inputs
    check_disk "$RUN_DIR" "$RUN_MB"
    check_disk /tmp "$TMP_MB"
    check_shm
    check_limits
    check_socket
}

# ---- The login node waits for them --------------------------------------------------------------------------------------
look() {                                                     # sets STATE of a job: "PENDING Resources", "RUNNING None worker1", "ended"
    local queue
    ((SECONDS >= NEXT_LOOK)) || return 0                     # Slurm is asked every three seconds, not all the time
    NEXT_LOOK=$((SECONDS + 3))
    queue=$(timeout 30 squeue --noheader --me --format='%i %T %r %N' 2>/dev/null) || return 0
    STATE=$(awk -v job="$1" '$1 == job { print $2, $3, $4 }' <<<"$queue")
    STATE=${STATE:-ended}
}
arrived_or_ended() { arrived "$1" || { look "$2"; [[ $STATE == ended ]]; }; }
both_done()        { arrived_or_ended done-head "$1" && arrived_or_ended done-worker "$2"; }

check_folder() {                                             # check_folder ROLE JOB: do login node and job see each other's files?
    local role=$1 job=$2 begin tenths
    echo "waiting for job $job, the $role node, for up to $WAIT minutes" >&2
    patiently $((WAIT * 60)) "job $job, the $role node" arrived_or_ended "up-$role" "$job"
    NEXT_LOOK=0 && look "$job"
    if ! arrived "up-$role"; then
        if [[ $STATE == PENDING* ]]; then
            failed "$role node: job $job has waited $WAIT minutes in the queue ($STATE); fix: --wait 60, or when the cluster is less busy"
        elif [[ -s $RUN_DIR/$role.out ]]; then
            failed "$role node: its job ended early: $(last "$(<"$RUN_DIR/$role.out")"); fix: the EDIT block of its .slurm file"
        else
            failed "shared folder: no file of job $job, the $role node ($STATE), arrives in $RUN_DIR; fix: put the repository on a file system that all nodes see"
        fi
        return 1
    fi
    begin=$(date +%s%N)
    touch "$RUN_DIR/ask-$role"
    patiently 60 "an answer of job $job" arrived_or_ended "answer-$role" "$job"
    tenths=$((($(date +%s%N) - begin) / 100000000))
    if ! arrived "answer-$role"; then
        failed "shared folder: a file written here is not seen on the $role node within 60 s; fix: another file system for the repository"
    elif ((tenths >= LATE * 10)); then
        warning "shared folder: from here to the $role node and back a file takes $((tenths / 10)) s, and a run starts and ends later by that; fix: another file system"
    else
        ok "shared folder: from here to the $role node and back a file takes $((tenths / 10)).$((tenths % 10)) s"
    fi
}

show() {                                                     # show ROLE: the lines of its job; of what its EDIT block has said before them, errors
    local text begun=""
    arrived "done-$1" || failed "$1 node: its checks were cut short: $(last "$(<"$RUN_DIR/$1.out")")"
    while IFS= read -r text; do
        if [[ -z ${COUNT[${text%% *}]:-} ]]; then            # the job goes on after an error there, as a run does
            [[ -n $begun || ! $text =~ (not found|[Nn]o such|[Ee]rror|[Uu]nable|annot) ]] ||
                warning "$1 node: its EDIT block says: ${text:0:200}; fix: the EDIT block of its .slurm file"
            continue
        fi
        begun=yes
        COUNT[${text%% *}]=$((COUNT[${text%% *}] + 1))
        printf '%s\n' "$text"
    done <"$RUN_DIR/$1.out"
}

check_nodes() {
    local head worker role roles=(head)
    head=$(submit head 2>&1) || { failed "head node: $(last "$head"); fix: ${HEAD##*/}"; return; }
    head=$(job_id "$head")
    check_folder head "$head" || return
    patiently 90 "the head node to submit the worker" arrived_or_ended job-worker "$head"
    worker=$(cat "$RUN_DIR/job-worker" 2>/dev/null)
    if [[ -z $worker ]] && ! worker=$(submit worker 2>&1); then
        failed "worker node: $(last "$worker"); fix: ${WORKER##*/}"
    elif worker=$(job_id "$worker") && check_folder worker "$worker"; then
        patiently 600 "the checks on both nodes" both_done "$head" "$worker"
        roles=(head worker)
    fi
    end_jobs                                                 # without a worker, the head would wait
    for role in "${roles[@]}"; do show "$role"; done
}

end_jobs() {
    local jobs deadline=$((SECONDS + 30))
    while jobs=$(timeout 10 squeue --noheader --me --name="${RUN_DIR##*/}" --format=%i 2>/dev/null) && [[ -n $jobs ]] && ((SECONDS < deadline)); do
        # shellcheck disable=SC2086  # one word a job
        timeout 10 scancel --quiet $jobs 2>/dev/null
        sleep 0.5
    done
}

finish() {
    local status=$?
    trap '' TERM INT HUP
    [[ -z ${WAITING:-} ]] || kill "$WAITING" 2>/dev/null
    [[ -z $RUN_DIR ]] || ! command -v squeue >/dev/null || end_jobs
    end_owned
    rm -rf "$RUN_DIR"
    rmdir "$EXERCISE/runs" 2>/dev/null
    exit "$status"
}

main() {
    case "$# $*" in
        "0 ") ;;
        "1 --help" | "1 -h") sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
        "2 --wait "[1-9] | "2 --wait "[1-9][0-9] | "2 --wait "[1-9][0-9][0-9]) WAIT=$2 ;;
        *) echo "usage: bash scripts/check_site.sh [--wait MINUTES], MINUTES from 1 to 999; not: $*" >&2; exit 2 ;;
    esac
    trap finish EXIT
    trap 'exit 143' TERM
    trap 'exit 130' INT
    trap 'exit 129' HUP
    set +u
    eval "$(sed -n '/^# ==== EDIT/,/^# ==== end of EDIT/p' "$HEAD")"   # the environment that the jobs will have
    set -u
    local said file slurm=yes
    check_slurm || slurm=""
    if ! said=$(mkdir -p "$EXERCISE/runs" 2>&1 && mktemp -d "$EXERCISE/runs/check_site.XXXX" 2>&1); then
        failed "run folder: $(last "$said"); fix: clone the repository where you may write, or make room there"
    elif RUN_DIR=$said && check_packages; then
        if [[ -n $slurm ]]; then
            for file in "$HEAD" "$WORKER" "$REPO/experiments/manual/bloom_hpo_manual.slurm"; do
                check_job_file "$file"
            done
            check_inputs
            check_nodes
        else
            prepare_ray
            check_gpus
            check_machine
        fi
    fi
    echo "${COUNT[ok]} ok, ${COUNT[warning]} warning, ${COUNT[FAILED]} FAILED"
    ((COUNT[FAILED] == 0))
}
[[ ${BASH_SOURCE[0]} != "$0" ]] || main "$@"
