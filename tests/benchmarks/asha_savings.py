#!/usr/bin/env python3
"""What ASHA saves, and how often it finds the best.

    .venv/bin/python tests/benchmarks/asha_savings.py --seeds 1000
    .venv/bin/python tests/benchmarks/asha_savings.py RUN_FOLDER          # with the curves of your own model and data

Learning curves of real fine-tuning runs were recorded once (asha_savings_demo.json beside this program) and are
replayed here. The slots are simulated, but every decision is made by the scheduler of raytune_asha_hpo.py, called as
Ray's TuneController calls it. So a search takes milliseconds instead of minutes. Each search draws twelve of the
recorded configurations: ASHA against all twelve trained in full.

A RUN_FOLDER of one's own: runs/<jobid> of a search of, say, NUM_SAMPLES=96 trials that are never stopped (in
raytune_asha_hpo.py: grace_period=s.NUM_EPOCHS).
"""

import argparse
import json
import logging
import math
import random
import sys
import warnings
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import SCRIPT, events_of, load_module
from forecast import replay

DEMO = Path(__file__).resolve().with_name("asha_savings_demo.json")
TWELVE = 12
STARTUP, EPOCH = 5, 60  # seconds: from a free slot to a first step; of an epoch, to which recorded ones are scaled


class Curves:
    """Recorded learning curves: [(losses, seconds)], one pair for each configuration, and their search's settings.

    epoch_seconds: the seconds are scaled so that an epoch takes so many on average; None: as recorded.
    """

    def __init__(self, hpo, path, epoch_seconds=None):
        about, rows = self.of_run(path) if path.is_dir() else self.of_file(path)
        text = lambda value: " ".join(map(str, value)) if isinstance(value, list) else str(value)
        self.settings = hpo.read_settings({name: text(about[name]) for name in hpo.VARIABLES if name in about})
        self.name, self.mean_epoch = path.stem, np.mean([each for _, seconds in rows for each in seconds])
        scale = epoch_seconds / self.mean_epoch if epoch_seconds else 1
        self.recorded = [([math.nan if loss is None else loss for loss in losses], [scale * each for each in seconds])
                         for losses, seconds in rows]  # fmt: skip

    @staticmethod
    def of_file(path):
        loaded = json.loads(path.read_text())
        return loaded["about"], [(curve["eval_loss"], curve["seconds"]) for curve in loaded["curves"]]

    @staticmethod
    def of_run(folder):
        """From the record of a run; trials that were cut off are left out."""
        about, reports = events_of(folder, "settings")[0], {}
        for event in events_of(folder, "report"):
            reports.setdefault(event["trial"], {})[event["epoch"]] = event["eval_loss"], event["seconds"]
        rows = []
        for trial in reports.values():
            losses, ends = zip(*(trial[epoch] for epoch in sorted(trial)), strict=True)
            if len(trial) == int(about["NUM_EPOCHS"]) or losses[-1] is None:
                rows.append((losses, np.diff(ends, prepend=0).tolist()))
        return about, rows


def compare_with_full(hpo, curves, seed, slots):
    """Twelve recorded configurations in random order: all in full, and by ASHA. What ASHA saves, and what it misses."""
    from ray.tune.schedulers import FIFOScheduler

    twelve = random.Random(seed).sample(curves.recorded, TWELVE)
    full, ours = (replay(each, twelve, slots, STARTUP) for each in (FIFOScheduler(), hpo.scheduler(curves.settings)))
    best = min(range(TWELVE), key=lambda number: np.nanmin(twelve[number][0]))
    return {
        "epochs": ours["epochs"], "epochs_full": full["epochs"],
        "time": ours["seconds"] / full["seconds"],
        "best_to_the_end": ours["trials"][best].last_result["epoch"] == curves.settings.NUM_EPOCHS,
        "best_found": ours["best"] == full["best"],
    }  # fmt: skip


def spread(values):
    """Median and 5-95 % range as text."""
    low, middle, high = np.percentile(values, [5, 50, 95])
    return f"{middle:.0f} ({low:.0f}-{high:.0f})"


def table_of_savings(hpo, path, seeds):
    curves, as_recorded = Curves(hpo, path, EPOCH), Curves(hpo, path)
    print(f"\n### {curves.name}: {len(curves.recorded)} recorded configurations, twelve in a search, {seeds} seeds\n"
          f"\nStart-up of a trial {STARTUP} s. Median (5-95 %).\n\n| at once "
          f"| epochs of {TWELVE * curves.settings.NUM_EPOCHS} "
          f"| % of the full slot time, epochs of {EPOCH} s | epochs of {as_recorded.mean_epoch:.1f} s "
          "| best of twelve trained to the end | best of twelve wins |\n|---|---|---|---|---|---|")  # fmt: skip
    for slots in (1, 4):
        runs = [compare_with_full(hpo, curves, seed, slots) for seed in range(seeds)]
        short = [100 * compare_with_full(hpo, as_recorded, seed, slots)["time"] for seed in range(seeds)]
        column = {key: np.array([run[key] for run in runs]) for key in runs[0]}
        print(f"| {slots} | {spread(column['epochs'])} | {spread(100 * column['time'])} | {spread(short)} "
              f"| {100 * column['best_to_the_end'].mean():.0f} % | {100 * column['best_found'].mean():.0f} % |")


def main():
    """Returns the exit status: 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("curves", type=Path, nargs="*", default=[DEMO], metavar="RUN_FOLDER", help="(the demo's)")
    parser.add_argument("--seeds", type=int, default=300, help="searches for each figure (%(default)s)")
    a = parser.parse_args()
    if a.seeds < 2:
        parser.error("--seeds wants 2 or more")
    for path in a.curves:
        if not (path.is_file() or (path / "events.jsonl").is_file()):
            parser.error(f"{path}: no events.jsonl in this folder; give one such as runs/12345")
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    hpo = load_module(SCRIPT)
    for path in a.curves:
        table_of_savings(hpo, path, a.seeds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
