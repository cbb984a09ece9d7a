#!/usr/bin/env python3
"""What grows with the number of trials and of nodes: the real driver on a real Ray, with trials that cost nothing.

    .venv/bin/python tests/benchmarks/scale.py                             # 12, 100 and 1,000 trials; a few minutes
    .venv/bin/python tests/benchmarks/scale.py --trials 10000 --minutes 9  # cut short after 9 minutes
    .venv/bin/python tests/benchmarks/scale.py --nodes 1 4 8 16            # worker nodes (here) join, then leave

The head script runs in a copy of the repository whose fast_trials.py makes up the losses; as in the exercise, the
trials of a slot share a process. Nothing else should run on the machine.
"""

import argparse
import atexit
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
from conftest import HEAD, REPO, command_of, copy_of_the_course, pids, wait_for

CHEAP_TRIALS = '''
import math, time
from ray import tune

class CheapTrial(tune.Trainable):
    def setup(self, config):
        self.reset_config(config)

    def reset_config(self, new_config):
        self.lr, self.epoch = new_config["train_loop_config"]["lr"], 0
        return True

    def step(self):
        time.sleep(SECONDS)
        self.epoch += 1
        return {"eval_loss": 1 + abs(math.log10(self.lr) + 3) / self.epoch, "epoch": float(self.epoch)}

def improve(plan):
    plan.trainable = tune.with_resources(CheapTrial, {"trial_slot": 1})
    plan.tune_config.reuse_actors = True
    plan.run_config.checkpoint_config = tune.CheckpointConfig(checkpoint_at_end=False)
'''
ENDS = ("  stopped ", "  finished ", "  ended ", "  FAILED ")


def course_of_cheap_trials(folder, at_once, seconds=0):
    """The exercise's folder in a copy of the repository with the trials above, `at_once` slots on this machine.

    seconds: what an epoch takes.
    """
    course = copy_of_the_course(folder)
    scripts = course.parents[3] / "scripts"
    (scripts / "raytune_hpo/raytune_asha_scheduler/fast_trials.py").write_text(CHEAP_TRIALS.replace("SECONDS", str(seconds)))
    line = '    say "this node: $NODE, $SLOTS trial(s) at once"\n'
    text = (scripts / "job/ray_job.sh").read_text()
    assert text.count(line) == 1
    (scripts / "job/ray_job.sh").write_text(text.replace(line, f"    SLOTS={at_once}\n{line}"))
    return course


def settings(course, trials, epochs=5):
    """Environment of a run of cheap trials."""
    demo = course.parents[3] / ".demo"
    if not demo.exists():
        subprocess.run([sys.executable, REPO / "scripts/demo_assets.py", demo], check=True, stdout=subprocess.DEVNULL)
    outside = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return outside | {
        "MODEL_NAME": str(demo / "model"), "SQUAD_DATA": str(demo / "squad"), "TRAIN_SAMPLES": "2", "EVAL_SAMPLES": "2",
        "WORKERS_PER_TRIAL": "1", "CPUS_PER_WORKER": "1", "NUM_SAMPLES": str(trials), "NUM_EPOCHS": str(epochs),
        "SEED": "42", "LR_LOWER": "1e-5", "LR_UPPER": "1e-1",
    }  # fmt: skip


KINDS = {"gcs": "gcs_server", "dashboard": r"dashboard/dashboard\.py|ray-dashboard", "raylet": "raylet/raylet|agent"}


def look_at(job):
    """Memory in MB, CPU time of the driver in s, and the number of processes of a job's head that are no trials."""
    found = {"driver": 0, "driver_cpu": 0.0, "gcs": 0, "dashboard": 0, "raylet": 0, "others": 0, "processes": 0}
    page, tick = resource.getpagesize() / 1e6, os.sysconf("SC_CLK_TCK")
    for pid in pids(f" head {job}"):
        command = command_of(pid)
        try:
            stat = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:  # ended meanwhile
            continue
        if not command or re.match(r"ray::(?!IDLE)", command) or "default_worker.py" in command:
            continue  # a trial, also one that starts
        found["processes"] += 1
        memory = int(stat[21]) * page
        if "raytune_asha_hpo.py --run-dir" in command:
            found["driver"], found["driver_cpu"] = memory, (int(stat[11]) + int(stat[12])) / tick
        else:
            found[next((kind for kind, words in KINDS.items() if re.search(words, command)), "others")] += memory
    return found


