"""Reads what a run has written, the log of a head job, its run folder or the manual grid's log, as a Run.

Used by fill_tables.py. The standard library only. Text of a log is never evaluated as code.
"""

import ast
import codecs
import contextlib
import datetime
import itertools
import json
import math
import re
import time
from dataclasses import dataclass, field
from pathlib import Path

# The course's names of the columns.
TITLES = {"lr": "Learning Rate (lr)", "per_device_bs": "Batch Size (bs)", "wd": "Weight Decay (wd)"}
GRID_CSV = "lr,per_device_bs,wd,eval_loss,epoch,runtime_s"  # the first line of the manual grid's CSV
MAX_BYTES = 200_000_000  # of a log; a real one has some 10 kB
# A line that was cut in two, and its rest below: the frame of a table, a trial's hyperparameters, a result of the grid.
FOLDED = re.compile(
    r"(^\+-[-+=]*[-=]|^\|[-=+]+[-=]|^RESULT (?!.* runtime_s=).*"
    r"|search +\| \S+  (?:started|continues) +(\S+ \S+  )*\S+)\n\S"
    r"|search +\| \S+  (?:started|continues) .*\n\S+ [-+.\de]+(  |$)", re.MULTILINE
)
BANNER = re.compile(r"===== JOB (\S+) (START|FINISH) *: (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) ?(.*?) =====")
CLOCK = re.compile(r"(\d\d):(\d\d):(\d\d) (\S+)(?: \S+)? \| (.*)")
EVENT = re.compile(r"(\S.*?)  (started|continues|epoch|stopped|finished|ended|lost|FAILED)(?: +(.*))?$")
REPORT = re.compile(r"(\d{1,9}(?:\.\d+)?)/\d+ +eval_loss (\S+)")
JOINED = re.compile(r"worker \d+/\d+ joined: job (\S+) on .*?\d+ CPUs, (\d{1,5}) GPUs.*, (\d{1,5}) trial")
FORECAST = re.compile(r"forecast: (\d+ to \d+ of \d+ epochs.*)")
PRECISION = re.compile(r"(?:joined|this node): .* GPUs.*, (bf16|fp16|fp32)(?:, \d+ trial|$)")
HELD = re.compile(r"worker job (\S+) held its node for (\d{1,9}) s")
CLUSTER = re.compile(r"cluster: (\d{1,9}(?:\.\d+)?) trial\(s\) at once, (\d+) workers each, on (GPUs|CPUs)")
SCHEDULER = re.compile(r"\S+  (?:stopped    by (.+?) after|copies  )")  # only PBT's trials copy one another
DONE_BEFORE = re.compile(r"(lr=\S+ per_device_bs=\S+ wd=\S+) is in \S+ already$")
FOLDER_OF_RAY = re.compile(r"(.+_\d{5,})_\d+_.+")  # of a trial: its name, and what Ray puts after it
SETTING = re.compile(r"  ([A-Z][A-Z0-9_]*) +(\S.*)?$")
MANUAL = re.compile(r"(RESULT|FAILED) ((?:[\w.]+=\S+ ?)+)(?:: (.*))?$")
NOT_TEXT = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # colours, control characters


class NotALog(Exception):
    """The input is not a log of this exercise; the message is one line that says why and what to give."""


