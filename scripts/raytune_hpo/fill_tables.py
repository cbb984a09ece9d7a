#!/usr/bin/env python3
"""Reads the log of a search and fills the exercise's tables; also pictures, a report, and a comparison of costs.

    cd experiments/raytune/scheduler/asha
    python ../../../../scripts/raytune_hpo/fill_tables.py logs/ray_head_bloom_5epochs-12345.out
    python ../../../../scripts/raytune_hpo/fill_tables.py --csv trials.csv --json run.json --plots pictures runs/12345
    python ../../../../scripts/raytune_hpo/fill_tables.py --compare MANUAL_LOG logs/ray_head_bloom_5epochs-*.out

An input is the log of a head job (running, cancelled or complete), its run folder, or the log of the manual grid. The
log alone is enough. From a run folder the values have all their digits. The tables need the standard library only;
--plots needs matplotlib, numpy and plotly.

Exit status: 0, or 2 if an input is no such log (one line says which and why; the others are still printed).
"""

import argparse
import ast
import csv
import datetime
import heapq
import html
import itertools
import json
import math
import random
import re
import signal
import sys
from bisect import insort
from dataclasses import dataclass, field
from pathlib import Path

TITLES = {"lr": "learning rate", "per_device_bs": "batch size", "wd": "weight decay"}  # the exercise's column names
SAME_TO_COMPARE = ("MODEL_NAME", "SQUAD_DATA", "TRAIN_SAMPLES", "EVAL_SAMPLES", "NUM_EPOCHS", "SEED", "WORKERS_PER_TRIAL")
GRID_CSV = "lr,per_device_bs,wd,eval_loss,epoch,runtime_s"  # the first line of the manual grid's CSV
MAX_BYTES = 200_000_000  # of a log; a real one has some 10 kB
BANNER = re.compile(r"===== JOB (\S+) (START|FINISH) *: (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) ?(.*?) =====")
CLOCK = re.compile(r"(\d\d):(\d\d):(\d\d) (\S+)(?: \S+)? \| (.*)")
EVENT = re.compile(r"(\S.*?)  (started|epoch|stopped|finished|ended|FAILED)(?: +(.*))?$")
REPORT = re.compile(r"(\d+(?:\.\d+)?)/\d+ +eval_loss (\S+)")
JOINED = re.compile(r"worker \d+/\d+ joined: .*?(\d+) CPUs, (\d+) GPUs, (\d+) trial")
CLUSTER = re.compile(r"cluster: (\d+(?:\.\d+)?) trial\(s\) at once, (\d+) workers each, on (GPUs|CPUs)")
SETTING = re.compile(r"  ([A-Z][A-Z0-9_]*) +(\S.*)?$")
MANUAL = re.compile(r"(RESULT|FAILED) ((?:[\w.]+=\S+ ?)+)(?:: (.*))?$")
NOT_TEXT = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # colours and control characters


class NotALog(Exception):
    """The input cannot be read as a log of this exercise; the message is one line that says why and what to give."""


@dataclass
class Trial:
    """One trial. Seconds count from the job's START."""

    name: str
    params: dict = field(default_factory=dict)
    reports: list = field(default_factory=list)  # (epoch, eval_loss), as they came
    status: str = ""  # finished, stopped by ASHA, diverged, FAILED, running, pending, cut off (by the job's end)
    cause: str = ""
    runtime: float = None  # s, as Ray counted it; None: not in the log
    start: float = None
    end: float = None
    last: float = None  # eval_loss of the boxed table
    epochs: int = 0
    at: dict = field(default_factory=dict)  # epoch -> s from the trial's start to its report
    id: str = ""

    def finite(self):
        """[(loss, epoch)] of all reports that are numbers."""
        seen = self.reports or ([(self.epochs, self.last)] if self.last is not None else [])
        return [(loss, epoch) for epoch, loss in seen if math.isfinite(loss)]

    def best(self):
        """The lowest reported loss, or None."""
        return min(self.finite())[0] if self.finite() else None

    def seconds(self, now):
        """Runtime in seconds: Ray's, else by the clock of the log's lines (to 1 s) up to `now`; None: not started."""
        if self.runtime is not None:
            return self.runtime
        return None if self.start is None else (now if self.end is None else self.end) - self.start


@dataclass
class Run:
    """What a log says."""

    source: str
    job: str = "?"
    start: datetime.datetime = None
    finish: datetime.datetime = None
    zones: tuple = ("", "")
    now: float = 0.0  # s from START to FINISH, or to the last line with a time
    settings: dict = field(default_factory=dict)
    trials: dict = field(default_factory=dict)  # by name
    best: dict = None  # eval_loss, epoch, time_total_s, params
    nodes: list = field(default_factory=list)  # (s of joining, GPUs, trials at once)
    slots: float = None  # trials at once, of the line "cluster:"
    cluster_at: float = 0.0
    on_gpus: bool = False
    manual_gpus: int = None  # of the line "GPUs:" of a manual grid
    manual: bool = False
    exit_status: int = 0
    has_table: bool = False
    notes: list = field(default_factory=list)

    def number(self, name, default):
        """A setting that is a whole number."""
        text = self.settings.get(name, "")
        return int(text) if re.fullmatch(r"\d{1,9}", text) else default

    def state(self):
        """In words: complete, or why not."""
        if self.finish is None:
            return "partial: the job has not finished"
        if self.exit_status:
            why = {143: "cancelled, or at its time limit", 130: "interrupted"}.get(self.exit_status, "failed")
            return f"partial: the job ended early ({why}, exit status {self.exit_status})"
        return "complete" if self.has_table or self.manual else "partial: the job ended without a table of trials"


