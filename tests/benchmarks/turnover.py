#!/usr/bin/env python3
"""What a trial costs beside its training: from one trial's end to the next one's first report, on one slot.

    .venv/bin/python tests/benchmarks/turnover.py              # 6 trials of one epoch with the demo model; 2 to 3 minutes
    .venv/bin/python tests/benchmarks/turnover.py --trials 12

Beside it the same training as a bare `torchrun` of the manual script, in the same run of this program: the least that
starting W processes, importing, loading and training takes without Ray. Nothing else should run on the machine.
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
from conftest import HEAD, REPO, copy_of_the_course

ONE_SHORT_EPOCH = {"NUM_EPOCHS": "1", "TRAIN_SAMPLES": "32", "EVAL_SAMPLES": "16", "BS_CHOICES": "2"}


def stamped_lines(command, **options):
    """Each line that a command prints, with the time of its arrival in s."""
    process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, **options)
    for line in process.stdout:
        yield time.monotonic(), line
    if process.wait() != 0:
        raise SystemExit(f"ERROR: {command} ended with exit status {process.returncode}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=6, help="default 6; the first one is not counted")
    trials = max(2, parser.parse_args().trials)
    with tempfile.TemporaryDirectory() as folder:
        course, demo = copy_of_the_course(Path(folder) / "repo"), Path(folder) / "demo"
        subprocess.run([sys.executable, REPO / "scripts/demo_assets.py", demo], check=True, stdout=subprocess.DEVNULL)
        environ = os.environ | ONE_SHORT_EPOCH | {"MODEL_NAME": str(demo / "model"), "SQUAD_DATA": str(demo / "squad"), "NUM_SAMPLES": str(trials)}

        seen = {"  started": [], "  epoch 1/1": [], "  finished": []}
        for at, line in stamped_lines(["bash", HEAD], cwd=course, env=environ):
            for word, times in seen.items():
                if word in line:
                    times.append(at)
        started, reported, ended = seen.values()

        bare = []
        torchrun = [REPO / ".venv/bin/torchrun", "--standalone", "--nproc_per_node=2", REPO / "scripts/manual_hpo/bloom_hpo_manual.py"]
        for _ in range(3):
            start = time.monotonic()
            for at, line in stamped_lines([*torchrun, "--lr", "1e-4", "--bs", "2", "--wd", "0.0"], env=environ):
                if "  epoch 1/1" in line:
                    bare.append(at - start)

    rows = {
        "a trial's end to the next one's start": [b - a for a, b in zip(ended, started[1:])],
        "its start to its first report": [b - a for a, b in zip(started[1:], reported[1:], strict=True)],
        "both: a trial's end to the next one's first report": [b - a for a, b in zip(ended, reported[1:])],
        "a bare torchrun, start to its first report": bare,
    }
    print("| s | median | lowest | highest |\n|---|---|---|---|")
    for name, values in rows.items():
        print(f"| {name} | {statistics.median(values):.1f} | {min(values):.1f} | {max(values):.1f} |")
    turnover, floor = (statistics.median(values) for values in list(rows.values())[2:])
    print(f"\nratio to the bare torchrun: {turnover / floor:.2f}  ({trials} trials, 2 workers each, {os.cpu_count()} cores)")


if __name__ == "__main__":
    main()
