"""fill_tables.py: a run folder, its log and the log alone give the same tables; costs, comparison, pictures, report."""

import csv
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import compare_runs
import draw_report
import fill_tables
import optuna
import pytest
import read_log
import read_run
from conftest import REPO, call

TOOL = REPO / "scripts/report/fill_tables.py"
LOGS = Path(__file__).parent / "logs"
COMPLETE, RECORD = ((LOGS / name).read_text() for name in ("complete.out", "events.jsonl"))  # of one run
JOB = "local-1124-021555-3046"
RESULTS = json.loads((LOGS / "complete_results.json").read_text())  # its result.json files, shortened
HYPERPARAMETERS = ["Learning Rate (lr)", "Batch Size (bs)", "Weight Decay (wd)"]
COURSE_COLUMNS = ["Combo ID", *HYPERPARAMETERS, "Eval Loss", "Runtime (s)"]
BEST_COLUMNS = [f"Best {name}" for name in (*HYPERPARAMETERS, "Eval Loss")] + ["Total Runtime (s)", "Epochs"]
SETTINGS = {"NUM_SAMPLES": "3", "NUM_EPOCHS": "5", "MODEL_NAME": "bigscience/bloom-560m", "SEED": "42",
            "SQUAD_DATA": "rajpurkar/squad", "TRAIN_SAMPLES": "1000", "EVAL_SAMPLES": "100", "WORKERS_PER_TRIAL": "2"}
NO_LOG = ("is not the log of a search, and its run folder is not here; "
          "give runs/<jobid> or logs/ray_head_bloom_5epochs-<jobid>.out")


# ---- A run made by hand: events, its folder and its log ----------------------------------------------------
def event(second, name, **fields):
    moment = datetime.datetime(2026, 11, 23, 7, tzinfo=datetime.UTC) + datetime.timedelta(seconds=second)
    return {"time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"), "event": name, **fields}


def local(second):
    return f"{datetime.datetime(2026, 11, 23, 10) + datetime.timedelta(seconds=second)} +03"


def started(second=0, job="77", kind="search", **settings):
    return [event(second, "started", job=job, start=local(second), kind=kind),
            event(second + 1, "settings", **SETTINGS | settings)]


def finished(second, status=0):
    return [event(second, "finished", status=status, finish=local(second))]


def joined(second, job="w1", gpus=8, slots=4, precision="bf16"):
    return [event(second, "worker_joined", job=job, node="n", cpus=20, gpus=gpus, slots=slots, precision=precision)]


def trial(number, *losses, start=0, each=10.0, error=None, ended=True, **config):
    """A trial whose epochs take `each` seconds."""
    name = number if isinstance(number, str) else f"TorchTrainer_ab_{number:05d}"
    config = {"lr": (1 + len(name) % 2) * 1e-5, "per_device_bs": 1, "wd": 0.0} | config
    events = [event(start, "trial_started", trial=name, config=config)]
    for k, loss in enumerate(losses, 1):
        decision = "STOP" if k == len(losses) and k < 5 else "CONTINUE"
        told = {"epoch": k, "eval_loss": loss, "seconds": k * each, "decision": decision}
        events.append(event(start + k * each, "report", trial=name, **told))
    return events + ended * [event(start + len(losses) * each, "trial_ended", trial=name, error=error)]


def keep(folder, *parts, job="77"):
    """Writes the events of a run into its folder below this one. -> the run folder"""
    run = folder / "runs" / job
    run.mkdir(parents=True, exist_ok=True)
    events = [each if isinstance(each, str) else json.dumps(each) for part in parts for each in part]
    (run / "events.jsonl").write_text("\n".join(events) + "\n")
    return run


def log_of(folder, *lines, job="77", start=0, finish=None):
    """Writes a log from START to FINISH beside a run folder."""
    end = [f"===== JOB {job} FINISH : {local(finish)} ====="] if finish is not None else []
    log = folder / f"logs/ray_head_bloom_5epochs-{job}.out"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("\n".join([f"===== JOB {job} START  : {local(start)} =====", *lines, *end]) + "\n")
    return log


