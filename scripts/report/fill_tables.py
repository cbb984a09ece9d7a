#!/usr/bin/env python3
"""Fills the exercise's tables from a search; also draws pictures, compares runs, watches one.

    cd experiments/raytune/scheduler/asha
    python ../../../../scripts/report/fill_tables.py logs/ray_head_bloom_5epochs-12345.out
    python ../../../../scripts/report/fill_tables.py --csv trials.csv --plots pictures runs/12345
    python ../../../../scripts/report/fill_tables.py --compare --plots pictures MANUAL_LOG HEAD_LOG ...
    python ../../../../scripts/report/fill_tables.py --watch logs/ray_head_bloom_5epochs-12345.out

An input is the log of a head job or of the manual grid, or a run folder. A log leads to its run folder by the job's id,
and there to the record, events.jsonl. A log alone gives the course's tables; costs, pictures and comparison need the
record. The tables need only the standard library, --plots matplotlib and plotly, --watch rich.

Exit status: 0, or 2 if an input cannot be used or a file cannot be written. One line says which and why; the other
inputs are still read. --watch: 130 after Ctrl-C.
"""

import argparse
import csv
import re
import signal
import sys
from pathlib import Path

import compare_runs
from compare_runs import hms, totals, trials_at_once
from read_log import NotALog, parse
from read_run import TITLES, further_names, show

BEST_COLUMNS = [*(f"Best {name}" for name in (*TITLES.values(), "Eval Loss")), "Total Runtime (s)", "Epochs"]


# ---- Tables: lists of (title, header, rows, lines below), for Markdown and HTML alike ----------------------
def sections(run):
    """The three tables, what the saved model scores if there is one, the figures."""
    scores = [table_of_scores(run)] if run.scores else []
    return [table_of_jobs(run), table_of_trials(run), table_of_best(run), *scores, ("Figures", [], [], figures(run))]


def table_of_jobs(run):
    """Table 1: a row for each job that worked on the run."""
    rows = [[job.start or "-", job.finish or "-", "-" if job.status is None else hms(job.ended - job.began)]
            for job in run.jobs]
    below = [] if run.state() == "complete" else [f"{run.state().capitalize()}."]
    below += [f"Trained in {' and '.join(sorted(run.precisions))}."] if run.precisions else []
    return ("Table 1: the job", ["Job Start Time", "Job Finish Time", "Total Job Time"], rows, below)


def table_of_trials(run):
    """Table 2: a row for each trial."""
    header, *rows = (row[:-4] for row in trial_rows([run]))
    below = ["Eval Loss: the lowest of all epochs." if run.manual else
             "Eval Loss: the last report, as in the log's boxed table; table 3 has the lowest of all reports."]
    below += [f"Combo {t.id} ({t.name}): {t.status}: {t.cause}" for t in run.trials.values() if t.cause]
    return ("Table 2: the trials", header, [[show(value) for value in row] for row in rows], below)


def table_of_best(run):
    """Table 3: the lowest loss of all reports."""
    row, below = list(run_rows([run]))[1][-len(BEST_COLUMNS) :], ["No trial has reported a loss."]
    if best := run.best:
        seconds = "the trial's seconds" if run.manual else "the trial's seconds until that report"
        below = [f"Total Runtime: {seconds}. Epochs: the epoch of that report. It is combo {best['trial'].id}."]
        if others := [f"{name} {show(value)}" for name, value in best["params"].items() if name not in TITLES]:
            below.append(f"Its further hyperparameters: {', '.join(others)}.")
    return ("Table 3: the best", BEST_COLUMNS, [[show(value) for value in row]], below)


def table_of_scores(run):
    """What ask.py --score has found."""
    rows = [[name, f"{found['exact_match']:.1f}", f"{found['f1']:.1f}",
             f"{found['eval_loss']:.4f} +- {found['standard_error']:.4f}"] for name, found in run.scores.items()]
    questions = next(iter(run.scores.values()))["questions"]
    below = [f"On {questions} questions that no trial has seen. Loss: nats per answer token, +- its error."]
    return ("The best as a model", ["Model", "Exact Match (%)", "F1 (%)", "Loss"], rows, below)


