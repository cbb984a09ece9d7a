"""What a site, its modules and a user's shell can hold: the run is the same, or one line says what is wrong.

The whole of it is in test_run.py: there a run on the sandbox has all of HOSTILE at once.
"""

import math
import os
import re
import shutil
import subprocess
import zoneinfo
from datetime import datetime, timedelta

import pytest
import this_node
from conftest import EXERCISE, HEAD, HOSTILE, REPO, events_of

MANUAL = REPO / "experiments/manual"
JOB_FILES = [EXERCISE / HEAD, MANUAL / "bloom_hpo_manual.slurm", MANUAL / "save_best.slurm"]
SCRIPTS = [*JOB_FILES, *(REPO / f"scripts/{name}.sh" for name in ("quickstart", "setup_env", "check_site"))]


def shell(commands, name="bash", within=(), **variables):
    """Commands in a shell that has the functions of a head job -> (exit status, lines)."""
    source = 'ROLE=head; for file in ray_job watch_run; do source "$REPO/scripts/job/$file.sh"; done'
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))}
    environ = kept | {"REPO": str(REPO)} | variables
    command = [*within, "bash", "-c", f"{source}; set -euo pipefail; {commands}", name]
    run = subprocess.run(command, env=environ, text=True, check=False, stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT, timeout=120)  # fmt: skip
    return run.returncode, run.stdout.splitlines()


def stand_in(folder, **commands):
    """Commands of these names, first on the PATH."""
    (folder / "bin").mkdir(exist_ok=True)
    for name, script in commands.items():
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / "bin" / name).chmod(0o755)
    return f"{folder}/bin:{os.environ['PATH']}"


def head(folder, commands, **stand_ins):
    """The same with these commands in place of others, for a run in this folder whose only worker is job 5."""
    (folder / "head-1").mkdir(exist_ok=True)
    run = f"EXERCISE={folder} RUN_DIR={folder} HEAD_DIR={folder}/head-1 RECORD={folder}/events.jsonl"
    run += " WORKER_NODES=1 WORKER_JOBS=(5)"
    status, lines = shell(f"{run} WORKER_DEADLINE=20; {commands}", PATH=stand_in(folder, **stand_ins))
    return status, [line.split(" | ")[-1] for line in lines]


# ---- The environment ---------------------------------------------------------------------------------------
LATER = {"POSIXLY_CORRECT": "1", "GREP_OPTIONS": "-v", "CDPATH": "/", "BASH_ENV": "/dev/null", "LANGUAGE": "de",
         "SINFO_FORMAT": "%x", "PYTHONWARNINGS": "error", "PYTHONIOENCODING": "ascii", "PYTHONHOME": "/none",
         "WORLD_SIZE": "4", "MASTER_PORT": "1", "OMP_PROC_BIND": "close", "OMP_NUM_THREADS": "1", "RAY_ADDRESS": "x:1",
         "TUNE_RESULT_DIR": "/none", "ACCELERATE_MIXED_PRECISION": "fp8", "SBATCH_WAIT": "1", "SBATCH_JOB_NAME": "x",
         "NCCL_SOCKET_IFNAME": "ib0", "DS_ACCELERATOR": "none", "MPLBACKEND": "none", "GLOBIGNORE": "*",
         "PMI_SIZE": "8", "ROCR_VISIBLE_DEVICES": "2,3"}  # fmt: skip


def test_a_job_has_the_same_environment_whatever_variables_hold():
    """Three stay: the hub may need a proxy, which nothing inside the cluster goes through; for PYTHONPATH see below.

    Slurm's name of AMD's GPUs, with which Ray does not start, becomes Ray's.
    """
    dump = 'RUN_DIR=/r; prepare_cluster 10.0.0.1 10.0.0.2; [[ -n "$(date)" ]]; env | sort'
    plain = dict.fromkeys((HOSTILE | LATER).keys() & os.environ.keys(), "")
    (_, expected), (status, found) = (shell(dump, **each, no_proxy="site.org") for each in (plain, HOSTILE | LATER))
    said = re.compile(r"bash: warning: setlocale|ERROR: ld.so|_=|LD_PRELOAD=.* cannot be loaded")
    stays = re.compile("(http_proxy|PYTHONPATH|NODE_NAME|HIP_VISIBLE_DEVICES)=")
    mine = lambda lines: [line for line in lines if not said.match(line) and not stays.match(line)]
    assert status == 0 and mine(found) == mine(expected)
    assert len(list(filter(stays.match, found))) == 4 and "HIP_VISIBLE_DEVICES=2,3" in found
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        assert f"{name}=site.org,localhost,127.0.0.1,10.0.0.1,10.0.0.2" in found


