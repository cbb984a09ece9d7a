"""fill_tables.py: each kind of log gives the right tables or one clear line; pictures, report and comparison."""

import csv
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import draw_report
import fill_tables
import pytest
import read_run
from conftest import REPO

TOOL = REPO / "scripts/raytune_hpo/fill_tables.py"
LOGS = Path(__file__).parent / "logs"
COMPLETE = (LOGS / "complete.out").read_text()  # a quickstart run
RESULTS = json.loads((LOGS / "complete_results.json").read_text())  # its result.json files, shortened
COURSE_COLUMNS = ["combo id", "learning rate", "batch size", "weight decay", "eval loss", "runtime (s)"]


def fill(*arguments):
    """Runs the tool."""
    return subprocess.run([sys.executable, TOOL, *arguments], check=False, text=True, capture_output=True, timeout=120)


def tables(text):
    """The Markdown tables of an output: {number: [{column: cell}]}."""
    found = {}
    for title, body in re.findall(r"^### (.*?)\n(.*?)(?=^##|\Z)", text, flags=re.DOTALL | re.MULTILINE):
        lines = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in body.splitlines() if line.startswith("|")]
        if lines:
            assert all(len(line) == len(lines[0]) for line in lines), body
            found[title.split(":")[0]] = [dict(zip(lines[0], line)) for line in lines[2:]]
    return found


@pytest.fixture
def read(tmp_path):
    """A function: log text (or bytes) -> (tables, output) of the tool, which must succeed."""
    def run(content, *options, status=0):
        log = tmp_path / "ray_head_bloom_5epochs-1.out"
        log.write_bytes(content if isinstance(content, bytes) else content.encode())
        answer = fill(*options, log)
        assert answer.returncode == status, answer.stdout + answer.stderr
        assert "Traceback" not in answer.stderr
        return tables(answer.stdout), answer.stdout + answer.stderr

    return run


def boxed(header, rows):
    """Ray's boxed table; a title may have two lines."""
    titles = [[title.split("\n") for title in header]]
    height = max(len(title) for title in titles[0])
    lines = [[(title + [""] * height)[i] for title in titles[0]] for i in range(height)]
    body = [["" if cell is None else str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in lines + body) + 2 for i in range(len(header))]
    border = "+" + "+".join("-" * width for width in widths) + "+"
    text = [["|" + "|".join(f" {cell}".ljust(width) for cell, width in zip(row, widths)) + "|" for row in part] for part in (lines, body)]
    return "\n".join([border, *text[0], border.replace("+", "|", 1)[:-1] + "|", *text[1], border])


HEADER = ["Trial name", "status", "loc", "train_loop_config/lr", "train_loop_config/per_device_bs", "train_loop_config/wd", "iter", "total time (s)", "eval_loss"]
ROWS = [[f"TorchTrainer_ab_{i:05d}", "TERMINATED", "10.0.0.2:7", f"{(i + 1) * 1e-5:.6g}", 1 + i % 2, 0.01 * (i % 2), 5, 10.5 + i, 2 - i / 10] for i in range(3)]
SETTINGS = """10:00:00 head node1 | settings (each can be set as a variable in front of sbatch):
  NUM_SAMPLES        3
  NUM_EPOCHS         5
  MODEL_NAME         bigscience/bloom-560m
  SQUAD_DATA         rajpurkar/squad
  TRAIN_SAMPLES      1000
  EVAL_SAMPLES       100
  WORKERS_PER_TRIAL  2
  GPUS_PER_WORKER    1
  SEED               42
"""


def log_of(*body, settings=SETTINGS, finish="10:25:00", job="77"):
    """A log from START to FINISH (none if finish is "")."""
    end = f"===== JOB {job} FINISH : 2026-11-23 {finish} +03 =====\n" if finish else ""
    return f"===== JOB {job} START  : 2026-11-23 10:00:00 +03 =====\n{settings}" + "".join(part.rstrip("\n") + "\n" for part in body) + end


def before(mark, log=COMPLETE):
    """A log up to, not including, the line that holds the mark."""
    return log[: log.rindex("\n", 0, log.index(mark)) + 1]


def cancelled(mark):
    """The complete run as if cancelled before that line."""
    return before(mark) + "02:21:20 head vm | ended with exit status 143\n===== JOB local-1124-021555-3046 FINISH : 2026-11-24 02:21:21 UTC =====\n"


