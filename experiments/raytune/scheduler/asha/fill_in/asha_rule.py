#!/usr/bin/env python3
"""Write ASHA's rule yourself: fill in the two gaps, then let a log judge.

    python3 fill_in/asha_rule.py                                            # the run of section 2
    python3 fill_in/asha_rule.py logs/ray_head_bloom_5epochs-12345.out      # yours

It goes through the log's reports in their order, asks your function at each rung, and compares its decisions with
those in the log. Exit status: 0 if all are the same, else 1.
"""

import re
import statistics  # noqa: F401  for gap 2
import sys
from pathlib import Path

KEPT = Path(__file__).resolve().parents[1] / "pictures/quickstart.out"

EXAMPLES = {(1, 3, 10): [1, 3, 9], (2, 2, 20): [2, 4, 8, 16], (4, 2, 5): [4]}


def rungs(grace_period, reduction_factor, max_t):
    """The epochs at which trials are compared, as a list; EXAMPLES has some."""
    return ...  # gap 1


def goes_on(loss, recorded):
    """Does a trial with this loss go on? recorded: the losses of the trials that were at this rung before it."""
    return ...  # gap 2: True or False; statistics.median(numbers) is the median


def decisions(log):
    """Yields (trial, epoch, loss, did it go on) for each report of a log, in their order."""
    stopped = set(re.findall(r"_(\d{5})  stopped .* after epoch (\d+)", log))
    for trial, epoch, loss in re.findall(r"_(\d{5})  epoch (\d+)/\d+  eval_loss (\d\S*)", log):
        yield int(trial), int(epoch), float(loss), (trial, epoch) not in stopped


def main():
    if rungs(1, 2, 5) is ... or goes_on(1.0, [2.0]) is ...:
        sys.exit("A gap is not filled yet: replace each ... of this file.")
    for arguments, right in EXAMPLES.items():
        if rungs(*arguments) != right:
            sys.exit(f"rungs{arguments} is {rungs(*arguments)}, but should be {right}")
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else KEPT
    recorded, seen, wrong = {}, 0, 0
    for trial, epoch, loss, went_on in decisions(path.read_text(encoding="utf-8")):
        at_a_rung = epoch in rungs(1, 2, 5)
        yours = not at_a_rung or goes_on(loss, recorded.get(epoch, []))
        if at_a_rung or not went_on:
            seen += 1
            words = ["stops", "goes on"]
            verdict = "" if yours == went_on else f", but the log says that it {words[went_on]}"
            wrong += yours != went_on
            before = ", ".join(f"{x:.3f}" for x in recorded.get(epoch, [])) or "none"
            print(f"trial {trial} at epoch {epoch}: {loss:.3f} (before it: {before}): {words[yours]}{verdict}")
        recorded.setdefault(epoch, []).append(loss)
    if not seen:
        sys.exit(f"{path}: no report of a trial in this log")
    print(f"{seen - wrong} of {seen} decisions are those of the log")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