def test_packages_of_a_module_do_not_shadow_the_environments_own(tmp_path):
    for name in ("transformers", "of_the_module"):
        (tmp_path / f"{name}.py").write_text("")
    where = 'choose_python; python -c "import of_the_module, transformers; print(transformers.__file__)"'
    status, (file,) = shell(where, PYTHONPATH=str(tmp_path))
    assert status == 0 and file.startswith(f"{REPO}/.venv/")


def test_a_library_path_that_breaks_pytorch_is_named(tmp_path):
    (tmp_path / "libc10.so").write_text("of another PyTorch")
    status, lines = shell("choose_python; look_at_node", LD_LIBRARY_PATH=str(tmp_path))
    said = rf"ERROR: PyTorch does not run on this node: .*; LD_LIBRARY_PATH={tmp_path} gives it other libraries"
    assert status == 1 and re.match(said, lines[-1])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_where_a_script_cannot_run_one_line_says_so(script, tmp_path):
    """Elsewhere than on Linux, though `cd` would not find its files; and the copy of a job file that Slurm runs."""

    def refusal(name, folder, **variables):
        run = subprocess.run(["bash", name, "/"], cwd=folder, env=os.environ | variables, text=True, check=False,
                             capture_output=True, timeout=60)  # fmt: skip
        assert run.returncode == 1 and run.stdout == ""
        return run.stderr

    folder = script.parent.name
    (tmp_path / folder).mkdir()
    line = refusal(f"{folder}/{script.name}", script.parents[1], OSTYPE="darwin23", CDPATH=str(tmp_path))
    assert re.fullmatch("ERROR: OSTYPE=darwin23: this runs on Linux only; on Windows use WSL2, .*\n", line)
    if script in JOB_FILES:
        shutil.copy(script, tmp_path / "slurm_script")
        said = rf"ERROR: {tmp_path} is not the .*; cd {script.parent.relative_to(REPO)}, then sbatch\n"
        assert re.fullmatch(said, refusal("slurm_script", tmp_path))


@pytest.mark.parametrize("script", [*JOB_FILES, REPO / "scripts/quickstart.sh", REPO / "experiments/site.sh"],
                         ids=lambda path: path.name)  # fmt: skip
def test_windows_line_ends_are_named_in_one_line(script, tmp_path):
    (tmp_path / script.name).write_bytes(script.read_bytes().replace(b"\n", b"\r\n"))
    run = subprocess.run(["bash", script.name], cwd=tmp_path, text=True, check=False, capture_output=True, timeout=60)
    assert run.returncode == 1 and re.fullmatch("ERROR: Windows line ends; .*\n", run.stdout + run.stderr)


def test_an_environment_whose_python_this_node_lacks_is_named_in_one_line(tmp_path):
    (tmp_path / "scripts").symlink_to(REPO / "scripts")
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").symlink_to("/none/bin/python3.12")
    for name in ("requirements.txt", ".venv/installed_requirements.txt"):
        (tmp_path / name).touch()
    for command in ("choose_python", 'bash "$REPO/scripts/setup_env.sh"'):
        status, (line,) = shell(command, REPO=str(tmp_path), SLURMD_NODENAME="n1")
        said = r"ERROR: n1: .* No such file or directory \(/none/bin/python3.12\); .*: rm -rf .*; PYTHON=.*"
        assert status == 1 and re.fullmatch(said, line)


