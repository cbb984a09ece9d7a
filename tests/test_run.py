"""The exercise as a student runs it: real Slurm or none, real Ray, real DeepSpeed training; then its log is read."""

import contextlib
import csv
import os
import pty
import re
import select
import shlex
import signal
import socket
import subprocess
import time

import pytest
from conftest import (
    HEAD,
    HOSTILE,
    REPO,
    SMALL,
    SPACE,
    at_once,
    call,
    check_log,
    check_results,
    command_of,
    copy_of_the_course,
    events_of,
    job_of,
    left_by,
    load_module,
    nothing_is_left,
    pids,
    quickstart,
    replace,
    table_of,
    users_of,
    wait_for,
)

SIX = {"NUM_SAMPLES": "6", "TRAIN_SAMPLES": "64", "CPUS_PER_WORKER": str(len(os.sched_getaffinity(0)))}


def linked_runs(course):
    """On clusters runs/ is often a link to scratch."""
    (course.parents[3] / "scratch").mkdir()
    (course / "runs").symlink_to(course.parents[3] / "scratch")
    return course


def test_the_exercise_on_the_sandbox(cluster, demo, squad):
    """Twelve trials on one worker node that holds two. Read like a student would."""
    linked_runs(cluster.folder)
    variables = {"MODEL_NAME": str(demo / "model"), "SQUAD_DATA": str(squad), "CPUS_PER_WORKER": "4"}
    job = cluster.submit(**HOSTILE | SPACE | SMALL | variables | {"WORKERS_PER_TRIAL": "2"})
    file = cluster.folder / "runs" / job / "head-1/token"
    token = wait_for(lambda: file.exists() and file.read_text(), 60, "the token")
    assert cluster.wait_for_end(job, 900)["JobState"] == "COMPLETED", cluster.log(job)
    record, end = (cluster.job(each) for each in (job, *cluster.workers(job)))
    run_dir = cluster.folder / "runs" / job
    (worker,) = cluster.workers(job)
    assert end["JobState"] == "COMPLETED" and end["NodeList"] == "worker1"

    log = cluster.log(job)[cluster.log(job).index("=====") :]  # before it, what the system says of HOSTILE
    check_log(log, job)
    reports = check_results(log, run_dir, trials=12, epochs=5)
    assert at_once(log) == 2
    assert re.search(r"head \| forecast: \d+ to \d+ of 60 epochs, \d+ on average, with 2 trial\(s\) at once", log)
    assert {5} < {len(reported) for reported in reports.values()}  # some were trained to the end, others not
    for name, reported in reports.items():
        drawn = reported[0]["config"]["train_loop_config"]
        assert 1e-4 <= drawn["lr"] <= 5e-2 and drawn["per_device_bs"] in (2, 4) and drawn["wd"] in (0.0, 0.1)
        assert log.count(f"{name}  epoch ") == len(reported)
        stopped = f"stopped    by ASHA after epoch {len(reported)}"
        assert f"{name}  {'finished   all epochs' if len(reported) == 5 else stopped}" in log

    # The tables of the run, and the tool's from the log: start, finish, total and costs are Slurm's own.
    assert "tables and pictures could not be made" not in log
    file, summary = cluster.folder / f"logs/ray_head_bloom_5epochs-{job}.out", cluster.folder / "run.csv"
    told = call(load_module(REPO / "scripts/report/fill_tables.py"), file, "--summary", summary).stdout
    (found,) = csv.DictReader(summary.open())
    moment = lambda text: time.mktime(time.strptime(text.replace("T", " "), "%Y-%m-%d %H:%M:%S"))
    seconds, held = ([moment(each[key]) for key in ("StartTime", "EndTime")] for each in (record, end))
    said = [moment(found[f"Job {key} Time"][:19]) for key in ("Start", "Finish")]
    assert abs(said[0] - seconds[0]) <= 1 and abs(said[1] - seconds[1]) <= 1
    assert float(found["Total Job Time (s)"]) == said[1] - said[0]
    allocated = float(re.search(r": ([\d.]+) allocated \(2 slot", told)[1])  # in minutes, with one decimal
    assert allocated * 60 == pytest.approx(2 * (held[1] - held[0]), abs=4)
    table = (run_dir / "tables.md").read_text()
    assert "by Slurm's record of the worker jobs" in told and "Forecast before the run: " in table
    for name, (*_, last) in reports.items():
        row = next(line for line in table.splitlines() if line.startswith(f"| {int(name[-5:]) + 1} |"))
        expected = [*last["config"]["train_loop_config"].values(), last["eval_loss"], last["time_total_s"]]
        assert [float(cell) for cell in row.split("|")[2:7]] == pytest.approx(expected, rel=1e-4, abs=0.06)

    # The record tells the same.
    events = {event["event"]: event for event in events_of(run_dir)}
    assert [event["event"] for event in events_of(run_dir)][:2] == ["started", "settings"]
    assert events["started"]["log"] == str(cluster.folder / f"logs/ray_head_bloom_5epochs-{job}.out")
    assert (events["worker_joined"]["job"], events["worker_joined"]["slots"]) == (worker, 2)
    assert events["worker_ended"]["seconds"] == held[1] - held[0] and events["finished"]["status"] == 0
    assert f"forecast: {events['forecast']['text']}" in log
    assert f"===== JOB {job} FINISH : {found['Job Finish Time']}" in log

    # Workers left when they were told to, and nothing is left.
    assert held[1] - (run_dir / "head-1/shutdown.txt").stat().st_mtime < 5
    assert left_by(job, worker) == [] and not (run_dir / "head-1/token").exists()
    of_worker = cluster.log(worker, "worker")
    assert token not in log + of_worker + str(record) + str(end) and "START" in of_worker and "FINISH" in of_worker


