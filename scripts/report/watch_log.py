"""The trials of a search in the terminal while its job runs. Used by fill_tables.py --watch; needs rich."""

import contextlib
import functools
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from compare_runs import hms
from read_run import TITLES, NotALog, further_names, read_log, settle, trials_at_once
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

REDRAWN = 60  # s between two drawings of a report, at least
DRAWN = 300  # s: a drawing takes at most
SETTLED = 5  # s: before that, a file without START may be a log that begins with what the site prints
OPEN = ("running", "pending", "cut off", "not started")
STYLES = {"running": "cyan", "stopped by ASHA": "dim", "FAILED": "red", "diverged": "red"}


def log_of(path):
    """The log to follow; of a run folder, that of the last job that worked on it."""
    if not path.is_dir():
        return path
    folder, job = path.resolve(), path.resolve().name
    with contextlib.suppress(OSError):
        job = (folder / "job").read_text().strip()
    log = folder.parent.parent / "logs" / f"ray_head_bloom_5epochs-{job}.out"
    if not log.is_file():
        raise NotALog(f"{path}: not a run folder whose log is {log}; give runs/<jobid> or a log")
    return log


def look(path):
    """(log, what changes with it, s since it changed, its last line), or None while it is missing or empty."""
    log = log_of(path)
    try:
        with open(log, "rb") as file:  # NFS may answer stat() from a cache, but not after open()
            status = os.fstat(file.fileno())
            file.seek(max(0, status.st_size - 4000))
            last = file.read().decode(errors="replace").rstrip().rpartition("\n")[2]
    except FileNotFoundError:
        return None
    except OSError as error:
        raise NotALog(f"{log}: cannot be read ({error.strerror})") from None
    quiet = max(0, time.time() - status.st_mtime)
    return (log, (status.st_mtime_ns, status.st_size), quiet, last) if status.st_size else None


def follow(path):
    """Yields (run, s since its log changed, last line) twice a second until the job has ended."""
    seen = run = None
    while True:
        if found := look(path):
            log, changed, quiet, last = found
            if changed != seen:
                try:
                    run, seen = settle(read_log(log)), changed
                except NotALog:
                    if quiet > SETTLED:
                        raise
            if run:
                yield run, quiet, last
                if run.finish:
                    return
        time.sleep(0.5)


def table_of(run, trials, names):
    """Trials as a table with the hyperparameters of these names."""
    best, max_t = run.best and run.best.get("trial"), run.number("NUM_EPOCHS", 0)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("combo", *names, "epochs", "loss", "lowest", "status"):
        side = "left" if name == "status" else "right"
        table.add_column("bs" if name == "per_device_bs" else name, justify=side, no_wrap=True)
    for t in trials:
        values = [t.params.get(name, "-") for name in names]
        values = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in values]
        values += [f"{t.epochs}/{max_t}" if max_t else str(t.epochs)]
        losses = (t.reports[-1][1] if t.reports else t.last, t.best())
        values += ["-" if loss is None else f"{loss:.5f}" for loss in losses]
        table.add_row(f"* {t.id}" if t is best else t.id, *values, t.status.removesuffix(" by ASHA"),
                      style="bold green" if t is best else STYLES.get(t.status, ""))
    return table