@pytest.fixture
def sample(tmp_path):
    """(the log, the run folder) of the sample run, as they lie in the exercise's folder."""
    log, folder = log_of(tmp_path, job=JOB), keep(tmp_path, RECORD.splitlines(), job=JOB)
    log.write_text(COMPLETE)
    return log, folder


def fill(*arguments):
    """Runs the tool. -> (its tables, all that it says)"""
    answer = call(fill_tables, *arguments)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return tables(answer.stdout), answer.stdout + answer.stderr


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


def before(mark, text=COMPLETE):
    """A log or record up to, not including, the line that holds the mark."""
    return text[: text.rindex("\n", 0, text.index(mark)) + 1]


# ---- Tables ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("source", ["run folder", "log beside it", "log alone"])
def test_the_tables_of_a_real_run_equal_its_results_row_by_row(sample, source):
    log, folder = sample
    if source == "log alone":  # and from Windows
        shutil.rmtree(folder)
        log.write_text("\ufeff" + COMPLETE.replace("\n", "\r\n"), newline="")
    found, text = fill(folder if source == "run folder" else log)
    assert found["Table 1"] == [{"Job Start Time": "2026-11-24 02:15:55 UTC",
                                 "Job Finish Time": "2026-11-24 02:23:49 UTC", "Total Job Time": "0:07:54"}]
    assert list(found["Table 2"][0]) == [*COURSE_COLUMNS, "Status", "Epochs"] and len(found["Table 2"]) == 12
    for row, (name, result) in zip(found["Table 2"], sorted(RESULTS.items())):
        last = result["reports"][-1]
        values = [*result["params"].values(), last["eval_loss"], last["time_total_s"]]
        assert list(row.values())[:6] == [str(int(name[-5:]) + 1), *(f"{value:.6g}" for value in values)]
        assert row["Epochs"] == str(last["training_iteration"])
        assert row["Status"] == ("finished" if row["Epochs"] == "5" else "stopped by ASHA")
    best = min((report["eval_loss"], report["time_total_s"], report["epoch"], *result["params"].values())
               for result in RESULTS.values() for report in result["reports"])
    assert [found["Table 3"][0][name] for name in BEST_COLUMNS[3:] + BEST_COLUMNS[:3]] == [f"{x:.6g}" for x in best]
    assert "It is combo 8." in text and "partial" not in text.lower()
    assert "Sum of the trials' runtimes: 431 s; the job's time: 474 s" in text
    assert "Epochs trained: 37 of 60 (12 trials x 5 epochs), 38 % saved." in text
    needs = "need the run folder of this job, which is not here"
    assert (needs in text) == (source == "log alone") == ("7.8 allocated (1 slot(s), from joining" not in text)
    bare = [sys.executable, "-EsS", TOOL, folder if source == "run folder" else log]  # the standard library is enough
    assert tables(subprocess.run(bare, capture_output=True, text=True, check=True).stdout) == found


def grid(folder):
    """A manual grid of three combinations, one of which failed. -> (log, run folder)"""
    events = [started(job="5", kind="manual"), joined(2, job="5", gpus=2, slots=1),
              trial("lr=2e-05 per_device_bs=1 wd=0.0", 0.9, 0.8, 0.7, 0.512345, 0.6, start=10, each=18, lr=2e-5),
              trial("lr=1e-05 per_device_bs=1 wd=0.0", 3, 2.5, 2, 1.23456789, 1.5, start=210, each=40, lr=1e-5),
              trial("lr=5e-06 per_device_bs=2 wd=0.01", error="out of memory", lr=5e-6, per_device_bs=2, wd=0.01),
              finished(600, 1)]
    log = log_of(folder, "10:01:00 manual n1 | settings:", "  NUM_EPOCHS         5",
                 "10:09:00 manual n1 | ended with exit status 1", job="5", finish=600)  # fmt: skip
    return log, keep(folder, *events, job="5")


