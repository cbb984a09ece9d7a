"""Runs side by side: what they cost, which settings differ, and their best loss over time as a picture.

Used by fill_tables.py, for --compare and for the costs of a single run. Only the picture needs matplotlib.
"""

import itertools
import math

from read_run import show

SAME_TO_COMPARE = ("MODEL_NAME", "SQUAD_DATA", "TRAIN_SAMPLES", "EVAL_SAMPLES", "NUM_EPOCHS", "SEED",
                   "WORKERS_PER_TRIAL", "CHAT_TEMPLATE")


def hms(seconds):
    """Seconds as h:mm:ss."""
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def title(run):
    """What tables and the picture call a run."""
    return f"{'manual grid' if run.manual else f'Ray Tune {run.scheduler}'} {run.job}"


# ---- Costs -------------------------------------------------------------------------------------------------
def holdings(run):
    """What a run occupies: its unit and [(from, to, units)], in s from START.

    The unit is a GPU or, on CPUs, a slot: a place for one trial.
    """
    workers = run.workers.values()
    unit = "GPU" if any(worker.gpus for worker in workers) else "slot"
    held = [(w.since, w.until, w.gpus if unit == "GPU" else w.slots) for w in workers]
    if run.manual:  # all of its job; a resumed grid counts its earlier jobs' runtimes, too
        held = [(0, max(run.seconds, sum_of_runtimes(run)), peak(held))]
    return unit, held


def peak(spans):
    """The largest sum at one time, of [(from, to, amount)]."""
    return max((sum(n for since, until, n in spans if since <= moment < until) for moment, *_ in spans), default=0)


def trials_at_once(run):
    """What the nodes offered, else what ran at once."""
    ran = [(*span, 1) for trial in run.trials.values() for span in trial.spans]
    return peak([(w.since, w.until, w.slots) for w in run.workers.values()]) or peak(ran) or 1


def sum_of_runtimes(run):
    return sum(trial.clock() or 0 for trial in run.trials.values())


def minutes(held, moment=math.inf):
    """Unit-minutes that were occupied until a moment."""
    return sum(max(0, min(until, moment) - since) * units for since, until, units in held) / 60


def totals(run):
    """Sums over a run as a dict; minutes of `unit` (GPU, or slot: a place for one trial, on CPUs)."""
    trials, (unit, held) = list(run.trials.values()), holdings(run)
    each = run.number("WORKERS_PER_TRIAL", 2) * run.number("GPUS_PER_WORKER", 1) if unit == "GPU" else 1
    on_slots = sum(until - since for trial in trials for since, until in trial.spans)
    busy = (sum_of_runtimes(run) * peak(held) if run.manual else on_slots * each) / 60
    n = len(trials) if run.manual else max(run.number("NUM_SAMPLES", 0), len(trials))
    return {
        "sum_of_runtimes_s": sum_of_runtimes(run),
        "epochs_trained": sum(trial.epochs for trial in trials), "epochs_full_grid": n * run.max_t(),
        "trials": n, "max_t": run.max_t(), "unit": unit, "units": peak(held),
        "allocated_min": minutes(held), "busy_min": busy, "idle_min": max(0, minutes(held) - busy),
    }


# ---- Tables ------------------------------------------------------------------------------------------------
def comparison(runs):
    """The cost table, and below it what makes the runs not comparable with the first one."""
    rows, below = [], []
    first, base = runs[0], totals(runs[0])
    for run in runs:
        s = totals(run)
        amount, spent = f"{s['units']:g}", f"{s['allocated_min']:.1f}"
        if s["unit"] != "GPU":
            amount, spent = f"0 ({amount} slot(s) on CPUs)", f"{spent} slot-minutes"
        ratio = "1" if run is first else "-"
        if run is not first and s["unit"] == base["unit"] and base["allocated_min"]:
            ratio = f"{s['allocated_min'] / base['allocated_min']:.2f}"
        seconds = max(run.seconds, s["sum_of_runtimes_s"]) if run.manual else run.seconds
        rows.append([title(run), show(run.best and run.best["eval_loss"]), hms(seconds), amount, spent, ratio])
        if run.manual and s["sum_of_runtimes_s"] > run.seconds:
            below.append(f"{run.job}: the grid was resumed; its runtime is the sum of its trials' runtimes.")
        if run.state() != "complete":
            below.append(f"{run.job}: {run.state()}; its cost is not that of a whole run.")
    # Another seed makes another search of the same kind, which is what one may want to compare.
    same = [name for name in SAME_TO_COMPARE if first.manual or name != "SEED"]
    for run in runs[1:]:
        pairs = [(name, *(r.settings.get(name, "not given") for r in (first, run))) for name in same]
        if first.precisions and run.precisions:
            pairs.append(("the precision", *(" and ".join(sorted(r.precisions)) for r in (first, run))))
        below += [f"NOT COMPARABLE: {name} is {ours} in {first.job} and {theirs} in {run.job}."
                  for name, ours, theirs in pairs if ours != theirs]
        if totals(run)["unit"] != base["unit"]:
            below.append(f"NOT COMPARABLE: {first.job} and {run.job} did not both run on GPUs.")
        if len(run.trials) != len(first.trials):
            kind = "combinations" if first.manual else "trials"
            below.append(f"{first.job} has {len(first.trials)} {kind}, {run.job} has {len(run.trials)} trials.")
    if not any(line.startswith("NOT") for line in below):
        seed = " seed," if "SEED" in same else ""
        below.append(f"Same model, data, samples, epochs,{seed} workers and precision: the runs are comparable.")
    below.append("eval loss: the lowest of all epochs. runtime: from START to FINISH. "
                 "GPU-minutes: allocated ones, idle or not.")
    ratio = "Ray/manual" if first.manual else "to the first"
    header = ["run type", "eval loss", "runtime", "number of GPUs", "GPU-minutes", f"cost ratio {ratio}"]
    return ("Cost", header, rows, below)