# ---- Complete runs ---------------------------------------------------------------------------------------------------
def test_the_tables_of_a_real_run_equal_its_results_row_by_row(read):
    found, text = read(COMPLETE)
    assert found["Table 1"] == [{"job start": "2026-11-24 02:15:55 UTC", "job finish": "2026-11-24 02:23:49 UTC", "total time": "0:07:54"}]
    assert list(found["Table 2"][0])[:6] == COURSE_COLUMNS
    assert len(found["Table 2"]) == len(RESULTS) == 12
    for row, (name, result) in zip(found["Table 2"], sorted(RESULTS.items())):
        last = result["reports"][-1]
        expected = [int(name[-5:]), *result["params"].values(), last["eval_loss"], last["time_total_s"]]
        for column, value in zip(COURSE_COLUMNS, expected):
            assert float(row[column]) == pytest.approx(value, rel=6e-6), (name, column)
        assert int(row["epochs"]) == last["training_iteration"]
        assert row["status"] == ("finished" if last["training_iteration"] == 5 else "stopped by ASHA")
    best = min((report["eval_loss"], report["time_total_s"], report["epoch"], *result["params"].values()) for result in RESULTS.values() for report in result["reports"])
    shown = found["Table 3"][0]
    assert list(shown) == ["best learning rate", "best batch size", "best weight decay", "eval loss", "total runtime", "epochs"]
    columns = ["eval loss", "total runtime", "epochs", "best learning rate", "best batch size", "best weight decay"]
    assert [float(shown[column]) for column in columns] == pytest.approx(best, rel=6e-6)
    total = sum(result["reports"][-1]["time_total_s"] for result in RESULTS.values())
    assert f"Sum of the trials' runtimes: {total:.0f} s; the job's time: 474 s" in text
    assert "Epochs trained: 37 of 60 (12 trials x 5 epochs), 38 % saved." in text
    assert "Slot-minutes (on CPUs; a slot is a place for one trial): 7.7 allocated (1 slot(s)" in text and "7.2 busy, 0.5 idle" in text
    assert "partial" not in text.lower()


def test_csv_and_json_hold_the_same_values(read, tmp_path):
    read(COMPLETE, "--csv", tmp_path / "a.csv", "--json", tmp_path / "a.json")
    rows = list(csv.DictReader((tmp_path / "a.csv").open()))
    (run,) = json.loads((tmp_path / "a.json").read_text())
    assert list(rows[0])[1:7] == COURSE_COLUMNS and len(rows) == len(run["trials"]) == 12
    for row, trial in zip(rows, run["trials"]):
        result = RESULTS[trial["trial"]]
        assert float(row["eval loss"]) == trial["eval_loss_last"] == pytest.approx(result["reports"][-1]["eval_loss"], rel=6e-6)
        assert trial["eval_loss_best"] == pytest.approx(min(r["eval_loss"] for r in result["reports"]), abs=6e-6)
        assert [loss for _, loss in trial["reports"]] == pytest.approx([r["eval_loss"] for r in result["reports"]], abs=6e-6)
    assert run["best"]["eval_loss"] == 0.32173068235405006


def test_the_summary_of_many_logs_has_one_row_a_run_and_names_those_that_are_not_complete(tmp_path):
    cut = COMPLETE[: COMPLETE.index("_00006  epoch 3/5")]
    for name, text in {"anna.out": COMPLETE, "ben.out": cut, "cleo.out": "no log\n"}.items():
        (tmp_path / name).write_text(text)
    answer = fill(*sorted(tmp_path.glob("*.out")), "--summary", tmp_path / "class.csv")
    assert answer.returncode == 2 and answer.stderr.count("\n") == 1 and "cleo.out" in answer.stderr
    anna, ben = csv.DictReader((tmp_path / "class.csv").open())
    assert anna["log"].endswith("anna.out") and anna["state"] == "complete" and anna["trials"] == "12" and anna["seed"] == "42"
    assert [float(anna[key]) for key in ("total time (s)", "epochs trained", "epochs of the full grid")] == [474, 37, 60]
    assert [float(anna[f"best {name}"]) for name in ("learning rate", "batch size", "weight decay")] == [0.0015731191654258477, 1, 0]
    assert float(anna["eval loss"]) == 0.32173068235405006 and anna["epochs"] == "5.0"
    total = sum(result["reports"][-1]["time_total_s"] for result in RESULTS.values())
    assert float(anna["sum of runtimes (s)"]) == pytest.approx(total, rel=1e-4)
    assert ben["state"].startswith("partial") and ben["trials"] == "7" and ben["job finish"] == ""


def test_a_run_folder_gives_all_digits_with_and_without_the_log(tmp_path):
    folder = tmp_path / "runs/local-1124-021555-3046"
    for name, result in RESULTS.items():
        (folder / "tune" / name).mkdir(parents=True)
        (folder / "tune" / name / "params.json").write_text(json.dumps({"train_loop_config": result["params"]}))
        (folder / "tune" / name / "result.json").write_text("".join(json.dumps(report) + "\n" for report in result["reports"]) + '{"eval_l')
    for with_log in (False, True):
        if with_log:
            (tmp_path / "logs").mkdir()
            (tmp_path / "logs/ray_head_bloom_5epochs-local-1124-021555-3046.out").write_text(COMPLETE)
        answer = fill("--json", tmp_path / "a.json", folder)
        assert answer.returncode == 0, answer.stderr
        assert ("0:07:54" in answer.stdout) == with_log == ("without the log" not in answer.stdout)
        (run,) = json.loads((tmp_path / "a.json").read_text())
        for trial in run["trials"]:
            last = RESULTS[trial["trial"]]["reports"][-1]
            assert (trial["eval_loss_last"], trial["runtime_s"]) == (last["eval_loss"], last["time_total_s"])
            assert trial["status"] == ("finished" if last["epoch"] == 5 else "stopped by ASHA")
        assert (run["best"]["eval_loss"], run["best"]["time_total_s"]) == (0.32173068235405006, 44.42643761634827)


