#!/usr/bin/env python3
"""The quickstart's search against the least that its training takes, and what lies between two trials.

    .venv/bin/python tests/benchmarks/quickstart.py            # about 4 minutes on 2 cores

Three figures, each measured in this run: an import of what a training process needs; the search from START to
FINISH; and the limit: one process group of torchrun that trains the same epochs, one configuration after another.
Turnover is the time from a trial's last report to the next one's first step. Nothing else should run here.
"""

import argparse
import functools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import HEAD, REPO, SCRIPT, copy_of_the_course, job_of, load_module, reports_of

IMPORT = "import torch, deepspeed, ray.train.torch; from transformers import Trainer"
DEMO = {"TRAIN_SAMPLES": "160", "EVAL_SAMPLES": "50", "LR_LOWER": "1e-4", "LR_UPPER": "5e-2", "CPUS_PER_WORKER": "1"}
SETTINGS = ("TORCHDYNAMO_DISABLE", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "TRANSFORMERS_VERBOSITY")
FIRST_STEP = '''
    class FirstStep(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 0 and os.environ["RANK"] == "0":
                with open(os.environ["FIRST_STEPS"], "a") as file:
                    file.write(f"{time.monotonic()}\\n")

    callbacks = [FirstStep(), '''


def trains_the_same(trials):
    """In one process of torchrun: trains each configuration for as many epochs as the search did."""
    from transformers import TrainerCallback

    class StopsAfter(TrainerCallback):
        def on_epoch_end(self, args, state, control, **kwargs):
            control.should_training_stop = round(state.epoch) >= self.epochs

    hpo = load_module(SCRIPT)
    s = hpo.read_settings(os.environ)
    rows = hpo.load_squad(s)
    for drawn, epochs in json.loads(Path(trials).read_text()):
        stop = StopsAfter()
        stop.epochs = epochs
        hpo.fine_tune(drawn, s, *rows, callbacks=[stop])


def timed(command, **options):
    """Seconds of a command as a whole process."""
    start = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options)
    return time.monotonic() - start


def stamped_lines(command, **options):
    """Each line that a command prints, with the time of its arrival in s."""
    process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, **options)
    lines = [(time.monotonic(), line) for line in process.stdout]
    if process.wait() != 0:
        raise SystemExit(f"ERROR: {command} ended with exit status {process.returncode}")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", metavar="FILE", help=argparse.SUPPRESS)
    if (child := parser.parse_args().child) is not None:
        return trains_the_same(child)
    with tempfile.TemporaryDirectory() as folder:
        demo, steps = Path(folder) / "demo", Path(folder) / "steps"
        course = copy_of_the_course(Path(folder) / "repo")
        subprocess.run([sys.executable, REPO / "scripts/demo_assets.py", demo], check=True, stdout=subprocess.DEVNULL)
        script = Path(folder) / "repo" / SCRIPT.relative_to(REPO)
        text, line = script.read_text(), "\n    callbacks = ["
        assert text.count(line) == 1
        script.write_text(text.replace(line, FIRST_STEP))
        workers = os.environ.get("WORKERS_PER_TRIAL", "2")
        environ = os.environ | DEMO | {"MODEL_NAME": str(demo / "model"), "SQUAD_DATA": str(demo / "squad")}

        imports = min(timed([sys.executable, "-c", IMPORT]) for _ in range(3))
        lines = stamped_lines(["bash", HEAD], cwd=course, env=environ | {"FIRST_STEPS": str(steps)})
        run = lines[-1][0] - lines[0][0]
        log = "".join(line for _, line in lines)
        reports = reports_of(course / "runs" / job_of(log))
        trials = [(rows[0]["config"]["train_loop_config"], len(rows)) for _, rows in sorted(reports.items())]
        last = {}
        for at, line in lines:
            if found := re.search(r"search \| (TorchTrainer_\S+)  epoch ", line):
                last[found[1]] = at
        first = [float(line) for line in steps.read_text().split()][1:]
        between = [begin - end for end, begin in zip(sorted(last.values()), first)]
        (Path(folder) / "trials.json").write_text(json.dumps(trials))
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={workers}"]
        alone = environ | dict(zip(SETTINGS, ("1", "0", "-1", "error"), strict=True)) | {"OMP_NUM_THREADS": "1"}
        limit = timed([*torchrun, __file__, "--child", f"{folder}/trials.json"], env=alone)

    show = functools.partial("{:.1f}".format)
    print("| | s | imports | limits |\n|---|---|---|---|")
    for name, value in {
        "an import of torch, deepspeed, ray.train.torch and the Trainer (least of 3)": imports,
        f"the limit: one torchrun group, the same {sum(epochs for _, epochs in trials)} epochs": limit,
        "the search, START to FINISH": run,
    }.items():
        print(f"| {name} | {show(value)} | {show(value / imports)} | {value / limit:.2f} |")
    middle, low, high = statistics.median(between), min(between), max(between)
    spread = f"{middle:.2f} s ({low:.2f} to {high:.2f})"
    print(f"\nturnover: {spread}, median of {len(between)}, {middle / imports:.2f} imports")
    cores = f"{os.cpu_count()} cores"
    print(f"({len(trials)} trials, {workers} worker(s) each, seed 42, {cores}, {time.strftime('%Y-%m-%d')})")


if __name__ == "__main__":
    main()
