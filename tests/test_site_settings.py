"""Site settings: what Slurm understands of the .slurm files as site.sh has written them, and their capacity."""

import os
import re
import subprocess
import sys

import pytest
from conftest import HEAD, REPO, load_module

WORKER = "worker_node_raytune_asha_hpo.slurm"
CAPACITY = load_module(REPO / "scripts/job/worker_capacity.py")

SITES = {  # what is edited in site.sh; what Slurm then understands of jobs that train: account, feature
    "V100s": ({}, "(null)", "v100"),
    "A100s or H100s, no constraint needed": ({"ACCOUNT": "physics", "PARTITION": "batch", "CONSTRAINT": ""}, "physics",
                                             "(null)"),
    "two types of GPU": ({"CONSTRAINT": "v100&v100"}, "(null)", "v100&v100"),
}  # fmt: skip


def run_site(file, *option):
    run = subprocess.run(["bash", file, *option], cwd="/", text=True, capture_output=True, check=False)
    assert run.stderr == ""
    return run.returncode, run.stdout


@pytest.mark.parametrize("site", SITES)
def test_slurm_understands_the_lines_of_each_site(site, cluster):
    """Each script is submitted, held; Slurm, which ignores misspelt lines, says what it understood."""
    edits, account, feature = SITES[site]
    experiments = cluster.folder.parents[2]
    scripts = {
        cluster.folder / HEAD: ("ray_head_bloom_5epochs", "(null)", None),
        cluster.folder / WORKER: ("ray_worker_bloom_5epochs", feature, "gres:gpu:8"),
        experiments / "manual/bloom_hpo_manual.slurm": ("bloom_hpo_manual", feature, "gres:gpu:2"),
        experiments / "manual/save_best.slurm": ("save_best", feature, "gres:gpu:2"),
    }
    file = experiments / "site.sh"
    for name, value in edits.items():
        file.write_text(re.sub(rf'^SITE_{name}="\w*"', f'SITE_{name}="{value}"', file.read_text(), flags=re.MULTILINE))
    status, told = run_site(file, "--check")
    assert status == bool(edits) and told.count(".slurm") == (3 + ("ACCOUNT" in edits) if edits else 0)
    assert run_site(file)[0] == 0
    assert run_site(file, "--check") == run_site(file) == (0, "")  # once is enough

    for path, (job_name, features, gres) in scripts.items():
        job = cluster("sbatch", "--parsable", "--hold", f"--chdir={path.parent}", path, "run folder", "head").strip()
        asked = cluster.job(job)
        cluster("scancel", job)
        assert (asked["JobName"], asked["Features"], asked.get("TresPerNode")) == (job_name, features, gres)
        assert asked["Account"] == account and asked["Partition"] == "batch"
        assert asked["StdOut"] == f"{path.parent}/logs/{job_name}-{job}.out" and (path.parent / "logs").is_dir()
        assert asked["NumNodes"] in ("1", "1-1") and asked["TimeLimit"] != "UNLIMITED"
        assert path.name != WORKER or asked["CPUs/Task"] == "20"


def test_site_sh_is_sourced_from_anywhere_and_sets_what_was_edited(tmp_path):
    """Also with lines that `set -euo pipefail` would not bear."""
    text = (REPO / "experiments/site.sh").read_text()
    edited = text.replace("# ---- end of EDIT", "false; : $UNSET\nNODE_ADDRESS=10.1.2.3\n# ---- end of EDIT")
    (tmp_path / "site.sh").write_text(edited)
    run = f'cd /; source {tmp_path}/site.sh; echo "$? $NODE_ADDRESS"'
    assert subprocess.check_output(["bash", "-c", run], text=True) == "0 10.1.2.3\n"


