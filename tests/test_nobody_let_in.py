"""A stranger on the same node, against a search that runs. And what a run shows to all.

The token guards what is reached over the network, so there the stranger is a process without it. File permissions guard
the files, so there it is another user.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import grpc
import psutil
import pytest
import requests
from conftest import HEAD, SMALL, SPACE, copy_of_the_course, job_of, left_by, pids, wait_for
from this_node import own_address

PROBE = """
import os, sys
import ray
what, address = sys.argv[1:]
if what == "driver":
    ray.init(address, log_to_driver=False)
    print("IN", ray.get(ray.remote(num_cpus=0)(lambda: os.getpid()).remote()))
else:
    from ray.scripts.scripts import cli
    cli(["start", "--address", address, "--num-cpus=1", "--disable-usage-stats"])
    print("IN")
"""


@pytest.fixture(scope="module")
def running(demo, tmp_path_factory):
    """A search started with umask 000 in a folder that everybody may enter. -> (run folder, Ray's folder, job)"""
    if os.geteuid() != 0:
        pytest.skip("only root can act as another user")
    course = copy_of_the_course(tmp_path_factory.mktemp("open"))
    for folder in (course, *course.parents):
        if str(folder).startswith("/tmp/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    log = course / "terminal.txt"
    # One long trial, so that no process comes or goes meanwhile.
    environ = os.environ | SPACE | SMALL | {"NUM_SAMPLES": "1", "NUM_EPOCHS": "10000", "WORKERS_PER_TRIAL": "2"}
    environ |= {"MODEL_NAME": str(demo / "model"), "SQUAD_DATA": str(demo / "squad")}
    environ |= {"NODE_ADDRESS": own_address([])}  # as on a cluster: with 127.0.0.1 nothing is open to the network
    with log.open("w") as output:
        head = subprocess.Popen(["bash", HEAD], cwd=course, env=environ, umask=0, stdout=output,
                                stderr=subprocess.STDOUT)  # fmt: skip
    try:
        wait_for(lambda: "epoch 1/" in log.read_text(), 120, "the first report")
        job = job_of(log.read_text())
        (ray_tmp,) = Path("/tmp").glob(f"ray_{job}.*")
        yield course / "runs" / job, ray_tmp, job
    finally:
        head.terminate()
        status = head.wait(30)
    assert status == 143 and left_by(job) == []


def probe(what, run_dir, stranger):
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "HPO_"))} | {"HOME": "/nonexistent"}
    environ["RAY_NUM_REDIS_GET_RETRIES"] = "2"  # tries, a second each, before Ray gives up
    if not stranger:
        environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(run_dir / "head-1/token")}
    command = [sys.executable, "-c", PROBE, what, (run_dir / "head-1/address").read_text().strip()]
    return subprocess.run(command, env=environ, text=True, check=False, capture_output=True, timeout=120, cwd="/")


@pytest.mark.parametrize("what", ["driver", "join"])
def test_the_owner_gets_in_and_a_stranger_nowhere(what, running):
    run = probe(what, running[0], stranger=True)
    assert run.returncode != 0 and "IN" not in run.stdout.split(), run.stdout + run.stderr
    assert re.search("permission denied|token|unauthenticated|connect", run.stdout + run.stderr, re.IGNORECASE)
    if what == "driver":  # so the refusals are not those of a cluster that is not there
        run = probe(what, running[0], stranger=False)
        assert run.returncode == 0 and run.stdout.split().count("IN") == 1, run.stderr


def listening(job):
    """[(address, port, command)] of the run's processes."""
    marked = [psutil.Process(pid) for pid in pids(f" head {job}")]
    children = [child for process in marked for child in process.children(recursive=True)]
    ports = [(process, port) for process in {*marked, *children} for port in process.net_connections("tcp")]
    return [(*port.laddr, " ".join(process.cmdline())) for process, port in ports if port.status == "LISTEN"]


