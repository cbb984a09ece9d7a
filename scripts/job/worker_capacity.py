#!/usr/bin/env python3
"""How many trials a worker node runs at once.

    python worker_capacity.py                                  # the exercise's worker node: 20 CPUs, 8 GPUs
    python worker_capacity.py --Cnode 32 --Gnode 4 --nodes 3   # another one
    python worker_capacity.py --slots --Cnode 20 --Gnode 0     # the number alone, for scripts
    scontrol show job 4711 | python worker_capacity.py --record     # Cnode and Gnode as Slurm understood this job
"""

import argparse
import os
import re
import sys


def trials_at_once(W, Cw, Gw, Csys, Cnode, Gnode):
    """The largest T with Csys + T*W*Cw <= Cnode and T*W*Gw <= Gnode; never below 0.

    W: workers per trial. Cw, Gw: CPUs and GPUs of each worker. Csys: CPUs left to Ray itself (raylet, object
    store). Cnode, Gnode: CPUs and GPUs of the node. A trial without GPUs is bound by the CPUs alone.
    """
    by_cpu = (Cnode - Csys) // (W * Cw)
    by_gpu = Gnode // (W * Gw) if Gw else by_cpu
    return max(0, min(by_cpu, by_gpu))


def asked_for(record):
    """(CPUs, GPUs, nodes, more) of a job, from what `scontrol show job` says of it. more: it may get more than that.

    Slurm's record, not the job script: there are many ways to ask, also in variables, and Slurm knows them all.
    GPUs stand there as TresPerNode=gres:gpu:8, gres/gpu:v100:8 or the like, per node, job, task or socket; how
    many sockets a node has Slurm does not know yet, nor how many CPUs one that the job gets for itself.
    """
    field = dict(re.findall(r"(\S+?)=(\S*)", record))
    number = lambda name: int((re.match(r"\d+", field.get(name, "")) or "0")[0])
    gpus = 0
    for per in ("Node", "Job", "Task"):
        counts = re.findall(r"gres[:/]gpu(?:[:=](?!\d+\b)[^:=,]+)?(?:[:=](\d+))?", field.get(f"TresPer{per}", ""))
        gpus = max(gpus, sum(int(count or 1) for count in counts) * (number("NumTasks") if per == "Task" else 1))
    per_gpu = re.search(r"gpu\S*?[:=](\d+)$", field.get("CpusPerTres", ""))
    cpus = max(number("NumCPUs"), number("MinCPUsNode"), int(per_gpu[1]) * gpus if per_gpu else 0)
    return cpus, gpus, number("NumNodes"), field.get("OverSubscribe") == "NO" or "TresPerSocket" in field


def main():
    """Prints the two inequalities with numbers; exit status 1 if not even one trial fits."""
    env = os.environ.get
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, meaning in (
        ("W", env("WORKERS_PER_TRIAL", "2"), "workers per trial, WORKERS_PER_TRIAL"),
        ("Cw", env("CPUS_PER_WORKER", "2"), "CPUs of each, CPUS_PER_WORKER"),
        ("Gw", env("GPUS_PER_WORKER", "1"), "GPUs of each, GPUS_PER_WORKER"),
        ("Csys", "2", "CPUs left to Ray itself"),
        ("Cnode", "20", "CPUs of a worker node"),
        ("Gnode", "8", "GPUs of a worker node"),
        ("nodes", "1", "worker nodes"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{meaning} (default {default})")
    parser.add_argument("--slots", action="store_true", help="print T alone")
    parser.add_argument("--record", action="store_true", help="read a job's record; Cnode and Gnode are its own")
    a = parser.parse_args()
    if min(a.W, a.Cw) < 1 or min(a.Gw, a.Csys, a.Cnode, a.Gnode) < 0:
        parser.error("W and Cw must be at least 1, the others at least 0")
    if a.record:
        a.Cnode, a.Gnode, nodes, more = asked_for(sys.stdin.read())
        # nodes without GPUs: a trial asks for none, unless told to
        if a.Gnode == 0 and "GPUS_PER_WORKER" not in os.environ:
            a.Gw = 0
        if nodes > 1:
            print(f"ERROR: a worker job asks for {nodes} nodes and uses one; ask for one, and set WORKER_NODES={nodes}")
            return 1
        if more:
            print("capacity: a worker gets a whole node, or GPUs by socket; it counts them when it starts")
            return 0
    T = trials_at_once(a.W, a.Cw, a.Gw, a.Csys, a.Cnode, a.Gnode)
    if a.slots:
        print(T)
        return 0
    print(f"capacity: {T} trial(s) at once on a node, {T * a.nodes} on {a.nodes} node(s)")
    t = max(T, 1)  # if none fits, the inequality that one trial breaks
    for left, terms, right, limit in (
        (a.Csys + t * a.W * a.Cw, f"Csys + T*W*Cw = {a.Csys} + {t}*{a.W}*{a.Cw}", "Cnode", a.Cnode),
        (t * a.W * a.Gw, f"T*W*Gw = {t}*{a.W}*{a.Gw}", "Gnode", a.Gnode),
    ):
        sign, verdict = ("<=", "holds") if left <= limit else (">", "DOES NOT HOLD")
        print(f"  {terms} = {left} {sign} {right} = {limit}: {verdict}")
    more_cpus, more_gpus = a.Csys + (T + 1) * a.W * a.Cw - a.Cnode, (T + 1) * a.W * a.Gw - a.Gnode
    needs = [f"{n} more {what}" for n, what in ((more_cpus, "CPUs"), (more_gpus, "GPUs")) if n > 0]
    bound = "CPUs and GPUs" if len(needs) == 2 else needs[0].split()[-1]
    print(f"  bound by {bound}: one more trial needs {' and '.join(needs)} a node")
    if T == 0:
        asked = f"WORKERS_PER_TRIAL={a.W} CPUS_PER_WORKER={a.Cw} GPUS_PER_WORKER={a.Gw}"
        print(f"ERROR: one trial ({asked}) does not fit on a node with {a.Cnode} CPUs and {a.Gnode} GPUs; "
              "lower these, or ask Slurm for larger nodes")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
