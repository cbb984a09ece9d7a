"""What a node's script makes of its GPUs. There are none here: a stand-in for PyTorch claims them."""

import json
import os
import re
import subprocess
import sys
from collections import Counter

import compare_runs
import pytest
from conftest import (
    REPO,
    SCRIPT,
    at_once,
    call,
    check_log,
    check_results,
    load_module,
    nothing_is_left,
    replace,
)
from read_run import as_run, events_of

NODE = REPO / "scripts/job/this_node.py"
TORCH = """
class One:
    def __init__(self, n, device): pass
    def sum(self): return self
    def item(self): return 1.0
ones = One
class cuda:
    device_count = lambda: {count}
    is_bf16_supported = lambda including_emulation: {bf16}
    get_device_name = lambda: "{name}"
    class get_device_properties:
        def __init__(self, i): self.total_memory = 15.8 * 2**30
"""


def look(tmp_path, count, name="Tesla V100-SXM2-16GB", bf16=False, torch=TORCH, driver=True, **variables):
    """this_node.py on a node with these GPUs -> (exit status, what it found or said)."""
    (tmp_path / "torch.py").write_text(torch.format(count=count, name=name, bf16=bf16))
    tool = tmp_path / "this_node.py"
    tool.write_text(NODE.read_text().replace("/dev/nvidiactl", "/dev/null" if driver else "/dev/none"))
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path), "ON_SLURM": "yes", "SLURM_CPUS_ON_NODE": "20"}
    run = subprocess.run([sys.executable, tool], env=environ | variables, text=True, check=False, capture_output=True)
    return run.returncode, re.sub(r"^(\d+ \d+ [\d.]+) [\d.]+ [\d.]+ ", r"\1 ", (run.stdout + run.stderr).strip())


H100 = {"name": "NVIDIA H100 80GB HBM3", "bf16": True}
SLICE = {"name": "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16": True, "CUDA_VISIBLE_DEVICES": "MIG-1,MIG-2,MIG-3"}


@pytest.mark.parametrize("node, found", [
    ({"count": 2}, "20 2 1 20 CPUs, 2 GPUs (Tesla V100-SXM2-16GB), fp16"),
    ({"count": 11}, "20 11 1 20 CPUs, 11 GPUs (Tesla V100-SXM2-16GB), fp16"),
    ({"count": 2} | H100, "20 2 1 20 CPUs, 2 GPUs (NVIDIA H100 80GB HBM3), bf16"),
    ({"count": 2, "PRECISION": "fp32"} | H100, "20 2 1 20 CPUs, 2 GPUs (NVIDIA H100 80GB HBM3), fp32"),
    ({"count": 1, "WORKERS_PER_TRIAL": "1"}, "20 1 1 20 CPUs, 1 GPUs (Tesla V100-SXM2-16GB), fp16"),
    ({"count": 2, "WORKERS_PER_TRIAL": "1", "GPUS_PER_WORKER": "0.25"},
     "20 2 0.25 20 CPUs, 2 GPUs (Tesla V100-SXM2-16GB), fp16"),
    ({"count": 1, "WORKERS_PER_TRIAL": "1"} | SLICE, f"20 3 1 20 CPUs, 3 GPUs ({SLICE['name']}), bf16"),
    ({"count": 0, "driver": False}, "20 0 0 20 CPUs, 0 GPUs, fp32"),
    ({"count": 0, "SLURM_JOB_ID": "7"}, "20 0 0 20 CPUs, 0 GPUs, fp32"),  # the node has GPUs, the job has none
    ({"count": 1, "GPUS_PER_WORKER": "0"}, "20 0 0 20 CPUs, 0 GPUs, fp32"),
    ({"count": 0, "torch": "raise OSError", "GPUS_PER_WORKER": "0"}, "20 0 0 20 CPUs, 0 GPUs, fp32"),
])  # fmt: skip
def test_the_gpus_of_a_node(tmp_path, node, found):
    assert look(tmp_path, **node) == (0, found)


CPUS = "GPUS_PER_WORKER=0 to train on CPUs"


