"""fill_tables.py: each kind of log gives the right tables or one clear line; pictures, report, comparison."""

import csv
import datetime
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import as_study
import compare_runs
import draw_report
import optuna
import pytest
import read_run
from conftest import REPO

TOOL = REPO / "scripts/report/fill_tables.py"
LOGS = Path(__file__).parent / "logs"
COMPLETE = (LOGS / "complete.out").read_text()  # a quickstart run
RESULTS = json.loads((LOGS / "complete_results.json").read_text())  # its result.json files, shortened
HYPERPARAMETERS = ["Learning Rate (lr)", "Batch Size (bs)", "Weight Decay (wd)"]
COURSE_COLUMNS = ["Combo ID", *HYPERPARAMETERS, "Eval Loss", "Runtime (s)"]
BEST_COLUMNS = [f"Best {name}" for name in (*HYPERPARAMETERS, "Eval Loss")] + ["Total Runtime (s)", "Epochs"]


def fill(*arguments):
    """Runs the tool."""
    return subprocess.run([sys.executable, TOOL, *arguments], check=False, text=True, capture_output=True,
                          timeout=120)


def tables(text):
    """The Markdown tables of an output: {number: [{column: cell}]}."""
    found = {}
    for title, body in re.findall(r"^### (.*?)\n(.*?)(?=^##|\Z)", text, flags=re.DOTALL | re.MULTILINE):
        lines = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
                 for line in body.splitlines() if line.startswith("|")]
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
    text = [["|" + "|".join(f" {cell}".ljust(width) for cell, width in zip(row, widths)) + "|"
             for row in part] for part in (lines, body)]
    return "\n".join([border, *text[0], border.replace("+", "|", 1)[:-1] + "|", *text[1], border])


HEADER = ["Trial name", "status", "loc", "train_loop_config/lr", "train_loop_config/per_device_bs",
          "train_loop_config/wd", "iter", "total time (s)", "eval_loss"]
ROWS = [[f"TorchTrainer_ab_{i:05d}", "TERMINATED", "10.0.0.2:7", f"{(i + 1) * 1e-5:.6g}", 1 + i % 2,
         0.01 * (i % 2), 5, 10.5 + i, 2 - i / 10] for i in range(3)]
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
    parts = "".join(part.rstrip("\n") + "\n" for part in body)
    return f"===== JOB {job} START  : 2026-11-23 10:00:00 +03 =====\n{settings}{parts}{end}"


def before(mark, log=COMPLETE):
    """A log up to, not including, the line that holds the mark."""
    return log[: log.rindex("\n", 0, log.index(mark)) + 1]


def cancelled(mark):
    """The complete run as if cancelled before that line."""
    end = "===== JOB local-1124-021555-3046 FINISH : 2026-11-24 02:21:21 UTC ====="
    return f"{before(mark)}02:21:20 head vm | ended with exit status 143\n{end}\n"


# ---- Complete runs -----------------------------------------------------------------------------------------
def test_the_tables_of_a_real_run_equal_its_results_row_by_row(read):
    found, text = read(COMPLETE)
    assert found["Table 1"] == [{"Job Start Time": "2026-11-24 02:15:55 UTC",
                                 "Job Finish Time": "2026-11-24 02:23:49 UTC", "Total Job Time": "0:07:54"}]
    assert list(found["Table 2"][0])[:6] == COURSE_COLUMNS
    assert len(found["Table 2"]) == len(RESULTS) == 12
    for row, (name, result) in zip(found["Table 2"], sorted(RESULTS.items())):
        last = result["reports"][-1]
        expected = [int(name[-5:]) + 1, *result["params"].values(), last["eval_loss"], last["time_total_s"]]
        for column, value in zip(COURSE_COLUMNS, expected):
            assert float(row[column]) == pytest.approx(value, rel=6e-6), (name, column)
        assert int(row["Epochs"]) == last["training_iteration"]
        assert row["Status"] == ("finished" if last["training_iteration"] == 5 else "stopped by ASHA")
    best = min((report["eval_loss"], report["time_total_s"], report["epoch"], *result["params"].values())
               for result in RESULTS.values() for report in result["reports"])
    shown = found["Table 3"][0]
    assert list(shown) == BEST_COLUMNS
    columns = [*BEST_COLUMNS[3:], *BEST_COLUMNS[:3]]
    assert [float(shown[column]) for column in columns] == pytest.approx(best, rel=6e-6)
    total = sum(result["reports"][-1]["time_total_s"] for result in RESULTS.values())
    assert f"Sum of the trials' runtimes: {total:.0f} s; the job's time: 474 s" in text
    assert "Epochs trained: 37 of 60 (12 trials x 5 epochs), 38 % saved." in text
    assert "Slot-minutes (on CPUs; a slot is a place for one trial): 7.7 allocated (1 slot(s)" in text
    assert "7.2 busy, 0.5 idle" in text
    assert "partial" not in text.lower()


def test_csv_and_json_hold_the_same_values(read, tmp_path):
    read(COMPLETE, "--csv", tmp_path / "a.csv", "--json", tmp_path / "a.json")
    rows = list(csv.DictReader((tmp_path / "a.csv").open()))
    (run,) = json.loads((tmp_path / "a.json").read_text())
    assert list(rows[0])[:6] == COURSE_COLUMNS and len(rows) == len(run["trials"]) == 12
    for row, trial in zip(rows, run["trials"]):
        result = RESULTS[trial["trial"]]
        assert int(row["Combo ID"]) == trial["combo_id"] == int(trial["trial"][-5:]) + 1
        losses = [report["eval_loss"] for report in result["reports"]]
        assert float(row["Eval Loss"]) == trial["eval_loss_last"] == pytest.approx(losses[-1], rel=6e-6)
        assert trial["eval_loss_best"] == pytest.approx(min(losses), abs=6e-6)
        assert [loss for _, loss in trial["reports"]] == pytest.approx(losses, abs=6e-6)
    assert run["best"]["eval_loss"] == 0.32173068235405006


