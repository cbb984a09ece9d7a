"""fill_tables.py --watch: the table follows a log that grows, on a terminal and without one, and ends with it."""

import fcntl
import os
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
import weakref

import fill_tables
import pytest
import watch_log
from conftest import REPO, call, wait_for
from test_fill_tables import COMPLETE, TOOL, before, log_of

NAME = "ray_head_bloom_5epochs-7.out"
ENVIRON = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
STEPS = [  # the beginnings of a log as it grows
    before(mark) for mark in ("00000  started", "00000  epoch 2/5", "00001  started", "00002  started")
]


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

    def read(self):
        """Everything so far, as it was sent."""
        while select.select([self.master], [], [], 0)[0]:
            try:
                self.raw += os.read(self.master, 65536)
            except OSError:  # the tool has closed its end
                break
        return self.raw.decode()

    def screens(self):
        """The screens so far, each as text. Each one is drawn from the upper left corner on."""
        drawn = self.read().partition("\x1b[?1049h")[2].partition("\x1b[?1049l")[0]
        texts = [re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", text) for text in drawn.split("\x1b[H")]
        return [text.replace("\r", "") for text in texts if "Ctrl-C" in text]

    def wait_for(self, text):
        return wait_for(lambda: next((s for s in reversed(self.screens()) if text in s), None), 30, text)

    def end(self):
        """(exit status, what stays on the terminal when the tool has ended)"""
        wait_for(lambda: (self.read(), self.process.poll() is not None)[1], 30, "its end")
        left = self.read().rpartition("\x1b[?1049l")[2]
        return self.process.returncode, re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", left).replace("\r", "")


def rows(text):
    """The rows of trials in a table: {combo: its cells}."""
    cells = [line.split() for line in text.splitlines() if re.match(r" *(\* )?\d+ .* \d+/\d+ ", line)]
    return {row[0]: row for row in ([each for each in row if each != "*"] for row in cells)}


@pytest.fixture
def log(tmp_path):
    return tmp_path / NAME


def grow(log, *contents):
    """What time.sleep() is to be for a tool in this process: each look finds the log with more in it."""
    contents = iter(contents)
    return lambda seconds: log.write_text(next(contents))


# ---- On a terminal -----------------------------------------------------------------------------------------
def test_on_a_terminal_the_table_follows_the_log_and_stays_when_the_job_has_ended(log):
    log.write_text(STEPS[0])
    terminal = Terminal("--watch", log)
    assert "trials: 0 of 12 ended, 0 running on 1 slot(s)" in terminal.wait_for("02:16:05 search | cluster: 1 trial")
    log.write_text(STEPS[1])
    screen = terminal.wait_for("epoch 1/5")
    assert "trials: 0 of 12 ended, 1 running" in screen and "* best: combo 1, eval_loss 2.10908" in screen
    assert rows(screen) == {"1": ["1", "0.0123", "2", "0", "1/5", "2.10908", "2.10908", "running"]}
    log.write_text(STEPS[3])
    screen = terminal.wait_for("trials: 2 of 12 ended")
    assert [row[-1] for row in rows(screen).values()] == ["finished", "stopped"]
    log.write_text(COMPLETE)
    status, left = terminal.end()
    assert status == 0 and "0:07:54 from START to FINISH\ncomplete\n" in left
    losses = [float(row[6]) for row in rows(left).values()]
    assert len(losses) == 12 and losses == sorted(losses)
    assert re.search(r"^ +\* 8 .* 0\.32173  finished", left, re.MULTILINE)
    for screen in terminal.screens():
        lines = screen.split("\n")
        assert len(lines) <= 24 and max(map(len, lines)) <= 80


def test_in_a_low_terminal_the_best_and_the_running_trials_are_shown(log):
    trial = "10:01:00 search | TorchTrainer_ab_{:05d}  started    lr 0.001  per_device_bs 1  wd 0  warmup_ratio {}"
    report = "10:02:{:02d} search | TorchTrainer_ab_{:05d}  epoch 1/5  eval_loss {:.5f}"
    stopped = "10:03:00 search | TorchTrainer_ab_{:05d}  stopped    by ASHA after epoch 1"
    lines = [trial.format(i, "0.1  " + "long_name_" * 8 + " 1") for i in range(30)]
    lines += [report.format(i, i, 3 - i / 10) for i in range(28)] + [stopped.format(i) for i in range(27)]
    log.write_text(log_of(*lines, finish=""))
    terminal = Terminal("--watch", log, lines=16)
    screen = terminal.wait_for("and 24 more; no room for long_name_")
    assert list(rows(screen)) == ["28", "27", "26", "25", "29", "30"]
    assert screen.count("running\n") + screen.count("running ") >= 3 and len(screen.split("\n")) <= 16
    assert max(map(len, screen.split("\n"))) <= 80 and "warmup_ratio" in screen
    os.write(terminal.master, b"\x03")
    assert terminal.end()[0] == 130


def test_ctrl_c_ends_the_view_without_a_trace_and_the_table_stays(log):
    log.write_text(STEPS[3])
    terminal = Terminal("--watch", log)
    terminal.wait_for("trials: 2 of 12 ended")
    os.write(terminal.master, b"\x03")
    status, left = terminal.end()
    assert status == 130 and "Traceback" not in terminal.raw.decode()
    assert len(rows(left)) == 2 and terminal.raw.decode().rpartition("\x1b[?25")[2].startswith("h")  # the cursor


def test_an_end_by_a_signal_gives_the_terminal_back(log):
    log.write_text(STEPS[3])
    terminal = Terminal("--watch", log)
    terminal.wait_for("trials: 2 of 12 ended")
    terminal.process.terminate()
    assert terminal.end()[0] == 143 and "\x1b[?1049l" in terminal.raw.decode()


# ---- Without a terminal ------------------------------------------------------------------------------------
def test_without_a_terminal_each_table_is_plain_text(log, tmp_path):
    log.write_text(STEPS[1])
    out = tmp_path / "out.txt"
    with open(out, "w") as file:
        process = subprocess.Popen([sys.executable, TOOL, "--watch", log], stdout=file, stderr=file,
                                   env=ENVIRON | {"FORCE_COLOR": "1"})  # fmt: skip
    wait_for(lambda: "0 of 12 ended, 1 running" in out.read_text(), 30, "the first table")
    log.write_text(STEPS[3])
    wait_for(lambda: "2 of 12 ended, 0 running" in out.read_text(), 30, "the next table")
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    text = out.read_text()
    assert "\x1b" not in text and "Traceback" not in text and text.count("Job local") == 2
    assert max(map(len, text.split("\n"))) <= 80


def test_without_a_terminal_a_table_is_printed_when_an_epoch_or_a_trial_has_ended(log, monkeypatch):
    started, two, three = before("00001  epoch 1/5"), before("00000  epoch 3/5"), before("00000  epoch 4/5")
    # twice the same, more epochs at once, a trial that has only started, the end of the job
    log.write_text(STEPS[0])
    begun = before("00000  epoch 1/5")
    looks = grow(log, STEPS[0], begun, STEPS[1], STEPS[1], two, three, STEPS[2], started, started, COMPLETE)
    monkeypatch.setattr(watch_log.time, "sleep", looks)
    answer = call(fill_tables, "--watch", log)
    assert answer.returncode == 0 and not answer.stderr
    ended = re.findall(r"trials: (\d+) of 12 ended, (\d) running", answer.stdout)
    assert ended == [("0", "0"), ("0", "1"), ("0", "1"), ("0", "1"), ("1", "0"), ("12", "0")]
    assert answer.stdout.count("Job ") == len(ended)


def test_a_log_that_is_not_there_yet_is_waited_for(log, monkeypatch):
    looks = grow(log, "", "Loading module cuda/12.6\n", STEPS[1], COMPLETE)
    monkeypatch.setattr(watch_log.time, "sleep", looks)
    answer = call(fill_tables, "--watch", log)
    assert answer.returncode == 0 and len(rows(answer.stdout.rpartition("Job ")[2])) == 12
    assert answer.stderr == f"waiting for {log}: it is not there yet (Ctrl-C stops)\n"


def test_ctrl_c_ends_the_wait_for_a_log(log):
    process = subprocess.Popen([sys.executable, TOOL, "--watch", log], text=True, stderr=subprocess.PIPE)
    assert process.stderr.readline().startswith(f"waiting for {log}")
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130 and process.stderr.read() == ""
    process.stderr.close()


def test_a_job_that_was_cancelled_ends_the_view_too(log):
    log.write_text(STEPS[3] + "02:17:30 head vm | ended with exit status 143\n"
                   "===== JOB local-1124-021555-3046 FINISH : 2026-11-24 02:17:31 UTC =====\n")  # fmt: skip
    answer = call(fill_tables, "--watch", log)
    assert answer.returncode == 0
    said = answer.stdout.splitlines()[:2]
    assert said == ["Job local-1124-021555-3046: 0:01:36 from START to FINISH",
                    "partial: the job ended early (cancelled, or at its time limit, exit status 143)"]  # fmt: skip


# ---- What can be watched -----------------------------------------------------------------------------------
@pytest.mark.parametrize("content", [b"10:00:00 training | done\n", b"\x7fELF\0\0\1" * 99])
def test_what_is_no_log_gets_the_line_that_it_gets_without_watch(log, content):
    log.write_bytes(content)
    os.utime(log, (time.time() - 60,) * 2)
    answer = call(fill_tables, "--watch", log)
    assert (answer.returncode, answer.stdout) == (2, "") and answer.stderr == call(fill_tables, log).stderr
    assert answer.stderr.count("\n") == 1


def test_of_a_run_folder_the_log_of_its_last_job_is_watched(tmp_path):
    folder = tmp_path / "runs/5"
    folder.mkdir(parents=True)
    (tmp_path / "logs").mkdir()
    answer = call(fill_tables, "--watch", folder)
    assert answer.returncode == 2 and re.fullmatch("ERROR: .*/runs/5: not a run folder .*\n", answer.stderr)
    (tmp_path / "logs" / NAME).write_text(COMPLETE)
    (folder / "job").write_text("7\n")  # it continues run 5
    answer = call(fill_tables, "--watch", folder)
    assert answer.returncode == 0 and len(rows(answer.stdout)) == 12


def test_a_run_folder_that_is_not_there_yet_is_waited_for(tmp_path, monkeypatch):
    (tmp_path / "logs").mkdir()

    def start(seconds):
        (tmp_path / "logs" / NAME).write_text(COMPLETE)
        (tmp_path / "runs/7").mkdir(parents=True)

    monkeypatch.setattr(watch_log.time, "sleep", start)
    answer = call(fill_tables, "--watch", tmp_path / "runs/7")
    assert answer.returncode == 0 and len(rows(answer.stdout)) == 12 and answer.stderr.count("\n") == 1


@pytest.mark.parametrize("further", [["other.out"], ["--csv", "x.csv"], ["--compare"]])
def test_watch_takes_one_log_and_no_other_option(log, further):
    answer = call(fill_tables, "--watch", log, *further)
    assert answer.returncode == 2 and "--watch takes one log or run folder" in answer.stderr


def test_without_rich_one_line_says_what_to_install(log):
    answer = subprocess.run([sys.executable, "-E", "-s", "-S", REPO / TOOL, "--watch", log], text=True,
                            capture_output=True, check=False)  # fmt: skip
    assert answer.returncode == 2 and "--watch needs the package rich; run: bash scripts/setup_env.sh" in answer.stderr


# ---- With a report -----------------------------------------------------------------------------------------
def test_the_report_is_drawn_again_while_the_job_runs_and_at_its_end(log, tmp_path, monkeypatch):
    folder, page = tmp_path / "pictures", tmp_path / "pictures/report.html"
    log.write_text(before("02:16:05 search | cluster"))
    monkeypatch.setattr(watch_log, "REDRAWN", 0)
    seen, looks, drawn, draw, read = [], [], [], watch_log.Report.draw, watch_log.read_log
    monkeypatch.setattr(watch_log, "read_log", lambda path: (read(path), looks.append(path))[0])
    monkeypatch.setattr(watch_log.Report, "draw", lambda *a, **k: (drawn.append(len(a[1].trials)), draw(*a, **k)))

    def student():  # the log grows each time that the report shows it as it is
        wait_for(lambda: looks, 30, "a look at the log without trials")
        log.write_text(STEPS[1])
        for stopped, content in ((0, STEPS[3]), (1, COMPLETE)):
            shown = lambda n=stopped: page.exists() and page.read_text().count("<td>stopped by ASHA") == n
            wait_for(shown, 60, f"a report with {stopped} stopped trials")
            seen.append(page.read_text())
            log.write_text(content)

    writer = threading.Thread(target=student)
    writer.start()
    run = call(fill_tables, "--watch", log, "--plots", folder)
    writer.join()
    assert run.returncode == 0 and f"pictures and report: {page}" in run.stdout
    assert 0 not in drawn  # its folder would be in the way of the run folder that the job is about to make
    reload = '<meta http-equiv="refresh" content="60">'
    assert len(seen) == 2 and all(reload in text for text in seen) and reload not in page.read_text()
    assert page.read_text().count("<td>stopped by ASHA") == COMPLETE.count("stopped    by ASHA")


def test_a_report_that_cannot_be_written_is_one_line(log, tmp_path):
    log.write_text(COMPLETE)
    (tmp_path / "file").write_text("")
    run = call(fill_tables, "--watch", log, "--plots", tmp_path / "file")
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and "cannot be written" in run.stderr
