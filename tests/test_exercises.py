"""The exercises as a student does them, on a small scale: edits and commands are read from EXERCISES.md."""

import csv
import os
import re
import signal
import subprocess

import pytest
from conftest import (
    SMALL,
    SPACE,
    Cluster,
    best_of,
    check_log,
    command_of,
    copy_of_the_course,
    edit,
    events_of,
    exercise,
    fenced,
    nothing_is_left,
    pids,
    replace,
    reports_of,
    table_of,
    wait_for,
)

QUICK = SPACE | SMALL | {"NUM_SAMPLES": "2", "NUM_EPOCHS": "2", "CPUS_PER_WORKER": "16"}  # one at a time


class Student(Cluster):
    """Types the blocks of an exercise, one after another, in one shell's variables."""

    def __init__(self, environ, folder, demo, **variables):
        local = {"MODEL_NAME": str(demo / "model"), "SQUAD_DATA": str(demo / "squad")}
        super().__init__(environ | QUICK | variables | local, folder)
        self.shell = {}

    def types(self, block, seconds=120):
        """Returns what the block prints; `job` and the like are kept for the next one."""
        ends = "; ".join(f'echo "{name}=${name}" >&3' for name in ("job", "grid", "worker", "save"))
        script = f"exec 3>{self.folder}/shell.txt\n{block}\n{ends}\n"
        run = subprocess.run(["bash", "-ec", script], cwd=self.folder, env=self.environ | self.shell, text=True,
                             check=False, capture_output=True, timeout=seconds)  # fmt: skip
        assert run.returncode == 0, run.stdout + run.stderr
        pairs = (line.split("=", 1) for line in (self.folder / "shell.txt").read_text().splitlines())
        self.shell = {name: value for name, value in pairs if value}
        return run.stdout

    def runs(self, seconds=240):
        """The log of the job submitted last, which must end well."""
        job = self.shell["job"]
        assert self.wait_for_end(job, seconds)["JobState"] == "COMPLETED", self.log(job)
        check_log(self.log(job), job)
        return self.log(job)

    def does(self, number):
        """The edits and the first block of an exercise -> the log of its run, and the trials' reports."""
        edit(self.folder, exercise(number))
        self.types(fenced(exercise(number), "bash")[0])
        log = self.runs()
        return log, reports_of(self.folder / "runs" / self.shell["job"])


@pytest.fixture
def student(slurm, course, demo):
    return Student(slurm, course, demo)


def losses_of(run_dir):
    """The losses of each trial, in the order drawn."""
    return [[report["eval_loss"] for report in reports] for _, reports in sorted(reports_of(run_dir).items())]


@pytest.fixture(scope="module")
def done(slurm, demo, tmp_path_factory):
    """Exercise 4, more trials for the same budget: its run is the one that 8, 9 and 12 start from."""
    student = Student(slurm, copy_of_the_course(tmp_path_factory.mktemp("course")), demo)
    log, reports = student.does(4)
    assert len(reports) == len(table_of(log)) == 6 and log.count("finished   all epochs") == 6
    student.search, student.best = student.shell["job"], best_of(log)
    student.losses = losses_of(student.folder / "runs" / student.search)
    return student


def test_the_last_exercises_edit_fits_the_script(course):
    """Those of the others: below. This one needs a package of its own."""
    compile(edit(course, exercise(14)).read_text(), "edited", "exec")


def test_a_sampler_that_learns_another_halving_another_hyperparameter_and_lora(student):
    """Exercises 2, 3, 6, 11 and 13 in one run. Then save_best.slurm on Slurm, and an adapter that answers."""
    student.environ["NUM_SAMPLES"] = "6"
    for number in (3, 6, 11, 13):
        edit(student.folder, exercise(number))
    log, drawn = student.does(2)
    rows = table_of(log)
    assert re.search(r"^  LR_UPPER +10\.0$", log, re.MULTILINE)
    assert sorted(name[-5:] for name in drawn) == [f"{i:05d}" for i in range(6)] and len(rows) == 6
    assert all(row["iter"] == "2" for row in rows)  # nobody ends before epoch 2
    drawn = [report["config"]["train_loop_config"]["warmup_ratio"] for (report, *_) in drawn.values()]
    assert len(set(drawn)) == 6 and all(0 <= ratio <= 0.2 for ratio in drawn)
    assert any("warmup_ratio" in column for column in rows[0])
    assert set(re.findall(r"lora_rank (\d+)", log)) <= {"2", "8", "32"}

    manual, run = student.folder.parents[2] / "manual", student.folder / "runs" / student.shell["job"]
    save = fenced(exercise(13), "bash")[1]
    student.types(save)  # cancelled while it trains, it leaves no part of a model and no process
    cancelled = student.shell["save"]
    log = manual / f"logs/save_best-{cancelled}.out"
    wait_for(lambda: log.exists() and "epoch 1/" in log.read_text(), 120, "the first epoch")
    student("scancel", cancelled)
    assert student.wait_for_end(cancelled, 60)["JobState"] == "CANCELLED"
    wait_for(lambda: "FINISH" in log.read_text(), 30, "FINISH")
    assert not [path for path in run.iterdir() if "model" in path.name] and not pids(f" save {cancelled}")
    student.types(save)
    ended = student.wait_for_end(student.shell["save"], 240)
    log = (manual / f"logs/save_best-{student.shell['save']}.out").read_text()
    assert ended["JobState"] == "COMPLETED", log
    assert "FINISH" in log.splitlines()[-1]
    assert (run / "model/adapter_model.safetensors").exists() and log.count("    model: ") == 10
    assert "| Exact Match (%) | F1 (%) | Loss |" in (run / "tables.md").read_text()
    assert not (manual / f"logs/save_best-{student.shell['save']}.err").exists()


