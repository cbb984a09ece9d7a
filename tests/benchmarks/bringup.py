#!/usr/bin/env python3
"""How long a run holds nodes before it trains and after it has trained: phases of one run on the sandbox.

    .venv/bin/python tests/benchmarks/bringup.py              # 3 runs of one trial with the demo model; about 3 minutes

Compared with the least that Ray takes, measured in between: a bare `ray start --head`, a bare `ray start` of a worker
and a bare driver, one after the other. Nothing else should run on the machine.
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
from conftest import REPO, Cluster, copy_of_the_course, wait_for

RAY = REPO / ".venv/bin/ray"
SMALL = {"NUM_SAMPLES": "1", "NUM_EPOCHS": "1", "TRAIN_SAMPLES": "32", "EVAL_SAMPLES": "16"}
PHASES = {  # what the log says at the end of each phase of the head
    "sbatch to START": "START  :",
    "input checked, worker submitted": "submitted worker",
    "Ray head up": "Ray head at",
    "worker joined": "worker 1/1 joined",
    "data read, search connected": "cluster: ",
    "trial's process up": "  started",
    "first report (training included)": "  epoch 1/1",
}


def until_it_says(command, text, environ):
    """Start a command, wait for a text in its output: (process, seconds)."""
    start = time.monotonic()
    process = subprocess.Popen(command, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    for line in process.stdout:
        if text in line:
            return process, time.monotonic() - start
    raise SystemExit(f"ERROR: {command} ended before it said {text!r}")


def floor(folder):
    """Seconds of a bare head, a bare worker and a bare driver, each with its own folder, without a token."""
    environ = os.environ | {"RAY_AUTH_MODE": "disabled"}
    start = [RAY, "start", "--block", "--node-ip-address=127.0.0.1", "--disable-usage-stats",
             "--object-store-memory=500000000", "--include-log-monitor=false"]  # fmt: skip
    bare_head = [*start, "--head", "--port=0", "--dashboard-port=0", "--num-cpus=0", f"--temp-dir={folder}/h"]
    head, first = until_it_says(bare_head, "Ray runtime started", environ)
    file = Path(f"{folder}/h/ray_current_cluster")
    address = wait_for(lambda: file.exists() and file.read_text(), 10, file)
    bare_worker = [*start, f"--address={address}", "--num-cpus=4", f"--temp-dir={folder}/w"]
    worker, second = until_it_says(bare_worker, "Ray runtime started", environ)
    code = f"import ray; ray.init('{address}', logging_level='ERROR'); print('connected', flush=True)"
    driver, third = until_it_says([sys.executable, "-c", code], "connected", environ)
    for process in (driver, worker, head):
        process.terminate()
        process.wait(60)
    return first, second, third


def one_run(cluster, variables):
    """Seconds of each phase of a run, and from its last report to the end of the worker job and of the head job."""

    def moment(text):
        while text not in cluster.log(job):
            if time.monotonic() > begin + 300:
                raise SystemExit(f"ERROR: no {text!r} in the log after 300 s:\n{cluster.log(job)}")
            time.sleep(0.02)
        return time.monotonic()

    begin = last = time.monotonic()
    job = cluster.submit(**variables)
    seconds = {}
    for name, text in PHASES.items():
        now = moment(text)
        seconds[name], last = now - last, now
    seconds["bring-up: sbatch to search connected"] = sum(list(seconds.values())[:5])
    (worker,) = cluster.workers(job)
    wait_for(lambda: worker not in cluster("squeue", "--noheader", "--format=%i"), 60, "the worker job to end")
    seconds["last report to worker job gone"] = time.monotonic() - last
    wait_for(lambda: not cluster("squeue", "--noheader"), 60, "the head job to end")
    seconds["last report to head job gone"] = time.monotonic() - last
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    runs = max(1, parser.parse_args().runs)
    with tempfile.TemporaryDirectory(prefix="b.", dir="/tmp") as folder:
        course, demo = copy_of_the_course(Path(folder) / "repo"), Path(folder) / "demo"
        subprocess.run([sys.executable, REPO / "scripts/demo_assets.py", demo], check=True, stdout=subprocess.DEVNULL)
        environ = os.environ | {"MINI_SLURM_DIR": f"{folder}/ms"}
        script = REPO / "tests/mini_slurm.sh"
        up = subprocess.run(["bash", script, "up"], env=environ, text=True, check=True, stdout=subprocess.PIPE,
                            stderr=subprocess.DEVNULL)  # fmt: skip
        try:
            cluster = Cluster(environ | {"SLURM_CONF": up.stdout.split("=", 1)[1].strip()}, course)
            variables = SMALL | {"MODEL_NAME": str(demo / "model"), "SQUAD_DATA": str(demo / "squad")}
            measured, floors = [], []
            for i in range(runs):
                measured.append(one_run(cluster, variables))
                floors.append(floor(tempfile.mkdtemp(prefix=f"{i}.", dir=folder)))
        finally:
            subprocess.run(["bash", script, "down"], env=environ, check=True, stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL)  # fmt: skip

    print("| s | median | lowest | highest |\n|---|---|---|---|")
    rows = {name: [run[name] for run in measured] for name in measured[0]}
    rows |= dict(zip(("bare head", "bare worker", "bare driver"), zip(*floors, strict=True), strict=True))
    for name, values in rows.items():
        print(f"| {name} | {statistics.median(values):.1f} | {min(values):.1f} | {max(values):.1f} |")
    ratio = statistics.median(rows["bring-up: sbatch to search connected"]) / statistics.median(map(sum, floors))
    print(f"\nbring-up / (bare head + bare worker + bare driver): {ratio:.2f}  "
          f"({runs} runs, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')})")


if __name__ == "__main__":
    main()