def view(console, run, quiet=0, last="", room=50):
    """What is shown of a run: its job, at most `room` trials sorted by their lowest loss, its best."""
    trials, best = list(run.trials.values()), run.best and run.best.get("trial")
    running = sum(t.status == "running" for t in trials)
    of = max(len(trials), run.number("NUM_SAMPLES", 0))
    slots = f" on {trials_at_once(run)} slot(s)" if run.slots or run.nodes else ""
    above = [f"Job {run.job}: {hms(run.now)} from START to FINISH", run.state()] if run.finish else [
        f"Job {run.job}: running, {hms(run.now + quiet)} since START"]
    ended = sum(t.status not in OPEN for t in trials)
    above += [f"trials: {ended} of {of} ended, {running} running{slots}"] if of else []
    ago = f", {hms(quiet)} ago" if quiet > 60 else ""
    above += [f"log{ago}: {last}"] if last and not run.finish else []
    # In too little room the best and the running ones are shown rather than others with lower losses.
    trials.sort(key=lambda t: (t.best() is None, t.best() or 0, int(t.id)))
    first = sorted(trials, key=lambda t: (t is not best, t.status != "running"))[: max(1, room)]
    shown, names, hidden = sorted(first, key=trials.index), [*TITLES, *further_names([run])], []
    table, unlimited = table_of(run, shown, names), console.options.update(max_width=1000)
    while names and console.measure(table, options=unlimited).maximum > console.width:
        hidden.insert(0, names.pop())
        table = table_of(run, shown, names)
    notes = [f"and {len(trials) - len(shown)} more"] if len(trials) > len(shown) else []
    notes += [f"no room for {', '.join(hidden)}"] if hidden else []
    below = ["; ".join(notes)] if notes else []
    if best:
        below.append("* best: combo {}, eval_loss {:.5f} after epoch {:g}".format(best.id, *min(best.finite())))
    one_line = functools.partial(Text, no_wrap=True, overflow="ellipsis")
    return Group(*map(one_line, above), *([table] if trials else []), *map(one_line, below))


class Report:
    """The report of a job that runs, drawn by another process, so that the table goes on; the browser reloads it."""

    def __init__(self, text, folder):
        tool = Path(__file__).with_name("fill_tables.py")
        self.command = [sys.executable, tool, "--plots", folder, "--tables", os.devnull, text]
        self.process, self.next, self.drawn, self.error = None, 0, None, ""

    def draw(self, run, now=False):
        """Starts to draw, if the run has changed and a minute has passed; with now, waits and draws once more."""
        if self.process and (now or self.process.poll() is not None):
            self.wait()
        changed = run is not self.drawn and time.monotonic() > self.next
        if not self.process and (now or changed) and not self.error:
            self.next, self.drawn = time.monotonic() + REDRAWN, run
            self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                                            start_new_session=True)  # fmt: skip  Ctrl-C is for the table
            if now:
                self.wait()

    def wait(self):
        try:
            self.error = self.process.communicate(timeout=DRAWN)[1]
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.error = f"ERROR: the report was not drawn within {DRAWN} s"
        self.process = None


def watch(text, folder=None):
    """Shows a log, or that of a run folder, until its job has ended; keeps a report in a folder. -> exit status"""
    moving = sys.stdout.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
    console = Console(force_terminal=moving, markup=False, highlight=False, emoji=False)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by an exception, so that the terminal is restored
    run, told, status, report = None, None, 0, folder and Report(text, folder)
    try:
        path = Path(text)
        if not look(path):
            print(f"waiting for {path}: it is not there yet (Ctrl-C stops)", file=sys.stderr)
        looks = follow(path)
        looks = itertools.chain([next(looks)], looks)  # the wait is over before the screen is cleared
        with Live(console=console, screen=True, auto_refresh=False) if moving else contextlib.nullcontext() as live:
            for run, quiet, last in looks:
                trials = run.trials.values()
                if report and run.trials and not run.finish:  # before, the job has not made its run folder yet
                    report.draw(run)
                ended = [run.finish, sum(t.epochs for t in trials), sum(t.status not in OPEN for t in trials)]
                if live:
                    hint = Text("Ctrl-C stops watching; the job keeps running", style="dim")
                    live.update(Group(view(console, run, quiet, last, console.height - 10), hint), refresh=True)
                elif ended != told:
                    told = ended
                    console.print(view(console, run))
    except NotALog as error:
        print(f"ERROR: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        status = 130
    if moving and run:
        console.print(view(console, run, room=console.height - 10))  # stays, as that screen does not
    if report and run and run.finish:
        print("the job has ended; drawing its report", flush=True)
        try:
            report.draw(run, now=True)
        except KeyboardInterrupt:
            return 130
        if report.error:
            print(report.error.strip(), file=sys.stderr)
            return 2
        print(f"pictures and report: {folder}/report.html")
    return status
