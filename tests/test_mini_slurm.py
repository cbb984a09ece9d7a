"""The sandbox of tests/mini_slurm.sh: what a user who types `up`, `sbatch`, `scancel` and `down` notices.

python -m pytest tests/test_mini_slurm.py
"""

import getpass
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import wait_for

SCRIPT = Path(__file__).with_name("mini_slurm.sh")
HEAD = "#SBATCH --cpus-per-task=4"
WORKER = "#SBATCH --gpus-per-node=8\n#SBATCH --constraint=v100\n#SBATCH --cpus-per-task=20"


def wait_until(condition, what):
    """The first true value of condition()."""
    return wait_for(condition, 60, what)


def processes_of(folder):
    """Pids that name the folder in command line, environment or working directory (zombies have none)."""
    pids = []
    for proc in Path("/proc").glob("[0-9]*"):
        try:
            text = (proc / "cmdline").read_bytes() + (proc / "environ").read_bytes()
            if str(folder).encode() in text or os.readlink(proc / "cwd").startswith(str(folder)):
                pids.append(int(proc.name))
        except OSError:  # it has ended meanwhile, or belongs to somebody else
            pass
    return pids


class Sandbox:
    def __init__(self, folder):
        self.folder = Path(folder)

    def script(self, *args, path=None):
        env = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))}
        env["MINI_SLURM_DIR"] = str(self.folder)
        env["PATH"] = f"{path}:{env['PATH']}" if path else env["PATH"]
        command = ["bash", SCRIPT, *args]
        return subprocess.run(command, check=False, env=env, capture_output=True, text=True, timeout=300)

    def up(self):
        """Runs `up` and hands its stdout to a shell, as `eval "$(... up)"` does; returns stdout."""
        result = self.script("up")
        assert result.returncode == 0, result.stderr
        command = ["bash", "-c", 'eval "$1"; printf %s "$SLURM_CONF"', "bash", result.stdout]
        conf = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        self.env = {**os.environ, "SLURM_CONF": conf}
        return result.stdout

    def pid(self, daemon):
        return int((self.folder / "run" / f"{daemon}.pid").read_text())

    def run(self, *command, **options):
        options = {"env": self.env, "stdout": subprocess.PIPE, "text": True, "timeout": 60, **options}
        return subprocess.run(command, check=True, **options).stdout.strip()

    def submit(self, folder, directives, body, **options):
        """Submits a batch script from the folder; returns the job's id. Its output goes to <id>.out there."""
        script = f"#!/bin/bash\n#SBATCH --output=%j.out\n{directives}\n{body}\n"
        return self.run("sbatch", "--parsable", input=script, cwd=folder, **options)

    def job(self, job_id):
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", "-o", job_id)))

    def wait(self, job_id, *states):
        job = wait_until(
            lambda: (job := self.job(job_id))["JobState"] in states and job, f"{job_id} to be {states}"
        )
        return job

    def output(self, folder, job_id):
        """The output of a job that must end well."""
        job = self.wait(job_id, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
        text = (Path(folder) / f"{job_id}.out").read_text()
        assert job["JobState"] == "COMPLETED", text
        return text.split()


@pytest.fixture
def new_sandbox():
    """A folder for a sandbox that is not up yet. Not tmp_path: that is too long for Slurm's sockets."""
    sandbox = Sandbox(tempfile.mkdtemp(prefix="ms_", dir="/tmp"))
    yield sandbox
    sandbox.script("down")
    shutil.rmtree(sandbox.folder, ignore_errors=True)


@pytest.fixture(scope="module")
def sandbox():
    sandbox = Sandbox(tempfile.mkdtemp(prefix="ms_", dir="/tmp"))
    try:
        sandbox.up()
        yield sandbox
    finally:
        result = sandbox.script("down")
    assert result.returncode == 0, result.stderr


@pytest.fixture
def slurm(sandbox):
    """The sandbox of this module, without the jobs of the test before."""
    yield sandbox
    sandbox.run("scancel", "--partition=batch")
    wait_until(lambda: not sandbox.run("squeue", "--noheader"), "the queue to be empty")


def test_up_prints_only_the_export_line_and_is_idempotent(slurm):
    pids = [slurm.pid(name) for name in ("munged", "slurmctld", "head", "worker1", "worker2")]
    assert slurm.up() == f"export SLURM_CONF={slurm.folder}/slurm.conf\n"
    assert pids == [slurm.pid(name) for name in ("munged", "slurmctld", "head", "worker1", "worker2")]


def test_status_names_daemons_and_nodes(slurm):
    status = slurm.script("status")
    assert status.returncode == 0
    for name in ("munged", "slurmctld", "head", "worker1", "worker2"):
        assert f"{name}: up, pid {slurm.pid(name)}\n" in status.stdout
    assert re.search(r"worker2 +1 +batch\* +idle", status.stdout)


def test_nodes_are_what_the_course_expects(slurm):
    worker = slurm.run("scontrol", "show", "node", "-o", "worker1")
    for word in ("NodeAddr=127.0.0.1", "CPUTot=20", "Gres=gpu:v100:8", "AvailableFeatures=v100"):
        assert f" {word} " in worker
    head = slurm.run("scontrol", "show", "node", "-o", "head")
    assert " CPUTot=8 " in head and " Gres=(null) " in head


def test_nothing_is_writable_for_everybody(slurm):
    paths = [path for path in slurm.folder.rglob("*") if not path.is_symlink() and not path.is_socket()]
    assert [path for path in [slurm.folder, *paths] if path.stat().st_mode & 0o022] == []


def test_two_workers_and_a_head_run_at_once_and_a_further_worker_holds_nobody_up(slurm, tmp_path):
    says = "echo $SLURMD_NODENAME ${CUDA_VISIBLE_DEVICES:-none}"
    wait_for_it = f"until [[ -e {tmp_path}/end ]]; do sleep 0.1; done; {says}"
    head = slurm.submit(tmp_path, HEAD, wait_for_it)
    workers = [slurm.submit(tmp_path, WORKER, wait_for_it) for _ in range(2)]
    nodes = [slurm.wait(job_id, "RUNNING")["NodeList"] for job_id in (head, *workers)]
    assert nodes[0] == "head" and sorted(nodes[1:]) == ["worker1", "worker2"]
    too_many = slurm.submit(tmp_path, WORKER, "true")
    second_head = slurm.submit(tmp_path, HEAD, "true")
    assert slurm.wait(second_head, "COMPLETED")["NodeList"] == "head"
    assert slurm.job(too_many)["JobState"] == "PENDING"
    (tmp_path / "end").touch()
    assert slurm.output(tmp_path, head) == ["head", "none"]
    for node, job_id in zip(nodes[1:], workers):
        assert slurm.output(tmp_path, job_id) == [node, "0,1,2,3,4,5,6,7"]


def test_a_job_submits_a_job(slurm, tmp_path):
    worker = "sbatch --parsable --output=%j.out --gpus-per-node=8 --constraint=v100 --cpus-per-task=20 "
    head = slurm.submit(tmp_path, HEAD, worker + "--wrap='echo $SLURMD_NODENAME $SLURM_CONF'")
    (job_id,) = slurm.output(tmp_path, head)
    assert slurm.output(tmp_path, job_id) == ["worker1", slurm.env["SLURM_CONF"]]


def test_scancel_sends_term_to_the_batch_shell(slurm, tmp_path):
    body = "trap 'echo got TERM; exit 143' TERM\ntrap 'echo got INT' INT\ntrap\nsleep 300 & wait $!"
    job_id = slurm.submit(tmp_path, HEAD, body)
    out = tmp_path / f"{job_id}.out"
    wait_until(
        lambda: out.exists() and "SIGINT" in out.read_text(), "the traps"
    )  # a job that ignored INT has none
    slurm.run("scancel", job_id)
    job = slurm.wait(job_id, "CANCELLED")
    assert job["ExitCode"] == "143:0"
    assert "got TERM" in out.read_text()


def test_srun_starts_steps_and_a_job_that_has_ended_stays_on_record(slurm, tmp_path):
    body = "srun bash -c 'echo $SLURMD_NODENAME'; exit 3"
    job_id = slurm.submit(tmp_path, HEAD + "\n#SBATCH --nodes=1", body)
    assert slurm.wait(job_id, "FAILED")["ExitCode"] == "3:0"
    assert (tmp_path / f"{job_id}.out").read_text() == "head\n"
    record = rf"JobId={job_id} .*JobState=FAILED"
    assert re.search(record, (slurm.folder / "log" / "jobcomp.log").read_text())


def test_another_user_can_submit(slurm):
    """Only root can become another user; for anybody else the other user is the same one."""
    user = "nobody" if os.geteuid() == 0 else getpass.getuser()
    with tempfile.TemporaryDirectory(prefix="ms_", dir="/tmp") as folder:
        shutil.chown(folder, user)
        options = {"user": user, "extra_groups": []} if os.geteuid() == 0 else {}
        job_id = slurm.submit(folder, HEAD, "id -un", **options)
        assert slurm.output(folder, job_id) == [user]


def test_a_new_sandbox_counts_on_from_the_jobs_that_have_logs_here(new_sandbox, tmp_path, monkeypatch):
    """Else a run's log would be appended to that of another run, and runs/<jobid> would be another's folder."""
    logs = tmp_path / "experiments/exercise/logs"
    logs.mkdir(parents=True)
    for name in ("head-9.out", "worker-0041.out", "head-local-1127-145057-20715.out"):
        (logs / name).touch()
    (tmp_path / "tests").mkdir()
    monkeypatch.setattr(sys.modules[__name__], "SCRIPT", shutil.copy(SCRIPT, tmp_path / "tests"))
    new_sandbox.up()
    assert str(new_sandbox.submit(tmp_path, HEAD, "true")) == "42"


def test_up_repairs_what_is_half_dead(new_sandbox):
    new_sandbox.up()
    for name in ("slurmctld", "worker2"):
        os.kill(new_sandbox.pid(name), signal.SIGKILL)
        status = new_sandbox.script("status")
        assert status.returncode == 1 and f"{name}: down\n" in status.stdout
        new_sandbox.up()
        assert new_sandbox.script("status").returncode == 0


def test_down_leaves_no_process_and_no_folder(new_sandbox, tmp_path):
    new_sandbox.up()
    escape = "(setsid sleep 600 &)\n"  # leaves the job's process tree, as daemons do
    new_sandbox.submit(tmp_path, HEAD, escape + "touch tame; sleep 600")
    new_sandbox.submit(
        tmp_path, WORKER, "trap '' TERM\n" + escape + "touch deaf; while :; do sleep 600; done"
    )
    new_sandbox.submit(tmp_path, "#SBATCH --hold", "true")
    wait_until(lambda: (tmp_path / "tame").exists() and (tmp_path / "deaf").exists(), "the jobs to run")
    down = new_sandbox.script("down")
    assert down.returncode == 0 and down.stdout == "", down.stderr
    assert processes_of(new_sandbox.folder) == []
    assert not new_sandbox.folder.exists()
    assert new_sandbox.script("down").returncode == 0
    assert new_sandbox.script("status").returncode == 1
    assert not new_sandbox.folder.exists()


def test_down_finds_the_daemons_of_a_folder_removed_by_hand(new_sandbox):
    new_sandbox.up()
    shutil.rmtree(new_sandbox.folder)
    assert new_sandbox.script("down").returncode == 0
    assert processes_of(new_sandbox.folder) == []


def test_a_daemon_that_cannot_start_is_named_with_its_last_words(new_sandbox, tmp_path):
    slurmd = tmp_path / "slurmd"
    slurmd.write_text(
        '#!/bin/bash\n[[ $1 == -V ]] && exec /usr/sbin/slurmd -V\necho "no such luck"\nexit 1\n'
    )
    slurmd.chmod(0o755)
    result = new_sandbox.script("up", path=tmp_path)
    assert result.returncode == 1 and result.stdout == ""
    assert "no such luck" in result.stderr and "head has ended" in result.stderr


def test_usage(tmp_path):
    for args, code in (((), 0), (("--help",), 0), (("upp",), 2), (("up", "now"), 2)):
        result = Sandbox(tmp_path).script(*args)
        assert result.returncode == code
        assert 'eval "$(bash tests/mini_slurm.sh up)"' in (result.stderr if code else result.stdout)


def test_a_folder_with_other_files_is_refused_and_kept():
    with tempfile.TemporaryDirectory(prefix="ms_", dir="/tmp") as folder:
        (Path(folder) / "thesis.txt").write_text("mine")
        for command in ("up", "down"):
            result = Sandbox(folder).script(command)
            assert result.returncode == 1 and result.stdout == ""
            assert f"{folder} holds files that are not mini_slurm's" in result.stderr
            assert os.listdir(folder) == ["thesis.txt"]


def test_a_folder_that_slurm_cannot_use_is_refused():
    for folder in ("/tmp/with space", "/tmp/" + "x" * 60):
        result = Sandbox(folder).script("up")
        assert result.returncode == 1 and f"MINI_SLURM_DIR={folder}" in result.stderr
        assert not Path(folder).exists()
