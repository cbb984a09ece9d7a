"""fill_tables.py --watch: the table follows a record that grows, until its job ends."""

import fcntl
import os
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import weakref

import fill_tables
import pytest
import watch_log
from conftest import call, wait_for
from test_fill_tables import COMPLETE, JOB, RECORD, TOOL, before, finished, joined, keep, started, trial

ENVIRON = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
MARKS = '00000", "config', '00000", "epoch": 2', '00002", "config'
STEPS = [before(mark, RECORD) for mark in MARKS]  # the beginnings of a record as it grows


class Terminal:
    """The tool on a terminal of its own. Reads what it shows."""

    def __init__(self, *arguments, lines=24, columns=80):
        self.master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        command = ["setsid", "--ctty", sys.executable, TOOL, *arguments]  # so that its Ctrl-C reaches the tool
        self.process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave,
                                        env=ENVIRON | {"TERM": "xterm-256color"})  # fmt: skip
        os.close(slave)
        self.raw = b""
        weakref.finalize(self, os.close, self.master)

    def screens(self):
        """What it has shown so far, as text: each time it erases what it has drawn, and draws it anew."""
        while select.select([self.master], [], [], 0)[0]:
            try:
                self.raw += os.read(self.master, 65536)
            except OSError:  # the tool has closed its end
                break
        drawn = re.split(r"\r\x1b\[2K(?:\x1b\[1A\x1b\[2K)*", self.raw.decode(errors="ignore"))
        return [re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]|\r", "", text) for text in drawn]

    def wait_for(self, text):
        return wait_for(lambda: next((s for s in reversed(self.screens()) if text in s), None), 30, text)

    def end(self):
        """(exit status, what stays on the terminal when the tool has ended)"""
        wait_for(lambda: (self.screens(), self.process.poll() is not None)[1], 30, "its end")
        return self.process.returncode, self.screens()[-1]


def rows(text):
    """The rows of trials in a table: {combo: its cells}."""
    cells = [line.split() for line in text.splitlines() if re.match(r" *(\* )?\d+ .* \d+/\d+ ", line)]
    return {row[0]: row for row in ([each for each in row if each != "*"] for row in cells)}


class Job:
    """The log and the record of a job as they grow."""

    def __init__(self, folder):
        self.log, self.folder = folder / f"logs/ray_head_bloom_5epochs-{JOB}.out", folder / "runs" / JOB
        self.log.parent.mkdir()

    def say(self, lines=None):
        self.log.write_text(before("02:16:05 search | data") if lines is None else lines)

    def record(self, events):
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "events.jsonl").write_text(events)


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path)


# ---- On a terminal -----------------------------------------------------------------------------------------
def test_on_a_terminal_the_table_follows_the_record_and_stays_when_the_job_has_ended(job):
    job.say()
    terminal = Terminal("--watch", job.log)
    assert "log: 02:16:02 head vm | Ray head at 192.0.2.2" in terminal.wait_for("Job local-1124")
    job.record(STEPS[0])
    assert "trials: 0 of 12 ended, 0 running on 1 slot(s)" in terminal.wait_for("since START")
    job.record(STEPS[1])
    screen = terminal.wait_for("1 running")
    assert "* best: combo 1, eval_loss 2.10908 after epoch 1" in screen
    assert rows(screen) == {"1": ["1", "0.0123", "2", "0", "1/5", "2.10908", "2.10908", "running"]}
    job.record(STEPS[2])
    assert [row[-1] for row in rows(terminal.wait_for("trials: 2 of 12 ended")).values()] == ["finished", "stopped"]
    job.record(RECORD)
    status, left = terminal.end()
    assert status == 0 and "0:07:54 from START to FINISH\ncomplete\n" in left
    losses = [float(row[6]) for row in rows(left).values()]
    assert len(losses) == 12 and losses == sorted(losses)
    assert re.search(r"^ +\* 8 .* 0\.32173  finished", left, re.MULTILINE)
    lines = [line for screen in terminal.screens() for line in screen.split("\n")]
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_in_a_low_terminal_the_best_and_the_running_trials_are_shown_until_it_is_given_back(tmp_path, number):
    further = {"warmup_ratio": 0.1, "long_name_" * 8: 1}
    trials = [trial(i, *[3 - i / 10] * (i < 28), start=i, ended=i < 27, **further) for i in range(30)]
    folder = keep(tmp_path, started(), *trials)
    terminal = Terminal("--watch", folder, lines=16)
    screen = terminal.wait_for("and 24 more")
    assert list(rows(screen)) == ["28", "27", "26", "25", "29", "30"] and "lowest" in screen and "long" in screen
    assert len(screen.split("\n")) <= 16 and max(map(len, screen.split("\n"))) <= 80
    if number == signal.SIGINT:
        os.write(terminal.master, b"\x03")
    else:
        terminal.process.terminate()
    status, left = terminal.end()
    assert status == 128 + number and "Traceback" not in terminal.raw.decode() and len(rows(left)) == 6
    assert terminal.raw.decode().rpartition("\x1b[?25")[2].startswith("h")  # the cursor is shown again


# ---- Without a terminal ------------------------------------------------------------------------------------
@pytest.mark.parametrize("given", ["log", "run folder"])
def test_a_job_in_the_queue_is_waited_for(job, monkeypatch, given):
    steps = iter([lambda: job.say(""), lambda: job.say("Loading module cuda/12.6\n"), job.say,
                  lambda: job.record('{"time": "2026-'), lambda: (job.record(STEPS[1]), job.say(COMPLETE)),
                  lambda: job.record(RECORD)])  # fmt: skip
    monkeypatch.setattr(watch_log.time, "sleep", lambda seconds: next(steps)())  # before each look something happens
    path = job.log if given == "log" else job.folder
    answer = call(fill_tables, "--watch", path)
    assert answer.returncode == 0 and len(rows(answer.stdout.rpartition("Job ")[2])) == 12
    assert answer.stderr == f"waiting for {path}: it is not there yet (Ctrl-C stops)\n"


def test_a_job_that_was_cancelled_ends_the_view_too_even_before_it_had_a_run_folder(job, tmp_path):
    folder = keep(tmp_path, started(), joined(1), trial(0, 2.0, ended=False), finished(96, 143))
    end = f"02:16:00 head vm | ended with exit status 143\n===== JOB {JOB} FINISH : 2026-11-24 02:17:31 UTC =====\n"
    job.say(before("02:16:02 head") + end)
    for path in (folder, job.log):
        answer = call(fill_tables, "--watch", path)
        assert answer.returncode == 0
        assert ": 0:01:36 from START to FINISH\npartial: the job ended early (cancelled" in answer.stdout