@pytest.mark.parametrize("edit, variables, said", [
    ([("--constraint=v100", "--constraint=h100")], {}, "ERROR: sbatch refused the worker job"),
    ([], {"WORKERS_PER_TRIAL": "9"},
     "ERROR: one trial (WORKERS_PER_TRIAL=9 CPUS_PER_WORKER=2 GPUS_PER_WORKER=1) does not fit on a node with 20 CPUs"),
])  # fmt: skip
def test_a_worker_job_that_cannot_serve_ends_the_run_with_the_reason(cluster, demo, edit, variables, said):
    replace(cluster.folder / "worker_node_raytune_asha_hpo.slurm", *edit)
    job = cluster.submit(**SMALL | {"MODEL_NAME": str(demo / "model"), "SQUAD_DATA": str(demo / "squad")} | variables)
    assert cluster.wait_for_end(job, 60)["ExitCode"] == "1:0"
    assert said in cluster.log(job) and "FINISH" in cluster.log(job)
    nothing_is_left(cluster, job, seconds=10)


def test_cancelled_at_its_start_nothing_is_left(cluster, demo):
    """In mid-training: test_faults.py; at its end: test_exercises.py."""
    job = cluster.submit(**SMALL, MODEL_NAME=str(demo / "model"), SQUAD_DATA=str(demo / "squad"))
    wait_for(lambda: "START  :" in cluster.log(job), 60, "START in the log")
    cluster.cancel(job)


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    """The quickstart to its end, without a network. -> (the exercise's folder, exit status, log)"""
    course = linked_runs(copy_of_the_course(tmp_path_factory.mktemp("quick")))
    alone = ("unshare", "-n", "bash", "-c", 'ip link set lo up; exec "$@"', "bash") if os.geteuid() == 0 else ()
    command = ("bash", str(course.parents[3] / "scripts/quickstart.sh"))
    status, output = quickstart(course, *alone, *command, **SIX)
    return course, status, output[output.index("=====") :]


def test_quickstart(quick_run):
    """One command, no Slurm, no network: six trials, told to take all CPUs, so one at a time."""
    course, status, log = quick_run
    assert "cluster: 1 trial(s) at once, 1 workers each, on CPUs" in log
    assert status == 0 and "| Ray head at 127.0.0.1:" in log  # nothing of it is open to the network
    job = job_of(log)
    check_log(log, job)
    check_results(log, course / "runs" / job, trials=6, epochs=5)
    assert "tables and pictures could not be made" not in log
    assert (course / "runs" / job / "report/report.html").stat().st_size > 100_000
    assert log == (course / f"logs/ray_head_bloom_5epochs-{job}.out").read_text()
    assert left_by(job) == []


def decisions(run_dir):
    """What the scheduler decided at last: {(trial's number, epoch): (loss, decision)}."""
    rows = events_of(run_dir, "report")
    return {(int(row["trial"][-5:]), row["epoch"]): (row["eval_loss"], row["decision"]) for row in rows}


def test_a_continued_run_decides_as_if_it_had_not_been_interrupted(quick_run, course):
    """The quickstart's first five trials, the search killed in the fourth; RESUME: same draws, same decisions."""
    whole, _, log = quick_run
    linked_runs(course)
    command = ["bash", str(course.parents[3] / "scripts/quickstart.sh")]
    terminal = course / "terminal.txt"
    five = SIX | {"NUM_SAMPLES": "5"}
    with terminal.open("w") as file:
        head = subprocess.Popen(command, env=os.environ | five, stdout=file, stderr=subprocess.STDOUT)
    wait_for(lambda: "_00003  epoch 1/5" in terminal.read_text(), 240, "the fourth trial's first epoch")
    job, seen = job_of(terminal.read_text()), time.time()
    states = lambda: [path.stat().st_mtime for path in (course / "runs" / job / "tune").glob("experiment_state-*.json")]
    wait_for(lambda: max(states()) > seen, 30, "Ray to save that the third has ended")
    for pid in pids(f" head {job}"):
        if "raytune_asha_hpo.py" in command_of(pid):
            os.kill(pid, signal.SIGKILL)
    assert head.wait(60) == 137
    first = terminal.read_text()
    assert "the search was ended by signal 9" in first and f"continue with: RESUME=runs/{job} bash {HEAD}" in first
    assert re.findall(r"_(\d{5})  (?:stopped|finished)", first) == ["00000", "00001", "00002"]
    with (course / "runs" / job / "events.jsonl").open("a") as file:  # as if it had been killed while it wrote
        file.write('{"time": "')

    status, second = quickstart(course, *command, **five, RESUME=f"runs/{job}")
    assert status == 0, second
    assert re.findall(r"_(\d{5})  started", second) == ["00003", "00004"]  # the others are not trained again
    expected = {key: row for key, row in decisions(whole / "runs" / job_of(log)).items() if key[0] < 5}
    found = decisions(course / "runs" / job)
    assert found == {key: (pytest.approx(loss, rel=1e-4), decision) for key, (loss, decision) in expected.items()}
    jobs = [event["job"] for event in events_of(course / "runs" / job, "started")]
    assert jobs == [job, job_of(second)] and events_of(course / "runs" / job, "best")
    assert len(table_of(second)) == 5
    assert left_by(job, job_of(second)) == []


