#!/usr/bin/env python3
"""What ASHA saves, what it costs in loss, and whether other schedulers or samplers do better at equal slot time.

    .venv/bin/python tests/benchmarks/asha_savings.py                                # all tables
    .venv/bin/python tests/benchmarks/asha_savings.py --seeds 1000 --only savings    # the first table alone, more seeds
    .venv/bin/python tests/benchmarks/asha_savings.py --record FILE                  # train the curves anew; 5 to 6 minutes

Learning curves of real fine-tunes were recorded once (--record; asha_savings_demo.json beside this program) and are replayed
here: simulated slots, but each decision is made by the scheduler object itself, that of raytune_asha_hpo.py or Ray's
own, called as Ray's TuneController calls it. So a search takes milliseconds instead of minutes. The rows with TPE and
Sobol need optuna, which the course does not install; without it they are left out.

Three tables, the first two for each file of curves:
  savings   twelve of the recorded configurations, drawn anew for each seed: ASHA against all twelve trained in full
  better    at equal slot time, new configurations; their curves are interpolated from the recorded ones
  check     fill_tables.py's expected range of epochs against the real scheduler, on random losses
"""

import argparse
import heapq
import importlib.util
import json
import logging
import math
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import REPO, SCRIPT, load_module

BESIDE = Path(__file__).resolve().parent
CURVES = sorted(BESIDE.glob("asha_savings_*.json"))
# The quickstart's search.
QUICKSTART = {"TRAIN_SAMPLES": "160", "EVAL_SAMPLES": "50", "LR_LOWER": "1e-4", "LR_UPPER": "5e-2", "GPUS_PER_WORKER": "0"}
TWELVE = 12


# ======================================================================================================================
# Recording
# ======================================================================================================================
def draw_configurations(space, seed, count):
    """The first `count` configurations that a search draws with this seed, as the script does: the quickstart's with 42."""
    from ray.tune.search.sample import _BackwardsCompatibleNumpyRng
    from ray.tune.search.variant_generator import generate_variants

    draw = _BackwardsCompatibleNumpyRng(seed)
    return [next(generate_variants(space, random_state=draw))[1]["train_loop_config"] for _ in range(count)]


def record(path, count):
    """Train `count` configurations, one after another in this process, on one core; write their learning curves as JSON.

    The variables of the search (SQUAD_DATA, TRAIN_SAMPLES, ...) hold; without them it is the quickstart's search.
    """
    hpo = load_module(SCRIPT)
    hpo.DS_CONFIG = None  # one process has nothing to split
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, REPO / "scripts/demo_assets.py", folder], check=True, stdout=subprocess.DEVNULL)
        environ = {"MODEL_NAME": f"{folder}/model", "SQUAD_DATA": f"{folder}/squad"} | QUICKSTART | os.environ
        s = hpo.read_settings(environ)
        import torch
        import transformers

        torch.set_num_threads(1)
        data, curves, begun = hpo.load_squad(s), [], time.monotonic()

        class Record(transformers.TrainerCallback):
            """Loss and seconds of each epoch; seconds of this process on its core, which others' load does not change."""

            def on_train_begin(self, *args, **kwargs):
                self.at = time.process_time()

            def on_evaluate(self, args, state, control, metrics=None, **kwargs):
                now, loss = time.process_time(), metrics["eval_answer_loss"]
                curve["eval_loss"].append(round(loss, 6) if math.isfinite(loss) else None)
                curve["seconds"].append(round(now - self.at, 3))
                self.at = now
                control.should_training_stop = not math.isfinite(loss)  # as Tune ends a trial that has diverged

        for config in draw_configurations(hpo.search_space(s), s.SEED, count):
            curve = config | {"eval_loss": [], "seconds": []}
            # One process takes the samples per step that W workers take together.
            hpo.fine_tune(config | {"per_device_bs": config["per_device_bs"] * s.WORKERS_PER_TRIAL}, s, *data, callbacks=[Record()])
            curves.append(curve)
            print(f"{len(curves)}/{count}  {time.monotonic() - begun:.0f} s  {json.dumps(curve)}", file=sys.stderr, flush=True)
        about = {
            "data": "demo" if s.SQUAD_DATA.startswith(folder) else "SQuAD v1.1", "model": "demo" if s.MODEL_NAME.startswith(folder) else s.MODEL_NAME,
            "command": f"asha_savings.py --record FILE --configurations {count}", "date": time.strftime("%Y-%m-%d"), "hardware": f"1 core of {processor()}",
            "took_s": round(time.monotonic() - begun), "torch": torch.__version__, "transformers": transformers.__version__,
        } | {name: getattr(s, name) for name in ("TRAIN_SAMPLES", "EVAL_SAMPLES", "NUM_EPOCHS", "WORKERS_PER_TRIAL", "LR_LOWER", "LR_UPPER", "BS_CHOICES", "WD_CHOICES", "SEED")}  # fmt: skip
    rows = ",\n  ".join(map(json.dumps, curves))
    path.write_text(f'{{"about": {json.dumps(about)},\n "curves": [\n  {rows}\n]}}\n')


