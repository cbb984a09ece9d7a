#!/usr/bin/env python3
"""What this node offers to trials, as far as this process may use it. The .slurm scripts ask it.

    python this_node.py                # CPUs, GPUs, GPUs of each worker of a trial, GiB of memory, of a GPU's; in words
    python this_node.py --processes    # processes and threads that may still be started; inf without a limit
    python this_node.py --address HOST...   # the address at which other nodes reach this one
    python this_node.py --why ADDRESS  # of a Ray that has ended: the cause, if it is this node; else nothing

The words say what the node has and in which precision it trains: "20 CPUs, 8 GPUs (Tesla V100), fp16". If its GPUs
are unusable: one line "ERROR: ..." and exit status 1.
"""

import contextlib
import importlib.util
import ipaddress
import math
import os
import re
import resource
import socket
import subprocess
import sys
from pathlib import Path

DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # NVIDIA's, AMD's, Windows' under WSL
TORCH_SECONDS = 300  # for PyTorch to be imported from a busy file system, and to compute once

# Counting is not enough: a build of PyTorch without kernels for this GPU sees it, and fails at the first computation.
# Of several MIG slices a process sees one.
COUNT = """
import os, torch
seen = sum(int(torch.ones(1, device=f"cuda:{i}").sum().item()) for i in range(torch.cuda.device_count()))
slices = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.startswith("MIG-")]
half = "bf16" if seen and torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
least = min((torch.cuda.get_device_properties(i).total_memory for i in range(seen)), default=0) / 2**30
print(max(seen, len(slices)), half, f"{least:.1f}", torch.cuda.get_device_name()) if seen else print("0 fp32 0 ")"""

BUILD = """
from torch import cuda, version
on = "%s sm_%d%d" % (cuda.get_device_name(), *cuda.get_device_capability())
print("torch", version.__version__, "for", *cuda.get_arch_list() or ["CPUs alone"], "on", on)"""


def look():
    """(CPUs, GPUs, those of a worker, GiB, a GPU's, words) of a run's node. SystemExit if a trial finds too few."""
    W, precision = setting("WORKERS_PER_TRIAL", 2, 1), os.environ.get("PRECISION") or "auto"
    gpus, half, card, name = find_gpus()
    Gw = gpus_of_worker(gpus)
    if W * Gw > gpus:
        fewer = f"WORKERS_PER_TRIAL={gpus}, or " if gpus else ""
        fail(f"GPUS_PER_WORKER={Gw:g} WORKERS_PER_TRIAL={W}: a trial asks for {W * Gw:g} GPU(s) and this node has "
             f"{gpus}; set {fewer}GPUS_PER_WORKER=0 to train on CPUs")
    if "MIG" in name and W * Gw > 1:
        fail(f"WORKERS_PER_TRIAL={W}: slices of a GPU (MIG) cannot train one trial together; set WORKERS_PER_TRIAL=1")
    if precision == "fp16" and not Gw:
        fail("PRECISION=fp16: CPUs do not train in it; set auto, bf16 or fp32")
    if precision == "auto":  # as the search decides it
        precision = half if Gw else "fp32"
    cpus, memory = usable_cpus(), f"{usable_memory():.1f}"
    return cpus, gpus, f"{Gw:g}", memory, card, f"{cpus} CPUs, {gpus} GPUs{f' ({name})' if name else ''}, {precision}"


def find_gpus():
    """(number, best precision, GiB of each, name) of the GPUs that PyTorch can use, not those that Slurm promises."""
    env = os.environ
    if not importlib.util.find_spec("torch"):
        fail(f"{sys.executable} has no PyTorch; activate the course's environment in experiments/site.sh")
    # Importing PyTorch takes seconds, so only where a driver is, or what may break it.
    driver = any(map(os.path.exists, DRIVERS))
    if env.get("GPUS_PER_WORKER") == "0" or not driver:
        if env.get("LD_LIBRARY_PATH"):
            ask_torch("import torch")
        return 0, "fp32", 0, ""
    number, half, card, name = ask_torch(COUNT).split(" ", 3)
    # A job that asked Slurm for no GPU may use none, even on a node that has some.
    if number == "0" and Path(DRIVERS[0]).exists() and ("SLURM_JOB_ID" not in env or env.get("SLURM_GPUS_ON_NODE")):
        fail("this node has an NVIDIA driver but PyTorch sees no GPU; check with: "
             "python -c 'import torch; torch.zeros(1).cuda()', or set GPUS_PER_WORKER=0 to train on CPUs")
    return int(number), half, card, name


def ask_torch(code):
    """The last line that the code prints, in a process of its own: a broken library can kill it."""
    run = run_python(code)
    if run.returncode == 0:
        return run.stdout.rstrip("\n").split("\n")[-1]
    fix = "install the build for its GPU (environment.yml), or set GPUS_PER_WORKER=0 to train on CPUs"
    libraries = os.environ.get("LD_LIBRARY_PATH")
    if libraries and run_python("import torch", without="LD_LIBRARY_PATH").returncode == 0:
        fix = (f"LD_LIBRARY_PATH={libraries} gives it other libraries than its own: load no CUDA module, "
               "or unset LD_LIBRARY_PATH, in experiments/site.sh")  # fmt: skip
    elif (build := run_python(BUILD)).returncode == 0:
        fix = f"this is {build.stdout.splitlines()[-1]}; {fix}"
    said = (run.stderr.splitlines() or [f"it ended with status {run.returncode}"])[-1]
    return fail(f"PyTorch does not run on this node: {said}; {fix}")


