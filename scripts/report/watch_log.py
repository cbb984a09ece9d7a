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

from compare_runs import hms, trials_at_once
from read_log import NotALog, parse
from read_run import TITLES, clean, further_names
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

REDRAWN = 60  # s between two drawings of a report, at least
DRAWN = 300  # s: a drawing takes at most
SETTLED = 5  # s: before that, a log may begin with what the site prints, and a run folder be empty
OPEN = ("running", "pending", "cut off")
STYLES = {"running": "cyan", "stopped by ASHA": "dim", "FAILED": "red", "diverged": "red"}


def look(path):
    """(when a file or folder was last changed, its size, its last line); None if it is not there."""
    try:
        if path.is_dir():
            return path.stat().st_mtime, 0, ""
        with open(path, "rb") as file:  # NFS may answer stat() from a cache, but not after open()
            status = os.fstat(file.fileno())
            file.seek(max(0, status.st_size - 4000))
            last = file.read().decode(errors="replace").rstrip().rpartition("\n")[2]
            return status.st_mtime, status.st_size, clean(last)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise NotALog(f"{path}: cannot be read ({error.strerror})") from None


def follow(path):
    """Yields (run, s since its log changed, the log's last line) twice a second until the job has ended."""
    run = seen = None
    while True:
        folder = run.folder if run else None
        found = look(path), folder and look(folder / "events.jsonl"), folder or time.time() // SETTLED
        if found != seen:
            try:
                run, seen = parse(folder or path), found
            except NotALog:
                if found[0] and time.time() - found[0][0] > SETTLED:
                    raise
        if run:
            changed, _, last = look(Path(run.jobs[-1].log) if path.is_dir() else path) or (time.time(), 0, "")
            yield run, max(0, time.time() - changed), last
            if run.finished:
                return
        time.sleep(0.5)


def table_of(run, trials, names):
    """Trials as a table with the hyperparameters of these names."""
    best, max_t = run.best and run.best["trial"], run.number("NUM_EPOCHS", 0)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("combo", *names, "epochs", "loss", "lowest", "status"):
        side = "left" if name == "status" else "right"
        table.add_column("bs" if name == "per_device_bs" else name, justify=side, no_wrap=True)
    for t in trials:
        values = [t.params.get(name, "-") for name in names]
        values = [f"{value:.3g}" if isinstance(value, float) else clean(value) for value in values]
        values += [f"{t.epochs}/{max_t}" if max_t else str(t.epochs)]
        values += ["-" if loss is None else f"{loss:.5f}" for loss in (t.last, t.best())]
        table.add_row(f"* {t.id}" if t is best else t.id, *values, t.status.removesuffix(" by ASHA"),
                      style="bold green" if t is best else STYLES.get(t.status, ""))
    return table


def view(console, run, quiet=0, last="", room=50):
    """What is shown of a run: its job, at most `room` trials sorted by their lowest loss, its best."""
    trials, best, job = list(run.trials.values()), run.best and run.best["trial"], run.jobs[-1]
    since = f", {hms(time.time() - run.began - job.began)} since START" if run.recorded else ""
    above = [f"Job {job.name}: {hms(job.ended - job.began)} from START to FINISH", run.state()] if run.finished else [
        f"Job {job.name}: running{since}"]
    ended, of = sum(t.status not in OPEN for t in trials), max(len(trials), run.number("NUM_SAMPLES", 0))
    slots = f" on {trials_at_once(run)} slot(s)" if run.workers else ""
    running = sum(t.status == "running" for t in trials)
    above += [f"trials: {ended} of {of} ended, {running} running{slots}"] if of else []
    ago = f", {hms(quiet)} ago" if quiet > 60 else ""
    above += [f"log{ago}: {last}"] if last and not run.finished else []
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
        loss, epoch = run.best["eval_loss"], run.best["epoch"]
        below.append(f"* best: combo {best.id}, eval_loss {loss:.5f} after epoch {epoch:g}")
    one_line = functools.partial(Text, no_wrap=True, overflow="ellipsis")
    return Group(*map(one_line, above), *([table] if trials else []), *map(one_line, below))


class Report:
    """The report of a job that runs, drawn by another process, so that the table goes on; the browser reloads it."""

    def __init__(self, text, folder):
        tool = Path(__file__).with_name("fill_tables.py")
        self.command = [sys.executable, tool, "--plots", folder, "--tables", os.devnull, text]
        self.process, self.next, self.drawn = None, 0, None

    def draw(self, run):
        """Begins to draw, if the run has changed, a minute has passed, and the last drawing has ended well."""
        ready = self.process is None or self.process.poll() == 0
        if ready and run is not self.drawn and time.monotonic() > self.next:
            self.next, self.drawn = time.monotonic() + REDRAWN, run
            nowhere = subprocess.DEVNULL  # of its own session: Ctrl-C is for the table
            self.process = subprocess.Popen(self.command, stdout=nowhere, stderr=nowhere, start_new_session=True)

    def finish(self):
        """Draws the run's end. -> what went wrong, one line"""
        try:
            if self.process:
                self.process.wait(DRAWN)
            last = subprocess.run(self.command, capture_output=True, text=True, timeout=DRAWN, check=False)
            return last.stderr.strip()
        except subprocess.TimeoutExpired:
            self.process.kill()
            return f"ERROR: the report was not drawn within {DRAWN} s"


def watch(text, folder=None):
    """Shows a log, or that of a run folder, until its job has ended; keeps a report in a folder. -> exit status"""
    moving = sys.stdout.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
    console = Console(force_terminal=moving, markup=False, highlight=False, emoji=False)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by an exception, so that the terminal is restored
    run, told, status, report = None, None, 0, folder and Report(text, folder)
    try:
        path = Path(text)
        if look(path) is None:
            print(f"waiting for {path}: it is not there yet (Ctrl-C stops)", file=sys.stderr)
        looks = follow(path)
        looks = itertools.chain([next(looks)], looks)  # the wait is over before the screen is cleared
        with Live(console=console, screen=True, auto_refresh=False) if moving else contextlib.nullcontext() as live:
            for run, quiet, last in looks:
                trials = run.trials.values()
                if report and run.trials and not run.finished:  # before, there is no record, or nothing in it
                    report.draw(run)
                ended = [run.finished, sum(t.epochs for t in trials), sum(t.status not in OPEN for t in trials)]
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
    if report and run and run.finished:
        print("the job has ended; drawing its report", flush=True)
        try:
            error = report.finish()
        except KeyboardInterrupt:
            return 130
        if error:
            print(error, file=sys.stderr)
            return 2
        print(f"pictures and report: {folder}/report.html")
    return status
