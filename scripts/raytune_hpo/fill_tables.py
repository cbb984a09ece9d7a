#!/usr/bin/env python3
"""Reads the log of a search and fills the exercise's tables; also pictures, a report, and a comparison of costs.

    cd experiments/raytune/scheduler/asha
    python ../../../../scripts/raytune_hpo/fill_tables.py logs/ray_head_bloom_5epochs-12345.out
    python ../../../../scripts/raytune_hpo/fill_tables.py --csv trials.csv --json run.json --plots pictures runs/12345
    python ../../../../scripts/raytune_hpo/fill_tables.py --compare MANUAL_LOG logs/ray_head_bloom_5epochs-*.out

An input is the log of a head job (running, cancelled or complete), its run folder, or the log of the manual grid. The
log alone is enough. From a run folder the values have all their digits. The tables need the standard library only;
--plots needs matplotlib and plotly. Reading is read_run.py, pictures and report are draw_report.py.

Exit status: 0, or 2 if an input is no such log (one line says which and why; the others are still printed).
"""

import argparse
import csv
import heapq
import json
import math
import random
import re
import signal
import sys
from bisect import insort
from pathlib import Path

from read_run import TITLES, NotALog, further_names, parse, show, trials_at_once

SAME_TO_COMPARE = ("MODEL_NAME", "SQUAD_DATA", "TRAIN_SAMPLES", "EVAL_SAMPLES", "NUM_EPOCHS", "SEED", "WORKERS_PER_TRIAL")