def processor():
    """The name of the CPU, as Linux gives it."""
    names = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


# ======================================================================================================================
# Replay: simulated slots, a real scheduler
# ======================================================================================================================
class Trial:
    """What a scheduler sees of a Ray trial, and the curve that it replays: one loss and one duration for each epoch."""

    is_saving = False

    def __init__(self, number, losses, seconds):
        self.trial_id, self.losses, self.seconds = f"{number:05d}", losses, seconds
        self.status, self.last_result = "PENDING", {"epoch": 0}


class Controller:
    """The part of Ray's TuneController that schedulers use."""

    def __init__(self, scheduler, searcher=None):
        self.scheduler, self.searcher, self.trials = scheduler, searcher, []

    def get_trials(self):
        return self.trials

    def get_live_trials(self):
        return {trial for trial in self.trials if trial.status != "TERMINATED"}

    def stop_trial(self, trial):
        ran = trial.status == "RUNNING"
        if ran:
            self.scheduler.on_trial_complete(self, trial, trial.last_result)
        else:
            self.scheduler.on_trial_remove(self, trial)
        if self.searcher:
            self.searcher.on_trial_complete(trial.trial_id, result=trial.last_result if ran else None)
        trial.status = "TERMINATED"


def replay(scheduler, next_curve, slots, startup, trials=math.inf, until=math.inf, searcher=None):
    """One search on `slots` places: {"epochs", "seconds" (slots x wall), "trials" (that reported), "best" (lowest loss), "ran": [Trial]}.

    next_curve(trial id) -> (losses, seconds) of the next configuration; startup: s before a trial's first epoch, and
    before it goes on after a pause. It ends after `trials` trials or `until` s, whatever comes first; what is then
    still in training is lost. A paused trial goes on where it was (the script would need CHECKPOINTS=1), saving is free.
    """
    controller, running, now, epochs, best, made, tie = Controller(scheduler, searcher), [], 0.0, 0, math.inf, 0, 0
    while True:
        while True:  # as many trials are made ready as there are slots (TUNE_MAX_PENDING_TRIALS_PG in the script)
            while made < trials and sum(trial.status == "PENDING" for trial in controller.trials) < slots:
                controller.trials.append(Trial(made, *next_curve(f"{made:05d}")))
                scheduler.on_trial_add(controller, controller.trials[-1])
                made += 1
            trial = scheduler.choose_trial_to_run(controller) if len(running) < slots else None
            if trial is None:
                break
            trial.status, tie = "RUNNING", tie + 1
            heapq.heappush(running, (now + startup + trial.seconds[trial.last_result["epoch"]], tie, trial))
        if not running or running[0][0] > until:
            break
        now, _, trial = heapq.heappop(running)
        epoch = trial.last_result["epoch"] + 1
        loss = trial.losses[epoch - 1]
        result = {"epoch": epoch, "training_iteration": epoch, "eval_loss": loss}
        epochs, best = epochs + 1, min(best, loss) if math.isfinite(loss) else best
        decision = scheduler.on_trial_result(controller, trial, result) if math.isfinite(loss) else "STOP"  # RunConfig(stop=...)
        trial.last_result = result
        if decision == "CONTINUE" and epoch == len(trial.losses):  # the training function returns
            decision = "STOP"
        if searcher and decision != "STOP":
            searcher.on_trial_result(trial.trial_id, result)
        if decision == "STOP":
            controller.stop_trial(trial)
        elif decision == "PAUSE":
            trial.status = "PAUSED"
        else:
            tie += 1
            heapq.heappush(running, (now + trial.seconds[epoch], tie, trial))
    ran = [trial for trial in controller.trials if trial.last_result["epoch"]]
    return {"epochs": epochs, "seconds": slots * min(now, until), "trials": len(ran), "best": best, "ran": ran}


