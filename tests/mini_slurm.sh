#!/bin/bash
# A real Slurm on one Debian or Ubuntu machine: for the tests, and to try sbatch without a cluster.
#
#   eval "$(bash tests/mini_slurm.sh up)"   # start it (if need be: install it) and point this shell to it
#   sinfo                                   # head: 8 CPUs; worker1, worker2: 20 CPUs, 8 GPUs in name, feature v100
#   bash tests/mini_slurm.sh down           # cancel all jobs, stop all daemons, remove the folder
#
# `up` writes nothing but the export line of SLURM_CONF to stdout; the log is on stderr. Jobs run as the user who submits
# them; the CPUs and GPUs of the nodes are booked, not there. All files are in one folder, MINI_SLURM_DIR (default:
# /tmp/mini_slurm.<uid>); several can be up at once, and a Slurm in /etc/slurm is not touched. Root's serves all users,
# another user's only that user. MINI_SLURM_FIRST_JOB: the number of its first job (default: after the last that has a
# log in this repository, so that no job writes into another's files).
#
# Where root can make namespaces, each node is a machine of its own: address, network, processes, hostname, /etc/hosts,
# /dev/shm, /tmp (from outside: MINI_SLURM_DIR/nodes/NAME/tmp). All else is shared, and in /tmp the repository and the
# folders of MINI_SLURM_SHARED (colons between them). Elsewhere all nodes are this machine. Trouble for machines:
#
#   ... on worker1 COMMAND...               # run it on that node
#   ... cut worker1 | heal worker1          # pull its network cable; plug it in again
#   ... power-off worker1 | restart worker1 # all its processes end at once; it starts again, with an empty /tmp
#   ... lag worker1 FOLDER SECONDS          # a shared folder as by NFS: what is known of a file, also that there is
#                                           # none, is believed for so long; needs package bindfs
#   ... freeze | thaw                       # slurmctld answers nobody; it answers again
set -euo pipefail

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
KILL_WAIT=10                            # seconds from SIGTERM to SIGKILL when a job is cancelled
DIR=${MINI_SLURM_DIR:-/tmp/mini_slurm.$UID}
PATH=$PATH:/usr/sbin:/sbin              # where the daemons are, and a normal user's PATH is not

log()   { printf '%s mini_slurm: %s\n' "$(date +%T)" "$*" >&2; }
die()   { log "$*"; exit 1; }
usage() { sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; }

check_folder() {    # `down` removes the folder with all that is in it: take none that is not ours
    [[ ! -L $DIR ]] || die "MINI_SLURM_DIR=$DIR is a symbolic link; name the folder itself"
    DIR=$(realpath -m -- "$DIR")
    export SLURM_CONF=$DIR/slurm.conf
    [[ $DIR =~ ^/[A-Za-z0-9._/-]{1,59}$ ]] ||     # longer ones are too long for Slurm's sockets
        die "MINI_SLURM_DIR=$DIR: only letters, digits and . _ - / please, and at most 60 characters"
    [[ -e $DIR ]] || return 0
    [[ -d $DIR && -O $DIR ]] || die "$DIR is not a folder of user $(id -un); set MINI_SLURM_DIR to another one"
    [[ -e $DIR/mini_slurm || -z $(ls -A -- "$DIR") ]] || die "$DIR holds files that are not mini_slurm's"
}

lock_folder() {     # one up or down at a time; a folder that was removed while we waited is not the one to lock
    until [[ $DIR -ef /dev/fd/9 ]]; do
        mkdir -p -- "$DIR"
        exec 9<"$DIR"
        flock -w 120 9 || die "another mini_slurm.sh has been busy in $DIR for 120 s"
    done
}

