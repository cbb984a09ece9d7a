#!/usr/bin/env python3
"""Fills the exercise's tables from the log of a search; also draws pictures, compares runs, watches one.

    cd experiments/raytune/scheduler/asha
    python ../../../../scripts/report/fill_tables.py logs/ray_head_bloom_5epochs-12345.out
    python ../../../../scripts/report/fill_tables.py --csv trials.csv --plots pictures runs/12345
    python ../../../../scripts/report/fill_tables.py --compare --plots pictures MANUAL_LOG HEAD_LOG ...
    python ../../../../scripts/report/fill_tables.py --watch logs/ray_head_bloom_5epochs-12345.out

An input is the log of a head job (running, cancelled or complete), its run folder, or the log of the manual
grid. The log is enough; from a run folder the values have all their digits. The tables need only the standard
library, --plots needs matplotlib and plotly, --watch needs rich. read_run.py reads the input, draw_report.py
makes the pictures and the report, compare_runs.py sets runs side by side, watch_log.py follows a running job.

A head job runs it before it writes its own FINISH line, with --finish-now --exit-status N. The log is read
once. Each file is written in one step, first before the pictures are drawn and again after them, with the
later time as the job's FINISH.

Exit status: 0, or 2 if an input is not such a log or a file cannot be written. One line says which and why;
the other inputs are still read. --watch: 130 after Ctrl-C.
"""

import argparse
import contextlib
import csv
import io
import json
import math
import os
import re
import signal
import sys
from pathlib import Path

import compare_runs
from compare_runs import hms, totals
from read_run import TITLES, NotALog, finish_now, further_names, parse, show, trials_at_once

COLUMNS = ["Combo ID", *TITLES.values(), "Eval Loss", "Runtime (s)"]  # of a trial
BEST_COLUMNS = [*(f"Best {name}" for name in (*TITLES.values(), "Eval Loss")), "Total Runtime (s)", "Epochs"]
SCORES = ["Exact Match (%)", "F1 (%)", "Loss"]  # of ask.py --score, on questions that no trial has seen


# ============================================================================================================
# Tables: lists of (title, header, rows, lines below), for Markdown and HTML alike
# ============================================================================================================
def sections(run):
    """The three tables and the figures of a run."""
    trials, extra = list(run.trials.values()), further_names([run])
    moments = [f"{moment} {zone}".strip() if moment else "-"
               for moment, zone in zip((run.start, run.finish), run.zones)]
    total = hms(run.now) if run.finish else f"{hms(run.now)} so far" if run.start else "-"
    below = [] if run.state() == "complete" else [f"{run.state()[0].upper()}{run.state()[1:]}."]
    below += [f"Trained in {' and '.join(sorted(run.precisions))}."] if run.precisions else []
    below += [f"Note: {note}." for note in run.notes]
    header = ["Job Start Time", "Job Finish Time", "Total Job Time"]
    job = ("Table 1: the job", header, [[*moments, total]], below)
    rows = []
    for t in trials:
        seconds = t.seconds(run.now)
        clock = "" if t.runtime is not None or seconds is None else "~"
        values = [show(t.params.get(name)) for name in (*TITLES, *extra)]
        figures_of = [show(t.last), clock + show(seconds)]
        rows.append([t.id, *values[:3], *figures_of, *values[3:], t.status, str(t.epochs)])
    kind = ("the lowest of all epochs, as the manual grid reports it" if run.manual else
            "the last report, as in the log's boxed table; table 3 has the lowest of all reports")
    below = [f"Eval Loss: {kind}."]
    if any(row[5].startswith("~") for row in rows):
        below.append("~: by the clock of the log's lines, to about a second; no boxed table has it (yet).")
    table2 = ("Table 2: the trials", [*COLUMNS, *extra, "Status", "Epochs"], rows, below)
    best = run.best or {"params": {}}
    row = [*(show(best["params"].get(name)) for name in TITLES),
           *(show(best.get(key)) for key in ("eval_loss", "time_total_s"))]
    row.append(f"{best['epoch']:g}" if best.get("epoch") is not None else "-")
    others = {name: value for name, value in best["params"].items() if name not in TITLES}
    below = ["No trial has reported a loss." if not run.best else
             "Total Runtime: the trial's seconds until that report. Epochs: the epoch of that report"
             + (f". It is combo {best['trial'].id}." if best.get("trial") else ".")]
    if others:
        words = ", ".join(f"{name} {show(value)}" for name, value in others.items())
        below.append(f"Its further hyperparameters: {words}.")
    scored, further = [], []
    for name, found in run.scores.items():
        figures_of = [f"{found['exact_match']:.1f}", f"{found['f1']:.1f}",
                      f"{found['eval_loss']:.4f} +- {found['standard_error']:.4f}"]
        scored.append([name, *figures_of])
    if scored:
        row, further = row + scored[-1][1:], SCORES
        below.append(f"{', '.join(SCORES)}: of the best as a model, see below.")
    table3 = ("Table 3: the best", [*BEST_COLUMNS, *further], [row], below)
    asked = []
    if scored:
        what = f"On {found['questions']} questions that no trial has seen. Loss: nats per answer token, +- its error."
        asked = [("The best as a model", ["Model", *SCORES], scored, [what])]
    lists = (("Figures", figures(run)), ("Failed and diverged trials", troubles(run)))
    return [job, table2, table3, *asked, *((title, [], [], lines) for title, lines in lists)]