# ======================================================================================================================
# Curves
# ======================================================================================================================
class Curves:
    """A recorded file; seconds scaled so that an epoch takes `epoch_seconds` on average (None: as recorded)."""

    def __init__(self, path, epoch_seconds=None):
        loaded = json.loads(path.read_text())
        self.about, self.configurations = loaded["about"], loaded["curves"]
        self.name = path.stem.removeprefix("asha_savings_")
        mean = np.mean([s for c in self.configurations for s in c["seconds"]])
        scale = epoch_seconds / mean if epoch_seconds else 1
        self.mean_epoch = mean * scale
        self.recorded = [([math.nan if x is None else x for x in c["eval_loss"]], [x * scale for x in c["seconds"]]) for c in self.configurations]
        self.cells = {}  # (bs, wd): log lr [n], log loss [n, epochs], seconds [n, epochs]; configurations that diverged are left out
        for c, (losses, seconds) in zip(self.configurations, self.recorded):
            if all(map(math.isfinite, losses)):
                self.cells.setdefault((c["per_device_bs"], c["wd"]), []).append((math.log(c["lr"]), np.log(losses), seconds))
        self.cells = {key: [np.array(column) for column in zip(*sorted(rows, key=lambda row: row[0]))] for key, rows in self.cells.items()}
        self.lowest = min(np.exp(losses).min() for _, losses, _ in self.cells.values())

    def at(self, config):
        """(losses, seconds) at any configuration: linear in log lr between the recorded ones of the same bs and wd."""
        rates, losses, seconds = self.cells[config["per_device_bs"], config["wd"]]
        x = math.log(config["lr"])
        return ([float(np.exp(np.interp(x, rates, column))) for column in losses.T], [float(np.interp(x, rates, column)) for column in seconds.T])


def settings_of(hpo, about):
    """The settings of the search that recorded these curves."""
    environ = {name: " ".join(map(str, about[name])) if isinstance(about[name], list) else str(about[name]) for name in hpo.VARIABLES if name in about}
    return hpo.read_settings(environ)


# ======================================================================================================================
# Tables
# ======================================================================================================================
def spread(values, digits=0):
    """Median and 5-95 % range as text."""
    low, middle, high = np.percentile(values, [5, 50, 95])
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def compare_with_full(hpo, curves, seed, slots, startup):
    """Twelve recorded configurations in random order: all in full, and by ASHA. What the second saves, and what it misses."""
    from ray.tune.schedulers import FIFOScheduler

    settings = settings_of(hpo, curves.about)
    twelve = random.Random(seed).sample(curves.recorded, TWELVE)
    full, ours = (replay(scheduler, lambda trial_id: twelve[int(trial_id)], slots, startup, TWELVE) for scheduler in (FIFOScheduler(), hpo.scheduler(settings)))
    best = min(full["ran"], key=lambda trial: np.nanmin(trial.losses)).trial_id
    reached = {trial.trial_id: trial.last_result["epoch"] for trial in ours["ran"]}
    return {
        "epochs": ours["epochs"], "epochs_full": full["epochs"], "time": ours["seconds"] / full["seconds"], "regret": ours["best"] - full["best"],
        "best_to_the_end": reached[best] == settings.NUM_EPOCHS, "best_found": ours["best"] == full["best"],
    }  # fmt: skip


def table_of_savings(hpo, path, seeds, startup, epoch_seconds):
    curves, as_recorded = Curves(path, epoch_seconds), Curves(path)
    print(f"\n### savings, {curves.name} curves: {len(curves.recorded)} recorded configurations, twelve of them a search, {seeds} seeds\n")
    print(f"Start-up of a trial {startup:g} s. Median (5-95 %). Regret: lowest loss found minus lowest loss of the twelve trained in full, in nats.\n")
    print(f"| at once | epochs of {TWELVE * curves.about['NUM_EPOCHS']} | % of the full slot time, epochs of {epoch_seconds:g} s | epochs of {as_recorded.mean_epoch:.1f} s "
          "| best of twelve trained to the end | best of twelve wins | regret | mean and highest regret |\n|---|---|---|---|---|---|---|---|")
    for slots in (1, 4):
        runs = [compare_with_full(hpo, curves, seed, slots, startup) for seed in range(seeds)]
        short = [100 * compare_with_full(hpo, as_recorded, seed, slots, startup)["time"] for seed in range(seeds)]
        column = {key: np.array([run[key] for run in runs]) for key in runs[0]}
        print(f"| {slots} | {spread(column['epochs'])} | {spread(100 * column['time'])} | {spread(short)} | {100 * column['best_to_the_end'].mean():.0f} % "
              f"| {100 * column['best_found'].mean():.0f} % | {spread(column['regret'], 3)} | {column['regret'].mean():.3f}, {column['regret'].max():.3f} |", flush=True)


