"""check_site.sh: a run on the real sandbox where all is well, and for each check a state that is not ok.

Each state is made for real where it can be: a changed copy of the repository, a full file system in a mount
namespace, a closed network, limits of the shell.
"""

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
from conftest import EXERCISE, HEAD, REPO, replace, wait_for

ASHA = EXERCISE.relative_to(REPO)
WORKER = "worker_node_raytune_asha_hpo.slurm"
MOUNTS = ("unshare", "-rm", "bash", "-c")  # a shell with a view of the file systems of its own


@pytest.fixture
def site(course):
    """A copy of the repository."""
    return course.parents[3]


@pytest.fixture(scope="module")
def inputs(demo):
    squad = {"SQUAD_DATA": str(demo / "squad"), "TRAIN_SAMPLES": "8", "EVAL_SAMPLES": "4"}
    return squad | {"MODEL_NAME": str(demo / "model")}


def check(site, *arguments, command=(), **variables):
    """(exit status, lines) of the whole of it, as a user calls it; `pytest -rA` shows them, and stderr."""
    ours = ("SLURM_", "SBATCH_", "HF_", "NODE_ADDRESS")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(ours)} | variables
    done = subprocess.run(command or ["bash", "scripts/check_site.sh", *arguments], cwd=site, env=environ, text=True,
                          check=False, capture_output=True, timeout=120, start_new_session=True)  # fmt: skip
    print(done.stdout, done.stderr)
    return done.returncode, done.stdout.splitlines()


def one_check(site, before, command, **variables):
    """What a function of check_site.sh says, after some commands."""
    text = f'source scripts/check_site.sh; RUN_DIR=$PWD/runs; mkdir "$RUN_DIR"; {before or ":"}; {command}; end_owned'
    shell = MOUNTS if "mount" in before else ("bash", "-c")
    return "\n".join(check(site, command=[*shell, text], **variables)[1])


def quick(site, at_first=""):
    """Leaves out what takes seconds of imports on each node, and puts lines at the beginning of the site's file."""
    script, file = site / "scripts/check_site.sh", site / "experiments/site.sh"
    text, found = re.subn(r"^ .*\bcheck_(inputs|gpus)\n", ":\n", script.read_text(), flags=re.MULTILINE)
    assert found == 3
    script.write_text(text)
    file.write_text(f"{at_first}\n{file.read_text()}")


def nothing_left(site, cluster_environ):
    jobs = subprocess.check_output(["squeue", "--noheader", "--format=%j"], env=cluster_environ, text=True)
    return "check_site" not in jobs and not (site / ASHA / "runs").exists()


# ---- All is well -------------------------------------------------------------------------------------------
EVERYWHERE = ("packages: those of requirements.txt", r"inputs: .*/squad can be loaded")
ON_NODES = (*EVERYWHERE, "address: ", "disk: .*runs", "disk: /tmp ", "disk: /dev/shm")
ALL_IS_WELL = {
    "login": (*EVERYWHERE, "Slurm: slurm", f"{HEAD}: Slurm takes it", f"{WORKER}: Slurm takes it",
              "bloom_hpo_manual.slurm: Slurm takes it", "save_best.slurm: Slurm takes it",
              "shared folder: the head node's files arrive", "shared folder: the worker node's files arrive"),
    "head": (*ON_NODES, "jobs can be submitted", r"head -> worker: connected to \S+ port \d+"),
    "worker1": (*ON_NODES, r"worker -> head: connected to \S+ port \d+", "GPUs: PyTorch",
                r"capacity: 4 trial\(s\)", r"processes: .* 4 trial\(s\) at once need 1700"),
}  # fmt: skip


def test_on_a_cluster_where_all_is_well(site, slurm, inputs):
    """What it finds of disk, memory, limits and GPUs may be a warning: that is as the machine is."""
    status, lines = check(site, **slurm, **inputs)
    assert status == 0 and re.fullmatch(r"\d+ ok, \d+ warning, 0 FAILED", lines[-1])
    for place, whats in ALL_IS_WELL.items():
        for what in whats:
            said = re.compile(rf"(ok|warning) +{place} +{what}")
            assert any(map(said.match, lines)), f"{place}: {what}"
    assert nothing_left(site, slurm)


def test_without_slurm_it_says_so_and_checks_this_machine(site, tmp_path):
    quick(site)
    (tmp_path / "bin").mkdir()
    for tool in Path("/usr/bin").iterdir():
        if tool.name not in ("sbatch", "squeue", "scontrol", "scancel", "sinfo"):
            (tmp_path / "bin" / tool.name).symlink_to(tool)
    status, lines = check(site, PATH=str(tmp_path / "bin"))
    assert status == 0
    assert lines[0].startswith("warning  login     Slurm: no sbatch here, so this machine alone is checked")
    said = re.compile("(?:ok|warning) +login +(packages|disk|processes)")
    found = [said.match(line)[1] for line in lines[1:-1]]
    assert found == ["packages", "disk", "disk", "disk", "processes"]
    assert not (site / ASHA / "runs").exists()
    (site / ASHA / "runs").write_text("a file")
    status, lines = check(site, PATH=str(tmp_path / "bin"))
    assert (status, lines[-1]) == (1, "0 ok, 1 warning, 1 FAILED")
    assert re.match("FAILED +login +run folder: mkdir: cannot create directory .*fix: ", lines[1])
    for arguments in (["--wait", "0"], ["--wait", "ten"], ["now"], ["--wait", "5", "6"]):  # wrong usage
        assert check(site, *arguments) == (2, [])