def differences(runs):
    """The settings in which runs differ, one row a run. A grid does not have all settings of a search."""
    told = []
    for run in runs:
        told.append(run.settings | {"trials at once": str(trials_at_once(run))})
        if run.precisions:
            told[-1] |= {"precision": " and ".join(sorted(run.precisions))}
    names, differ = list(dict.fromkeys(itertools.chain(*told))), []
    for name in names:
        known = {each.get(name, "-") for run, each in zip(runs, told) if name in each or not run.manual}
        differ += [name] if len(known) > 1 else []
    rows = [[title(run), *(known.get(name, "-") for name in differ)] for run, known in zip(runs, told)]
    below = [f"The other {len(names) - len(differ)} settings are the same." if differ else
             "None: with the same settings, runs differ by chance alone."]
    return ("Settings that differ", ["run", *differ] if differ else [], rows if differ else [], below)


# ---- Picture -----------------------------------------------------------------------------------------------
def lowest_so_far(run):
    """[(s from START, loss)] of each report that was lower than all before."""
    trials = [trial for trial in run.trials.values() if trial.status != "FAILED"]
    points = [(report.at, report.loss) for trial in trials for report in trial.finite()]
    runtimes = [trial.clock() or 0 for trial in trials]
    if run.manual and sum(runtimes) > run.seconds:  # resumed: one after the other
        points = [(end, t.best()) for t, end in zip(trials, itertools.accumulate(runtimes)) if t.finite()]
    lowest = []
    for moment, loss in sorted(points):
        if not lowest or loss < lowest[-1][1]:
            lowest.append((moment, loss))
    return lowest


def picture(runs, path):
    """Best loss so far against time and against cost, all runs in both panels."""
    import matplotlib.pyplot as plt
    from draw_report import log_axis, set_look

    set_look()
    labels = [title(run).removeprefix("Ray Tune ") for run in runs]
    columns = 2 if max(map(len, labels)) < 28 else 1
    height = 3.2 + 0.17 * math.ceil(len(runs) / columns)
    figure, panels = plt.subplots(1, 2, sharey=True, figsize=(7, height))  # inches: the text width of A4
    losses, units = [], set()
    for number, run in enumerate(runs):
        (unit, held), lowest = holdings(run), lowest_so_far(run)
        if not lowest:
            continue  # its label would have no line; the table tells that it has no loss
        end = max(run.now, lowest[-1][0])
        seconds, y = zip(*lowest, (end, lowest[-1][1]))
        look = {"color": ("black", "0.45")[number % 2], "drawstyle": "steps-post", "markersize": 4.5,
                "linestyle": ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)))[number % 5],
                "marker": "os^Dv*X"[number % 7], "fillstyle": ("full", "none")[number // 2 % 2],
                "markevery": range(len(lowest)), "linewidth": 1.3}  # no marker at the run's end: no report
        losses += y
        units.add(unit)
        panels[0].plot([s / 60 for s in seconds], y, **look, label=f"{labels[number]}: {y[-1]:.4g}")
        panels[1].plot([minutes(held, s) for s in seconds], y, **look)
    panels[0].set(xlabel="minutes from START", ylabel="lowest eval loss so far", xlim=0)
    of_both = "slot-minutes (on CPUs)" if units == {"slot"} else "GPU-minutes, slot-minutes if on CPUs"
    panels[1].set(xlim=0, xlabel="GPU-minutes" if units == {"GPU"} else of_both)
    if losses:
        log_axis(panels[0].yaxis, losses, "lowest eval loss so far")
        figure.legend(loc="outside upper left", ncols=columns, handlelength=4)
    figure.savefig(path)
    plt.close(figure)