def test_the_tables_of_a_manual_grid(tmp_path):
    log, folder = grid(tmp_path)
    found, text = fill(log)
    assert [list(row.values()) for row in found["Table 2"]] == [
        ["1", "2e-05", "1", "0", "0.512345", "90", "finished", "5"],
        ["2", "1e-05", "1", "0", "1.23457", "200", "finished", "5"],
        ["3", "5e-06", "2", "0.01", "-", "-", "FAILED", "0"]]
    assert list(found["Table 3"][0].values()) == ["2e-05", "1", "0", "0.512345", "90", "4"]
    assert "FAILED: out of memory" in text and "ASHA" not in text and "exit status 1" in text
    assert "GPU-minutes: 20.0 allocated (2 GPU(s), from joining to the end), 9.7 busy" in text
    shutil.rmtree(folder)
    assert "its run folder is not here" in call(fill_tables, log).stderr


def test_other_programs_get_all_digits_and_one_row_for_each_of_many_logs(sample, tmp_path):
    for name, text in (("ben", before("_00006  epoch 3/5")), ("cleo", "no log\n")):
        (tmp_path / name).write_text(text)
    files = {f"--{name}": tmp_path / f"all.{name}" for name in ("csv", "summary")}
    options = [part for pair in files.items() for part in pair]
    answer = call(fill_tables, sample[0], tmp_path / "ben", tmp_path / "cleo", *options)
    assert answer.returncode == 2 and answer.stderr.count("\n") == 1 and "cleo" in answer.stderr
    rows = list(csv.DictReader(files["--csv"].open()))
    assert list(rows[0])[:6] == COURSE_COLUMNS and len(rows) == 12
    for row in rows:
        reports = RESULTS[row["Trial"]]["reports"]
        losses = [report["eval_loss"] for report in reports]
        assert float(row["Eval Loss"]) == losses[-1] and float(row["Lowest Eval Loss"]) == min(losses)
        assert float(row["Runtime (s)"]) == reports[-1]["time_total_s"]
    anna, ben = csv.DictReader(files["--summary"].open())
    assert anna["Log"] == str(sample[0]) and anna["State"] == "complete" and anna["Seed"] == "42"
    columns = ["Total Job Time (s)", "Trials", "Epochs Trained", "Epochs of the Full Grid", *BEST_COLUMNS[:4], "Epochs"]
    values = [474, 12, 37, 60, 0.0015731191654258477, 1, 0, 0.32173068235405006, 5]
    assert [float(anna[column]) for column in columns] == values
    assert ben["State"] == "partial: the job has not finished" and ben["Trials"] == "0" and not ben["Job Finish Time"]


def test_a_log_finds_its_run_folder_through_a_link_after_resume_and_where_ids_come_again(tmp_path, monkeypatch):
    course, again = tmp_path / "course", [started(500, job="78"), trial(1, 2.0, start=501), finished(600)]
    first, second = log_of(course), log_of(course, job="78", start=500, finish=600)
    (course / "runs").symlink_to(keep(tmp_path / "scratch", started(), trial(0, 1.0), *again).parent)
    for log in (first, second):  # the second has no run folder of its own
        found, text = fill(log)
        assert [row["Job Start Time"][11:19] for row in found["Table 1"]] == ["10:00:00", "10:08:20"]
        assert len(found["Table 2"]) == 2 and "not here" not in text
    moved = shutil.copy(second, tmp_path / "78.out")
    assert "not here" in fill(moved)[1]
    monkeypatch.setattr(read_log, "EXERCISES", [course])
    assert "not here" not in fill(moved)[1]
    log_of(course, job="77", start=90_000)  # another job with the number of the first
    assert "not here" in fill(first)[1]