def test_a_second_worker_joins_and_the_first_is_killed(slurm, course, demo):
    """5 and 7. One trial a node, so long that the head looks at the queue (every ten seconds) before it ends."""
    student = Student(slurm, course, demo, NUM_EPOCHS="6", TRAIN_SAMPLES="1000", NUM_SAMPLES="3")
    (block,) = fenced(exercise(5), "bash")
    added = re.search(r"Submitted batch job (\d+)", student.types(block))[1]
    job = student.shell["job"]
    log = lambda: student.log(job)
    wait_for(lambda: f"worker 2/2 joined: job {added}" in log(), 60, "the added worker")
    wait_for(lambda: log().count("  started") >= 2 and "  epoch 1/" in log(), 60, "a trial on each node, and a report")
    student.types(fenced(exercise(7), "bash")[0])
    first = student.shell["worker"]
    assert first == student.workers(job)[0] != added
    wait_for(lambda: "submitted worker 3/3" in log(), 60, "the replacement")
    text = student.runs(300)
    assert re.search(r"lost       with its node \(1 of at most 3 times\); starts again", text)
    assert f"worker job {first} has ended before the search" in text
    assert f"worker job {added} has ended" not in text and f"worker job {added} held its node for" in text
    assert len(table_of(text)) == 3
    reports, losses = events_of(student.folder / "runs" / job, "report"), {}
    for report in reports:  # those of the lost trial come twice, with the same losses
        loss = losses.setdefault((report["trial"], report["epoch"]), report["eval_loss"])
        assert report["eval_loss"] == pytest.approx(loss, rel=1e-4)
    assert len(losses) < len(reports)
    nothing_is_left(student, job, added)