def test_gpu_minutes_count_from_the_time_a_node_joined(read):
    joined = "10:05:00 head node1 | worker 1/2 joined: job 2 on worker1, 20 CPUs, 8 GPUs, 4 trial(s) at once"
    again = joined.replace("10:05", "10:15").replace("1/2", "2/2").replace("8 GPUs", "4 GPUs").replace("4 trial", "2 trial")
    cluster = "10:05:10 search | cluster: 4 trial(s) at once, 2 workers each, on GPUs"
    rows = [[*row[:7], 300.0, row[8]] for row in ROWS]
    _, text = read(log_of(joined, cluster, again, boxed(HEADER, rows)))
    # 8 GPUs for 20 minutes and 4 for 10; three trials of 5 minutes on 2 GPUs
    assert "GPU-minutes: 200.0 allocated (12 GPU(s), from the line 'joined' to FINISH), 30.0 busy, 170.0 idle (85 %)." in text
    held = "10:25:00 head node1 | worker job {} held its node for {} s, by Slurm's record"
    _, text = read(log_of(joined, cluster, again.replace("job 2", "job 3"), boxed(HEADER, rows), held.format(2, 1500), held.format(3, 900)))
    assert "GPU-minutes: 260.0 allocated (12 GPU(s), by Slurm's record of the worker jobs), 30.0 busy, 230.0 idle (88 %)." in text
    assert "with 6 trial(s) at once" in text


def test_the_expected_range_is_that_of_asha():
    low, high = fill_tables.expected_epochs(12, 5, 4)
    assert 20 <= low <= 24 and 42 <= high <= 47  # 22 to 45 in a simulation of 4,000 runs
    assert fill_tables.expected_epochs(12, 1, 4) == (12, 12)
    assert fill_tables.expected_epochs(1, 5, 1) == (5, 5)
    assert fill_tables.expected_epochs(12, 5, 4) == (low, high)


# ---- Running and cancelled -------------------------------------------------------------------------------------------
def test_a_running_job(read):
    found, text = read(before("TorchTrainer_012db_00005  epoch 4/5"))
    assert "Partial: the job has not finished." in text
    assert found["Table 1"][0]["job finish"] == "-" and found["Table 1"][0]["total time"] == "0:03:54 so far"
    assert [row["status"] for row in found["Table 2"]] == ["finished", "stopped by ASHA", "stopped by ASHA", "finished", "stopped by ASHA", "running"]
    assert found["Table 2"][5] | {} == {"combo id": "5", "learning rate": "0.001", "batch size": "1", "weight decay": "0.01", "eval loss": "0.6249",
                                        "runtime (s)": "~44", "status": "running", "epochs": "3"}
    assert found["Table 3"][0]["eval loss"] == "0.3309" and found["Table 3"][0]["total runtime"] == "37"
    assert "Epochs trained so far: 16 of 60" in text


def test_a_table_that_is_being_written(read):
    found, text = read(before("TorchTrainer_012db_00007 | TERMINATED") + "| TorchTrainer_012db_00007 | TERMI")
    assert "Partial" in text and len(found["Table 2"]) == 12
    assert found["Table 2"][6]["runtime (s)"] == "43.1687" and found["Table 2"][7]["runtime (s)"] == "~45"


@pytest.mark.parametrize(("mark", "trials"), [("GPUS_PER_WORKER", 0), ("00000  started", 0), ("00007  epoch 4/5", 8)])
def test_a_cancelled_job(read, mark, trials):
    found, text = read(cancelled(mark))
    assert "Partial: the job ended early (cancelled, or at its time limit, exit status 143)." in text
    assert found["Table 1"][0]["total time"] == "0:05:26"
    assert len(found["Table 2"]) == trials
    if trials:
        assert found["Table 2"][7]["status"] == "cut off" and found["Table 2"][7]["epochs"] == "3"
        assert found["Table 3"][0]["eval loss"] == "0.3309"
    else:
        assert found["Table 3"][0]["eval loss"] == "-" and "No trial has reported a loss." in text


# ---- Trials that go wrong --------------------------------------------------------------------------------------------
def test_one_trial_failed(read):
    rows = [ROWS[0], [*ROWS[1][:1], "ERROR", *ROWS[1][2:6], 1, 4.5, 0.1], ROWS[2]]
    errors = boxed(["Trial name", "# failures", "error file"], [[ROWS[1][0], 1, "/tmp/error.txt"]])
    event = f"10:10:00 search | {ROWS[1][0]}  FAILED     torch.OutOfMemoryError: CUDA out of memory"
    end = f"10:24:00 search | FAILED {ROWS[1][0]}: torch.OutOfMemoryError: CUDA out of memory (full trace: /x/error.txt)"
    found, text = read(log_of(event, boxed(HEADER, rows), errors, end))
    assert [row["status"] for row in found["Table 2"]] == ["finished", "FAILED", "finished"]
    assert list(found["Table 2"][0]) == [*COURSE_COLUMNS, "status", "epochs"]  # nothing of Ray's table of errors
    assert f"combo 1 ({ROWS[1][0]}): FAILED: torch.OutOfMemoryError: CUDA out of memory" in text
    assert found["Table 3"][0]["eval loss"] == "1.8"  # not the failed trial's 0.1