def test_capacity_is_what_slurm_understood(cluster):
    """There are many ways to ask for a node; each job is submitted, held."""
    for lines, expected in (
        ("--cpus-per-task=20\n#SBATCH --gpus-per-node=8", (20, 8, 1, False)),
        ("--cpus-per-task=16 # x\n#SBATCH --gpus-per-node=v100:4 # x", (16, 4, 1, False)),
        ("-N 1 -c 20 -G 4", (20, 4, 1, False)),
        ("--nodes=1\n#SBATCH --gpus-per-node=4\n#SBATCH --cpus-per-gpu=5", (20, 4, 1, False)),
        ("--nodes=1\n#SBATCH --ntasks-per-node=8", (8, 0, 1, False)),
        ("--nodes=1\n#SBATCH --mincpus=16 --gpus=3", (16, 3, 1, False)),
        ("--nodes=1 -n 2 -c 4\n#SBATCH --gpus-per-task=2", (8, 4, 1, False)),
        ("-c8\n#SBATCH --gres=gpu:v100:2", (8, 2, 1, False)),
        ("--cpus-per-task=4\n##SBATCH --gpus-per-node=8\n#SBATCH --cpus-per-task=6", (6, 0, 1, False)),
        ("--exclusive\n#SBATCH --gpus-per-node=4", (1, 4, 1, True)),
        ("--sockets-per-node=2 --gpus-per-socket=1 --cpus-per-task=8", (8, 0, 1, True)),
        ("--nodes=2 --cpus-per-task=20", (40, 0, 2, False)),
    ):
        (cluster.folder / "job.slurm").write_text(f"#!/bin/bash\n#SBATCH {lines}\ntrue\n")
        job = cluster("sbatch", "--parsable", "--hold", "job.slurm").strip()
        record = cluster("scontrol", "show", "job", job)
        cluster("scancel", job)
        assert CAPACITY.asked_for(record) == expected, lines
    # as Slurm 23 and newer write it
    newer = "NumNodes=1-1 NumCPUs=4 NumTasks=1 MinCPUsNode=4 OverSubscribe=OK TresPerNode=gres/gpu:h100:2,gres/nvme:1"
    assert CAPACITY.asked_for(newer) == (4, 2, 1, False)


EIGHT = "TresPerNode=gres:gpu:8"
RECORD = "NumNodes=1 NumCPUs={} NumTasks=1 OverSubscribe={} {}"


@pytest.mark.parametrize("record, variables, told, status", [
    (RECORD.format(20, "OK", EIGHT), {}, "capacity: 4 trial(s)", 0),
    (RECORD.format(20, "OK", "TresPerNode=gres:gpu:v100:4"), {}, "capacity: 2 trial(s)", 0),
    (RECORD.format(20, "OK", ""), {}, "T*W*Gw = 4*2*0 = 0 <= Gnode = 0: holds", 0),  # the head reads Gw there
    (RECORD.format(20, "OK", ""), {"GPUS_PER_WORKER": "1"}, "does not fit on a node with 20 CPUs and 0 GPUs", 1),
    (RECORD.format(20, "OK", f"{EIGHT} TRES=cpu=20,mem=40G"), {"MEMORY_PER_WORKER": "6"}, "capacity: 3 trial(s)", 0),
    (RECORD.format(20, "OK", f"{EIGHT} ReqTRES=mem=4000M"), {"MODEL_PARAMETERS": "559214592"},
     "MEMORY_PER_WORKER=5.1) does not fit on a node with 20 CPUs, 3.91 GiB and 8 GPUs", 1),
    (RECORD.format(1, "NO", ""), {}, "it counts them when it starts", 0),
])  # fmt: skip
def test_no_other_edit_is_needed_for_other_nodes(record, variables, told, status):
    tool = [sys.executable, REPO / "scripts/job/worker_capacity.py", "--record"]
    environ = {name: text for name, text in os.environ.items() if name != "GPUS_PER_WORKER"} | variables
    run = subprocess.run(tool, input=record, env=environ, text=True, capture_output=True, check=False)
    assert told in run.stdout and run.returncode == status, run.stdout + run.stderr