def test_paths_keep_the_names_that_the_user_sees(tmp_path, course, monkeypatch, checks):
    """Other nodes may not have what lies behind a link: an automounter's folder, for one."""
    home = tmp_path / "home"
    home.symlink_to(course.parents[3])
    for folder in ("experiments/raytune/scheduler/asha", "experiments/raytune_hpo/raytune_asha_scheduler"):
        environ = os.environ | {"PWD": str(home / folder), "LR_LOWER": "none"}
        run = subprocess.run(["bash", HEAD], cwd=home / folder, env=environ, text=True, check=False,
                             stdout=subprocess.PIPE, timeout=60)  # fmt: skip
        assert run.returncode == 2 and f"| Python: {home}/.venv/bin/python\n" in run.stdout
    monkeypatch.chdir(home / "scripts")
    for pwd, found in {home: home / "tests", tmp_path: tmp_path / "tests", "": tmp_path / "tests"}.items():
        monkeypatch.setenv("PWD", f"{pwd}/scripts")
        assert checks.read_value("MODEL_NAME", "../tests") == str(found)


# ---- What limits a process ---------------------------------------------------------------------------------
@pytest.mark.parametrize("cgroup, files, cpus", [
    ("0::/\n", {"cpu.max": "200000 100000"}, 2),  # a container, version 2
    ("0::/a/b\n", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000", "a/memory.max": "3221225472\n"}, 3),
    ("0::/a\n", {"a/cpu.max": "50000 100000", "a/pids.max": "500\n", "a/pids.current": "480\n"}, 1),
    ("4:cpu,cpuacct:/d/x\n1:name=s:/\n", {"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4),
    ("4:cpu:/d\n", {"cpu/d/cpu.cfs_quota_us": "-1", "cpu/d/cpu.cfs_period_us": "100000"}, 64),
    ("", {}, 64),
])  # fmt: skip
def test_trials_get_what_a_container_allows(tmp_path, monkeypatch, cgroup, files, cpus):
    for name, text in {"proc/self/cgroup": cgroup, **{f"sys/fs/cgroup/{n}": files[n] for n in files}}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "proc").mkdir(exist_ok=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 16777216 kB\nMemAvailable:   12582912 kB\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64))
    monkeypatch.setattr(this_node.resource, "getrlimit", lambda _: (this_node.resource.RLIM_INFINITY,) * 2)
    for name in ("SLURM_CPUS_ON_NODE", "ON_SLURM"):
        monkeypatch.delenv(name, raising=False)
    assert this_node.usable_cpus(tmp_path) == cpus
    assert this_node.free_processes(tmp_path) == (20 if "a/pids.max" in files else math.inf)
    assert this_node.usable_memory(tmp_path) == (3 if "a/memory.max" in files else 12)
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "2")  # inside an allocation
    assert this_node.usable_cpus(tmp_path) == min(cpus, 2)
    monkeypatch.setenv("ON_SLURM", "yes")
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "1024")
    assert this_node.usable_memory(tmp_path) == 2


def test_on_a_laptop_as_many_trials_run_at_once_as_there_are_cpus():
    node = "look_at_node() { CPUS=8 GPUS=0 Gw=0 MEMORY=64 CARD=0 NODE=node; }; measure_node; echo $SLOTS"
    settings = {"WORKERS_PER_TRIAL": "1", "CPUS_PER_WORKER": "1", "PATH": f"{REPO}/.venv/bin:{os.environ['PATH']}"}
    assert shell(node, **settings)[1][-1] == "8"
    assert shell(f"on_slurm() {{ true; }}; {node}", **settings)[1][-1] == "6"  # two are left to Ray itself


def test_the_memory_of_trials_bounds_them_as_cpus_do_and_the_log_says_so():
    node = "look_at_node() { CPUS=32 GPUS=0 Gw=0 MEMORY=16 CARD=0 NODE=node; }; measure_node; echo ${OFFER[*]}"
    settings = {"WORKERS_PER_TRIAL": "2", "CPUS_PER_WORKER": "1", "PATH": f"{REPO}/.venv/bin:{os.environ['PATH']}"}
    _, (line, offer) = shell(node, MODEL_PARAMETERS="50000000", **settings)
    assert line.endswith("this node: node, 4 trial(s) at once: a trial takes 2*1.7 of 15 GiB (MEMORY_PER_WORKER)")
    assert offer == '--num-cpus=8 --num-gpus=0 --resources={"trial_slot": 4}'
    status, (error,) = shell(f"on_slurm() {{ true; }}; {node}", MEMORY_PER_WORKER="9", **settings)
    assert status == 1 and "no trial fits on this node" in error and "2*9 of 15 GiB" in error


