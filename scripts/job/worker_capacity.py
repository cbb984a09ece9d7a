#!/usr/bin/env python3
"""How many trials a worker node runs at once.

    python worker_capacity.py                                  # the exercise's worker node: 20 CPUs, 8 GPUs
    python worker_capacity.py --Cnode 32 --Gnode 4 --nodes 3   # another one
    python worker_capacity.py --W 1 --Cw 1 --Gw 0.25           # four trials share a GPU
    python worker_capacity.py --slots --Cnode 20 --Gnode 0     # the number, for scripts
    scontrol show job 4711 | python worker_capacity.py --record     # Cnode and Gnode as Slurm understood this job
"""

import argparse
import os
import re
import sys
from fractions import Fraction
from math import ceil

MSYS = 1.0  # GiB of memory left to Ray itself
MCUDA = 0.6  # GiB of a GPU that CUDA takes for each process; an estimate


def trials_at_once(W, Cw, Gw, Csys, Cnode, Gnode, Mw=0.0, Mnode=0.0):
    """The largest T with Csys + T*W*Cw <= Cnode, T*W*Gw <= Gnode and Msys + T*W*Mw <= Mnode; never below 0.

    W: workers per trial. Cw, Gw, Mw: CPUs, GPUs and GiB of memory of each worker; a Gw below 1 is a share of one GPU.
    Csys, Msys: CPUs and memory left to Ray itself (raylet, object store). Cnode, Gnode, Mnode: those of the node. What
    is 0 does not bind.
    """
    by_cpu = (Cnode - Csys) // (W * Cw)
    by_gpu = int(Gnode * on_a_gpu(Gw) // W) if Gw else by_cpu
    by_memory = int((Mnode - MSYS) / (W * Mw)) if Mw and Mnode else by_cpu
    return max(0, min(by_cpu, by_gpu, by_memory))


def memory_of_worker(parameters, W, Gw):
    """GiB of main memory of one of a trial's W processes, estimated from the model's number of parameters.

    On CPUs (fp32, AdamW, ZeRO-2) it was measured: 0.5 GiB, 19 bytes a parameter, and 15 that the W processes share
    (BLOOM's structure, 0.2 to 200 million parameters, W of 1, 2, 4; tests/benchmarks/README.md). With a GPU it is what
    CUDA takes, and the weights in fp32 on their way to it: not measured.
    """
    return 3 + parameters * 4 / 2**30 if Gw else 0.5 + parameters * (19 + 15 / W) / 2**30


def on_a_gpu(Gw):
    """How many workers share a GPU; below 1 if each has several. Exact: ten of 0.1 fit, in floats they might not."""
    share = Fraction(str(Gw))
    return 1 // share if share < 1 else 1 / share


def memory_of_share(parameters):
    """GiB of a GPU that a trial of one worker takes: 22 bytes a parameter, and CUDA's own.

    In half precision, with AdamW: weights 2 and gradients 2; master weights 4 and AdamW's two means 8; at a step the
    gradients again, flat (2) and in fp32 (4). On an H200 it was 12.4 GB with 559 million (tests/benchmarks/README.md).
    """
    return parameters * 22 / 2**30 + MCUDA


def does_not_fit(Gw, Mcard, parameters):
    """Why a trial cannot have this share of a GPU with Mcard GiB, and what to set; "" if it can."""
    need, share = memory_of_share(parameters), float(Gw) * Mcard
    if not 0 < Gw < 1 or need <= share:
        return ""
    enough = ceil(100 * need / Mcard) / 100
    return (f"GPUS_PER_WORKER={float(Gw):g}: a trial takes about {need:.1f} GiB of a GPU, and its share of "
            f"{Mcard:.1f} GiB is {share:.1f}; set {enough if enough <= 0.5 else 1} "
            "(or MEMORY_PER_WORKER, if you know better: then nothing is estimated)")  # fmt: skip


def gpus(text):
    """A whole number of GPUs, or a share such as 0.25."""
    if "/" in text or 1 < (Gw := Fraction(text)) != int(Gw):
        raise ValueError
    return Gw


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


def memory_asked_for(record):
    """GiB, of a node's job; 0 if Slurm does not mind memory."""
    found = re.search(r"TRES=\S*\bmem=([\d.]+)([KMGT]?)", record)
    return float(found[1]) * 1024 ** ("KMGT".index(found[2] or "M") - 2) if found else 0.0


def main():
    """Prints the inequalities with numbers; exit status 1 if not even one trial fits."""
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
        kind = gpus if name == "Gw" else int
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"{meaning} (default {default})")
    parser.add_argument("--Mw", type=float, help="GiB of memory of each, MEMORY_PER_WORKER (default: by the model)")
    parser.add_argument("--Mnode", type=float, default=0, help="GiB of memory of a worker node (default: enough)")
    parser.add_argument("--Mcard", type=float, default=0, help="GiB of memory of a GPU (default: enough)")
    parser.add_argument("--slots", action="store_true", help="print T alone, and why, if memory binds it")
    parser.add_argument("--record", action="store_true", help="read a job's record; Cnode and Gnode are its own")
    a = parser.parse_args()
    if min(a.W, a.Cw) < 1 or min(a.Gw, a.Csys, a.Cnode, a.Gnode) < 0:
        parser.error("W and Cw must be at least 1, the others at least 0")
    if 0 < a.Gw < 1 < a.W:
        parser.error("with Gw below 1, W must be 1: a trial's workers cannot share a GPU")
    if a.record:
        record = sys.stdin.read()
        a.Cnode, a.Gnode, nodes, more = asked_for(record)
        a.Mnode = memory_asked_for(record)
        # nodes without GPUs: a trial asks for none, unless told to
        if a.Gnode == 0 and "GPUS_PER_WORKER" not in os.environ:
            a.Gw = 0
        if nodes > 1:
            print(f"ERROR: a worker job asks for {nodes} nodes and uses one; ask for one, and set WORKER_NODES={nodes}")
            return 1
        if more:
            print("capacity: a worker gets a whole node, or GPUs by socket; it counts them when it starts")
            return 0
    known, parameters = env("MEMORY_PER_WORKER", "auto"), int(env("MODEL_PARAMETERS", "0"))
    if a.Mw is None:
        a.Mw = float(known) if known != "auto" else memory_of_worker(parameters, a.W, a.Gw)
    if a.Mcard and known == "auto" and (why := does_not_fit(a.Gw, a.Mcard, parameters)):
        print(f"0 {why}" if a.slots else f"ERROR: {why}")
        return 0 if a.slots else 1
    T = trials_at_once(a.W, a.Cw, a.Gw, a.Csys, a.Cnode, a.Gnode, a.Mw, a.Mnode)
    by_memory = T < trials_at_once(a.W, a.Cw, a.Gw, a.Csys, a.Cnode, a.Gnode)
    if a.slots:
        why = f" a trial takes {a.W}*{a.Mw:.2g} of {a.Mnode - MSYS:.3g} GiB (MEMORY_PER_WORKER)"
        print(f"{T}{why if by_memory else ''}")
        return 0
    print(f"capacity: {T} trial(s) at once on a node, {T * a.nodes} on {a.nodes} node(s)")
    t = max(T, 1)  # if none fits, the inequality that one trial breaks
    for left, terms, right, limit in (
        (a.Csys + t * a.W * a.Cw, f"Csys + T*W*Cw = {a.Csys} + {t}*{a.W}*{a.Cw}", "Cnode", a.Cnode),
        (float(t * a.W * a.Gw), f"T*W*Gw = {t}*{a.W}*{float(a.Gw):g}", "Gnode", a.Gnode),
        (round(MSYS + t * a.W * a.Mw, 1), f"Msys + T*W*Mw = {MSYS:g} + {t}*{a.W}*{a.Mw:.2g}", "Mnode", a.Mnode),
    ):
        if right == "Mnode" and not limit:
            continue  # not known
        sign, verdict = ("<=", "holds") if left <= limit else (">", "DOES NOT HOLD")
        print(f"  {terms} = {left:.4g} {sign} {right} = {limit:.4g}: {verdict}")
    wanted = ceil((T + 1) * a.W / on_a_gpu(a.Gw)) if a.Gw else 0
    more = {"CPUs": a.Csys + (T + 1) * a.W * a.Cw - a.Cnode, "GPUs": wanted - a.Gnode,
            "GiB of memory": a.Mnode and MSYS + (T + 1) * a.W * a.Mw - a.Mnode}  # fmt: skip
    needs = {what: f"{n:.3g} more {what}" for what, n in more.items() if n > 0}
    bound = " and ".join(what.split()[-1] for what in needs)
    print(f"  bound by {bound}: one more trial needs {' and '.join(needs.values())} a node")
    if 0 < a.Gw < 1 and (used := ceil(T / on_a_gpu(a.Gw))) < a.Gnode:
        print(f"  on {used} of {a.Gnode} GPUs, since Ray fills one after the other; a larger share spreads them: "
              f"GPUS_PER_WORKER={100 // ceil(T / a.Gnode) / 100:g}")  # fmt: skip
    if T == 0:
        asked = f"WORKERS_PER_TRIAL={a.W} CPUS_PER_WORKER={a.Cw} GPUS_PER_WORKER={float(a.Gw):g}"
        asked, has = (f"{asked} MEMORY_PER_WORKER={a.Mw:.2g}", f", {a.Mnode:.3g} GiB") if by_memory else (asked, "")
        print(f"ERROR: one trial ({asked}) does not fit on a node with {a.Cnode} CPUs{has} and {a.Gnode} GPUs; "
              "lower these, or ask Slurm for larger nodes")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