class ARun:
    """A run of the head script, watched: its lines with the time of their arrival, and looks at its processes."""

    def __init__(self, course, environ, every=1.0):
        self.course, self.lines, self.looks = course, [], []
        self.process = subprocess.Popen(["bash", HEAD], cwd=course, env=environ, text=True, stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT)  # fmt: skip
        atexit.register(self.process.terminate)  # nothing, once it has ended
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()
        self.job = wait_for(lambda: re.search(r"JOB (\S+) START", self.log()), 30, "START")[1]
        threading.Thread(target=self.look, args=[every], daemon=True).start()

    def read(self):
        for line in self.process.stdout:
            self.lines.append((time.monotonic(), line.rstrip("\n")))

    def look(self, every):
        while self.process.poll() is None:
            seen = look_at(self.job)
            if seen["driver"]:
                self.looks.append((len(self.ends()), seen))
            time.sleep(every)

    def log(self):
        return "\n".join(line for _, line in list(self.lines))

    def ends(self):
        """When each trial ended."""
        ended = lambda line: "search | TorchTrainer_" in line and any(end in line for end in ENDS)
        return [at for at, line in list(self.lines) if ended(line)]

    def in_flight(self):
        running = set()
        for _, line in list(self.lines):
            if found := re.search(r"search \| (TorchTrainer_\S+)(  \S+)", line):
                if found[2] == "  started":
                    running.add(found[1])
                elif found[2] == "  lost" or found[2] + " " in ENDS:
                    running.discard(found[1])
        return len(running)

    def folder(self):
        return self.course / "runs" / self.job

    def end(self):
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def size_of(folder):
    """(files, MB) in a folder."""
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return len(sizes), sum(sizes) / 1e6


def many_trials(folder, trials, minutes, at_once):
    """One run: a dict of figures."""
    course = course_of_cheap_trials(folder, at_once)
    run, start = ARun(course, settings(course, trials)), time.monotonic()
    while run.process.poll() is None and time.monotonic() < start + 60 * minutes:
        time.sleep(0.5)
    cut = run.process.poll() is None
    status = run.end() if cut else run.process.wait()
    ends, done = run.ends(), len(run.ends())
    if not (cut or status == 0) or done < 10:
        told = f"{trials} trials ended with exit status {status} after {done}; the log's end:\n{run.log()[-2000:]}"
        raise SystemExit(f"ERROR: {told}")
    fifth = done // 5
    first = next(look for n, look in run.looks if n >= min(fifth, 10))  # all imports are done
    last = next(look for n, look in reversed(run.looks) if n < trials)
    first_n, last_n = (next(n for n, look in run.looks if look is wanted) for wanted in (first, last))
    half = min(run.looks, key=lambda seen: abs(seen[0] - done / 2))
    log = course / f"logs/ray_head_bloom_5epochs-{run.job}.out"
    before = time.monotonic()
    fill_tables = [sys.executable, REPO / "scripts/report/fill_tables.py", log]
    subprocess.run(fill_tables, check=True, stdout=subprocess.DEVNULL)
    tables = time.monotonic() - before
    files, megabytes = size_of(run.folder() / "tune")
    figures = {
        "trials ended": done,
        "s a trial, all": (ends[-1] - ends[0]) / (done - 1),
        "s a trial, first fifth": (ends[fifth] - ends[0]) / fifth,
        "s a trial, last fifth": (ends[-1] - ends[-1 - fifth]) / fifth,
        "driver CPU s a trial, first half": (half[1]["driver_cpu"] - first["driver_cpu"]) / max(1, half[0] - first_n),
        "driver CPU s a trial, second half": (last["driver_cpu"] - half[1]["driver_cpu"]) / max(1, last_n - half[0]),
    }
    for kind in ("driver", "gcs", "dashboard", "raylet"):
        figures[f"{kind} MB, first -> last"] = f"{first[kind]:.0f} -> {last[kind]:.0f}"
    most = max(look["processes"] for _, look in run.looks)
    return figures | {
        "processes of the head, first -> last (most)": f"{first['processes']} -> {last['processes']} ({most})",
        "lines of the log": len(run.lines), "kB of the log": log.stat().st_size / 1e3,
        "files in runs/<job>/tune": files, "MB in runs/<job>/tune": megabytes, "fill_tables on the log, s": tables,
    }  # fmt: skip


