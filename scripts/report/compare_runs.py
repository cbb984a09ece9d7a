"""Runs side by side: what they cost, which settings differ. Used by fill_tables.py, also for the costs of one run."""

import itertools
import math

from read_run import show

SAME_TO_COMPARE = ("MODEL_NAME", "SQUAD_DATA", "TRAIN_SAMPLES", "EVAL_SAMPLES", "NUM_EPOCHS", "SEED",
                   "WORKERS_PER_TRIAL", "CHAT_TEMPLATE", "precision", "device")


def hms(seconds):
    """Seconds as h:mm:ss."""
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def title(run):
    """What tables and pictures call a run."""
    return f"{'manual grid' if run.manual else f'Ray Tune {run.scheduler}'} {run.job}"


# ---- Costs -------------------------------------------------------------------------------------------------
def seconds_of(run):
    """How long a run took. A grid that was resumed took the runtimes of its earlier jobs, too."""
    return max(run.seconds, run.runtimes) if run.manual else run.seconds


def holdings(run):
    """What a run occupies: its unit, a GPU or, on CPUs, a slot for one trial; [(from, to, units)], in s from START."""
    workers = run.workers.values()
    unit = "GPU" if any(worker.gpus for worker in workers) else "slot"
    held = [(w.since, w.until, w.gpus if unit == "GPU" else w.slots) for w in workers]
    return unit, [(0, seconds_of(run), peak(held))] if run.manual else held


def peak(spans):
    """The largest sum at one time, of [(from, to, amount)]."""
    return max((sum(n for since, until, n in spans if since <= moment < until) for moment, *_ in spans), default=0)


def trials_at_once(run):
    """What the nodes offered, else what ran at once."""
    ran = [(*span, 1) for trial in run.trials.values() for span in trial.spans]
    return peak([(w.since, w.until, w.slots) for w in run.workers.values()]) or peak(ran) or 1


def minutes(held, moment=math.inf):
    """Unit-minutes that were occupied until a moment."""
    return sum(max(0, min(until, moment) - since) * units for since, until, units in held) / 60


def totals(run):
    """Sums over a run as a dict; minutes of `unit`."""
    trials, (unit, held) = list(run.trials.values()), holdings(run)
    each = run.number("WORKERS_PER_TRIAL", 2) * run.number("GPUS_PER_WORKER", 1) if unit == "GPU" else 1
    on_slots = sum(until - since for trial in trials for since, until in trial.spans)
    busy = (run.runtimes * peak(held) if run.manual else on_slots * each) / 60
    n = len(trials) if run.manual else max(run.number("NUM_SAMPLES", 0), len(trials))
    return {
        "epochs_trained": sum(trial.epochs for trial in trials), "epochs_full_grid": n * run.max_t,
        "trials": n, "max_t": run.max_t, "unit": unit, "units": peak(held),
        "allocated_min": minutes(held), "busy_min": busy, "idle_min": max(0, minutes(held) - busy),
    }


def lowest_so_far(run):
    """[(s from START, loss)] of each report that was lower than all before."""
    trials = [trial for trial in run.trials.values() if trial.status != "FAILED"]
    points = [(report.at, report.loss) for trial in trials for report in trial.finite()]
    if run.manual:  # one after the other, also those of earlier jobs
        ends = itertools.accumulate(trial.clock() or 0 for trial in trials)
        points = [(end, trial.best()) for trial, end in zip(trials, ends) if trial.finite()]
    lowest = math.inf
    return [(moment, lowest := loss) for moment, loss in sorted(points) if loss < lowest]


# ---- Tables ------------------------------------------------------------------------------------------------
def conditions(run):
    """What a run ran with: its settings, and what it found on its nodes."""
    precision = {"precision": " and ".join(sorted(run.precisions))} if run.precisions else {}
    device = {"GPU": "GPU", "slot": "CPU"}[holdings(run)[0]]
    return run.settings | precision | {"device": device, "trials at once": str(trials_at_once(run))}


def comparison(runs):
    """The cost table, and below it what makes the runs not comparable with the first one."""
    rows, below, first, base, known = [], [], runs[0], totals(runs[0]), conditions(runs[0])
    # Another seed makes another search of the same kind, which is what one may want to compare.
    same = [name for name in SAME_TO_COMPARE if first.manual or name != "SEED"]
    for run in runs:
        s, theirs = totals(run), conditions(run)
        amount, spent = f"{s['units']:g}", f"{s['allocated_min']:.1f}"
        if s["unit"] != "GPU":
            amount, spent = f"0 ({amount} slot(s) on CPUs)", f"{spent} slot-minutes"
        related = s["unit"] == base["unit"] and base["allocated_min"]
        ratio = f"{s['allocated_min'] / base['allocated_min']:.2f}" if related else "-"
        rows.append([title(run), show(run.best and run.best["eval_loss"]), hms(seconds_of(run)), amount, spent, ratio])
        if run.state() != "complete":
            below.append(f"{run.job}: {run.state()}; its cost is not that of a whole run.")
        pairs = [(name, known.get(name, "not given"), theirs.get(name, "not given")) for name in same]
        below += [f"NOT COMPARABLE: {name} is {ours} in {first.job} and {other} in {run.job}."
                  for name, ours, other in pairs if ours != other]
        if len(run.trials) != len(first.trials):
            below.append(f"{first.job} has {len(first.trials)} trials, {run.job} has {len(run.trials)}.")
    if not any(line.startswith("NOT") for line in below):
        below.append("Same model, data, samples, epochs, workers and precision: the runs are comparable.")
    below.append("eval loss: the lowest of all epochs. runtime: from START to FINISH, of a resumed grid the sum of its "
                 "trials' runtimes. GPU-minutes: allocated ones, idle or not.")
    ratio = "Ray/manual" if first.manual else "to the first"
    header = ["run type", "eval loss", "runtime", "number of GPUs", "GPU-minutes", f"cost ratio {ratio}"]
    return ("Cost", header, rows, below)


def differences(runs):
    """The settings in which runs differ, one row a run. A grid does not have all settings of a search."""
    told = [conditions(run) for run in runs]
    names = dict.fromkeys(itertools.chain(*told))
    differ = [name for name in names if len({known[name] for known in told if name in known}) > 1]
    if not differ:
        return ("Settings that differ", [], [], ["None: with the same settings, runs differ by chance alone."])
    rows = [[title(run), *(known.get(name, "-") for name in differ)] for run, known in zip(runs, told)]
    below = [f"The other {len(names) - len(differ)} settings are the same."]
    return ("Settings that differ", ["run", *differ], rows, below)