def methods(hpo, s):
    """{name: seed -> (scheduler, searcher or None, function trial id -> configuration)}. The first is the script as it is."""
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, HyperBandScheduler, MedianStoppingRule

    rule = {"metric": "eval_loss", "mode": "min", "time_attr": "epoch"}
    space = hpo.search_space(s)
    script = partial(asha, hpo, s)

    def changed(**change):
        return lambda: ASHAScheduler(**rule | {"max_t": s.NUM_EPOCHS, "grace_period": 1, "reduction_factor": 2} | change)

    def at_random(seed, first=()):
        """As BasicVariantGenerator draws; `first`: learning rates given as its points_to_evaluate, the other values drawn."""
        stock = draw_configurations(space, seed, 12)

        def configuration(trial_id):
            number = int(trial_id)
            if number >= len(stock):
                stock.extend(draw_configurations(space, seed + 10**6 * number, 12))
            return stock[number] | ({"lr": first[number]} if number < len(first) else {})

        return None, configuration

    def grid(seed):
        """Twelve learning rates spaced evenly in the logarithm, at the middles of twelve parts of the range, shuffled."""
        rates = [s.LR_LOWER * (s.LR_UPPER / s.LR_LOWER) ** ((i + 0.5) / TWELVE) for i in range(TWELVE)]
        return at_random(seed, random.Random(seed).sample(rates, TWELVE))

    def centre(seed):
        return at_random(seed, [math.sqrt(s.LR_LOWER * s.LR_UPPER)])

    found = {
        "script: ASHA, random": (script, at_random),
        "no scheduler (random search)": (FIFOScheduler, at_random),
        "reduction_factor=3": (changed(reduction_factor=3), at_random),
        "reduction_factor=4": (changed(reduction_factor=4), at_random),
        "reduction_factor=1.5": (changed(reduction_factor=1.5), at_random),
        "grace_period=2": (changed(grace_period=2), at_random),
        "brackets=2": (changed(brackets=2), at_random),
        "brackets=3": (changed(brackets=3), at_random),
        "HyperBandScheduler, factor 3": (lambda: HyperBandScheduler(**rule, max_t=s.NUM_EPOCHS), at_random),
        "HyperBandScheduler, factor 2": (lambda: HyperBandScheduler(**rule, max_t=s.NUM_EPOCHS, reduction_factor=2), at_random),
        "MedianStoppingRule": (lambda: MedianStoppingRule(**rule, grace_period=1), at_random),
        "ASHA, points: centre first": (script, centre),
        "ASHA, points: even grid of lr": (script, grid),
    }  # fmt: skip
    if importlib.util.find_spec("optuna"):
        import optuna
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.ERROR)

        def learned(sampler, **options):
            def searcher(seed):
                search = OptunaSearch(space["train_loop_config"], metric="eval_loss", mode="min", sampler=sampler(seed=seed, **options))
                return search, search.suggest

            return searcher

        tpe, sobol = optuna.samplers.TPESampler, optuna.samplers.QMCSampler
        found |= {
            "ASHA, Sobol (QMCSampler)": (script, learned(sobol, scramble=True)),
            "ASHA, TPE": (script, learned(tpe)),
            "ASHA, TPE after 4 random": (script, learned(tpe, n_startup_trials=4, multivariate=True)),
            "no scheduler, TPE after 4 random": (FIFOScheduler, learned(tpe, n_startup_trials=4, multivariate=True)),
            "reduction_factor=4, TPE after 4 random": (changed(reduction_factor=4), learned(tpe, n_startup_trials=4, multivariate=True)),
        }
    return {name: partial(lambda scheduler, sampler, seed: (scheduler(), *sampler(seed)), *parts) for name, parts in found.items()}


def search_with(method, curves, seed, slots, startup, **limit):
    """One search on the interpolated curves."""
    np.random.seed(seed % 2**32)  # ASHA draws brackets from numpy's own generator
    scheduler, searcher, configuration = method(seed)
    return replay(scheduler, lambda trial_id: curves.at(configuration(trial_id)), slots, startup, searcher=searcher, **limit)