def test_the_summary_of_many_logs_has_one_row_a_run_and_names_those_that_are_not_complete(tmp_path):
    cut = COMPLETE[: COMPLETE.index("_00006  epoch 3/5")]
    for name, text in {"anna.out": COMPLETE, "ben.out": cut, "cleo.out": "no log\n"}.items():
        (tmp_path / name).write_text(text)
    answer = fill(*sorted(tmp_path.glob("*.out")), "--summary", tmp_path / "class.csv")
    assert answer.returncode == 2 and answer.stderr.count("\n") == 1 and "cleo.out" in answer.stderr
    anna, ben = csv.DictReader((tmp_path / "class.csv").open())
    assert anna["Log"].endswith("anna.out") and anna["State"] == "complete"
    assert anna["Trials"] == "12" and anna["Seed"] == "42"
    columns = ["Total Job Time (s)", "Epochs Trained", "Epochs of the Full Grid", *BEST_COLUMNS[:3]]
    assert [float(anna[column]) for column in columns] == [474, 37, 60, 0.0015731191654258477, 1, 0]
    assert float(anna["Best Eval Loss"]) == 0.32173068235405006 and anna["Epochs"] == "5.0"
    total = sum(result["reports"][-1]["time_total_s"] for result in RESULTS.values())
    assert float(anna["Sum of Runtimes (s)"]) == pytest.approx(total, rel=1e-4)
    assert ben["State"].startswith("partial") and ben["Trials"] == "7" and ben["Job Finish Time"] == ""


def test_a_run_folder_gives_all_digits_with_and_without_the_log(tmp_path):
    folder = tmp_path / "runs/local-1124-021555-3046"
    for name, result in RESULTS.items():
        trial = folder / "tune" / name
        trial.mkdir(parents=True)
        (trial / "params.json").write_text(json.dumps({"train_loop_config": result["params"]}))
        (trial / "result.json").write_text("\n".join([*map(json.dumps, result["reports"]), '{"eval_l']))
    for with_log in (False, True):
        if with_log:
            (tmp_path / "logs").mkdir()
            (tmp_path / "logs/ray_head_bloom_5epochs-local-1124-021555-3046.out").write_text(COMPLETE)
        answer = fill("--json", tmp_path / "a.json", folder)
        assert answer.returncode == 0, answer.stderr
        assert ("0:07:54" in answer.stdout) == with_log == ("no log ray_head" not in answer.stdout)
        (run,) = json.loads((tmp_path / "a.json").read_text())
        for trial in run["trials"]:
            last = RESULTS[trial["trial"]]["reports"][-1]
            assert (trial["eval_loss_last"], trial["runtime_s"]) == (last["eval_loss"], last["time_total_s"])
            assert trial["status"] == ("finished" if last["epoch"] == 5 else "stopped by ASHA")
        assert run["best"]["eval_loss"] == 0.32173068235405006
        assert run["best"]["time_total_s"] == 44.42643761634827


def test_a_run_folder_with_rays_own_names_of_trial_folders(tmp_path):
    for name, result in RESULTS.items():
        folder = tmp_path / f"runs/9/tune/{name}_{int(name[-5:])}_lr=0.0001,wd=0.0000_2026-11-24_02-15-55"
        folder.mkdir(parents=True)
        (folder / "params.json").write_text(json.dumps({"train_loop_config": result["params"]}))
        (folder / "result.json").write_text("".join(json.dumps(report) + "\n"
                                                    for report in result["reports"]))
    found = tables(fill(tmp_path / "runs/9").stdout)
    assert [float(row["Learning Rate (lr)"]) for row in found["Table 2"]] == pytest.approx(
        [RESULTS[name]["params"]["lr"] for name in sorted(RESULTS)], rel=6e-6)
    assert found["Table 2"][11]["Combo ID"] == "12" and found["Table 3"][0]["Best Eval Loss"] == "0.321731"


# ---- The end of a job --------------------------------------------------------------------------------------
def test_the_head_job_fills_all_in_one_call(tmp_path):
    began = datetime.datetime.now().astimezone() - datetime.timedelta(seconds=100)
    log, names = tmp_path / "ray_head_bloom_5epochs-77.out", ("tables.md", "trials.csv", "run.json")
    start = f"===== JOB 77 START  : {began:%Y-%m-%d %H:%M:%S %Z} ====="
    log.write_text(f"{start}\n{SETTINGS}{boxed(HEADER, ROWS)}\n")
    options = [part for name, file in zip(("--tables", "--csv", "--json"), names)
               for part in (name, tmp_path / file)]
    answer = fill("--finish-now", "--exit-status", "0", "--plots", tmp_path / "report", *options, log)
    assert answer.returncode == 0 and not answer.stderr
    assert answer.stdout == f"pictures and report: {tmp_path}/report/report.html\n"
    text, page = (tmp_path / "tables.md").read_text(), (tmp_path / "report/report.html").read_text()
    (run,), job = json.loads((tmp_path / "run.json").read_text()), tables(text)["Table 1"][0]
    drawn = (tmp_path / "report/slots.png").stat().st_mtime
    assert 100 <= run["total_time_s"] < 160 and run["total_time_s"] >= int(drawn) - int(began.timestamp())
    assert job["Job Finish Time"] == f"{run['finish']} {began:%Z}" and job["Job Finish Time"] in page
    assert run["state"] == "complete"
    assert len((tmp_path / "trials.csv").read_text().splitlines()) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, log.name, "report"])


def test_what_was_running_when_the_job_ends_is_cut_off(read):
    found, text = read(before("TorchTrainer_012db_00005  epoch 4/5"), "--finish-now", "--exit-status", "1")
    assert [row["Status"] for row in found["Table 2"]][-1] == "cut off"
    assert "Partial: the job ended early (failed, exit status 1)." in text
    assert "so far" not in found["Table 1"][0]["Total Job Time"]


def test_tables_are_written_though_the_pictures_cannot(tmp_path):
    (tmp_path / "plots").write_text("not a folder")
    answer = fill("--plots", tmp_path / "plots", "--tables", tmp_path / "a.md", LOGS / "complete.out")
    assert answer.returncode == 2 and re.fullmatch(f"ERROR: {tmp_path}/plots: .*\n", answer.stderr)
    assert len(tables((tmp_path / "a.md").read_text())["Table 2"]) == 12
    answer = fill("--csv", "/dev/stdout", "--tables", "/dev/null", LOGS / "complete.out")
    assert answer.stdout.startswith("Combo ID,") and answer.stdout.count("\n") == 13
    answer = fill("--tables", tmp_path / "none/a.md", LOGS / "complete.out")
    assert answer.returncode == 2 and f"{tmp_path}/none/a.md: cannot be written" in answer.stderr