@pytest.mark.parametrize("signal, status", [("TERM", 143), ("INT", 130), ("HUP", 129)])
def test_a_signal_that_comes_at_a_command_substitution_is_not_lost(tmp_path, signal, status):
    """bash 5.2 reads a trap then as a part of it."""
    ends = f'own_folder() {{ :; }}; frame_the_log; x="$(kill -{signal} $$)$(true)"; echo too late'
    found, lines = shell(ends, RUN_DIR=str(tmp_path), JOB="7")
    assert found == status and [line.split()[3] for line in lines] == ["START", "FINISH"]


@pytest.mark.parametrize("limit, command, said", [
    (["prlimit", "--fsize=9000000"], 'trap \'rm -rf "$RAY_TMP"\' EXIT; own_folder',
     "ERROR: /tmp of .* has no room for 20 MB; remove what is yours there, or ask your site"),
    (["prlimit", "--as=9000000000"], "likely_cause; echo",
     "; a process may have 8583 MB of addresses only: ulimit -v unlimited, or ask your site"),
])  # fmt: skip
def test_a_limit_that_no_program_names_is_named(limit, command, said):
    path = f"{REPO}/.venv/bin:{os.environ['PATH']}"
    _, (line,) = shell(command, within=limit, PATH=path, NODE_ADDRESS="127.0.0.1")
    assert re.fullmatch(said, line)


def test_a_path_with_a_space_is_refused_before_anything_is_installed(tmp_path):
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b/scripts").symlink_to(REPO / "scripts")
    run = subprocess.run(["bash", tmp_path / "a b/scripts/setup_env.sh"], text=True, check=False, capture_output=True)
    assert run.returncode == 1 and re.fullmatch("ERROR: .*/a b: Ray does not start .*; rename or move .*\n", run.stderr)


def test_a_file_system_without_locks_is_no_reason_to_stop(tmp_path, demo):
    path = stand_in(tmp_path, flock='echo "flock: 9: Function not implemented" >&2; exit 69')
    prefetch = ["bash", REPO / "scripts/prefetch.sh", tmp_path / "folder"]
    environ = os.environ | {"PATH": path, "MODEL_NAME": str(demo / "model"), "SQUAD_DATA": str(demo / "squad")}
    for command in (["bash", REPO / "scripts/setup_env.sh"], prefetch):
        run = subprocess.run(command, env=environ, text=True, capture_output=True, check=False, timeout=60)
        assert run.returncode == 0 and "not implemented" not in run.stderr, run.stderr


# ---- Inside an allocation, and variables that do not arrive -------------------------------------------------
IN = {"SLURM_JOB_ID": "7"}
TWO_NODES = IN | {"SLURM_JOB_NODELIST": "n[1-2]"}


@pytest.mark.parametrize("name, variables, scontrol, status, said", [
    ("bash", IN, "exit 127", 0, "inside Slurm job 7, but not by sbatch"),  # in a container, say
    ("bash", TWO_NODES | {"SLURMD_NODENAME": "n1"}, "echo n1; echo n2", 0, "inside Slurm job 7, but not by sbatch"),
    ("bash", TWO_NODES, "echo n1; echo n2", 1, r"ERROR: SLURM_JOB_ID=7: \S+ is not a node of this job \(n1 n2\)"),
    ("bash", TWO_NODES, "echo n1; hostname -s", 0, "inside Slurm job 7, but not by sbatch"),
    ("slurm_script", IN | {"SLURM_EXPORT_ENV": "NONE"}, "", 0, "WARNING: .*, RESUME included, none came here"),
    ("slurm_script", IN | {"SLURM_EXPORT_ENV": "LR_UPPER"}, "", 0, "WARNING: .* but those of --export=LR_UPPER"),
    ("slurm_script", IN | {"SLURM_EXPORT_ENV": "ALL,A=1"}, "", 0, None),
])  # fmt: skip
def test_how_a_job_was_started(tmp_path, name, variables, scontrol, status, said):
    found, lines = shell("look_around", name, **variables | {"PATH": stand_in(tmp_path, scontrol=scontrol)})
    assert found == status and (re.search(said, lines[-1]) if said else lines == [])


