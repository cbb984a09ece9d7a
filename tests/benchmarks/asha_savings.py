#!/usr/bin/env python3
"""What ASHA saves, and what it costs in loss.

    .venv/bin/python tests/benchmarks/asha_savings.py --seeds 1000
    .venv/bin/python tests/benchmarks/asha_savings.py --record FILE                # new curves; 5 to 6 minutes

Learning curves of real fine-tuning runs were recorded once (--record; asha_savings_demo.json beside this program) and
are replayed here. The slots are simulated, but every decision is made by the scheduler of raytune_asha_hpo.py, called
as Ray's TuneController calls it. So a search takes milliseconds instead of minutes.

For each file of curves, a table: twelve of the recorded configurations, drawn anew for each seed, ASHA against all
twelve trained in full.
"""

import argparse
import json
import logging
import math
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import REPO, SCRIPT, load_module
from forecast import replay

BESIDE = Path(__file__).resolve().parent
CURVES = sorted(BESIDE.glob("asha_savings_*.json"))
# The quickstart's search.
QUICKSTART = {"TRAIN_SAMPLES": "160", "EVAL_SAMPLES": "50", "LR_LOWER": "1e-4", "LR_UPPER": "5e-2"}
QUICKSTART |= {"GPUS_PER_WORKER": "0"}
SEARCHED = ("TRAIN_SAMPLES", "EVAL_SAMPLES", "NUM_EPOCHS", "WORKERS_PER_TRIAL", "LR_LOWER", "LR_UPPER", "BS_CHOICES",
            "WD_CHOICES", "SEED")  # fmt: skip
TWELVE = 12


# ---- Recording -------------------------------------------------------------------------------------------------------
def draw_configurations(space, seed, count):
    """The first `count` configurations that a search draws with this seed; with 42, the quickstart's."""
    from ray.tune.experiment import Experiment
    from ray.tune.search.basic_variant import BasicVariantGenerator

    sampler = BasicVariantGenerator(random_state=seed)
    with tempfile.TemporaryDirectory() as folder:
        search = Experiment("draw", lambda config: None, config=space, num_samples=count, storage_path=folder)
        sampler.add_configurations(search)
        return [sampler.next_trial().config["train_loop_config"] for _ in range(count)]


def record(path, count):
    """Train `count` configurations one by one in this process, on one core; write their learning curves as JSON.

    The search's variables (SQUAD_DATA, TRAIN_SAMPLES, ...) apply; the defaults are the quickstart's.
    """
    hpo = load_module(SCRIPT)
    hpo.DS_CONFIG = None  # one process has nothing to split
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    with tempfile.TemporaryDirectory() as folder:
        make_demo = [sys.executable, REPO / "scripts/demo_assets.py", folder]
        subprocess.run(make_demo, check=True, stdout=subprocess.DEVNULL)
        environ = {"MODEL_NAME": f"{folder}/model", "SQUAD_DATA": f"{folder}/squad"} | QUICKSTART | os.environ
        s = hpo.read_settings(environ)
        import torch
        import transformers

        torch.set_num_threads(1)
        data, curves, begun = hpo.load_squad(s), [], time.monotonic()

        class Record(transformers.TrainerCallback):
            """Loss and CPU seconds of each epoch; other load does not change CPU seconds."""

            def on_train_begin(self, *args, **kwargs):
                self.at = time.process_time()

            def on_evaluate(self, args, state, control, metrics=None, **kwargs):
                now, loss = time.process_time(), metrics["eval_answer_loss"]
                curve["eval_loss"].append(round(loss, 6) if math.isfinite(loss) else None)
                curve["seconds"].append(round(now - self.at, 3))
                self.at = now
                control.should_training_stop = not math.isfinite(loss)  # as Tune ends a diverged trial

        for config in draw_configurations(hpo.search_space(s), s.SEED, count):
            curve = config | {"eval_loss": [], "seconds": []}
            # One process takes the samples per step that W workers take together.
            alone = config | {"per_device_bs": config["per_device_bs"] * s.WORKERS_PER_TRIAL}
            hpo.fine_tune(alone, s, *data, callbacks=[Record()])
            curves.append(curve)
            print(f"{len(curves)}/{count}  {time.monotonic() - begun:.0f} s  {json.dumps(curve)}", file=sys.stderr)
        about = {
            "data": "demo" if s.SQUAD_DATA.startswith(folder) else "SQuAD v1.1",
            "model": "demo" if s.MODEL_NAME.startswith(folder) else s.MODEL_NAME,
            "command": f"asha_savings.py --record FILE --configurations {count}", "date": time.strftime("%Y-%m-%d"),
            "hardware": f"1 core of {processor()}", "took_s": round(time.monotonic() - begun),
            "torch": torch.__version__, "transformers": transformers.__version__,
        } | {name: getattr(s, name) for name in SEARCHED}  # fmt: skip
    rows = ",\n  ".join(map(json.dumps, curves))
    path.write_text(f'{{"about": {json.dumps(about)},\n "curves": [\n  {rows}\n]}}\n')


def processor():
    """The name of the CPU, as Linux gives it."""
    found = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1].strip() if found else platform.machine()