def test_asha_against_a_manual_grid_that_is_cut_short_and_goes_on(done):
    """Three combinations, the search's best first: one is trained, one is killed, then the job is cancelled.

    The next job ends with exit status 1: a fourth combination cannot be trained.
    """
    manual = Cluster(done.environ, done.folder.parents[2] / "manual")
    lr, bs, wd = (done.best["config"]["train_loop_config"][name] for name in ("lr", "per_device_bs", "wd"))
    replace(manual.folder / "bloom_hpo_manual.slurm", ("(1e-5 2e-4 5e-6)", f"({lr} 1e-3 2e-2 20)"),
            ("(1 2) ", f"({bs}) "), ("(0.0 0.01)", f"({wd})"))  # fmt: skip
    submit, compare = fenced(exercise(8), "bash")
    log = lambda job: (manual.folder / f"logs/bloom_hpo_manual-{job}.out").read_text()

    def trainers(lr):
        return [pid for pid in pids(f" manual {first}") if f"bloom_hpo_manual.py --lr {lr} " in command_of(pid)]

    done.types(submit)
    first = done.shell["grid"]
    wait_for(lambda: trainers("1e-3"), 240, "the second training")
    for pid in trainers("1e-3"):  # as the OOM killer does: this combination fails, the next ones go on
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: "FAILED " in log(first) and trainers("2e-2"), 120, "the next combination")
    manual("scancel", first)
    assert manual.wait_for_end(first, 60)["JobState"] == "CANCELLED"
    wait_for(lambda: "FINISH" in log(first) and not pids(f" manual {first}"), 30, "its orderly end")
    done.types(submit)
    second = done.shell["grid"]
    assert manual.wait_for_end(second, 400)["ExitCode"] == "1:0", log(second)
    why = "--lr='20': must be a number above 0.0 and at most 10.0"
    assert re.search(rf"^FAILED lr=20 per_device_bs={bs} wd={wd} : ERROR: {why}", log(second), re.MULTILINE)

    found = [row for file in manual.folder.glob("results-*.csv") for row in csv.DictReader(file.open())]
    combinations = [(float(row["lr"]), int(row["per_device_bs"]), float(row["wd"])) for row in found]
    assert combinations == [(lr, bs, wd) for lr in (lr, 1e-3, 2e-2)]
    assert log(first).count("RESULT ") == 1 and log(second).count("RESULT ") == 2  # none trained to its end twice
    assert re.search(rf"lr={lr} per_device_bs={bs} wd={wd} is in results-\d+.csv already", log(second))
    assert re.search(rf"===== JOB {second} FINISH : .* =====\n\Z", log(second))

    # Each job has a record: the first one's training that was killed, and all three results in the second one's.
    killed, last = (events_of(manual.folder / "runs" / job) for job in (first, second))
    first_error, second_error, *_ = [event["error"] for event in killed if event["event"] == "trial_ended"]
    assert first_error is None and second_error in log(first)
    ended = {event["trial"]: event["error"] for event in last if event["event"] == "trial_ended"}
    names = [f"lr={lr} per_device_bs={bs} wd={wd}" for lr in (lr, 0.001, 0.02, 20.0)]
    assert why in ended.pop(names[3]) and ended == dict.fromkeys(names[:3])
    assert (last[0]["kind"], last[2]["slots"], last[-1]["status"]) == ("manual", 1, 1)
    begun, *reports, _ = [event for event in last if event.get("trial") == names[1]]
    assert begun["config"] == {"lr": 0.001, "per_device_bs": bs, "wd": wd}
    assert [each["epoch"] for each in reports] == [1, 2] and 0 < reports[0]["seconds"] <= reports[1]["seconds"]

    # The losses of the search's best are those of the search: there is one training definition.
    losses = [event["eval_loss"] for event in killed if event["event"] == "report" and event["trial"] == names[0]]
    assert losses == pytest.approx(next(each for each in done.losses if min(each) == done.best["eval_loss"]), abs=1e-4)
    told = done.types(compare)
    assert f"manual grid {second}" in told and f"Ray Tune ASHA {done.search}" in told
    assert "the runs are comparable" in told and "NOT COMPARABLE" not in told
    rows = [line.split("|") for line in told.splitlines() if line.startswith("| ")]
    lowest = [min(float(row["eval_loss"]) for row in found), done.best["eval_loss"]]
    assert [float(row[2]) for row in rows[2:4]] == pytest.approx(lowest, rel=1e-3)


def test_the_winner_for_thirty_epochs(done):
    told = done.types(fenced(exercise(9), "bash")[0], 240)
    best = done.best["config"]["train_loop_config"]
    assert re.search(rf"^RESULT lr={best['lr']} per_device_bs={best['per_device_bs']} ", told, re.MULTILINE)
    assert told.count("epoch 30/30") == told.count("RESULT ") == 1  # from one of the two processes


def test_seeds_tell_luck_from_merit(done):
    """The search's best two with two seeds each."""
    repeat = fenced(exercise(12), "bash")[1]
    assert repeat.count("SEEDS=3 NUM_SAMPLES=9") == 1
    done.types(repeat.replace("SEEDS=3 NUM_SAMPLES=9", "SEEDS=2 NUM_SAMPLES=4"))
    log = done.runs()
    assert log.count("finished   all epochs") == len(table_of(log)) == 4
    again = losses_of(done.folder / "runs" / done.shell["job"])
    for first, (same, other) in zip(sorted(done.losses, key=min)[:2], (again[:2], again[2:]), strict=True):
        assert same == first != other  # the search's own seed gives its losses
    means = [sum(map(min, pair)) / 2 for pair in (again[:2], again[2:])]
    told = re.findall(r"seeds: [\d.]+ +([\d.]+) ", log)
    assert told == [f"{mean:.5f}" for mean in means]
    assert ("as in the search" in log) and ("not as in the search" in log) == (means[1] < means[0])


def test_population_based_training_and_a_job_that_is_cancelled_when_it_has_its_result(student):
    """Exercise 10. Cancelled at its start: test_run.py; in mid-training: test_faults.py."""
    student.types(fenced(exercise(10), "bash")[0])
    job = student.shell["job"]
    log = lambda: student.log(job)
    wait_for(lambda: "Best Trial Result" in log() or "FINISH" in log(), 240, "the result")
    student.cancel(job)
    assert log().count("finished   all epochs") == len(reports_of(student.folder / "runs" / job)) == 4