def figures(run):
    """Sum of runtimes, epochs and node time, in sentences."""
    s, ratio = totals(run), ""
    if run.recorded and run.seconds:
        ratio = f"; ratio {run.runtimes / run.seconds:.2f} with {trials_at_once(run)} trial(s) at once"
    lines = [f"Sum of the trials' runtimes: {run.runtimes:.0f} s; the job's time: {run.seconds:.0f} s{ratio}."]
    if s["epochs_full_grid"] and not run.manual:
        saved = 100 * (1 - s["epochs_trained"] / s["epochs_full_grid"])
        saving = f", {saved:.0f} % saved" if run.state() == "complete" else " so far"
        lines.append(f"Epochs trained: {s['epochs_trained']} of {s['epochs_full_grid']} "
                     f"({s['trials']} trials x {s['max_t']} epochs){saving}.")
    if run.forecast:
        lines.append(f"Forecast before the run: {run.forecast}. One run proves little about the saving.")
    if not run.recorded:
        lines.append("Costs, pictures, --study and --compare need the run folder of this job, which is not here.")
    elif s["allocated_min"]:
        what = "GPU-minutes" if s["unit"] == "GPU" else "Slot-minutes (on CPUs; a slot is a place for one trial)"
        by_slurm = any(worker.by_slurm for worker in run.workers.values())
        since = "by Slurm's record of the worker jobs" if by_slurm else "from joining to the end"
        lines.append(f"{what}: {s['allocated_min']:.1f} allocated ({s['units']:g} {s['unit']}(s), {since}), "
                     f"{s['busy_min']:.1f} busy, {s['idle_min']:.1f} idle "
                     f"({100 * s['idle_min'] / s['allocated_min']:.0f} %).")
    return lines


def markdown(parts):
    escaped, out = str.maketrans({"\\": "\\\\", "|": "\\|", "<": "&lt;"}), []
    for title, header, rows, below in parts:
        out.append(f"### {title}\n")
        if header:
            lines = [[text.translate(escaped) for text in row] for row in (header, ["---"] * len(header), *rows)]
            out += [f"| {' | '.join(line)} |" for line in lines] + [""]
        out += [f"- {line}" for line in below] + [""] * bool(below)
    return "\n".join(out)


# ---- Values for other programs, unrounded ------------------------------------------------------------------
def trial_rows(runs):
    """A header and one row a trial of all runs."""
    extra = further_names(runs)
    yield ["Combo ID", *TITLES.values(), "Eval Loss", "Runtime (s)", *extra, "Status", "Epochs", "Lowest Eval Loss",
           "Job", "Trial", "Cause"]
    for run in runs:
        for t in run.trials.values():
            values = [t.params.get(name) for name in (*TITLES, *extra)]
            yield [t.id, *values[:3], t.last, t.clock(), *values[3:], t.status.replace("ASHA", run.scheduler), t.epochs,
                   t.best(), run.job, t.name, t.cause]


def run_rows(runs):
    """A header and one row a run: what a student's three tables must agree with."""
    yield ["Log", "Job", "State", "Job Start Time", "Job Finish Time", "Total Job Time (s)", "Model", "Seed",
           "Trials", "Failed or Diverged", "Epochs Trained", "Epochs of the Full Grid", "Sum of Runtimes (s)",
           *BEST_COLUMNS]
    for run in runs:
        s, best = totals(run), run.best or {"params": {}}
        yield [run.source, run.job, run.state(), run.jobs[0].start, run.jobs[-1].finish, run.seconds,
               *map(run.settings.get, ("MODEL_NAME", "SEED")),
               len(run.trials), sum(t.status in ("FAILED", "diverged") for t in run.trials.values()),
               s["epochs_trained"], s["epochs_full_grid"], round(run.runtimes, 3),
               *map(best["params"].get, TITLES), *map(best.get, ("eval_loss", "time_total_s", "epoch"))]


# ---- Main --------------------------------------------------------------------------------------------------
def all_tables(runs):
    return "\n".join(f"## {run.job} ({run.source})\n\n{markdown(sections(run))}" for run in runs)


