#!/usr/bin/env python3
"""How much of a slot's time is training and evaluation: a real search on one slot that is never idle.

    .venv/bin/python tests/benchmarks/utilisation.py                                         # 3 trials x 2 epochs of 15 s or so; 3 minutes
    .venv/bin/python tests/benchmarks/utilisation.py --trials 2 --repeat 5    # epochs of a minute; 5 minutes

A trial trains from the begin of its first step to its last report; the rest of the slot's time is what lies between trials.
All trials reach the last epoch (grace_period is set to it). What an epoch of 60 s would give is computed from that rest.
Nothing else should run on the machine.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import HEAD, REPO, SCRIPT, copy_of_the_course
from turnover import AT_FIRST_STEP, IMPORTS, replaced, stamped_lines

SAMPLES = 1000  # questions of an epoch, of which the demo has no more; --repeat shows each several times
ASHA_EPOCHS = 2.5  # a trial's, median: 30 of 12 trials (asha_savings.py)


def edited(text, repeat):
    """The search script: notes when a trial's first step begins, stops no trial early, shows each question `repeat` times."""
    at_begin = replaced(replaced(AT_FIRST_STEP, "on_step_end", "on_step_begin"), "global_step == 1", "global_step == 0")
    text = replaced(text, IMPORTS, IMPORTS + at_begin)
    text = replaced(text, "grace_period=1,", "grace_period=s.NUM_EPOCHS,")
    return replaced(text, "train_dataset=train_rows,", f"train_dataset=train_rows * {repeat},")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=3, help="default 3")
    parser.add_argument("--epochs", type=int, default=2, help="of a trial (default 2)")
    parser.add_argument("--repeat", type=int, default=1, help="an epoch shows each question so often (default 1)")
    a = parser.parse_args()
    if a.trials < 2 or a.epochs < 2 or a.repeat < 1:
        parser.error("--trials and --epochs want 2 or more, --repeat 1 or more")
    with tempfile.TemporaryDirectory() as folder:
        course, demo = copy_of_the_course(Path(folder) / "repo"), Path(folder) / "demo"
        subprocess.run([sys.executable, REPO / "scripts/demo_assets.py", demo], check=True, stdout=subprocess.DEVNULL)
        script, steps = Path(folder) / "repo" / SCRIPT.relative_to(REPO), Path(folder) / "first_steps"
        script.write_text(edited(script.read_text(), a.repeat))
        environ = os.environ | {"MODEL_NAME": str(demo / "model"), "SQUAD_DATA": str(demo / "squad"), "FIRST_STEPS": str(steps), "BS_CHOICES": "2"}
        environ |= {"NUM_SAMPLES": str(a.trials), "NUM_EPOCHS": str(a.epochs), "TRAIN_SAMPLES": str(SAMPLES), "EVAL_SAMPLES": "50"}
        started, reported = [], []
        for at, line in stamped_lines(["bash", HEAD], cwd=course, env=environ):
            if "  started " in line:
                started.append(at)
            if "  epoch " in line:
                reported.append(at)
        stepped = [float(moment) for moment in steps.read_text().split()]

    last = reported[a.epochs - 1 :: a.epochs]
    inside = [end - begin for begin, end in zip(stepped, last, strict=True)]
    between = [begin - end for end, begin in zip(last, stepped[1:])]
    first = [reported[i * a.epochs] - stepped[i] for i in range(a.trials - 1)]  # meanwhile the next trial's processes import
    later = [end - begin for i in range(a.trials) for begin, end in zip(reported[i * a.epochs :], reported[i * a.epochs + 1 : (i + 1) * a.epochs])]
    rows = {
        "s inside steps and evaluations, of a trial": inside,
        "s between: a trial's last report to the next one's first step": between,
        "s of a first epoch, while the next trial's processes start": first,
        "s of a later epoch": later,
    }
    print("| | median | lowest | highest |\n|---|---|---|---|")
    for name, values in rows.items():
        print(f"| {name} | {statistics.median(values):.1f} | {min(values):.1f} | {max(values):.1f} |")
    rest = statistics.median(between)
    print(f"\ninside, from the first step on: {sum(inside) / (last[-1] - stepped[0]):.3f}; with the start of the first trial: {sum(inside) / (last[-1] - started[0]):.3f}")
    shares = [f"{epochs * 60 / (epochs * 60 + rest):.3f} with {epochs} epoch(s)" for epochs in (1, ASHA_EPOCHS, 5)]
    print(f"computed for epochs of 60 s: {', '.join(shares)} of a trial")
    print(f"({a.trials} trials x {a.epochs} epochs, 2 workers each, seed 42, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')})")


if __name__ == "__main__":
    main()
