"""The trials of a search in the terminal while its job runs. Used by fill_tables.py --watch; needs rich."""

import contextlib
import os
import signal
import sys
import time

from compare_runs import hms, trials_at_once
from read_log import NotALog, parse
from read_run import TITLES, clean, further_names
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

SETTLED = 5  # s: before that, a log may begin with what the site prints, and a run folder be empty
STYLES = {"running": "cyan", "stopped by ASHA": "dim", "FAILED": "red", "diverged": "red"}


def follow(path):
    """Yields (run, s since its log changed, the log's last line) each second until the job has ended."""
    while True:
        try:
            run = parse(path)
        except NotALog:
            if path.exists() and time.time() - path.stat().st_mtime > SETTLED:
                raise
        else:
            yield run, *last_line(run.jobs[-1].log if path.is_dir() else path)
            if run.finished:
                return
        time.sleep(1)


def last_line(log):
    """(s since a log changed, its last line)"""
    with contextlib.suppress(OSError), open(log, "rb") as file:
        status = os.fstat(file.fileno())  # NFS may answer stat() from a cache, but not after open()
        file.seek(max(0, status.st_size - 4000))
        return time.time() - status.st_mtime, clean(file.read().decode(errors="replace").rstrip().rpartition("\n")[2])
    return 0, ""


def table_of(run, trials):
    """Trials as a table. Where the terminal is too narrow, further hyperparameters are cut."""
    best = run.best and run.best["trial"]
    table, further = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)), further_names([run])
    for name in ("combo", "lr", "bs", "wd", *further, "epochs", "loss", "lowest", "status"):
        side = "left" if name == "status" else "right"
        table.add_column(clean(name), justify=side, no_wrap=name not in further, overflow="ellipsis")
    for t in trials:
        values = [t.params.get(name, "-") for name in (*TITLES, *further)]
        values = [f"{value:.3g}" if isinstance(value, float) else clean(value) for value in values]
        values += [f"{t.epochs}/{run.max_t}", *("-" if loss is None else f"{loss:.5f}" for loss in (t.last, t.best()))]
        table.add_row(f"* {t.id}" if t is best else t.id, *values, t.status.removesuffix(" by ASHA"),
                      style="bold green" if t is best else STYLES.get(t.status, ""))
    return table


def view(run, quiet, last, room):
    """What is shown of a run: its job, at most `room` trials sorted by their lowest loss, its best."""
    trials, best, job = list(run.trials.values()), run.best and run.best["trial"], run.jobs[-1]
    if run.finished:
        above = [f"Job {job.name}: {hms(job.ended - job.began)} from START to FINISH", run.state()]
    else:
        since = f", {hms(time.time() - run.began - job.began)} since START" if run.recorded else ""
        above = [f"Job {job.name}: running{since}"]
        above += [f"log{f', {hms(quiet)} ago' if quiet > 60 else ''}: {last}"] if last else []
    if of := max(len(trials), run.number("NUM_SAMPLES", 0)):
        ended, running = sum(t.ended for t in trials), sum(t.status == "running" for t in trials)
        slots = f" on {trials_at_once(run)} slot(s)" if run.workers else ""
        above.append(f"trials: {ended} of {of} ended, {running} running{slots}")
    # In too little room the best and the running ones are shown rather than others with lower losses.
    trials.sort(key=lambda t: (t.best() is None, t.best() or 0, int(t.id)))
    shown = sorted(trials, key=lambda t: (t is not best, t.status != "running"))[: max(1, room)]
    below = [f"and {len(trials) - len(shown)} more"] if len(trials) > len(shown) else []
    if best:
        below.append(f"* best: combo {best.id}, eval_loss {best.best():.5f} after epoch {run.best['epoch']:g}")
    table = [table_of(run, sorted(shown, key=trials.index))] if trials else []
    above, below = ([Text(line, no_wrap=True, overflow="ellipsis") for line in lines] for lines in (above, below))
    return Group(*above, *table, *below)


def watch(path):
    """Shows a log, or that of a run folder, until its job has ended. -> exit status"""
    console = Console(markup=False, highlight=False, emoji=False)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by an exception, so that the terminal is restored
    try:
        if not path.exists():
            print(f"waiting for {path}: it is not there yet (Ctrl-C stops)", file=sys.stderr)
        with Live(console=console, auto_refresh=False) as live:
            for run, quiet, last in follow(path):
                live.update(view(run, quiet, last, console.height - 10), refresh=True)
    except KeyboardInterrupt:
        return 130
    return 0
