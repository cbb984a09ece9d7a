"""Site settings: what Slurm understands of the .slurm files as edited for a site, and their capacity."""

import os
import subprocess
import sys

import pytest
from conftest import HEAD, REPO, load_module

WORKER = "worker_node_raytune_asha_hpo.slurm"
GRID = "bloom_hpo_manual.slurm"
CAPACITY = load_module(REPO / "scripts/job/worker_capacity.py")

ACCOUNT = {
    "##SBATCH --account=myproject ": "#SBATCH --account=physics ",
    "##SBATCH --partition=batch ": "#SBATCH --partition=batch ",
}
CONSTRAINT = {"\n#SBATCH --constraint": "\n##SBATCH --constraint"}
GPUS = {"\n#SBATCH --gpus-per-node": "\n##SBATCH --gpus-per-node"}
SITES = {  # the edits; what Slurm then understands of jobs that train: feature, GPUs of worker and grid
    "V100s": ({}, "v100", "gres:gpu:8", "gres:gpu:2"),
    "A100s or H100s, no constraint needed": (ACCOUNT | CONSTRAINT, "(null)", "gres:gpu:8", "gres:gpu:2"),
    "CPUs only": (ACCOUNT | CONSTRAINT | GPUS, "(null)", None, None),
}


@pytest.mark.parametrize("site", SITES)
def test_slurm_understands_the_lines_of_each_site(site, cluster):
    """Each script is submitted, held; Slurm, which ignores misspelt lines, says what it understood."""
    edits, feature, *gpus = SITES[site]
    scripts = {
        HEAD: (cluster.folder, "ray_head_bloom_5epochs", "(null)", None),
        WORKER: (cluster.folder, "ray_worker_bloom_5epochs", feature, gpus[0]),
        GRID: (cluster.folder.parents[2] / "manual", "bloom_hpo_manual", feature, gpus[1]),
    }
    for name, (folder, job_name, features, gres) in scripts.items():
        path = folder / name
        text = path.read_text()
        for old, new in edits.items():
            assert old in text or name == HEAD, old
            text = text.replace(old, new)
        path.write_text(text)
        options = ("--parsable", "--hold", f"--chdir={folder}")
        job = cluster("sbatch", *options, path, "run folder", "head job").strip()
        asked = cluster.job(job)
        cluster("scancel", job)
        assert (asked["JobName"], asked["Features"], asked.get("TresPerNode")) == (job_name, features, gres)
        assert asked["Account"] == ("physics" if edits else "(null)") and asked["Partition"] == "batch"
        assert asked["StdOut"] == f"{folder}/logs/{job_name}-{job}.out" and (folder / "logs").is_dir()
        assert asked["NumNodes"] in ("1", "1-1") and asked["TimeLimit"] != "UNLIMITED"
        assert name != WORKER or asked["CPUs/Task"] == "20"


def test_capacity_is_what_slurm_understood(cluster):
    """There are many ways to ask for a node; each job is submitted, held."""
    for lines, expected in (
        ("--cpus-per-task=20\n#SBATCH --gpus-per-node=8", (20, 8, 1, False)),
        ("--cpus-per-task=16 # x\n#SBATCH --gpus-per-node=v100:4 # x", (16, 4, 1, False)),
        ("-N 1 -c 20 -G 4", (20, 4, 1, False)),
        ("--nodes=1\n#SBATCH --gpus-per-node=4\n#SBATCH --cpus-per-gpu=5", (20, 4, 1, False)),
        ("--nodes=1\n#SBATCH --ntasks-per-node=8", (8, 0, 1, False)),
        ('--nodes=1 --cpus-per-task="20"', (20, 0, 1, False)),
        ("--nodes=1\n#SBATCH --mincpus=16 --gpus=3", (16, 3, 1, False)),
        ("--nodes=1 -n 2 -c 4\n#SBATCH --gpus-per-task=2", (8, 4, 1, False)),
        ("-c8\n#SBATCH --gres=gpu:v100:2", (8, 2, 1, False)),
        ("--cpus-per-task 12\n#SBATCH --gres=gpu", (12, 1, 1, False)),
        ("--nodes=1 --cpus-per-task=12\n#SBATCH --gpus=v100:1", (12, 1, 1, False)),
        ("--cpus-per-task=4\n##SBATCH --gpus-per-node=8\n#SBATCH --cpus-per-task=6", (6, 0, 1, False)),
        ("--cpus-per-task=4\nset -eu\n#SBATCH --cpus-per-task=6", (4, 0, 1, False)),
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


RECORD = "NumNodes=1 NumCPUs={} NumTasks=1 OverSubscribe={} {}"


@pytest.mark.parametrize("record, variables, told, status", [
    (RECORD.format(20, "OK", "TresPerNode=gres:gpu:8"), {}, "capacity: 4 trial(s)", 0),
    (RECORD.format(20, "OK", "TresPerNode=gres:gpu:v100:4"), {}, "capacity: 2 trial(s)", 0),
    (RECORD.format(20, "OK", ""), {}, "capacity: 4 trial(s)", 0),
    (RECORD.format(20, "OK", ""), {"GPUS_PER_WORKER": "1"}, "does not fit on a node with 20 CPUs and 0 GPUs", 1),
    (RECORD.format(1, "NO", ""), {}, "it counts them when it starts", 0),
])  # fmt: skip
def test_no_other_edit_is_needed_for_other_nodes(record, variables, told, status):
    tool = [sys.executable, REPO / "scripts/job/worker_capacity.py", "--record"]
    environ = {name: text for name, text in os.environ.items() if name != "GPUS_PER_WORKER"} | variables
    run = subprocess.run(tool, input=record, env=environ, text=True, capture_output=True, check=False)
    assert told in run.stdout and run.returncode == status, run.stdout + run.stderr