def test_all_trials_failed(read):
    events = [f"10:0{i}:00 search | {row[0]}  FAILED     ValueError: no data" for i, row in enumerate(ROWS)]
    rows = [[row[0], "ERROR", *row[2:6], None, None, None] for row in ROWS]
    found, text = read(log_of(*events, boxed(HEADER, rows), "ERROR: 3 of 3 trials ran, 3 failed", "10:24:00 head node1 | ended with exit status 1"))
    assert [row["status"] for row in found["Table 2"]] == ["FAILED"] * 3 and text.count("FAILED: ValueError: no data") == 3
    assert found["Table 2"][0]["eval loss"] == "-" and set(found["Table 3"][0].values()) == {"-"}
    assert "failed, exit status 1" in text


@pytest.mark.parametrize("with_event", [True, False])
def test_a_trial_that_diverged(read, tmp_path, with_event):
    rows = [ROWS[0], [*ROWS[1][:6], 2, 8.0, "nan"], ROWS[2]]
    event = [f"10:10:00 search | {ROWS[1][0]}  ended      diverged at epoch 2"] if with_event else []
    found, text = read(log_of(*event, boxed(HEADER, rows)), "--json", tmp_path / "a.json")
    assert found["Table 2"][1]["status"] == "diverged" and found["Table 2"][1]["eval loss"] == "nan"
    assert "at epoch 2: the loss was no number any more" in text
    assert found["Table 3"][0]["eval loss"] == "1.8"
    assert json.loads((tmp_path / "a.json").read_text())[0]["trials"][1]["eval_loss_last"] is None


# ---- Sizes, names, forms ---------------------------------------------------------------------------------------------
def test_one_trial(read):
    found, text = read(log_of(boxed(HEADER, ROWS[:1]), settings=SETTINGS.replace("NUM_SAMPLES        3", "NUM_SAMPLES        1")))
    assert len(found["Table 2"]) == 1 and found["Table 3"][0]["epochs"] == "5"
    assert "5 to 5 epochs" in text


