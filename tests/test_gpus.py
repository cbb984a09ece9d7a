"""What a node's script makes of its GPUs. There are none here: a stand-in for PyTorch claims them."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import HEAD, REPO, load_module, quickstart

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
"""


def look(tmp_path, count, name="Tesla V100-SXM2-16GB", bf16=False, torch=TORCH, driver=True, **variables):
    """this_node.py on a node with these GPUs -> (exit status, what it found or said)."""
    (tmp_path / "torch.py").write_text(torch.format(count=count, name=name, bf16=bf16))
    tool = tmp_path / "this_node.py"
    tool.write_text(NODE.read_text().replace("/dev/nvidiactl", "/dev/null" if driver else "/dev/none"))
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path), "ON_SLURM": "yes", "SLURM_CPUS_ON_NODE": "20"}
    run = subprocess.run([sys.executable, tool], env=environ | variables, text=True, check=False, capture_output=True)
    return run.returncode, re.sub(r"^((?:\d+ ){3})[\d.]+ ", r"\1", (run.stdout + run.stderr).strip())  # less memory


H100 = {"name": "NVIDIA H100 80GB HBM3", "bf16": True}
SLICE = {"name": "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16": True, "CUDA_VISIBLE_DEVICES": "MIG-1,MIG-2,MIG-3"}


@pytest.mark.parametrize("node, found", [
    ({"count": 2}, "20 2 1 20 CPUs, 2 GPUs (Tesla V100-SXM2-16GB), fp16"),
    ({"count": 11}, "20 11 1 20 CPUs, 11 GPUs (Tesla V100-SXM2-16GB), fp16"),
    ({"count": 2} | H100, "20 2 1 20 CPUs, 2 GPUs (NVIDIA H100 80GB HBM3), bf16"),
    ({"count": 2, "PRECISION": "fp32"} | H100, "20 2 1 20 CPUs, 2 GPUs (NVIDIA H100 80GB HBM3), fp32"),
    ({"count": 1, "WORKERS_PER_TRIAL": "1"}, "20 1 1 20 CPUs, 1 GPUs (Tesla V100-SXM2-16GB), fp16"),
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


@pytest.mark.parametrize("count, node, workers", [
    (1, {}, "1"), (2, {}, "2"), (0, {}, "2"), (1, {"GPUS_PER_WORKER": "0"}, "2"), (1, {"WORKERS_PER_TRIAL": "2"}, "2"),
    (1, {"name": SLICE["name"]}, "1"), (1, {"torch": "raise OSError"}, "2"),
])  # fmt: skip
def test_the_quickstart_trains_with_one_worker_on_the_only_gpu(course, demo, tmp_path, count, node, workers):
    """The search itself is not started: in its place stands what it would be told."""
    top = course.parents[3]
    shutil.copytree(demo, top / ".demo", dirs_exist_ok=True)
    (course / HEAD).write_text("echo workers ${WORKERS_PER_TRIAL:-2}\n")
    tool = top / "scripts/job/this_node.py"
    claimed = f"os.environ['PYTHONPATH'] = '{tmp_path}'\n\nDRIVERS"
    tool.write_text(tool.read_text().replace("/dev/nvidiactl", "/dev/null").replace("\nDRIVERS", claimed))
    stub = {"torch": TORCH, "name": "NVIDIA H100", "bf16": True} | node
    (tmp_path / "torch.py").write_text(stub["torch"].format(count=count, name=stub["name"], bf16=stub["bf16"]))
    variables = {name: value for name, value in node.items() if name.isupper()}
    status, output = quickstart(course, "bash", str(top / "scripts/quickstart.sh"), **variables)
    assert status == 0 and output.splitlines()[-1] == f"workers {workers}"