# ---- Each check can fail -----------------------------------------------------------------------------------
MOUNT = "mount -t tmpfs -o size={},nr_inodes={} none {}"
FAILED, WARNING = r"FAILED +\w+ +", r"warning +\w+ +"
RAY_LOG = r'RAY_LOG=$RUN_DIR/log; printf "Traceback\nValueError: the cause\nRemaining will be killed.\n" >"$RAY_LOG"'
RAY_STARTED = f"{RAY_LOG}; true & RAY=$!; wait; (ray_started) 2>&1"  # it has ended early
STATES = [  # check, what is done before it, what it must say
    ("check_packages", "sed -i s/^torch==.*/torch==1.0/ requirements.txt", FAILED + ".*, but not torch==1.0; "),
    ("check_packages", "echo no-such-one==2 >>requirements.txt", FAILED + "packages: .*, but not no-such-one==2; "),
    ("check_packages", "rm -r .venv; PATH=/none", FAILED + r"Python: no python found; run: bash \S+/setup_env.sh"),
    ("check_inputs", "export SQUAD_DATA=$PWD", FAILED + "inputs: SQUAD_DATA='"),
    ("check_inputs", "export LR_LOWER=1 NUM_EPOCHS=x", FAILED + f"inputs: NUM_EPOCHS='x': .*{FAILED}inputs: LR_LOWER="),
    ('check_disk "$RUN_DIR" 100 "make room"', MOUNT.format("20m", 0, '"$RUN_DIR"'),
     FAILED + "disk: .*/runs has 20 MB free, a run needs 100; fix: "),
    ('check_disk "$RUN_DIR" 100 "make room"', MOUNT.format("200m", 1, '"$RUN_DIR"'),
     FAILED + "disk: .*/runs has .*, 50 MB cannot be written: dd.* No space left on device; fix: make room"),
    ("check_disk /dev/shm 500 'container: --shm-size=1g' warning", MOUNT.format("64m", 0, "/dev/shm"),
     WARNING + "disk: /dev/shm has 64 MB free, a run needs 500; fix: container"),
    ("check_limits", "ulimit -u 400",
     FAILED + r"processes: -?\d+ more may be started, 1 trial\(s\) at once need 800.*fix: ulimit -u \(now 400\)"),
    ("check_gpus", "export SLURM_JOB_ID=1 ON_SLURM=yes SLURM_CPUS_ON_NODE=20 CPUS_PER_WORKER=16",
     FAILED + r"capacity: 0 trial.*ERROR: one trial \(.*does not fit on a node with 20 CPUs"),
    ("check_address", "export NODE_ADDRESS=203.0.113.7",
     FAILED + "address: .* 203.0.113.7, .*OSError: .* Cannot assign requested address .*fix: NODE_ADDRESS"),
    ("ROLE=head; check_reach worker", 'echo 127.0.0.1 1 >"$RUN_DIR/port-worker"',
     FAILED + "head -> worker: 127.0.0.1 port 1: Connection refused; fix: ask your site to open all ports"),
    ("ROLE=head; check_reach worker", 'touch "$RUN_DIR/done-worker"', FAILED + ".*the worker offers no port"),
    (RAY_STARTED, "NODE_ADDRESS=203.0.113.7",
     r"^ERROR: Ray ended at its start, with the address 203.0.113.7, not one of this node \(.*\): set NODE_ADDRESS in"),
    (RAY_STARTED, "ulimit -u 250",
     r"^ERROR: Ray ended at its start, and only -?\d+ more processes may be started here \(ulimit -u 250, or .*\)"),
    ("echo $(seconds 04:00:09) $(seconds 1-12:30:00)", "", "^14409 131400$"),
]  # fmt: skip


