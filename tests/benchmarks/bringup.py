#!/usr/bin/env python3
"""How long a run holds nodes before it trains and after it has trained: phases of one run on the sandbox.

    .venv/bin/python tests/benchmarks/bringup.py              # 3 runs of one trial with the demo model; about 3 minutes
    .venv/bin/python tests/benchmarks/bringup.py --lag 30     # in a folder that is believed, as by NFS, for 30 s

Compared with the least that Ray takes, measured in between: a bare `ray start --head`, a bare `ray start` of a worker
and a bare driver, one after the other. Nothing else should run on the machine.
"""

import argparse
import functools
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import REPO, Cluster, address_of, copy_of_the_course, end_ray, start_ray, wait_for

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
BRING_UP = list(PHASES)[:5]


def floor(folder):
    """Seconds of a bare head, a bare worker and a bare driver, without a token."""
    environ = os.environ | {"RAY_AUTH_MODE": "disabled"}
    less = ("--object-store-memory=500000000", "--include-log-monitor=false")

    def up(name, *options):
        log = Path(f"{folder}.{name}")
        process = start_ray(*options, *less, f"--temp-dir={folder}/{name}", log=log, environ=environ)
        wait_for(lambda: "Ray runtime started" in log.read_text(), 120, f"a bare Ray; its log: {log}")
        return process

    moments = [time.monotonic()]
    processes = [up("h", "--head", "--port=0", "--dashboard-port=0", "--num-cpus=0")]
    moments.append(time.monotonic())
    address = address_of(f"{folder}/h")
    processes.append(up("w", f"--address={address}", "--num-cpus=4"))
    moments.append(time.monotonic())
    code = f"import os, ray; ray.init('{address}', logging_level='ERROR'); os._exit(0)"
    subprocess.run([sys.executable, "-c", code], env=environ, check=True)
    moments.append(time.monotonic())
    for process in reversed(processes):
        end_ray(process)
    return [end - begin for begin, end in itertools.pairwise(moments)]


def one_run(cluster, variables):
    """Seconds of each phase of a run, and from its last report to the end of the worker job and of the head job."""
    last, seconds = time.monotonic(), {}
    job = cluster.submit(**variables)
    for name, text in PHASES.items():
        while text not in cluster.log(job):
            if time.monotonic() > last + 300:
                raise SystemExit(f"ERROR: no {text!r} in the log after 300 s:\n{cluster.log(job)}")
            time.sleep(0.02)
        seconds[name], last = time.monotonic() - last, time.monotonic()
    seconds["bring-up: sbatch to search connected"] = sum(seconds[name] for name in BRING_UP)
    (worker,) = cluster.workers(job)
    wait_for(lambda: worker not in cluster("squeue", "--noheader", "--format=%i"), 60, "the worker job to end")
    seconds["last report to worker job gone"] = time.monotonic() - last
    wait_for(lambda: not cluster("squeue", "--noheader"), 60, "the head job to end")
    seconds["last report to head job gone"] = time.monotonic() - last
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--lag", type=int, default=0, metavar="SECONDS")
    args = parser.parse_args()
    runs = max(1, args.runs)
    with tempfile.TemporaryDirectory(prefix="b.", dir="/tmp") as folder:
        course, demo = copy_of_the_course(Path(folder) / "repo"), Path(folder) / "demo"
        environ = os.environ | {"MINI_SLURM_DIR": f"{folder}/ms", "MINI_SLURM_SHARED": folder}
        sandbox = ["bash", REPO / "tests/mini_slurm.sh"]
        output = functools.partial(subprocess.check_output, env=environ, text=True, stderr=subprocess.DEVNULL)
        output([sys.executable, REPO / "scripts/demo_assets.py", demo])
        try:
            cluster = Cluster(environ | {"SLURM_CONF": output([*sandbox, "up"]).split("=", 1)[1].strip()}, course)
            for node in ("head", "worker1", "worker2") if args.lag else ():
                output([*sandbox, "lag", node, f"{folder}/repo", str(args.lag)])
            variables = SMALL | {"MODEL_NAME": str(demo / "model"), "SQUAD_DATA": str(demo / "squad")}
            measured = [(one_run(cluster, variables), floor(f"{folder}/{i}")) for i in range(runs)]
        finally:
            output([*sandbox, "down"])

    print("| s | median | lowest | highest |\n|---|---|---|---|")
    least = ("bare head", "bare worker", "bare driver")
    rows = [phases | dict(zip(least, bare, strict=True)) for phases, bare in measured]
    median = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        median[name] = statistics.median(values)
        print(f"| {name} | {median[name]:.1f} | {min(values):.1f} | {max(values):.1f} |")
    ratio = median["bring-up: sbatch to search connected"] / sum(median[name] for name in least)
    print(f"\nbring-up / (bare head + bare worker + bare driver): {ratio:.2f}  "
          f"({runs} runs, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')})")  # fmt: skip


if __name__ == "__main__":
    main()