WORKER = r'''
JOB=$1 ROLE=worker RUN_DIR=$2 REPO=$3
source "$REPO/scripts/job/ray_job.sh"
trap 'end_owned; exit' EXIT TERM
choose_python
prepare_ray
start_ray --address="$(<"$RUN_DIR/address")" --num-cpus=1 --num-gpus=0 --resources='{"trial_slot": 1}'
wait_until 240 "Ray to join" ray_started >&2                   # its line after 10 s is not for the other end
echo joined
while kill -0 "$RAY" 2>/dev/null && read -r -t 1 _ || (($? > 128)); do :; done     # until the other end is closed
'''


def many_nodes(folder, steps):
    """Rows of a table: worker nodes of one place each join, up to the last of `steps`, and leave again."""
    course, workers = course_of_cheap_trials(folder, at_once=0, seconds=3600), []
    run = ARun(course, settings(course, trials=4 * max(steps), epochs=1))
    try:
        wait_for(lambda: (run.folder() / "address").exists(), 120, "the Ray head")
        for wanted in [*steps, *reversed([0, *steps[:-1]])]:
            began, change = time.monotonic(), wanted - len(workers)
            for _ in range(change):
                job = f"{run.job}-w{len(workers)}"
                command = ["bash", "-c", WORKER, "worker", job, run.folder(), course.parents[3]]
                ends = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
                workers.append(subprocess.Popen(command, text=True, **ends))
            for worker in workers[wanted - change :] if change > 0 else []:
                assert worker.stdout.readline() == "joined\n", "a worker did not join"
            for worker in workers[wanted:]:
                worker.stdin.close()
            for worker in workers[wanted:]:
                worker.wait(120)
            del workers[wanted:]
            moved = time.monotonic() - began
            told = f"{wanted} trials in flight, not {run.in_flight()}; log:\n{run.log()[-3000:]}"
            wait_for(lambda n=wanted: run.in_flight() == n, 240, told)
            followed, seen = time.monotonic() - began, look_at(run.job)
            memory = [round(seen[kind]) for kind in ("driver", "gcs", "dashboard", "raylet")]
            yield [wanted, f"{change:+d}", moved, followed, *memory, seen["processes"]]
    finally:
        run.end()
        for worker in workers:
            worker.stdin.close()
        for worker in workers:
            worker.wait(120)


def show(value):
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--trials", type=int, nargs="+", default=[12, 100, 1000], help="default 12 100 1000; one run for each")
    option("--minutes", type=float, default=30, help="a run is cut short after so many minutes (default 30)")
    option("--at-once", type=int, default=2, help="trials at once (default 2)")
    option("--nodes", type=int, nargs="+", help="numbers of worker nodes, increasing; instead of --trials")
    option("--keep", type=Path, metavar="DIR", help="keep logs and run folders here")
    a = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends what it has started
    if min(a.trials) < 12 or a.at_once < 1 or (a.nodes and (a.nodes != sorted(set(a.nodes)) or a.nodes[0] < 1)):
        parser.error("--trials wants 12 or more, --at-once 1 or more, --nodes different numbers from 1, increasing")
    folder = Path(tempfile.mkdtemp(prefix="scale.", dir=a.keep or "/tmp"))
    try:
        if a.nodes:
            print("| nodes | change | s to join or leave | s until as many trials run | driver MB | gcs MB "
                  "| dashboard MB | raylet MB | processes of the head |\n|---|---|---|---|---|---|---|---|---|")
            for row in many_nodes(folder / "nodes", a.nodes):
                print("| " + " | ".join(map(show, row)) + " |", flush=True)
        else:
            columns = [many_trials(folder / f"{i}", trials, a.minutes, a.at_once) for i, trials in enumerate(a.trials)]
            print("| trials | " + " | ".join(map(str, a.trials)) + " |\n|---|" + "---|" * len(columns))
            for name in columns[0]:
                print(f"| {name} | " + " | ".join(show(column[name]) for column in columns) + " |")
        at_once = "as many as nodes" if a.nodes else a.at_once
        print(f"\n{at_once} at once, seed 42, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}")
    finally:
        if not a.keep:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