@dataclass
class Trial:
    """One trial. Seconds count from the job's START."""

    name: str
    params: dict = field(default_factory=dict)
    reports: list = field(default_factory=list)  # (epoch, eval_loss), as they came
    status: str = ""  # finished, stopped by ASHA, diverged, FAILED, running, pending, cut off
    cause: str = ""
    runtime: float = None  # s, as Ray counted it; None: not in the log
    start: float = None
    end: float = None
    last: float = None  # eval_loss of the boxed table
    epochs: int = 0
    at: dict = field(default_factory=dict)  # epoch -> s from the trial's start to its report
    moments: dict = field(default_factory=dict)  # epoch -> s from START to its report, by the log's clock
    id: str = ""  # the course's Combo ID, from 1

    def finite(self):
        """[(loss, epoch)] of all reports that are numbers."""
        seen = self.reports or ([(self.epochs, self.last)] if self.last is not None else [])
        return [(loss, epoch) for epoch, loss in seen if math.isfinite(loss)]

    def best(self):
        """The lowest reported loss, or None."""
        return min(self.finite())[0] if self.finite() else None

    def seconds(self, now):
        """Runtime in seconds: Ray's, else by the clock of the log's lines up to `now`; None: not started."""
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
    nodes: list = field(default_factory=list)  # (s of joining, GPUs, trials at once, worker job)
    held: dict = field(default_factory=dict)  # worker job -> s from its start to its end, by Slurm's record
    slots: float = None  # trials at once, of the line "cluster:"
    cluster_at: float = 0.0
    on_gpus: bool = False
    precisions: set = field(default_factory=set)  # of its nodes: bf16, fp16, fp32
    manual_gpus: int = None  # of the line "GPUs:" of a manual grid
    manual: bool = False
    scheduler: str = "ASHA"
    exit_status: int = 0
    has_table: bool = False
    notes: list = field(default_factory=list)
    forecast: str = ""  # of the epochs, from before the run
    scores: dict = field(default_factory=dict)  # model -> what ask.py --score has found

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
        if self.has_table or self.manual:
            return "complete"
        return "partial: the job ended without a table of trials"


