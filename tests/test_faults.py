"""What a cluster does to a run: nodes, processes and jobs end at any moment. Real signals, Slurm, Ray, training."""

import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import (
    HEAD,
    REPO,
    SCRIPT,
    SMALL,
    SPACE,
    best_of,
    check_log,
    command_of,
    events_of,
    job_of,
    left_by,
    nothing_is_left,
    pids,
    quickstart,
    replace,
    table_of,
    wait_for,
)

BUSY = {"CPUS_PER_WORKER": "8"}  # two trials at once on a node of the sandbox: enough for its two real cores


def processes_with(word, *marks):
    """Processes of jobs (" role job") whose command line has a word."""
    return [pid for pid in pids(*marks) if word in command_of(pid)]


def demo_run(demo, **variables):
    return SPACE | SMALL | {"MODEL_NAME": str(demo / "model"), "SQUAD_DATA": str(demo / "squad")} | variables


@pytest.mark.parametrize("victim", ["batch shell", "gcs_server"])
def test_when_the_head_dies_the_workers_leave(cluster, demo, victim):
    job = cluster.submit(**demo_run(demo, NUM_SAMPLES="2", **BUSY))
    wait_for(lambda: "  started" in cluster.log(job), 120, "the first trial")
    if victim == "batch shell":
        script, every = f"job{int(job):05d}/slurm_script", psutil.process_iter()
        (shell,) = [p for p in every if script in command_of(p.pid) and "slurmstepd" in command_of(p.ppid())]
        shell.kill()
    else:
        for pid in processes_with("gcs/gcs_server", f" head {job}"):
            os.kill(pid, signal.SIGKILL)
    end = cluster.wait_for_end(job, 60)
    assert end["JobState"] == "FAILED" and end["ExitCode"] != "0:0"
    nothing_is_left(cluster, job)
    if victim == "gcs_server":
        log = cluster.log(job)
        assert "the Ray head ended" in log and "its last words are in" in log and "FINISH" in log
        assert not re.search(r"ray_job\.sh: line|Traceback|Killed", log)
        assert f"continue with: RESUME=runs/{job} sbatch {HEAD}" in log
        assert events_of(cluster.folder / "runs" / job, "finished")[0]["status"] == 1


def test_replacements_have_an_end_and_each_worker_that_cannot_work_says_why(cluster, demo, tmp_path):
    """Two of three have a node, and their Rays are killed. No other has a Python, with packages, and GPUs."""
    bare, driver = tmp_path / "bare", tmp_path / "nvidiactl"
    bare.mkdir()
    for tool in Path("/usr/bin").iterdir():
        if tool.name != "python":
            (bare / tool.name).symlink_to(tool)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    root = cluster.folder.parents[3]
    shutil.rmtree(root / ".venv")  # as with conda or modules, PATH has the environment
    replace(root / "scripts/job/this_node.py", ("/dev/nvidiactl", str(driver)))
    site = root / "experiments/site.sh"
    site.write_text(f"""{site.read_text()}
n=$((SLURM_JOB_ID - ${{2:-$SLURM_JOB_ID}}))   # after the head's number
((n < 3)) || case $((n % 3)) in
    0) export PATH={bare} ;;
    1) export PATH={tmp_path}/venv/bin:$PATH ;;
    2) touch {driver}; export SLURM_GPUS_ON_NODE=1 ;;
esac
""")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    job = cluster.submit(**demo_run(demo, NUM_SAMPLES="1", NUM_EPOCHS="200", **BUSY), PATH=path, WORKER_NODES="3")
    wait_for(lambda: "  started" in cluster.log(job) and "worker 2/3 joined" in cluster.log(job), 120, "the trial")
    first, second, _ = cluster.workers(job)
    for pid in processes_with("raylet/raylet", f" worker {first}", f" worker {second}"):
        os.kill(pid, signal.SIGKILL)
    assert cluster.wait_for_end(job, 120)["ExitCode"] == "1:0"
    log = cluster.log(job)
    said = dict(re.findall(r"worker job (\d+) has ended before the search: (.*)", log))
    causes = ("ERROR: no python found; run: bash ",
              f"ERROR: {tmp_path}/venv/bin/python has no PyTorch; activate the course's env",
              "ERROR: this node has an NVIDIA driver but PyTorch sees no GPU; check with: python -c ")  # fmt: skip
    assert set(said) == set(cluster.workers(job)) and len(said) >= 5, log
    for worker, cause in said.items():
        n = int(worker) - int(job)
        assert cause.startswith(causes[n % 3] if n >= 3 else "ERROR: Ray on this node has ended"), log
    assert re.search(r"no worker is left: \d in a row ended before they joined, 0 were refused", log), log
    ended = {event["job"]: event for event in events_of(cluster.folder / "runs" / job, "worker_ended")}
    assert {worker: event["cause"] for worker, event in ended.items()} == said and ended[first]["seconds"] > 0
    nothing_is_left(cluster, job)


