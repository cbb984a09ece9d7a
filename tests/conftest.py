"""What several test files share: the demo model and data, a real Slurm, and waiting for a condition."""

import ast
import contextlib
import glob
import importlib.util
import io
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest

REPO = Path(__file__).resolve().parent.parent
EXERCISE = REPO / "experiments/raytune/scheduler/asha"
SCRIPT = REPO / "scripts/raytune_hpo/raytune_asha_scheduler/raytune_asha_hpo.py"
HEAD = "head_node_raytune_asha_hpo.slurm"
# In a background job, what the tests start would ignore Ctrl-C, too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["GOMP_SPINCOUNT"] = "1000"  # as in ray_job.sh: trainings share cores here
sys.path.insert(0, str(REPO / "scripts"))
import rooms  # noqa: F401


def wait_for(condition, seconds, what):
    """The first true value of condition(); fails after `seconds`, naming what was waited for."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.1)
    raise AssertionError(f"waited {seconds} s for {what}")


def load_module(path):
    """A script of the repository as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(module, *arguments):
    """main() of a program in this process, where its imports are done once: what subprocess.run() would give.

    Signals, variables and arguments are afterwards what they were.
    """
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    argv = [module.__file__, *map(str, arguments)]
    with (
        mock.patch.dict(os.environ),
        mock.patch.object(sys, "argv", argv),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            status = module.main() or 0
        except SystemExit as end:
            status = end.code or 0
            if isinstance(status, str):
                print(status, file=sys.stderr)
                status = 1
    for number, handler in handlers.items():
        signal.signal(number, handler)
    said = [each.buffer.getvalue().decode() for each in (out, err)]
    return subprocess.CompletedProcess(argv, status, *said)


@pytest.fixture(scope="session")
def hpo():
    """raytune_asha_hpo.py as a module."""
    return load_module(SCRIPT)


@pytest.fixture(scope="session")
def checks():
    """check_inputs.py as a module. It imports a lesson of its own: checks.lesson."""
    import check_inputs

    return check_inputs


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """Folder with the demo model and data."""
    folder = tmp_path_factory.mktemp("demo") / "assets"
    made = call(load_module(REPO / "scripts/demo_assets.py"), folder)
    assert made.returncode == 0, made.stderr
    return folder


@pytest.fixture(scope="session")
def squad(demo):
    """Folder with SQuAD v1.1 files: real ones where they lie beside the repository, else the demo's."""
    real = REPO.parent / "shared/squad"
    return real if real.is_dir() else demo / "squad"


SANDBOX = Path(f"/tmp/ms.{os.getpid()}")


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """Environment that points to a real Slurm of this test run's own."""
    # Several such runs go on at once, and their jobs are found by their numbers.
    variables = {"MINI_SLURM_DIR": str(SANDBOX), "MINI_SLURM_FIRST_JOB": str(os.getpid() % 9000 * 1000 + 1),
                 "MINI_SLURM_SHARED": f"{tmp_path_factory.getbasetemp()}:{REPO.parent}/shared"}  # fmt: skip
    environ = os.environ | variables
    sandbox = ["bash", REPO / "tests/mini_slurm.sh"]
    up = subprocess.run([*sandbox, "up"], env=environ, text=True, stdout=subprocess.PIPE, check=True, timeout=600)
    yield environ | {"SLURM_CONF": up.stdout.split("=", 1)[1].strip()}
    subprocess.run([*sandbox, "down"], env=environ, check=True, timeout=120)


def start_ray(*options, log, environ):
    """A plain `ray start`, in a process group of its own; what it prints goes to the file `log`."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats", *options]
    with open(log, "w") as output:
        return subprocess.Popen([*command, "--node-ip-address=127.0.0.1"], env=environ, stdout=output,
                                stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip


def end_ray(process):
    """Ends it by its process group."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)


def address_of(folder):
    """The address of the Ray head whose --temp-dir this is."""
    file = Path(folder, "ray_current_cluster")
    return wait_for(lambda: file.exists() and file.read_text().strip(), 120, f"the Ray head in {folder}")


def one_slot():
    """`ray start` of a head with room for one trial at a time, and no fixed port."""
    with socket.create_server(("", 0)) as free:
        client = free.getsockname()[1]
    ports = ("--port=0", "--dashboard-port=0", "--dashboard-agent-listen-port=0", f"--ray-client-server-port={client}")
    less = ("--include-dashboard=false", "--no-monitor")
    return ("--head", *ports, *less, "--num-cpus=4", '--resources={"trial_slot": 1}')


@pytest.fixture(scope="module")
def private_ray():
    """Variables that point to a plain Ray with room for one trial, whose processes can import the lesson."""
    folder, variables = f"/tmp/ray_test_{os.getpid()}", {"RAY_AUTH_MODE": "disabled"}
    faster = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0", "TORCHDYNAMO_DISABLE": "1"}
    environ = os.environ | variables | faster | {"PYTHONPATH": str(SCRIPT.parent)}
    head = start_ray(*one_slot(), f"--temp-dir={folder}", log=f"{folder}.log", environ=environ)
    try:
        yield variables | {"RAY_ADDRESS": address_of(folder)}
    finally:
        end_ray(head)
        shutil.rmtree(folder, ignore_errors=True)
        Path(f"{folder}.log").unlink()


SPACE = {"LR_LOWER": "1e-4", "LR_UPPER": "5e-2", "BS_CHOICES": "2 4", "WD_CHOICES": "0.0 0.1"}
SMALL = {"TRAIN_SAMPLES": "32", "EVAL_SAMPLES": "16", "WORKERS_PER_TRIAL": "1"}


def copy_of_the_course(tmp_path):
    """The exercise's folder in a copy of the repository."""
    made_by_runs = shutil.ignore_patterns("runs", "*.out", "__pycache__")
    for folder in ("scripts", "experiments", "tests"):
        shutil.copytree(REPO / folder, tmp_path / folder, symlinks=True, ignore=made_by_runs)
    shutil.copy(REPO / "requirements.txt", tmp_path)
    (tmp_path / ".venv/bin").mkdir(parents=True)  # of its commands only python runs, as in a clone that has moved
    for name in ("bin/python", "lib", "pyvenv.cfg", "installed_requirements.txt"):
        (tmp_path / ".venv" / name).symlink_to(REPO / ".venv" / name)
    return tmp_path / EXERCISE.relative_to(REPO)


@pytest.fixture
def course(tmp_path):
    return copy_of_the_course(tmp_path)


def replace(path, *pairs):
    """Changes a file of such a copy; each old text is there once."""
    text = path.read_text()
    for old, new in pairs:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path.write_text(text)


# What a site's modules and a user's shell may have set; a run must not notice.
HOSTILE = {"SLURM_TIME_FORMAT": "%s", "SQUEUE_FORMAT": "%j", "LC_ALL": "xx_XX.UTF-8", "GLOO_SOCKET_IFNAME": "ib0",
           "LD_PRELOAD": "/none/libxalt_init.so", "NODE_NAME": "node7", "http_proxy": "http://127.0.0.1:9",
           "PYTHONPATH": "/none/site-packages", "RANK": "3", "OMP_NUM_THREADS": "1"}  # fmt: skip


class Cluster:
    """sbatch, squeue and friends on the sandbox, from the exercise's folder."""

    def __init__(self, environ, folder):
        self.environ, self.folder = environ, folder

    def __call__(self, *command, **variables):
        return subprocess.run(command, cwd=self.folder, env=self.environ | variables, text=True, check=True,
                              capture_output=True, timeout=60).stdout  # fmt: skip

    def submit(self, **variables):
        return self("sbatch", "--parsable", HEAD, **variables).strip()

    def job(self, job):
        records = self("scontrol", "show", "job", "-o", job).splitlines()  # of an array: all its tasks'
        (words,) = (record.split() for record in records if record.startswith(f"JobId={job} "))
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for_end(self, job, seconds):
        states = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        ended = lambda: (info := self.job(job))["JobState"] in states and info
        return wait_for(ended, seconds, f"job {job} to end; log:\n{self.log(job)[-2000:]}")

    def log(self, job, role="head"):
        path = self.folder / f"logs/ray_{role}_bloom_5epochs-{job}.out"
        return path.read_text() if path.exists() else ""

    def workers(self, job):
        return re.findall(r"submitted worker \d+/\d+: job (\d+)", self.log(job))

    def trouble(self, *what):
        """trouble("cut", "worker1") and so on: see mini_slurm.sh. Only of machines."""
        return self("bash", REPO / "tests/mini_slurm.sh", *what)

    def cancel(self, job):
        """Cancels a head's job, which is to end in order and to leave nothing."""
        self("scancel", job)
        end = self.wait_for_end(job, 30)
        assert end["JobState"] == "CANCELLED" and end["ExitCode"] == "143:0"
        assert re.search(rf"===== JOB {job} FINISH : .* =====\n\Z", self.log(job))
        assert not re.search("SIGTERM received|Killed|Traceback", self.log(job))
        nothing_is_left(self, job, seconds=30)


@pytest.fixture
def cluster(slurm, course):
    return Cluster(slurm, course)


@pytest.fixture
def machines(cluster):
    """A cluster whose nodes are machines of their own."""
    if not (SANDBOX / "nodes").exists():
        pytest.skip("no machines can be made here: all nodes are this one")
    yield cluster
    cluster.trouble("thaw")
    for node in ("head", "worker1", "worker2"):
        cluster.trouble("heal", node)


def pids(*marks):
    """Processes of jobs: their environment names run folder, role and job; marks are " role job"."""
    ends = tuple(mark.encode() for mark in marks)
    found = []
    for environ in glob.glob("/proc/[0-9]*/environ"):
        with contextlib.suppress(OSError):  # ended meanwhile
            entries = Path(environ).read_bytes().split(b"\0")
            if any(entry.startswith(b"HPO_OWNER=") and entry.endswith(ends) for entry in entries):
                found.append(int(environ.split("/")[2]))
    return found


def command_of(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except OSError:
        return ""


def users_of(folder):
    """Processes with an open file below a folder, deleted ones too."""
    found = set()
    for descriptor in glob.glob("/proc/[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # ended meanwhile
            if os.readlink(descriptor).startswith(folder):
                found.add(int(descriptor.split("/")[2]))
    return found


def left_by(*jobs):
    """What jobs have left behind on all nodes: command lines of processes, also without their mark, and folders."""
    found = pids(*(f" {role} {job}" for job in jobs for role in ("head", "worker")))
    found += [pid for job in jobs for pid in users_of(f"/tmp/ray_{job}.")]
    commands = filter(None, map(command_of, found))  # one without is about to be gone: its files are closed last
    roots = ("/tmp", *glob.glob(f"{SANDBOX}/nodes/*/tmp"))
    return [*commands, *(folder for root in roots for job in jobs for folder in glob.glob(f"{root}/ray_{job}.*"))]


def nothing_is_left(cluster, *jobs, seconds=60):
    """Waits for the queue to be empty, and all of head jobs and of their workers to be gone."""
    workers = [worker for job in jobs for worker in cluster.workers(job)]
    left = lambda: cluster("squeue", "--noheader").splitlines() + left_by(*jobs, *workers)
    with contextlib.suppress(AssertionError):
        wait_for(lambda: not left(), seconds, "jobs, processes and folders to be gone")
    assert left() == []


def best_of(log):
    return ast.literal_eval(log.split("Best Trial Result:\n", 1)[1].splitlines()[0])


def table_of(log):
    """Rows of the boxed table as dicts."""
    lines = [line for line in log.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]


def reports_of(run_dir):
    """All reports of each trial, from Tune's own results: {trial name: [report]}."""
    files = run_dir.glob("tune/*/result.json")
    return {path.parent.name: [json.loads(line) for line in path.read_text().splitlines()] for path in files}


def events_of(run_dir, *names):
    """The events of a run's record, or those of these names; as its readers do, without lines that are not JSON."""
    found = []
    for line in (run_dir / "events.jsonl").read_text().splitlines():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return [event for event in found if not names or event["event"] in names]


def at_once(log):
    """The largest number of trials in flight."""
    words = re.findall(r"search \| TorchTrainer_\S+  (started|stopped|finished|ended|FAILED)", log)
    return max(itertools.accumulate(1 if word == "started" else -1 for word in words))


def check_log(log, job):
    """What every log must be: framed, short, no line twice, nothing that is not for students."""
    lines = log.splitlines()
    assert re.fullmatch(rf"===== JOB {job} START  : \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d \S+ =====", lines[0])
    assert re.fullmatch(rf"===== JOB {job} FINISH : \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d \S+ =====", lines[-1])
    body = [line for line in lines[1:-1] if not line.startswith("+--")]
    assert len(body) < 150
    assert len(set(body)) == len(body), [line for line in body if body.count(line) > 1]
    noise = re.compile(r"warn|deprecat|it/s|%\||\x1b|LOAD_|Traceback|Killed|\(raylet\)", re.IGNORECASE)
    assert not list(filter(noise.search, body))


def check_results(log, run_dir, trials, epochs):
    """Table, best line and Tune's own results agree; reports are one an epoch."""
    reports, rows, best = reports_of(run_dir), table_of(log), best_of(log)
    assert len(rows) == len(reports) == trials
    for name, reported in reports.items():
        assert [report["training_iteration"] for report in reported] == list(range(1, len(reported) + 1))
        assert [report["epoch"] for report in reported] == [float(i) for i in range(1, len(reported) + 1)]
        assert len(reported) <= epochs
        row = next(row for row in rows if row["Trial name"] == name)
        assert row["status"] == "TERMINATED" and int(row["iter"]) == len(reported)
        assert float(row["eval_loss"]) == pytest.approx(reported[-1]["eval_loss"], rel=1e-4)
    everything = [report for reported in reports.values() for report in reported]
    lowest = min(everything, key=lambda report: report["eval_loss"])
    config = {"config": {"train_loop_config": lowest["config"]["train_loop_config"]}}
    assert best == {key: lowest[key] for key in ("eval_loss", "epoch", "time_total_s")} | config
    return reports


def quickstart(course, *command, **variables):
    """The exercise without Slurm in a copy of the repository: (exit status, log)."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")} | variables
    run = subprocess.run(command or ["bash", HEAD], cwd=course, env=environ, text=True, check=False,
                         stdout=subprocess.PIPE, timeout=900)  # fmt: skip
    return run.returncode, run.stdout


def job_of(log):
    return re.search(r"===== JOB (\S+) START", log)[1]


# ---- The page of exercises ---------------------------------------------------------------------------------
def exercise(number):
    """The section of this exercise in EXERCISES.md."""
    page = (EXERCISE / "EXERCISES.md").read_text()
    return re.search(rf"^## {number}\. .*?(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)[0]


def fenced(section, language):
    """The fenced blocks of a language in it."""
    return re.findall(rf"^```{language}\n(.*?)^```", section, re.MULTILINE | re.DOTALL)


def edit(course, section):
    """Changes the search script of a copy of the repository as the section's diff says."""
    script = course.parents[3] / SCRIPT.relative_to(REPO)
    for diff in fenced(section, "diff"):
        lines = diff.splitlines()
        replace(script, ["".join(f"{line[1:]}\n" for line in lines if not line.startswith(sign)) for sign in "+-"])
    return script