def test_a_thousand_trials_take_less_than_two_seconds(read):
    rows = [[f"TorchTrainer_ab_{i:05d}", "TERMINATED", "10.0.0.2:7", 1e-5 + i * 1e-8, 1, 0.0, 5, 10.0, 9 - i / 1000] for i in range(1000)]
    events = [f"10:00:0{k} search | TorchTrainer_ab_{i:05d}  epoch {k}/5  eval_loss {9 - i / 1000:.5f}" for i in range(1000) for k in range(1, 6)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    found, text = read(log_of(*events, boxed(HEADER, rows), settings=SETTINGS.replace("NUM_SAMPLES        3", "NUM_SAMPLES        1000")))
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 2  # seconds of CPU: a busy machine changes nothing
    assert len(found["Table 2"]) == 1000 and found["Table 2"][999]["eval loss"] == "8.001" and found["Table 3"][0]["eval loss"] == "8.001"
    assert "5000 of 5000" in text


def test_hyperparameters_and_names_never_seen(read):
    header = [*HEADER[:6], "train_loop_config/warmup_ratio", "train_loop_config/lr_scheduler_type", *HEADER[6:]]
    rows = [[f"my run #{letter}", *row[1:6], 0.1, f"a|{letter}", *row[6:]] for letter, row in zip("zyx", ROWS)]
    found, text = read(log_of(boxed(header, rows)))
    assert list(found["Table 2"][0])[:8] == [*COURSE_COLUMNS, "warmup_ratio", "lr_scheduler_type"]
    assert [(row["combo id"], row["lr_scheduler_type"]) for row in found["Table 2"]] == [("0", r"a\|z"), ("1", r"a\|y"), ("2", r"a\|x")]
    assert "warmup_ratio 0.1" in text


@pytest.mark.parametrize("dots", ["...", "…"])
def test_cut_columns(read, dots):
    started = f"10:01:00 search | {ROWS[0][0]}  started    lr 1e-05  per_device_bs 1  wd 0  warmup_ratio 0.1"
    header = [*HEADER[:3], f"train_loop_config/l{dots}", f"{dots}fig/per_device_bs", f"{dots}loop_config/wd", f"{dots}mup_ratio", *HEADER[6:]]
    header[3] = f"{dots}loop_config/lr"
    rows = [[(dots + row[0][-14:]) if i == 0 else row[0], *row[1:6], 0.1, *row[6:]] for i, row in enumerate(ROWS)]
    found, _ = read(log_of(started, boxed(header, rows)))
    assert list(found["Table 2"][0])[:7] == [*COURSE_COLUMNS, "warmup_ratio"] and len(found["Table 2"]) == 3
    assert [row["batch size"] for row in found["Table 2"]] == ["1", "2", "1"] and found["Table 2"][0]["warmup_ratio"] == "0.1"
    header[4] = f"train_loop_config/per_dev{dots}"
    found, _ = read(log_of(started, boxed(header, rows)))
    assert [row["batch size"] for row in found["Table 2"]] == ["1", "2", "1"]


def test_headers_over_two_lines(read):
    header = [*HEADER[:4], "train_loop_config/pe\nr_device_bs", *HEADER[5:7], "total time\n(s)", "eval_loss"]
    found, _ = read(log_of(boxed(header, ROWS)))
    assert [row["batch size"] for row in found["Table 2"]] == ["1", "2", "1"] and found["Table 2"][2]["runtime (s)"] == "12.5"


def test_the_other_form_of_rays_table(read):
    """One frame, columns between blanks, empty cells: what Ray prints by default. (The file was printed by Ray.)"""
    found, _ = read(log_of((LOGS / "ray_default_table.txt").read_text(), finish=""))
    assert [list(row.values()) for row in found["Table 2"]] == [
        ["0", "1.2e-05", "2", "0", "0.5", "100.25", r"linear\|x", "finished", "5"],
        ["1", "3.4e-05", "1", "0.01", "-", "-", "cosine with  two", "running", "0"],
        ["2", "0.00034", "1", "0.01", "-", "-", "-", "pending", "0"],
        ["3", "3.4e-05", "1", "0.01", "nan", "12", "c", "diverged", "2"],
    ]


def test_windows_line_ends_and_colours(read):
    found, text = read(COMPLETE)
    again, same = read("\ufeff" + COMPLETE.replace("02:16:05 search", "\x1b[36m02:16:05 search").replace("\n", "\r\n"))
    assert found == again and text == same


def test_of_several_tables_the_last_wins(read):
    older = boxed(HEADER, [[row[0], status, *row[2:6], 1, 1.5, 7.7] for status, row in zip(("RUNNING", "RUNNING", "PENDING"), ROWS)])
    found, _ = read(log_of(older, boxed(HEADER, ROWS)))
    assert [(row["eval loss"], row["status"]) for row in found["Table 2"]] == [("2", "finished"), ("1.9", "finished"), ("1.8", "finished")]


def test_a_table_that_is_older_than_the_reports(read):
    reports = [f"10:0{k}:00 search | {ROWS[0][0]}  epoch {k}/5  eval_loss {3 - k / 2}" for k in (1, 2, 3)]
    found, _ = read(log_of(*reports, boxed(HEADER, [[ROWS[0][0], "RUNNING", *ROWS[0][2:6], 2, 60.0, 2.0]]), finish=""))
    assert (found["Table 2"][0]["eval loss"], found["Table 2"][0]["epochs"], found["Table 3"][0]["epochs"]) == ("1.5", "3", "3")


@pytest.mark.parametrize(("zone", "total"), [("+03", "0:25:00"), ("+02", "1:25:00"), ("+0230", "0:55:00")])
def test_a_clock_that_was_changed(read, zone, total):
    found, _ = read(log_of(boxed(HEADER, ROWS)).replace("10:25:00 +03", f"10:25:00 {zone}"))
    assert found["Table 1"][0]["total time"] == total


def test_a_job_that_slurm_has_started_twice(read):
    found, text = read(cancelled("00003  started") + log_of(boxed(HEADER, ROWS)))
    assert len(found["Table 2"]) == 3 and "the last one" in text and found["Table 1"][0]["total time"] == "0:25:00"


def test_a_job_over_midnight(read):
    text = log_of("23:59:50 search | T_0  started    lr 1e-05  per_device_bs 1  wd 0", "00:00:20 search | T_0  epoch 1/5  eval_loss 1.5",
                  "00:00:20 search | T_0  stopped    by ASHA after epoch 1", settings="", finish="00:01:00").replace(" 10:00:00", " 23:59:00")
    found, _ = read(text.replace("FINISH : 2026-11-23", "FINISH : 2026-11-24"))
    assert found["Table 1"][0]["total time"] == "0:02:00" and found["Table 2"][0]["runtime (s)"] == "~30"


def test_text_is_never_run_as_code(read, tmp_path):
    trap = tmp_path / "trap"
    best = f"Best Trial Result:\n{{'eval_loss': __import__('pathlib').Path({str(trap)!r}).write_text('x')}}"
    found, _ = read(log_of(boxed(HEADER, ROWS), best))
    assert not trap.exists() and found["Table 3"][0]["eval loss"] == "1.8"
    found, _ = read(log_of(boxed(HEADER, ROWS), "Best Trial Result:\n" + "[" * 15_000))
    assert found["Table 3"][0]["eval loss"] == "1.8"


# ---- No such log -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("content", "says"), [
    (b"", "is empty"), (b" \r\n", "is empty"), (b"\x7fELF\0\0\1" * 99, "is binary"),
    (b"Epoch 1/3\n+---+---+\n| a | b |\n+---+---+\n| 1 | 2 |\n+---+---+\n10:00:00 training | done\n", "is not the log of a search"),
    (b"===== JOB 5 START  : 2026-11-23 10:00:00 +03 =====\n10:00:01 worker w1 | this node: 20 CPUs\n", "the log of a worker job"),
    (b"lr\n" * 5, "is not the log of a search"),
])
def test_what_is_no_such_log_gets_one_line(read, content, says):
    found, text = read(content, status=2)
    assert not found and len(text.splitlines()) == 1 and text.startswith("ERROR: ") and says in text


def test_missing_inputs_do_not_hide_the_others(tmp_path):
    answer = fill(tmp_path / "none.out", LOGS / "complete.out", tmp_path)
    assert answer.returncode == 2
    assert [line.split(": ")[0] for line in answer.stderr.splitlines()] == ["ERROR", "ERROR"] and "none.out" in answer.stderr
    assert "## local-1124-021555-3046 (" in answer.stdout and len(tables(answer.stdout)["Table 2"]) == 12