def test_trials_that_diverge_raise_or_run_out_of_memory_end_alone(course, demo):
    """An infinite rate; a batch size of 0; an allocation that no machine can serve; a process that the kernel kills."""
    hurt = '    config["per_device_bs"] == 8 and config.update(lr=math.inf)\n'
    hurt += '    config["per_device_bs"] == 1 and config.update(per_device_bs=0)\n'
    hurt += '    config["per_device_bs"] == 7 and torch.empty(1 << 55)\n'
    hurt += '    config["per_device_bs"] == 9 and os.kill(os.getpid(), 9)\n'
    replace(
        course.parents[3] / SCRIPT.relative_to(REPO),
        ('"per_device_bs": tune.choice(s.BS_CHOICES)', '"per_device_bs": tune.grid_search([1, 7, 8, 2, 4, 9])'),
        ("tune.loguniform(s.LR_LOWER, s.LR_UPPER)", "tune.sample_from(lambda config: 1e-2)"),
        ("    fine_tune(config, s, *ray.get(data)", hurt + "    fine_tune(config, s, *ray.get(data)"),
    )
    status, log = quickstart(course, **demo_run(demo, NUM_SAMPLES="1", NUM_EPOCHS="2"))
    assert status == 0, log
    check_log(log, job_of(log))
    run_dir = course / "runs" / job_of(log)
    tables = (run_dir / "tables.md").read_text()
    killed = r"RuntimeError: training worker 0 died; out of memory\?"
    for number, cause in ((0, r"\S*Error: .*"), (1, r"RuntimeError: .*can't allocate memory.*"), (5, killed)):
        assert re.search(rf"_{number:05d}  FAILED     {cause}", log), log
        assert re.search(rf"Combo {number + 1} \(TorchTrainer_\S+\): FAILED: {cause}", tables), tables
    (trace,) = re.findall(r"_00001  FAILED .*\(full trace: (\S+)\)", log)
    assert "in train_loop_per_worker" in Path(trace).read_text() and "can't allocate memory" in Path(trace).read_text()
    assert len(re.findall(r"_00002  ended      diverged at epoch 1$", log, re.MULTILINE)) == 1
    assert sorted(row["status"] for row in table_of(log)) == ["ERROR"] * 3 + ["TERMINATED"] * 3
    reported = {event["trial"][-5:]: event["eval_loss"] for event in events_of(run_dir, "report")}
    assert reported.pop("00002") is None and set(reported) == {"00003", "00004"}
    best = best_of(log)
    assert math.isfinite(best["eval_loss"]) and best["config"]["train_loop_config"]["per_device_bs"] in (2, 4)
    assert left_by(job_of(log)) == []


