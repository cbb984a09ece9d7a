"""An input of fill_tables.py as a Run: a run folder, or a log, which leads to its run folder by the job's id.

Of a log whose run folder is not there: what the course's three tables need, from START and FINISH, the settings, Ray's
boxed table and the best line, or from the results of the manual grid. Text of a log is never run as code.
"""

import ast
import contextlib
import itertools
import json
import re
import time
from datetime import datetime
from pathlib import Path

from read_run import DAMAGE, TITLES, as_run, events_of, show

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
EXERCISES = (EXPERIMENTS / "raytune/scheduler/asha", EXPERIMENTS / "manual")
EXAMPLE = "logs/ray_head_bloom_5epochs-<jobid>.out"
MAX_BYTES = 200_000_000  # of a log; a real one has some 10 kB
BANNER = re.compile(r"===== JOB (\S+) (START|FINISH) *: ((\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) ?.*?) =====$")
ROLE = re.compile(r"\d\d:\d\d:\d\d ([a-z]+)(?: \S+)? \| ")
SETTING = re.compile(r"  ([A-Z][A-Z0-9_]*) +(\S.*)$")
STATUS = re.compile(r".* \| ended with exit status (\d{1,3})$")
COMBINATION = re.compile(r"(RESULT|FAILED|.* manual .*\|) lr=(\S+) per_device_bs=(\S+) wd=(\S+) *(.*)")
RESULT = re.compile(r"eval_loss=(\S+) epoch=(\d+) runtime_s=(\S+)")
OF_RAY, REPORTED = ("Trialname", "status", "loc"), ("eval_loss", "iter", "totaltime(s)")  # titles of the boxed table
ROW = re.compile(r"([\d.e+-]+),(\d+),([\d.e+-]+),([\d.e+-]+),(\d+),([\d.]+)$")  # of the CSV at the end of a grid's log


class NotALog(Exception):
    """The input is no log of this exercise and no run folder; the message is one line that says why."""


def parse(text, exit_status=None):
    """An input of the command line as a Run; with an exit status it finishes now. Raises NotALog."""
    path = Path(text)
    lines = [] if path.is_dir() else read_lines(path)
    folder = path if path.is_dir() else folder_of(path, lines)
    events = events_of(folder) if folder else events_of_log(lines)
    if not events:
        why = "is not a run folder (no events.jsonl)" if folder else "is not the log of a search (no START, no table)"
        raise NotALog(f"{path}: {why}; give runs/<jobid> or {EXAMPLE}")
    if exit_status is not None:
        finish = time.strftime("%Y-%m-%d %H:%M:%S %Z")
        events.append({"time": time.time(), "event": "finished", "status": exit_status, "finish": finish})
    run = as_run(path, events, folder)
    if folder:
        with contextlib.suppress(OSError, *DAMAGE):  # save_best.slurm writes it, later
            run.scores = dict(json.loads((folder / "scores.json").read_text(encoding="utf-8")))
    return run


def read_lines(path):
    """The lines of a log. Raises NotALog if it is missing, empty, binary, huge, or that of another job."""
    try:
        size = path.stat().st_size
        data = path.read_bytes() if size <= MAX_BYTES else b"..."
    except OSError as error:
        raise NotALog(f"{path}: cannot be read ({error.strerror})") from None
    lines = data.decode("utf-8-sig", errors="replace").splitlines()
    roles = roles_of(lines)
    for wrong, why in (
        (size > MAX_BYTES, f"is larger than {MAX_BYTES // 10**6} MB, so not the log of a search"),
        (not data.strip(), "is empty; wait until the job has started, or give another log"),
        (b"\0" in data, "is binary, not a log"),
        (roles == {"worker"}, f"is the log of a worker job; give the head's, {EXAMPLE}"),
        (roles and not roles & {"head", "search", "manual"}, f"is not the log of a search; give {EXAMPLE}"),
    ):
        if wrong:
            raise NotALog(f"{path}: {why}")
    return lines


def roles_of(lines):
    """Who has written lines of a log: head, search, manual, worker, ..."""
    return {found[1] for found in map(ROLE.match, lines) if found}


def folder_of(log, lines):
    """The run folder of a log's job: runs/<job>, or that of a run which it continued; None: not here."""
    starts = {(found[1], found[3]) for found in map(BANNER.match, lines) if found and found[2] == "START"}
    for exercise in (log.absolute().parent.parent, *EXERCISES):  # not resolved: runs/ may be a link to another disk
        for folder in (*(exercise / "runs" / job for job, _ in starts), *sorted(exercise.glob("runs/*"))):
            if starts & {(event.get("job"), event.get("start")) for event in events_of(folder, "started")}:
                return folder  # both: a job's id can come again
    return None