# ---- Slurm's answers ---------------------------------------------------------------------------------------
TIMEOUT = 'echo "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation" >&2; exit 1'
@pytest.mark.parametrize("answer", [
    f"[[ -e $0.asked ]] || {{ touch $0.asked; {TIMEOUT}; }}; exec SUBMIT",  # busy at first
    f"[[ -e $0.asked ]] && exit 9; touch $0.asked; SUBMIT >/dev/null; {TIMEOUT}",  # submitted all the same
    'echo "Your account: physics"; echo "Balance: 1234"; SUBMIT; echo "1 job, thank you" >&2',
    'echo "Submitted batch job $(SUBMIT) on cluster nautilus"',
    'echo "$(SUBMIT);nautilus"',
], ids=["busy", "busy, but submitted", "a banner", "the long form", "a cluster's name"])  # fmt: skip
def test_one_job_is_submitted_whatever_sbatch_answers(slurm, course, tmp_path, answer):
    path = stand_in(tmp_path, sbatch=answer.replace("SUBMIT", f'{shutil.which("sbatch")} --hold "$@"'))
    run_dir = course / "runs/a run"
    run_dir.mkdir(parents=True)
    commands = f'EXERCISE={course} HEAD_DIR="{run_dir}/head-1" WORKER_NODES=1; submit_worker; '
    commands += 'echo "${WORKER_JOBS[@]}"'
    found, lines = shell(commands, **slurm | {"PATH": path})
    jobs = subprocess.check_output(["squeue", "--noheader", "--format=%i"], env=slurm, text=True).split()
    subprocess.run(["scancel", *jobs], env=slurm, check=False)
    assert found == 0 and lines[-1:] == jobs


def test_a_slurm_that_stays_silent_is_asked_again_and_a_wrong_question_is_not(tmp_path):
    first = 'touch $0.asked; echo "Unable to contact slurm controller (connect failure)" >&2; exit 1'
    path = stand_in(tmp_path, scontrol=f"[[ -e $0.asked ]] || {{ {first}; }}; echo yes")
    assert shell("ask scontrol show job 1", PATH=path) == (0, ["yes"])
    path = stand_in(tmp_path, scontrol="echo >>$0.calls; echo 'Access/permission denied' >&2; exit 1")
    assert shell("ask scontrol show job 1", PATH=path) == (1, [])
    assert (tmp_path / "bin/scontrol.calls").read_text() == "\n"


NETWORK = """ip link set lo up
for name in docker0 eth0; do
    ip link add $name type veth peer name to-$name; ip link set $name up; ip link set to-$name up
done
ip address add 172.17.0.1/16 dev docker0; ip address add $OWN dev eth0 $NODAD"""


@pytest.mark.parametrize("node_addr, own, head, address", [
    ("10.0.0.9", "10.0.0.9/24", "", "10.0.0.9"),
    ("localhost", "10.0.0.9/24", "10.0.0.1:6379", "10.0.0.9"),  # as Debian's /etc/hosts has it for its own name
    ("localhost", "10.0.0.9/24", "", "10.0.0.9"),  # on the head: that by which it reaches Slurm's other node, 10.0.0.1
    ("203.0.113.7", "10.0.0.9/24", "10.0.0.1:6379", "10.0.0.9"),  # not this node's
    ("127.0.0.1", "10.0.0.9/24", "", "127.0.0.1"),  # a Slurm of one machine
    ("localhost", "fd00::9/64", "[fd00::1]:6379", "fd00::9"),
    ("localhost", "192.168.0.9/24", "", "127.0.0.1"),  # no way to the others
])  # fmt: skip
def test_the_address_of_a_node_is_one_that_others_reach(tmp_path, node_addr, own, head, address):
    """Never that of docker0, which comes first, or its name's, which only this node reaches."""
    nodes = f"echo {node_addr}; echo 10.0.0.1"
    path = stand_in(tmp_path, scontrol=f"echo NodeName=n1 NodeAddr={node_addr} x", sinfo=nodes)
    commands = f"{NETWORK}; HEAD_ADDRESS={head}; node_address"
    node = {"PATH": path, "SLURM_JOB_ID": "7", "OWN": own, "NODAD": "nodad" if ":" in own else ""}
    assert shell(commands, "slurm_script", within=("unshare", "-rn"), **node) == (0, [address])