def figures(run):
    """Sum of runtimes, epochs and node time, in sentences."""
    s, k = totals(run), trials_at_once(run)
    work = s["sum_of_runtimes_s"]
    ratio = f"; ratio {work / run.now:.2f} with {k} trial(s) at once" if run.now else ""
    lines = [f"Sum of the trials' runtimes: {work:.0f} s; the job's time: {run.now:.0f} s{ratio}."]
    if s["epochs_full_grid"] and not run.manual:
        saved = 100 * (1 - s["epochs_trained"] / s["epochs_full_grid"])
        done = not run.state().startswith("partial")
        so_far, saving = ("", f", {saved:.0f} % saved") if done else (" so far", "")
        lines.append(f"Epochs trained{so_far}: {s['epochs_trained']} of {s['epochs_full_grid']} "
                     f"({s['trials']} trials x {s['max_t']} epochs){saving}.")
        if run.forecast:
            lines.append(f"Forecast before the run: {run.forecast}. One run proves little about the saving.")
    if s["units"] and (run.now or run.manual):
        share = f" ({100 * s['idle_min'] / s['allocated_min']:.0f} %)" if s["allocated_min"] else ""
        slots = "Slot-minutes (on CPUs; a slot is a place for one trial)"
        what = "GPU-minutes" if s["unit"] == "GPU" else slots
        line, until = "joined" if run.nodes else "cluster:", "FINISH" if run.finish else "now"
        since = f"from the line '{line}' to {until}"
        since = "by Slurm's record of the worker jobs" if run.held else since
        since = "by START and FINISH" if run.manual else since
        lines.append(f"{what}: {s['allocated_min']:.1f} allocated ({s['units']:g} {s['unit']}(s), {since}), "
                     f"{s['busy_min']:.1f} busy, {s['idle_min']:.1f} idle{share}.")
    return lines


def troubles(run):
    """One line for each trial that failed or diverged."""
    lines = [f"combo {t.id} ({t.name}): {t.status}: {t.cause or 'the log does not say why'}"
             for t in run.trials.values() if t.status in ("FAILED", "diverged")]
    return lines or ["None."]


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
    """A run as plain values; a loss that is not finite becomes null."""
    def plain(value):
        return None if isinstance(value, float) and not math.isfinite(value) else value

    trials = [{
        "combo_id": int(t.id), "trial": t.name, "hyperparameters": {k: plain(v) for k, v in t.params.items()},
        "eval_loss_last": plain(t.last), "eval_loss_best": t.best(), "runtime_s": t.seconds(run.now),
        "status": t.status, "epochs": t.epochs, "cause": t.cause, "start_s": t.start, "end_s": t.end,
        "reports": [[epoch, plain(loss)] for epoch, loss in t.reports],
    } for t in run.trials.values()]
    best = {key: value for key, value in run.best.items() if key != "trial"} if run.best else None
    if best:
        best["params"] = {k: plain(v) for k, v in best["params"].items()}
    return {
        "source": run.source, "job": run.job, "state": run.state(),
        "start": run.start and str(run.start), "finish": run.finish and str(run.finish),
        "time_zone": run.zones[0], "total_time_s": run.now, "settings": run.settings,
        "precisions": sorted(run.precisions),
        "trials": trials, "best": best, "totals": totals(run), "notes": run.notes, "scores": run.scores,
    }


