"""Runs side by side: what they cost, which settings differ, and their best loss over time as a picture.

Used by fill_tables.py, for --compare and for the costs of a single run. Only the picture needs matplotlib.
"""

import itertools
import math

from read_run import show, trials_at_once

SAME_TO_COMPARE = ("MODEL_NAME", "SQUAD_DATA", "TRAIN_SAMPLES", "EVAL_SAMPLES", "NUM_EPOCHS", "SEED",
                   "WORKERS_PER_TRIAL", "CHAT_TEMPLATE")


def hms(seconds):
    """Seconds as h:mm:ss."""
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def title(run):
    """What tables and the picture call a run."""
    return f"{'manual grid' if run.manual else f'Ray Tune {run.scheduler}'} {run.job}"


# ============================================================================================================
# Costs
# ============================================================================================================
def holdings(run):
    """What a run occupies: its unit and [(from, to, units)], in s from START.

    The unit is a GPU or, on CPUs, a slot: a place for one trial.
    """
    unit = "GPU" if (run.manual_gpus if run.manual else run.on_gpus) else "slot"
    if run.manual:  # a resumed grid counts its earlier jobs' runtimes
        runtimes = [t.seconds(run.now) or 0 for t in run.trials.values()]
        return unit, [(0, max(run.now, sum(runtimes)), run.manual_gpus or 1)]
    if not run.nodes:
        each = run.number("WORKERS_PER_TRIAL", 2) * run.number("GPUS_PER_WORKER", 1) if run.on_gpus else 1
        return unit, [(run.cluster_at, run.now, (run.slots or 0) * each)]
    held = []
    for joined, gpus, slots, job in run.nodes:
        seconds = run.held.get(job, run.now - joined)
        since = min(joined, run.now - seconds)  # Slurm's record begins earlier: with the job, not with Ray on it
        held.append((since, since + seconds, gpus if run.on_gpus else slots))
    return unit, held


def minutes(held, moment=math.inf):
    """Unit-minutes that were occupied until a moment."""
    return sum(max(0, min(until, moment) - since) * units for since, until, units in held) / 60


def totals(run):
    """Sums over a run as a dict; minutes of `unit` (GPU, or slot: a place for one trial, on CPUs)."""
    trials, (unit, held) = list(run.trials.values()), holdings(run)
    runtimes = [trial.seconds(run.now) or 0 for trial in trials]
    units = sum(units for *_, units in held)
    each = run.number("WORKERS_PER_TRIAL", 2) * run.number("GPUS_PER_WORKER", 1) if run.on_gpus else 1
    busy = sum(runtimes) * (units if run.manual else each) / 60
    n = max(0 if run.manual else run.number("NUM_SAMPLES", 0), len(trials))
    max_t = run.number("NUM_EPOCHS", max((t.epochs for t in trials), default=0))
    return {
        "sum_of_runtimes_s": sum(runtimes),
        "epochs_trained": sum(trial.epochs for trial in trials), "epochs_full_grid": n * max_t,
        "trials": n, "max_t": max_t, "unit": unit, "units": units,
        "allocated_min": minutes(held), "busy_min": busy, "idle_min": max(0, minutes(held) - busy),
    }


# ============================================================================================================
# Tables
# ============================================================================================================
def comparison(runs):
    """The cost table, and below it what makes the runs not comparable with the first one."""
    rows, below = [], []
    first, base = runs[0], totals(runs[0])
    for run in runs:
        s = totals(run)
        known = s["units"] and not (run.manual and run.manual_gpus is None)
        seconds = max(run.now, s["sum_of_runtimes_s"]) if run.manual else run.now
        amount, spent = f"{s['units']:g}", f"{s['allocated_min']:.1f}"
        ratio = "1" if run is first else "-"
        if s["unit"] != "GPU":
            amount, spent = f"0 ({amount} slot(s) on CPUs)", f"{spent} slot-minutes"
        if not known:
            amount = spent = "-"
        elif s["unit"] == base["unit"] and base["allocated_min"] and not (first.manual and first.manual_gpus is None):
            ratio = ratio if run is first else f"{s['allocated_min'] / base['allocated_min']:.2f}"
        rows.append([title(run), show(run.best and run.best["eval_loss"]), hms(seconds), amount, spent, ratio])
        if run.manual and s["sum_of_runtimes_s"] > run.now > 0:
            below.append(f"{run.job}: the grid was resumed; its runtime is the sum of its trials' runtimes.")
        if run.state().startswith("partial"):
            below.append(f"{run.job}: {run.state()}; its cost is not that of a whole run.")
    # Another seed makes another search of the same kind, which is what one may want to compare.
    same = [name for name in SAME_TO_COMPARE if first.manual or name != "SEED"]
    for run in runs[1:]:
        if not (run.settings and first.settings):
            below.append(f"Cannot tell whether {run.job} and {first.job} are comparable: no settings.")
            continue
        for name in same:
            absent = "0" if name == "CHAT_TEMPLATE" else "not given"  # older logs do not list it
            ours, theirs = (r.settings.get(name, absent) for r in (first, run))
            if ours != theirs:
                below.append(f"NOT COMPARABLE: {name} is {ours} in {first.job} and {theirs} in {run.job}.")
        ours, theirs = (" and ".join(sorted(r.precisions)) for r in (first, run))
        if ours and theirs and ours != theirs:
            below.append(f"NOT COMPARABLE: the precision is {ours} in {first.job} and {theirs} in {run.job}.")
        if totals(run)["unit"] != base["unit"]:
            below.append(f"NOT COMPARABLE: {first.job} and {run.job} did not both run on GPUs.")
        if len(run.trials) != len(first.trials):
            n, trials = len(first.trials), len(run.trials)
            kind = "combinations" if first.manual else "trials"
            below.append(f"{first.job} has {n} {kind}, {run.job} has {trials} trials.")
    if not any(line.startswith(("NOT", "Cannot")) for line in below):
        last = "workers and precision" if all(run.precisions for run in runs) else "and workers"
        seed = " seed," if "SEED" in same else ""
        below.append(f"Same model, data, samples, epochs,{seed} {last}: the runs are comparable.")
    below.append("eval loss: the lowest of all epochs. runtime: from START to FINISH. "
                 "GPU-minutes: allocated ones, idle or not.")
    ratio = "Ray/manual" if first.manual else "to the first"
    header = ["run type", "eval loss", "runtime", "number of GPUs", "GPU-minutes", f"cost ratio {ratio}"]
    return ("Cost", header, rows, below)