def test_gpu_minutes_count_from_the_time_a_node_joined(read):
    joined = "10:05:00 head node1 | worker 1/2 joined: job 2 on worker1, 20 CPUs, 8 GPUs, 4 trial(s) at once"
    again = "10:15:00 head node1 | worker 2/2 joined: job 3 on worker1, 20 CPUs, 4 GPUs, 2 trial(s) at once"
    cluster = "10:05:10 search | cluster: 4 trial(s) at once, 2 workers each, on GPUs"
    rows = [[*row[:7], 300.0, row[8]] for row in ROWS]
    _, text = read(log_of(joined, cluster, again, boxed(HEADER, rows)))
    # 8 GPUs for 20 minutes and 4 for 10; three trials of 5 minutes on 2 GPUs
    assert "200.0 allocated (12 GPU(s), from the line 'joined' to FINISH), 30.0 busy, 170.0 idle (85" in text
    held = "10:25:00 head node1 | worker job {} held its node for {} s, by Slurm's record"
    requeued = again.replace("10:15", "10:16")  # by Slurm; it joins once more
    assert text == read(log_of(joined, cluster, again, requeued, boxed(HEADER, rows)))[1]
    _, text = read(log_of(joined, cluster, again, boxed(HEADER, rows),
                          held.format(2, 1500), held.format(3, 900)))
    assert "GPU-minutes: 260.0 allocated (12 GPU(s), by Slurm's record of the worker jobs), 30.0 busy" in text
    assert "with 6 trial(s) at once" in text


def test_the_forecast_of_the_log_stands_beside_what_was_trained(read):
    told = "10:00:05 head node1 | forecast: 5 to 12 of 15 epochs, 8 on average, with 2 trial(s) at once"
    assert "Forecast before the run: 5 to 12 of 15 epochs, 8 on average" in read(log_of(told, boxed(HEADER, ROWS)))[1]


# ---- Running and cancelled ---------------------------------------------------------------------------------
def test_a_running_job(read):
    found, text = read(before("TorchTrainer_012db_00005  epoch 4/5"))
    assert "Partial: the job has not finished." in text
    assert list(found["Table 1"][0].values())[1:] == ["-", "0:03:54 so far"]
    ends = ["finished", "stopped by ASHA", "stopped by ASHA", "finished", "stopped by ASHA", "running"]
    assert [row["Status"] for row in found["Table 2"]] == ends
    assert found["Table 2"][5] == {"Combo ID": "6", "Learning Rate (lr)": "0.001", "Batch Size (bs)": "1",
                                   "Weight Decay (wd)": "0.01", "Eval Loss": "0.6249",
                                        "Runtime (s)": "~44", "Status": "running", "Epochs": "3"}
    assert list(found["Table 3"][0].values())[3:] == ["0.3309", "37", "5"]
    assert "Epochs trained so far: 16 of 60" in text


def test_a_table_that_is_being_written(read):
    found, text = read(before("TorchTrainer_012db_00007 | TERMINATED") + "| TorchTrainer_012db_00007 | TERMI")
    assert "Partial" in text and len(found["Table 2"]) == 12
    assert found["Table 2"][6]["Runtime (s)"] == "43.1687" and found["Table 2"][7]["Runtime (s)"] == "~45"


@pytest.mark.parametrize(("mark", "trials"), [
    ("GPUS_PER_WORKER", 0), ("00000  started", 0), ("00007  epoch 4/5", 8)])
def test_a_cancelled_job(read, mark, trials):
    found, text = read(cancelled(mark))
    assert "Partial: the job ended early (cancelled, or at its time limit, exit status 143)." in text
    assert found["Table 1"][0]["Total Job Time"] == "0:05:26"
    assert len(found["Table 2"]) == trials
    if trials:
        assert found["Table 2"][7]["Status"] == "cut off" and found["Table 2"][7]["Epochs"] == "3"
        assert found["Table 3"][0]["Best Eval Loss"] == "0.3309"
    else:
        assert found["Table 3"][0]["Best Eval Loss"] == "-" and "No trial has reported a loss." in text


# ---- Trials that go wrong ----------------------------------------------------------------------------------
def test_one_trial_failed(read):
    rows = [ROWS[0], [*ROWS[1][:1], "ERROR", *ROWS[1][2:6], 1, 4.5, 0.1], ROWS[2]]
    errors = boxed(["Trial name", "# failures", "error file"], [[ROWS[1][0], 1, "/tmp/error.txt"]])
    event = f"10:10:00 search | {ROWS[1][0]}  FAILED     torch.OutOfMemoryError: CUDA out of memory"
    end = f"10:24:00 search | FAILED {ROWS[1][0]}: torch.OutOfMemoryError: CUDA (full trace: /x/error.txt)"
    found, text = read(log_of(event, boxed(HEADER, rows), errors, end))
    assert [row["Status"] for row in found["Table 2"]] == ["finished", "FAILED", "finished"]
    # nothing of Ray's table of errors
    assert list(found["Table 2"][0]) == [*COURSE_COLUMNS, "Status", "Epochs"]
    assert f"combo 2 ({ROWS[1][0]}): FAILED: torch.OutOfMemoryError: CUDA out of memory" in text
    assert found["Table 3"][0]["Best Eval Loss"] == "1.8"  # not the failed trial's 0.1


def test_all_trials_failed(read):
    events = [f"10:0{i}:00 search | {row[0]}  FAILED     ValueError: no data" for i, row in enumerate(ROWS)]
    rows = [[row[0], "ERROR", *row[2:6], None, None, None] for row in ROWS]
    found, text = read(log_of(*events, boxed(HEADER, rows), "ERROR: 3 of 3 trials ran, 3 failed",
                              "10:24:00 head node1 | ended with exit status 1"))
    assert [row["Status"] for row in found["Table 2"]] == ["FAILED"] * 3
    assert text.count("FAILED: ValueError: no data") == 3
    assert found["Table 2"][0]["Eval Loss"] == "-" and set(found["Table 3"][0].values()) == {"-"}
    assert "failed, exit status 1" in text


@pytest.mark.parametrize("with_event", [True, False])
def test_a_trial_that_diverged(read, tmp_path, with_event):
    rows = [ROWS[0], [*ROWS[1][:6], 2, 8.0, "nan"], ROWS[2]]
    event = [f"10:10:00 search | {ROWS[1][0]}  ended      diverged at epoch 2"] if with_event else []
    found, text = read(log_of(*event, boxed(HEADER, rows)), "--json", tmp_path / "a.json")
    assert found["Table 2"][1]["Status"] == "diverged" and found["Table 2"][1]["Eval Loss"] == "nan"
    assert "at epoch 2: the loss became NaN or infinite" in text
    assert found["Table 3"][0]["Best Eval Loss"] == "1.8"
    assert json.loads((tmp_path / "a.json").read_text())[0]["trials"][1]["eval_loss_last"] is None