# ======================================================================================================================
# Reading
# ======================================================================================================================
def read_text(path):
    """A log as clean lines. Raises NotALog if it is missing, empty, binary or huge."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise NotALog(f"{path}: larger than {MAX_BYTES // 10**6} MB, so not the log of a search; give logs/ray_head_*.out")
        data = path.read_bytes()
    except OSError as error:
        raise NotALog(f"{path}: cannot be read ({error.strerror}); give a log such as logs/ray_head_bloom_5epochs-12345.out") from None
    if not data.strip():
        raise NotALog(f"{path}: is empty; wait until the job has started, or give another log")
    if b"\0" in data:
        raise NotALog(f"{path}: is binary, not a log; give a log such as logs/ray_head_bloom_5epochs-12345.out")
    text = data.decode("utf-8-sig", errors="replace").replace("\r\n", "\n").replace("\r", "\n")
    return [NOT_TEXT.sub("", line).rstrip() for line in text.split("\n")]


def value_of(text):
    """A table's cell: int, float (also nan, inf), None for nothing, else the text."""
    text = text.strip()
    if text in ("", "None"):
        return None
    for kind in (int, float):
        try:
            return kind(text) if len(text) < 40 and "_" not in text else text
        except ValueError:
            pass
    return text


def number_or(value, default=None):
    """value if it is a number, else default."""
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else default


def finite_or_none(value):
    """value if it is a finite number, else None."""
    return value if number_or(value) is not None and math.isfinite(value) else None


def cells_of(block):
    """A boxed table's lines -> (header, rows), lists of stripped cells; ([], []) if it is none.

    Reads Ray's two forms: columns between bars, and columns between spaces inside one frame. Lines that belong to one
    row (a header or a cell broken over two lines) are joined without a space.
    """
    frame = [line for line in block if not set(line) - set("+-=|─│╭╮╰╯├┤┬┴┼╞╡═╪╤╧ ")]
    known = set(frame)
    lines = [line for line in block if line[0] in "|│" and line not in known and len(line) == len(block[0])]
    if not frame or not lines:
        return [], []
    edges = [i for i, char in enumerate(frame[0]) if char in "+┬╤"]
    if len(edges) > 2:
        cut = list(itertools.pairwise(edges))
    else:  # no bars between columns: a column ends where all lines have two blanks
        full = "".join(" " if all(line[i] == " " for line in lines) else "x" for i in range(len(lines[0])))[1:-1]
        cut = [(m.start(), m.end() + 1) for m in re.finditer(r"x+( x+)*", full)]
    second = block.index(frame[1], block.index(frame[0]) + 1) if len(frame) > 1 else len(block)
    rows = [[""] * len(cut)]  # the header first
    for number, line in enumerate(block):
        if line in known or line[0] not in "|│" or len(line) != len(block[0]):
            continue  # the frame, or a line that is not written to its end yet
        row = [line[a + 1 : b].strip() for a, b in cut]
        if number < second or (len(rows) > 1 and not any(row[1:2])):  # no status: the rest of the row above
            rows[-1] = [above + below for above, below in zip(rows[-1], row)]
        else:
            rows.append(row)
    return rows[0], rows[1:]


def uncut(text, names):
    """The one of names that a text cut with dots at its start or end stands for; else the text's last part."""
    bare = text.replace("…", "...")
    if bare.startswith("..."):
        tail = bare[3:].rsplit("/", 1)[-1]
        found = [name for name in names if name.endswith(tail) and (tail == name or "/" not in bare)]
        found = found or [name for name in names if name.endswith(tail)]
    elif bare.endswith("..."):
        head = bare[:-3].rsplit("/", 1)[-1]
        found = [name for name in names if name.startswith(head)] if head else []
    else:
        return text.rsplit("/", 1)[-1]
    return found[0] if len(found) == 1 else bare.rsplit("/", 1)[-1] if "/" in bare else text


def read_table(run, block, known):
    """Puts a boxed table of trials into run.trials. Another table (Ray's list of errors) is left out. -> was it one?"""
    header, rows = cells_of(block)
    plain = [re.sub(r"\s", "", title).lower() for title in header]
    if "trialname" not in plain or "status" not in plain:
        return False
    metrics = [i for i, title in enumerate(plain) if title in ("iter", "totaltime(s)", "eval_loss")]
    names = list(dict.fromkeys([*(key for trial in known.values() for key in trial.params), *TITLES]))
    columns = {i: uncut(header[i], names) for i in range(len(header))
               if plain[i] not in ("trialname", "status", "loc") and i < min(metrics, default=len(header))}
    if len(set(columns.values())) < len(columns):  # two of one last part: keep their whole names
        columns = {i: header[i] for i in columns}
    for row in rows:
        cell = dict(zip(plain, row))
        name = cell["trialname"]
        if name not in known and ("..." in name or "…" in name):
            bare = name.replace("…", "...")
            found = [full for full in known if full.endswith(bare.split("...")[-1]) and full.startswith(bare.split("...")[0])]
            name = found[0] if len(found) == 1 else name
        trial = run.trials.setdefault(name, known.get(name) or Trial(name))
        trial.params |= {columns[i]: value_of(row[i]) for i in columns}
        epochs = value_of(cell.get("iter", ""))
        epochs = epochs if isinstance(epochs, int) else 0
        if epochs >= trial.epochs:  # a table in the middle of the log may be older than the reports
            trial.epochs = epochs
            trial.last = number_or(value_of(cell.get("eval_loss", "")))
            trial.runtime = finite_or_none(value_of(cell.get("totaltime(s)", "")))
        if trial.status in ("", "running", "pending", "paused"):
            trial.status = {"ERROR": "FAILED", "TERMINATED": "ended"}.get(cell["status"], cell["status"].lower())
    return True