def test_the_tables_need_the_standard_library_only():
    answer = subprocess.run([sys.executable, "-E", "-s", "-S", TOOL, LOGS / "complete.out"], check=False, text=True, capture_output=True)
    assert answer.returncode == 0, answer.stderr


# ---- Comparison ------------------------------------------------------------------------------------------------------
GRID = [f"RESULT lr={lr} per_device_bs={bs} wd={wd} eval_loss={loss:.5f} epoch=5 runtime_s=200.0"
        for loss, (lr, bs, wd) in enumerate([("1e-05", 1, "0.0"), ("0.0002", 1, "0.0")], start=1)]
SEARCH = log_of("10:05:00 head node1 | worker 1/1 joined: job 2 on worker1, 20 CPUs, 8 GPUs, 4 trial(s) at once",
                "10:05:10 search | cluster: 4 trial(s) at once, 2 workers each, on GPUs", boxed(HEADER, ROWS))


def manual_log(*results, finish="10:10:00", settings=SETTINGS, gpus=2):
    return log_of(f"GPUs: {gpus}", *results, settings=settings, finish=finish, job="5")


def compare(folder, manual, search=SEARCH):
    (folder / "manual.out").write_text(manual)
    (folder / "search.out").write_text(search)
    answer = fill("--compare", folder / "manual.out", folder / "search.out")
    assert answer.returncode == 0, answer.stderr
    return tables(answer.stdout)["Cost"], answer.stdout


def test_the_cost_table(tmp_path):
    rows, text = compare(tmp_path, manual_log(*GRID, "FAILED lr=5e-06 per_device_bs=2 wd=0.01 : out of memory"))
    assert [list(row.values()) for row in rows] == [
        ["manual grid 5", "1", "0:10:00", "2", "20.0", "1"], ["Ray Tune ASHA 77", "1.8", "0:25:00", "8", "160.0", "8.00"]]
    assert list(rows[0]) == ["run type", "eval loss", "runtime", "number of GPUs", "GPU-minutes", "cost ratio Ray/manual"]
    assert "the runs are comparable" in text and "NOT COMPARABLE" not in text


@pytest.mark.parametrize("name", ["MODEL_NAME", "SQUAD_DATA", "TRAIN_SAMPLES", "EVAL_SAMPLES", "NUM_EPOCHS", "SEED"])
def test_runs_that_are_not_comparable(tmp_path, name):
    _, text = compare(tmp_path, manual_log(*GRID, settings=re.sub(rf"({name} +)\S+", r"\g<1>7", SETTINGS)))
    assert f"NOT COMPARABLE: {name} is 7 in 5 and" in text and "runs are comparable" not in text


def test_a_grid_that_was_continued_costs_all_its_runtimes(tmp_path):
    rows, text = compare(tmp_path, manual_log(*GRID, finish="10:04:00"))
    assert rows[0]["runtime"] == "0:06:40" and rows[0]["GPU-minutes"] == "13.3" and "was continued" in text
    earlier = "lr,per_device_bs,wd,eval_loss,epoch,runtime_s\n1e-05,1,0.0,1.00000,5,200.0\n0.0002,1,0.0,2.0,5,200.0\n5e-06,2,0.01,0.5,4,200.0"
    rows, _ = compare(tmp_path, manual_log(*GRID, earlier, "done, see above", finish="10:08:00"))  # the grid's log ends with its CSV
    assert (rows[0]["eval loss"], rows[0]["runtime"]) == ("0.5", "0:10:00")


def test_comparison_on_cpus_and_of_a_csv(tmp_path):
    rows, text = compare(tmp_path, manual_log(*GRID, gpus=0), SEARCH.replace("on GPUs", "on CPUs"))
    assert rows[0]["GPU-minutes"] == "10.0 slot-minutes" and rows[1]["GPU-minutes"] == "80.0 slot-minutes" and rows[1]["cost ratio Ray/manual"] == "8.00"
    _, text = compare(tmp_path, manual_log(*GRID, gpus=0))
    assert "did not both run on GPUs" in text
    (tmp_path / "grid.csv").write_text("lr,per_device_bs,wd,eval_loss,epoch,runtime_s\n1e-05,1,0.0,1.5,5,60.0\n2e-05,1,0.0,1.25,4,60.0\n")
    answer = fill("--compare", tmp_path / "grid.csv", tmp_path / "search.out")
    assert "| manual grid grid | 1.25 | 0:02:00 | - | - | 1 |" in answer.stdout and "cannot be told" in answer.stdout


def test_the_tables_of_a_manual_grid(read):
    found, text = read(manual_log(GRID[0], GRID[0], GRID[1], "FAILED lr=5e-06 per_device_bs=2 wd=0.01 : out of memory"))
    assert [list(row.values()) for row in found["Table 2"]] == [
        ["0", "1e-05", "1", "0", "1", "200", "finished", "5"], ["1", "0.0002", "1", "0", "2", "200", "finished", "5"],
        ["2", "5e-06", "2", "0.01", "-", "-", "FAILED", "0"]]
    assert "FAILED: out of memory" in text and "ASHA" not in text
    line = "10:01:00 manual | lr=1e-05 per_device_bs=1 wd=0.0  epoch 1/5  eval_loss 2.5"
    found, text_running = read(manual_log(line, finish=""))
    assert list(found["Table 2"][0].values()) == ["0", "1e-05", "1", "0", "2.5", "-", "running", "1"] and "Partial" in text_running
    assert "GPU-minutes: 20.0 allocated (2 GPU(s), by START and FINISH), 13.3 busy" in text