def http(address, path="/api/cluster_status", **headers):
    return requests.get(f"http://{address}{path}", headers=headers, timeout=10).status_code


CALLS = ("NodeInfoGcsService/GetAllNodeInfo", "NodeManagerService/GetNodeStats", "ObjectManagerService/Pull",
         "CoreWorkerService/GetCoreWorkerStats", "RayletDriver/ClusterInfo", "LogService/ListLogs",
         "ReporterService/GetTraceback")  # fmt: skip
PATHS = ("/api/cluster_status", "/api/v0/actors", "/nodes?view=summary", "/api/jobs/", "/api/job_agent/jobs/", "/logs",
         "/metrics")  # fmt: skip


def grpc_answers(ip, port):
    """What a server of Ray's says to calls without the token, one for each of its kinds of server."""
    said = set()
    with grpc.insecure_channel(f"{ip}:{port}") as channel:
        for call in CALLS:
            try:
                channel.unary_unary(f"/ray.rpc.{call}")(b"", timeout=10)
                said.add("OK")
            except grpc.RpcError as error:
                said.add(error.code().name)
    return said


def test_each_port_of_a_run_is_known_and_wants_the_token(running):
    """All but those between the processes of one training: torch knows no token, so they listen on loopback alone."""
    run_dir, _, job = running
    token = (run_dir / "head-1/token").read_text()
    kinds = []
    for ip, port, command in listening(job):
        known = ("gcs_server", "raylet/raylet", "dashboard/dashboard.py", "ray::DashboardAgent", "ray::RuntimeEnvAgent",
                 "raytune_asha_hpo.py", "ray.util.client.server", "ray::")  # fmt: skip
        kinds.append(next((kind for kind in known if kind in command), command))
        if "ray::TrainingProcess" in command and port >= 20000:  # Ray gives its processes ports from 10002 to 19999
            assert ip == "127.0.0.1"
            continue
        ip = "127.0.0.1" if ip in ("::", "0.0.0.0") else ip.removeprefix("::ffff:")
        said = grpc_answers(ip, port)
        if said == {"UNAVAILABLE"}:  # it speaks HTTP
            if kinds[-1] == "dashboard/dashboard.py":
                assert ip == "127.0.0.1" and http(f"{ip}:{port}", Authorization=f"Bearer {token}") == 200
            for path in PATHS:
                assert http(f"{ip}:{port}", path=path) == 401, (path, command)
        else:
            assert said == {"UNAUTHENTICATED", "UNIMPLEMENTED"}, (ip, port, command)
    assert set(kinds) == set(known)


def test_the_token_and_the_folders_are_the_owners_alone_and_the_token_is_nowhere_else(running):
    run_dir, ray_tmp, job = running
    token = (run_dir / "head-1/token").read_text()
    assert len(token) == 64
    assert (run_dir / "head-1/token").stat().st_mode & 0o777 == 0o600
    assert run_dir.stat().st_mode & 0o077 == 0 and ray_tmp.stat().st_mode & 0o077 == 0
    ways = f"ls {run_dir} {ray_tmp}; cat {run_dir}/head-1/token {run_dir}/head-1/address; : >>{run_dir}/head-1/room"
    for who, refused in ((["env"], 0), (["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"], 5)):
        run = subprocess.run([*who, "bash", "-c", ways], text=True, check=False, capture_output=True, cwd="/")
        assert (run.stdout.count(token), run.stderr.count("Permission denied")) == (not refused, refused), run
    for pid in pids(f" head {job}"):
        process = psutil.Process(pid)
        assert token not in " ".join(process.cmdline()) + json.dumps(process.environ())
    every = [path for folder in (run_dir, ray_tmp, run_dir.parents[1] / "logs") for path in folder.rglob("*")]
    texts = [path for path in every if path.is_file() and path.name != "token"]
    assert len(texts) > 10
    assert not [path for path in texts if token.encode() in path.read_bytes()]