def read_event(run, name, what, rest, second):
    """Puts one line about a trial into run.trials."""
    if name.startswith("FAILED "):
        return  # the list at the end; the trial's own line came before
    trial = run.trials.setdefault(name, Trial(name))
    if what == "started":
        trial.start = second
        words = re.split(r"\s{2,}", rest or "")
        trial.params |= {key: value_of(value) for key, _, value in (word.partition(" ") for word in words if word)}
    elif what == "epoch":
        if report := REPORT.match(rest or ""):
            trial.reports.append((float(report[1]), float(number_or(value_of(report[2]), math.nan))))
            trial.epochs = max(trial.epochs, round(float(report[1])))
            trial.at[float(report[1])] = None if trial.start is None else second - trial.start
    else:
        trial.end = second
        trial.status = {"finished": "finished", "stopped": "stopped by ASHA", "ended": "diverged"}.get(what, "FAILED")
        if what == "FAILED":
            trial.cause = rest or ""
        elif what == "ended":
            trial.cause = (rest or "").removeprefix("diverged ") + ": the loss was no number any more"


def read_manual(run, kind, words, cause):
    """Puts a RESULT or FAILED line of the manual grid into run.trials; a combination that ran twice counts once."""
    values = {key: value_of(value) for key, _, value in (word.partition("=") for word in words.split())}
    loss, epoch, runtime = (finite_or_none(values.pop(key, None)) for key in ("eval_loss", "epoch", "runtime_s"))
    name = " ".join(f"{key}={value}" for key, value in values.items())
    trial = run.trials.setdefault(name, Trial(name))
    trial.params |= values
    trial.status, trial.cause, trial.runtime = "finished" if kind == "RESULT" else "FAILED", cause or "", runtime
    trial.last = loss
    if loss is not None and not trial.reports:
        trial.reports = [(epoch or 0, loss)]
    trial.epochs = max(trial.epochs, run.number("NUM_EPOCHS", epoch or 0)) if kind == "RESULT" else trial.epochs
    run.manual = True


def read_best(text):
    """The line under "Best Trial Result:" as {"eval_loss", "epoch", "time_total_s", "params"}, or None."""
    try:
        found = ast.literal_eval(text) if len(text) < 20_000 else None
        params = found["config"].get("train_loop_config", found["config"])
        best = {key: finite_or_none(found.get(key)) for key in ("eval_loss", "epoch", "time_total_s")}
        return best | {"params": dict(params)} if best["eval_loss"] is not None else None
    except (ValueError, SyntaxError, TypeError, KeyError, AttributeError, RecursionError, MemoryError):
        return None


def parse_log(path):
    """The log of a head job or of the manual grid as a Run. Raises NotALog."""
    lines = read_text(path)
    run, earlier, block, in_settings, ours, role = Run(str(path)), {}, [], False, False, ""
    midnight, clock = 0, None
    for number, line in enumerate([*lines, ""]):
        boxed = line[:1] in ("+", "|", "╭", "│", "├", "╰", "╞") and (block or line[0] in "+╭")
        if block and not (boxed and not (line[0] in "+╭" and block[-1][0] in "+╰")):  # it ends, or the next one begins
            if read_table(run, block, earlier | run.trials):
                run.has_table = ours = True
            block = []
        if boxed:
            block.append(line)
            continue
        if banner := BANNER.search(line):
            try:
                moment = datetime.datetime.fromisoformat(banner[3])
            except ValueError:
                continue
            if banner[2] == "START":
                if run.start:  # Slurm has run the job again: the newest counts
                    earlier |= {name: trial for name, trial in run.trials.items()}
                    for trial in earlier.values():
                        trial.start = trial.end = None
                    run = Run(str(path), notes=["the log holds several runs of the job; this is the last one"])
                run.job, run.start, run.zones = banner[1], moment, (banner[4], banner[4])
                midnight, clock = 0, None
            elif run.start:
                run.finish, run.zones = moment, (run.zones[0], banner[4])
        elif stamped := CLOCK.match(line):
            role, text = stamped[4], stamped[5]
            second = int(stamped[1]) * 3600 + int(stamped[2]) * 60 + int(stamped[3])
            if clock is None:
                first = run.start.hour * 3600 + run.start.minute * 60 + run.start.second if run.start else second
                clock = first
            if second + midnight - clock < -43200:
                midnight += 86400
            clock = max(clock, second + midnight)
            run.now = clock - first
            ours = ours or role in ("search", "head", "manual")
            in_settings = "settings" in text and text.rstrip().endswith(":")
            if role in ("search", "manual"):
                if event := EVENT.match(text):
                    read_event(run, event[1], event[2], event[3], run.now)
                    if role == "manual":  # the name is the combination
                        words = (word.partition("=") for word in event[1].split())
                        run.trials[event[1]].params |= {key: value_of(value) for key, _, value in words}
                elif cluster := CLUSTER.match(text):
                    run.slots, run.on_gpus, run.cluster_at = float(cluster[1]), cluster[3] == "GPUs", run.now
            elif joined := JOINED.search(text):
                run.nodes.append((run.now, int(joined[2]), int(joined[3])))
            elif ended := re.match(r"ended with exit status (\d+)", text):
                run.exit_status = int(ended[1])
        elif in_settings and (setting := SETTING.match(line)):
            run.settings[setting[1]] = (setting[2] or "").strip()
        elif line.startswith("Best Trial Result:"):
            following = next((text for text in lines[number + 1 : number + 4] if text), "")
            run.best = read_best(following) or run.best
        elif result := MANUAL.match(line):
            read_manual(run, result[1], result[2], result[3])
            ours = True
        elif line == GRID_CSV:  # the grid's file at the end of its log: also results of earlier jobs
            for row in csv.DictReader([line, *itertools.takewhile(re.compile(r"[\d.e+-]+,\d").match, lines[number + 1 :])]):
                read_manual(run, "RESULT", " ".join(f"{key}={value}" for key, value in row.items() if key and value), "")
        elif gpus := re.match(r"GPUs: (\d+)$", line):
            run.manual_gpus = int(gpus[1])
    if role == "worker" and not ours:
        raise NotALog(f"{path}: is the log of a worker job; give the head's, logs/ray_head_bloom_5epochs-<jobid>.out")
    if not ours and not run.start:
        raise NotALog(f"{path}: is not the log of a search (no START line, no table of trials); give logs/ray_head_bloom_5epochs-<jobid>.out")
    run.manual = run.manual or role == "manual"
    return settle(run)


