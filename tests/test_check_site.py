"""check_site.sh: a run on the real sandbox where all is well, and for each check a state that is not ok.

Each state is made for real where it can be: an edited copy of the repository, a full file system in a mount
namespace, a closed network, limits of the shell. Only the GPU for which PyTorch has no kernels, and a site's
private /tmp, are made up.
"""

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from conftest import EXERCISE, REPO, copy_of_the_course, wait_for

OURS = ("SLURM_", "SBATCH_", "HF_", "NODE_ADDRESS")
MOUNTS = ["unshare", "-rm", "bash", "-c"]  # a shell with a view of the file systems of its own
HEAD, WORKER = "head_node_raytune_asha_hpo.slurm", "worker_node_raytune_asha_hpo.slurm"
SLURM_TOOLS = ("sbatch", "squeue", "scontrol", "scancel", "sinfo")
EDIT = "# Activate the environment here"
LATER = ("#SBATCH --nodes=1", "#SBATCH --nodes=1\n#SBATCH --begin=now+1hour")


@pytest.fixture
def site(tmp_path):
    """A copy of the repository."""
    return copy_of_the_course(tmp_path / "course").parents[3]


@pytest.fixture(scope="module")
def inputs(demo):
    squad = {"SQUAD_DATA": str(demo / "squad"), "TRAIN_SAMPLES": "8", "EVAL_SAMPLES": "4"}
    return squad | {"MODEL_NAME": str(demo / "model")}


def environment(**variables):
    return {name: value for name, value in os.environ.items() if not name.startswith(OURS)} | variables


def run(site, command, environ):
    """(exit status, lines) of a command in the copy; `pytest -rA` shows them, and stderr."""
    done = subprocess.run(command, cwd=site, env=environ, text=True, check=False, capture_output=True,
                          timeout=120, start_new_session=True)  # fmt: skip
    print(done.stdout, done.stderr)
    return done.returncode, done.stdout.splitlines()


def check(site, *arguments, **variables):
    """The whole of it, as a user calls it."""
    return run(site, ["bash", site / "scripts/check_site.sh", *arguments], environment(**variables))


def one_check(site, commands, shell=("bash", "-c"), **variables):
    """What the functions of check_site.sh say."""
    text = f'source scripts/check_site.sh; RUN_DIR=$PWD/runs; mkdir -p "$RUN_DIR"; {commands}; end_owned'
    return run(site, [*shell, text], environment(**variables))[1]


def exercise(site):
    return site / EXERCISE.relative_to(REPO)


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def edit_block(script, line):
    """Adds a line to the EDIT block of a .slurm file."""
    edit(script, EDIT, f"{EDIT}\n{line}\n#")


def quick(site):
    """Leaves out what takes seconds of imports on each node; the test where all is well has it."""
    script = site / "scripts/check_site.sh"
    text, found = re.subn(r"^ +check_(inputs|gpus)\n", ":\n", script.read_text(), flags=re.MULTILINE)
    assert found >= 4
    script.write_text(text)


def tools_without(folder, *names):
    """A folder of links to all commands on the PATH but these."""
    folder.mkdir()
    for path in reversed(os.environ["PATH"].split(":") + ["/usr/sbin"]):
        for tool in Path(path).glob("*"):
            if tool.name not in names and not tool.name.startswith("python" if "python" in names else "\0"):
                (folder / tool.name).unlink(missing_ok=True)
                (folder / tool.name).symlink_to(tool)
    return str(folder)


def nothing_left(site, cluster_environ):
    command = ["squeue", "--noheader", "--format=%j"]
    jobs = subprocess.run(command, env=cluster_environ, text=True, capture_output=True, check=True).stdout
    return "check_site" not in jobs and not (exercise(site) / "runs").exists()