def table_at_equal_time(hpo, path, seeds, startup, epoch_seconds):
    curves = Curves(path, epoch_seconds)
    every = methods(hpo, settings_of(hpo, curves.about))
    for slots in (1, 4):
        plain = [search_with(next(iter(every.values())), curves, seed, slots, startup, trials=TWELVE) for seed in range(seeds)]
        budget = float(np.median([run["seconds"] for run in plain]))
        print(f"\n### better, {curves.name} curves, {slots} at once, {seeds} seeds: as many trials as fit into {budget / 60:.0f} slot-minutes\n")
        print(f"(the median of the script's twelve trials; start-up {startup:g} s, epochs of {epoch_seconds:g} s). Regret: above the lowest loss of all curves, in nats.\n")
        print("| | trials | epochs | regret, median (5-95 %) | mean | mean minus the script's (95 % interval) | better / worse than the script |\n|---|---|---|---|---|---|---|")
        script = None
        for name, method in every.items():
            runs = [search_with(method, curves, seed, slots, startup, until=budget / slots) for seed in range(seeds)]
            regret = np.array([run["best"] for run in runs]) - curves.lowest
            script = regret if script is None else script
            gain = regret - script
            error = 1.96 * gain.std(ddof=1) / math.sqrt(seeds)
            print(f"| {name} | {np.median([run['trials'] for run in runs]):.0f} | {np.median([run['epochs'] for run in runs]):.0f} | {spread(regret, 3)} | {regret.mean():.3f} "
                  f"| {gain.mean():+.3f} ({gain.mean() - error:+.3f} to {gain.mean() + error:+.3f}) | {100 * (gain < 0).mean():.0f} % / {100 * (gain > 0).mean():.0f} % |", flush=True)


def flat_curve(draw, epochs, _):
    """The same random loss in each epoch, and epochs of about 1 s: what expected_epochs() assumes."""
    return [draw.random()] * epochs, [0.8 + 0.4 * draw.random() for _ in range(epochs)]


def table_of_the_check(hpo, runs=1000):
    """fill_tables.py simulates ASHA with the standard library alone; here the same losses meet the real scheduler."""
    fill_tables = load_module(REPO / "scripts/raytune_hpo/fill_tables.py")
    print(f"\n### check: 5 % and 95 % of the epochs, random losses, {runs} runs of the real scheduler\n")
    print("| trials | epochs | at once | real scheduler | fill_tables.py |\n|---|---|---|---|---|")
    for trials, max_t, slots in ((12, 5, 1), (12, 5, 4), (12, 8, 2), (40, 5, 8)):
        settings, totals = hpo.read_settings({"NUM_EPOCHS": str(max_t)}), []
        for seed in range(runs):
            totals.append(replay(hpo.scheduler(settings), partial(flat_curve, random.Random(seed), max_t), slots, 0, trials)["epochs"])
        low, high = np.percentile(totals, [5, 95])
        print(f"| {trials} | {max_t} | {slots} | {low:.0f}-{high:.0f} | {'-'.join(map(str, fill_tables.expected_epochs(trials, max_t, slots)))} |", flush=True)


def main():
    """Returns the exit status: 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=300, help="searches for each figure (%(default)s)")
    parser.add_argument("--startup", type=float, default=5, metavar="S", help="seconds from a slot's release to the first step of its next trial (%(default)s)")
    parser.add_argument("--epoch-seconds", type=float, default=60, metavar="S", help="mean length of an epoch, to which the recorded ones are scaled (%(default)s)")
    parser.add_argument("--curves", type=Path, nargs="+", default=CURVES, metavar="FILE", help="recorded curves (those beside this program)")
    parser.add_argument("--only", nargs="+", choices=("savings", "better", "check"), default=("savings", "better", "check"), help="these tables")
    parser.add_argument("--record", type=Path, metavar="FILE", help="instead: train, and write the curves to this file")
    parser.add_argument("--configurations", type=int, default=96, metavar="N", help="how many to train with --record (%(default)s)")
    a = parser.parse_args()
    for option, low in (("seeds", 2), ("startup", 0), ("epoch_seconds", 1e-3), ("configurations", 1)):
        if not getattr(a, option) >= low:
            parser.error(f"--{option.replace('_', '-')} {getattr(a, option)}: give at least {low:g}")
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
        if "savings" in a.only:
            table_of_savings(hpo, path, a.seeds, a.startup, a.epoch_seconds)
        if "better" in a.only:
            table_at_equal_time(hpo, path, a.seeds, a.startup, a.epoch_seconds)
    if "check" in a.only:
        table_of_the_check(hpo)
    return 0


if __name__ == "__main__":
    sys.exit(main())