def test_of_two_runs_whose_workers_share_a_node_one_is_cancelled_and_the_other_completes(cluster, demo):
    """As an array of two. Also although tables and pictures cannot be made."""
    (cluster.folder.parents[3] / "scripts/report/fill_tables.py").write_text("raise SystemExit('none today')\n")
    half = ("--cpus-per-task=20", "--cpus-per-task=10"), ("--gpus-per-node=8", "--gpus-per-node=4")
    there = ("#SBATCH --constraint=v100", "#SBATCH --constraint=v100\n#SBATCH --nodelist=worker1")
    replace(cluster.folder / "worker_node_raytune_asha_hpo.slurm", *half, there)
    variables = demo_run(demo, NUM_SAMPLES="2", NUM_EPOCHS="2", **BUSY)
    array = cluster("sbatch", "--parsable", "--array=1-2", HEAD, **variables).strip()
    tasks = lambda: re.findall(r"JobId=(\d+) .* ArrayTaskId=(\d) ", cluster("scontrol", "show", "job", "-o", array))
    job_of_task = {task: job for job, task in wait_for(lambda: len(tasks()) == 2 and tasks(), 60, "both tasks")}
    first, second = job_of_task["1"], job_of_task["2"]
    wait_for(lambda: all("  started" in cluster.log(job) for job in (first, second)), 180, "trials of both runs")
    assert {cluster.job(w)["NodeList"] for job in (first, second) for w in cluster.workers(job)} == {"worker1"}
    cluster("scancel", f"{array}_1")
    assert cluster.wait_for_end(first, 40)["ExitCode"] == "143:0"
    assert cluster.wait_for_end(second, 240)["JobState"] == "COMPLETED", cluster.log(second)
    log = cluster.log(second)
    check_log(log, second)
    assert len(table_of(log)) == 2 and "lost" not in log
    (told,) = re.findall(r"tables and pictures could not be made \(see (\S+)\); the results are complete", log)
    assert Path(told).read_text() == "none today\n"
    nothing_is_left(cluster, first, second)


def test_a_run_whose_folder_a_worker_cannot_see_says_so(cluster):
    run_dir = "/no/such/experiments/raytune/scheduler/asha/runs/1"
    job = cluster("sbatch", "--parsable", "worker_node_raytune_asha_hpo.slurm", run_dir, "1").strip()
    cluster.wait_for_end(job, 30)
    assert "ERROR: this node does not see the run folder /no/such/" in cluster.log(job, "worker")


def test_a_requeued_job_goes_on_where_it_was(cluster, demo):
    """Also where an earlier sandbox has left a folder of this name."""
    jobs = map(int, re.findall(r"JobId=(\d+)", cluster("scontrol", "show", "job")))
    earlier = cluster.folder / "runs" / str(max(jobs, default=int(cluster.environ["MINI_SLURM_FIRST_JOB"]) - 1) + 1)
    (earlier / "head-1").mkdir(parents=True)
    (earlier / "head-1/job").write_text(earlier.name)
    job = cluster.submit(**demo_run(demo, NUM_SAMPLES="2", TRAIN_SAMPLES="800", CPUS_PER_WORKER="10"))
    assert job == earlier.name
    wait_for(lambda: re.search(r"_00000  (stopped|finished)", cluster.log(job)), 240, "the first trial's end")
    state = f"runs/{job}-*/tune/experiment_state-*.json"
    saved = lambda: any("TERMINATED" in file.read_text() for file in cluster.folder.glob(state))
    wait_for(saved, 30, "the first trial's end in the saved state")
    cluster("scontrol", "requeue", job)
    wait_for(lambda: cluster.job(job)["JobState"] == "PENDING", 60, "the job to be queued again")
    cluster("scontrol", "update", f"JobId={job}", "StartTime=now")  # Slurm itself would wait two minutes
    assert cluster.wait_for_end(job, 240)["JobState"] == "COMPLETED", cluster.log(job)
    _, _, again = cluster.log(job).split(" START ")
    assert "continues the run in" in again and " FINISH " in again and len(table_of(again)) == 2
    assert re.findall(r"_(\d{5})  started", again) == ["00001"]
    nothing_is_left(cluster, job)


def trials_wait_for(cluster, file):
    """Each trial begins with waiting for it, in the folder's listing: a folder that lags says no for long."""
    wait = f"    while {file.name!r} not in os.listdir({str(file.parent)!r}):\n        time.sleep(0.2)\n"
    start = "    fine_tune(config, s, *ray.get(data)"
    replace(cluster.folder.parents[3] / SCRIPT.relative_to(REPO), (start, wait + start))