free_ports() {      # prints four that nobody listens on, below those that the kernel hands out by itself
    local port
    for port in $(shuf -i 20000-31999 -n 50); do
        (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || echo "$port"
    done | head -n 4 | xargs
}

last_job() {        # the highest job id among the logs of this repository, or nothing
    find "$REPO/experiments" -name '*-*.out' ! -name '*-local-*' 2>/dev/null |
        sed -nE 's/.*-0*([0-9]{1,7})\.out$/\1/p' | sort -n | tail -n 1
}

# ---- Nodes as machines ------------------------------------------------------------------------------------------------
# The switch between them is in slurmctld's network, with a cable to this machine, interface ms<number>: all of it goes
# with the processes, whatever ends them.
NODES=(head worker1 worker2)
MACHINE=(--net --uts --ipc --pid --mount)   # the namespaces that make one

take_network() {    # sets NETWORK, the number of one that no other sandbox has; 1: no machines to be had here
    (( EUID == 0 )) && unshare "${MACHINE[@]}" --mount-proc --fork bash -ec \
        'mount -t tmpfs tmpfs /dev/shm; ip link add eth0 type veth; ip link add switch type bridge' || return 1
    for NETWORK in {1..254}; do
        ! ip link add "ms$NETWORK" type veth peer name "ms$NETWORK-switch" || return 0
    done
    return 1
} 2>/dev/null

address_of() { sed -nE "s/^NodeName=$1 NodeAddr=(10\.77\.[0-9.]+) .*/\1/p" "$SLURM_CONF" | grep .; }  # 1: no machine
at_switch()  { nsenter --net="/proc/$(<"$DIR/run/slurmctld.pid")/ns/net" "$@"; }

# shellcheck disable=SC2016  # in '...', $1 and so on are those of the shell that runs it
start_switch() {    # and slurmctld
    start slurmctld unshare --net bash -euc '
        nsenter --net="/proc/$PPID/ns/net" ip link set "ms$1-switch" netns $$
        ip link add switch type bridge
        ip addr add "10.77.$1.254/24" dev switch
        ip link set "ms$1-switch" master switch
        for device in switch "ms$1-switch" lo; do ip link set "$device" up; done
        exec slurmctld -D -f "$2"' bash "$NETWORK" "$SLURM_CONF"
    ip addr add "10.77.$NETWORK.1/24" dev "ms$NETWORK"
    ip link set "ms$NETWORK" up
}

# shellcheck disable=SC2016
start_machine() {   # start_machine NAME ADDRESS: and its slurmd
    local name home=$DIR/nodes/$1
    rm -rf "$home" "$DIR/run/slurmd-$1.pid"
    mkdir -p "$home"
    mkdir -m 1777 "$home/tmp"
    {
        printf '127.0.0.1 localhost\n127.0.1.1 %s\n%s.1 login\n' "$1" "${2%.*}"     # its own name as in Debian's
        for name in "${NODES[@]}"; do [[ $name == "$1" ]] || echo "$(address_of "$name") $name"; done
    } >"$home/hosts"
    # This shell is the machine's first process: when it ends, Linux ends all others.
    start "$1" unshare "${MACHINE[@]}" --fork --kill-child bash -euc '
        read -r pid _ </proc/self/stat      # as the machine outside counts
        echo "$pid" >"$4/run/$1.init"
        ip link add eth0 type veth peer name "$1" netns "/proc/$5/ns/net"
        nsenter --net="/proc/$5/ns/net" ip link set "$1" master switch up
        ip addr add "$2/24" dev eth0
        for device in eth0 lo; do ip link set "$device" up; done
        hostname "$1"
        mount -t proc proc /proc
        mount -t tmpfs -o mode=1777 tmpfs /dev/shm
        mount --bind "$3/hosts" /etc/hosts
        IFS=:
        for folder in $6; do
            [[ -d $folder && $folder == /tmp/* ]] || continue
            mkdir -p "$3/tmp/${folder#/tmp/}"
            mount --rbind "$folder" "$3/tmp/${folder#/tmp/}"
        done
        mount --rbind "$3/tmp" /tmp
        cd "$4"
        slurmd -D -f "$4/slurm.conf" -N "$1"
        exit' bash "$1" "$2" "$home" "$DIR" "$(<"$DIR/run/slurmctld.pid")" "$(<"$DIR/shared")"
    await_up 30 "node $1 to start" test -s "$DIR/run/slurmd-$1.pid"
}

power_off() {       # power_off NAME
    runs "$1" || return 0
    kill -s KILL "$(<"$DIR/run/$1.init")"
    await 10 ends "$1" || die "node $1 does not go off"
}

on() {              # on NAME COMMAND...
    runs "$1" || die "node $1 is off; start it: mini_slurm.sh restart $1"
    nsenter --target "$(<"$DIR/run/$1.init")" "${MACHINE[@]}" -- "${@:2}"
}

lag() {             # lag NAME FOLDER SECONDS; 0: no longer
    ! on "$1" grep -q " $2 fuse" /proc/mounts || on "$1" umount -l "$2"
    (( $3 == 0 )) || on "$1" bindfs -o "negative_timeout=$3,entry_timeout=$3,attr_timeout=$3" "$2" "$2"
}

trouble() {         # trouble VERB [NODE]...
    local state address=""
    check_folder
    runs slurmctld || die "no sandbox is up in $DIR"
    [[ $1 == freeze || $1 == thaw ]] || address=$(address_of "${2:-}") ||
        die "$1 ${2:-}: no machine of its own in this sandbox; its nodes: ${NODES[*]}"
    case $1 in
        on)         on "${@:2}" ;;
        cut)        at_switch ip link set "$2" down ;;
        heal)       at_switch ip link set "$2" up ;;
        power-off)  power_off "$2" ;;
        restart)    power_off "$2"
                    start_machine "$2" "$address"
                    for state in down resume; do    # by itself Slurm believes for a minute that its jobs still run
                        timeout 30 scontrol update nodename="$2" state=$state reason="was off" 2>/dev/null || true
                    done ;;
        lag)        lag "${@:2}" ;;
        freeze)     kill -s STOP "$(<"$DIR/run/slurmctld.pid")" ;;
        thaw)       kill -s CONT "$(<"$DIR/run/slurmctld.pid")" ;;
    esac
}

# ---- Slurm -------------------------------------------------------------------------------------------------------------
write_config() {
    local ports i controller=127.0.0.1 worker="RealMemory=512000 CPUs=20 Weight=10 Gres=gpu:v100:8 Feature=v100"
    local at=("127.0.0.1 NodeHostname=localhost"{,,})       # head, worker1, worker2
    touch "$DIR/mini_slurm"             # marks the folder as ours
    chmod 755 "$DIR"
    read -ra ports <<<"$(free_ports)"
    NETWORK=""
    if take_network; then
        echo "$DIR:$REPO:${MINI_SLURM_SHARED:-}" >"$DIR/shared"
        controller=10.77.$NETWORK.254 at=("10.77.$NETWORK".{2,3,4})
    fi
    mkdir "$DIR"/{munge,run,log,gpu,spool} "$DIR"/spool/{head,worker1,worker2}
    mkdir -m 700 "$DIR/state"
    (umask 077; head -c 256 /dev/urandom >"$DIR/munge/key")
    for i in {0..7}; do ln -s /dev/null "$DIR/gpu/gpu$i"; done  # Slurm wants one device file per GPU; any will do
    printf '%s\n' "AutoDetect=off" "NodeName=worker[1-2] Name=gpu Type=v100 File=$DIR/gpu/gpu[0-7]" >"$DIR/gres.conf"
    # From 22.05 on slurmd looks for cgroups and systemd, which containers often lack, unless told not to.
    case $(slurmd -V) in
        *\ 2[01].*)         ;;          # does not know the setting
        *\ 22.* | *\ 23.*)  echo "CgroupPlugin=cgroup/v1" >"$DIR/cgroup.conf" ;;    # no "disabled" yet; not used
        *)                  echo "CgroupPlugin=disabled" >"$DIR/cgroup.conf" ;;
    esac
    # The lower weight is filled first: small jobs go to head and leave the workers' CPUs alone. Memory is not
    # booked (CR_CPU). MinJobAge: `scontrol show job` answers for an hour after the end. bf_interval: a job that
    # fits is not kept waiting for half a minute by one that does not.
    cat >"$DIR/slurm.conf" <<END
ClusterName=sandbox
SlurmctldHost=localhost($controller)
SlurmctldPort=${ports[0]}
FirstJobId=${MINI_SLURM_FIRST_JOB:-$(($(last_job) + 1))}
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthInfo=socket=$DIR/munge/socket
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$DIR/run/slurmctld.pid
SlurmdPidFile=$DIR/run/slurmd-%n.pid
MinJobAge=3600
SchedulerParameters=bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
GresTypes=gpu
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
KillWait=$KILL_WAIT
BatchStartTimeout=60
MessageTimeout=30
SlurmdTimeout=30
NodeName=head NodeAddr=${at[0]} Port=${ports[1]} RealMemory=512000 CPUs=8 Weight=1
NodeName=worker1 NodeAddr=${at[1]} Port=${ports[2]} $worker
NodeName=worker2 NodeAddr=${at[2]} Port=${ports[3]} $worker
PartitionName=batch Nodes=head,worker1,worker2 Default=YES MaxTime=INFINITE State=UP
END
}

install_packages() {
    local tool missing="" policy=/usr/sbin/policy-rc.d packages=(slurm-wlm munge iproute2)
    local tools=(munged munge slurmctld slurmd sbatch squeue sinfo scontrol scancel)
    (( EUID != 0 )) || tools+=(ip)          # only root makes machines
    for tool in "${tools[@]}"; do
        command -v "$tool" >/dev/null || missing+=" $tool"
    done
    [[ -n $missing ]] || return 0
    command -v apt-get >/dev/null || die "no apt-get here: install Slurm and munge yourself (missing:$missing)"
    (( EUID == 0 )) || die "missing$missing; install them with: sudo apt-get install -y ${packages[*]}"
    log "installing ${packages[*]} (missing:$missing)"
    if [[ ! -e $policy ]]; then         # Debian's way to say: do not start the services of what is installed now
        trap 'rm -f /usr/sbin/policy-rc.d' EXIT
        install -m 755 <(printf '#!/bin/sh\nexit 101\n') "$policy"
    fi
    export DEBIAN_FRONTEND=noninteractive
    apt-get -o DPkg::Lock::Timeout=300 update -qq </dev/null >&2
    apt-get -o DPkg::Lock::Timeout=300 install -qq -y --no-install-recommends "${packages[@]}" </dev/null >&2
}

start() {           # start NAME COMMAND...: in the background, in a session of its own; its pid goes to run/NAME.pid
    local name=$1
    shift
    # A script's background process ignores INT and QUIT, and so would every job: set them back.
    (cd "$DIR" && exec setsid env --default-signal=INT,QUIT "$@" </dev/null >>"log/$name.err" 2>&1 9<&-) &
    echo $! >"$DIR/run/$name.pid"
}

runs() { local pid; pid=$(cat "$DIR/run/$1.pid" 2>/dev/null) && grep -qsF -- "$DIR/" "/proc/$pid/cmdline"; }
ends() { ! runs "$1"; }
all_running() { local name; for name in munged slurmctld "${NODES[@]}"; do runs "$name" || return 1; done; }
munge_answers()     { timeout 5 munge --socket="$DIR/munge/socket" --no-input; }
slurmctld_answers() { timeout 5 scontrol ping; }
nodes_usable() {    # all three idle or at work; a node that Slurm has set aside is called back
    local node state usable=0
    while read -r node state; do
        case $state in
            idle | mixed | allocated | completing) usable=$(( usable + 1 )) ;;
            drain* | down* | inval*) timeout 5 scontrol update nodename="$node" state=resume || true ;;
        esac
    done < <(timeout 5 sinfo --noheader --Node --format='%N %T')
    (( usable == 3 ))
}

await() {           # await SECONDS CONDITION...: 0 once the condition holds, 1 if that takes longer
    local end=$(( SECONDS + $1 ))
    until "${@:2}" >/dev/null 2>&1; do
        (( SECONDS < end )) || return 1
        sleep 0.1
    done
}

await_up() {        # await_up SECONDS WHAT CONDITION...: dies if it takes longer
    await "$1" "${@:3}" || { (cd "$DIR/log" && tail -n 8 ./*.err) >&2; die "waited $1 s for $2"; }
}

up() {
    local name
    check_folder
    install_packages
    lock_folder
    if all_running && slurmctld_answers >/dev/null 2>&1 && await 10 nodes_usable; then
        log "already up in $DIR"
    else
        stop_everything
        write_config
        # --force: only warn if a parent folder is not to munge's taste (a private home, a test's own /tmp)
        start munged munged --foreground --force --socket="$DIR/munge/socket" --key-file="$DIR/munge/key" \
            --pid-file="$DIR/run/munged.pid" --seed-file="$DIR/munge/seed"
        await_up 20 "munged to answer" munge_answers
        if [[ -n $NETWORK ]]; then
            start_switch
            await_up 30 "slurmctld to answer" slurmctld_answers
            for name in "${NODES[@]}"; do start_machine "$name" "$(address_of "$name")"; done
        else
            start slurmctld slurmctld -D -f "$SLURM_CONF"
            for name in "${NODES[@]}"; do start "$name" slurmd -D -f "$SLURM_CONF" -N "$name"; done
        fi
        await_up 30 "all nodes to be idle" nodes_usable
        log "up in $DIR; $([[ -n $NETWORK ]] && echo "each node is a machine" || echo "all nodes are this machine")"
    fi
    printf 'export SLURM_CONF=%q\n' "$SLURM_CONF"
}

leftovers() {       # prints the pids that belong to this folder: daemons, job steps, and all that the jobs started
    local link pid
    # Slurm's own processes work inside the folder (a job step blanks its command line and environment) ...
    while read -r link; do
        pid=${link//[!0-9]/}
        [[ ! $(cat "/proc/$pid/comm" 2>/dev/null) =~ ^(munged|slurm.*|unshare)$ ]] || echo "$pid"
    done < <(find /proc/[0-9]*/cwd -maxdepth 0 \( -lname "$DIR" -o -lname "${DIR}[/ ]*" \) 2>/dev/null)
    # ... and a job's processes, even those that left its process tree, have these two variables.
    { grep -lzsFx "SLURM_CONF=$DIR/slurm.conf" /proc/[0-9]*/environ || true; } |
        { xargs -r grep -lzsEx 'SLURMD_NODENAME=(head|worker[12])' || true; } | tr -dc '0-9\n'
}
no_leftovers()      { [[ -z $(leftovers) ]]; }
signal_leftovers()  { local pid; for pid in $(leftovers); do kill -s "$1" "$pid" 2>/dev/null || true; done; }
no_jobs()           { local jobs; jobs=$(timeout 5 squeue --noheader) && [[ -z $jobs ]]; }

stop_everything() { # jobs first and in peace, then the daemons and whatever is left; an empty folder remains
    local name
    if all_running; then
        kill -s CONT "$(<"$DIR/run/slurmctld.pid")"     # it may be frozen
        timeout 10 scancel --partition=batch || true
        await $(( KILL_WAIT + 5 )) no_jobs || log "some jobs do not end: killing them"
    fi
    for name in "${NODES[@]}"; do [[ ! -s $DIR/run/$name.init ]] || power_off "$name"; done
    signal_leftovers TERM
    await 3 no_leftovers || signal_leftovers KILL
    await 5 no_leftovers || die "these processes do not end: $(leftovers | tr '\n' ' ')"
    [[ ! -e $DIR ]] || find "$DIR" -mindepth 1 ! -path "$DIR/mini_slurm" -delete
}

down() {
    check_folder
    [[ ! -e $DIR ]] || lock_folder
    stop_everything
    rm -rf -- "$DIR"
    log "down; nothing is left in $DIR"
}

main() {
    umask 022
    unset "${!SLURM_@}" "${!SBATCH_@}"  # of a job or a cluster that this shell may belong to
    case $* in
        up | down)          "$1" ;;
        "on "* | "cut "* | "heal "* | "power-off "* | "restart "* | "lag "* | freeze | thaw) trouble "$@" ;;
        -h | --help | "")   usage ;;
        *)                  log "unknown argument: $*"; usage >&2; exit 2 ;;
    esac
}
main "$@"
