#!/usr/bin/env python3
"""What a trial costs beside its training: from one trial's last report to the next one's first step, on one slot.

    .venv/bin/python tests/benchmarks/turnover.py              # 6 trials of one epoch with the demo model; 2 to 3 minutes
    .venv/bin/python tests/benchmarks/turnover.py --trials 12

Beside it the same training as a bare `torchrun` of the manual script, in the same run of this program: the least that
starting W processes, importing, loading and a first step take without Ray. Nothing else should run on the machine.
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

# An epoch of 12 s or so on 2 cores: long enough for the next trial's processes to import meanwhile, as any real one is.
ONE_EPOCH = {"NUM_EPOCHS": "1", "TRAIN_SAMPLES": "1000", "EVAL_SAMPLES": "16", "BS_CHOICES": "2"}
IMPORTS = "    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, Trainer, TrainingArguments\n"  # of fine_tune
AT_FIRST_STEP = """
    from transformers import TrainerCallback

    class FirstStep(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1 and os.environ.get("RANK", "0") == "0":
                with open(os.environ["FIRST_STEPS"], "a") as file:
                    file.write(f"{time.monotonic()}\\n")

    callbacks = [*callbacks, FirstStep()]
"""


def replaced(text, old, new):
    """text with new in place of old, which must be there once."""
    if text.count(old) != 1:
        raise SystemExit(f"ERROR: the search script does not have once what this program edits in a copy of it: {old!r}")
    return text.replace(old, new)


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
        script, steps = Path(folder) / "repo" / SCRIPT.relative_to(REPO), Path(folder) / "first_steps"
        script.write_text(replaced(script.read_text(), IMPORTS, IMPORTS + AT_FIRST_STEP))
        environ = os.environ | ONE_EPOCH | {"MODEL_NAME": str(demo / "model"), "SQUAD_DATA": str(demo / "squad"), "NUM_SAMPLES": str(trials)}
        environ |= {"FIRST_STEPS": str(steps)}

        seen = {"  started": [], "  epoch 1/1": []}
        for at, line in stamped_lines(["bash", HEAD], cwd=course, env=environ):
            for word, times in seen.items():
                if word in line:
                    times.append(at)
        started, reported = seen.values()
        stepped = [float(moment) for moment in steps.read_text().split()]

        bare = []
        manual = Path(folder) / "repo/scripts/manual_hpo/bloom_hpo_manual.py"
        torchrun = [REPO / ".venv/bin/torchrun", "--standalone", "--nproc_per_node=2", manual, "--lr", "1e-4", "--bs", "2", "--wd", "0.0"]
        for _ in range(3):
            steps.unlink()
            start = time.monotonic()
            list(stamped_lines(torchrun, env=environ | {"TRAIN_SAMPLES": "32"}))
            bare.append(float(steps.read_text()) - start)

    rows = {
        "a trial's last report to the next one's start": [b - a for a, b in zip(reported, started[1:])],
        "its start to its first step": [b - a for a, b in zip(started[1:], stepped[1:], strict=True)],
        "turnover: a trial's last report to the next one's first step": [b - a for a, b in zip(reported, stepped[1:])],
        "the first trial, with nothing prepared: its start to its first step": [stepped[0] - started[0]],
        "a bare torchrun, start to its first step": bare,
    }
    print("| s | median | lowest | highest |\n|---|---|---|---|")
    for name, values in rows.items():
        print(f"| {name} | {statistics.median(values):.1f} | {min(values):.1f} | {max(values):.1f} |")
    turnover, floor = (statistics.median(list(rows.values())[i]) for i in (2, 4))
    print(f"\nratio to the bare torchrun: {turnover / floor:.2f}  ({trials} trials, 2 workers each, {os.cpu_count()} cores)")


if __name__ == "__main__":
    main()