@pytest.mark.parametrize("node, said", [
    ({"count": 1}, f"a trial asks for 2 GPU(s) and this node has 1; set WORKERS_PER_TRIAL=1, or {CPUS}"),
    ({"count": 0, "driver": False, "GPUS_PER_WORKER": "1"}, f"this node has 0; set {CPUS}"),
    ({"count": 0}, "an NVIDIA driver but PyTorch sees no GPU"),
    ({"count": 0, "SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "2"}, "an NVIDIA driver but PyTorch sees no GPU"),
    ({"count": 2, "torch": "raise RuntimeError('no kernel image')"}, "PyTorch does not run on this node: RuntimeError"),
    ({"count": 1} | SLICE, "slices of a GPU (MIG) cannot train one trial together; set WORKERS_PER_TRIAL=1"),
    ({"count": 0, "driver": False, "PRECISION": "fp16"}, "PRECISION=fp16: CPUs do not train in it"),
])  # fmt: skip
def test_a_node_that_cannot_train_says_why_in_one_line(tmp_path, node, said):
    status, text = look(tmp_path, **node)
    assert status == 1 and said in text and text.startswith("ERROR: ") and len(text.splitlines()) == 1


def test_a_gpu_that_hangs_is_not_waited_for_without_end(tmp_path, monkeypatch):
    node = load_module(NODE)
    (tmp_path / "torch.py").write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("GPUS_PER_WORKER", raising=False)
    monkeypatch.setattr(node, "DRIVERS", ("/dev/null",))
    monkeypatch.setattr(node, "TORCH_SECONDS", 1)
    with pytest.raises(SystemExit, match="ERROR: PyTorch gives no answer on this node within 1 s"):
        node.find_gpus()


# ---- Trials that share a GPU -------------------------------------------------------------------------------------
CAPACITY = load_module(REPO / "scripts/job/worker_capacity.py")
STAND_IN = """
import json, os
from pathlib import Path
import torch
def told(share):
    gpu, mps = map(os.environ.get, ("CUDA_VISIBLE_DEVICES", "CUDA_MPS_PIPE_DIRECTORY"))
    with Path(__file__).with_name("limits").open("a") as file:
        print(json.dumps({"gpu": gpu, "mps": mps, "share": share}), file=file)
torch.cuda.mem_get_info = lambda: (0, 32 * 10**9)
torch.cuda.set_per_process_memory_fraction = told
"""
DAEMON = """#!/bin/bash
[[ $1 == -d && -d $CUDA_MPS_PIPE_DIRECTORY ]] || { echo no; exit 1; }
sleep 600 </dev/null >/dev/null 2>&1 &
"""


@pytest.mark.parametrize("options, T, says", [
    ("--Cw=1 --Gw=0.25", 18, "on 5 of 8 GPUs, since Ray fills one after the other; a larger share spreads them: GPUS_"),
    ("--Cw=1 --Gw=0.1 --Cnode=100", 80, "bound by GPUs: one more trial needs 1 more GPUs a node"),  # 10 * 0.1 is 1
    ("--Cw=2 --Gw=0.4 --Gnode=2", 4, "T*W*Gw = 4*1*0.4 = 1.6 <= Gnode = 2: holds"),
    ("--Cw=1 --Gw=0.5 --Gnode=2 --Mcard=31.7", 4, "bound by GPUs"),
    ("--Gw=0.5 --Mcard=15.8", 0, "takes about 12.1 GiB of a GPU, and its share of 15.8 GiB is 7.9; set 1 (or"),
    ("--Gw=0.1 --Mcard=79.1", 0, "its share of 79.1 GiB is 7.9; set 0.16 (or"),
])  # fmt: skip
def test_capacity_of_shared_gpus_is_exact_and_counts_their_memory(monkeypatch, options, T, says):
    monkeypatch.setenv("MODEL_PARAMETERS", "559214592")  # BLOOM-560M's
    told = call(CAPACITY, "--W=1", *options.split())
    assert says in told.stdout and told.returncode == (T == 0)
    assert call(CAPACITY, "--slots", "--W=1", *options.split()).stdout.split()[0] == str(T)


def test_eight_trials_share_two_gpus(cluster, demo):
    """Of the sandbox's eight GPUs, none of which exists, two are claimed; the trainings run on CPUs."""
    scripts, tools = cluster.folder.parents[3] / "scripts", cluster.folder.parents[3] / "tools"
    claim = 'COUNT = """\nprint("2 fp16 31.7 Tesla V100-SXM2-32GB")\nraise SystemExit\n'
    replace(scripts / "job/this_node.py", ('COUNT = """\n', claim), ("/dev/nvidiactl", "/dev/null"))
    asha = scripts / SCRIPT.parent.relative_to(REPO / "scripts")
    (asha / "driver_stand_in.py").write_text(STAND_IN)
    replace(asha / "fast_trials.py", ("        gc.freeze()\n", "        import driver_stand_in\n        gc.freeze()\n"))
    tools.mkdir()
    for name, text in (("nvidia-cuda-mps-control", DAEMON), ("nvidia-smi", "#!/bin/bash\necho Exclusive_Process\n")):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    variables = {"MODEL_NAME": f"{demo}/model", "SQUAD_DATA": f"{demo}/squad", "NUM_SAMPLES": "8", "NUM_EPOCHS": "1",
                 "TRAIN_SAMPLES": "400", "EVAL_SAMPLES": "8", "PRECISION": "fp32"}  # fmt: skip
    variables |= {"WORKERS_PER_TRIAL": "1", "CPUS_PER_WORKER": "1", "GPUS_PER_WORKER": "0.25", "MEMORY_PER_WORKER": "1"}
    job = cluster.submit(PATH=f"{tools}:{cluster.environ['PATH']}", **variables)
    end, log = cluster.wait_for_end(job, 900), cluster.log(job)
    assert end["JobState"] == "COMPLETED", log
    check_log(log, job)
    run_dir = cluster.folder / "runs" / job
    check_results(log, run_dir, trials=8, epochs=1)
    assert at_once(log) == 8
    (worker,) = cluster.workers(job)
    assert "2 GPUs (Tesla V100-SXM2-32GB), fp32, 8 trial(s) at once" in cluster.log(worker, "worker")
    assert "trials that share a GPU compute at the same time (MPS)" in cluster.log(worker, "worker")
    limits = [json.loads(line) for line in (asha / "limits").read_text().splitlines()]
    assert Counter(each["gpu"] for each in limits) == {"0": 4, "1": 4}
    assert {round(each["share"] * 32, 3) for each in limits} == {32 * 0.25 - 0.6}  # GB; the rest is CUDA's
    assert all(each["mps"].startswith(f"/tmp/ray_{worker}.") for each in limits)
    run = as_run(run_dir, events_of(run_dir))
    cost, spans = compare_runs.totals(run), [end - start for trial in run.trials.values() for start, end in trial.spans]
    assert (cost["unit"], cost["units"]) == ("GPU", 2) and cost["busy_min"] == pytest.approx(sum(spans) * 0.25 / 60)
    assert 0 < cost["busy_min"] < cost["allocated_min"]
    nothing_is_left(cluster, job)


@pytest.mark.parametrize("mode, node, daemon, status, says", [
    ("Exclusive_Process", "V100", "exit 1", 1, "ERROR: GPUS_PER_WORKER=0.5: the GPUs of this node are in exclusive"),
    ("Exclusive_Process", "A100 MIG 1g", DAEMON, 1, "for one process each, and these are slices of a GPU"),
    ("Default", "V100", "echo may not; exit 1", 0, "take turns: MPS does not run here: may not"),
    ("Default", "V100", "", 0, "take turns: no nvidia-cuda-mps-control here"),
])  # fmt: skip
def test_without_mps_trials_take_turns_unless_a_gpu_is_for_one_process(tmp_path, mode, node, daemon, status, says):
    for name, text in (("nvidia-cuda-mps-control", daemon), ("nvidia-smi", f"#!/bin/bash\necho {mode}\n")):
        if text:
            (tmp_path / name).write_text(text if text.startswith("#!") else f"#!/bin/bash\n{text}\n")
            (tmp_path / name).chmod(0o755)
    script = f"REPO={REPO} ROLE=worker; source $REPO/scripts/job/ray_job.sh; RAY_TMP={tmp_path} RUN_DIR={tmp_path}"
    script += f"; Gw=0.5 GPUS=2 CPUS=20 NODE='{node}'; share_gpus; echo \"GPUs ${{CUDA_VISIBLE_DEVICES-as they were}}\""
    environ = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    run = subprocess.run(["bash", "-c", script], env=environ, text=True, check=False, capture_output=True)
    assert run.returncode == status and says in run.stdout + run.stderr
    assert status or "GPUs as they were" in run.stdout