# ---- All is well -------------------------------------------------------------------------------------------
EVERYWHERE = ("packages: as in requirements.txt", r"inputs: .*8 \+ 4 questions")
ON_NODES = (*EVERYWHERE, "address: ", "disk: .*runs", "disk: /tmp ", "/dev/shm", "open files", "socket path")
ALL_IS_WELL = {
    "login": (*EVERYWHERE, "Slurm: slurm", f"{HEAD}: Slurm takes it", f"{WORKER}: Slurm takes it",
              "bloom_hpo_manual.slurm: Slurm takes it", "shared folder: from here to the head node",
              "shared folder: from here to the worker node"),
    "head": (*ON_NODES, "jobs can be submitted", r"head -> worker: connected to 127.0.0.1 port \d+"),
    "worker1": (*ON_NODES, r"worker -> head: connected to 127.0.0.1 port \d+", "GPUs: PyTorch",
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
    status, lines = check(site, PATH=tools_without(tmp_path / "bin", *SLURM_TOOLS))
    assert status == 0
    assert lines[0].startswith("warning  login     Slurm: no sbatch here, so this machine alone is checked")
    said = re.compile("(?:ok|warning) +login +(packages|disk|/dev/shm|processes|open files|socket path)")
    found = [said.match(line)[1] for line in lines[1:-1]]
    assert found == ["packages", "disk", "disk", "/dev/shm", "processes", "open files", "socket path"]
    assert not (exercise(site) / "runs").exists()


# ---- Each check can fail: on one machine -------------------------------------------------------------------
MOUNT = "mount -t tmpfs -o size={},nr_inodes={} none {}"
RUNS = '"$RUN_DIR"'
FAILED = r"FAILED +\w+ +"
STATES = [  # check, what is done before it, what it must say
    ("check_packages", "sed -i s/^torch==.*/torch==1.0/ requirements.txt",
     FAILED + "packages: torch 2.* instead of ==1.0, in .*fix: "),
    ("check_packages", "echo no-such-package==2 >>requirements.txt",
     FAILED + "packages: no-such-package missing instead of ==2"),
    ("check_inputs", "export SQUAD_DATA=$PWD",
     FAILED + "inputs: SQUAD_DATA='.*train-v1.1.json"),
    ("check_inputs", "export LR_LOWER=1 NUM_EPOCHS=x",
     FAILED + f"inputs: NUM_EPOCHS='x': .*{FAILED}inputs: LR_LOWER="),
    ('check_disk "$RUN_DIR" 100', MOUNT.format("20m", 0, RUNS),
     FAILED + "disk: .*/runs has 20 MB free, a run needs 100; fix: "),
    ('check_disk "$RUN_DIR" 100', MOUNT.format("200m", 1, RUNS),
     FAILED + "disk: 50 MB cannot be written to .*/runs: dd.* No space left on device; fix: see your quota"),
    ('timeout() { :; }; check_disk "$RUN_DIR" 1',  # as if its 50 MB could be written
     MOUNT.format("100m", 0, RUNS) + '; fallocate -l 97M "$RUN_DIR/old"',
     r"warning +\w+ +disk: .* is 9\d % full"),
    ("check_shm", MOUNT.format("64m", 0, "/dev/shm"),
     r"warning +\w+ +/dev/shm has 64 MB free, Ray wants 500 .*fix: "),
    ("check_limits", "ulimit -u 400",
     FAILED + r"processes: -?\d+ more may be started, 1 trial\(s\) at once need 800 .*fix: ulimit -u \(now 400\)"),
    ("check_limits", "ulimit -n 256",
     FAILED + "open files: ulimit -n 256, a run needs 1024; fix: ulimit -n 1024 before sbatch"),
    ("prepare_ray; check_socket", "mkdir -p $PWD/private/tmp-of-the-user-on-this-node; RAY_AT=$_; ray_tmp",
     FAILED + "socket path: OSError: AF_UNIX path too long: .* of at most 107 characters; fix: "),
    ("check_socket", "touch a-file; RAY_TMP=$PWD/a-file",
     FAILED + "socket path: mkdir: cannot create directory"),
    ("check_gpus", 'export PYTHONPATH="$PWD/stub"',
     FAILED + "GPUs: PyTorch does not run on this node: .*no kernel image.*sm_75 sm_80 on V100 sm_70"),
    ("check_gpus", "export SLURM_JOB_ID=1 ON_SLURM=yes SLURM_CPUS_ON_NODE=20 CPUS_PER_WORKER=16",
     FAILED + r"capacity: ERROR: one trial \(.*does not fit on a node with 20 CPUs"),
    ("check_address", "export NODE_ADDRESS=203.0.113.7",
     FAILED + "address: 203.0.113.7: OSError: .* Cannot assign requested address .*fix: NODE_ADDRESS"),
    ("check_address", "export NODE_ADDRESS=no-such-node.invalid",
     FAILED + "address: no-such-node.invalid: OSError: .*(not known|[Tt]emporary failure)"),
    ("ROLE=head; check_reach worker", 'mkdir -p "$RUN_DIR"; echo 127.0.0.1 1 >"$RUN_DIR/port-worker"',
     FAILED + "head -> worker: 127.0.0.1 port 1: Connection refused; fix: ask your site to open all ports"),
    ("ROLE=head; check_reach worker", 'touch "$RUN_DIR/done-worker"',
     FAILED + "head -> worker: the worker offers no port"),
    ("submit worker", f"sed -i '/^# ==== end of EDIT/d' experiments/raytune/scheduler/asha/{WORKER}",
     f"{WORKER} has lost the line .==== end of EDIT. that ends its EDIT block"),
]  # fmt: skip
TORCH = """
__version__ = "2.13.0+cu130"
def ones(*_, **__): raise RuntimeError("CUDA error: no kernel image is available for execution on the device")
class cuda:
    device_count = lambda: 1
    get_device_name = lambda i: "V100"
    get_device_capability = lambda i: (7, 0)
    get_arch_list = lambda: ["sm_75", "sm_80"]
"""


@pytest.mark.parametrize("command, before, said", STATES, ids=lambda text: text[:50])
def test_a_check_fails(site, inputs, command, before, said):
    (site / "stub").mkdir()
    (site / "stub/torch.py").write_text(TORCH)
    if "ray_tmp" in before:  # a site whose jobs have a /tmp of their own
        edit(site / "scripts/job/ray_job.sh", '"/tmp/ray_', '"$RAY_AT/ray_')
        before = before.replace("; ray_tmp", "")
    if command == "check_gpus":  # a driver is there
        edit(site / "scripts/job/this_node.py", "/dev/nvidiactl", "/dev/null")
    choose = "choose_python; " if command != "check_packages" else ""
    shell = MOUNTS if "mount" in before else ("bash", "-c")
    lines = one_check(site, f"{choose}{before}; {command}", shell, **inputs)
    assert re.search(said, "\n".join(lines), re.DOTALL)


def test_no_python(site, tmp_path):
    (site / ".venv").unlink()
    (line,) = one_check(site, "check_packages", PATH=tools_without(tmp_path / "bin", "python"))
    assert re.fullmatch(
        r"FAILED   login     Python: no python found; run: bash \S+scripts/setup_env.sh", line
    )


def test_a_run_folder_that_cannot_be_made_ends_with_status_1(site, tmp_path):
    (exercise(site) / "runs").write_text("a file")
    status, lines = check(site, PATH=tools_without(tmp_path / "bin", *SLURM_TOOLS))
    assert status == 1 and lines[-1] == "0 ok, 1 warning, 1 FAILED"
    assert re.match("FAILED +login +run folder: mkdir: cannot create directory .*fix: ", lines[1])


@pytest.mark.parametrize("before, said", [
    ("true", ": ValueError: the cause "),
    ("NODE_ADDRESS=203.0.113.7",
     r", with the address 203.0.113.7, not one of this node \(.*\): set NODE_ADDRESS in the EDIT"),
    ("ulimit -u 250", r", and only -?\d+ more processes may be started here \(ulimit -u 250, or .*\): raise it before"),
])  # fmt: skip
def test_a_ray_that_ends_early_is_told_with_what_it_does_not_say_itself(site, before, said):
    words = "Traceback\nValueError: the cause\nRemaining processes will be killed.\n"
    log = f'RAY_LOG=$RUN_DIR/log; printf "{words}" >"$RAY_LOG"; true & RAY=$!; wait'
    (line,) = one_check(site, f"choose_python; {log}; ({before}; ray_started) 2>&1")
    assert re.match(f"ERROR: Ray ended at its start{said}", line)


def test_wrong_usage(site):
    for arguments in (["--wait"], ["--wait", "0"], ["--wait", "ten"], ["now"], ["--wait", "5", "6"]):
        assert check(site, *arguments) == (2, [])


# ---- Each check can fail: Slurm ----------------------------------------------------------------------------
def test_a_missing_command(site, slurm, tmp_path):
    path = tools_without(tmp_path / "bin", "sbatch", "scontrol")
    (line,) = one_check(site, "check_slurm", **slurm | {"PATH": path})
    assert line.startswith(
        "FAILED   login     Slurm: not on the PATH: sbatch scontrol; fix: module load slurm"
    )


def test_variables_that_would_not_arrive(site, slurm):
    _, line = one_check(site, "check_slurm", **slurm | {"SBATCH_EXPORT": "NONE"})
    assert re.match("warning +login +Slurm: SBATCH_EXPORT=NONE, so variables .* do not reach the job; fix: ", line)


def test_a_slurm_that_does_not_answer(site, slurm, tmp_path):
    edit(site / "scripts/check_site.sh", "! said=$(timeout 30 squeue", "! said=$(timeout 1 squeue")
    (line,) = one_check(site, "check_slurm", **slurm | {"SLURM_CONF": str(tmp_path / "none")})
    assert re.match("FAILED .* Slurm: no answer to squeue --me within 30 s: squeue: .*fix: ", line)


@pytest.mark.parametrize("old, new, said", [  # what is changed in the worker script, and what must be said
    ("constraint=v100", "constraint=h100",
     "Invalid feature specification; fix: change or delete the --constraint; there are: .*v100"),
    ("##SBATCH --partition=batch", "#SBATCH --partition=gpu",
     "Invalid partition name specified; fix: #SBATCH --partition=, one of: batch"),
    ("gpus-per-node=8", "gpus-per-node=16",
     "node configuration is not available; fix: lower the GPUs or CPUs; .*gpu:v100:8"),
    ("--time=04", "--tyme=04", "unrecognized option '--tyme=04:00:00'"),
])  # fmt: skip
def test_a_job_file_that_slurm_refuses(site, slurm, old, new, said):
    edit(exercise(site) / WORKER, old, new)
    (line,) = one_check(site, 'check_job_file "$WORKER"', **slurm)
    assert re.match(f"FAILED +login +{WORKER}: Slurm refuses it: .*{said}", line)


def test_a_missing_log_folder(site, slurm):
    shutil.rmtree(exercise(site) / "logs")
    line, *_ = one_check(site, 'check_job_file "$HEAD"', **slurm)
    said = "its log folder .*/logs is missing or read-only; fix: mkdir -p /"
    assert re.match(f"FAILED +login +{HEAD}: {said}", line)


@pytest.mark.parametrize("setting, back, variables, said", [
    ("MaxTime=1:00:00", "MaxTime=INFINITE", {"SBATCH_TIMELIMIT": "2:00:00"},
     "its time limit is 02:00:00 by the variable SBATCH_TIMELIMIT, which .*; fix: .* and unset SBATCH_TIMELIMIT"),
    ("MaxTime=1:00:00", "MaxTime=INFINITE", {},
     "its time limit is 04:00:00, above that of partition batch, 01:00:00; fix: #SBATCH --time=01:00:00"),
    ("AllocNodes=elsewhere", "AllocNodes=ALL", {},
     "Slurm refuses it: .*Access/permission denied; fix: submit from a login node"),
])  # fmt: skip
def test_a_partition_that_does_not_suit(site, slurm, setting, back, variables, said):
    update = ["scontrol", "update", "PartitionName=batch"]
    subprocess.run([*update, setting], env=slurm, check=True)
    try:
        lines = one_check(site, 'check_job_file "$HEAD"', **slurm | variables)
    finally:
        subprocess.run([*update, back], env=slurm, check=True)
    assert re.match(f"FAILED +login +{HEAD}: {said}", lines[0])


def test_times_as_slurm_writes_them(site):
    days = {"2-0": 172800, "1-12:30": 131400, "1-00:00:09": 86409}
    times = {"90": 5400, "10:30": 630, "04:00:00": 14400} | days
    told = one_check(site, "; ".join(f"seconds {asked}" for asked in times))
    assert told == [str(seconds) for seconds in times.values()]


# ---- Each check can fail: between the nodes ----------------------------------------------------------------
def test_nodes_that_cannot_reach_each_other_nor_submit_and_a_missing_module(site, slurm, tmp_path):
    quick(site)
    bare = tools_without(tmp_path / "bin", "sbatch")
    edit_block(exercise(site) / HEAD, f"[[ -z ${{SLURM_JOB_ID:-}} ]] || PATH={bare}\nmodule load cuda")
    namespace = '[[ -n ${CLOSED:-} ]] || CLOSED=yes exec unshare -rn bash "$0"'
    network = "PATH=$PATH:/usr/sbin; ip link set lo up; NODE_ADDRESS=127.0.0.1"
    edit_block(exercise(site) / WORKER, f"{namespace}\n{network}")
    edit(site / "scripts/check_site.sh", "LATE=10 ", "LATE=0 ")
    status, lines = check(site, **slurm)
    assert status == 1 and lines[-1].endswith(" 3 FAILED")
    for said in (
        r"FAILED +head +jobs cannot be submitted from this node, .*fix: sbatch on the PATH in the EDIT",
        r"FAILED +head +head -> worker: 127.0.0.1 port \d+: Connection refused; fix: ",
        r"FAILED +worker\d +worker -> head: 127.0.0.1 port \d+: Connection refused; fix: ",
        r"warning +login +shared folder: from here to the worker node and back a file takes \d+ s",
        r"warning +login +head node: its EDIT block says: .*module: command not found; fix: the EDIT block",
    ):
        assert len([line for line in lines if re.match(said, line)]) == 1, said
    assert nothing_left(site, slurm)


def test_a_folder_that_the_nodes_do_not_see(site, slurm):
    quick(site)
    (exercise(site) / "runs").mkdir()
    command = f"mount -t tmpfs none {exercise(site)}/runs && exec bash scripts/check_site.sh"
    status, lines = run(site, [*MOUNTS, command], slurm)
    assert status == 1 and lines[-1].endswith(" 1 FAILED")
    said = r"FAILED +login +shared folder: no file of job \d+, the head node \(ended\), arrives in .*fix: "
    assert any(re.match(said, line) for line in lines)


def test_an_edit_block_that_ends_the_job_is_quoted(site, slurm):
    quick(site)
    ends = '[[ -z ${SLURM_JOB_ID:-} ]] || { echo "no such module"; exit 1; }'
    edit_block(exercise(site) / HEAD, ends)
    status, lines = check(site, **slurm)
    said = "FAILED +login +head node: its job ended early: no such module; fix: the EDIT block"
    assert status == 1 and re.match(said, lines[-2])
    assert nothing_left(site, slurm)


def test_a_job_that_does_not_start_in_time(site, slurm):
    quick(site)
    edit(exercise(site) / HEAD, *LATER)
    edit(site / "scripts/check_site.sh", "patiently $((WAIT * 60)) ", "patiently 1 ")
    status, lines = check(site, "--wait", "1", **slurm)
    said = r"FAILED +login +head node: job \d+ has waited 1 minutes in the queue \(PENDING BeginTime"
    assert status == 1 and re.match(said, lines[-2])
    assert nothing_left(site, slurm)


def test_interrupted_it_ends_its_jobs_and_removes_its_files(site, slurm, tmp_path):
    quick(site)
    edit(exercise(site) / WORKER, *LATER)
    command, said = ["bash", site / "scripts/check_site.sh"], tmp_path / "stderr"
    with said.open("w") as stderr:
        process = subprocess.Popen(
            command, env=environment(**slurm), stdout=subprocess.DEVNULL, stderr=stderr
        )
    wait_for(lambda: "the worker node" in said.read_text(), 60, "both jobs")
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert nothing_left(site, slurm)