# ---- Sizes, names, forms -----------------------------------------------------------------------------------
def test_one_trial(read):
    found, text = read(log_of(boxed(HEADER, ROWS[:1]),
                              settings=SETTINGS.replace("NUM_SAMPLES        3", "NUM_SAMPLES        1")))
    assert len(found["Table 2"]) == 1 and found["Table 3"][0]["Epochs"] == "5"
    assert "Forecast" not in text  # its log has none


def test_a_thousand_trials_take_less_than_two_seconds(read):
    rows = [[f"TorchTrainer_ab_{i:05d}", "TERMINATED", "10.0.0.2:7", 1e-5 + i * 1e-8, 1, 0.0, 5, 10.0,
             9 - i / 1000] for i in range(1000)]
    events = [f"10:00:0{k} search | TorchTrainer_ab_{i:05d}  epoch {k}/5  eval_loss {9 - i / 1000:.5f}"
              for i in range(1000) for k in range(1, 6)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    found, text = read(log_of(*events, boxed(HEADER, rows),
                              settings=SETTINGS.replace("NUM_SAMPLES        3", "NUM_SAMPLES        1000")))
    # seconds of CPU: a busy machine changes nothing
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 2
    assert len(found["Table 2"]) == 1000 and found["Table 2"][999]["Combo ID"] == "1000"
    assert found["Table 2"][999]["Eval Loss"] == found["Table 3"][0]["Best Eval Loss"] == "8.001"
    assert "5000 of 5000" in text


def test_hyperparameters_and_names_never_seen(read):
    header = [*HEADER[:6], "train_loop_config/warmup_ratio", "train_loop_config/lr_scheduler_type",
              *HEADER[6:]]
    rows = [[f"my run #{letter}", *row[1:6], 0.1, f"a|{letter}", *row[6:]]
            for letter, row in zip("zyx", ROWS)]
    found, text = read(log_of(boxed(header, rows)))
    assert list(found["Table 2"][0])[:8] == [*COURSE_COLUMNS, "warmup_ratio", "lr_scheduler_type"]
    shown = [(row["Combo ID"], row["lr_scheduler_type"]) for row in found["Table 2"]]
    assert shown == [("1", r"a\|z"), ("2", r"a\|y"), ("3", r"a\|x")]
    assert "warmup_ratio 0.1" in text


def test_windows_line_ends_and_colours(read):
    found, text = read(COMPLETE)
    coloured = COMPLETE.replace("02:16:05 search", "\x1b[36m02:16:05 search")
    again, same = read("\ufeff" + coloured.replace("\n", "\r\n"))
    assert found == again and text == same


def test_a_log_of_rays_own_lines_alone(read, tmp_path):
    """Several tables, a header over two lines, a list of error files. (Ray printed the lines.)"""
    found, text = read((LOGS / "ray_plain.out").read_text(), "--json", tmp_path / "a.json")
    assert [list(row.values()) for row in found["Table 2"]] == [
        ["1", "1.9528e-05", "2", "0", "2", "1.501", "finished", "5"],
        ["2", "3.79107e-05", "1", "0", "1.9", "1.50109", "finished", "5"],
        ["3", "9.98802e-06", "2", "0.01", "2.6", "0.30019", "FAILED", "1"],
        ["4", "1.50153e-05", "1", "0.01", "nan", "0.600324", "diverged", "2"],
        ["5", "0.000176918", "2", "0", "1.6", "6.50212", "finished", "5"],
    ]
    assert list(found["Table 3"][0].values()) == ["0.000176918", "2", "0", "1.6", "6.50212", "5"]
    assert "FAILED: see /tmp/s/tune/TorchTrainer_db630_00002_2" in text and "It is combo 5." in text
    assert "Epochs trained: 18 of 25" in text
    cluster = "10:00:00 search | cluster: 2 trial(s) at once, 2 workers each, on CPUs\n"  # the lesson's own line
    assert "with 2 trial(s) at once" in read(cluster + (LOGS / "ray_plain.out").read_text())[1]
    found, text = read(before("== Status ==\nCurrent time: 2026-11-26 01:08:30",
                              (LOGS / "ray_plain.out").read_text()))
    assert found["Table 1"][0]["Total Job Time"].endswith(" so far")
    assert found["Table 2"][4]["Status"] == "running"


def test_the_last_table_counts_also_for_a_trial_that_began_anew(read):
    older, newer = ([[ROWS[0][0], status, *ROWS[0][2:6], *rest]] for status, rest in (
        ("RUNNING", (3, 30.0, 1.1)), ("TERMINATED", (2, 25.5, 2.2))))
    found, _ = read(log_of(boxed(HEADER, older), boxed(HEADER, newer)))
    assert [found["Table 2"][0][name] for name in ("Status", "Epochs", "Eval Loss", "Runtime (s)")] == [
        "stopped by ASHA", "2", "2.2", "25.5"]


def test_a_table_that_is_older_than_the_reports(read):
    reports = [f"10:0{k}:00 search | {ROWS[0][0]}  epoch {k}/5  eval_loss {3 - k / 2}" for k in (1, 2, 3)]
    found, _ = read(log_of(*reports, boxed(HEADER, [[ROWS[0][0], "RUNNING", *ROWS[0][2:6], 2, 60.0, 2.0]]),
                           finish=""))
    assert found["Table 2"][0]["Eval Loss"] == "1.5"
    assert found["Table 2"][0]["Epochs"] == found["Table 3"][0]["Epochs"] == "3"


def test_a_clock_that_was_changed(read):
    _, text = read(log_of(boxed(HEADER, ROWS)).replace("10:25:00 +03", "10:25:00 +02"))
    assert "the clock was changed during the job (+03 to +02): times may be an hour off" in text


def test_a_job_that_slurm_has_started_twice(read):
    found, text = read(cancelled("00003  started") + log_of(boxed(HEADER, ROWS)))
    assert len(found["Table 2"]) == 3 and "the last one" in text
    assert found["Table 1"][0]["Total Job Time"] == "0:25:00"


def test_a_job_over_midnight(read):
    text = log_of("23:59:50 search | T_0  started    lr 1e-05  per_device_bs 1  wd 0",
                  "00:00:20 search | T_0  epoch 1/5  eval_loss 1.5",
                  "00:00:20 search | T_0  stopped    by ASHA after epoch 1", settings="", finish="00:01:00")
    text = text.replace(" 10:00:00", " 23:59:00")
    found, _ = read(text.replace("FINISH : 2026-11-23", "FINISH : 2026-11-24"))
    assert found["Table 1"][0]["Total Job Time"] == "0:02:00" and found["Table 2"][0]["Runtime (s)"] == "~30"


def test_text_is_never_run_as_code(read, tmp_path):
    trap = tmp_path / "trap"
    best = f"Best Trial Result:\n{{'eval_loss': __import__('pathlib').Path({str(trap)!r}).write_text('x')}}"
    found, _ = read(log_of(boxed(HEADER, ROWS), best))
    assert not trap.exists() and found["Table 3"][0]["Best Eval Loss"] == "1.8"
    found, _ = read(log_of(boxed(HEADER, ROWS), "Best Trial Result:\n" + "[" * 15_000))
    assert found["Table 3"][0]["Best Eval Loss"] == "1.8"


# ---- Logs as people keep them ------------------------------------------------------------------------------
@pytest.mark.parametrize("kept", [
    lambda text: text.encode("utf-16"),  # by PowerShell
    lambda text: text.encode("utf-16-be").replace(b"\0=", b"\xfe\xff\0=", 1),
    lambda text: textwrap.indent(text, "> ", lambda line: True).encode(),  # in a mail
    lambda text: textwrap.indent(text, "    ").encode(),
    lambda text: text.replace("\n", "\r\n").encode("utf-8-sig"),
])  # fmt: skip
def test_a_log_is_read_as_it_was_kept(read, kept):
    assert read(kept(COMPLETE)) == read(COMPLETE.encode())


@pytest.mark.parametrize("command, what", [
    ("fold -w 80", "lines were folded"), ("fold -s -w 80", "lines were folded"), ("fmt -w 72", "lines were folded"),
    ("grep -v '^[+|]' | fold -s -w 72", "lines were folded"), ("tr -s ' '", "blanks were squeezed"),
])  # fmt: skip
def test_of_a_log_that_was_changed_one_line_says_how(read, command, what):
    changed = subprocess.run(["bash", "-c", command], input=COMPLETE.encode(), capture_output=True, check=True).stdout
    found, text = read(changed, status=2)
    assert not found and re.fullmatch(f"ERROR: .*: its {what}, by a mail or chat .*; get the file itself.*\n?", text)


# ---- No such log -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("content", "says"), [
    (b"", "is empty"), (b" \r\n", "is empty"), (b"\x7fELF\0\0\1" * 99, "is binary"),
    (b"Epoch 1/3\n+---+---+\n| a | b |\n+---+---+\n| 1 | 2 |\n+---+---+\n10:00:00 training | done\n",
     "is not the log of a search"),
    (b"===== JOB 5 START  : 2026-11-23 10:00:00 +03 =====\n10:00:01 worker w1 | this node: 20 CPUs\n",
     "the log of a worker job"),
    (b"lr\n" * 5, "is not the log of a search"),
])
def test_what_is_no_such_log_gets_one_line(read, content, says):
    found, text = read(content, status=2)
    assert not found and len(text.splitlines()) == 1 and text.startswith("ERROR: ") and says in text


