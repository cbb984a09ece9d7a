"""Reads the record of a run, events.jsonl in its run folder, as a Run. The standard library only.

Lines that are not events are ignored, such as the half line that a kill leaves.
"""

import contextlib
import json
import math
import re
from collections import namedtuple
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

# The course's names of the columns.
TITLES = {"lr": "Learning Rate (lr)", "per_device_bs": "Batch Size (bs)", "wd": "Weight Decay (wd)"}

# seconds: as Ray counted them until this report; at: s from the run's START; params: the trial's, as they were then
Report = namedtuple("Report", "loss epoch seconds at params")


@dataclass
class Trial:
    """One trial. Times are s from the run's START."""

    name: str
    params: dict = field(default_factory=dict)
    reports: dict = field(default_factory=dict)  # epoch -> Report
    spans: list = field(default_factory=list)  # [from, to] on a slot
    on_slot: bool = False
    ended: bool = False
    decision: str = ""  # the scheduler's last
    cause: str = ""  # why it failed or diverged
    status: str = ""  # finished, stopped by ASHA, diverged, FAILED, running, pending, cut off
    epochs: int = 0
    last: float = None  # eval_loss
    runtime: float = None  # None: has not ended, or has reported nothing
    id: str = ""  # the course's Combo ID, from 1

    def finite(self):
        """Its reports with a loss that is a number, the lowest first."""
        return sorted((r for r in self.reports.values() if math.isfinite(r.loss)), key=lambda r: (r.loss, r.epoch))

    def best(self):
        """The lowest reported loss, or None."""
        return min((report.loss for report in self.finite()), default=None)

    def clock(self):
        """Runtime, else how long it was on a slot since its last start; None: not known."""
        return self.runtime or (self.spans and self.spans[-1][1] - self.spans[-1][0]) or None


@dataclass
class Job:
    """A job that worked on the run: its first one, or one that continued it. Times are s from the run's START."""

    name: str = "?"
    start: str = ""  # as the lines START and FINISH of its log have it
    finish: str = ""
    began: float = 0
    ended: float = 0  # FINISH, or the last that is known of it
    status: int = None  # None: it runs, or was killed
    log: str = ""


@dataclass
class Worker:
    """A worker job, and what it occupied. Times are s from the run's START."""

    since: float
    until: float  # None: until its head's job ends
    gpus: int
    slots: int  # trials at once
    by_slurm: bool = False  # Slurm's record tells how long


@dataclass
class Run:
    source: str
    folder: Path = None  # its run folder; None: a log alone is known
    began: float = 0  # START, s since 1970
    manual: bool = False
    scheduler: str = "ASHA"
    jobs: list = field(default_factory=list)
    workers: dict = field(default_factory=dict)  # (number of the job, worker job) -> Worker
    settings: dict = field(default_factory=dict)
    trials: dict = field(default_factory=dict)  # by name
    best: dict = None  # eval_loss, epoch, time_total_s, params, trial
    precisions: set = field(default_factory=set)  # of its nodes: bf16, fp16, fp32
    forecast: str = ""  # of the epochs, from before the run
    scores: dict = field(default_factory=dict)  # model -> what ask.py --score has found

    recorded = property(lambda self: self.folder is not None)
    job = property(lambda self: self.jobs[0].name)
    finished = property(lambda self: self.jobs[-1].status is not None)
    now = property(lambda self: self.jobs[-1].ended)  # s from START to FINISH, or to the last event
    seconds = property(lambda self: sum(job.ended - job.began for job in self.jobs))  # without gaps between jobs
    runtimes = property(lambda self: sum(trial.clock() or 0 for trial in self.trials.values()))
    max_t = property(lambda self: self.number("NUM_EPOCHS", 0))

    def number(self, name, default):
        text = self.settings.get(name, "")
        return (float if "." in text else int)(text) if re.fullmatch(r"\d{1,9}|\d\.\d+", text) else default

    def state(self):
        """In words: complete, or why not."""
        if not self.finished:
            return "partial: the job has not finished"
        if status := self.jobs[-1].status:
            why = {143: "cancelled, or at its time limit", 130: "interrupted"}.get(status, "failed")
            return f"partial: the job ended early ({why}, exit status {status})"
        return "complete" if self.trials else "partial: the job ended without a table of trials"


def further_names(runs):
    """Names of hyperparameters beyond the exercise's three, in order of appearance."""
    names = (name for run in runs for trial in run.trials.values() for name in trial.params)
    return [name for name in dict.fromkeys(names) if name not in TITLES]


def clean(value):
    """Text that any terminal and file takes."""
    return "".join(char for char in str(value) if char.isprintable())


def show(value):
    """A value for a table: six significant digits, as Ray's own table has; "-" for nothing."""
    return "-" if value is None else f"{value:.6g}" if isinstance(value, float) else clean(value)


# ---- The record --------------------------------------------------------------------------------------------
def events_of(folder, name=None):
    """The events of a run folder, or those of one name; "time" in s."""
    found = []
    with contextlib.suppress(OSError), open(Path(folder, "events.jsonl"), encoding="utf-8", errors="replace") as lines:
        for line in lines:
            with contextlib.suppress(Exception):
                event = json.loads(line, parse_constant=lambda nan: None)
                event["time"] = datetime.fromisoformat(event["time"]).timestamp()
                found += [event] if name in (None, event["event"]) else []
    return found


def started_of(folder):
    """The first `started` event of a run folder; {} if there is none."""
    return next(iter(events_of(folder, "started")), {})


