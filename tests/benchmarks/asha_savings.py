#!/usr/bin/env python3
"""What ASHA saves, and how often it finds the best.

    .venv/bin/python tests/benchmarks/asha_savings.py --seeds 1000
    .venv/bin/python tests/benchmarks/asha_savings.py RUN_FOLDER          # with the curves of your own model and data
    .venv/bin/python tests/benchmarks/asha_savings.py --curves FILE.csv   # of anyone's, such as NAS-Bench-201
    .venv/bin/python tests/benchmarks/asha_savings.py --stragglers --seeds 20     # ASHA against synchronous halving

Learning curves of real fine-tuning runs were recorded once (asha_savings_demo.json beside this program) and are
replayed here. The slots are simulated, but every decision is made by the scheduler of raytune_asha_hpo.py, called as
Ray's TuneController calls it. So a search takes milliseconds instead of minutes. Each search draws twelve of the
recorded configurations: ASHA against all twelve trained in full. It is compared with ASHA as published, which promotes
where Ray's stops: the scheduler of raytune_promoting_hpo.py.

A RUN_FOLDER of one's own: runs/<jobid> of a search of, say, NUM_SAMPLES=96 trials that are never stopped (in
raytune_asha_hpo.py: grace_period=s.NUM_EPOCHS).

FILE.csv: a configuration a line, twelve or more; in it the loss after each epoch, the lower the better, separated by
commas. All lines have as many; nan: diverged. Each epoch takes the same time.
"""

import argparse
import heapq
import json
import logging
import math
import random
import sys
import warnings
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import REPO, SCRIPT, events_of, load_module
from forecast import replay

DEMO = Path(__file__).resolve().with_name("asha_savings_demo.json")
PROMOTING = REPO / "scripts/raytune_hpo/raytune_promoting_scheduler/raytune_promoting_hpo.py"
TWELVE = 12
STARTUP, EPOCH = 5, 60  # seconds: from a free slot to a first step; of an epoch, to which recorded ones are scaled


class Curves:
    """Recorded learning curves: [(losses, seconds)], one pair for each configuration, and their search's settings.

    epoch_seconds: the seconds are scaled so that an epoch takes so many on average; None: as recorded.
    """

    def __init__(self, hpo, path, epoch_seconds=None):
        read = self.of_run if path.is_dir() else self.of_file if path.suffix == ".json" else self.of_csv
        about, rows = read(path)
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
    def of_csv(path):
        rows = [[float(loss) for loss in line.split(",")] for line in path.read_text().splitlines() if line.strip()]
        if len(rows) < TWELVE or len({len(row) for row in rows}) > 1:
            raise ValueError(f"needs {TWELVE} lines or more, with the same number of losses in each")
        return {"NUM_EPOCHS": len(rows[0])}, [(row, [1.0] * len(row)) for row in rows]

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


def compare_with_full(search, curves, seed, slots):
    """Twelve recorded configurations in random order: all in full, and by the scheduler of this search script. What it
    saves, and what it misses."""
    from ray.tune.schedulers import FIFOScheduler

    twelve = random.Random(seed).sample(curves.recorded, TWELVE)
    full, ours = (replay(each, twelve, slots, STARTUP) for each in (FIFOScheduler(), search.scheduler(curves.settings)))
    best = min(range(TWELVE), key=lambda number: np.nan_to_num(twelve[number][0], nan=math.inf).min())
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


def table_of_savings(hpo, promoting, path, seeds):
    curves, as_recorded = Curves(hpo, path, EPOCH), Curves(hpo, path)
    print(f"\n### {curves.name}: {len(curves.recorded)} recorded configurations, twelve in a search, {seeds} seeds\n"
          f"\nStart-up of a trial, and after a pause, {STARTUP} s. Median (5-95 %).\n\n| at once | ASHA "
          f"| epochs of {TWELVE * curves.settings.NUM_EPOCHS} | % of them "
          f"| % of the full slot time, epochs of {EPOCH} s | epochs of {as_recorded.mean_epoch:.1f} s "
          "| best of twelve trained to the end | best of twelve wins |\n|---|---|---|---|---|---|---|---|")  # fmt: skip
    for slots in (1, 4):
        for name, search in (("stops", hpo), ("promotes", promoting)):
            runs = [compare_with_full(search, curves, seed, slots) for seed in range(seeds)]
            short = [100 * compare_with_full(search, as_recorded, seed, slots)["time"] for seed in range(seeds)]
            column = {key: np.array([run[key] for run in runs]) for key in runs[0]}
            share = 100 * column["epochs"] / column["epochs_full"]
            print(f"| {slots} | {name} | {spread(column['epochs'])} | {spread(share)} | {spread(100 * column['time'])} "
                  f"| {spread(short)} | {100 * column['best_to_the_end'].mean():.1f} % "
                  f"| {100 * column['best_found'].mean():.1f} % |")  # fmt: skip