def test_cables_and_power_of_workers_and_the_heads_cable_for_ten_seconds(machines, demo, tmp_path):
    """Two nodes with a trial each: the head's cable costs nothing; a worker's power and a cable cost each its trial."""
    trials_wait_for(machines, tmp_path / "go")
    job = machines.submit(**demo_run(demo, NUM_SAMPLES="2", CPUS_PER_WORKER="16", WORKER_NODES="2"))
    log = lambda: machines.log(job)
    lost = lambda: log().count("lost       with its node")
    wait_for(lambda: log().count("  started") == 2, 120, "both trials")
    workers = machines.workers(job)
    head, first, second = (machines.job(each)["NodeList"] for each in (job, *workers))
    machines.trouble("cut", head)
    time.sleep(10)
    machines.trouble("heal", head)
    time.sleep(12)  # a look at the queue, and longer than a lost node would last
    assert lost() == 0 and machines.workers(job) == workers and "has ended" not in log(), log()
    machines.trouble("power-off", first)
    wait_for(lambda: lost() == 1, 20, "the node without power to be given up")
    machines.trouble("restart", first)
    wait_for(lambda: "worker 3/3 joined" in log(), 90, "a worker in its place")
    machines.trouble("cut", second)
    wait_for(lambda: lost() == 2, 25, "the node without a cable to be given up")
    machines.trouble("heal", second)
    (tmp_path / "go").touch()
    assert machines.wait_for_end(job, 240)["JobState"] == "COMPLETED", log()
    assert lost() == 2 and [row["status"] for row in table_of(log())] == ["TERMINATED"] * 2
    nothing_is_left(machines, job)


def test_a_lagging_folder_a_suspended_head_and_a_slurm_that_answers_nothing_at_the_end(machines, demo, tmp_path):
    """None of them costs the worker more than seconds, and it ends in good order."""
    if not shutil.which("bindfs") or not os.path.exists("/dev/fuse"):
        pytest.skip("no bindfs, or no /dev/fuse")
    trials_wait_for(machines, tmp_path / "go")
    for node in ("worker1", "worker2"):
        machines.trouble("lag", node, str(tmp_path), "60")
    job = machines.submit(**demo_run(demo, NUM_SAMPLES="1", **BUSY))
    log = lambda: machines.log(job)
    wait_for(lambda: "Ray head at" in log(), 120, "the head")
    wait_for(lambda: "worker 1/1 joined" in log(), 40, "the worker: it does not wait for what it is not told")
    wait_for(lambda: "  started" in log(), 60, "the trial")
    machines("scontrol", "suspend", job)
    time.sleep(20)
    machines("scontrol", "resume", job)
    time.sleep(12)  # a look at the queue
    machines.trouble("freeze")
    (tmp_path / "go").touch()
    wait_for(lambda: "Best Trial Result" in log(), 120, "the result")
    workers = machines.workers(job)
    wait_for(lambda: not pids(*(f" worker {worker}" for worker in workers)), 10, "the workers to leave")
    machines.trouble("thaw")
    assert machines.wait_for_end(job, 60)["JobState"] == "COMPLETED", log()
    assert machines.wait_for_end(workers[-1], 30)["JobState"] == "COMPLETED" and len(table_of(log())) == 1
    nothing_is_left(machines, job)


@pytest.mark.parametrize("size", ["12k", "20m"])
def test_a_run_folder_that_is_full_ends_the_run_with_the_reason(course, demo, size):
    """Full from the start, or in mid-run: then Ray alone would go on, and report the best of what it had written."""
    runs, terminal = course / "runs", course / "terminal.txt"
    runs.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", runs]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("only root can make a file system")
    try:
        with terminal.open("w") as file:
            environ = os.environ | demo_run(demo, NUM_SAMPLES="1", NUM_EPOCHS="100")
            head = subprocess.Popen(["bash", HEAD], cwd=course, env=environ, stdout=file, stderr=subprocess.STDOUT)
        if size == "20m":
            wait_for(lambda: "epoch 1/" in terminal.read_text(), 120, "the first epoch")
            with pytest.raises(OSError), (runs / "filler").open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        assert head.wait(60) == 1
    finally:
        subprocess.run(["umount", "-l", runs], check=True)
    log = terminal.read_text()
    said = r"ERROR: cannot write to the run folder \S+; is the disk full, or the quota reached\?"
    assert re.search(said, log) and "FINISH" in log
    assert ("continue with: RESUME=" in log) == (size == "20m")
    assert not re.search("Traceback|Best Trial Result|results are complete|cat:", log)
    assert left_by(job_of(log)) == []