def csv_text(rows):
    """Rows as CSV, values unrounded."""
    file = io.StringIO(newline="")
    csv.writer(file, lineterminator="\n").writerows(rows)
    return file.getvalue()


def trial_rows(runs):
    """A header and one row a trial of all runs."""
    extra = further_names(runs)
    yield [*COLUMNS, *extra, "Status", "Epochs", "Lowest Eval Loss", "Job", "Trial", "Cause"]
    for run in runs:
        for t in run.trials.values():
            values = [t.params.get(name) for name in (*TITLES, *extra)]
            yield [t.id, *values[:3], t.last, t.seconds(run.now), *values[3:], t.status, t.epochs, t.best(),
                   run.job, t.name, t.cause]


def run_rows(runs):
    """A header and one row a run: what a student's three tables must agree with."""
    yield ["Log", "Job", "State", "Job Start Time", "Job Finish Time", "Total Job Time (s)", "Model", "Seed",
           "Trials", "Failed or Diverged", "Epochs Trained", "Epochs of the Full Grid", "Sum of Runtimes (s)",
           *BEST_COLUMNS]
    for run in runs:
        s, best = totals(run), run.best or {"params": {}}
        yield [run.source, run.job, run.state(), run.start, run.finish, run.now,
               *map(run.settings.get, ("MODEL_NAME", "SEED")),
               len(run.trials), sum(t.status in ("FAILED", "diverged") for t in run.trials.values()),
               s["epochs_trained"], s["epochs_full_grid"], round(s["sum_of_runtimes_s"], 3),
               *map(best["params"].get, TITLES), *map(best.get, ("eval_loss", "time_total_s", "epoch"))]


# ============================================================================================================
# Main
# ============================================================================================================
def write_whole(path, text):
    """Writes a file in one step: a reader sees all of the old text or all of the new one."""
    path, target = Path(path), Path(os.path.realpath(path))
    part = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        if path.exists() and not path.is_file():  # such as /dev/stdout
            path.write_text(text, encoding="utf-8")
        else:
            part.write_text(text, encoding="utf-8")
            part.replace(target)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from None


def all_tables(a, runs):
    """The tables of all runs as Markdown; of several inputs each under its name."""
    names = [f"## {run.job} ({run.source})\n\n" if len(a.inputs) > 1 else "" for run in runs]
    return "\n".join(name + markdown(sections(run)) for name, run in zip(names, runs))


def write_files(a, runs):
    """Writes the files that the options ask for, but not the pictures."""
    if a.tables:
        write_whole(a.tables, all_tables(a, runs) + "\n")
    if a.csv:
        write_whole(a.csv, csv_text(trial_rows(runs)))
    if a.summary:
        write_whole(a.summary, csv_text(run_rows(runs)))
    if a.json:
        values = [as_json(run) for run in runs]
        write_whole(a.json, json.dumps(values, indent=1, allow_nan=False, default=str) + "\n")


def draw(run, folder, ends_now):
    """Writes a run's pictures and report.html; a job that ends now finishes after the pictures."""
    import draw_report  # here, since the tables need no package

    folder.mkdir(parents=True, exist_ok=True)
    body = draw_report.body(run, draw_report.pictures(run, folder))
    if ends_now:
        finish_now(run)
    write_whole(folder / "report.html", draw_report.page(run, sections(run), body))
    print(f"pictures and report: {folder}/report.html")


def write_study(run, path):
    """Writes a run as an Optuna study."""
    import as_study  # here, since the tables need no package

    as_study.write(run, path)