# ============================================================================================================
# Reading
# ============================================================================================================
def read_text(path):
    """A log as clean lines. Raises NotALog if it is missing, empty, binary or huge."""
    example = "a log such as logs/ray_head_bloom_5epochs-12345.out"
    try:
        if path.stat().st_size > MAX_BYTES:
            size = f"{MAX_BYTES // 10**6} MB"
            raise NotALog(f"{path}: larger than {size}, so not the log of a search; give {example}")
        data = path.read_bytes()
    except OSError as error:
        raise NotALog(f"{path}: cannot be read ({error.strerror}); give {example}") from None
    if not data.strip():
        raise NotALog(f"{path}: is empty; wait until the job has started, or give another log")
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))  # what PowerShell saves
    if b"\0" in data and not utf16:
        raise NotALog(f"{path}: is binary, not a log; give {example}")
    text = data.decode("utf-16" if utf16 else "utf-8-sig", errors="replace")
    lines = [NOT_TEXT.sub("", line).rstrip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    start = next((line for line in lines if BANNER.search(line)), "")
    before = start[: start.find("=====")]  # "> " of a mail, blanks of a quotation
    lines = [line.removeprefix(before) for line in lines]
    for what, changed in (
        ("its lines were folded", FOLDED.search("\n".join(lines))),
        ("its blanks were squeezed", " START :" in start),
    ):
        if changed:
            raise NotALog(f"{path}: {what}, by a mail or chat program perhaps; get the file itself from the cluster")
    return lines


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


def assignments(text, between=r"\s+", sign="="):
    """Words such as lr=1e-05 -> {"lr": 1e-05}."""
    words = (word.partition(sign) for word in re.split(between, text) if word)
    return {key: value_of(value) for key, _, value in words}


def number_or(value, default=None):
    """value if it is a number, else default."""
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else default


def finite_or_none(value):
    """value if it is a finite number, else None."""
    return value if number_or(value) is not None and math.isfinite(value) else None


def cells_of(block):
    """A boxed table's lines -> (header, rows), lists of stripped cells; ([], []) if it is not a table.

    Lines that belong to one row (a header or a cell broken over two lines) are joined without a space.
    """
    frame = [line for line in block if not set(line) - set("+-=| ")]
    if not frame:
        return [], []
    cut = list(itertools.pairwise(i for i, char in enumerate(frame[0]) if char == "+"))
    second = block.index(frame[1], block.index(frame[0]) + 1) if len(frame) > 1 else len(block)
    rows = [[""] * len(cut)]  # the header first
    for number, line in enumerate(block):
        if line in frame or len(line) != len(block[0]):
            continue  # the frame, or a line that is not written to its end yet
        row = [line[a + 1 : b].strip() for a, b in cut]
        if number < second or (len(rows) > 1 and not any(row[1:2])):  # no status: the rest of the row above
            rows[-1] = [above + below for above, below in zip(rows[-1], row)]
        else:
            rows.append(row)
    return rows[0], rows[1:]


def read_table(run, block, known):
    """Puts a boxed table of trials, or Ray's list of error files, into run.trials. -> is it one of trials?"""
    header, rows = cells_of(block)
    plain = [re.sub(r"\s", "", title).lower() for title in header]
    if plain[:1] + plain[-1:] == ["trialname", "errorfile"]:
        for name, *_, file in rows:
            if name in run.trials and not run.trials[name].cause:
                run.trials[name].cause = f"see {file}"
    if "trialname" not in plain or "status" not in plain:
        return False
    metrics = [i for i, title in enumerate(plain) if title in ("iter", "totaltime(s)", "eval_loss")]
    columns = {i: header[i].rsplit("/", 1)[-1] for i in range(len(header))
               if plain[i] not in ("trialname", "status", "loc") and i < min(metrics, default=len(header))}
    if len(set(columns.values())) < len(columns):  # two of one last part: keep their whole names
        columns = {i: header[i] for i in columns}
    for row in rows:
        cell = dict(zip(plain, row))
        name = cell["trialname"]
        trial = run.trials.setdefault(name, known.get(name) or Trial(name))
        trial.params |= {columns[i]: value_of(row[i]) for i in columns}
        epochs = value_of(cell.get("iter", ""))
        epochs = epochs if isinstance(epochs, int) else 0
        # a table amid the log may be older than its lines of epochs
        if epochs >= trial.epochs or not trial.reports:
            trial.epochs = epochs
            trial.last = number_or(value_of(cell.get("eval_loss", "")))
            trial.runtime = finite_or_none(value_of(cell.get("totaltime(s)", "")))
        if trial.status in ("", "running", "pending", "paused"):
            status = cell["status"]
            trial.status = {"ERROR": "FAILED", "TERMINATED": "ended"}.get(status, status.lower())
    return True


def read_event(run, name, what, rest, second):
    """Puts one line about a trial into run.trials."""
    if name.startswith("FAILED "):
        return  # the list at the end; the trial's own line came before
    trial = run.trials.setdefault(name, Trial(name))
    if what in ("started", "continues"):
        trial.start = second
        trial.params |= assignments(rest or "", r"\s{2,}", " ")
    elif what == "epoch":
        if report := REPORT.match(rest or ""):
            epoch = float(report[1])
            # a trial that lost its node reports its first epochs again
            trial.reports = [r for r in trial.reports if r[0] != epoch]
            trial.reports.append((epoch, float(number_or(value_of(report[2]), math.nan))))
            trial.epochs = max(trial.epochs, round(epoch))
            trial.at[epoch] = None if trial.start is None else second - trial.start
            trial.moments[epoch] = second
    elif what == "lost":
        trial.start, trial.status = None, "pending"
    else:
        rest, _, further = (rest or "").partition("  ") if what != "FAILED" else (rest, "", "")
        values = assignments(further.strip(), r"\s{2,}", " ")
        if "eval_loss" in values:  # with many trials this is a trial's only line
            epoch = re.search(r"epoch (\d{1,9})$", rest)
            trial.epochs = int(epoch[1]) if epoch else run.number("NUM_EPOCHS", 0)
            trial.reports = [(float(trial.epochs), float(number_or(values.pop("eval_loss"), math.nan)))]
            trial.moments = {float(trial.epochs): second}
            trial.runtime = finite_or_none(values.pop("seconds", None))
            trial.params |= values
        trial.end = second
        trial.status = {"stopped": "stopped by ASHA", "ended": "diverged"}.get(what, what)
        if what == "FAILED":
            trial.cause = rest or ""
        elif what == "ended":
            trial.cause = (rest or "").removeprefix("diverged ") + ": the loss became NaN or infinite"


def combination(run, values):
    """The row of a combination of the manual grid: one row, however its values are written."""
    name = " ".join(f"{key}={value}" for key, value in values.items())
    trial = run.trials.setdefault(name, Trial(name))
    trial.params |= values
    return trial


def read_manual(run, kind, words, cause):
    """Puts a RESULT or FAILED line of the manual grid into run.trials; who ran twice counts once."""
    values = assignments(words)
    loss, epoch, runtime = (finite_or_none(values.pop(key, None))
                            for key in ("eval_loss", "epoch", "runtime_s"))
    trial = combination(run, values)
    trial.status = "finished" if kind == "RESULT" else "FAILED"
    trial.cause, trial.runtime, trial.last = cause or "", runtime, loss
    if loss is not None and not trial.reports:
        trial.reports = [(epoch or 0, loss)]
    if kind == "RESULT":
        trial.epochs = max(trial.epochs, run.number("NUM_EPOCHS", epoch or 0))
    run.manual = True


def read_best(text):
    """The line under "Best Trial Result:" as {"eval_loss", "epoch", "time_total_s", "params"}, or None."""
    try:
        found = ast.literal_eval(text) if len(text) < 20_000 else None
        params = found["config"].get("train_loop_config", found["config"])
        best = {key: finite_or_none(found.get(key)) for key in ("eval_loss", "epoch", "time_total_s")}
        params = {str(key): value if isinstance(value, (int, float, str, type(None))) else str(value)
                  for key, value in params.items()}
        return best | {"params": params} if best["eval_loss"] is not None else None
    except (ValueError, SyntaxError, TypeError, KeyError, AttributeError, RecursionError, MemoryError):
        return None


def read_log(path):
    """The log of a head job or of the manual grid as a Run. Raises NotALog."""
    lines = read_text(path)
    run, earlier, block, in_settings, ours, role = Run(str(path)), {}, [], False, False, ""
    midnight, clock = 0, None
    for number, line in enumerate([*lines, ""]):
        boxed = line[:1] in ("+", "|") and (block or line[0] == "+")
        if block and not (boxed and not line[0] == block[-1][0] == "+"):  # its end
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
                    run = Run(str(path), notes=["the log has several runs of the job; this is the last one"])
                run.job, run.start, run.zones = banner[1], moment, (banner[4], banner[4])
                midnight, clock = 0, None
            elif run.start:
                run.finish, run.zones = moment, (run.zones[0], banner[4])
        elif stamped := CLOCK.match(line):
            role, text = stamped[4], stamped[5]
            second = int(stamped[1]) * 3600 + int(stamped[2]) * 60 + int(stamped[3])
            if clock is None:
                began = run.start
                clock = first = began.hour * 3600 + began.minute * 60 + began.second if began else second
            if second + midnight - clock < -43200:
                midnight += 86400
            clock = max(clock, second + midnight)
            run.now = max(run.now, clock - first)
            ours = ours or role in ("search", "head", "manual")
            if precision := PRECISION.search(text):
                run.precisions.add(precision[1])
            in_settings = "settings" in text and text.rstrip().endswith(":")
            if role in ("search", "manual"):
                if told := SCHEDULER.match(text):
                    run.scheduler = told[1] or "PBT"
                if event := EVENT.match(text):
                    name = combination(run, assignments(event[1])).name if role == "manual" else event[1]
                    read_event(run, name, event[2], event[3], run.now)
                elif role == "manual" and (done := DONE_BEFORE.match(text)):  # keeps the ids
                    combination(run, assignments(done[1])).status = "finished"
                elif cluster := CLUSTER.match(text):
                    run.slots, run.on_gpus, run.cluster_at = float(cluster[1]), cluster[3] == "GPUs", run.now
            elif (joined := JOINED.search(text)) and joined[1] not in (node[3] for node in run.nodes):  # not once more
                run.nodes.append((run.now, int(joined[2]), int(joined[3]), joined[1]))
            elif told := FORECAST.match(text):
                run.forecast = told[1]
            elif held := HELD.search(text):
                run.held[held[1]] = int(held[2])
            elif ended := re.match(r"ended with exit status (\d{1,3})", text):
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
            for row in itertools.takewhile(re.compile(r"[\d.e+-]+,\d").match, lines[number + 1 :]):
                words = (f"{key}={value}" for key, value in zip(GRID_CSV.split(","), row.split(",")) if value)
                read_manual(run, "RESULT", " ".join(words), "")
        elif gpus := re.match(r"GPUs: (\d{1,5})$", line):
            run.manual_gpus = int(gpus[1])
    wanted = "logs/ray_head_bloom_5epochs-<jobid>.out"
    if role == "worker" and not ours:
        raise NotALog(f"{path}: is the log of a worker job; give the head's, {wanted}")
    if not ours and not run.start:
        raise NotALog(f"{path}: is not the log of a search (no START, no table of trials); give {wanted}")
    run.manual = run.manual or role == "manual"
    return run


def read_folder(folder):
    """A run folder (runs/<jobid>) as a Run: values from result.json files, the rest from the log, if any.

    Raises NotALog if the folder holds no trial.
    """
    log = folder.resolve().parent.parent / "logs" / f"ray_head_bloom_5epochs-{folder.resolve().name}.out"
    run = read_log(log) if log.is_file() else Run(str(folder), job=folder.resolve().name)
    found = sorted(folder.glob("tune/*/params.json"))
    if not found:
        raise NotALog(f"{folder}: not a run folder (no tune/<trial>/params.json); give runs/<jobid> or a log")
    run.source = str(folder)
    with contextlib.suppress(OSError, ValueError, TypeError):  # save_best.slurm writes it, later
        run.scores = dict(json.loads((folder / "scores.json").read_text(encoding="utf-8")))
    if not log.is_file():
        run.notes.append(f"no log {log.name}: no job times; how a trial ended is told by its epochs")
    for path in found:
        name, of_ray = path.parent.name, FOLDER_OF_RAY.fullmatch(path.parent.name)
        name = of_ray[1] if of_ray and name not in run.trials else name
        trial = run.trials.setdefault(name, Trial(name))
        try:
            params = json.loads(path.read_text(encoding="utf-8"))
            result = path.with_name("result.json")
            text = result.read_text(encoding="utf-8") if result.is_file() else ""
            rows = [json.loads(line) for line in text.split("\n") if line.endswith("}")]  # whole ones
            trial.params = dict(params.get("train_loop_config", params))
            losses = {float(row["epoch"]): float(row["eval_loss"]) for row in rows if "eval_loss" in row}
            trial.reports = list(losses.items())
            if rows:
                epoch, trial.last = trial.reports[-1]
                trial.epochs, trial.runtime = round(epoch), rows[-1]["time_total_s"]
                trial.at = {float(row["epoch"]): row["time_total_s"] for row in rows}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            problem = type(error).__name__
            run.notes.append(f"{name}: its results cannot be read ({problem}); values are those of the log")
        error_file = path.with_name("error.txt")
        if error_file.is_file() and (not trial.cause or trial.cause.startswith("see ")):
            last = error_file.read_text(errors="replace").strip().split("\n")[-1].strip()
            trial.status, trial.cause = "FAILED", NOT_TEXT.sub("", last)[:200] or "unknown"
        if not log.is_file():
            trial.status = trial.status or "ended"
    return run


def lowest_losses(folder):
    """[(lowest finite eval_loss of a trial, its train_loop_config)] of a run folder, the lowest first."""
    found = []
    for path in sorted(Path(folder).glob("tune/*/result.json")):
        best = None
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                report = json.loads(line)
                loss, drawn = report["eval_loss"], dict(report["config"]["train_loop_config"])
                if math.isfinite(loss) and (best is None or loss < best[0]):
                    best = loss, drawn
            except (ValueError, KeyError, TypeError):
                continue  # a line half written: the search runs, or was ended there
        found += [best] if best else []
    return sorted(found, key=lambda pair: pair[0])


def parse(text, exit_status=None):
    """An input of the command line as a Run; with an exit status it finishes now. Raises NotALog."""
    path = Path(text)
    run = read_folder(path) if path.is_dir() else read_log(path)
    if exit_status is not None:
        run.exit_status = exit_status
        finish_now(run)
    return settle(run)


def finish_now(run):
    """Takes this moment as the job's FINISH, which the log of a job that still runs does not have yet."""
    if not run.start:
        return
    moment, zone = time.strftime("%Y-%m-%d %H:%M:%S|%Z").split("|")  # as the job's own line writes it
    run.finish, run.zones = datetime.datetime.fromisoformat(moment), (run.zones[0], zone)
    settle_time(run)


def settle_time(run):
    """The seconds from START to FINISH."""
    if run.finish:
        run.now = (run.finish - run.start).total_seconds()
        note = f"the clock was changed during the job ({' to '.join(run.zones)}): times may be an hour off"
        run.notes += [note] if run.zones[0] != run.zones[1] and note not in run.notes else []


def settle(run):
    """Fills in what follows: the job's seconds, the trials' ends, ids and order, the best result."""
    settle_time(run)
    trials = list(run.trials.values())
    full = run.number("NUM_EPOCHS", max((trial.epochs for trial in trials), default=0))
    for trial in trials:
        if trial.start is None and None not in (trial.end, trial.runtime):  # a log without lines of starts
            trial.start = max(0.0, trial.end - trial.runtime)
        losses = [loss for _, loss in trial.reports] or ([trial.last] if trial.last is not None else [])
        if trial.status == "ended":
            bad = losses and not math.isfinite(losses[-1])
            trial.status = "diverged" if bad else "finished" if trial.epochs >= full else "stopped by ASHA"
            if bad and not trial.cause:
                trial.cause = f"at epoch {trial.epochs}: the loss became NaN or infinite"
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
        trial.id = str(1 + (numbers[position] if numbered else position))  # Ray counts from 0
    run.trials = {trial.name: trial for trial in sorted(trials, key=lambda trial: int(trial.id))}
    settle_best(run)
    return run


def settle_best(run):
    """The best result: the log's own line, else the lowest loss of all reports of trials without error."""
    candidates = [(*min(t.finite()), t) for t in run.trials.values() if t.finite() and t.status != "FAILED"]
    best = min(candidates, key=lambda c: c[0], default=None)
    if run.best:
        def same(a, b):
            number = isinstance(a, (int, float)) and isinstance(b, (int, float))
            return math.isclose(a, b, rel_tol=1e-2) if number else str(a) == str(b)

        loss, params = run.best["eval_loss"], run.best["params"]
        near = [t for other, _, t in candidates if math.isclose(other, loss, rel_tol=1e-4, abs_tol=1e-5)]
        near = [t for t in near if all(same(v, params.get(k)) for k, v in t.params.items())] or near
        run.best["trial"] = near[0] if near else None
    elif best:
        loss, epoch, trial = best
        last = epoch == trial.epochs and trial.runtime is not None
        run.best = {"eval_loss": loss, "epoch": epoch, "params": trial.params, "trial": trial,
                    "time_total_s": trial.runtime if last else trial.at.get(epoch)}


def trials_at_once(run):
    """Trials in flight: what the nodes offered, else what the log shows, at least 1."""
    edges = sorted((edge, step) for t in run.trials.values() if t.start is not None
                   for edge, step in ((t.start, 1), (run.now if t.end is None else t.end, -1)))
    running = most = 0
    for _, step in edges:
        running += step
        most = max(most, running)
    return int(sum(slots for _, _, slots, _ in run.nodes) or run.slots or max(most, 1))


def further_names(runs):
    """Names of hyperparameters beyond the exercise's three, in order of appearance."""
    return list(dict.fromkeys(name for run in runs for t in run.trials.values() for name in t.params
                              if name not in TITLES))


def show(value):
    """A value for a table: six significant digits, as Ray's own table has; "-" for nothing."""
    return "-" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