def test_missing_inputs_do_not_hide_the_others(tmp_path):
    answer = fill(tmp_path / "none.out", LOGS / "complete.out", tmp_path)
    assert answer.returncode == 2
    assert "none.out" in answer.stderr
    assert [line.split(": ")[0] for line in answer.stderr.splitlines()] == ["ERROR", "ERROR"]
    assert "## local-1124-021555-3046 (" in answer.stdout and len(tables(answer.stdout)["Table 2"]) == 12


def test_the_tables_need_the_standard_library_only():
    answer = subprocess.run([sys.executable, "-E", "-s", "-S", TOOL, LOGS / "complete.out"], check=False,
                            text=True, capture_output=True)
    assert answer.returncode == 0, answer.stderr


# ---- Comparison --------------------------------------------------------------------------------------------
GRID = [f"RESULT lr={lr} per_device_bs={bs} wd={wd} eval_loss={loss:.5f} epoch=5 runtime_s=200.0"
        for loss, (lr, bs, wd) in enumerate([("1e-05", 1, "0.0"), ("0.0002", 1, "0.0")], start=1)]
GRID_CSV = "lr,per_device_bs,wd,eval_loss,epoch,runtime_s"
OUT_OF_MEMORY = "FAILED lr=5e-06 per_device_bs=2 wd=0.01 : out of memory"
SEARCH = log_of("10:05:00 head n1 | worker 1/1 joined: job 2 on w1, 20 CPUs, 8 GPUs, 4 trial(s) at once",
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
    rows, text = compare(tmp_path, manual_log(*GRID, OUT_OF_MEMORY))
    assert [list(row.values()) for row in rows] == [
        ["manual grid 5", "1", "0:10:00", "2", "20.0", "1"],
        ["Ray Tune ASHA 77", "1.8", "0:25:00", "8", "160.0", "8.00"]]
    assert list(rows[0]) == ["run type", "eval loss", "runtime", "number of GPUs", "GPU-minutes",
                             "cost ratio Ray/manual"]
    assert "the runs are comparable" in text and "NOT COMPARABLE" not in text


@pytest.mark.parametrize("name", [
    "MODEL_NAME", "SQUAD_DATA", "TRAIN_SAMPLES", "EVAL_SAMPLES", "NUM_EPOCHS", "SEED"])
def test_runs_that_are_not_comparable(tmp_path, name):
    _, text = compare(tmp_path, manual_log(*GRID, settings=re.sub(rf"({name} +)\S+", r"\g<1>7", SETTINGS)))
    assert f"NOT COMPARABLE: {name} is 7 in 5 and" in text and "runs are comparable" not in text


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_runs_in_another_precision_are_not_comparable(tmp_path, precision):
    grid = manual_log(f"10:00:01 manual n1 | this node: 20 CPUs, 2 GPUs (NVIDIA A100), {precision}", *GRID)
    _, text = compare(tmp_path, grid, SEARCH.replace("8 GPUs,", "8 GPUs (NVIDIA A100), bf16,"))
    assert ("NOT COMPARABLE: the precision is fp16 in 5 and bf16 in 77." in text) == (precision == "fp16")
    assert ("workers and precision: the runs are comparable" in text) == (precision == "bf16")


def test_a_grid_that_was_continued_costs_all_its_runtimes(tmp_path):
    rows, text = compare(tmp_path, manual_log(*GRID, finish="10:04:00"))
    assert rows[0]["runtime"] == "0:06:40" and rows[0]["GPU-minutes"] == "13.3" and "was resumed" in text
    earlier = f"{GRID_CSV}\n1e-05,1,0.0,1.0,5,200.0\n0.0002,1,0.0,2.0,5,200.0\n5e-06,2,0.01,0.5,4,200.0"
    # the grid's log ends with its CSV
    rows, _ = compare(tmp_path, manual_log(*GRID, earlier, "done, see above", finish="10:08:00"))
    assert (rows[0]["eval loss"], rows[0]["runtime"]) == ("0.5", "0:10:00")


def test_comparison_on_cpus(tmp_path):
    rows, text = compare(tmp_path, manual_log(*GRID, gpus=0), SEARCH.replace("on GPUs", "on CPUs"))
    assert [row["GPU-minutes"] for row in rows] == ["10.0 slot-minutes", "80.0 slot-minutes"]
    assert rows[1]["cost ratio Ray/manual"] == "8.00"
    _, text = compare(tmp_path, manual_log(*GRID, gpus=0))
    assert "did not both run on GPUs" in text


def test_the_tables_of_a_manual_grid(read):
    found, text = read(manual_log(GRID[0], GRID[0], GRID[1], OUT_OF_MEMORY))
    assert [list(row.values()) for row in found["Table 2"]] == [
        ["1", "1e-05", "1", "0", "1", "200", "finished", "5"],
        ["2", "0.0002", "1", "0", "2", "200", "finished", "5"],
        ["3", "5e-06", "2", "0.01", "-", "-", "FAILED", "0"]]
    assert "FAILED: out of memory" in text and "ASHA" not in text
    line = "10:01:00 manual | lr=1e-05 per_device_bs=1 wd=0.0  epoch 1/5  eval_loss 2.5"
    found, text_running = read(manual_log(line, finish=""))
    assert list(found["Table 2"][0].values()) == ["1", "1e-05", "1", "0", "2.5", "-", "running", "1"]
    assert "Partial" in text_running
    assert "GPU-minutes: 20.0 allocated (2 GPU(s), by START and FINISH), 13.3 busy" in text


def test_a_resumed_grid_keeps_its_ids(read):
    earlier = "10:00:05 manual node1 | lr=2e-5 per_device_bs=1 wd=0.0 is in results-1.csv already"
    rows = f"{GRID_CSV}\n0.0002,1,0.0,2.0,5,200.0\n2e-05,1,0.0,0.5,4,90.0\n1e-05,1,0.0,1.0,5,200.0"
    for rest in ({"finish": ""}, {}):
        log = manual_log(GRID[0], earlier, GRID[1], *([] if rest else [rows]), **rest)
        found, _ = read(log)
        assert [row["Learning Rate (lr)"] for row in found["Table 2"]] == ["1e-05", "2e-05", "0.0002"]
        assert [row["Status"] for row in found["Table 2"]] == ["finished"] * 3
    assert found["Table 2"][1]["Eval Loss"] == "0.5"


def search(job, *settings, minutes=5, slots=2):
    """The log of a search on GPUs with other settings, one trial of which has two epochs."""
    text = SETTINGS
    for name, value in zip(settings[::2], settings[1::2]):
        text = re.sub(rf"({name} +)\S+", rf"\g<1>{value}", text)
    name = ROWS[0][0]
    return log_of(f"10:05:00 head n1 | worker 1/1 joined: job 2 on w1, 20 CPUs, 8 GPUs, {slots} trial(s) at once",
                  f"10:05:10 search | cluster: {slots} trial(s) at once, 2 workers each, on GPUs",
                  f"10:0{minutes}:20 search | {name}  started    lr 0.001  per_device_bs 1  wd 0",
                  f"10:0{minutes}:50 search | {name}  epoch 1/5  eval_loss 3.00000",
                  f"10:1{minutes}:00 search | {name}  epoch 2/5  eval_loss 1.50000",
                  "10:25:00 head n1 | worker job 2 held its node for 1260 s, by Slurm's record",
                  settings=text, job=job)  # fmt: skip


def test_searches_are_compared_with_the_first_and_their_settings_that_differ_are_named(tmp_path):
    logs = [search("1"), search("2", "SEED", "7"), search("3", "NUM_SAMPLES", "4", slots=4)]
    copies = "10:14:00 search | TorchTrainer_ab_00001  copies     TorchTrainer_ab_00000 as it was after epoch 1"
    logs[2] = logs[2].replace("10:15:00 search", f"{copies}\n10:15:00 search")
    for job, log in enumerate(logs, start=1):
        (tmp_path / f"{job}.out").write_text(log)
    answer = fill("--compare", *sorted(tmp_path.glob("*.out")))
    found, text = tables(answer.stdout), answer.stdout
    assert answer.returncode == 0 and not answer.stderr
    assert [row["run type"] for row in found["Cost"]] == ["Ray Tune ASHA 1", "Ray Tune ASHA 2", "Ray Tune PBT 3"]
    assert {row["cost ratio to the first"] for row in found["Cost"]} == {"1", "1.00"}
    assert "Same model, data, samples, epochs, and workers: the runs are comparable." in text
    assert found["Settings that differ"] == [
        {"run": "Ray Tune ASHA 1", "NUM_SAMPLES": "3", "SEED": "42", "trials at once": "2"},
        {"run": "Ray Tune ASHA 2", "NUM_SAMPLES": "3", "SEED": "7", "trials at once": "2"},
        {"run": "Ray Tune PBT 3", "NUM_SAMPLES": "4", "SEED": "42", "trials at once": "4"}]
    assert "The other 7 settings are the same." in text
    (tmp_path / "3.out").write_text(search("3", "SQUAD_DATA", "mine"))
    text = fill("--compare", tmp_path / "1.out", tmp_path / "3.out").stdout
    assert "NOT COMPARABLE: SQUAD_DATA is rajpurkar/squad in 1 and mine in 3." in text and "are comparable" not in text
    text = fill("--compare", tmp_path / "1.out", tmp_path / "1.out").stdout
    assert "None: with the same settings, runs differ by chance alone." in text


def test_a_grid_does_not_differ_by_what_only_searches_have(tmp_path):
    grid = manual_log(*GRID, settings=SETTINGS.replace("  NUM_SAMPLES        3\n", ""), gpus=2)
    _, text = compare(tmp_path, grid, search("77", "EVAL_SAMPLES", "50"))
    shown = tables(text)["Settings that differ"]
    assert [list(row.values()) for row in shown] == [["manual grid 5", "100", "1"], ["Ray Tune ASHA 77", "50", "2"]]
    assert "NOT COMPARABLE: EVAL_SAMPLES" in text and "cost ratio Ray/manual" in text


def test_the_curve_of_a_run_has_the_time_and_the_cost_of_each_lower_loss():
    run = read_run.parse(LOGS / "complete.out")
    curve = compare_runs.lowest_so_far(run)
    assert curve[0] == (42, 2.10908) and curve[-1] == (333, 0.32173)  # START is 02:15:55
    assert [loss for _, loss in curve] == sorted((loss for _, loss in curve), reverse=True)
    _, held = compare_runs.holdings(run)
    assert compare_runs.minutes(held) == compare_runs.totals(run)["allocated_min"] == pytest.approx(464 / 60)
    assert compare_runs.minutes(held, 5) == 0 and compare_runs.minutes(held, 70) == 1  # "cluster:" is at 10 s


def test_a_node_costs_from_the_start_of_its_job(tmp_path):
    (tmp_path / "a.out").write_text(search("1"))
    run = read_run.parse(tmp_path / "a.out")
    assert compare_runs.lowest_so_far(run) == [(350, 3.0), (900, 1.5)]
    unit, held = compare_runs.holdings(run)  # 1260 s until FINISH at 1500 s: from 240 s, though it joined at 300 s
    assert (unit, held) == ("GPU", [(240, 1500, 8)]) and compare_runs.totals(run)["allocated_min"] == 168
    assert compare_runs.minutes(held, 240) == 0 and compare_runs.minutes(held, 900) == 88


def test_the_curve_of_a_grid_without_a_clock_is_that_of_its_runtimes(tmp_path):
    (tmp_path / "resumed.out").write_text(manual_log(GRID_CSV, "1e-05,1,0.0,1.5,5,6000.0", "2e-05,1,0.0,1.25,4,6000.0"))
    assert compare_runs.lowest_so_far(read_run.parse(tmp_path / "resumed.out")) == [(6000, 1.5), (12000, 1.25)]
    lines = [f"10:0{k}:00 manual | lr=1e-05 per_device_bs=1 wd=0.0  epoch {k}/5  eval_loss {3 - k}" for k in (1, 2)]
    (tmp_path / "grid.out").write_text(manual_log(*lines, GRID[0]))
    assert compare_runs.lowest_so_far(read_run.parse(tmp_path / "grid.out")) == [(60, 2.0), (120, 1.0)]


def test_the_picture_of_several_runs(tmp_path):
    from matplotlib.image import imread

    (tmp_path / "none.out").write_text(log_of(boxed(HEADER, ROWS), job="8"))
    (tmp_path / "grid.out").write_text(manual_log(*GRID))
    for job in range(8):
        (tmp_path / f"{job}.out").write_text(search(str(job), "SEED", str(job), minutes=job))
    answer = fill("--compare", "--plots", tmp_path / "plots", *sorted(tmp_path.glob("*.out")), LOGS / "complete.out")
    assert answer.returncode == 0 and len(tables(answer.stdout)["Cost"]) == 11
    assert answer.stderr == f"{tmp_path}/none.out: has no times of reports, so it is not in the picture\n"
    image = imread(tmp_path / "plots/compare.png")[..., :3]
    assert image.shape[1] == 1400 and 700 < image.shape[0] < 1200  # 7 inches at 200 dpi
    assert image[:, :700].std() > 0.05 and image[:, 700:].std() > 0.05, "a panel is blank"
    assert abs(image - image.mean(axis=2, keepdims=True)).max() < 0.02, "it needs colour"
    assert (image[:, -4:] > 0.98).all() and (image[:, :4] > 0.98).all(), "something is cut off"
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["compare.png"]


# ---- Pictures and report -----------------------------------------------------------------------------------
EVIL = "</script><img src=http://127.0.0.1:9/x.png onerror=alert(1)>$\\frac"


@pytest.fixture(scope="module")
def plots(tmp_path_factory):
    """Pictures and reports of three logs: the real one, one with hostile text, one without any trial."""
    folder = tmp_path_factory.mktemp("plots")
    header = [*HEADER[:6], "train_loop_config/<b>x", *HEADER[6:]]
    rows = [[EVIL + row[0], *row[1:6], EVIL, *row[6:]] for row in ROWS]
    events = [f"10:0{i}:00 search | {row[0]}  epoch {i + 1}/5  eval_loss {'nan' if i == 2 else 3 - i}"
              for i in range(3) for row in rows[:2]]
    (folder / "hostile.out").write_text(log_of(*events, boxed(header, rows), job="hostile/../<x>"))
    (folder / "none.out").write_text(log_of(job="none"))
    answer = fill("--plots", folder, LOGS / "complete.out", folder / "hostile.out", folder / "none.out")
    assert answer.returncode == 0, answer.stderr
    assert answer.stderr == ""
    return {name: folder / name for name in ("local-1124-021555-3046", "hostile_..__x_", "none")}


def test_the_pictures_fit_a4(plots):
    from matplotlib.image import imread

    for folder in plots.values():
        for name in ("loss.png", "slots.png"):
            image = imread(folder / name)
            assert image.shape[1] == 1400 and 200 <= image.shape[0] <= 1800, name  # 7 inches, 200 dpi
            assert image[..., :3].std() > 0.01, f"{name} is blank"


def test_the_pictures_need_no_colour(plots):
    from matplotlib.image import imread

    for name in ("loss.png", "slots.png"):
        image = imread(plots["local-1124-021555-3046"] / name)[..., :3]
        assert abs(image - image.mean(axis=2, keepdims=True)).max() < 0.02, name


def test_slots_hold_one_trial_at_a_time():
    run = read_run.Run("x", now=100, nodes=[(5, 8, 2, "1"), (50, 8, 1, "2")])
    for i, (start, end) in enumerate([(6, 30), (6, 40), (31, 60), (41, 90), (52, None)]):
        run.trials[str(i)] = read_run.Trial(str(i), start=start, end=end)
    bars, since = draw_report.on_slots(run)
    assert since == [5, 5, 50] and [bar[0] for bar in bars] == [0, 1, 0, 1, 2] and bars[4][3] == 100


def test_importance_finds_what_mattered_and_a_diverged_trial_counts_as_the_worst():
    run = read_run.Run("x")
    for i in range(24):  # the best learning rate lies in the middle; another hyperparameter does nothing
        params = {"lr": 10 ** (-5 + i / 10), "per_device_bs": 1 + i % 2, "wd": 0.01 * (i * 7 % 24)}
        run.trials[str(i)] = read_run.Trial(str(i), params, [(1.0, abs(i - 12) + 0.01 * i)])
    run.trials["23"].reports = [(1.0, math.nan)]
    epoch, losses = draw_report.first_losses(run)
    assert epoch == 1 and losses["23"] == losses["0"] == max(losses.values())
    study = as_study.compared(run, lambda trial: losses.get(trial.name))
    importance = optuna.importance.get_param_importances(study)
    assert next(iter(importance)) == "lr" and importance["lr"] > 0.7


def test_a_run_is_an_optuna_study(tmp_path):
    (tmp_path / "log.out").write_text(log_of(boxed(HEADER, ROWS)))
    assert fill("--study", tmp_path / "study.db", tmp_path / "log.out").returncode == 0
    run = read_run.parse(tmp_path / "log.out")
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{tmp_path}/study.db")
    assert [trial.value for trial in study.trials] == [trial.best() for trial in run.trials.values()]
    assert study.best_params == {name: run.best["params"][name] for name in study.best_params}


def test_the_study_of_a_whole_log_has_epochs_times_and_how_each_trial_ended(tmp_path):
    log = REPO / "tests/logs/complete.out"
    assert fill("--study", tmp_path / "study.db", log).returncode == 0
    trials = optuna.load_study(study_name=None, storage=f"sqlite:///{tmp_path}/study.db").trials
    states = [trial.state.name for trial in trials]
    assert len(trials) == 12 and states.count("COMPLETE") == 6 and states.count("PRUNED") == 6
    assert trials[7].intermediate_values[5] == trials[7].value == min(trial.value for trial in trials)
    assert all(trial.duration.total_seconds() > 10 for trial in trials)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["study.db"]


@pytest.mark.parametrize("reached", ["GPUS_PER_WORKER", "00000  started", "00007  epoch 4/5"])
def test_a_run_that_was_cut_short_is_a_study_as_well(tmp_path, reached):
    (tmp_path / "log.out").write_text(cancelled(reached))
    answer = fill("--study", tmp_path / "study.db", "--plots", tmp_path / "plots", tmp_path / "log.out")
    assert answer.returncode == 0 and answer.stderr == ""
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{tmp_path}/study.db")
    assert {trial.state.name for trial in study.trials} <= {"COMPLETE", "PRUNED", "FAIL", "WAITING", "RUNNING"}


def browse(page, folder):
    """Opens a page in headless Chromium. -> (DOM after its scripts, console lines, requested addresses)"""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert chromium, "chromium is missing; it is part of the set-up of the tests: apt-get install chromium"
    net = folder / "net.json"
    command = [
        chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--disable-background-networking", "--disable-component-update",
        "--disable-sync", "--disable-extensions",
        "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder / 'profile'}",
        "--enable-logging=stderr", f"--log-net-log={net}", "--window-size=1280,1000",
        "--dump-dom", page.resolve().as_uri(),
    ]
    for attempt in range(3):  # a browser that hangs at its own start or end says nothing about the page
        process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   env=os.environ | {"HOME": str(folder)}, start_new_session=True)
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
        values = {"url": "", "initiator": "not an origin"} | event.get("params", {})
        if str(values["url"]).startswith(("http", "ws", "ftp")) and values["initiator"] != "not an origin":
            asked.add(values["url"])
    return dom, console, asked


