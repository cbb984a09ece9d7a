"""Many small runs one after another on the sandbox, each with a fault drawn at random (fixed seed); each is continued
until it has its best result. No trial may be lost, nothing may be left. Not part of the tests.

    .venv/bin/python -m pytest -p no:cacheprovider -v tests/soak.py    # 20 runs: half an hour on 2 cores. As root
    RUNS=5 SEED=7 .venv/bin/python -m pytest -p no:cacheprovider -v tests/soak.py
"""

import contextlib
import os
import random
import signal
import subprocess
import time

import pytest
from conftest import SMALL, SPACE, command_of, nothing_is_left, pids, table_of, wait_for

FAULTS = ("none", "time limit", "worker cancelled", "raylet killed", "gcs killed", "search killed", "head cancelled",
          "head killed", "requeued", "worker's power", "worker's cable", "head's power", "head's cable")  # fmt: skip
MOMENTS = ("joined", "  started", "epoch 1/")
DRAW = random.Random(int(os.environ.pop("SEED", "42")))
RUNS = [(DRAW.choice(FAULTS), DRAW.choice(MOMENTS)) for _ in range(int(os.environ.pop("RUNS", "20")))]
SEARCH = SPACE | SMALL | {"NUM_SAMPLES": "2", "NUM_EPOCHS": "2", "WORKERS_PER_TRIAL": "2", "CPUS_PER_WORKER": "4"}


def inject(cluster, fault, job, worker, node):
    whose = node if fault.startswith("worker") else "head"
    match fault.split()[-1], fault.split()[0]:
        case "limit", _:
            cluster("scontrol", "update", f"JobId={job}", "TimeLimit=3")  # --signal=B:TERM@120: after a minute
        case "cancelled", who:
            cluster("scancel", job if who == "head" else worker)
        case "killed", "head":
            cluster("scancel", "--signal=KILL", "--batch", job)  # the batch shell alone
        case "killed", who:
            words = {"raylet": "raylet/raylet", "gcs": "gcs/gcs_server", "search": "raytune_asha_hpo.py"}
            for pid in pids(f" worker {worker}" if who == "raylet" else f" head {job}"):
                if words[who] in command_of(pid):
                    os.kill(pid, signal.SIGKILL)
        case "requeued", _:
            cluster("scontrol", "requeue", job)
        case "power", _:
            cluster.trouble("power-off", whose)
        case "cable", _:
            cluster.trouble("cut", whose)
            time.sleep(10 if whose == "head" else 30)
            cluster.trouble("heal", whose)
    if fault == "head's power":
        time.sleep(10)
        cluster.trouble("restart", "head")
    if fault in ("head's power", "requeued"):
        wait_for(lambda: cluster.job(job)["JobState"] == "PENDING", 90, "the job to be queued again")
        cluster("scontrol", "update", f"JobId={job}", "StartTime=now")  # Slurm itself would wait two minutes


@pytest.mark.parametrize("fault, moment", RUNS)
def test_no_trial_is_lost_and_nothing_is_left(machines, demo, fault, moment):
    search = SEARCH | {"MODEL_NAME": str(demo / "model"), "SQUAD_DATA": str(demo / "squad")}
    jobs = [machines.submit(**search)]
    wait_for(lambda: moment in machines.log(jobs[0]), 180, moment)
    worker = machines.workers(jobs[0])[-1]
    node = machines.job(worker)["NodeList"]
    with contextlib.suppress(subprocess.CalledProcessError, ProcessLookupError):  # it may have ended meanwhile
        inject(machines, fault, jobs[0], worker, node)
    while True:
        machines.wait_for_end(jobs[-1], 300)
        if fault == "worker's power":
            machines.trouble("restart", node)
        nothing_is_left(machines, *jobs)
        if "Best Trial Result" in (log := machines.log(jobs[-1])) or len(jobs) == 4:
            break
        jobs.append(machines.submit(**search, RESUME=f"runs/{jobs[0]}"))  # as a student continues it
    rows = table_of(log.rsplit(" START ", 1)[1])
    assert [(row["status"], float(row["eval_loss"]) > 0, row["iter"] > "0") for row in rows] == [
        ("TERMINATED", True, True)] * 2  # fmt: skip
    assert len({row["Trial name"] for row in rows}) == 2
