"""Site settings: one EDIT block, the same in each .slurm file, and capacity read from whatever the worker's lines ask for."""

import os
import re
import subprocess
import sys

import pytest
from conftest import EXERCISE, HEAD, REPO, load_module

WORKER = EXERCISE / "worker_node_raytune_asha_hpo.slurm"
SCRIPTS = [EXERCISE / HEAD, WORKER, REPO / "experiments/manual/bloom_hpo_manual.slurm"]
CAPACITY = REPO / "scripts/raytune_hpo/worker_capacity.py"


def block(script):
    (found,) = re.findall(r"^# ==== EDIT: .*?^# ==== end of EDIT =+\n", script.read_text(), re.MULTILINE | re.DOTALL)
    return found


def test_the_block_is_the_same_in_each_script_but_for_the_constraint_of_the_head():
    head, *others = [block(script) for script in SCRIPTS]
    assert others[0] == others[1] and head != others[0]
    assert head == others[0].replace("\n#SBATCH --constraint", "\n##SBATCH --constraint")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_sbatch_still_reads_the_lines_of_the_block(script):
    """They stand before the first command, and no command before the block could fail or be in strict mode."""
    before = script.read_text().split("# ==== end of EDIT")[0]
    assert all(line.startswith("#") or not line for line in before.splitlines())


SITES = {  # as the block names them: the edits, and what Slurm then understands of a job with GPUs
    "V100s": ({}, "v100", "gres:gpu:8"),
    "A100s or H100s, no constraint needed": ({"\n#SBATCH --constraint": "\n##SBATCH --constraint"}, "(null)", "gres:gpu:8"),
    "CPUs only": ({"\n#SBATCH --constraint": "\n##SBATCH --constraint", "\n#SBATCH --gpus-per-node": "\n##SBATCH --gpus-per-node"}, "(null)", None),
}


def test_the_block_names_these_sites():
    named = re.findall(r"^#   (\S.*?)  +\S", block(WORKER), re.MULTILINE)
    assert named == [*SITES]


@pytest.mark.parametrize("site", SITES)
def test_slurm_understands_the_edited_lines_of_each_site(site, cluster):
    """Each script is submitted, held, with account and partition of the site; then Slurm says what it will ask for."""
    edits, constraint, gpus = SITES[site]
    edits = edits | {"##SBATCH --account=myproject ": "#SBATCH --account=physics ", "##SBATCH --partition=batch ": "#SBATCH --partition=PARTITION "}
    partition = cluster("sinfo", "--noheader", "--format=%R").split()[0]
    for script in SCRIPTS:
        path = cluster.folder.parents[3] / script.relative_to(REPO)
        text = path.read_text()
        for old, new in edits.items():
            assert old in text or script.name == HEAD, old
            text = text.replace(old, new.replace("PARTITION", partition))
        path.write_text(text)
        job = cluster("sbatch", "--parsable", "--hold", str(path), "run folder", "head job").strip()
        asked = cluster.job(job)
        cluster("scancel", job)
        trains = script.name != HEAD
        assert (asked["Account"], asked["Partition"]) == ("physics", partition)
        assert asked["Features"] == (constraint if trains else "(null)"), script.name
        assert asked.get("TresPerNode") == ((gpus if "manual" not in script.name else gpus and "gres:gpu:2") if trains else None), script.name


@pytest.mark.parametrize("lines, expected", [
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
])  # fmt: skip
def test_capacity_is_read_as_sbatch_reads_it(lines, expected):
    assert load_module(CAPACITY).asked_for(f"#!/bin/bash\n{lines}\ntrue\n") == expected


@pytest.mark.parametrize("edits, variables, told, status", [
    ({}, {}, "capacity: 4 trial(s)", 0),
    ({"--gpus-per-node=8": "--gpus-per-node=v100:4"}, {}, "capacity: 2 trial(s)", 0),
    ({"#SBATCH --gpus-per-node=8": "##SBATCH --gpus-per-node=8"}, {}, "capacity: 4 trial(s)", 0),
    ({"#SBATCH --gpus-per-node=8": "##SBATCH --gpus-per-node=8"}, {"GPUS_PER_WORKER": "1"}, "does not fit on a node with 20 CPUs and 0 GPUs", 1),
    ({"--cpus-per-task=20": "--exclusive"}, {}, "it counts CPUs and GPUs when it starts", 0),
])  # fmt: skip
def test_no_other_edit_is_needed_for_other_nodes(edits, variables, told, status, tmp_path):
    text = WORKER.read_text()
    for old, new in edits.items():
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "worker.slurm").write_text(text)
    environ = {name: value for name, value in os.environ.items() if name != "GPUS_PER_WORKER"} | variables
    run = subprocess.run([sys.executable, CAPACITY, "--job", tmp_path / "worker.slurm"], env=environ, text=True, capture_output=True, check=False)
    assert told in run.stdout and run.returncode == status, run.stdout + run.stderr