def run_python(code, without=None):
    env, pipe = {name: value for name, value in os.environ.items() if name != without}, subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", code], env=env, text=True, stdout=pipe, stderr=pipe)
    try:
        out, error = process.communicate(timeout=TORCH_SECONDS)
        return subprocess.CompletedProcess(code, process.returncode, out, error)
    except subprocess.TimeoutExpired:
        process.kill()  # without a wait: a process that hangs in a driver cannot be killed
        return fail(f"PyTorch gives no answer on this node within {TORCH_SECONDS} s; is its GPU or file system hung?")


def usable_cpus(root="/"):
    """CPUs that this process may use, at least 1: in a batch job Slurm's, else the smallest of all limits."""
    of_slurm = int(os.environ.get("SLURM_CPUS_ON_NODE") or 0)
    if os.environ.get("ON_SLURM") and of_slurm:
        return of_slurm
    counts = [len(os.sched_getaffinity(0)), *([of_slurm] if of_slurm else [])]
    for folder in cgroups("cpu", root):  # https://docs.kernel.org/admin-guide/cgroup-v2.html#cpu-interface-files
        with contextlib.suppress(OSError, ValueError):
            quota, period = (folder / "cpu.max").read_text().split()  # version 2; without a limit "max 100000"
            counts.append(int(quota) // int(period))
        with contextlib.suppress(OSError, ValueError):  # version 1; without a limit -1
            quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
            counts += [quota // period] if quota > 0 else []
    return max(1, min(counts))


def usable_memory(root="/"):
    """GiB of memory that this process may still use: what is free, or less by the limit of a cgroup or of Slurm."""
    found = [int(re.search(r"MemAvailable: +(\d+)", Path(root, "proc/meminfo").read_text())[1]) * 1024]
    for folder in cgroups("memory", root):
        for name in ("memory.max", "memory.limit_in_bytes"):  # versions 2 and 1; without a limit "max", or a huge one
            with contextlib.suppress(OSError, ValueError):
                found.append(int((folder / name).read_text()))
    if os.environ.get("ON_SLURM"):  # MiB; 0: all of the node
        of_slurm = [os.environ.get(f"SLURM_MEM_PER_{unit}") for unit in ("NODE", "CPU")]
        found += [int(text) << 20 for text in of_slurm[:1] if text and text != "0"]
        found += [int(text) * usable_cpus() << 20 for text in of_slurm[1:] if text]
    return min(found) / 2**30


def free_processes(root="/"):
    """Processes and threads that this user may still start here; math.inf without a limit."""
    left, limit = [math.inf], resource.getrlimit(resource.RLIMIT_NPROC)[0]
    if limit != resource.RLIM_INFINITY:
        import psutil

        mine = (each.info for each in psutil.process_iter(["uids", "num_threads"]))
        left.append(limit - sum(each["num_threads"] for each in mine if each["uids"].real == os.getuid()))
    for folder in cgroups("pids", root):
        with contextlib.suppress(OSError, ValueError):
            left.append(int((folder / "pids.max").read_text()) - int((folder / "pids.current").read_text()))
    return min(left)


def cgroups(controller, root="/"):
    """Folders of the cgroups that this process is in, outwards. Inside a container only the outermost is visible."""
    with contextlib.suppress(OSError):
        for line in Path(root, "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers or controller in controllers.split(","):  # version 2 has none in this place
                top = Path(root, "sys/fs/cgroup", controller if controllers else "")
                folder = Path(f"{top}{path}")
                yield from (each for each in (folder, *folder.parents) if each.is_relative_to(top))


def own_address(hosts):
    """The one from which this node reaches the first of these hosts that is not only here.

    In Debian's /etc/hosts a node's own name has an address that no other node reaches; and the first address that it
    has may be that of a bridge for containers.
    """
    for host in (*hosts, "203.0.113.1", "2001:db8::1"):  # at last, any elsewhere
        with contextlib.suppress(OSError):
            for family, *_, address in sorted(socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)):  # IPv4 first
                with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as way:
                    way.connect(address)  # sends nothing
                    own = way.getsockname()[0]
                    if own == host or not ipaddress.ip_address(own).is_loopback:  # or a Slurm of one machine
                        return own
    return "127.0.0.1"


def likely_cause(address):
    """A cause that Ray itself does not name, as the end of a sentence: no more processes, another node's address."""
    left = free_processes()
    if left < 300:  # threads; Ray has some 150, a trial 130
        return (f", and only {left} more processes may be started here (ulimit -u "
                f"{resource.getrlimit(resource.RLIMIT_NPROC)[0]}, or a cgroup's pids.max): "
                "raise it before sbatch, or ask your site")  # fmt: skip
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        return f"; a process may have {limit >> 20} MB of addresses only: ulimit -v unlimited, or ask your site"
    try:
        socket.create_server((address, 0), family=socket.getaddrinfo(address, 0)[0][0]).close()
    except OSError:
        own = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=False).stdout.strip()
        return f", with the address {address}, not one of this node ({own}): set NODE_ADDRESS in experiments/site.sh"
    return ""


def gpus_of_worker(gpus):
    """GPUS_PER_WORKER; unless the user says so, GPUs are used where there are any."""
    text = os.environ.get("GPUS_PER_WORKER") or str(min(gpus, 1))
    if not re.fullmatch(r"\d+|0?\.\d+", text):
        fail(f"GPUS_PER_WORKER={text}: set 0, 1, or a share of a GPU such as 0.5")
    return float(text)


def setting(name, default, low):
    text = os.environ.get(name) or str(default)
    if not text.isdecimal() or int(text) < low:
        fail(f"{name}={text}: set a whole number of at least {low}")
    return int(text)


def fail(why):
    sys.exit(f"ERROR: {why}")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--processes"]:
            print(free_processes())
        case ["--address", *hosts]:
            print(own_address(hosts))
        case ["--why", address]:
            print(likely_cause(address), end="")
        case _:
            print(*look())
