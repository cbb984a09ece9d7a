#!/usr/bin/env python3
"""Compute yourself how many trials fit on a node: fill in the two gaps, then let worker_capacity.py judge.

    python3 fill_in/capacity.py

Section 10 has the symbols. Exit status: 0 if all nodes below come out right, else 1.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[5] / "scripts/job"))
import worker_capacity

NODES = [(20, 8, 1), (16, 8, 1), (32, 4, 1), (64, 8, 1), (8, 2, 1), (5, 8, 1), (20, 0, 0)]  # (Cnode, Gnode, Gw)


def trials_at_once(W, Cw, Gw, Csys, Cnode, Gnode):
    """The largest Tnode for which Csys + Tnode*W*Cw <= Cnode and Tnode*W*Gw <= Gnode."""
    by_cpus = ...  # gap 1: as many as the CPUs allow; a // b divides and rounds down
    if Gw == 0:
        return by_cpus
    by_gpus = ...  # gap 2: as many as the GPUs allow
    return min(by_cpus, by_gpus)


def main():
    wrong = 0
    for Cnode, Gnode, Gw in NODES:
        try:
            yours = trials_at_once(2, 2, Gw, 2, Cnode, Gnode)
        except TypeError:
            yours = ...
        if yours is ...:
            sys.exit("A gap is not filled yet: replace each ... of this file.")
        right = worker_capacity.trials_at_once(2, 2, Gw, 2, Cnode, Gnode)
        wrong += yours != right
        print(f"Cnode {Cnode:2}, Gnode {Gnode}, Gw {Gw}: {yours}" + ("" if yours == right else f", but it is {right}"))
    print(f"{len(NODES) - wrong} of {len(NODES)} nodes are right")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