def write_tables(a, runs):
    """Writes the files that the options ask for, but not the pictures."""
    if a.tables:
        a.tables.write_text(all_tables(runs) + "\n", encoding="utf-8")
    for path, rows in ((a.csv, trial_rows(runs)), (a.summary, run_rows(runs))):
        if path:
            with path.open("w", encoding="utf-8", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows(rows)


def draw(a, run, folder):
    """Writes a run's pictures and report.html; a job that ends now finishes after the pictures."""
    import draw_report  # here, since the tables need no package

    folder.mkdir(parents=True, exist_ok=True)
    body = draw_report.body(run, folder)
    if a.exit_status is not None:
        run = parse(run.source, a.exit_status)
        write_tables(a, [run])
    new = folder / "report.html.new"  # in one step: a browser may be reloading it
    new.write_text(draw_report.page(run, sections(run), body), encoding="utf-8")
    new.replace(folder / "report.html")
    print(f"pictures and report: {folder}/report.html")


def options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("inputs", nargs="+", metavar="LOG_OR_RUN_FOLDER", help="log of a head job or a manual grid, or run folder")
    add("--tables", metavar="FILE", type=Path, help="write the tables (Markdown) into this file, do not print them")
    add("--csv", metavar="FILE", type=Path, help="write the trials, one row each")
    add("--summary", metavar="FILE", type=Path, help="write one row a run (CSV): job, state, times, best; for grading")
    add("--study", metavar="FILE", type=Path, help="write one run as an Optuna study (SQLite), such as study.db")
    add("--plots", metavar="DIR", type=Path, help="write pictures (PNG) and report.html; of several runs: DIR/<job>")
    add("--compare", action="store_true", help="print what the runs cost, against the first (the manual grid, say), "
        "and which settings differ; with --plots DIR, draw their best loss over time and cost: DIR/compare.png")
    add("--watch", action="store_true", help="show the trials of a running job until it ends; Ctrl-C stops it")
    add("--exit-status", metavar="N", type=int, help="for a job that ends now: its FINISH is this moment, N its status")
    a = parser.parse_args()
    if a.watch and len(sys.argv) > 3:
        parser.error("--watch takes one input and no other option")
    if len(a.inputs) > 1 and (a.study or a.exit_status is not None):
        parser.error("--study and --exit-status take one input")
    return a


def main():
    a, runs, problems = options(), [], []
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # "| head" is no error
    sys.stdout.reconfigure(errors="replace")
    try:
        if a.watch:
            from watch_log import watch

            return watch(Path(a.inputs[0]))
        for text in a.inputs:
            try:
                runs.append(parse(text, a.exit_status))
            except NotALog as error:
                problems.append(f"{error}")
        recorded = [run for run in runs if run.recorded]
        if a.plots or a.study or a.compare:
            problems += [f"{run.source}: its run folder is not here; pictures, --study and --compare need it"
                         for run in runs if not run.recorded]
        runs = [] if a.compare and problems else runs
        if runs:
            write_tables(a, runs)  # before the pictures, which take seconds: a job may be at its time limit
        if a.study and recorded:
            import as_study

            as_study.write(recorded[0], a.study)
        if a.compare and a.plots and runs:
            a.plots.mkdir(parents=True, exist_ok=True)
            import draw_report

            draw_report.compare(runs, a.plots / "compare.png")
            print(f"picture: {a.plots}/compare.png\n")
        elif a.plots:
            for run in recorded:
                draw(a, run, a.plots / re.sub(r"[^\w.-]", "_", run.job) if len(a.inputs) > 1 else a.plots)
    except NotALog as error:
        problems.append(f"{error}")
    except OSError as error:
        problems.append(f"{error.filename}: cannot be used ({error.strerror})")
    except ImportError as error:
        problems.append(f"--watch, --plots and --study need the package {error.name}; run: bash scripts/setup_env.sh")
    for problem in problems:
        print(f"ERROR: {problem}", file=sys.stderr)
    if a.compare and runs:
        print(markdown([compare_runs.comparison(runs), compare_runs.differences(runs)]))
    elif runs and not (a.tables or a.compare):
        print(all_tables(runs))
    return 2 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
