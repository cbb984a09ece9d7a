"""check_site.sh: a run on the real sandbox where all is well, and for each check a state in which it must not say ok.

Each state is made for real where it can be: an edited copy of the repository, a full file system in a mount namespace, a
closed network, limits of the shell. Only the GPU for which PyTorch has no kernels, and a site's private /tmp, are made up.
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
EDIT = "# What makes the environment active"


@pytest.fixture
def site(tmp_path):
    """A copy of the repository."""
    return copy_of_the_course(tmp_path / "course").parents[3]


@pytest.fixture(scope="module")
def inputs(demo):
    return {"MODEL_NAME": str(demo / "model"), "SQUAD_DATA": str(demo / "squad"), "TRAIN_SAMPLES": "8", "EVAL_SAMPLES": "4"}


def environment(**variables):
    return {name: value for name, value in os.environ.items() if not name.startswith(OURS)} | variables


def check(site, *arguments, **variables):
    """The whole of it, as a user calls it: (exit status, lines)."""
    run = subprocess.run(["bash", site / "scripts/check_site.sh", *arguments], env=environment(**variables), text=True, check=False,
                         capture_output=True, timeout=120, start_new_session=True)
    print(run.stdout, run.stderr)
    return run.returncode, run.stdout.splitlines()


def one_check(site, commands, shell=("bash", "-c"), **variables):
    """What the functions of check_site.sh say."""
    text = f'source scripts/check_site.sh; RUN_DIR=$PWD/runs; mkdir -p "$RUN_DIR"; {commands}; end_owned'
    run = subprocess.run([*shell, text], cwd=site, env=environment(**variables), text=True, check=False, capture_output=True, timeout=60)
    print(run.stdout, run.stderr)
    return run.stdout.splitlines()


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def edit_block(script, line):
    """Adds a line to the EDIT block of a .slurm file."""
    edit(script, EDIT, f"{EDIT}\n{line}\n#")


def tools_without(folder, *names):
    """A folder of links to all commands on the PATH but these."""
    folder.mkdir()
    for path in reversed(os.environ["PATH"].split(":") + ["/usr/sbin"]):
        for tool in Path(path).glob("*"):
            if tool.name not in names and not tool.name.startswith("python" if "python" in names else "\0"):
                (folder / tool.name).unlink(missing_ok=True)
                (folder / tool.name).symlink_to(tool)
    return str(folder)


def verdicts(lines):
    return [line.split()[0] for line in lines[:-1]]


def nothing_left(site, cluster_environ):
    jobs = subprocess.run(["squeue", "--noheader", "--format=%j"], env=cluster_environ, text=True, capture_output=True, check=True).stdout
    return "check_site" not in jobs and not (site / EXERCISE.relative_to(REPO) / "runs").exists()


# ---- All is well -----------------------------------------------------------------------------------------------------
def test_on_a_cluster_where_all_is_well(site, slurm, inputs):
    status, lines = check(site, **slurm, **inputs)
    assert status == 0 and lines[-1] == f"{len(lines) - 2} ok, 1 warning, 0 FAILED"
    assert [line for line in lines if line.startswith("warning")] == [line for line in lines if "GPUs: PyTorch uses 0 of the 8" in line]
    for place, what in (
        ("login", "Slurm: slurm"), ("login", f"{HEAD}: Slurm takes it"), ("login", f"{WORKER}: Slurm takes it"), ("login", "bloom_hpo_manual.slurm: Slurm takes it"),
        ("login", "shared folder: from here to the head node"), ("login", "shared folder: from here to the worker node"),
        ("head", "jobs can be submitted"), ("head", r"head -> worker: connected to 127.0.0.1 port \d+"), ("worker1", r"worker -> head: connected to 127.0.0.1 port \d+"),
        ("worker1", r"capacity: 4 trial\(s\)"), ("worker1", r"processes: .* 4 trial\(s\) at once need 1700"),
        *((place, what) for place in ("login", "head", "worker1") for what in ("packages: as in requirements.txt", r"inputs: .*8 \+ 4 questions")),
        *((place, what) for place in ("head", "worker1") for what in ("address: ", "disk: .*runs", "disk: /tmp ", "/dev/shm", "open files", "socket path")),
    ):
        assert [line for line in lines if re.match(rf"(ok|warning) +{place} +{what}", line)], f"{place}: {what}"
    assert nothing_left(site, slurm)


def test_without_slurm_it_says_so_and_checks_this_machine(site, inputs, tmp_path):
    path = tools_without(tmp_path / "bin", "sbatch", "squeue", "scontrol", "scancel", "sinfo")
    status, lines = check(site, PATH=path, **inputs)
    assert status == 0 and lines[0].startswith("warning  login     Slurm: no sbatch here, so this machine alone is checked")
    assert verdicts(lines[1:]) == ["ok"] * 9 and lines[-1] == "9 ok, 1 warning, 0 FAILED"
    assert not (site / EXERCISE.relative_to(REPO) / "runs").exists()


# ---- Each check can fail: on one machine -----------------------------------------------------------------------------
MOUNT = "mount -t tmpfs -o size={},nr_inodes={} none {}"
STATES = [  # check, what is done before it, what it must say
    ("check_packages", "sed -i s/^torch==.*/torch==1.0/ requirements.txt", "FAILED .* packages: torch 2.* instead of ==1.0, in .*fix: "),
    ("check_packages", "echo no-such-package==2 >>requirements.txt", "FAILED .* packages: no-such-package missing instead of ==2"),
    ("check_inputs", "rm MODEL/model.safetensors", "FAILED .* inputs: MODEL_NAME='.*: this folder has no weights.*fetch the whole model"),
    ("check_inputs", "rm SQUAD/dev-v1.1.json", "FAILED .* inputs: SQUAD_DATA='.*: no file dev-v1.1.json"),
    ("check_inputs", "export MODEL_NAME=no-owner/no-model HF_HUB_OFFLINE=1", "FAILED .* inputs: MODEL_NAME='no-owner/no-model' cannot be loaded.*fetch it on a login node"),
    ("check_inputs", "export LR_LOWER=1 NUM_EPOCHS=x", "FAILED .* inputs: NUM_EPOCHS='x': is not a whole number.*FAILED .* inputs: LR_LOWER="),
    ('check_disk "$RUN_DIR" 100', MOUNT.format("20m", 0, '"$RUN_DIR"'), "FAILED .* disk: .*/runs has 20 MB free, a run needs 100; fix: "),
    ('check_disk "$RUN_DIR" 100', MOUNT.format("200m", 1, '"$RUN_DIR"'), "FAILED .* disk: 50 MB cannot be written to .*/runs: dd.* No space left on device; fix: see your quota"),
    ('check_disk "$RUN_DIR" 60', MOUNT.format("2000m", 0, '"$RUN_DIR"') + '; fallocate -l 1920M "$RUN_DIR/old"', "warning .* disk: .* is 96 % full"),
    ("check_shm", MOUNT.format("64m", 0, "/dev/shm"), "warning .* /dev/shm has 64 MB free, Ray wants 500 .*fix: "),
    ("check_limits", "ulimit -u 400", r"FAILED .* processes: ulimit -u 400, \d+ in use, 1 trial\(s\) at once need 800 .*fix: ulimit -u \d+ before sbatch"),
    ("check_limits", "ulimit -n 256", "FAILED .* open files: ulimit -n 256, a run needs 1024; fix: ulimit -n 1024 before sbatch"),
    ("prepare_ray; check_socket", "mkdir -p $PWD/job-private/tmp-of-the-user-on-this-node; RAY_AT=$_; ray_tmp", r"FAILED .* socket path: OSError: AF_UNIX path too long: .* of at most 107 characters; fix: "),
    ("check_socket", "RAY_TMP=/proc", "FAILED .* socket path: mkdir: cannot create directory"),
    ("check_gpus", 'export PYTHONPATH="$PWD/stub"', "FAILED .* GPUs: ERROR: PyTorch does not run on this node: .*no kernel image.*sm_75 sm_80 on V100 sm_70"),
    ("check_gpus", "export SLURM_GPUS_ON_NODE=8", "warning .* GPUs: PyTorch uses 0 of the 8 that Slurm gives"),
    ("check_capacity", "export SLURM_JOB_ID=1 SLURM_CPUS_ON_NODE=20 CPUS_PER_WORKER=16", r"FAILED .* capacity: ERROR: one trial \(.*does not fit on a node with 20 CPUs"),
    ("check_address", "NODE_ADDRESS=203.0.113.7; export NODE_ADDRESS", "FAILED .* address: 203.0.113.7: OSError: .* Cannot assign requested address .*fix: NODE_ADDRESS"),
    ("check_address", "NODE_ADDRESS=no-such-node; export NODE_ADDRESS", "FAILED .* address: no-such-node: OSError: .*Name or service not known"),
    ("ROLE=head; check_reach worker", 'mkdir -p "$RUN_DIR"; echo 127.0.0.1 1 >"$RUN_DIR/port-worker"', "FAILED .* head -> worker: 127.0.0.1 port 1: Connection refused; fix: ask your site to open all ports"),
    ("ROLE=head; check_reach worker", 'touch "$RUN_DIR/done-worker"', "FAILED .* head -> worker: the worker offers no port"),
    ("submit worker", f"sed -i '/^# ==== end of EDIT/d' experiments/raytune/scheduler/asha/{WORKER}", f"{WORKER} has lost the line .==== end of EDIT. that ends its EDIT block"),
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
def test_a_check_fails(site, inputs, demo, tmp_path, command, before, said):
    (site / "stub").mkdir()
    (site / "stub/torch.py").write_text(TORCH)
    if "MODEL" in before or "SQUAD" in before:
        assets = shutil.copytree(demo, tmp_path / "assets")
        before = before.replace("MODEL/", f"{assets}/model/").replace("SQUAD/", f"{assets}/squad/")
        inputs = {"MODEL_NAME": str(assets / "model"), "SQUAD_DATA": str(assets / "squad")}
    if "ray_tmp" in before:  # a site whose jobs have a /tmp of their own
        edit(site / "scripts/raytune_hpo/ray_job.sh", '"/tmp/ray_', '"$RAY_AT/ray_')
        before = before.replace("; ray_tmp", "")
    choose = "choose_python; " if command != "check_packages" else ""
    lines = one_check(site, f"{choose}{before}; {command}", MOUNTS if "mount" in before else ("bash", "-c"), **inputs)
    assert re.search(said, "\n".join(lines), re.DOTALL)


def test_no_python(site, tmp_path):
    (site / ".venv").unlink()
    path = tools_without(tmp_path / "bin", "python")
    (line,) = one_check(site, "check_packages", PATH=path)
    assert line.startswith("FAILED   login     Python: no python found; run: bash ") and line.endswith("scripts/setup_env.sh")


def test_a_run_folder_that_cannot_be_made_ends_with_status_1(site, inputs, tmp_path):
    (site / EXERCISE.relative_to(REPO) / "runs").write_text("a file")
    status, lines = check(site, PATH=tools_without(tmp_path / "bin", "sbatch", "squeue", "scontrol", "scancel", "sinfo"), **inputs)
    assert status == 1 and lines[-1] == "0 ok, 1 warning, 1 FAILED"
    assert re.match("FAILED +login +run folder: mkdir: cannot create directory .*fix: ", lines[1])


@pytest.mark.parametrize("before, said", [
    ("true", "ERROR: Ray ended at its start: ValueError: the cause "),
    ("NODE_ADDRESS=203.0.113.7", r"ERROR: Ray ended at its start, with the address 203.0.113.7, which is not one of this node \(.*\): set NODE_ADDRESS in the EDIT block: "),
    ("ulimit -u 250", "ERROR: Ray ended at its start, with ulimit -u 250, of which [0-9]+ are in use: raise it before sbatch, or ask your site: "),
])  # fmt: skip
def test_a_ray_that_ends_early_is_told_with_what_it_does_not_say_itself(site, before, said):
    log = 'RAY_LOG=$RUN_DIR/log; printf "Traceback\nValueError: the cause\nRemaining processes will be killed.\n" >"$RAY_LOG"; sleep 0 & RAY=$!; wait'
    (line,) = one_check(site, f"choose_python; {log}; ({before}; ray_started) 2>&1")
    assert re.match(said, line)


@pytest.mark.parametrize("arguments", [["--wait"], ["--wait", "0"], ["--wait", "ten"], ["now"], ["--wait", "5", "6"]])
def test_wrong_usage(site, arguments):
    assert check(site, *arguments) == (2, [])


# ---- Each check can fail: Slurm --------------------------------------------------------------------------------------
@pytest.mark.parametrize("missing", ["sbatch", "scontrol"])
def test_a_missing_command(site, slurm, tmp_path, missing):
    (line,) = one_check(site, "check_slurm", **slurm | {"PATH": tools_without(tmp_path / "bin", missing)})
    assert line.startswith(f"FAILED   login     Slurm: not on the PATH: {missing}; fix: module load slurm")


def test_a_slurm_that_does_not_answer(site, slurm, tmp_path):
    edit(site / "scripts/check_site.sh", "timeout 30 squeue --noheader --me --format=%i 2>&1", "timeout 3 squeue --noheader --me --format=%i 2>&1")
    (line,) = one_check(site, "check_slurm", **slurm | {"SLURM_CONF": str(tmp_path / "none")})
    assert re.match("FAILED .* Slurm: no answer to squeue --me within 30 s: squeue: .*fix: ", line)


JOB_FILES = [  # what is changed in the worker script, and what must be said
    (("constraint=v100", "constraint=h100"), "Slurm refuses it: .*Invalid feature specification; fix: no node has --constraint=h100;.*there are: .*v100"),
    (("##SBATCH --partition=batch", "#SBATCH --partition=gpu"), "Slurm refuses it: .*Invalid partition name specified; fix: #SBATCH --partition=, one of: batch"),
    (("gpus-per-node=8", "gpus-per-node=16"), "Slurm refuses it: .*Requested node configuration is not available; fix: no node has --gpus-per-node=16 and --cpus-per-task=20;.*gpu:v100:8"),
    (("--time=04", "--tyme=04"), "Slurm refuses it: .*unrecognized option '--tyme=04:00:00'"),
]


@pytest.mark.parametrize("change, said", JOB_FILES, ids=lambda text: text[1] if isinstance(text, tuple) else "")
def test_a_job_file_that_slurm_refuses(site, slurm, change, said):
    edit(site / EXERCISE.relative_to(REPO) / WORKER, *change)
    (line,) = one_check(site, 'check_job_file "$WORKER"', **slurm)
    assert re.match(f"FAILED +login +{WORKER}: {said}", line)


def test_a_missing_log_folder(site, slurm):
    shutil.rmtree(site / EXERCISE.relative_to(REPO) / "logs")
    assert re.match(f"FAILED +login +{HEAD}: its log folder .*/logs is missing or read-only; fix: mkdir -p /", one_check(site, 'check_job_file "$HEAD"', **slurm)[0])


@pytest.mark.parametrize("setting, back, said", [
    ("MaxTime=1:00:00", "MaxTime=INFINITE", "--time=04:00:00 is above the limit of partition by default, 1:00:00; fix: #SBATCH --time=1:00:00"),
    ("AllocNodes=elsewhere", "AllocNodes=ALL", "Slurm refuses it: .*Access/permission denied; fix: submit from a login node"),
])  # fmt: skip
def test_a_partition_that_does_not_suit(site, slurm, setting, back, said):
    update = ["scontrol", "update", "PartitionName=batch"]
    subprocess.run([*update, setting], env=slurm, check=True)
    try:
        lines = one_check(site, 'check_job_file "$HEAD"', **slurm)
    finally:
        subprocess.run([*update, back], env=slurm, check=True)
    assert re.match(f"FAILED +login +{HEAD}: {said}", lines[0])


@pytest.mark.parametrize("asked, seconds", [("90", 5400), ("10:30", 630), ("04:00:00", 14400), ("2-0", 172800), ("1-12:30", 131400), ("1-00:00:09", 86409)])
def test_times_as_slurm_writes_them(site, asked, seconds):
    assert one_check(site, f"seconds {asked}") == [str(seconds)]


# ---- Each check can fail: between the nodes --------------------------------------------------------------------------
def test_a_site_where_nodes_cannot_reach_each_other_nor_submit_and_files_are_late(site, slurm, inputs, tmp_path):
    folder = site / EXERCISE.relative_to(REPO)
    edit_block(folder / HEAD, f"PATH=${{SLURM_JOB_ID:+{tools_without(tmp_path / 'bin', 'sbatch')}:}}$PATH; [[ -z ${{SLURM_JOB_ID:-}} ]] || PATH=${{PATH%%:*}}")
    edit_block(folder / WORKER, '[[ -n ${CLOSED:-} ]] || CLOSED=yes exec unshare -rn bash "$0"\nPATH=$PATH:/usr/sbin; ip link set lo up; NODE_ADDRESS=127.0.0.1')
    edit(site / "scripts/check_site.sh", "LATE=10 ", "LATE=0 ")
    edit(site / "scripts/check_site.sh", "    check_inputs\n    check_disk", "    check_disk")  # seconds each, and shown above
    status, lines = check(site, **slurm, **inputs)
    assert status == 1 and lines[-1].endswith(" 3 warning, 3 FAILED")
    said = "\n".join(lines)
    assert re.search("FAILED +head +jobs cannot be submitted from this node, as the head job does: .*sbatch.*fix: sbatch on the PATH in the EDIT", said)
    assert re.search(r"FAILED +head +head -> worker: 127.0.0.1 port \d+: Connection refused; fix: ", said)
    assert re.search(r"FAILED +worker\d +worker -> head: 127.0.0.1 port \d+: Connection refused; fix: ", said)
    assert re.search(r"warning +login +shared folder: from here to the worker node and back a file takes \d s", said)
    assert nothing_left(site, slurm)


def test_a_folder_that_the_nodes_do_not_see(site, slurm, inputs):
    runs = site / EXERCISE.relative_to(REPO) / "runs"
    runs.mkdir()
    command = f"mount -t tmpfs none {runs} && exec bash scripts/check_site.sh"
    run = subprocess.run([*MOUNTS, command], cwd=site, env=slurm | inputs, text=True, check=False, capture_output=True, timeout=120)
    assert run.returncode == 1 and run.stdout.endswith(" 1 FAILED\n"), run.stdout
    assert re.search(r"FAILED +login +shared folder: no file of job \d+, the head node \(ended\), arrives in .*fix: put the repository on a file system", run.stdout)


def test_an_edit_block_that_fails_is_quoted(site, slurm, inputs):
    edit_block(site / EXERCISE.relative_to(REPO) / HEAD, "module load cuda/12.6")
    status, lines = check(site, **slurm, **inputs)
    said = [line for line in lines if "EDIT block says" in line]
    assert status == 0 and len(said) == 1 and re.match("warning +login +head node: its EDIT block says: .*module: command not found; fix: the EDIT block", said[0])
    assert nothing_left(site, slurm)


def test_an_edit_block_that_ends_the_job_is_quoted(site, slurm, inputs):
    edit_block(site / EXERCISE.relative_to(REPO) / HEAD, '[[ -z ${SLURM_JOB_ID:-} ]] || { echo "no such module"; exit 1; }')
    status, lines = check(site, **slurm, **inputs)
    assert status == 1 and re.match("FAILED +login +head node: its job ended early: no such module; fix: the EDIT block", lines[-2])
    assert nothing_left(site, slurm)


def test_a_job_that_does_not_start_in_time(site, slurm, inputs):
    edit(site / EXERCISE.relative_to(REPO) / HEAD, "#SBATCH --nodes=1", "#SBATCH --nodes=1\n#SBATCH --begin=now+1hour")
    edit(site / "scripts/check_site.sh", "patiently $((WAIT * 60)) ", "patiently 2 ")
    status, lines = check(site, "--wait", "1", **slurm, **inputs)
    assert status == 1 and re.match(r"FAILED +login +head node: job \d+ has waited 1 minutes in the queue \(PENDING BeginTime", lines[-2])
    assert nothing_left(site, slurm)


@pytest.mark.parametrize("sent, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_jobs_and_removes_files(site, slurm, inputs, tmp_path, sent, status):
    edit(site / EXERCISE.relative_to(REPO) / WORKER, "#SBATCH --nodes=1", "#SBATCH --nodes=1\n#SBATCH --begin=now+1hour")
    edit(site / "scripts/check_site.sh", "            check_inputs\n", "")
    said = tmp_path / "stderr"
    with subprocess.Popen(["bash", site / "scripts/check_site.sh"], env=environment(**slurm, **inputs), stdout=subprocess.DEVNULL, stderr=said.open("w")) as run:
        wait_for(lambda: "the worker node" in said.read_text(), 60, "both jobs")
        run.send_signal(sent)
        assert run.wait(30) == status
    assert nothing_left(site, slurm)