def draw_comparison(runs, folder):
    """Writes compare.png."""
    folder.mkdir(parents=True, exist_ok=True)
    for run in compare_runs.picture(runs, folder / "compare.png"):
        print(f"{run.source}: has no times of reports, so it is not in the picture", file=sys.stderr)
    print(f"picture: {folder}/compare.png\n")


def options():
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("inputs", nargs="+", metavar="LOG_OR_RUN_FOLDER",
        help="log of a head job or of the manual grid, or run folder")
    add("--tables", metavar="FILE",
        help="write the tables (Markdown) into this file instead of printing them")
    add("--csv", metavar="FILE", help="write the trials, one row each")
    add("--summary", metavar="FILE",
        help="write one row a run, as CSV: job, state, times, epochs, best; for grading many logs")
    add("--json", metavar="FILE", help="write everything: a list of runs")
    add("--plots", metavar="DIR", type=Path,
        help="write pictures (PNG) and report.html; with several inputs into DIR/<job>")
    add("--study", metavar="FILE", type=Path,
        help="write an Optuna study (SQLite), such as study.db, for optuna-dashboard; one input")
    add("--compare", action="store_true",
        help="print what the runs cost, against the first (the manual grid, say), and which settings differ; "
             "with --plots DIR, draw their best loss over time and cost: DIR/compare.png")
    add("--watch", action="store_true", help="show the trials of a running job until it ends; Ctrl-C stops it; "
        "with --plots DIR, its report is drawn again each minute, and a browser that shows it reloads it")
    add("--finish-now", action="store_true",
        help="for a job that is about to end: the current time is its FINISH, whatever its log says")
    add("--exit-status", metavar="N", type=int, help="with --finish-now: the job's exit status (default 0)")
    a = parser.parse_args()
    if a.watch and (len(a.inputs) > 1 or any(v for k, v in vars(a).items() if k not in ("inputs", "watch", "plots"))):
        parser.error("--watch takes one log or run folder and no other option than --plots")
    if a.compare and len(a.inputs) < 2:
        parser.error("--compare needs two runs or more")
    if a.study and len(a.inputs) > 1:
        parser.error("--study takes one input")
    if a.finish_now and (len(a.inputs) > 1 or a.compare):
        parser.error("--finish-now takes one input, the job's own log, and not --compare")
    if a.exit_status is not None and not a.finish_now:
        parser.error("--exit-status needs --finish-now")
    return a


def main():
    """Returns the exit status: 0, or 2 if an input is not such a log or a file cannot be written."""
    a = options()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # "| head" is no error
    sys.stdout.reconfigure(errors="replace")
    if a.watch:
        try:
            from watch_log import watch
        except ImportError as error:
            print(f"ERROR: --watch needs the package {error.name}; run: bash scripts/setup_env.sh", file=sys.stderr)
            return 2
        return watch(a.inputs[0], a.plots)
    runs, status = [], 0
    for text in a.inputs:
        try:
            runs.append(parse(text, (a.exit_status or 0) if a.finish_now else None))
        except NotALog as error:
            print(f"ERROR: {error}", file=sys.stderr)
            status = 2
    if not runs or (a.compare and status):
        return status
    try:
        write_files(a, runs)  # before the pictures, which take seconds: a job may be at its time limit
        if a.plots and a.compare:
            draw_comparison(runs, a.plots)
        for run in runs if a.plots and not a.compare else []:
            draw(run, a.plots / re.sub(r"[^\w.-]", "_", run.job) if len(runs) > 1 else a.plots, a.finish_now)
        if a.study:
            write_study(runs[0], a.study)
        if a.plots and a.finish_now:
            write_files(a, runs)
    except OSError as error:
        print(f"ERROR: {error.filename}: cannot be written ({error.strerror}); give another place",
              file=sys.stderr)
        status = 2
    except ImportError as error:
        print(f"ERROR: --plots and --study need the package {error.name}; run: bash scripts/setup_env.sh",
              file=sys.stderr)
        status = 2
    if a.compare:
        print(markdown([compare_runs.comparison(runs), compare_runs.differences(runs)]))
    elif not a.tables:
        print(all_tables(a, runs))
    return status


if __name__ == "__main__":
    sys.exit(main())