# ---- Jobs and costs ----------------------------------------------------------------------------------------
def test_a_continued_run_has_a_row_for_each_job_and_nobody_pays_for_the_time_between(tmp_path):
    lost = trial(1, 1.0, start=60, each=60, ended=False)
    runs = [started(), joined(60), trial(0, 3.0, 2.0, start=60, each=30), lost, started(3600, job="78", SEED="7")]
    went_on = [joined(3660, job="w2"), trial(1, 1.0, 0.9, 0.8, 0.7, 0.6, start=3660, each=60), finished(4200)]
    folder = keep(tmp_path, *runs, *went_on)
    found, text = fill(folder)
    assert read_run.started_of(folder)["job"] == "77" and read_run.settings_of(folder) == SETTINGS | {"SEED": "7"}
    assert [list(row.values()) for row in found["Table 1"]] == [
        [local(0), "-", "-"], [local(3600), local(4200), "0:10:00"]]
    assert [list(row.values())[5:7] for row in found["Table 2"]] == [["60", "stopped by ASHA"], ["300", "finished"]]
    # 8 GPUs from 60 s to 120 s, the last that is known of the first job, and from 3660 s to FINISH
    assert "the job's time: 720 s; ratio 0.50 with 4 trial(s) at once." in text
    assert "GPU-minutes: 80.0 allocated (8 GPU(s), from joining to the end), 14.0 busy, 66.0 idle (82 %)." in text
    over = [[event(3659, "search", continues=False)], trial("TorchTrainer_cd_00000", 1.5, start=3660)]
    found, _ = fill(keep(tmp_path, *runs, *over, job="9"))  # Ray had saved nothing before the kill
    assert len(found["Table 1"]) == 2 and [row["Eval Loss"] for row in found["Table 2"]] == ["1.5"]
    bars = draw_report.on_slots(read_log.parse(folder))
    assert [(row, end) for row, _, _, end in bars] == [(1, 120), (2, 120), (1, 3960)]


def test_gpu_minutes_count_from_joining_or_by_slurms_record(tmp_path):
    run = [started(), joined(300, job="2"), *(trial(i, *[2.0] * 5, start=300, each=60) for i in range(3)),
           *(joined(second, job="3", gpus=4, slots=2) for second in (900, 960))]  # the latter: requeued
    _, text = fill(keep(tmp_path, *run, finished(1500)))
    # 8 GPUs for 20 minutes and 4 for 10; three trials of 5 minutes on 2 GPUs
    assert "200.0 allocated (12 GPU(s), from joining to the end), 30.0 busy, 170.0 idle (85" in text
    assert "with 6 trial(s) at once" in text and "Trained in bf16." in text
    held = [event(1499, "worker_ended", job=job, seconds=seconds) for job, seconds in (("2", 1495), ("3", 600))]
    _, text = fill(keep(tmp_path, *run, held, finished(1500)))
    assert "239.3 allocated (12 GPU(s), by Slurm's record of the worker jobs), 30.0 busy" in text  # 1495 * 8 + 600 * 4
    lost = [event(600, "worker_ended", job="2", cause="its node is gone")]
    assert "(8 GPU(s), from joining to the end)" in fill(keep(tmp_path, *run, lost, finished(1500)))[1]


