#!/usr/bin/env python3
"""The quickstart's search against the least that its training takes, and what lies between two trials.

    .venv/bin/python tests/benchmarks/quickstart.py            # about 4 minutes on 2 cores

Two figures, both measured in this run: the search from START to FINISH; and the limit: one process group of torchrun
that trains the same epochs, one configuration after another.
Turnover is the time from a trial's last report to the next one's first step. Nothing else should run here.
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import HEAD, REPO, SCRIPT, copy_of_the_course, events_of, load_module, replace

DEMO = {"TRAIN_SAMPLES": "160", "EVAL_SAMPLES": "50", "LR_LOWER": "1e-4", "LR_UPPER": "5e-2", "CPUS_PER_WORKER": "1"}
AS_IN_A_JOB = {"TORCHDYNAMO_DISABLE": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1",
               "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}  # fmt: skip
IMPORTS = "    from transformers import TrainerCallback\n"  # of train_loop_per_worker, which takes callbacks
FIRST_STEP = IMPORTS + '''
    class FirstStep(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 0 and os.environ["RANK"] == "0":
                with open(os.environ["FIRST_STEPS"], "a") as file:
                    file.write(f"{time.time()}\\n")

    config["callbacks"] = [FirstStep()]
'''


def trains_the_same(trials):
    """In one process of torchrun: trains each configuration for as many epochs as the search did."""
    from transformers import TrainerCallback

    class StopsAfter(TrainerCallback):
        def on_epoch_end(self, args, state, control, **kwargs):
            control.should_training_stop = round(state.epoch) >= epochs

    hpo = load_module(SCRIPT)
    s = hpo.read_settings(os.environ)
    rows = hpo.load_squad(s)
    for drawn, epochs in json.loads(Path(trials).read_text()):  # StopsAfter reads `epochs`
        hpo.fine_tune(drawn, s, *rows, callbacks=[StopsAfter()])


def timed(command, **options):
    """Seconds of a command as a whole process."""
    start = time.monotonic()
    run = subprocess.run(command, check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
    if run.returncode:
        raise SystemExit(f"ERROR: {command} ended with exit status {run.returncode}:\n{run.stdout[-3000:]}")
    return time.monotonic() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", metavar="FILE", help=argparse.SUPPRESS)
    if (child := parser.parse_args().child) is not None:
        return trains_the_same(child)
    workers = os.environ.get("WORKERS_PER_TRIAL", "2")
    with tempfile.TemporaryDirectory() as folder:
        demo, steps, trials = (Path(folder) / name for name in ("demo", "steps", "trials.json"))
        course = copy_of_the_course(Path(folder) / "repo")
        timed([sys.executable, REPO / "scripts/demo_assets.py", demo])
        replace(Path(folder) / "repo" / SCRIPT.relative_to(REPO), (IMPORTS, FIRST_STEP))
        environ = os.environ | DEMO | {"MODEL_NAME": str(demo / "model"), "SQUAD_DATA": str(demo / "squad")}

        timed(["bash", HEAD], cwd=course, env=environ | {"FIRST_STEPS": str(steps)})
        events = events_of(next(course.glob("runs/*")))
        at = lambda event: datetime.datetime.fromisoformat(event["time"]).timestamp()
        run = at(events[-1]) - at(events[0])
        drawn = {event["trial"]: event["config"] for event in events if event["event"] == "trial_started"}
        reports = [event for event in events if event["event"] == "report"]
        epochs = {event["trial"]: event["epoch"] for event in reports}
        trials.write_text(json.dumps([(drawn[name], epochs[name]) for name in drawn]))
        ends = sorted({event["trial"]: at(event) for event in reports}.values())
        between = [float(begin) - end for begin, end in zip(steps.read_text().split()[1:], ends, strict=False)]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={workers}"]
        limit = timed([*torchrun, __file__, "--child", trials], env=environ | AS_IN_A_JOB)

    print(f"| | s | limits |\n|---|---|---|\n| the search, START to FINISH | {run:.1f} | {run / limit:.2f} |\n"
          f"| the limit: one torchrun group, the same {sum(epochs.values()):.0f} epochs | {limit:.1f} | 1.00 |")
    print(f"\nturnover: {statistics.median(between):.2f} s ({min(between):.2f} to {max(between):.2f}), "
          f"median of {len(between)}\n({len(drawn)} trials, {workers} worker(s) each, seed 42, {os.cpu_count()} cores, "
          f"{time.strftime('%Y-%m-%d')})")  # fmt: skip


if __name__ == "__main__":
    main()