# ---- Curves ----------------------------------------------------------------------------------------------------------
class Curves:
    """A recorded file; seconds scaled so that an epoch takes `epoch_seconds` on average (None: as recorded)."""

    def __init__(self, path, epoch_seconds=None):
        loaded = json.loads(path.read_text())
        self.about, self.configurations = loaded["about"], loaded["curves"]
        self.name = path.stem.removeprefix("asha_savings_")
        mean = np.mean([s for c in self.configurations for s in c["seconds"]])
        scale = epoch_seconds / mean if epoch_seconds else 1
        self.mean_epoch = mean * scale
        self.recorded = [
            ([math.nan if x is None else x for x in c["eval_loss"]], [x * scale for x in c["seconds"]])
            for c in self.configurations
        ]


def settings_of(hpo, about):
    """The settings of the search that recorded these curves."""
    text = lambda value: " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return hpo.read_settings({name: text(about[name]) for name in hpo.VARIABLES if name in about})


# ---- Tables ----------------------------------------------------------------------------------------------------------
def spread(values, digits=0):
    """Median and 5-95 % range as text."""
    low, middle, high = np.percentile(values, [5, 50, 95])
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def compare_with_full(hpo, curves, seed, slots, startup):
    """Twelve recorded configurations in random order: all in full, and by ASHA. What ASHA saves, and what it misses."""
    from ray.tune.schedulers import FIFOScheduler

    settings = settings_of(hpo, curves.about)
    twelve = random.Random(seed).sample(curves.recorded, TWELVE)
    full, ours = (replay(each, twelve, slots, startup) for each in (FIFOScheduler(), hpo.scheduler(settings)))
    best = min(range(TWELVE), key=lambda number: np.nanmin(twelve[number][0]))
    return {
        "epochs": ours["epochs"], "epochs_full": full["epochs"],
        "time": ours["seconds"] / full["seconds"], "regret": ours["best"] - full["best"],
        "best_to_the_end": ours["trials"][best].last_result["epoch"] == settings.NUM_EPOCHS,
        "best_found": ours["best"] == full["best"],
    }  # fmt: skip


def table_of_savings(hpo, path, seeds, startup, epoch_seconds):
    curves, as_recorded = Curves(path, epoch_seconds), Curves(path)
    print(f"\n### savings, {curves.name} curves: {len(curves.recorded)} recorded configurations, "
          f"twelve of them a search, {seeds} seeds\n\nStart-up of a trial {startup:g} s. Median (5-95 %). "
          "Regret: lowest loss found minus lowest loss of the twelve trained in full, in nats.\n")
    print(f"| at once | epochs of {TWELVE * curves.about['NUM_EPOCHS']} "
          f"| % of the full slot time, epochs of {epoch_seconds:g} s | epochs of {as_recorded.mean_epoch:.1f} s "
          "| best of twelve trained to the end | best of twelve wins | regret | mean and highest regret |"
          "\n|---|---|---|---|---|---|---|---|")
    for slots in (1, 4):
        runs = [compare_with_full(hpo, curves, seed, slots, startup) for seed in range(seeds)]
        short = [100 * compare_with_full(hpo, as_recorded, seed, slots, startup)["time"] for seed in range(seeds)]
        column = {key: np.array([run[key] for run in runs]) for key in runs[0]}
        regret = column["regret"]
        print(f"| {slots} | {spread(column['epochs'])} | {spread(100 * column['time'])} | {spread(short)} "
              f"| {100 * column['best_to_the_end'].mean():.0f} % | {100 * column['best_found'].mean():.0f} % "
              f"| {spread(regret, 3)} | {regret.mean():.3f}, {regret.max():.3f} |", flush=True)


def main():
    """Returns the exit status: 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--seeds", type=int, default=300, help="searches for each figure (%(default)s)")
    option("--startup", type=float, default=5, metavar="S", help="from a free slot to a first step (%(default)s)")
    option("--epoch-seconds", type=float, default=60, metavar="S",
           help="mean length of an epoch, to which the recorded ones are scaled (%(default)s)")  # fmt: skip
    option("--curves", type=Path, nargs="+", default=CURVES, metavar="FILE", help="(those beside this program)")
    option("--record", type=Path, metavar="FILE", help="instead: train, and write the curves to this file")
    option("--configurations", type=int, default=96, metavar="N", help="how many to --record (%(default)s)")
    a = parser.parse_args()
    for name, low in (("seeds", 2), ("startup", 0), ("epoch_seconds", 1e-3), ("configurations", 1)):
        if not getattr(a, name) >= low:
            parser.error(f"--{name.replace('_', '-')} {getattr(a, name)}: give at least {low:g}")
    if a.record:
        if not a.record.absolute().parent.is_dir():
            parser.error(f"--record {a.record}: no such folder; give a file in an existing one")
        return record(a.record, a.configurations)
    for path in a.curves:
        if not path.is_file():
            parser.error(f"--curves {path}: no such file; make it with --record {path}")
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    hpo = load_module(SCRIPT)
    for path in a.curves:
        table_of_savings(hpo, path, a.seeds, a.startup, a.epoch_seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