def differences(runs):
    """The settings in which runs differ, one row a run. A grid does not have all settings of a search."""
    told = []
    for run in runs:
        told.append(dict(run.settings))
        if run.settings:
            told[-1] |= {"trials at once": str(trials_at_once(run))}
        if run.precisions:
            told[-1] |= {"precision": " and ".join(sorted(run.precisions))}
    names, differ = list(dict.fromkeys(itertools.chain(*told))), []
    for name in names:
        if len({known.get(name, "-") for run, known in zip(runs, told)
                if name in known or (known and not run.manual)}) > 1:
            differ.append(name)
    rows = [[title(run), *(known.get(name, "-") for name in differ)] for run, known in zip(runs, told)]
    below = [f"The other {len(names) - len(differ)} settings are the same." if differ else
             "None: with the same settings, runs differ by chance alone."]
    below += [f"{run.job}: its settings are not known." for run in runs if not run.settings]
    return ("Settings that differ", ["run", *differ] if differ else [], rows if differ else [], below)


# ============================================================================================================
# Picture
# ============================================================================================================
def lowest_so_far(run):
    """[(s from START, loss)] of each report that was lower than all before; [] if the log has no such times."""
    trials = [t for t in run.trials.values() if t.status != "FAILED"]
    points = [(t.moments[epoch], loss) for t in trials for loss, epoch in t.finite() if epoch in t.moments]
    runtimes = [t.seconds(run.now) or 0 for t in trials]
    if run.manual and (not points or sum(runtimes) > run.now):  # resumed: one after the other
        ends = itertools.accumulate(runtimes)
        points = [(end, t.best()) for t, end in zip(trials, ends) if t.finite()]
    lowest = []
    for moment, loss in sorted(points):
        if not lowest or loss < lowest[-1][1]:
            lowest.append((moment, loss))
    return lowest


def picture(runs, path):
    """Best loss so far against time and against cost, all runs in both panels. -> runs that it cannot show"""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    plt.rcdefaults()
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
                         "savefig.dpi": 200, "legend.frameon": False, "figure.constrained_layout.use": True})
    labels = [title(run).removeprefix("Ray Tune ") for run in runs]
    columns = 2 if max(map(len, labels)) < 28 else 1
    height = 3.2 + 0.17 * math.ceil(len(runs) / columns)
    figure, panels = plt.subplots(1, 2, sharey=True, figsize=(7, height))  # inches: the text width of A4
    missing, losses, units = [], [], set()
    for number, run in enumerate(runs):
        unit, held = holdings(run)
        lowest = lowest_so_far(run)
        if not lowest:
            missing.append(run)
            continue
        end = max(run.now, lowest[-1][0])
        seconds, y = zip(*lowest, (end, lowest[-1][1]))
        look = {"color": ("black", "0.45")[number % 2], "drawstyle": "steps-post", "markersize": 4.5,
                "linestyle": ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)))[number % 5],
                "marker": "os^Dv*X"[number % 7], "fillstyle": ("full", "none")[number // 2 % 2],
                "markevery": range(len(lowest)), "linewidth": 1.3}  # no marker at the run's end: no report
        losses += y
        panels[0].plot([s / 60 for s in seconds], y, **look, label=f"{labels[number]}: {y[-1]:.4g}")
        if sum(amount for *_, amount in held):
            units.add(unit)
            panels[1].plot([minutes(held, s) for s in seconds], y, **look)
    panels[0].set(xlabel="minutes from START", ylabel="lowest eval loss so far", xlim=0)
    of_both = "slot-minutes (on CPUs)" if units == {"slot"} else "GPU-minutes, slot-minutes if on CPUs"
    panels[1].set(xlim=0, xlabel="GPU-minutes" if units == {"GPU"} else of_both)
    if losses and min(losses) > 0 and max(losses) > 8 * min(losses):
        panels[0].set(yscale="log", ylabel="lowest eval loss so far, log scale")
        panels[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panels[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panels[0].yaxis.set_minor_formatter(NullFormatter())
    if losses:
        figure.legend(loc="outside upper left", ncols=columns, handlelength=4)
    figure.savefig(path)
    plt.close(figure)
    return missing