# ======================================================================================================================
# Figures of a run
# ======================================================================================================================
def expected_epochs(n, max_t, in_flight, seed=0):
    """(5 %, 95 %) of the epochs that plain ASHA trains: n trials, max_t epochs, in_flight at once.

    Simulated: reduction factor 2, grace period 1, each trial's losses keep one random rank, arrival in random order.
    """
    draw = random.Random(seed)
    rungs = [2**k for k in range(30) if 2**k < max_t]
    totals = []
    for _ in range(max(20, min(400, 60_000 // (n * max_t)))):
        recorded = {rung: [] for rung in rungs}
        queue = [(draw.random(), 1, draw.random()) for _ in range(min(n, in_flight))]  # (time, epoch reached, loss)
        heapq.heapify(queue)
        waiting, total = n - len(queue), 0
        while queue:
            moment, epoch, loss = queue[0]
            total += 1
            stop = epoch >= max_t
            if epoch in recorded:
                seen = recorded[epoch]
                if seen:
                    stop = stop or loss > (seen[len(seen) // 2] + seen[(len(seen) - 1) // 2]) / 2
                insort(seen, loss)
            later = moment + 0.8 + 0.4 * draw.random()
            if not stop:
                heapq.heapreplace(queue, (later, epoch + 1, loss))
            elif waiting:
                waiting -= 1
                heapq.heapreplace(queue, (later, 1, draw.random()))
            else:
                heapq.heappop(queue)
        totals.append(total)
    totals.sort()
    return totals[round(0.05 * (len(totals) - 1))], totals[round(0.95 * (len(totals) - 1))]


def totals(run):
    """Sums over a run as a dict; minutes of `unit` (GPU, or slot: a place for one trial, on CPUs)."""
    trials = list(run.trials.values())
    runtimes = [trial.seconds(run.now) for trial in trials]
    each = run.number("WORKERS_PER_TRIAL", 2) * run.number("GPUS_PER_WORKER", 1) if run.on_gpus else 1
    if run.manual:
        unit, amount = ("GPU", run.manual_gpus) if run.manual_gpus else ("slot", 1)
        allocated = max(run.now, sum(filter(None, runtimes))) * amount  # a continued grid: its earlier jobs' runtimes
        each = amount
    elif run.nodes:
        unit = "GPU" if run.on_gpus else "slot"
        amount = sum(gpus if run.on_gpus else slots for _, gpus, slots, _ in run.nodes)
        allocated = sum(run.held.get(job, run.now - joined) * (gpus if run.on_gpus else slots) for joined, gpus, slots, job in run.nodes)
    else:
        unit, amount = "GPU" if run.on_gpus else "slot", (run.slots or 0) * each
        allocated = (run.now - run.cluster_at) * amount
    busy = sum(filter(None, runtimes)) * each
    n = max(0 if run.manual else run.number("NUM_SAMPLES", 0), len(trials))
    max_t = run.number("NUM_EPOCHS", max((t.epochs for t in trials), default=0))
    return {
        "sum_of_runtimes_s": sum(filter(None, runtimes)),
        "epochs_trained": sum(trial.epochs for trial in trials), "epochs_full_grid": n * max_t, "trials": n, "max_t": max_t,
        "unit": unit, "units": amount, "allocated_min": allocated / 60, "busy_min": busy / 60, "idle_min": max(0, allocated - busy) / 60,
    }


# ======================================================================================================================
# Tables: lists of (title, header, rows, lines below), for Markdown and HTML alike
# ======================================================================================================================
def hms(seconds):
    """Seconds as h:mm:ss."""
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def sections(run):
    """The three tables and the figures of a run."""
    trials, extra = list(run.trials.values()), further_names([run])
    moments = [f"{moment} {zone}".strip() if moment else "-" for moment, zone in ((run.start, run.zones[0]), (run.finish, run.zones[1]))]
    below = [] if run.state() == "complete" else [f"{run.state()[0].upper()}{run.state()[1:]}."]
    below += [f"Note: {note}." for note in run.notes]
    job = ("Table 1: the job", ["job start", "job finish", "total time"],
           [[*moments, hms(run.now) if run.finish else f"{hms(run.now)} so far" if run.start else "-"]], below)
    rows = []
    for t in trials:
        seconds = t.seconds(run.now)
        clock = "" if t.runtime is not None or seconds is None else "~"
        rows.append([t.id, *(show(t.params.get(name)) for name in TITLES), show(t.last), clock + show(seconds),
                     *(show(t.params.get(name)) for name in extra), t.status, str(t.epochs)])
    kind = ("the lowest of all epochs, as the manual grid reports it" if run.manual else
            "the last report, as in the log's boxed table; table 3 has the lowest of all reports")
    below = [f"eval loss: {kind}."]
    if any(row[5].startswith("~") for row in rows):
        below.append("~: by the clock of the log's lines, to about a second; the boxed table is not there (yet).")
    table2 = ("Table 2: the trials", ["combo id", *TITLES.values(), "eval loss", "runtime (s)", *extra, "status", "epochs"], rows, below)
    best = run.best or {"params": {}}
    row = [*(show(best["params"].get(name)) for name in TITLES), *(show(best.get(key)) for key in ("eval_loss", "time_total_s"))]
    row.append(f"{best['epoch']:g}" if best.get("epoch") is not None else "-")
    others = {name: value for name, value in best["params"].items() if name not in TITLES}
    below = ["No trial has reported a loss." if not run.best else
             "total runtime: the trial's seconds until that report; epochs: the epoch of that report"
             + (f". It is combo {best['trial'].id}." if best.get("trial") else ".")]
    below += [f"Its further hyperparameters: {', '.join(f'{k} {show(v)}' for k, v in others.items())}."] if others else []
    header = [*(f"best {title}" for title in TITLES.values()), "eval loss", "total runtime", "epochs"]
    table3 = ("Table 3: the best", header, [row], below)
    return [job, table2, table3, ("Figures", [], [], figures(run)), ("Failed and diverged trials", [], [], troubles(run))]


def figures(run):
    """Sum of runtimes, epochs and node time, in sentences."""
    s, k = totals(run), trials_at_once(run)
    lines = [f"Sum of the trials' runtimes: {s['sum_of_runtimes_s']:.0f} s; the job's time: {run.now:.0f} s"
             + (f"; ratio {s['sum_of_runtimes_s'] / run.now:.2f} with {k} trial(s) at once." if run.now else ".")]
    if s["epochs_full_grid"] and not run.manual:
        saved = 100 * (1 - s["epochs_trained"] / s["epochs_full_grid"])
        done = not run.state().startswith("partial")
        lines.append(f"Epochs trained{'' if done else ' so far'}: {s['epochs_trained']} of {s['epochs_full_grid']} "
                     f"({s['trials']} trials x {s['max_t']} epochs)" + (f", {saved:.0f} % saved." if done else "."))
        if s["epochs_full_grid"] <= 200_000:
            low, high = expected_epochs(s["trials"], s["max_t"], k)
            lines.append(f"Expected of a whole run with these settings: {low} to {high} epochs in nine of ten runs "
                         f"(simulated ASHA, random losses, {k} at once). One run proves little about the saving.")
    if s["units"] and (run.now or run.manual):
        share = f" ({100 * s['idle_min'] / s['allocated_min']:.0f} %)" if s["allocated_min"] else ""
        what = "GPU-minutes" if s["unit"] == "GPU" else "Slot-minutes (on CPUs; a slot is a place for one trial)"
        until = "FINISH" if run.finish else "now"
        since = "by START and FINISH" if run.manual else "by Slurm's record of the worker jobs" if run.held else f"from the line '{'joined' if run.nodes else 'cluster:'}' to {until}"
        lines.append(f"{what}: {s['allocated_min']:.1f} allocated ({s['units']:g} {s['unit']}(s), {since}), "
                     f"{s['busy_min']:.1f} busy, {s['idle_min']:.1f} idle{share}.")
    return lines


def troubles(run):
    """One line for each trial that failed or diverged."""
    bad = [t for t in run.trials.values() if t.status in ("FAILED", "diverged")]
    return [f"combo {t.id} ({t.name}): {t.status}: {t.cause or 'the log does not say why'}" for t in bad] or ["None."]


def markdown(parts):
    """Sections as Markdown text."""
    def cell(text):
        return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")

    out = []
    for title, header, rows, below in parts:
        out.append(f"### {title}\n")
        if header:
            out += [f"| {' | '.join(map(cell, row))} |" for row in (header, ["---"] * len(header), *rows)]
            out.append("")
        out += [("- " if len(below) > 1 or not header else "") + line for line in below]
        out += [""] if below else []
    return "\n".join(out)


def as_json(run):
    """A run as plain values; a loss that is no number becomes null."""
    def plain(value):
        return None if isinstance(value, float) and not math.isfinite(value) else value

    trials = [{
        "combo_id": int(t.id), "trial": t.name, "hyperparameters": {k: plain(v) for k, v in t.params.items()}, "eval_loss_last": plain(t.last),
        "eval_loss_best": t.best(), "runtime_s": t.seconds(run.now), "status": t.status, "epochs": t.epochs, "cause": t.cause,
        "start_s": t.start, "end_s": t.end, "reports": [[epoch, plain(loss)] for epoch, loss in t.reports],
    } for t in run.trials.values()]
    best = {key: value for key, value in run.best.items() if key != "trial"} if run.best else None
    if best:
        best["params"] = {k: plain(v) for k, v in best["params"].items()}
    return {
        "source": run.source, "job": run.job, "state": run.state(), "start": run.start and str(run.start), "finish": run.finish and str(run.finish),
        "time_zone": run.zones[0], "total_time_s": run.now, "settings": run.settings, "trials": trials, "best": best,
        "totals": totals(run), "notes": run.notes,
    }


def write_csv(path, runs):
    """One row a trial of all runs, values unrounded."""
    extra = further_names(runs)
    with open(path, "w", newline="", encoding="utf-8") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(["job", "combo id", *TITLES.values(), "eval loss", "runtime (s)", *extra,
                      "status", "epochs", "best eval loss", "trial", "cause"])
        for run in runs:
            for t in run.trials.values():
                out.writerow([run.job, t.id, *(t.params.get(name) for name in TITLES), t.last, t.seconds(run.now),
                              *(t.params.get(name) for name in extra), t.status, t.epochs, t.best(), t.name, t.cause])


def write_summary(path, runs):
    """One row a run, values unrounded: what a student's three tables must agree with."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(["log", "job", "state", "job start", "job finish", "total time (s)", "model", "seed", "trials", "failed or diverged",
                      "epochs trained", "epochs of the full grid", "sum of runtimes (s)", *(f"best {title}" for title in TITLES.values()),
                      "eval loss", "total runtime (s)", "epochs"])
        for run in runs:
            s, best = totals(run), run.best or {"params": {}}
            bad = sum(t.status in ("FAILED", "diverged") for t in run.trials.values())
            out.writerow([run.source, run.job, run.state(), run.start, run.finish, run.now, run.settings.get("MODEL_NAME"), run.settings.get("SEED"),
                          len(run.trials), bad, s["epochs_trained"], s["epochs_full_grid"], round(s["sum_of_runtimes_s"], 3),
                          *(best["params"].get(name) for name in TITLES), *(best.get(key) for key in ("eval_loss", "time_total_s", "epoch"))])


def comparison(manual, others):
    """The cost table of a manual grid and searches, and below it what makes them not comparable."""
    rows, below = [], []
    base = totals(manual)
    for run in (manual, *others):
        s = totals(run)
        known = s["units"] and (run is not manual or run.manual_gpus is not None)
        seconds = max(run.now, s["sum_of_runtimes_s"]) if run.manual else run.now
        same_unit = known and s["unit"] == base["unit"] and base["allocated_min"] and manual.manual_gpus is not None
        amount = "-" if not known else f"{s['units']:g}" if s["unit"] == "GPU" else f"0 ({s['units']:g} slot(s) on CPUs)"
        minutes = "-" if not known else f"{s['allocated_min']:.1f}" + ("" if s["unit"] == "GPU" else " slot-minutes")
        rows.append([f"{'manual grid' if run.manual else 'Ray Tune ASHA'} {run.job}", show(run.best and run.best["eval_loss"]), hms(seconds), amount, minutes,
                     "1" if run is manual else f"{s['allocated_min'] / base['allocated_min']:.2f}" if same_unit else "-"])
        if run.manual and s["sum_of_runtimes_s"] > run.now > 0:
            below.append(f"{run.job}: the grid was continued; its runtime is the sum of its trials', not this job's time.")
        if run.state().startswith("partial"):
            below.append(f"{run.job}: {run.state()}; its cost is not that of a whole run.")
    for run in others:
        if not (run.settings and manual.settings):
            below.append(f"Whether {run.job} and {manual.job} are comparable cannot be told: a log without settings.")
            continue
        for name in SAME_TO_COMPARE:
            ours, theirs = (r.settings.get(name, "not given") for r in (manual, run))
            if ours != theirs:
                below.append(f"NOT COMPARABLE: {name} is {ours} in {manual.job} and {theirs} in {run.job}.")
        if totals(run)["unit"] != base["unit"]:
            below.append(f"NOT COMPARABLE: {manual.job} and {run.job} did not both run on GPUs.")
        if len(run.trials) != len(manual.trials):
            below.append(f"{manual.job} has {len(manual.trials)} combinations, {run.job} has {len(run.trials)} trials.")
    if not any(line.startswith(("NOT", "Whether")) for line in below):
        below.append("Same model, data, samples, epochs, seed and workers: the runs are comparable.")
    below.append("eval loss: the lowest of all epochs. runtime: from START to FINISH. GPU-minutes: those allocated, idle ones too.")
    return ("Cost", ["run type", "eval loss", "runtime", "number of GPUs", "GPU-minutes", "cost ratio Ray/manual"], rows, below)


# ======================================================================================================================
# Main
# ======================================================================================================================
def main():
    """Returns the exit status: 0, or 2 if an input is no such log or a file cannot be written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", metavar="LOG_OR_RUN_FOLDER", help="log of a head job, run folder, or log or CSV of the manual grid")
    parser.add_argument("--csv", metavar="FILE", help="write the trials, one row each")
    parser.add_argument("--summary", metavar="FILE", help="write one row a run, as CSV: job, state, times, epochs, best; for grading many logs")
    parser.add_argument("--json", metavar="FILE", help="write everything: a list of runs")
    parser.add_argument("--plots", metavar="DIR", type=Path, help="write pictures (PNG) and report.html; with several inputs into DIR/<job>")
    parser.add_argument("--compare", action="store_true", help="print the cost table: the first input is the manual grid, the others are searches")
    a = parser.parse_args()
    if a.compare and len(a.inputs) < 2:
        parser.error("--compare needs the manual grid and at least one search")
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # "| head" is no error
    sys.stdout.reconfigure(errors="replace")
    runs, status = [], 0
    for text in a.inputs:
        try:
            runs.append(parse(text))
        except NotALog as error:
            print(f"ERROR: {error}", file=sys.stderr)
            status = 2
    if a.compare and status:
        return status
    if a.compare:
        if not runs[0].manual:
            print(f"ERROR: {a.inputs[0]}: has no RESULT line; --compare wants the log or CSV of the manual grid first", file=sys.stderr)
            return 2
        print(markdown([comparison(runs[0], runs[1:])]))
    else:
        for run in runs:
            if len(a.inputs) > 1:
                print(f"## {run.job} ({run.source})\n")
            print(markdown(sections(run)))
    try:
        if a.csv:
            write_csv(a.csv, runs)
        if a.summary:
            write_summary(a.summary, runs)
        if a.json:
            Path(a.json).write_text(json.dumps([as_json(run) for run in runs], indent=1, allow_nan=False, default=str) + "\n", encoding="utf-8")
        if a.plots:
            import draw_report  # here, since the tables need no package
        for run in runs if a.plots else []:
            folder = a.plots / re.sub(r"[^\w.-]", "_", run.job) if len(runs) > 1 else a.plots
            folder.mkdir(parents=True, exist_ok=True)
            page = draw_report.report(run, sections(run), draw_report.pictures(run, folder))
            (folder / "report.html").write_text(page, encoding="utf-8")
            print(f"pictures and report: {folder}/report.html")
    except OSError as error:
        print(f"ERROR: {error.filename}: cannot be written ({error.strerror}); give another place", file=sys.stderr)
        return 2
    except ImportError as error:
        print(f"ERROR: --plots needs the package {error.name}; run: bash scripts/setup_env.sh", file=sys.stderr)
        return 2
    return status


if __name__ == "__main__":
    sys.exit(main())
