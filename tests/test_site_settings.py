"""Site settings: what Slurm understands of the .slurm files as edited for a site, and their capacity."""

import pytest
from conftest import EXERCISE, HEAD, REPO, call, load_module

WORKER = "worker_node_raytune_asha_hpo.slurm"
GRID = "bloom_hpo_manual.slurm"
CAPACITY = load_module(REPO / "scripts/raytune_hpo/worker_capacity.py")

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


def test_capacity_is_read_as_sbatch_reads_it():
    for lines, expected in (
        ("#SBATCH --cpus-per-task=20\n#SBATCH --gpus-per-node=8", (20, 8, False)),
        ("#SBATCH --cpus-per-task=16 # x\n#SBATCH --gpus-per-node=a100:4 # x", (16, 4, False)),
        ("#SBATCH -c 32\n#SBATCH --gres=gpu:4", (32, 4, False)),
        ("#SBATCH -c8\n#SBATCH --gres=nvme:1,gpu:h100:2", (8, 2, False)),
        ("#SBATCH --cpus-per-task 12\n#SBATCH --gres=gpu", (12, 1, False)),
        ("#SBATCH --cpus-per-task=12\n#SBATCH -G 3", (12, 3, False)),
        ("#SBATCH --cpus-per-task=12\n#SBATCH --gpus=v100", (12, 1, False)),
        ("#SBATCH --cpus-per-task=12\n##SBATCH --gpus-per-node=8", (12, 0, False)),
        ("#SBATCH --cpus-per-task=4\n#SBATCH --cpus-per-task=6", (6, 0, False)),
        ("#SBATCH --cpus-per-task=4\nset -eu\n#SBATCH --cpus-per-task=6", (4, 0, False)),
        ("#SBATCH --exclusive\n#SBATCH --gpus-per-node=4", (1, 4, True)),
        ("#SBATCH --exclusive # x\n#SBATCH --cpus-per-task=4", (4, 0, True)),
    ):
        assert CAPACITY.asked_for(f"#!/bin/bash\n{lines}\ntrue\n") == expected, lines


NO_GPUS = {"#SBATCH --gpus-per-node=8": "##SBATCH --gpus-per-node=8"}


@pytest.mark.parametrize("edits, gpus, told, status", [
    ({}, None, "capacity: 4 trial(s)", 0),
    ({"--gpus-per-node=8": "--gpus-per-node=v100:4"}, None, "capacity: 2 trial(s)", 0),
    (NO_GPUS, None, "capacity: 4 trial(s)", 0),
    (NO_GPUS, "1", "does not fit on a node with 20 CPUs and 0 GPUs", 1),
    ({"--cpus-per-task=20": "--exclusive"}, None, "it counts CPUs and GPUs when it starts", 0),
])  # fmt: skip
def test_no_other_edit_is_needed_for_other_nodes(edits, gpus, told, status, tmp_path, monkeypatch):
    text = (EXERCISE / WORKER).read_text()
    for old, new in edits.items():
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "worker.slurm").write_text(text)
    monkeypatch.delenv("GPUS_PER_WORKER", raising=False)
    if gpus:
        monkeypatch.setenv("GPUS_PER_WORKER", gpus)
    run = call(CAPACITY, "--job", tmp_path / "worker.slurm")
    assert told in run.stdout and run.returncode == status, run.stdout + run.stderr