def parse_csv(path):
    """The CSV of the manual grid (lr, per_device_bs, wd, eval_loss, epoch, runtime_s) as a Run. Raises NotALog."""
    run = Run(str(path), job=path.stem, manual=True, notes=["a CSV has no START and FINISH, no settings and no number of GPUs"])
    for row in csv.DictReader(line for line in read_text(path) if line):
        if not {"lr", "eval_loss", "runtime_s"} <= set(row):
            raise NotALog(f"{path}: is not the CSV of the manual grid (columns lr, per_device_bs, wd, eval_loss, epoch, runtime_s)")
        read_manual(run, "RESULT", " ".join(f"{key}={value}" for key, value in row.items() if key and value), "")
    return settle(run)


def parse_folder(folder):
    """A run folder (runs/<jobid>) as a Run: values from tune/*/result.json, the rest from the job's log if it is there.

    Raises NotALog if the folder holds no trial.
    """
    log = folder.resolve().parent.parent / "logs" / f"ray_head_bloom_5epochs-{folder.resolve().name}.out"
    run = parse_log(log) if log.is_file() else Run(str(folder), job=folder.resolve().name)
    found = sorted(folder.glob("tune/*/params.json"))
    if not found:
        raise NotALog(f"{folder}: is no run folder (no tune/<trial>/params.json in it); give runs/<jobid>, or a log")
    run.source = str(folder)
    if not log.is_file():
        run.notes.append(f"without the log {log.name}: no job times, and ends are told by the number of epochs")
    for path in found:
        trial = run.trials.setdefault(path.parent.name, Trial(path.parent.name))
        try:
            params = json.loads(path.read_text(encoding="utf-8"))
            result = path.with_name("result.json")
            text = result.read_text(encoding="utf-8") if result.is_file() else ""
            rows = [json.loads(line) for line in text.split("\n") if line.endswith("}")]  # not one half written
            trial.params = dict(params.get("train_loop_config", params))
            trial.reports = [(float(row["epoch"]), float(row["eval_loss"])) for row in rows if "eval_loss" in row]
            if rows:
                trial.last, trial.epochs, trial.runtime = trial.reports[-1][1], rows[-1]["training_iteration"], rows[-1]["time_total_s"]
                trial.at = {float(row["epoch"]): row["time_total_s"] for row in rows}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            run.notes.append(f"{path.parent.name}: its results cannot be read ({type(error).__name__}); values are those of the log")
        error_file = path.with_name("error.txt")
        if error_file.is_file() and not trial.cause:
            lines = [line.strip() for line in error_file.read_text(errors="replace").split("\n") if line.strip()]
            trial.status, trial.cause = "FAILED", NOT_TEXT.sub("", lines[-1])[:200] if lines else "unknown"
        if not log.is_file():
            trial.status = trial.status or "ended"
    return settle(run)


def parse(text):
    """An input of the command line as a Run. Raises NotALog."""
    path = Path(text)
    return parse_folder(path) if path.is_dir() else parse_csv(path) if path.suffix == ".csv" else parse_log(path)


def settle(run):
    """Fills in what follows from the rest: ends, numbers and order of trials, the best result, the job's seconds."""
    if run.finish:
        run.now = (run.finish - run.start).total_seconds()
        if run.zones[0] != run.zones[1]:
            offsets = [re.fullmatch(r"([+-]\d\d):?(\d\d)?", zone) for zone in run.zones]
            if all(offsets):
                minutes = [int(o[1]) * 60 + int(o[1][0] + (o[2] or "0")) for o in offsets]
                run.now -= (minutes[1] - minutes[0]) * 60
            else:
                run.notes.append(f"the clock was changed while the job ran ({run.zones[0]} to {run.zones[1]}): times may be an hour off")
    trials = list(run.trials.values())
    full = run.number("NUM_EPOCHS", max((trial.epochs for trial in trials), default=0))
    for trial in trials:
        losses = [loss for _, loss in trial.reports] or ([trial.last] if trial.last is not None else [])
        if trial.status == "ended":
            bad = losses and not math.isfinite(losses[-1])
            trial.status = "diverged" if bad else "finished" if trial.epochs >= full else "stopped by ASHA"
            trial.cause = trial.cause or (f"at epoch {trial.epochs}: the loss was no number any more" if bad else "")
        elif trial.status in ("", "running", "pending", "paused"):
            waiting = trial.status in ("pending", "paused") and trial.start is None
            ended = "not started" if waiting else "cut off"
            trial.status = ended if run.finish else "pending" if waiting else "running"
        trial.last = trial.last if trial.last is not None or not losses else losses[-1]
        if trial.status in ("running", "cut off") and trial.start is not None:
            trial.runtime = None  # the table's is older than the log's last line
    digits = [re.search(r"_(\d+)$", trial.name) for trial in trials]
    numbers = [int(match[1]) for match in digits if match]
    numbered = len(set(numbers)) == len(trials) and not run.manual
    for position, trial in enumerate(trials):
        trial.id = str(numbers[position] if numbered else position)
    run.trials = {trial.name: trial for trial in sorted(trials, key=lambda trial: int(trial.id))}
    settle_best(run)
    return run