def test_compare_wants_the_manual_grid_first():
    answer = fill("--compare", LOGS / "complete.out", LOGS / "complete.out")
    assert answer.returncode == 2 and "has no RESULT line" in answer.stderr and not answer.stdout


# ---- Pictures and report ---------------------------------------------------------------------------------------------
EVIL = "</script><img src=http://127.0.0.1:9/x.png onerror=alert(1)>$\\frac"


@pytest.fixture(scope="module")
def plots(tmp_path_factory):
    """Pictures and reports of three logs: the real one, one with hostile text, one without any trial."""
    folder = tmp_path_factory.mktemp("plots")
    header = [*HEADER[:6], "train_loop_config/<b>x", *HEADER[6:]]
    rows = [[EVIL + row[0], *row[1:6], EVIL, *row[6:]] for row in ROWS]
    events = [f"10:0{i}:00 search | {row[0]}  epoch {i + 1}/5  eval_loss {'nan' if i == 2 else 3 - i}" for i in range(3) for row in rows[:2]]
    (folder / "hostile.out").write_text(log_of(*events, boxed(header, rows), job="hostile/../<x>"))
    (folder / "none.out").write_text(log_of(job="none"))
    answer = fill("--plots", folder, LOGS / "complete.out", folder / "hostile.out", folder / "none.out")
    assert answer.returncode == 0, answer.stderr
    assert answer.stderr == ""
    return {name: folder / name for name in ("local-1124-021555-3046", "hostile_..__x_", "none")}


def test_the_pictures_fit_a4(plots):
    from matplotlib.image import imread

    for folder in plots.values():
        for name in ("loss.png", "slots.png", "learning_rate.png"):
            image = imread(folder / name)
            assert image.shape[1] == 1400 and 200 <= image.shape[0] <= 1800, name  # 7 inches at 200 dots an inch
            assert image[..., :3].std() > 0.01, f"{name} is blank"


def test_the_pictures_need_no_colour(plots):
    from matplotlib.image import imread

    for name in ("loss.png", "slots.png", "learning_rate.png"):
        image = imread(plots["local-1124-021555-3046"] / name)[..., :3]
        assert abs(image - image.mean(axis=2, keepdims=True)).max() < 0.02, name


def test_slots_hold_one_trial_at_a_time():
    run = read_run.Run("x", now=100, nodes=[(5, 8, 2, "1"), (50, 8, 1, "2")])
    for i, (start, end) in enumerate([(6, 30), (6, 40), (31, 60), (41, 90), (52, None)]):
        run.trials[str(i)] = read_run.Trial(str(i), start=start, end=end)
    bars, since = draw_report.on_slots(run)
    assert since == [5, 5, 50] and [bar[0] for bar in bars] == [0, 1, 0, 1, 2] and bars[4][3] == 100


@pytest.mark.parametrize(("losses", "share", "p"), [
    ([1, 2, 3, 4], 0.8, 1 / 3),  # by hand: ranks -1.5 .. 1.5 around their mean, sums of the groups -2 and 2; two of six ways to split them
    ([1, 2, 2, 3], 0.5, 2 / 3),  # equal losses share a rank: -1.5, 0, 0, 1.5; four of the six
    ([1, 4, 2, 3], 0.0, 1),
    ([1, 1, 2, math.inf], 0.889, 1 / 3),
])  # fmt: skip
def test_share_explained_by_two_groups_of_two(losses, share, p):
    found = draw_report.share_explained(losses, [0, 0, 1, 1])
    assert found == (pytest.approx(share, abs=1e-3), pytest.approx(p, abs=0.05))


def test_what_mattered_finds_it_and_does_not_find_what_is_not_there():
    run = read_run.Run("x")
    for i in range(24):  # the best learning rate lies in the middle; a third hyperparameter does nothing
        run.trials[str(i)] = read_run.Trial(str(i), {"lr": 10 ** (-5 + i / 10), "wd": 0.01 * (i % 2), "idle": i * 7 % 24}, [(1.0, abs(i - 12) + i % 2 * 0.1)])
    run.trials["23"].reports = [(1.0, math.nan)]  # diverged: the worst
    rows, n, epoch = draw_report.what_mattered(run)
    shares = {name: (share, p) for name, _, share, _, p in rows}
    low, middle, high = next(groups for name, groups, *_ in rows if name == "lr")
    assert middle[2] < low[2] and middle[2] < high[2] and low[1] == middle[1] == high[1] == 8
    assert (n, epoch) == (24, 1) and rows[0][0] == "lr" and shares["lr"][0] > 0.6 and shares["lr"][1] < 0.01
    assert shares["wd"][1] > 0.05 and shares["idle"][1] > 0.05
    run.trials = dict(list(run.trials.items())[:4])
    assert draw_report.what_mattered(run)[0] == []