# ---- Stragglers and dropped jobs -------------------------------------------------------------------------------------
def synchronous(curves, slots, factor, rungs):
    """When synchronous halving has trained one to the last rung: each rung waits for all of the one before."""
    now, going_on, trained = 0.0, curves, 0
    for number, rung in enumerate(rungs, 1):
        free, arrived = [now] * slots, []
        for losses, seconds in going_on:
            ends = heapq.heappop(free)
            for epoch in range(trained, rung):
                ends += seconds[epoch]
                if math.isnan(losses[epoch]):
                    break
            else:
                arrived.append((losses, seconds))
            heapq.heappush(free, ends)
        arrived.sort(key=lambda curve: curve[0][rung - 1])
        now, going_on, trained = max(free), arrived[: len(curves) // factor**number], rung
    return now if arrived else math.inf


def table_of_stragglers(promoting, seeds, workers=25, factor=4, n=256, R=256):
    """After the simulation in the appendix of Li et al. (2020): a job, from one rung to the next, takes 1 + |z| times
    as long, z normal with this deviation; in each unit of time it is dropped with this probability."""
    rungs = [factor**k for k in range(5)]
    print(f"\n### {workers} workers, factor {factor}, {n} configurations, R = {R}, {seeds} seeds\n\n"
          "When the first is trained to R, in units of time(R): median (5-95 %); inf: never.\n\n"
          "| deviation | dropped | synchronous | promoting |\n|---|---|---|---|")  # fmt: skip
    for deviation in (0, 0.56, 1.33):
        for dropped in (0, 0.001, 0.002):
            times = []
            for seed in range(seeds):
                rng = np.random.default_rng(seed)
                slow = np.repeat(1 + abs(rng.normal(0, 1, (n, 5)) * deviation), np.diff(rungs, prepend=0), axis=1)
                lost = rng.random((n, R)) < 1 - (1 - dropped) ** slow
                losses = np.where(lost, np.nan, rng.random((n, 1)))
                curves = list(zip(losses.tolist(), slow.tolist(), strict=True))
                trials = replay(promoting.PromotingASHA(1, R, factor), curves, workers)["trials"]
                whole = [each.ended for each in trials if math.isfinite(each.losses[each.last_result["epoch"] - 1])
                         and each.last_result["epoch"] == R]  # fmt: skip
                first = min(whole, default=math.inf)
                times.append((synchronous(curves, workers, factor, rungs) / R, first / R))
            both = (f"{m:.2f} ({low:.2f}-{high:.2f})" for low, m, high in
                    np.percentile(times, [5, 50, 95], axis=0, method="nearest").T)  # fmt: skip
            print(f"| {deviation} | {dropped} | {' | '.join(both)} |")


def main():
    """Returns the exit status: 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="*", default=[DEMO], metavar="RUN_FOLDER", help="(the demo's)")
    parser.add_argument("--curves", type=Path, metavar="FILE", help="learning curves of anyone's, as above")
    parser.add_argument("--stragglers", action="store_true", help="jobs that are slow or dropped, as above")
    parser.add_argument("--seeds", type=int, default=300, help="searches for each figure (%(default)s)")
    a = parser.parse_args()
    if a.seeds < 2:
        parser.error("--seeds wants 2 or more")
    for path in a.runs:
        if not (path.is_file() or (path / "events.jsonl").is_file()):
            parser.error(f"{path}: no events.jsonl in this folder; give one such as runs/12345")
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    hpo, promoting = load_module(SCRIPT), load_module(PROMOTING)
    if a.stragglers:
        table_of_stragglers(promoting, a.seeds)
        return 0
    if a.curves:
        try:
            Curves.of_csv(a.curves)
        except (OSError, ValueError) as error:
            parser.error(f"--curves {a.curves}: {error}")
    for path in [a.curves] if a.curves else a.runs:
        table_of_savings(hpo, promoting, path, a.seeds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