@pytest.mark.parametrize("squeue, job, status, said", [
    ("echo 7 RUNNING 0", "7", 1, "ERROR: RESUME=.*/runs/7: job 7 still works on this run; wait for its end"),
    ("echo 6 COMPLETED 0; echo 7 PENDING 1", "7", 1, "ERROR: .* still works"),  # 6 is another job of its array
    ("echo 'Invalid user' >&2; exit 1", "7", 1, "squeue does not say whether job 7 still works .*; try again when"),
    ("echo 7 CANCELLED 0; echo 6 RUNNING 0", "7", 0, None),
    ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", "7", 0, None),  # Slurm has forgotten it
    ("echo 8", None, 0, None),  # a run without the file that names its job
])  # fmt: skip
@pytest.mark.parametrize("given", ["runs/7", "{0}/runs/7/", "{0}/scratch/7"])
def test_a_run_is_continued_only_if_no_job_works_on_it(tmp_path, squeue, job, status, said, given):
    """Its folder keeps the name that it has here, though runs/ is a link to scratch."""
    run = tmp_path / "scratch/7"
    run.mkdir(parents=True)
    (tmp_path / "runs").symlink_to("scratch")
    for number, name in ((2, "5"), (9, "6"), (10, job)):
        (run / f"head-{number}").mkdir()
        if name:
            (run / f"head-{number}/job").write_text(name)
    which = f'EXERCISE={tmp_path}; which_run; [[ $RESUME == "{tmp_path}/runs/7" ]]'
    found, lines = shell(which, PATH=stand_in(tmp_path, squeue=squeue), RESUME=given.format(tmp_path))
    assert found == status and (re.search(said, lines[-1]) if said else lines == [])


def test_a_folder_that_is_not_of_this_exercise_is_not_continued(tmp_path):
    (tmp_path / "runs/7/tune").mkdir(parents=True)
    for folder in ("runs", "runs/7/tune", "/tmp"):
        status, (line,) = shell(f"EXERCISE={tmp_path}; which_run", RESUME=folder)
        assert status == 1 and re.match(f"ERROR: RESUME=.*: is not a folder of {tmp_path}/runs; give runs/", line)


RECORD = "echo JobState=COMPLETED StartTime=2026-11-27T10:00:00 EndTime=2026-11-27T10:01:30"


def test_what_a_worker_has_cost_is_asked_once_and_not_of_a_busy_slurm(tmp_path):
    """A record that is gone does not hide the others; a controller that does not answer is not waited for."""
    for answer, said in {"Invalid job id specified": ["6"], "Socket timed out on send/recv": []}.items():
        scontrol = f"[[ $3 == 6 ]] && {RECORD} && exit; echo '{answer}' >&2; exit 1"
        found = head(tmp_path, "WORKER_JOBS+=(6); release_workers 3", scontrol=scontrol, squeue="exit 0")
        assert found == (0, [f"worker job {job} held its node for 90 s, by Slurm's record" for job in said])
    (ended,) = events_of(tmp_path)
    assert ended | {"event": "worker_ended", "job": "6", "seconds": 90} == ended and "cause" not in ended


PENDING = "echo 5 PENDING Resources"