def settle_best(run):
    """The best result: the log's own line, else the lowest loss of all reports of trials that did not fail."""
    candidates = [(*min(t.finite()), t) for t in run.trials.values() if t.finite() and t.status != "FAILED"]
    best = min(candidates, key=lambda c: c[0], default=None)
    if run.best:
        def same(a, b):
            number = isinstance(a, (int, float)) and isinstance(b, (int, float))
            return math.isclose(a, b, rel_tol=1e-2) if number else str(a) == str(b)

        near = [t for loss, _, t in candidates if math.isclose(loss, run.best["eval_loss"], rel_tol=1e-4, abs_tol=1e-5)]
        near = [t for t in near if all(same(v, run.best["params"].get(k)) for k, v in t.params.items())] or near
        run.best["trial"] = near[0] if near else None
    elif best:
        loss, epoch, trial = best
        seconds = trial.runtime if epoch == trial.epochs and trial.runtime is not None else trial.at.get(epoch)
        run.best = {"eval_loss": loss, "epoch": epoch, "time_total_s": seconds, "params": trial.params, "trial": trial}


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


def trials_at_once(run):
    """Trials in flight: what the nodes offered, else what the log shows, at least 1."""
    edges = sorted((edge, step) for t in run.trials.values() if t.start is not None
                   for edge, step in ((t.start, 1), (run.now if t.end is None else t.end, -1)))
    running = most = 0
    for _, step in edges:
        running += step
        most = max(most, running)
    return int(sum(slots for _, _, slots in run.nodes) or run.slots or most or 1)


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
        amount = sum(gpus if run.on_gpus else slots for _, gpus, slots in run.nodes)
        allocated = sum((run.now - joined) * (gpus if run.on_gpus else slots) for joined, gpus, slots in run.nodes)
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
def show(value):
    """A value for a table: six significant digits, as Ray's own table has; "-" for nothing."""
    return "-" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def hms(seconds):
    """Seconds as h:mm:ss."""
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def further_names(runs):
    """Names of hyperparameters beyond the exercise's three, in order of appearance."""
    return list(dict.fromkeys(name for run in runs for t in run.trials.values() for name in t.params if name not in TITLES))


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
        since = "by START and FINISH" if run.manual else f"from the line '{'joined' if run.nodes else 'cluster:'}' to {until}"
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
# Pictures: for paper of A4 width, at least 8 pt, told apart without colour
# ======================================================================================================================
def best_losses(run):
    """[(trial, lowest loss)] of the trials that have one."""
    return [(trial, trial.best()) for trial in run.trials.values() if trial.finite()]


def pictures(run, folder):
    """Writes loss.png, slots.png and learning_rate.png into folder; one without data says so. -> [(path, caption)]"""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcdefaults()
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
                         "savefig.dpi": 200, "legend.frameon": False, "figure.constrained_layout.use": True})
    captions = {
        draw_loss: "Loss against epoch, one line a trial. A cross marks the rung at which ASHA stopped the trial.",
        draw_slots: "Trials on slots over time. Numbers are combo ids; white is idle.",
        draw_learning_rate: "Learning rate against the lowest loss of each trial. Numbers are combo ids.",
    }
    made = []
    for draw, caption in captions.items():
        figure, axes = plt.subplots(figsize=(7, 4))  # inches: the text width of A4
        if draw(run, axes):
            figure.legend(loc="outside upper left", ncols=2 if draw is draw_learning_rate else 4)
        else:
            figure.set_figheight(1)
            axes.set_axis_off()
            axes.text(0.5, 0.5, "nothing to show yet: the log does not have these values", ha="center")
        path = folder / f"{draw.__name__.removeprefix('draw_')}.png"
        figure.savefig(path)
        plt.close(figure)
        made.append((path, caption))
    return made


def loss_axis(axes, losses):
    """The loss upwards; logarithmic if the values span a factor of 8."""
    axes.set_ylabel("eval loss")
    if min(losses) > 0 and max(losses) > 8 * min(losses):
        log_axis(axes.yaxis, "eval loss (log)")


