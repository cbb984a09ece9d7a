#!/bin/bash
# Is this site ready for the course? Checks a login node and, by one sbatch, a head and a worker node, each got with the
# #SBATCH lines of its .slurm file, and experiments/site.sh. A line: ok, warning or FAILED; where; what; the fix.
#
#   bash scripts/check_site.sh              # on a login node; variables of the run go in front, such as MODEL_NAME=...
#   bash scripts/check_site.sh --wait 60    # minutes to wait for each node in the queue (default 10)
#
# Without Slurm it checks this machine alone. It ends its jobs and removes its files in every case.
# Exit status: 0 nothing FAILED, 1 something did, 2 wrong usage, 130 interrupted.
set -uo pipefail

# What a run needs, with reserve for larger nodes. In brackets: measured with the demo model on 2 cores.
NODE_THREADS=500                                             # of Ray on a node [80; head 153]; ulimit -u counts threads
TRIAL_THREADS=300                                            # of a trial with two workers [130, in 4 processes]

REPO=$(CDPATH="" cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
SITE=$REPO/experiments/site.sh
EXERCISE=$REPO/experiments/raytune/scheduler/asha
HEAD=$EXERCISE/head_node_raytune_asha_hpo.slurm
WORKER=$EXERCISE/worker_node_raytune_asha_hpo.slurm
ROLE="login" RUN_DIR="" WAIT=10 TRIALS=1 SLURM="" IN_SITE="in experiments/site.sh"
# shellcheck source=SCRIPTDIR/job/ray_job.sh
source "$REPO/scripts/job/ray_job.sh"                        # what a run does: node_address, prepare_ray ...

# ---- Lines -----------------------------------------------------------------------------------------------------------
declare -A COUNT=([ok]=0 [warning]=0 [FAILED]=0)
line() {                                                     # line KIND WHAT [FIX]
    COUNT[$1]=$((COUNT[$1] + 1))
    printf '%-7s  %-8s  %s%s\n' "$1" "${SLURMD_NODENAME:-$ROLE}" "$2" "${3:+; fix: $3}"
}
failed() { line FAILED "$@"; }
verdict() {                                                  # verdict STATUS WHAT CAUSE FIX [KIND]: 0 is ok
    if (($1 == 0)); then line ok "$2"; else line "${5:-FAILED}" "$2${3:+, $(last "$3")}" "$4"; fi
}
last() { tail -n 1 <<<"$1" | cut -c1-300; }                  # of what a command has said: the cause

# ---- On the login node: would Slurm run the jobs? --------------------------------------------------------------------
check_slurm() {                                              # sets SLURM=yes if there is one to go on with
    local said missing
    missing=$(type sbatch squeue scontrol scancel sinfo 2>&1 >/dev/null | sed -n 's/.*: \(.*\): not found/\1/p' | xargs)
    if [[ $missing == "sbatch squeue scontrol scancel sinfo" ]]; then
        line warning "Slurm: no sbatch here, so this machine alone is checked" "module load slurm, or a login node"
    elif [[ -n $missing ]]; then
        failed "Slurm: not on the PATH: $missing" "module load slurm, or add their folder to PATH, here and $IN_SITE"
    elif ! said=$(timeout 30 squeue --noheader --me --format=%i 2>&1); then
        failed "Slurm: no answer to squeue --me: $(last "$said")" "ask your site if Slurm is down, or older than 20.02"
    else
        line ok "Slurm: $(sbatch --version), all commands there"
        said=$(bash "$SITE" --check 2>&1) || failed "$(last "$said")"
        SLURM=yes
    fi
}

offered() { sinfo --noheader --format="$1" 2>/dev/null | sort -u | tr '\n' ' '; }
# Of a time as scontrol writes it, [D-]HH:MM:SS
seconds() { awk -F'[-:]' '{ print (NF > 3 ? $1 * 86400 : 0) + $(NF - 2) * 3600 + $(NF - 1) * 60 + $NF }' <<<"$1"; }

check_job_file() {                                           # does Slurm take this file, and can the job start one day?
    local name=${1##*/} folder=${1%/*} said job record asked partition limit fix variables
    [[ -w $folder/logs ]] ||                                 # else Slurm takes the job, and it ends without a word
        failed "$name: its log folder $folder/logs is missing or read-only" "mkdir -p $folder/logs"
    variables=$(compgen -e SBATCH_ | sed 's/^/, or the variable /' | tr -d '\n')
    if ! said=$(cd "$folder" && timeout 60 sbatch --test-only "$name" "$RUN_DIR" 0 2>&1); then
        case $said in
            *feature*) fix="the constraint $IN_SITE, or none; there are: $(offered %f)" ;;
            *partition*specified*) fix="the partition $IN_SITE, one of: $(offered %R)" ;;
            *account* | *QOS*) fix="the account $IN_SITE; yours: sacctmgr show associations user=$(id -un)" ;;
            *"node configuration"*) fix="lower the GPUs or CPUs; partition, CPUs, GPUs: $(offered %R,%c,%G)" ;;
            *denied*) fix="submit from a login node, or to another partition" ;;
            *) fix="the #SBATCH lines" ;;
        esac
        failed "$name: Slurm refuses it: $(last "$(grep -v ^Try <<<"${said:-no answer within 60 s}")")" "$fix$variables"
        return
    fi
    # Slurm also reads variables, and they beat the lines of the file. So what counts is what it has understood.
    job=$(job_id "$(cd "$folder" && timeout 60 sbatch --hold --job-name="${RUN_DIR##*/}" "$name" "$RUN_DIR" 0 2>&1)")
    record=$(timeout 60 scontrol show job "$job" 2>&1)
    timeout 30 scancel "$job"
    asked=$(grep -oP ' TimeLimit=\K\S+' <<<"$record") partition=$(grep -oP '\bPartition=\K\S+' <<<"$record")
    limit=$(timeout 30 scontrol show partition "$partition" | grep -oP ' MaxTime=\K\S+')
    if [[ $limit == [0-9]* && $asked == [0-9]* ]] && (($(seconds "$asked") > $(seconds "$limit"))); then
        failed "$name: its time limit $asked is above that of partition $partition, $limit, so it would never start" \
            "#SBATCH --time=$limit, or another partition$variables"
    else
        said=$(grep -oE '(NumCPUs|TresPer[A-Z][a-z]+|CpusPerTres|MinMemory[A-Z]+)=\S+' <<<"$record" | paste -sd' ')
        line ok "$name: Slurm takes it, as Partition=$partition TimeLimit=$asked $said"
    fi
}

# ---- On every machine ------------------------------------------------------------------------------------------------
check_packages() {                                           # 1: there is no Python to go on with
    local said
    said=$( (choose_python) 2>&1) || { failed "Python: ${said#ERROR: }"; return 1; }
    choose_python
    said=$(grep -v '^-' "$REPO/requirements.txt" |
        timeout 120 python -m pip install --quiet --no-index --no-deps --dry-run --requirement /dev/stdin 2>&1)
    verdict $? "packages: those of requirements.txt, $(python --version), $(command -v python)" \
        "but not $(grep -oEm 1 '[^ ]+==[^ ,]+' <<<"$said" || last "$said")" \
        "bash scripts/setup_env.sh, or activate the environment $IN_SITE"
}

check_inputs() {                                             # variables, model and data, as the search finds them
    local said error
    if said=$(owned timeout 300 python "$REPO/scripts/job/check_inputs.py" 2>&1); then
        line ok "inputs: $(sed -nE 's/^ *(MODEL_NAME|SQUAD_DATA) +/\1=/p' <<<"$said" | paste -sd' ') can be loaded"
        return
    fi
    grep -q '^ERROR' <<<"$said" || said="ERROR: $(last "${said:-no answer within 300 s}")"
    while read -r error; do failed "inputs: $error"; done < <(sed -n 's/^ERROR: //p' <<<"$said")
}

check_disk() {                                               # check_disk FOLDER MB FIX [KIND]: only writing tells of a quota
    local free said=""
    free=$(df --output=avail -BM "$1" 2>/dev/null | tail -n 1 | tr -d 'M ' | grep . || echo 0)
    ((free >= $2)) && said=$(timeout 120 dd if=/dev/zero of="$1/check_site.$JOB" bs=1M count=50 conv=fsync 2>&1)
    verdict $? "disk: $1 has $free MB free, a run needs $2" "${said:+50 MB cannot be written: ${said%%$'\n'*}}" \
        "$3" "${4:-FAILED}"
    rm -f "$1/check_site.$JOB"
}

check_limits() {
    local processes need=$((NODE_THREADS + TRIALS * TRIAL_THREADS))
    processes=$(python "$REPO/scripts/job/this_node.py" --processes)
    [[ $processes == inf ]] || ((processes >= need))
    verdict $? "processes: $processes more may be started, $TRIALS trial(s) at once need $need" \
        "$NODE_THREADS for Ray, $TRIAL_THREADS a trial" "ulimit -u (now $(ulimit -u)) before sbatch and $IN_SITE"
}

check_gpus() {                                               # and TRIALS at once, as a worker job counts them
    local said cpus gpus Gw memory card node
    said=$(timeout 120 python "$REPO/scripts/job/this_node.py" 2>&1) ||
        { failed "GPUs: $(last "${said:-no answer within 120 s}" | sed 's/^ERROR: //')"; return; }
    read -r cpus gpus Gw memory card node < <(last "$said")
    ((gpus >= ${SLURM_GPUS_ON_NODE:-0}))
    verdict $? "GPUs: PyTorch computes on $gpus; this node: $node" "but Slurm gives ${SLURM_GPUS_ON_NODE:-0}" \
        "look at nvidia-smi" warning
    on_slurm || return                                       # without it trials may share CPUs
    said=$(python "$REPO/scripts/job/worker_capacity.py" --Cnode "$cpus" --Gnode "$gpus" --Gw "$Gw" \
        --Mnode "$memory" --Mcard "$card" 2>&1)
    TRIALS=$(grep -oP '^capacity: \K\d+' <<<"$said")
    ((${TRIALS:-0} > 0))
    verdict $? "$(head -n 1 <<<"$said")" "$said" "the CPUs and GPUs in ${WORKER##*/}"
}

check_machine() {
    [[ $ROLE == head ]] || check_gpus
    check_inputs
    check_disk "$RUN_DIR" 100 "make room (quota -s), or clone to a larger file system"   # without checkpoints [5]
    check_disk /tmp 1000 "make room"                         # Ray's folder [45]; its objects if /dev/shm is small
    check_disk /dev/shm 500 "container: --shm-size=1g" warning   # Ray's objects, see start_ray
    check_limits
}

# ---- Between the two nodes: each listens on a free port at its node_address, as Ray does -----------------------------
patiently() {                                                # patiently SECONDS CHECK...: 1 if it takes longer
    local end=$((SECONDS + $1))
    until "${@:2}"; do
        ((SECONDS < end)) || return 1
        sleep 0.2
    done
}
arrived()         { [[ -e $RUN_DIR/$1 ]]; }                  # a file in the shared folder
called_or_ended() { [[ -s $RUN_DIR/port-$1 ]] || arrived "done-$1"; }
LISTEN='import os, socket, sys
server = socket.create_server((sys.argv[1], 0), family=socket.getaddrinfo(sys.argv[1], 0)[0][0])
print(*server.getsockname()[:2], flush=True)
if os.fork(): sys.exit()   # it listens, and goes on in the background
while True: server.accept()[0].sendall(sys.argv[2].encode())'

check_address() {                                            # others can call it only if it is one of this node's
    local address said=$RUN_DIR/listen-$ROLE
    address=$(node_address 2>/dev/null)
    (owned timeout 30 python -c "$LISTEN" "$address" "$ROLE of ${RUN_DIR##*/}" >"$RUN_DIR/port-$ROLE" 2>"$said")
    verdict $? "address: others reach $address, this node has $(hostname -I)" "$(<"$said")" "NODE_ADDRESS $IN_SITE"
}

check_reach() {                                              # check_reach OTHER: connect to it
    local other=$1 address port said
    patiently $((WAIT * 60 + 60)) called_or_ended "$other"
    if ! read -r address port <"$RUN_DIR/port-$other"; then
        failed "$ROLE -> $other: the $other offers no port, see its address"
    elif said=$(timeout 10 bash -c "exec 3<>/dev/tcp/$address/$port && cat <&3" 2>&1)
        [[ $said == "$other of ${RUN_DIR##*/}" ]]; then
        line ok "$ROLE -> $other: connected to $address port $port"
    else
        failed "$ROLE -> $other: $address port $port: $(head -n 1 <<<"${said:-no answer}" | sed 's/.*: //')" \
            "ask your site to open all ports between nodes, or NODE_ADDRESS $IN_SITE, of the network that is open"
    fi
    touch "$RUN_DIR/reached-$other"
}

submit() {                                                   # submit head|worker: #SBATCH lines, site.sh, on_node
    cd "$EXERCISE" && { echo '#!/bin/bash'; grep '^#SBATCH' "$1_node_raytune_asha_hpo.slurm"
        printf 'source %q\nsource %q\n' "$SITE" "$REPO/scripts/check_site.sh"
        printf 'on_node %q %q %q\n' "$1" "$RUN_DIR" "$WAIT"; } |
        timeout 60 sbatch --job-name="${RUN_DIR##*/}" --output="$RUN_DIR/$1.out" --time="$((WAIT + 10))"
}

on_node() {                                                  # on_node ROLE FOLDER WAIT: all that a job does
    ROLE=$1 RUN_DIR=$2 WAIT=$3
    local said
    declare -A other=([head]=worker [worker]=head)
    trap 'end_owned; touch "$RUN_DIR/done-$ROLE"' EXIT
    on_signal 'exit 143' TERM
    said=$(grep -iE 'not found|no such|error|unable|cannot' "$RUN_DIR/$ROLE.out")
    [[ -z $said ]] || line warning "experiments/site.sh: $(last "$said")" "that line of it"   # a job goes on after it
    touch "$RUN_DIR/up-$ROLE"
    if [[ $ROLE == head ]]; then                             # it submits the workers
        if said=$(cd "$EXERCISE" && timeout 60 sbatch --test-only "$WORKER" "$RUN_DIR" 0 2>&1); then
            line ok "jobs can be submitted from this node"
        else
            failed "jobs cannot be submitted from this node: $(last "$said")" "PATH $IN_SITE, or ask your site"
        fi
    fi
    own_folder
    check_packages || exit 1
    prepare_ray
    check_address
    check_machine
    check_reach "${other[$ROLE]}"
    patiently 60 arrived "reached-$ROLE"
}

# ---- The login node waits for them -----------------------------------------------------------------------------------
declare -A JOBS=() STATE=()                                  # by role; STATE: "PENDING Resources", "ended"
arrived_or_ended() {                                         # arrived_or_ended FILE ROLE: asks Slurm every 2 s
    local queue
    arrived "$1-$2" && return
    sleep 2
    queue=$(timeout 30 squeue --noheader --me --format='%i %T %r' 2>/dev/null) || return
    STATE[$2]=$(grep -oP "^${JOBS[$2]} \K.*" <<<"$queue" || echo "ended")
    [[ ${STATE[$2]} == ended ]]
}

await_node() {                                               # await_node ROLE: until its job has a file here
    local role=$1
    echo "waiting for job ${JOBS[$role]}, the $role node, for up to $WAIT minutes" >&2
    patiently $((WAIT * 60)) arrived_or_ended up "$role"
    if arrived "up-$role"; then
        line ok "shared folder: the $role node's files arrive in $RUN_DIR"
    elif [[ ${STATE[$role]} == PENDING* ]]; then
        failed "$role node: its job has waited $WAIT minutes in the queue (${STATE[$role]})" "--wait 60"
    elif [[ -s $RUN_DIR/$role.out ]]; then
        failed "$role node: its job ended early: $(last "$(<"$RUN_DIR/$role.out")")" "experiments/site.sh"
    else
        failed "shared folder: nothing of the $role node (${STATE[$role]}) arrives in $RUN_DIR" \
            "the repository on a file system that all nodes see, by this path: $(cd -P "$EXERCISE" && pwd)"
    fi
    arrived "up-$role"
}

check_nodes() {
    local role said kind
    for role in head worker; do
        said=$(submit "$role" 2>&1) || { failed "$role node: $(last "$said")" "its #SBATCH lines"; return; }
        JOBS[$role]=$(job_id "$said") STATE[$role]="unknown"
    done
    if await_node head && await_node worker; then
        echo "waiting for the checks on both nodes, for up to 10 minutes" >&2
        for role in head worker; do patiently 600 arrived_or_ended "done" "$role"; done
    fi
    end_jobs                                                 # without a worker, the head would wait
    for role in head worker; do
        arrived "up-$role" || continue
        arrived "done-$role" || failed "$role node: its checks were cut short: $(last "$(<"$RUN_DIR/$role.out")")"
        said=$(grep -E '^(ok|warning|FAILED) ' "$RUN_DIR/$role.out") && echo "$said"
        for kind in "${!COUNT[@]}"; do COUNT[$kind]=$((COUNT[$kind] + $(grep -c "^$kind " <<<"$said"))); done
    done
}

end_jobs() {
    timeout 30 scancel --quiet --user="$(id -un)" --name="${RUN_DIR##*/}" 2>/dev/null
    patiently 30 no_jobs
}
no_jobs() { [[ -z $(timeout 10 squeue --noheader --me --name="${RUN_DIR##*/}" 2>/dev/null) ]]; }

finish() {
    local status=$?
    trap '' TERM INT HUP
    [[ -z $RUN_DIR ]] || end_jobs
    end_owned
    rm -rf "$RUN_DIR"
    rmdir "$EXERCISE/runs" 2>/dev/null
    exit "$status"
}

main() {
    local said file
    case "$# $*" in
        "0 ") ;;
        "1 --help" | "1 -h") sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
        "2 --wait "[1-9] | "2 --wait "[1-9][0-9] | "2 --wait "[1-9][0-9][0-9]) WAIT=$2 ;;
        *) echo "usage: bash scripts/check_site.sh [--wait MINUTES], MINUTES from 1 to 999; not: $*" >&2; exit 2 ;;
    esac
    trap finish EXIT
    on_signal 'exit 130' INT TERM HUP
    set +u                                                   # conda and modules break under it
    # shellcheck source=SCRIPTDIR/../experiments/site.sh
    source "$SITE"                                           # the environment that the jobs will have
    set -u
    check_slurm
    if ! said=$(mkdir -p "$EXERCISE/runs" 2>&1 && mktemp -d "$EXERCISE/runs/check_site.XXXX" 2>&1); then
        failed "run folder: $(last "$said")" "clone the repository where you may write, or make room there"
    elif RUN_DIR=$said && own_folder && check_packages; then
        if [[ -n $SLURM ]]; then
            for file in "$HEAD" "$WORKER" "$REPO"/experiments/manual/*.slurm; do check_job_file "$file"; done
            check_inputs
            check_nodes
        else
            prepare_ray
            check_machine
        fi
    fi
    echo "${COUNT[ok]} ok, ${COUNT[warning]} warning, ${COUNT[FAILED]} FAILED"
    ((COUNT[FAILED] == 0))
}
[[ ${BASH_SOURCE[0]} != "$0" ]] || main "$@"
