"""The sandbox of tests/mini_slurm.sh: what a user who types `up`, `sbatch`, `scancel` and `down` notices."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import psutil
import pytest
from conftest import wait_for

SCRIPT = Path(__file__).with_name("mini_slurm.sh")
HEAD = "#SBATCH --cpus-per-task=4"
WORKER = "#SBATCH --gpus-per-node=8\n#SBATCH --constraint=v100\n#SBATCH --cpus-per-task=20"


class Sandbox:
    """One in a folder of its own; not tmp_path: that is too long for Slurm's sockets."""

    def __init__(self, shared="", script=SCRIPT, **variables):
        self.folder, self.program = Path(tempfile.mkdtemp(prefix="ms_", dir="/tmp")), script
        self.env = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))}
        self.env |= {"MINI_SLURM_DIR": str(self.folder), "SLURM_CONF": str(self.folder / "slurm.conf")} | variables
        self.env["MINI_SLURM_SHARED"] = str(shared)

    def script(self, *args):
        command = ["bash", self.program, *args]
        return subprocess.run(command, check=False, env=self.env, capture_output=True, text=True, timeout=300)

    def run(self, *command, **options):
        return subprocess.check_output(command, env=self.env, text=True, timeout=60, **options).strip()

    def submit(self, folder, directives, body):
        script = f"#!/bin/bash\n{directives}\n{body}\n"
        return self.run("sbatch", "--parsable", "--output=%j.out", input=script, cwd=folder)

    def wait(self, job, state):
        record = lambda: dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", "-o", job)))
        return wait_for(lambda: (found := record())["JobState"] == state and found, 60, f"{job} to be {state}")

    def output(self, folder, job):
        self.wait(job, "COMPLETED")
        return (folder / f"{job}.out").read_text().split()

    def sees(self, node, command):
        """Does this command of bash succeed on the node?"""
        return self.script("on", node, "timeout", "2", "bash", "-c", command).returncode == 0


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory):
    sandbox = Sandbox(tmp_path_factory.getbasetemp())
    assert sandbox.script("up").stdout == f"export SLURM_CONF={sandbox.folder}/slurm.conf\n"
    yield sandbox
    sandbox.script("down")


@pytest.fixture
def machines(sandbox):
    if not (sandbox.folder / "nodes").exists():
        pytest.skip("no machines can be made here: all nodes are this one")
    return sandbox


def processes_of(folder):
    """Pids that name the folder in command line, environment or working directory (zombies have none)."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile, or belongs to somebody else
            if str(folder) in " ".join([process.cwd(), *process.cmdline(), *process.environ().values()]):
                found.append(process.pid)
    return found


def test_jobs_run_on_nodes_such_as_the_course_expects(sandbox, tmp_path):
    """How jobs that submit others, fail or are cancelled end there: test_run.py. Power cuts: test_faults.py."""
    wait_for_it = f"until [[ -e {tmp_path}/end ]]; do sleep 0.1; done; echo ${{CUDA_VISIBLE_DEVICES:-none}}"
    head = sandbox.submit(tmp_path, HEAD, wait_for_it)
    workers = [sandbox.submit(tmp_path, WORKER, wait_for_it) for _ in range(2)]
    nodes = [sandbox.wait(job, "RUNNING")["NodeList"] for job in (head, *workers)]
    assert nodes[0] == "head" and sorted(nodes[1:]) == ["worker1", "worker2"]
    assert sandbox.wait(sandbox.submit(tmp_path, WORKER, "true"), "PENDING")
    (tmp_path / "end").touch()
    assert sandbox.output(tmp_path, head) == ["none"]
    assert [sandbox.output(tmp_path, job) for job in workers] == [["0,1,2,3,4,5,6,7"]] * 2


def test_two_at_once_and_down_leaves_nothing_of_one(sandbox, tmp_path):
    """The other counts on from the jobs that have logs in its copy: no run writes into another run's files."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "experiments").mkdir()
    for name in ("head-9.out", "worker-0041.out", "head-local-1127-99.out"):
        (tmp_path / "experiments" / name).touch()
    other = Sandbox(script=shutil.copy(SCRIPT, tmp_path / "tests"))
    assert other.script("up").returncode == 0
    escape = "(setsid sleep 600 &)\n"  # leaves the job's process tree, as daemons do
    assert other.submit(tmp_path, HEAD, escape + "touch tame; sleep 600") == "42"
    other.submit(tmp_path, WORKER, f"trap '' TERM\n{escape}touch deaf; while :; do sleep 600; done")
    wait_for(lambda: (tmp_path / "tame").exists() and (tmp_path / "deaf").exists(), 60, "the jobs to run")
    assert other.script("down").returncode == 0
    assert processes_of(other.folder) == [] and not other.folder.exists()
    assert other.script("down").returncode == 0
    assert sandbox.run(*IDLE) == "3 idle"


