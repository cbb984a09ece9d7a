#!/usr/bin/env python3
"""How many trials a worker node runs at once.

    python worker_capacity.py                                  # the exercise's worker node: 20 CPUs, 8 GPUs
    python worker_capacity.py --Cnode 32 --Gnode 4 --nodes 3   # another one
    python worker_capacity.py --slots --Cnode 20 --Gnode 0     # the number alone, for scripts

W, Cw and Gw come from WORKERS_PER_TRIAL, CPUS_PER_WORKER and GPUS_PER_WORKER unless given.
"""

import argparse
import os
import sys


def trials_at_once(W, Cw, Gw, Csys, Cnode, Gnode):
    """The largest T with Csys + T*W*Cw <= Cnode and T*W*Gw <= Gnode; never below 0.

    W: workers per trial. Cw, Gw: CPUs and GPUs of each worker. Csys: CPUs left to Ray itself (raylet, object store).
    Cnode, Gnode: CPUs and GPUs of the node. A trial that asks for no GPU is bound by the CPUs alone.
    """
    by_cpu = (Cnode - Csys) // (W * Cw)
    by_gpu = Gnode // (W * Gw) if Gw else by_cpu
    return max(0, min(by_cpu, by_gpu))


def main():
    """Prints the two inequalities with numbers; exit status 1 if not even one trial fits."""
    env = os.environ.get
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, low, meaning in (
        ("W", env("WORKERS_PER_TRIAL", "2"), 1, "workers per trial"),
        ("Cw", env("CPUS_PER_WORKER", "2"), 1, "CPUs per worker"),
        ("Gw", env("GPUS_PER_WORKER", "1"), 0, "GPUs per worker"),
        ("Csys", "2", 0, "CPUs left to Ray itself"),
        ("Cnode", "20", 1, "CPUs of a worker node"),
        ("Gnode", "8", 0, "GPUs of a worker node"),
        ("nodes", "1", 1, "worker nodes"),
    ):
        parser.add_argument(f"--{name}", type=whole_number(low), default=default, help=f"{meaning} (default {default})")
    parser.add_argument("--slots", action="store_true", help="print T alone")
    a = parser.parse_args()
    T = trials_at_once(a.W, a.Cw, a.Gw, a.Csys, a.Cnode, a.Gnode)
    if a.slots:
        print(T)
        return 0
    t = max(T, 1)  # if none fits, show the inequality that one trial breaks
    print(f"capacity: {T} trial(s) at once on a node, {T * a.nodes} on {a.nodes} node(s)")
    for left, terms, right, limit in (
        (a.Csys + t * a.W * a.Cw, f"Csys + T*W*Cw = {a.Csys} + {t}*{a.W}*{a.Cw}", "Cnode", a.Cnode),
        (t * a.W * a.Gw, f"T*W*Gw = {t}*{a.W}*{a.Gw}", "Gnode", a.Gnode),
    ):
        verdict = "holds" if left <= limit else "DOES NOT HOLD"
        print(f"  {terms} = {left} {'<=' if left <= limit else '>'} {right} = {limit}: {verdict}")
    if T == 0:
        print(
            f"ERROR: one trial (WORKERS_PER_TRIAL={a.W} CPUS_PER_WORKER={a.Cw} GPUS_PER_WORKER={a.Gw}) does not fit on a "
            f"node with {a.Cnode} CPUs and {a.Gnode} GPUs; lower these, or ask Slurm for larger nodes"
        )
        return 1
    return 0


def whole_number(low):
    """A parser for argparse: a whole number of at least low."""

    def parse(text):
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {low}")
        return int(text)

    return parse


if __name__ == "__main__":
    sys.exit(main())