NODES = "scontrol update PartitionName=batch"
JOB_FILE = f"FAILED +login +{HEAD}: "
ON_SLURM = [  # check, what is done before it, what it must say
    ("check_slurm", 'SLURM_CONF=/none; timeout() { command timeout 1 "${@:2}"; }',
     FAILED + "Slurm: no answer to squeue --me: squeue: .*fix: "),
    ("check_slurm", 'sed -i s/v100/h100/ "$SITE"', FAILED + ".*site.sh.*; fix: bash experiments/site.sh"),
    ("check_slurm", "mkdir bin; ln -s $(type -P squeue scancel sinfo sed xargs echo) bin; PATH=$PWD/bin",
     FAILED + "Slurm: not on the PATH: sbatch scontrol; fix: module load slurm"),
    ('check_job_file "$HEAD"', 'sed -i "/nodes=1/a #SBATCH --constraint=h100" "$HEAD"',
     JOB_FILE + "Slurm refuses it: .*Invalid feature specification; fix: the constraint .*; there are: .*v100"),
    ('check_job_file "$HEAD"', 'sed -i "/nodes=1/a #SBATCH --partition=gpu" "$HEAD"',
     JOB_FILE + "Slurm refuses it: .*Invalid partition name specified; fix: the partition .*, one of: batch"),
    ('check_job_file "$HEAD"', 'sed -i "/nodes=1/a #SBATCH --gpus-per-node=16" "$HEAD"',
     JOB_FILE + "Slurm refuses it: .*configuration is not available; fix: lower the GPUs or CPUs; .*gpu:v100:8"),
    ('check_job_file "$HEAD"', 'sed -i s/--time/--tyme/ "$HEAD"', JOB_FILE + ".*unrecognized option '--tyme=04:00:00'"),
    ('check_job_file "$HEAD"', 'rm -r "$EXERCISE/logs"',
     JOB_FILE + "its log folder .*/logs is missing or read-only; fix: mkdir -p /"),
    (f'check_job_file "$HEAD"; {NODES} MaxTime=INFINITE', f"{NODES} MaxTime=1:00:00; export SBATCH_TIMELIMIT=2:00:00",
     JOB_FILE + "its time limit 02:00:00 is above that of partition batch.* or the variable SBATCH_TIMELIMIT"),
    (f'check_job_file "$HEAD"; {NODES} AllocNodes=ALL', f"{NODES} AllocNodes=elsewhere",
     JOB_FILE + "Slurm refuses it: .*Access/permission denied; fix: submit from a login node"),
]  # fmt: skip


@pytest.mark.parametrize("command, before, said", STATES + ON_SLURM, ids=lambda text: text[:50])
def test_a_check_fails(site, slurm, inputs, command, before, said):
    if command != "check_packages":
        before = f"choose_python; {before or ':'}"
    assert re.search(said, one_check(site, before, command, **slurm | inputs), re.DOTALL)


# ---- The two jobs can fail ---------------------------------------------------------------------------------
def test_nodes_that_cannot_reach_each_other_nor_submit_and_a_missing_module(site, slurm, tmp_path):
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho not here\nexit 1\n")
    (tmp_path / "sbatch").chmod(0o755)
    quick(site, f"""case ${{SLURMD_NODENAME:-}} in
head) PATH={tmp_path}:$PATH; module load cuda ;;
worker*) [[ -n ${{CLOSED:-}} ]] || CLOSED=yes exec unshare -rn bash "$0"   # a network of its own
         PATH=$PATH:/usr/sbin; ip link set lo up; NODE_ADDRESS=127.0.0.1 ;;
esac""")
    status, lines = check(site, **slurm)
    assert status == 1 and lines[-1].endswith(" 3 FAILED")
    for said in (
        r"FAILED +head +jobs cannot be submitted from this node: not here; fix: PATH in experiments/site.sh",
        r"FAILED +head +head -> worker: 127.0.0.1 port \d+: Connection refused; fix: ",
        r"FAILED +worker\d +worker -> head: \S+ port \d+: (Connection refused|Network is unreachable); fix: ",
        r"warning +head +experiments/site.sh: .*module: command not found; fix: ",
    ):
        assert len([line for line in lines if re.match(said, line)]) == 1, said
    assert nothing_left(site, slurm)


LATER, CHECK = 'sed -i "/nodes=1/a #SBATCH --begin=now+1hour" {}; ', "bash scripts/check_site.sh --wait 1"
ENDS = '[[ -z ${SLURM_JOB_ID:-} ]] || { echo "no such module"; exit 1; }'


@pytest.mark.parametrize("at_first, command, said", [
    (ENDS, CHECK, "head node: its job ended early: no such module; fix: experiments/site.sh"),
    ("", f"mkdir {ASHA}/runs && mount -t tmpfs none {ASHA}/runs && {CHECK}; umount {ASHA}/runs; rmdir {ASHA}/runs",
     r"shared folder: nothing of the head node \(ended\) arrives in .*fix: "),
    ("", LATER.format(f"{ASHA}/{HEAD}") + CHECK, r"head node: its job has waited 1 minutes .*PENDING Begin"),
])  # fmt: skip
def test_a_job_that_does_not_start(site, slurm, at_first, command, said):
    quick(site, at_first)
    replace(site / "scripts/check_site.sh", ("patiently $((WAIT * 60)) ", "patiently 5 "))
    _, lines = check(site, command=[*MOUNTS, command], **slurm)
    assert lines[-1].endswith(" 1 FAILED") and any(re.match(f"FAILED +login +{said}", line) for line in lines)
    assert nothing_left(site, slurm)


def test_interrupted_it_ends_its_jobs_and_removes_its_files(site, slurm, tmp_path):
    quick(site)
    command, said = LATER.format(f"{ASHA}/{WORKER}") + "exec bash scripts/check_site.sh", tmp_path / "stderr"
    with said.open("w") as stderr:
        process = subprocess.Popen(["bash", "-c", command], cwd=site, env=slurm, stderr=stderr)
    wait_for(lambda: "the worker node" in said.read_text(), 60, "both jobs")
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert nothing_left(site, slurm)