# ---- A log alone -------------------------------------------------------------------------------------------
def events_of_log(lines):
    """What the lines tell, as events of a record."""
    kind, jobs, settings, status = "manual" if "manual" in roles_of(lines) else "search", [], {}, 0
    for line in lines:
        if banner := BANNER.match(line):
            with contextlib.suppress(ValueError):
                at = {"time": datetime.fromisoformat(f"{banner[4]}+00:00").timestamp()}
                if banner[2] == "START":
                    jobs.append(at | {"event": "started", "job": banner[1], "start": banner[3], "kind": kind})
                    status = 0
                elif jobs:
                    jobs.append(at | {"event": "finished", "status": status, "finish": banner[3]})
        elif setting := SETTING.match(line):
            settings[setting[1]] = setting[2]
        elif ended := STATUS.match(line):
            status = int(ended[1])
    start = {"time": jobs[0]["time"] if jobs else 0}
    trials = grid_of(lines) if kind == "manual" else search_of(lines)
    return jobs + [start | {"event": "settings"} | settings] * bool(jobs) + [start | event for event in trials]


def events_of_trial(name, config, loss, epoch, seconds, ended=True, error=None):
    """A trial of which one report is known. What is no number makes no report."""
    yield {"event": "trial_started", "trial": name, "config": config}
    yield {"event": "report", "trial": name, "eval_loss": loss, "epoch": epoch, "seconds": seconds, "decision": "STOP"}
    if ended:
        yield {"event": "trial_ended", "trial": name, "error": error}


def grid_of(lines):
    """The combinations of a manual grid, in the order of its log."""
    for line in lines:
        if row := ROW.match(line):  # may be a result of an earlier job
            (*values, loss, epoch, seconds), ended, error = row.groups(), True, None
        elif told := COMBINATION.match(line):
            kind, *values, rest = told.groups()
            result = RESULT.match(rest)
            loss, epoch, seconds = result.groups() if result else ("", "", "")
            ended, error = kind in ("RESULT", "FAILED") or " already" in rest, rest.lstrip(": ") * (kind == "FAILED")
        else:
            continue
        config = dict(zip(TITLES, map(number, values)))
        name = " ".join(f"{key}={value}" for key, value in config.items())
        yield from events_of_trial(name, config, loss, epoch, seconds, ended, error)


def search_of(lines):
    """The trials of the boxed table, and the report that the best line names."""
    configs = {}
    for row in table_of(lines):
        name, failed = row["Trialname"], row["status"] == "ERROR"
        drawn = itertools.takewhile(lambda title: title not in REPORTED, row)
        configs[name] = {title.rsplit("/", 1)[-1]: number(row[title]) for title in drawn if title not in OF_RAY}
        result = (row.get(title) for title in REPORTED)
        error = "see the log" if failed else None
        yield from events_of_trial(name, configs[name], *result, failed or row["status"] == "TERMINATED", error)
    with contextlib.suppress(SyntaxError, MemoryError, *DAMAGE):
        best = ast.literal_eval(lines[lines.index("Best Trial Result:") + 1])
        config = best["config"]["train_loop_config"]
        same = [name for name in configs if list(map(show, configs[name].values())) == list(map(show, config.values()))]
        yield from events_of_trial(same[0], config, best["eval_loss"], best["epoch"], best["time_total_s"])


def table_of(lines):
    """The rows of the last boxed table of trials, by titles without blanks; a title may stand on several lines."""
    edges, titles, rows, found = [], [], None, []
    for line in lines:
        cells = [line[a + 1 : b].strip() for a, b in itertools.pairwise(edges)]
        if line.startswith("+-"):
            edges, titles, rows = [i for i, char in enumerate(line) if char == "+"], [], None
        elif line.startswith("|-"):
            titles = ["".join(parts).replace(" ", "") for parts in zip(*titles)]
            rows = []
            found = rows if {"Trialname", "status"} <= set(titles) else found  # else Ray's list of error files
        elif line.startswith("|") and rows is None:
            titles.append(cells)
        elif line.startswith("|") and len(cells) == len(titles) > 1:
            rows += [dict(zip(titles, cells))] * bool(cells[1])
    return found


def number(text):
    """A cell as a number, if it is one."""
    try:
        return json.loads(text)
    except ValueError:
        return text