@pytest.fixture
def container(tmp_path):
    """Variables with a stand-in as CONTAINER.

    It does to a command what Charliecloud and Podman did: it cleans the environment, but keeps PATH, takes TMPDIR for
    /tmp, and starts in the root folder.
    """
    command = tmp_path / "container"
    inside = '[[ -z ${TMPDIR:-} ]] || mount --bind "$TMPDIR" /tmp; cd /; exec env -i HOME=/ PATH="$PATH" "$@"'
    command.write_text(f"#!/bin/bash\nexec unshare --mount bash -c {shlex.quote(inside)} inside \"$@\"\n")
    command.chmod(0o755)
    path = f"{REPO}/.venv/bin:{os.environ['PATH']}"
    return {"CONTAINER": str(command), "PATH": path, "TMPDIR": str(tmp_path)}


@pytest.fixture
def interrupted(course, demo, container):
    """A laptop's run that gets Ctrl-C (130) in its first trial, or whose terminal is closed (129), and leaves nothing.

    Its Python is in a container, whose processes are to be found from outside.
    """
    environ = os.environ | SPACE | SMALL | {"MODEL_NAME": str(demo / "model"), "SQUAD_DATA": str(demo / "squad")}
    command, environ = ["setsid", "--ctty", "--wait", "bash", HEAD], environ | container

    def run(status):
        ours, terminal = pty.openpty()
        head = subprocess.Popen(command, cwd=course, env=environ, stdin=terminal, stdout=terminal, stderr=terminal)
        os.close(terminal)
        shown = ""

        def trains():
            nonlocal shown
            while select.select([ours], [], [], 0)[0]:
                shown += os.read(ours, 65536).decode(errors="replace")
            return "  started" in shown

        wait_for(trains, 120, "the first trial")
        job = job_of(shown)
        of_ray, marked = users_of(f"/tmp/ray_{job}."), pids(f" head {job}")
        assert len(of_ray) > 10 and not [command_of(pid) for pid in of_ray if pid not in marked and command_of(pid)]
        if status == 130:
            os.write(ours, b"\x03")  # Ctrl-C
        else:
            os.close(ours)
        assert head.wait(60) == status
        log = (course / f"logs/ray_head_bloom_5epochs-{job}.out").read_text()
        assert f"ended with exit status {status}" in log and re.search(r"FINISH : .* =====\n\Z", log)
        (finished,) = events_of(course / "runs" / job, "finished")
        assert finished["status"] == status
        assert left_by(job) == [] and not (course / "runs" / job / "head-1/token").exists()
        return job

    return run


def test_a_run_whose_terminal_is_closed_leaves_nothing(interrupted):
    interrupted(129)


def test_of_two_runs_at_once_from_one_folder_one_is_interrupted_and_the_other_completes(slurm, course, demo, container,
                                                                                         interrupted):  # fmt: skip
    """Each with a Ray of its own on this machine, where another user's Ray has taken its usual ports.

    The second is inside an allocation, as in salloc or from JupyterHub.
    """
    environ = slurm | SPACE | SMALL | container | {"NUM_SAMPLES": "3", "NUM_EPOCHS": "2"}
    environ |= {"MODEL_NAME": os.path.relpath(demo / "model", course), "SQUAD_DATA": str(demo / "squad")}
    inside = ["srun", "--quiet", "--nodelist=worker1", "--cpus-per-task=4", "bash", HEAD]
    with contextlib.ExitStack() as taken:
        for port in (6379, 8265, 10001):
            taken.enter_context(socket.create_server(("127.0.0.1", port)))
        run = subprocess.Popen(inside, cwd=course, env=environ, text=True, stdout=subprocess.PIPE)
        first = interrupted(130)
        log = run.communicate(timeout=600)[0]
    assert run.returncode == 0 and job_of(log) != first, log
    said = r"head worker1 \| inside Slurm job \d+, but not by sbatch: this node alone is used, and no jobs"
    assert re.search(said, log) and "submitted worker" not in log
    assert f"Python: {course.parents[3]}/scripts/job/container/python" in log
    check_log(log, job_of(log))
    check_results(log, course / "runs" / job_of(log), trials=3, epochs=2)
    assert left_by(job_of(log)) == []