def settings_of(folder):
    """The variables of the run in this folder as they were set; {} if there are none."""
    return as_run(folder, events_of(folder, "settings")).settings


def best_reports(run):
    """[(the report with its lowest loss, trial)] of all trials without error, the lowest first."""
    trials = [trial for trial in run.trials.values() if trial.finite() and trial.status != "FAILED"]
    return sorted(((trial.finite()[0], trial) for trial in trials), key=lambda pair: pair[0].loss)


def lowest_losses(folder):
    """[(lowest finite eval_loss, its train_loop_config)] of a run's trials without error, the lowest first."""
    return [(report.loss, report.params) for report, _ in best_reports(as_run(folder, events_of(folder)))]


def as_run(source, events, folder=None):
    run = Run(str(source), folder, began=math.floor(events[0]["time"]) if events else 0)
    for event in events:
        with contextlib.suppress(Exception):
            take(run, event["event"], event, event["time"] - run.began)
    run.jobs = run.jobs or [Job()]
    settle(run)
    return run


def take(run, what, event, now):
    now = math.floor(now) if what in ("started", "finished") else now  # as the lines START and FINISH have it
    if what == "started" or not run.jobs:
        leave_nodes(run)
        log = str(event.get("log", ""))
        run.jobs.append(Job(clean(event.get("job", "")), clean(event.get("start", "")), began=now, log=log))
        run.manual = event.get("kind") == "manual"
    job = run.jobs[-1]
    job.ended = max(now, job.ended)
    if "trial" in event:
        take_trial(run, what, event, now)
    elif what == "settings":
        run.settings = {name: clean(value) for name, value in event.items() if name not in ("time", "event")}
    elif what == "worker_joined":
        worker = Worker(now, None, int(event["gpus"]), int(event["slots"]))
        run.workers.setdefault((len(run.jobs), str(event["job"])), worker)  # requeued by Slurm, it joins once more
        run.precisions |= {clean(event["precision"])}
    elif what == "worker_ended":
        worker = run.workers[len(run.jobs), str(event["job"])]
        worker.until = now
        if seconds := event.get("seconds"):  # Slurm's record begins earlier: with the job, not with Ray on it
            worker.since, worker.by_slurm = min(worker.since, now - seconds), True
            worker.until = worker.since + seconds
    elif what == "search":
        run.scheduler = clean(event.get("scheduler", run.scheduler))
        run.trials = run.trials if event["continues"] else {}  # if Ray had saved none of the job before
    elif what == "forecast":
        run.forecast = clean(event["text"])
    elif what == "finished":
        job.status, job.finish = int(event["status"]), clean(event.get("finish", ""))


def take_trial(run, what, event, now):
    name = clean(event["trial"])
    trial = run.trials.setdefault(name, Trial(name))
    if what == "trial_started":
        trial.params, trial.on_slot, trial.ended, trial.cause = dict(event["config"]), True, False, ""
        trial.spans.append([now, now])
    elif what == "report":
        loss = math.nan if event["eval_loss"] is None else float(event["eval_loss"])
        seconds = event.get("seconds") and float(event["seconds"])
        trial.reports[float(event["epoch"])] = Report(loss, float(event["epoch"]), seconds, now, trial.params)
        trial.decision = event.get("decision")
    elif what == "trial_ended":
        trial.ended, trial.cause = True, clean(event.get("error") or "")
        trial.status = "FAILED" if trial.cause else ""
    if trial.on_slot:
        trial.spans[-1][1] = now
    if what in ("trial_lost", "trial_ended") or event.get("decision") == "PAUSE":
        trial.on_slot = False


def leave_nodes(run):
    """At the end of a job: what still ran on its nodes has ended with it."""
    for worker in run.workers.values():
        worker.until = run.now if worker.until is None else worker.until
    for trial in run.trials.values():
        if trial.on_slot:
            trial.spans[-1][1], trial.on_slot = run.now, False


def settle(run):
    """Fills in what follows from all events: how trials have ended, their ids and order, the best result."""
    for trial in run.trials.values():
        if reports := sorted(trial.reports.values(), key=lambda report: report.epoch):
            trial.epochs, trial.last = round(reports[-1].epoch), reports[-1].loss
            trial.runtime = reports[-1].seconds if trial.ended else None
        if run.manual and trial.ended and trial.finite() and not trial.cause:  # as its line RESULT has it
            trial.epochs, trial.last = run.max_t, trial.best()
        if not trial.ended:
            trial.status = "cut off" if run.finished else "running" if trial.on_slot else "pending"
        elif not trial.cause:
            stopped = trial.epochs < run.max_t and trial.decision in ("STOP", "PAUSE")  # PAUSE: never promoted
            trial.status = "stopped by ASHA" if stopped else "cut off" if trial.decision == "TIME" else "finished"
            if trial.last is not None and not math.isfinite(trial.last):
                trial.status, trial.cause = "diverged", f"at epoch {trial.epochs}: the loss became NaN or infinite"
    leave_nodes(run)
    for position, trial in enumerate(run.trials.values()):
        numbered = re.search(r"_(\d{1,9})$", trial.name)  # by Ray, from 0
        trial.id = str(1 + (int(numbered[1]) if numbered else position))
    run.trials = dict(sorted(run.trials.items(), key=lambda item: int(item[1].id)))
    for report, trial in best_reports(run)[:1]:
        seconds = trial.runtime if run.manual else report.seconds
        run.best = {"eval_loss": report.loss, "epoch": report.epoch, "time_total_s": seconds,
                    "params": report.params, "trial": trial}
