#!/usr/bin/env python3
"""What grows with the number of trials: the real driver on a real Ray, with trials that cost nothing.

    .venv/bin/python tests/benchmarks/scale.py                             # 12, 100 and 1,000 trials; a few minutes
    .venv/bin/python tests/benchmarks/scale.py --trials 10000

The head script runs in a copy of the repository whose fast_trials.py makes up the losses; as in the exercise, the
trials of a slot share a process. Two trials at once. Nothing else should run on the machine.
"""

import argparse
import datetime
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import HEAD, REPO, command_of, copy_of_the_course, events_of, pids, replace, wait_for

CHEAP_TRIALS = '''
import math
from ray import tune

class CheapTrial(tune.Trainable):
    def setup(self, config):
        self.reset_config(config)

    def reset_config(self, new_config):
        self.lr, self.epoch = new_config["train_loop_config"]["lr"], 0
        return True

    def step(self):
        self.epoch += 1
        return {"eval_loss": 1 + abs(math.log10(self.lr) + 3) / self.epoch, "epoch": float(self.epoch)}

def warm(*search):
    tune_config, run_config = search[-2:]
    tune_config.reuse_actors = True
    run_config.checkpoint_config = tune.CheckpointConfig(checkpoint_at_end=False)
    return tune.with_resources(CheapTrial, {"trial_slot": 1})
'''
KINDS = {"driver": "raytune_asha_hpo.py --run-dir", "gcs": "gcs_server", "raylet": "raylet/raylet|agent"}


def look_at(job):
    """Memory in MB of a job's driver and of Ray's helpers, and the number of its head's processes without trials."""
    found, page = dict.fromkeys(KINDS, 0.0) | {"processes": 0}, resource.getpagesize() / 1e6
    for pid in pids(f" head {job}"):
        command = command_of(pid)
        if not command or re.match(r"ray::(?!IDLE)", command) or "default_worker.py" in command:
            continue  # a trial, also one that starts
        try:
            memory = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * page
        except OSError:  # ended meanwhile
            continue
        found["processes"] += 1
        for kind, words in KINDS.items():
            found[kind] += memory if re.search(words, command) else 0
    return found


class ARun:
    """A run of the head script with cheap trials, in a copy of the repository in `folder`; watched each second."""

    def __init__(self, folder, trials, epochs=5, demo=None):
        self.course, self.looks = copy_of_the_course(folder), []  # looks: (time, look_at())
        scripts = self.course.parents[3] / "scripts"
        (scripts / "raytune_hpo/raytune_asha_scheduler/fast_trials.py").write_text(CHEAP_TRIALS)
        line = '    say "this node: '
        replace(scripts / "job/ray_job.sh", (line, f"    SLOTS=2\n{line}"))
        if not demo:
            demo, quiet = folder / ".demo", subprocess.DEVNULL
            subprocess.run([sys.executable, REPO / "scripts/demo_assets.py", demo], check=True, stdout=quiet)
        environ = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")} | {
            "MODEL_NAME": f"{demo}/model", "SQUAD_DATA": f"{demo}/squad", "TRAIN_SAMPLES": "2", "EVAL_SAMPLES": "2",
            "WORKERS_PER_TRIAL": "1", "CPUS_PER_WORKER": "1", "NUM_SAMPLES": str(trials), "NUM_EPOCHS": str(epochs),
            "LR_LOWER": "1e-5", "LR_UPPER": "1e-1"}  # fmt: skip
        self.output = folder / "head.out"
        with self.output.open("w") as output:
            self.process = subprocess.Popen(["bash", HEAD], cwd=self.course, env=environ, stdout=output,
                                            stderr=subprocess.STDOUT)  # fmt: skip
        self.job = wait_for(lambda: re.search(r"JOB (\S+) START", self.log()), 30, "START")[1]
        self.folder = self.course / "runs" / self.job
        threading.Thread(target=self.look, daemon=True).start()

    def look(self):
        while self.process.poll() is None:
            self.looks.append((time.time(), look_at(self.job)))
            time.sleep(1)

    def log(self):
        return self.output.read_text()

    def ends(self):
        """When each trial ended."""
        events = events_of(self.folder, "trial_ended")
        return [datetime.datetime.fromisoformat(event["time"]).timestamp() for event in events]

    def early_and_late(self):
        """The looks after the tenth trial, when all imports are done, and before the last one's end."""
        ends = self.ends()
        between = [seen for at, seen in self.looks if ends[9] <= at < ends[-1]]
        between = between or [seen for _, seen in self.looks if seen["driver"]][-1:]  # a few trials take no second
        return between[0], between[-1]


def many_trials(folder, trials):
    """One run: a dict of figures."""
    run = ARun(folder, trials)
    try:
        if status := run.process.wait():
            raise SystemExit(f"ERROR: {trials} trials ended with exit status {status}:\n{run.log()[-2000:]}")
    finally:
        run.process.terminate()
    ends = run.ends()
    figures = {"s a trial": f"{(ends[-1] - ends[0]) / (trials - 1):.3f}"}
    early, late = run.early_and_late()
    for kind in KINDS:
        figures[f"{kind} MB, first -> last"] = f"{early[kind]:.0f} -> {late[kind]:.0f}"
    return figures | {
        "lines of the log": len(run.log().splitlines()),
        "files in the run folder": sum(path.is_file() for path in run.folder.rglob("*")),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    help_of_trials = "default 12 100 1000; one run for each"
    parser.add_argument("--trials", type=int, nargs="+", default=[12, 100, 1000], help=help_of_trials)
    a = parser.parse_args()
    if min(a.trials) < 12:
        parser.error("--trials wants 12 or more")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends what it has started
    folder = Path(tempfile.mkdtemp(prefix="scale.", dir="/tmp"))
    try:
        columns = [many_trials(folder / f"{i}", trials) for i, trials in enumerate(a.trials)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print("| trials | " + " | ".join(map(str, a.trials)) + " |\n|---|" + "---|" * len(columns))
    for name in columns[0]:
        print(f"| {name} | " + " | ".join(str(column[name]) for column in columns) + " |")
    print(f"\ntwo at once, seed 42, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}")


if __name__ == "__main__":
    main()