def log_axis(axis, label):
    """A logarithmic axis with plain numbers at 1, 2, 5, 10, ..."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_label_text(label)
    (axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale)("log")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def draw_loss(run, axes):
    """Picture (a). -> is there anything to draw?"""
    trials = best_losses(run)
    if not trials:
        return False
    best, few, used, ends = run.best and run.best.get("trial"), len(trials) <= 40, set(), []
    marks = {"finished": ("o", "ran all epochs"), "stopped by ASHA": ("X", "stopped by ASHA"),
             "diverged": ("^", "diverged"), "FAILED": ("v", "FAILED")}
    loss_axis(axes, [loss for t, _ in trials for loss, _ in t.finite()])
    max_t = run.number("NUM_EPOCHS", max(t.epochs for t, _ in trials))
    for rung in [2**k for k in range(20) if 2**k < max_t and not run.manual]:
        axes.axvline(rung, color="0.7", linewidth=0.8, linestyle=":", label="rung of ASHA" if rung == 1 else None)
    for t, _ in sorted(trials, key=lambda pair: pair[0] is best):
        points = sorted((epoch, loss) for loss, epoch in t.finite())
        mark, label = marks.get(t.status, ("s", "running, or cut off"))
        look = {"color": "black", "linewidth": 2.4, "label": f"best: combo {t.id}"} if t is best else {
            "color": "0.55", "linewidth": 1 if few else 0.4}
        axes.plot(*zip(*points), **look)
        axes.plot(*points[-1], mark, color="black" if t is best else "0.35", markeredgecolor="white",
                  markeredgewidth=0.5, markersize=6 if few else 3, label=None if label in used else label)
        used.add(label)
        ends.append((*points[-1], t.id, "bold" if t is best else "normal"))
    axes.set_xlabel("epoch")
    axes.set_xticks(range(1, max_t + 1) if max_t <= 20 else [2**k for k in range(20) if 2**k <= max_t])
    axes.set_xlim(min(0.9, *axes.get_xlim()), max_t + 0.04 * max_t + 0.15)
    axes.margins(y=0.08)
    if few:
        name_ends(axes, ends)
    return True


def name_ends(axes, ends):
    """Combo ids beside the ends of lines, pushed apart where they would overlap. ends: (x, y, text, weight)"""
    axes.figure.draw_without_rendering()  # so that heights on paper are known
    points = 72 / axes.figure.dpi
    for x in {end[0] for end in ends}:
        column = sorted(end for end in ends if end[0] == x)
        true = [axes.transData.transform(end[:2])[1] * points for end in column]
        place = list(true)
        for _ in range(200):  # neighbours nearer than a line's height push each other away
            for i in range(len(place) - 1):
                push = max(0, 9.5 - place[i + 1] + place[i]) / 2
                place[i], place[i + 1] = place[i] - push, place[i + 1] + push
        for (_, y, text, weight), old, new in zip(column, true, place):
            line = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3} if abs(new - old) > 2 else None
            axes.annotate(text, (x, y), xytext=(13 if line else 7, new - old), textcoords="offset points", va="center",
                          fontsize=8, weight=weight, arrowprops=line)


def on_slots(run):
    """Bars (slot, trial, start, end), and the second from which on each slot is there; times in s from START.

    The log does not say on which slot a trial ran: each takes the first that is free.
    """
    since = [joined for joined, _, slots in run.nodes for _ in range(slots)] or [run.cluster_at] * int(run.slots or 0)
    free, bars = list(since), []
    timed = [(t.start, run.now if t.end is None else t.end, t) for t in run.trials.values() if t.start is not None]
    for start, end, trial in sorted(timed, key=lambda bar: bar[0]):
        slot = next((i for i, moment in enumerate(free) if moment <= start + 1.5), len(free))  # the clock has whole seconds
        if slot == len(free):
            free.append(0)
            since.append(start)
        free[slot] = end
        bars.append((slot, trial, start, end))
    return bars, since


def draw_slots(run, axes):
    """Picture (b). -> is there anything to draw?"""
    bars, since = on_slots(run)
    if not bars:
        return False
    best, few, used = run.best and run.best.get("trial"), len(bars) <= 60, set()
    looks = {"finished": ("0.6", ""), "stopped by ASHA": ("0.88", ""), "diverged": ("white", "...."), "FAILED": ("white", "xxxx")}
    axes.figure.set_figheight(min(9, 1.5 + 0.4 * len(since)))
    for slot, moment in enumerate(since):
        axes.barh(slot, (run.now - moment) / 60, left=moment / 60, color="white", edgecolor="0.5", linewidth=0.6, linestyle=":")
    for slot, trial, start, end in bars:
        label = "best" if trial is best else trial.status if trial.status in looks else "running, or cut off"
        colour, hatch = {**looks, "best": ("0.1", "")}.get(label, ("0.75", "////"))
        axes.barh(slot, (end - start) / 60, left=start / 60, color=colour, hatch=hatch, edgecolor="black",
                  linewidth=0.6 if few else 0.2, label=None if label in used else label)
        used.add(label)
        if few and end - start > run.now * 0.014 * len(trial.id):
            axes.text((start + end) / 120, slot, trial.id, ha="center", va="center", fontsize=8, color="white" if trial is best else "black",
                      bbox={"facecolor": "white", "edgecolor": "none", "pad": 1} if hatch else None)
    axes.set_xlim(0, max(run.now, 1) / 60)
    axes.set_ylim(len(since) - 0.4, -0.6)
    axes.set_yticks(range(0, len(since), 1 + len(since) // 20), range(1, len(since) + 1, 1 + len(since) // 20))
    axes.set_ylabel("slot")
    axes.set_xlabel(f"minutes from START to {'FINISH' if run.finish else 'the last line of the log'}")
    return True


def classes(values, most):
    """Sorts values into at most `most` classes -> (class of each value, name of each class)."""
    distinct = sorted(set(values), key=lambda v: (isinstance(v, str), v))
    if len(distinct) <= most:
        return [distinct.index(v) for v in values], [show(v) for v in distinct]
    middle = len(distinct) // 2
    return [int(distinct.index(v) >= middle) for v in values], [f"below {show(distinct[middle])}", f"from {show(distinct[middle])}"]


def draw_learning_rate(run, axes):
    """Picture (c). -> is there anything to draw?"""
    points = [(t, loss) for t, loss in best_losses(run) if number_or(t.params.get("lr")) is not None]
    if not points:
        return False
    loss_axis(axes, [loss for _, loss in points])
    axes.set_xlabel("learning rate")
    if min(t.params["lr"] for t, _ in points) > 0:
        log_axis(axes.xaxis, "learning rate (log)")
    shape, shapes = classes([number_or(t.params.get("per_device_bs"), "-") for t, _ in points], 6)
    fill, fills = classes([number_or(t.params.get("wd"), "-") for t, _ in points], 3)
    few, best = len(points) <= 60, run.best and run.best.get("trial")
    for i, j in sorted(set(zip(shape, fill))):
        here = [point for point, *ij in zip(points, shape, fill) if ij == [i, j]]
        axes.plot([t.params["lr"] for t, _ in here], [loss for _, loss in here], "os^Dv*"[i], fillstyle=("none", "full", "left")[j], color="black",
                  markerfacecoloralt="white", markersize=8 if few else 4, label=f"batch size {shapes[i]}, weight decay {fills[j]}")
        for t, loss in here if few else []:
            axes.annotate(t.id + (" (best)" if t is best else ""), (t.params["lr"], loss), xytext=(6, 4), textcoords="offset points", fontsize=8)
    return True


# ======================================================================================================================
# report.html
# ======================================================================================================================
def what_mattered(run):
    """How much of the loss each hyperparameter explains on its own. -> (rows, number of trials, epoch compared at)

    All trials are compared at the first epoch, which all have trained. Rows: name, Spearman's rank correlation (None
    for words), share of the variance of the loss's rank that is explained by a parabola in the hyperparameter's rank
    (by group means if it has 2 or 3 values or words), the share that shuffled losses reach in one of 20 cases, and p: how
    often they give as large a share. A diverged trial counts as the worst. Needs 5 trials; else no rows.
    """
    import numpy as np

    def ranks(values):
        _, place, count = np.unique(np.array(values), return_inverse=True, return_counts=True)
        return (np.cumsum(count) - (count - 1) / 2)[place]

    first = [(t, min(t.reports)) for t in run.trials.values() if t.reports and t.status != "FAILED"]
    epoch = min((epoch for _, (epoch, _) in first), default=1)
    first = [(t, loss if math.isfinite(loss) else math.inf) for t, (e, loss) in first if e == epoch or not math.isfinite(loss)]
    rows = []
    if len(first) < 5 or len({loss for _, loss in first}) < 2:
        return rows, len(first), epoch
    target = ranks([loss for _, loss in first])
    target = target - target.mean()
    shuffled = np.random.default_rng(0).permuted(np.tile(target, (2000, 1)), axis=1)
    for name in [n for n in TITLES if any(n in t.params for t, _ in first)] + further_names([run]):
        values = [t.params.get(name) for t, _ in first]
        numeric = all(isinstance(v, (int, float)) and math.isfinite(v) for v in values)
        distinct = sorted(set(values if numeric else map(str, values)))
        if not 2 <= len(distinct) < len(first) + numeric:
            continue
        x = ranks(values if numeric else list(map(str, values)))
        x = (x - x.mean()) / x.std()
        design = np.stack([x, x**2], 1) if numeric and len(distinct) > 3 else np.equal.outer(x, np.unique(x))[:, 1:].astype(float)
        base, _ = np.linalg.qr(design - design.mean(0))
        share = ((target @ base) ** 2).sum() / (target**2).sum()
        chance = ((shuffled @ base) ** 2).sum(1) / (target**2).sum()
        rho = float(x @ target / np.sqrt((x**2).sum() * (target**2).sum())) if numeric else None
        p = float((1 + (chance >= share - 1e-12).sum()) / 2001)
        rows.append((name, rho, float(share), float(np.quantile(chance, 0.95)), p))
    return sorted(rows, key=lambda row: row[-1]), len(first), epoch


def parallel_coordinates(run):
    """A chart of all trials with a loss as HTML (plotly, its JavaScript inside), or "" if there is none.

    Drawn as lines in SVG: unlike plotly's Parcoords it needs no WebGL, shows values under the pointer, and prints.
    """
    import plotly.graph_objects as go

    trials = best_losses(run)
    names = [name for name in [*TITLES, *further_names([run])] if any(name in t.params for t, _ in trials)]
    if not trials:
        return ""
    columns = {TITLES.get(name, name): [t.params.get(name) for t, _ in trials] for name in names}
    columns |= {"epochs": [t.epochs for t, _ in trials], "best eval loss": [loss for _, loss in trials]}
    figure, heights = go.Figure(), []
    for place, (name, values) in enumerate(columns.items()):
        numeric = all(isinstance(v, (int, float)) and math.isfinite(v) for v in values)
        distinct = sorted(set(values if numeric else map(str, values)))
        if numeric and len(distinct) > 6:
            log = min(values) > 0 and max(values) > 8 * min(values)
            scale = math.log10 if log else float
            low, high = scale(min(values)), scale(max(values))
            height = [(scale(v) - low) / (high - low) for v in values]
            marks = [low + (high - low) * i / 4 for i in range(5)]
            if log:
                marks = [float(f"{m}e{k}") for k in range(math.floor(low), math.ceil(high)) for m in (1, 2, 5)]
            ticks = [((scale(v) - low) / (high - low), f"{v:.3g}") for v in marks if low <= scale(v) <= high]
            name += " (log)" if log else ""
        else:  # few values: lines are spread a little around each
            step = max(1, len(distinct) - 1)
            index = [distinct.index(v if numeric else str(v)) for v in values]
            height = [(i + (0.16 * (k / max(1, len(values) - 1) - 0.5) if len(distinct) > 1 else 0)) / step for k, i in enumerate(index)]
            ticks = [(i / step, show(v)[:24]) for i, v in enumerate(distinct)][:: max(1, len(distinct) // 12)]
        heights.append(height)
        figure.add_shape(type="line", x0=place, x1=place, y0=-0.08, y1=1.08, line={"color": "#888", "width": 1})
        for y, text in ticks:
            figure.add_annotation(x=place, y=y, text=html.escape(text), showarrow=False, xanchor="right", xshift=-9,
                                  bgcolor="white", font={"size": 12})
        figure.add_annotation(x=place, y=1.17, text=f"<b>{html.escape(name)}</b>", showarrow=False)
    best = run.best and run.best.get("trial")
    groups = {"stopped by ASHA": ("#999", 1.5, "dash"), "diverged": ("#c60", 1.5, "dot"),
              "FAILED": ("#c60", 1.5, "dashdot"), "other": ("#777", 1.5, "longdash"),
              "finished": ("#05a", 2, "solid"), "best": ("#000", 4, "solid")}
    for group, (colour, width, dash) in groups.items():
        x, y, text = [], [], []
        for k, (t, _) in enumerate(trials):
            if group != ("best" if t is best else t.status if t.status in groups else "other"):
                continue
            words = [f"combo {t.id}: {t.status}"] + [f"{name}: {show(values[k])}" for name, values in columns.items()]
            x += [*range(len(columns)), None]
            y += [*(height[k] for height in heights), None]
            text += ["<br>".join(map(html.escape, words))] * len(columns) + [""]
        if x:
            figure.add_trace(go.Scatter(x=x, y=y, text=text, hoverinfo="text", mode="lines+markers", name=group, marker={"size": 5},
                                        line={"color": colour, "width": width, "dash": dash}))
    figure.update_layout(template="none", height=430, margin={"l": 70, "r": 20, "t": 20, "b": 20}, legend={"orientation": "h", "y": -0.05}, showlegend=True,
                         font={"family": "sans-serif", "size": 13}, hovermode="closest", dragmode=False)
    figure.update_xaxes(visible=False, range=[-0.45, len(columns) - 0.7], fixedrange=True)
    figure.update_yaxes(visible=False, range=[-0.1, 1.24], fixedrange=True)
    return figure.to_html(full_html=False, include_plotlyjs=True, div_id="parallel", config={"displayModeBar": False, "responsive": True})


REPORT_STYLE = """body{font:16px/1.45 sans-serif;max-width:1160px;margin:2em auto;padding:0 1em;color:#111;background:#fff}
table{border-collapse:collapse;margin:.6em 0}th,td{border:1px solid #999;padding:.25em .7em;text-align:left}th{background:#eee}
td{font-variant-numeric:tabular-nums;overflow-wrap:break-word;max-width:22em}figure{margin:1.2em 0}figure img{width:100%;max-width:900px}.wide{overflow-x:auto}
@media print{body{font-size:10pt;max-width:none;margin:0}h2{break-after:avoid}figure,tr,#parallel{break-inside:avoid}#parallel{zoom:.6}}"""


def report(run, images):
    """report.html as text: tables, pictures, parallel coordinates, what mattered. It loads nothing from anywhere."""
    import base64

    def table(header, rows):
        lines = ["".join(f"<td>{html.escape(text)}</td>" for text in row) for row in rows]
        head = "".join(f"<th>{html.escape(text)}</th>" for text in header)
        return f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{''.join(f'<tr>{line}</tr>' for line in lines)}</tbody></table></div>"

    body = [f"<h1>Search {html.escape(run.job)}</h1>"]
    for title, header, rows, below in sections(run):
        body += [f"<h2>{html.escape(title)}</h2>", table(header, rows) if header else "", *(f"<p>{html.escape(line)}</p>" for line in below)]
    body.append("<h2>Pictures</h2>")
    for path, caption in images:
        data = base64.b64encode(path.read_bytes()).decode()
        body.append(f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,{data}"><figcaption>{html.escape(caption)}</figcaption></figure>')
    body.append("<h2>Parallel coordinates</h2>" + (parallel_coordinates(run) or "<p>No trial has reported a loss.</p>"))
    rows, n, epoch = what_mattered(run)
    body.append("<h2>Which hyperparameter mattered</h2>")
    if rows:
        shown = [[TITLES.get(name, name), "-" if rho is None else f"{rho:+.2f}", f"{100 * share:.0f} %", f"{100 * chance:.0f} %", f"{p:.3f}"]
                 for name, rho, share, chance, p in rows]
        body.append(table(["hyperparameter", "Spearman's rho", "share explained", "chance alone gives up to", "p"], shown))
        body.append(
            f"<p>Each hyperparameter on its own, {n} trials, all compared at epoch {epoch:g}, which all have trained. rho: rank "
            "correlation with the loss; negative means that larger is better. It misses a best value in the middle, so the second "
            "column fits a parabola to the ranks (group means, where there are only two or three values). Losses shuffled among "
            "the trials give the shares of the third column in one of 20 cases; p: how often they give as large a share.</p>"
            f"<p>{f'{n} trials are weak evidence. ' if n < 50 else ''}A p above 0.05 means: not shown to matter, which is not "
            "the same as does not matter. And what matters at an early epoch need not matter at the last.</p>")
    else:
        body.append("<p>Fewer than five trials with different losses: nothing can be said.</p>")
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"  # the browser refuses any request
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
            f'<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,"><title>Search {html.escape(run.job)}</title>'
            f"<style>{REPORT_STYLE}</style></head><body>\n" + "\n".join(body) + "\n</body></html>\n")


# ======================================================================================================================
# Main
# ======================================================================================================================
def main():
    """Returns the exit status: 0, or 2 if an input is no such log or a file cannot be written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", metavar="LOG_OR_RUN_FOLDER", help="log of a head job, run folder, or log or CSV of the manual grid")
    parser.add_argument("--csv", metavar="FILE", help="write the trials, one row each")
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
        if a.json:
            Path(a.json).write_text(json.dumps([as_json(run) for run in runs], indent=1, allow_nan=False, default=str) + "\n", encoding="utf-8")
        for run in runs if a.plots else []:
            folder = a.plots / re.sub(r"[^\w.-]", "_", run.job) if len(runs) > 1 else a.plots
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "report.html").write_text(report(run, pictures(run, folder)), encoding="utf-8")
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