def test_the_browser_check_sees_errors_and_requests(tmp_path):
    page = tmp_path / "page.html"
    page.write_text("<!doctype html><p id=a></p><img src='http://127.0.0.1:9/x.png'>"
                    "<script>document.getElementById('a').textContent = 1 + 1; none()</script>")
    dom, console, asked = browse(page, tmp_path)
    assert '<p id="a">2</p>' in dom and any("none is not defined" in line for line in console)
    assert asked == {"http://127.0.0.1:9/x.png"}


def test_the_report_forbids_the_browser_any_request(plots, tmp_path):
    page = tmp_path / "page.html"
    text = (plots["none"] / "report.html").read_text()
    page.write_text(text.replace("<h1>", "<img src='http://127.0.0.1:9/x.png'><h1>"))
    _, console, asked = browse(page, tmp_path)
    assert not asked and any("Content Security Policy" in line for line in console)


@pytest.mark.parametrize("name", ["local-1124-021555-3046", "hostile_..__x_", "none"])
def test_the_report_renders_in_a_browser(plots, name, tmp_path):
    page = shutil.copy(plots[name] / "report.html", tmp_path / "copied report.html")  # it needs no other file
    dom, console, asked = browse(page, tmp_path)
    assert not console and not asked
    tables_shown = re.findall(r"<table>.*?</table>", dom, flags=re.DOTALL)
    trials = {"local-1124-021555-3046": 12, "none": 0}.get(name, 3)
    assert len(tables_shown) == 3 and tables_shown[1].count("<tr>") == trials + 1
    assert len(re.findall(r"<img alt=\"[^\"]+\" src=\"data:image/png;base64,", dom)) == 2
    assert ('<svg class="main-svg"' in dom) == (trials > 0)
    if trials:
        assert "Lowest Eval Loss" in dom[dom.index("main-svg"):]
    assert "onerror=alert(1)>" not in re.sub(r"&lt;.*?&gt;", "", dom.split("</script>")[-1])