@pytest.mark.parametrize("state, squeue, status, said", [
    (":", PENDING, 0, [r"worker job 5 is PENDING: Resources \(what that means: TROUBLESHOOTING.md\)"]),
    ("SECONDS=12", PENDING, 0, ["waiting for the first worker to join: 10 s of 20 s", "worker job 5 is PENDING: .*"]),
    ("SECONDS=21", PENDING, 1, [r"ERROR: waited 20 s \(WORKER_DEADLINE\) for the first worker to join; giving up"]),
    (":", "exit 0", 1, ["ERROR: no worker joined and none is queued; the last one says: ERROR: no python found"]),
    ("JOINED=yes; SECONDS=21", PENDING, 3, [r"ERROR: waited 20 s \(WORKER_DEADLINE\) for another worker; giving up"]),
    ("JOINED=yes; REPLACED=0", "exit 0", 3, [
        "worker job 5 has ended before the search: ERROR: no python found", "worker job 5 held its node for 90 s, .*",
        "no worker is left: 1 in a row ended before they joined, 0 were refused; see above why"]),
    ("JOINED=yes; NEXT_LOOK=0; mind_workers", PENDING, 0, ["worker job 5 is PENDING: .*"]),  # told once
])  # fmt: skip
def test_what_a_run_says_of_its_workers(tmp_path, state, squeue, status, said):
    """The only one is in the queue or not; it has joined or not."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/ray_worker_bloom_5epochs-5.out").write_text("===\nERROR: no python found\n")
    found, lines = head(tmp_path, f"{state}; mind_workers || exit 3", squeue=squeue, scontrol=RECORD)
    assert found == status and len(lines) == len(said), lines
    assert all(map(re.fullmatch, said, lines)), lines
    if "REPLACED" in state:
        (ended,) = events_of(tmp_path)
        assert ended == ended | {"job": "5", "seconds": 90, "cause": "ERROR: no python found"}


def test_a_replacement_that_is_refused_is_tried_again_at_the_next_look(tmp_path):
    refused = '[[ -e $0.asked ]] && { echo 6; exit; }; touch $0.asked; echo "Job limit reached" >&2; exit 1'
    squeue = '[[ -e ${0%/*}/sbatch.asked ]] && echo "6 RUNNING None"; exit 0'
    look = "NEXT_LOOK=0; mind_workers || echo the end"
    status, lines = head(tmp_path, f"ANNOUNCED[5]=yes JOINED=yes; {look}; {look}", sbatch=refused, squeue=squeue)
    assert status == 0 and [line.split(":")[0] for line in lines] == [
        "worker job 5 has ended before the search", "Job limit reached",
        "sbatch refused to replace it (its message is above)", "submitted worker 2/2"]  # fmt: skip


@pytest.mark.parametrize("state, minutes, near", [("RUNNING", 1, 1), ("COMPLETING", 1, 0), ("RUNNING", 60, 0)])
def test_near_its_time_limit_a_run_says_so_and_how_to_continue(tmp_path, state, minutes, near):
    """Slurm sends TERM then, and for scancel."""
    end = (datetime.now() + timedelta(minutes=minutes)).isoformat(timespec="seconds")
    path = stand_in(tmp_path, scontrol=f"echo JobId=7 JobState={state} Reason=None EndTime={end}")
    (tmp_path / "events.jsonl").write_text('{"time": "x", "event": "settings"}\n')
    tell = f"RUN_DIR={tmp_path}; fill_tables() {{ say tables of $1; }}; say_how_it_ended 143"
    status, lines = shell(tell, "slurm_script", PATH=path, SLURM_JOB_ID="7")
    assert status == 0 and (f"the time limit of this job, {end}, has come near" in lines[0]) == near
    assert any(line.endswith("tables of 143") for line in lines) == near
    assert f"continue with: RESUME=runs/{tmp_path.name} sbatch {HEAD}" in lines[-1]


def test_a_worker_that_joins_is_announced_once_and_waited_for_at_the_end(tmp_path):
    """Also in a folder whose name is a pattern."""
    words, folder = '20 CPUs, 8 GPUs (NVIDIA "A100"), bf16', tmp_path / "[1]"
    folder.mkdir()
    leaves = "(sleep 1; rm $HEAD_DIR/joined-5) & release_workers 9; jobs -r"
    _, lines = head(folder, f"publish joined-5 <<<'n1 20 8 4 {words}'; announce_workers; announce_workers; {leaves}",
                    squeue="exit 0", scancel="", scontrol="exit 1")  # fmt: skip
    assert lines == [f"worker 1/1 joined: job 5 on n1, {words}, 4 trial(s) at once"]
    fields = {"job": "5", "node": "n1", "cpus": 20, "gpus": 8, "precision": "bf16", "slots": 4, "words": words}
    (joined,) = events_of(folder, "worker_joined")
    assert joined == joined | fields


def test_a_head_that_has_been_started_again_elsewhere_ends_itself(tmp_path):
    """It submits nothing and records nothing more. Of two starts the later one is the run's; 10 is later than 9."""
    for number in (9, 10):
        (tmp_path / f"head-{number}").mkdir()
    start = "HEAD_DIR=$RUN_DIR/head-{}; RAY=$$; record forecast text x; run_can_go_on || exit 3; echo on"
    status, (line,) = head(tmp_path, start.format(9), sbatch="echo 6", squeue="exit 0")
    assert status == 3 and line.startswith("this run has been started again elsewhere")
    assert not (tmp_path / "events.jsonl").exists()
    assert head(tmp_path, start.format(10), squeue="echo 5 RUNNING None") == (0, ["on"]) and events_of(tmp_path)


