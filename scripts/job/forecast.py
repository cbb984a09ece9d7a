#!/usr/bin/env python3
"""What a search is going to cost: the epochs that its scheduler is expected to train, time and GPU-hours.

    python forecast.py --slots 4                               # the default search, four trials at once
    NUM_SAMPLES=20 MINUTES_PER_EPOCH=1.5 python forecast.py --slots 4 --Gw 1

The variables are those of a search. MINUTES_PER_EPOCH is what one epoch of a trial takes; if it is not set, it is
taken from the newest run in runs/ with the same model, data and workers, where there is one.

Many searches are simulated with the scheduler of raytune_asha_hpo.py itself. Nobody knows the losses beforehand, so
each trial gets a random one, and keeps it; an epoch takes 0.8 to 1.2 times the mean.
"""

import argparse
import heapq
import itertools
import math
import os
import random
import re
import sys
from pathlib import Path
from statistics import mean
from types import SimpleNamespace

import rooms  # noqa: F401
from check_inputs import InputError, check, lesson
from ray.tune.search.variant_generator import generate_variants
from read_run import as_run, events_of

RUNS = Path(__file__).resolve().parents[2] / "experiments/raytune/scheduler/asha/runs"
SAME = ("MODEL_NAME", "SQUAD_DATA", "TRAIN_SAMPLES", "EVAL_SAMPLES", "WORKERS_PER_TRIAL", "GPUS_PER_WORKER",
        "PRECISION")
EPOCHS = 60_000  # simulated at most, so that it takes a second or two; a search of more epochs has no forecast


class Trial:
    """What a scheduler sees of a Ray trial, and the curve that it replays: a loss and a duration for each epoch."""

    def __init__(self, number, losses, seconds):
        self.trial_id, self.losses, self.seconds = f"{number:05d}", losses, seconds
        self.status, self.last_result = "PENDING", {"epoch": 0}


def replay(scheduler, curves, slots, startup=0.0):
    """One search, whose trials have these curves, on `slots` slots: {"epochs", "seconds", "best", "trials": [Trial]}.

    curves: [(losses, seconds)]; startup: seconds before a trial's first epoch, and after a pause.
    seconds: slots x wall time.
    """
    trials = [Trial(number, *curve) for number, curve in enumerate(curves)]
    live = lambda: [trial for trial in trials if trial.status != "TERMINATED"]
    # the part of Ray's TuneController that schedulers use
    controller = SimpleNamespace(get_trials=lambda: trials, get_live_trials=live,
                                 stop_trial=lambda trial: setattr(trial, "status", "TERMINATED"))  # fmt: skip
    for trial in trials:
        scheduler.on_trial_add(controller, trial)
    running, now, epochs, best, tie = [], 0.0, 0, math.inf, itertools.count()
    while True:
        while len(running) < slots and (trial := scheduler.choose_trial_to_run(controller)):
            trial.status = "RUNNING"
            ends = now + startup + trial.seconds[trial.last_result["epoch"]]  # one that was paused goes on
            heapq.heappush(running, (ends, next(tie), trial))
        if not running:
            return {"epochs": epochs, "seconds": slots * now, "best": best, "trials": trials}
        now, _, trial = heapq.heappop(running)
        epoch = trial.last_result["epoch"] + 1
        loss = trial.losses[epoch - 1]
        result = {"epoch": epoch, "training_iteration": epoch, "eval_loss": loss}
        epochs, decision = epochs + 1, "STOP"  # what RunConfig(stop=...) says of a loss that is not finite
        if math.isfinite(loss):
            best, decision = min(best, loss), scheduler.on_trial_result(controller, trial, result)
        trial.last_result = result
        if decision == "STOP" or epoch == len(trial.losses):
            scheduler.on_trial_complete(controller, trial, result)
            trial.status, trial.ended = "TERMINATED", now
        elif decision == "PAUSE":
            trial.status = "PAUSED"
        else:
            heapq.heappush(running, (now + trial.seconds[epoch], next(tie), trial))