def test_a_report_of_a_thousand_trials(tmp_path):
    rows = [[f"TorchTrainer_ab_{i:05d}", "TERMINATED", "10.0.0.2:7", 1e-5 + i * 1e-7, 1 + i % 2, 0.0, 5, 10.0,
             9 - i / 1000] for i in range(1000)]
    (tmp_path / "many.out").write_text(log_of(boxed(HEADER, rows)))
    answer = fill("--plots", tmp_path / "plots", tmp_path / "many.out")
    assert answer.returncode == 0 and not answer.stderr
    assert (tmp_path / "plots/report.html").stat().st_size < 12_000_000


def test_a_trial_that_lost_its_node_counts_each_epoch_once(read):
    name = "TorchTrainer_ab_00000"
    events = [f"10:00:10 search | {name}  started    lr 0.001  per_device_bs 1  wd 0",
              f"10:00:20 search | {name}  epoch 1/5  eval_loss 3.00000",
              f"10:00:30 search | {name}  epoch 2/5  eval_loss 2.00000",
              f"10:00:40 search | {name}  lost       with its node (1 of at most 3 times); starts again"]
    found, _ = read(log_of(*events))
    columns = ("Status", "Epochs", "Eval Loss", "Runtime (s)")
    assert [found["Table 2"][0][column] for column in columns] == ["not started", "2", "2", "-"]
    again = [line.replace("10:00", "10:01") for line in events[:3]]
    found, text = read(log_of(*events, *again, f"10:01:40 search | {name}  epoch 3/5  eval_loss 1.50000",
                              f"10:01:40 search | {name}  stopped    by ASHA after epoch 3"))
    assert [found["Table 2"][0][column] for column in columns] == ["stopped by ASHA", "3", "1.5", "~30"]
    assert "3 of " in text