def test_the_head_job_fills_all_in_one_call(tmp_path):
    began = datetime.datetime.now().astimezone() - datetime.timedelta(seconds=100)
    events = [*started(), event(9, "forecast", text="5 to 12 of 15 epochs, 8 on average"), *trial(0, *[2.0] * 5)]
    events[0]["start"] = f"{began:%Y-%m-%d %H:%M:%S %Z}"
    folder = keep(tmp_path, [each | {"time": began.astimezone(datetime.UTC).isoformat()} for each in events])
    assert call(fill_tables, folder, "--plots", folder / "r").returncode == 0
    assert '<meta http-equiv="refresh" content="60">' in (folder / "r/report.html").read_text()  # it runs
    files = {"--tables": "t.md", "--csv": "trials.csv", "--summary": "run.csv", "--study": "study.db", "--plots": "r"}
    options = [part for name, file in files.items() for part in (name, folder / file)]
    answer = call(fill_tables, folder, "--exit-status", 143, *options)
    assert (answer.returncode, answer.stderr) == (0, "") and answer.stdout.endswith(f": {folder}/r/report.html\n")
    assert {path.name for path in folder.iterdir()} == {*files.values(), "events.jsonl"}
    (run,), text = csv.DictReader((folder / "run.csv").open()), (folder / "t.md").read_text()
    assert run["State"] == "partial: the job ended early (cancelled, or at its time limit, exit status 143)"
    drawn = (folder / "r/slots.png").stat().st_mtime  # the job finishes after its pictures
    assert float(run["Total Job Time (s)"]) >= int(drawn) - int(began.timestamp()) >= 100
    assert 'http-equiv="refresh"' not in (folder / "r/report.html").read_text()
    for page in (text, (folder / "r/report.html").read_text()):
        assert run["Job Finish Time"] in page and "Forecast before the run: 5 to 12 of 15 epochs, 8 on" in page