@pytest.mark.parametrize("squeue, said", [
    ("echo 7 PENDING 1", "Slurm has lost this job, and starts it again .PENDING 1.; this head ends"),
    ("echo 7 RUNNING 1", "Slurm has lost this job, and starts it again .RUNNING 1.; this head ends"),
    ("echo 6 PENDING 1; echo 7 RUNNING 0", "submitted worker 2/2: job 6, .*"),
])  # fmt: skip
def test_a_head_that_slurm_has_lost_submits_no_workers(tmp_path, squeue, said):
    """Its own have left then. Another job of its array may have other states."""
    answer = f'[[ $* == *RestartCnt* ]] || exit 0; {squeue}'
    status, lines = head(tmp_path, "JOB=7; ANNOUNCED[5]=yes JOINED=yes; mind_workers || exit 3", squeue=answer,
                         sbatch="echo 6", scontrol="exit 0")  # fmt: skip
    assert re.fullmatch(said, lines[-1]), lines
    assert status == (0 if "submitted" in said else 3)


# ---- The record --------------------------------------------------------------------------------------------
def test_the_record_holds_any_text_and_outlives_a_line_that_was_cut_off(tmp_path):
    """START and FINISH are there in the log's words, and their time in UTC, whatever the time zone of the site."""
    text = 'a "quote", a \\ and a \\n, a tab\t, a line\nbreak, \x01\x7f, é, $HOME, `ls`, %s, &'
    (tmp_path / "events.jsonl").write_text('{"time": "2026-')
    settings = "export LR_LOWER=5e-06\nexport BS_CHOICES='1 2'\nexport SEARCH_SCRIPT=/x.py"
    begin = f'frame_the_log; RUN_DIR={tmp_path} SCRIPT=/x.py LOG=/x.out; eval "$SETTINGS"; begin_record search'
    tell = 'record forecast text "$WORDS"; exit 3'
    others = {"RECORD": "/none/x", "AT": "noon", "TEE": "1"}  # variables of somebody else
    status, lines = shell(f"{begin}; {tell}", SETTINGS=settings, WORDS=text, TZ="Asia/Tokyo", **others)
    (job, start), (_, finish) = re.findall(r"===== JOB (\S+) [A-Z ]+: (.*) =====", "\n".join(lines))
    started, kept, told, finished = events_of(tmp_path)
    for event, said in ((started, start), (finished, finish)):
        moment = datetime.fromisoformat(event.pop("time")).astimezone(zoneinfo.ZoneInfo("Asia/Tokyo"))
        assert said == f"{moment:%Y-%m-%d %H:%M:%S} JST"
    fields = {"job": job, "script": "/x.py", "log": "/x.out", "start": start, "kind": "search"}
    assert started == {"event": "started"} | fields
    assert kept | {"LR_LOWER": "5e-06", "BS_CHOICES": "1 2"} == kept and "SEARCH_SCRIPT" not in kept
    assert told["text"] == text
    assert finished == {"event": "finished", "status": status, "finish": finish} and status == 3


# ---- A container as the environment ------------------------------------------------------------------------
@pytest.mark.parametrize("own", ["bash -c 'mount -t tmpfs none /tmp; exec \"$@\"' bash", "unshare --net",
                                 "unshare --pid --fork --mount-proc", "bash -c '\"$@\" </dev/null' bash"])  # fmt: skip
def test_a_container_that_lacks_what_a_run_needs_is_refused_in_one_line(tmp_path, own):
    command = f'exec unshare --mount {own} env PATH={REPO}/.venv/bin:/usr/bin:/bin "$@"'
    status, (line,) = shell("choose_python", PATH=stand_in(tmp_path, container=command), CONTAINER="container")
    said = r"ERROR: CONTAINER=container: inside are not the same /tmp, \S+, standard input, network and process ids \("
    assert status == 1 and re.match(said, line)