def browse(page, folder):
    """Opens a page in headless Chromium. -> (DOM after its scripts, console lines, addresses that it asked for)"""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert chromium, "chromium is missing; it is part of the set-up of the tests: apt-get install chromium"
    net = folder / "net.json"
    command = [
        chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--disable-extensions", "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder / 'profile'}",
        "--enable-logging=stderr", f"--log-net-log={net}", "--window-size=1280,1000", "--dump-dom", page.resolve().as_uri(),
    ]
    for attempt in range(3):  # a browser that hangs at its own start or end says nothing about the page
        process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"HOME": str(folder)}, start_new_session=True)
        try:
            dom, errors = process.communicate(timeout=40)
            break
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            shutil.rmtree(folder / "profile", ignore_errors=True)
            assert attempt < 2, "chromium hung three times"
    assert process.returncode == 0, errors[-2000:]
    console = [line for line in errors.splitlines() if "CONSOLE" in line]
    asked = set()  # the browser's own requests have no origin; a page's have one, "null" for a file
    for event in json.loads(net.read_text())["events"]:
        values = event.get("params", {})
        if str(values.get("url", "")).startswith(("http", "ws", "ftp")) and values.get("initiator", "not an origin") != "not an origin":
            asked.add(values["url"])
    return dom, console, asked


def test_the_browser_check_sees_errors_and_requests(tmp_path):
    page = tmp_path / "page.html"
    page.write_text("<!doctype html><p id=a></p><img src='http://127.0.0.1:9/x.png'><script>document.getElementById('a').textContent = 1 + 1; none()</script>")
    dom, console, asked = browse(page, tmp_path)
    assert '<p id="a">2</p>' in dom and any("none is not defined" in line for line in console) and asked == {"http://127.0.0.1:9/x.png"}


def test_the_report_forbids_the_browser_any_request(plots, tmp_path):
    page = tmp_path / "page.html"
    page.write_text((plots["none"] / "report.html").read_text().replace("<h1>", "<img src='http://127.0.0.1:9/x.png'><h1>"))
    _, console, asked = browse(page, tmp_path)
    assert not asked and any("Content Security Policy" in line for line in console)


@pytest.mark.parametrize("name", ["local-1124-021555-3046", "hostile_..__x_", "none"])
def test_the_report_renders_in_a_browser(plots, name, tmp_path):
    page = shutil.copy(plots[name] / "report.html", tmp_path / "copied report.html")  # it needs nothing beside it
    dom, console, asked = browse(page, tmp_path)
    assert not console and not asked
    tables_shown = re.findall(r"<table>.*?</table>", dom, flags=re.DOTALL)
    trials = {"local-1124-021555-3046": 12, "none": 0}.get(name, 3)
    assert len(tables_shown) == (4 if trials == 12 else 3) and tables_shown[1].count("<tr>") == trials + 1
    assert len(re.findall(r"<img alt=\"[^\"]+\" src=\"data:image/png;base64,", dom)) == 3
    assert ('<svg class="main-svg"' in dom) == (trials > 0)
    if trials:
        lines = len(re.findall(r'<path class="js-line"', dom))
        assert lines == trials + {12: 3, 3: 2}[trials], "a line for each trial, and for each kind in the legend"
        assert "learning rate" in dom[dom.index("main-svg"):]
    assert "onerror=alert(1)>" not in re.sub(r"&lt;.*?&gt;", "", dom.split("</script>")[-1])


def test_a_report_of_a_thousand_trials(tmp_path):
    rows = [[f"TorchTrainer_ab_{i:05d}", "TERMINATED", "10.0.0.2:7", 1e-5 + i * 1e-7, 1 + i % 2, 0.0, 5, 10.0, 9 - i / 1000] for i in range(1000)]
    (tmp_path / "many.out").write_text(log_of(boxed(HEADER, rows)))
    answer = fill("--plots", tmp_path / "plots", tmp_path / "many.out")
    assert answer.returncode == 0 and not answer.stderr
    assert (tmp_path / "plots/report.html").stat().st_size < 12_000_000


def test_a_trial_that_lost_its_node_counts_each_epoch_once(read):
    name = "TorchTrainer_ab_00000"
    events = [f"10:00:10 search | {name}  started    lr 0.001  per_device_bs 1  wd 0", f"10:00:20 search | {name}  epoch 1/5  eval_loss 3.00000",
              f"10:00:30 search | {name}  epoch 2/5  eval_loss 2.00000", f"10:00:40 search | {name}  lost       with its node (1 of at most 3 times); starts again"]
    found, _ = read(log_of(*events))
    assert [found["Table 2"][0][key] for key in ("status", "epochs", "eval loss")] == ["not started", "2", "2"]
    again = [line.replace("10:00", "10:01") for line in events[:3]]
    found, text = read(log_of(*events, *again, f"10:01:40 search | {name}  epoch 3/5  eval_loss 1.50000", f"10:01:40 search | {name}  stopped    by ASHA after epoch 3"))
    assert [found["Table 2"][0][key] for key in ("status", "epochs", "eval loss", "runtime (s)")] == ["stopped by ASHA", "3", "1.5", "~30"]
    assert "3 of " in text