@pytest.mark.parametrize(("options", "says"), [
    (["--plots", "file"], "file: cannot be used"), (["--tables", "file/a.md"], "file/a.md: cannot be used"),
    (["--study", "file/a.db"], "file/a.db: cannot be used"),
    *((option, "complete.out: its run folder is not here; pictures, --study and --compare need it")
      for option in (["--plots", "x"], ["--study", "x"], ["--compare"])),
])  # fmt: skip
def test_what_cannot_be_done_is_one_line_and_the_tables_come_all_the_same(sample, tmp_path, monkeypatch, options, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("not a folder")
    answer = call(fill_tables, LOGS / "complete.out" if "not here" in says else sample[0], *options)
    assert answer.returncode == 2 and re.fullmatch(f"ERROR: .*{says}.*\n", answer.stderr)
    assert bool(tables(answer.stdout)) == (options[0] not in ("--tables", "--compare"))


def test_the_status_of_a_trial_follows_from_its_events(tmp_path):
    lost = [*trial(5, 3.0, 2.0, ended=False), event(30, "trial_lost", trial="TorchTrainer_ab_00005")]
    parts = [started(), joined(1), trial(0, 5, 4, 3, 2, 1.8), trial(1, 0.1, error="OutOfMemoryError: CUDA"),
             ['{"time": "2026-'], trial(2, 4.0, None), trial(3, 4.0, 3.5), trial(4, 1.9, 1.85, start=100, ended=False)]
    folder = keep(tmp_path, *parts, lost)
    found, text = fill(folder)
    assert [(row["Status"], row["Epochs"], row["Eval Loss"]) for row in found["Table 2"]] == [
        ("finished", "5", "1.8"), ("FAILED", "1", "0.1"), ("diverged", "2", "nan"), ("stopped by ASHA", "2", "3.5"),
        ("running", "2", "1.85"), ("pending", "2", "2")]
    assert found["Table 2"][4]["Runtime (s)"] == "20" and found["Table 1"][0]["Total Job Time"] == "-"
    assert found["Table 3"][0]["Best Eval Loss"] == "1.8" and "14 of 30 (6 trials x 5 epochs) so far." in text
    assert "_ab_00001): FAILED: OutOfMemoryError: CUDA" in text and "at epoch 2: the loss became NaN" in text
    median = [event(199, "search", scheduler="MedianStoppingRule", continues=True)]
    found, text = fill(keep(tmp_path, *parts, median, trial(5, 3.0, 2.0, 1.5, start=200), finished(300, 1)))
    assert [row["Status"] for row in found["Table 2"]][4:] == ["cut off", "stopped by MedianStoppingRule"]
    assert found["Table 2"][5]["Epochs"] == "3" and "Partial: the job ended early (failed, exit status 1)." in text


@pytest.mark.parametrize("trials", [[], [trial(0, error="no data")]])
def test_without_a_loss_or_a_trial_the_tables_say_so(tmp_path, trials):
    found, text = fill(keep(tmp_path, started(), *trials, finished(60, 143)), "--plots", tmp_path / "plots")
    assert [row["Eval Loss"] for row in found["Table 2"]] == ["-"] * len(trials)
    assert set(found["Table 3"][0].values()) == {"-"} and "No trial has reported a loss." in text


def test_hyperparameters_never_seen_a_copy_of_pbt_and_a_scored_model(tmp_path):
    trials = [trial(f"my run #{letter}", 2.0, 1.5, ended=False, lr=1e-3, kind=f"a|{letter}") for letter in "zyx"]
    copied = trial("my run #z", 1.0, 1.8, start=50, lr=2e-3, kind="a|z")  # its best was drawn with the former lr
    folder = keep(tmp_path, started(), [event(2, "search", scheduler="PBT", continues=False)], *trials, copied[:1])
    score = {"exact_match": 5, "f1": 9.5, "eval_loss": 1, "standard_error": 0.1, "questions": 50}
    (folder / "scores.json").write_text(json.dumps({"before": score, "after": score}))
    found, text = fill(folder)
    assert list(found["Table 2"][0])[:7] == [*COURSE_COLUMNS, "kind"] and "kind a|z" in text
    assert [(row["Combo ID"], row["Learning Rate (lr)"], row["kind"]) for row in found["Table 2"]] == [
        ("1", "0.002", r"a\|z"), ("2", "0.001", r"a\|y"), ("3", "0.001", r"a\|x")]
    assert found["Table 3"][0]["Best Learning Rate (lr)"] == "0.001"
    assert found["The best as a model"][1]["F1 (%)"] == "9.5"
    assert compare_runs.title(read_log.parse(folder)) == "Ray Tune PBT 77"


def test_a_log_of_rays_own_lines_alone():
    """Several tables, a header over two lines, a list of error files. (Ray printed the lines.)"""
    found, text = fill(LOGS / "ray_plain.out")
    assert [list(row.values()) for row in found["Table 2"]] == [
        ["1", "1.9528e-05", "2", "0", "2", "1.501", "finished", "5"],
        ["2", "3.79107e-05", "1", "0", "1.9", "1.50109", "finished", "5"],
        ["3", "9.98802e-06", "2", "0.01", "2.6", "0.30019", "FAILED", "1"],
        ["4", "1.50153e-05", "1", "0.01", "nan", "0.600324", "diverged", "2"],
        ["5", "0.000176918", "2", "0", "1.6", "6.50212", "finished", "5"]]
    assert list(found["Table 3"][0].values()) == ["0.000176918", "2", "0", "1.6", "6.50212", "5"]
    assert "It is combo 5." in text and "Epochs trained: 18 of 25" in text


def test_a_log_that_was_cut_one_of_a_job_that_was_requeued_and_text_that_is_not_run_as_code(tmp_path):
    log, trap = tmp_path / "a.out", tmp_path / "trap"
    log.write_text(before("TorchTrainer_012db_00007 | TERMI") + "| TorchTrainer_012db_00007 | TERM")
    found, text = fill(log)
    assert "Partial" in text and len(found["Table 2"]) == 7 and list(found["Table 1"][0].values())[1:] == ["-", "-"]
    for code in (f"{{'eval_loss': __import__('pathlib').Path({str(trap)!r}).write_text('x')}}", "[" * 15_000):
        log.write_text(before("Best Trial Result:") + f"Best Trial Result:\n{code}")
        assert fill(log)[0]["Table 3"][0]["Best Eval Loss"] == "0.321731" and not trap.exists()
    cancelled = log_of(tmp_path, "10:00:09 head n | x", f"===== JOB 77 START  : {local(3600)} =====",
                       "11:06:40 head n | ended with exit status 143", finish=4000)  # fmt: skip
    found, text = fill(cancelled)
    assert "Partial: the job ended early (cancelled, or at its time limit, exit status 143)." in text
    assert [row["Total Job Time"] for row in found["Table 1"]] == ["-", "0:06:40"] and not found["Table 2"]


@pytest.mark.parametrize(("content", "says"), [
    (b" \r\n", NO_LOG), (b"\x7fELF\0\0\1" * 99, NO_LOG), (b"+---+\n| a |\n|---|\n| 1 |\n+---+\n", NO_LOG),
    (b"===== JOB 5 START  : 2026-11-23 10:00:00 +03 =====\n10:00:01 worker w1 | node\n", NO_LOG),
    ("folder", "is not a run folder (no events.jsonl)"), (None, "cannot be read (No such file"),
])  # fmt: skip
def test_what_cannot_be_read_gets_one_line_and_does_not_hide_the_others(tmp_path, content, says):
    wrong = tmp_path / "wrong"
    if content:
        wrong.mkdir() if content == "folder" else wrong.write_bytes(content)
        os.utime(wrong, (time.time() - 60,) * 2)  # one that is new would be watched
        watched = call(fill_tables, "--watch", wrong)
        assert (watched.returncode, watched.stdout) == (2, "") and watched.stderr.count("\n") == 1
        assert watched.stderr.startswith(f"ERROR: {wrong}: {says}")
    answer = call(fill_tables, wrong, LOGS / "complete.out")
    assert answer.returncode == 2 and re.fullmatch(f"ERROR: {wrong}: .*\n", answer.stderr) and says in answer.stderr
    assert f"## {JOB} (" in answer.stdout and len(tables(answer.stdout)["Table 2"]) == 12


# ---- Comparison --------------------------------------------------------------------------------------------
def a_search(folder, job="77", *, slots=4, precision="bf16", gpus=8, **settings):
    node = joined(300, gpus=gpus, slots=slots, precision=precision)
    trials = [*trial(0, 3.0, 1.5, start=320, each=300), *trial(1, 2.0, start=320, each=90)]
    return keep(folder, started(job=job, **settings), node, trials, finished(1500), job=job)


def test_a_search_is_compared_with_the_manual_grid(tmp_path):
    found, text = fill("--compare", grid(tmp_path)[1], a_search(tmp_path))
    assert [list(row.values()) for row in found["Cost"]] == [
        ["manual grid 5", "0.512345", "0:10:00", "2", "20.0", "1.00"],
        ["Ray Tune ASHA 77", "1.5", "0:25:00", "8", "160.0", "8.00"]]
    assert "the runs are comparable" in text and "NOT COMPARABLE" not in text
    assert "5 has 3 trials, 77 has 2." in text and "5: partial: the job ended early" in text
    changed = dict.fromkeys(set(compare_runs.SAME_TO_COMPARE) & set(SETTINGS), "7")
    _, text = fill("--compare", tmp_path / "runs/5", a_search(tmp_path, precision="fp16", gpus=0, **changed))
    says = [f"{name} is {SETTINGS[name]} in 5 and 7 in 77." for name in changed]
    for line in (*says, "precision is bf16 in 5 and fp16 in 77.", "device is GPU in 5 and CPU in 77."):
        assert f"NOT COMPARABLE: {line}" in text
    assert len(says) == 7 and "the runs are comparable" not in text
    resumed = keep(tmp_path, started(job="6", kind="manual"), joined(1, gpus=2, slots=1), *(
        trial(f"lr={i} per_device_bs=1 wd=0.0", 1 / i, start=i, each=200) for i in (1, 2)), finished(240), job="6")
    assert fill("--compare", resumed, a_search(tmp_path))[0]["Cost"][0]["runtime"] == "0:06:40"
    assert compare_runs.lowest_so_far(read_log.parse(resumed)) == [(200, 1.0), (400, 0.5)]


def test_searches_are_compared_with_the_first_in_settings_costs_and_a_picture(tmp_path):
    folders = [a_search(tmp_path, "1"), a_search(tmp_path, "2", SEED="7")]
    folders.append(a_search(tmp_path, "3", NUM_SAMPLES="4", slots=2))
    found, text = fill("--compare", *folders, "--plots", tmp_path / "plots")
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["compare.png"]
    assert {row["cost ratio to the first"] for row in found["Cost"]} == {"1.00"} and "runs are comparable." in text
    assert [list(row.values()) for row in found["Settings that differ"]] == [
        ["Ray Tune ASHA 1", "3", "42", "4"], ["Ray Tune ASHA 2", "3", "7", "4"], ["Ray Tune ASHA 3", "4", "42", "2"]]
    assert "Settings that differ" not in fill("--compare", folders[0], folders[0])[0]
    on_cpus = [a_search(tmp_path, job, gpus=0, slots=slots) for job, slots in (("8", 2), ("9", 4))]
    assert [list(row.values())[3:] for row in fill("--compare", *on_cpus)[0]["Cost"]] == [
        ["0 (2 slot(s) on CPUs)", "40.0 slot-minutes", "1.00"], ["0 (4 slot(s) on CPUs)", "80.0 slot-minutes", "2.00"]]
    assert compare_runs.lowest_so_far(read_log.parse(folders[0])) == [(410, 2.0), (920, 1.5)]


# ---- Pictures, study and report ----------------------------------------------------------------------------
def test_a_run_is_an_optuna_study_also_if_it_was_cut_short(sample, tmp_path):
    def study():
        fill("--study", tmp_path / "study.db", sample[1])
        return optuna.load_study(study_name=None, storage=f"sqlite:///{tmp_path}/study.db").trials

    trials = study()
    assert sorted(trial.state.name for trial in trials) == ["COMPLETE"] * 6 + ["PRUNED"] * 6
    assert trials[7].intermediate_values[5] == trials[7].value == min(trial.value for trial in trials)
    assert trials[7].params["lr"] == RESULTS["TorchTrainer_012db_00007"]["params"]["lr"]
    for mark, last in (('00000", "config', []), ('00007", "epoch": 4', ["RUNNING"])):
        (sample[1] / "events.jsonl").write_text(before(mark, RECORD))
        assert [trial.state.name for trial in study()[-1:]] == last


def test_the_report_renders_in_a_browser_with_hostile_text_and_without_a_request(tmp_path):
    evil = "</script><img src=http://127.0.0.1:9/x.png onerror=alert(1)>$\\frac"
    trials = [trial(f"{evil}_{i}", 3.0, 2.0 - i / 10, lr=10.0**-i, **{"<b>x": evil}) for i in range(1, 6)]
    folder = keep(tmp_path, started(job="a/../<x>"), joined(1), *trials, finished(99))
    assert call(fill_tables, "--plots", tmp_path / "plots", folder).stderr == ""
    page = shutil.copy(tmp_path / "plots/report.html", tmp_path / "copied report.html")  # it needs no other file
    page.write_text(page.read_text().replace("<h1>", "<img src='http://127.0.0.1:9/x.png'><script>none()</script><h1>"))
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--dump-dom",
               "--enable-logging=stderr", "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path}"]
    opened = subprocess.run([*command, page.resolve().as_uri()], text=True, capture_output=True, timeout=120,
                            check=True, env=os.environ | {"HOME": str(tmp_path)})  # fmt: skip
    dom, console = opened.stdout, [line for line in opened.stderr.splitlines() if "CONSOLE" in line]
    refused, wrong = console  # what was put in: the page forbids requests, and the check sees errors
    assert "Content Security Policy" in refused and "none is not defined" in wrong
    shown = re.findall(r"<table>.*?</table>", dom, flags=re.DOTALL)
    assert len(shown) == 3 and shown[1].count("<tr>") == 6
    assert len(re.findall(r"<img alt=\"[^\"]+\" src=\"data:image/png;base64,", dom)) == 2
    assert '<svg class="main-svg"' in dom and "Lowest Eval Loss" in dom[dom.index("main-svg"):]
    assert "onerror=alert(1)>" not in re.sub(r"&lt;.*?&gt;", "", dom.split("</script>")[-1])
