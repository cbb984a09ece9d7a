"""An input of fill_tables.py as a Run: a run folder, or a log, which leads to its run folder by the job's id.

Of a search's log whose run folder is not there: what the course's three tables need, from START and FINISH, the
settings, Ray's boxed table and the best line. Text of a log is never run as code.
"""

import ast
import contextlib
import json
import re
import time
from datetime import datetime
from pathlib import Path

from read_run import as_run, events_of, show

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
EXERCISES = (EXPERIMENTS / "raytune/scheduler/asha", EXPERIMENTS / "manual")
BANNER = re.compile(r"===== JOB (\S+) (START|FINISH) *: ((\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) ?.*?) =====$")
ROLE = re.compile(r"\d\d:\d\d:\d\d ([a-z]+)(?: \S+)? \| ")
SETTING = re.compile(r"  ([A-Z][A-Z0-9_]*) +(\S.*)$")
BOX = re.compile(r"^\+-.*\n((?:\|[^-].*\n)+)\|-.*\n((?:\|.*\n?)*)", re.MULTILINE)  # header, rows
STATUS = re.compile(r".* \| ended with exit status (\d{1,3})$")


class NotALog(Exception):
    """The input is no log of this exercise and no run folder; the message is one line that says why."""


def parse(text, exit_status=None):
    """An input of the command line as a Run; with an exit status it finishes now. Raises NotALog."""
    path = Path(text)
    try:
        lines = [] if path.is_dir() else path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    except OSError as error:
        raise NotALog(f"{path}: cannot be read ({error.strerror})") from None
    folder = path if path.is_dir() else folder_of(path, lines)
    events = events_of(folder) if folder else events_of_log(lines)
    if not events:
        what = "a run folder (no events.jsonl)" if folder else "the log of a search, and its run folder is not here"
        raise NotALog(f"{path}: is not {what}; give runs/<jobid> or logs/ray_head_bloom_5epochs-<jobid>.out")
    if exit_status is not None:
        finish = time.strftime("%Y-%m-%d %H:%M:%S %Z")
        events.append({"time": time.time(), "event": "finished", "status": exit_status, "finish": finish})
    run = as_run(path, events, folder)
    with contextlib.suppress(OSError, TypeError):  # save_best.slurm writes it, later
        run.scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    return run


def folder_of(log, lines):
    """The run folder of a log's job: runs/<job>, or that of a run which it continued; None: not here."""
    starts = {(found[1], found[3]) for found in map(BANNER.match, lines) if found and found[2] == "START"}
    jobs = {job for job, _ in starts}
    for exercise in (log.absolute().parent.parent, *EXERCISES):  # not resolved: runs/ may be a link to another disk
        for folder in sorted(exercise.glob("runs/*"), key=lambda folder: folder.name not in jobs):
            if starts & {(event.get("job"), event.get("start")) for event in events_of(folder, "started")}:
                return folder  # both: a job's id can come again
    return None


# ---- A log alone -------------------------------------------------------------------------------------------
def events_of_log(lines):
    """What the lines tell, as events of a record; none if they are those of another job, such as a worker's."""
    roles, jobs, settings, status = {found[1] for found in map(ROLE.match, lines) if found}, [], {}, 0
    if roles and not roles & {"head", "search"}:
        return []
    for line in lines:
        if banner := BANNER.match(line):
            with contextlib.suppress(ValueError):
                at = {"time": datetime.fromisoformat(f"{banner[4]}+00:00").timestamp()}
                if banner[2] == "START":
                    jobs.append(at | {"event": "started", "job": banner[1], "start": banner[3]})
                    status = 0
                elif jobs:
                    jobs.append(at | {"event": "finished", "status": status, "finish": banner[3]})
        elif setting := SETTING.match(line):
            settings[setting[1]] = setting[2]
        elif ended := STATUS.match(line):
            status = int(ended[1])
    start = {"time": jobs[0]["time"] if jobs else 0}
    return jobs + [start | {"event": "settings"} | settings] * bool(jobs) + [start | e for e in search_of(lines)]


def search_of(lines):
    """The trials of the boxed table, and the report that the best line names."""
    configs = {}
    for row in table_of("\n".join(lines)):
        name, error = row["Trialname"], "see the log" if row["status"] == "ERROR" else None
        configs[name] = {title.rpartition("/")[2]: cell for title, cell in row.items() if "/" in title}
        result = map(row.get, ("eval_loss", "iter", "totaltime(s)"))
        yield from events_of_trial(name, configs[name], *result, error, row["status"] in ("ERROR", "TERMINATED"))
    with contextlib.suppress(Exception):
        best = ast.literal_eval(lines[lines.index("Best Trial Result:") + 1])
        config = best["config"]["train_loop_config"]
        drawn = list(map(show, config.values()))
        same = next(name for name, shown in configs.items() if list(shown.values()) == drawn)
        yield from events_of_trial(same, config, best["eval_loss"], best["epoch"], best["time_total_s"])


def events_of_trial(name, config, loss, epoch, seconds, error=None, ended=True):
    """A trial of which one report is known. What is no number makes no report."""
    yield {"event": "trial_started", "trial": name, "config": config}
    yield {"event": "report", "trial": name, "eval_loss": loss, "epoch": epoch, "seconds": seconds, "decision": "STOP"}
    if ended:
        yield {"event": "trial_ended", "trial": name, "error": error}


def table_of(text):
    """The rows of the last boxed table of trials, by titles without blanks; a title may stand on several lines."""
    found = []
    for header, body in BOX.findall(text):
        above, below = ([[cell.strip() for cell in line.split("|")[1:-1]] for line in part.splitlines()]
                        for part in (header, body))
        titles = ["".join(parts).replace(" ", "") for parts in zip(*above)]
        if {"Trialname", "status"} <= set(titles):  # else Ray's list of error files
            found = [dict(zip(titles, cells)) for cells in below if len(cells) == len(titles)]
    return found
