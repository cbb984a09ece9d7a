"""What the benchmarks claim, where it can be asserted without a clock."""

import csv
import re
import statistics
import sys

import pytest
from conftest import (
    REPO,
    SCRIPT,
    best_of,
    call,
    copy_of_the_course,
    events_of,
    left_by,
    load_module,
    replace,
    reports_of,
    table_of,
    wait_for,
)

sys.path.insert(0, str(REPO / "tests/benchmarks"))
import asha_savings
import operations
import scale


@pytest.mark.parametrize("slots", [1, 4])
def test_asha_trains_less_than_the_full_grid_and_mostly_finds_its_best(hpo, slots):
    """Recorded curves, met by the script's own scheduler; the seeds are fixed, so is the outcome."""
    curves = asha_savings.Curves(hpo, asha_savings.DEMO, epoch_seconds=60)
    runs = [asha_savings.compare_with_full(hpo, curves, seed, slots) for seed in range(30)]
    assert {run["epochs_full"] for run in runs} == {60}
    assert all(12 < run["epochs"] <= 60 for run in runs)
    assert statistics.median(run["epochs"] for run in runs) <= 40
    assert statistics.median(run["time"] for run in runs) <= 0.8
    assert sum(run["best_found"] for run in runs) >= 24


def test_asha_that_promotes_trains_less_than_one_that_stops_and_loses_the_best_no_more_often(hpo):
    curves, found = asha_savings.Curves(hpo, asha_savings.DEMO, epoch_seconds=60), {}
    for search in (hpo, load_module(asha_savings.PROMOTING)):
        runs = [asha_savings.compare_with_full(search, curves, seed, slots=4) for seed in range(100)]
        found[search] = [statistics.mean(run[key] for run in runs) for key in ("epochs", "best_to_the_end")]
    stops, promotes = found.values()
    assert promotes[0] < 0.95 * stops[0] and promotes[1] >= max(stops[1], 0.95)


@pytest.mark.parametrize("text, said", [
    ("nan,nan,nan\n" + "\n".join(f"{k},{k / 2},{k / 4}" for k in range(1, 12)), ""),
    ("3,2,one\n" * 12, "could not convert"), ("3,2,1\n" * 11, "needs 12 lines or more"),
    ("3,2\n" * 11 + "3\n", "the same number"), (None, "No such file")])
def test_curves_of_anyone_are_replayed_and_a_bad_file_is_named(tmp_path, text, said):
    file = tmp_path / "public.txt"
    if text:
        file.write_text(text)
    done = call(asha_savings, "--curves", file, "--seeds", 2)
    assert (done.returncode, "Traceback" in done.stderr) == (2 if said else 0, False)
    assert said in done.stderr if said else "| 1 | promotes |" in done.stdout and "| epochs of 36 |" in done.stdout


TRIALS = 110  # with more than 100 the log has one line a trial


def test_more_than_a_hundred_trials_have_a_line_and_a_row_each_and_leave_no_processes(demo, tmp_path):
    """Through the real driver; each costs nothing, for which benchmarks/scale.py edits a copy."""
    run = scale.ARun(tmp_path, TRIALS, epochs=2, demo=demo)
    assert run.process.wait(600) == 0, run.log()
    log, reports = run.log(), reports_of(run.folder)
    assert len(reports) == len(run.ends()) == TRIALS
    rows = {row["Trial name"]: row for row in table_of(log)}
    ends = r"search \| (TorchTrainer_\S+)  (?:stopped|finished) .*?  eval_loss (\S+)  seconds "
    lines = dict(re.findall(ends, log))
    assert set(rows) == set(lines) == set(reports)
    for name, reported in reports.items():
        assert int(rows[name]["iter"]) == len(reported)
        assert float(lines[name]) == float(f"{reported[-1]['eval_loss']:.5f}")
    assert len(log.splitlines()) < 2 * TRIALS + 60
    assert f"{TRIALS} of {TRIALS} trials have ended, the lowest eval_loss is" in log

    # The record says the same.
    tables = call(load_module(REPO / "scripts/report/fill_tables.py"), run.folder, "--csv", tmp_path / "trials.csv")
    assert tables.returncode == 0, tables.stderr
    told = csv.DictReader((tmp_path / "trials.csv").open())
    epochs = {name: len(reported) for name, reported in reports.items()}
    assert {trial["Trial"]: int(trial["Epochs"]) for trial in told} == epochs

    early, late = run.early_and_late()
    assert late["processes"] <= early["processes"] + 2  # a process that Ray keeps idle may come and go
    assert not list(run.folder.glob("tune/.*.new"))
    assert left_by(run.job) == []


def test_a_time_budget_ends_a_run_in_order_with_its_best_and_its_tables(demo, tmp_path, monkeypatch):
    """No trial starts after it; those that run report once more, and do not count as stopped by ASHA."""
    over = tmp_path / "over"  # once it is there, the clock is an hour ahead: no machine is too slow

    def copied(folder):
        course = copy_of_the_course(folder)
        clock = ("time.time() >=", f"time.time() + 3600 * os.path.exists({str(over)!r}) >=")
        replace(course.parents[3] / SCRIPT.parent.relative_to(REPO) / "run_state.py", clock)
        return course

    monkeypatch.setattr(scale, "copy_of_the_course", copied)
    monkeypatch.setenv("TIME_BUDGET", "3600")
    run = scale.ARun(tmp_path, 90, epochs=10_000, demo=demo)
    wait_for(lambda: run.log().count("  stopped  ") > 1, 240, "two trials to have been stopped")
    over.touch()
    assert run.process.wait(300) == 0, run.log()
    log, reports = run.log(), reports_of(run.folder)
    _, after = log.split("the time budget is used up: no further trial starts (TIME_BUDGET)\n")
    cut_off, started = log.count("cut off    by TIME_BUDGET after epoch "), log.count("  started  ")
    assert "  started  " not in after and 0 < cut_off <= 2 < started == len(table_of(log)) < 90
    lowest = min(report["eval_loss"] for reported in reports.values() for report in reported)
    assert best_of(log)["eval_loss"] == lowest == events_of(run.folder, "best")[0]["eval_loss"]
    states = [trial["Status"] for trial in csv.DictReader((run.folder / "trials.csv").open())]
    assert states.count("cut off") == cut_off and len(states) == started


def test_a_step_launches_few_kernels_and_the_losses_stay_the_same():
    cases = [case for case in operations.CASES if case["stage"] == 2]
    for _, case, found in operations.measure([(1, cases)]):
        own, same, ours = found["own"], found["same"], found["ours"]
        assert ours["launches"] <= 2000 and ours["launches"] < same["launches"] < own["launches"], case
        assert (same["loss"], same["skipped"]) == (own["loss"], own["skipped"]), case  # in all digits, and overflows
        assert ours["loss"] == pytest.approx(own["loss"], rel=2e-3) and ours["skipped"] == own["skipped"]
        assert ("scale" in case) == (own["skipped"] > 0)