IDLE = ("sinfo", "--noheader", "--format=%D %T")


def test_up_after_something_was_killed(sandbox):
    for victim in ("munged", "slurmctld", "head"):
        os.kill(int((sandbox.folder / f"run/{victim}.pid").read_text()), signal.SIGKILL)
        assert sandbox.script("up").returncode == 0 and sandbox.run(*IDLE) == "3 idle"


def test_a_machine_has_its_own_network_processes_and_tmp(machines, tmp_path):
    (port,) = re.findall(r"Port=(\d+)", machines.run("scontrol", "show", "node", "head"))
    called = lambda host: f": >/dev/tcp/{host}/{port}"  # slurmd of head answers
    assert machines.sees("worker1", f"{called('head')} && ! {called('localhost')}")
    alone = "(( $(cat /proc/[0-9]*/comm | grep -cx 'slurm.*d') == 1 ))"
    assert machines.sees("head", f"[[ $(hostname) == head ]] && {alone} && >/tmp/mine")
    assert machines.sees("worker1", f"[[ ! -e /tmp/mine && -d {tmp_path} ]] && {alone}")
    assert (machines.folder / "nodes/head/tmp/mine").exists()
    machines.script("cut", "head")
    assert not machines.sees("worker1", called("head")) and not machines.sees("head", called("login"))
    machines.script("heal", "head")
    assert machines.sees("worker1", called("head"))


def test_a_folder_that_lags_and_a_controller_that_is_frozen(machines, tmp_path):
    machines.script("freeze")
    assert not machines.sees("head", "squeue")
    machines.script("thaw")
    wait_for(lambda: machines.sees("head", "squeue"), 15, "an answer")
    if not shutil.which("bindfs") or not os.path.exists("/dev/fuse"):
        pytest.skip("no bindfs, or no /dev/fuse")
    new = tmp_path / "new"
    machines.script("lag", "worker1", tmp_path, "5")
    assert not machines.sees("worker1", f"[[ -e {new} ]]")
    new.touch()
    assert machines.sees("head", f"[[ -e {new} ]]") and not machines.sees("worker1", f"[[ -e {new} ]]")
    wait_for(lambda: machines.sees("worker1", f"[[ -e {new} ]]"), 15, "the file on worker1")


def test_without_namespaces_all_nodes_are_this_machine(tmp_path):
    (tmp_path / "unshare").symlink_to("/bin/false")
    sandbox = Sandbox(PATH=f"{tmp_path}:{os.environ['PATH']}")
    try:
        assert "all nodes are this machine" in sandbox.script("up").stderr and sandbox.run(*IDLE) == "3 idle"
        assert "cut worker1: no machine of its own" in sandbox.script("cut", "worker1").stderr
        assert sandbox.run("srun", "--nodelist=worker1", "hostname") == os.uname().nodename
    finally:
        sandbox.script("down")


def test_a_folder_with_other_files_or_that_slurm_cannot_use_is_refused(tmp_path):
    sandbox = Sandbox()
    (sandbox.folder / "thesis.txt").write_text("mine")
    for command in ("up", "down"):
        assert f"{sandbox.folder} holds files that are not mini_slurm's" in sandbox.script(command).stderr
    assert os.listdir(sandbox.folder) == ["thesis.txt"]
    shutil.rmtree(sandbox.folder)
    for folder in ("/tmp/with space", "/tmp/" + "x" * 60):
        sandbox.env["MINI_SLURM_DIR"] = folder
        result = sandbox.script("up")
        assert result.returncode == 1 and f"MINI_SLURM_DIR={folder}" in result.stderr and not Path(folder).exists()