def expected(s, slots):
    """(5 %, mean, 95 %) of the epochs that a search trains, and its mean wall time in epochs."""
    rng, repeats = random.Random(s.SEED), min(200, EPOCHS // (trials := trials_of(s)) // s.NUM_EPOCHS)
    curve = lambda: ([rng.random()] * s.NUM_EPOCHS, [rng.uniform(0.8, 1.2) for _ in range(s.NUM_EPOCHS)])
    found = [replay(lesson.scheduler(s), [curve() for _ in range(trials)], slots) for _ in range(repeats)]
    epochs, wall = sorted(each["epochs"] for each in found), mean(each["seconds"] for each in found) / slots
    return epochs[round(0.05 * (repeats - 1))], mean(epochs), epochs[round(0.95 * (repeats - 1))], wall


def trials_of(s):
    """NUM_SAMPLES, for each value of a tune.grid_search in the search space."""
    return s.NUM_SAMPLES * sum(1 for _ in generate_variants(lesson.search_space(s)))


def minutes_per_epoch(s, runs=RUNS):
    """(minutes, where from), or (None, why not)."""
    if text := os.environ.get("MINUTES_PER_EPOCH"):
        if re.fullmatch(r"[0-9]*\.?[0-9]+", text) and float(text) > 0:
            return float(text), "MINUTES_PER_EPOCH"
        return None, f"MINUTES_PER_EPOCH={text!r} is not a number above 0"
    text = lambda value: f"{value:g}" if isinstance(value, float) else str(value)
    same = {name: (lesson.VARIABLES[name][0], text(getattr(s, name))) for name in SAME}
    for path in sorted(runs.glob("*/events.jsonl"), key=lambda path: path.stat().st_mtime, reverse=True):
        run = as_run(path.parent, events_of(path.parent))
        known = [trial for trial in run.trials.values() if trial.runtime and trial.epochs]
        if known and all(run.settings.get(name, default) == ours for name, (default, ours) in same.items()):
            seconds = sum(trial.runtime for trial in known) / sum(trial.epochs for trial in known)
            return seconds / 60, f"run {path.parent.name}"
    return None, "no earlier run has this model and data; to know, set MINUTES_PER_EPOCH"


def amount(minutes, unit=""):
    for size, name in ((60, f"{unit}hours"), (1, f"{unit}minutes")):
        if minutes >= 2 * size:
            return f"{minutes / size:.1f} {name}"
    return f"{60 * minutes:.0f} {unit}seconds"


def lines(s, slots, Gw):
    """The forecast: one line on epochs, one on time and GPUs; none of a search too large to simulate."""
    trials, each = trials_of(s), s.WORKERS_PER_TRIAL * Gw
    most = trials * s.NUM_EPOCHS
    if most > EPOCHS:
        return
    low, average, high, wall = expected(s, slots)
    yield f"{low} to {high} of {most} epochs, {average:.0f} on average, with {slots} trial(s) at once"
    minutes, source = minutes_per_epoch(s)
    if minutes is None:
        yield f"time and GPU-hours are not known: {source}"
        return
    unit, at_most = "GPU-" if each else "slot-", math.ceil(trials / slots) * s.NUM_EPOCHS
    about, most = ((amount(time * minutes), amount(epochs * (each or 1) * minutes, unit))
                   for time, epochs in ((wall, average), (at_most, most)))  # fmt: skip
    yield (f"about {about[0]} and {about[1]}, at most {most[0]} and {most[1]}, "
           f"at {minutes:.2g} minutes an epoch ({source})")  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, default=1, metavar="N", help="trials at once (default 1)")
    parser.add_argument("--Gw", type=float, default=1, metavar="N", help="GPUs of each worker; 0 on CPUs (default 1)")
    a = parser.parse_args()
    try:
        s = check(os.environ, look_inside=False)
    except InputError as error:
        print(*(f"ERROR: {line}" for line in str(error).splitlines()), sep="\n", file=sys.stderr)
        return 2
    for line in lines(s, max(1, a.slots), a.Gw):
        print(f"forecast: {line}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
