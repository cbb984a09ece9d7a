"""The Hugging Face hub: what a check asks of it, and prefetch.sh, after which a run needs no network.

A stand-in answers what huggingface_hub and datasets ask for, so the real clients do all that they do.
"""

import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
from conftest import REPO, SMALL, wait_for

COMMIT = "0123456789abcdef0123456789abcdef01234567"
tag = lambda content: hashlib.sha1(content).hexdigest()
as_root = ["unshare", "-nm", "bash", "-c", "ip link set lo up && mount -t tmpfs none /mnt"]
refused = subprocess.run(as_root, check=False, capture_output=True).returncode


# ---- The stand-in for the hub ------------------------------------------------------------------------------
class Answer(BaseHTTPRequestHandler):
    """Of a server with repos {"models/org/name" or "datasets/org/name": folder} and stalled, a file sent by half."""

    protocol_version = "HTTP/1.1"
    log_message = lambda *_: None

    def reply(self, body=b"", status=200, **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content_Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET" and self.path.endswith(f"/{self.server.stalled}"):
            self.wfile.write(body[: len(body) // 2])
            self.server.go_on.wait(300)
        elif self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"{self.command} {path}")
        for repo, folder in self.server.repos.items():
            files = {file.name: file.read_bytes() for file in folder.iterdir()}
            if re.fullmatch(rf"/api/{repo}(/revision/\w+)?", path):
                siblings = [{"rfilename": file, "size": len(content)} for file, content in files.items()]
                return self.reply({"id": repo.split("/", 1)[1], "sha": COMMIT, "siblings": siblings})
            if re.fullmatch(rf"/api/{repo}/tree/\w+", path):
                return self.reply([{"type": "file", "path": file, "size": len(content), "oid": tag(content)}
                                   for file, content in files.items()])  # fmt: skip
            if match := re.fullmatch(rf"/{repo.removeprefix('models/')}/resolve/\w+/(.+)", path):
                if "gated" in repo:
                    return self.reply(status=403, X_Error_Code="GatedRepo")
                if (content := files.get(match[1])) is None:
                    return self.reply(status=404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
                return self.reply(content, ETag=f'"{tag(content)}"', X_Repo_Commit=COMMIT)
        return self.reply(status=404, X_Error_Code="EntryNotFound" if "/tree/" in path else "RepoNotFound")

    do_HEAD = do_GET


@pytest.fixture(scope="module")
def hub(demo, hpo, tmp_path_factory):
    """It has the demo as org/tiny and org/squad, org/gated like it, and others that cannot be trained on."""
    folder = tmp_path_factory.mktemp("hub")
    train, validation = hpo.read_splits(demo / "squad")
    data = {"squad/train": train, "squad/validation": validation, "train_only/train": train}
    for name, answers in (("squad_v2", {"text": []}), ("one_text", {"text": "one"})):
        data[f"{name}/train"] = data[f"{name}/validation"] = [row | {"answers": answers} for row in train]
    data["one_blank/train"], data["one_blank/validation"] = [*train, data["squad_v2/train"][0]], validation
    for name, rows in data.items():
        path = folder / f"datasets/org/{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(map(json.dumps, rows)))
    for name in ("tiny", "gated", "pickled"):
        shutil.copytree(demo / "model", folder / "models/org" / name)
    (folder / "models/org/pickled/model.safetensors").rename(folder / "models/org/pickled/pytorch_model.bin")
    hub = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    hub.repos = {str(repo.relative_to(folder)): repo for repo in folder.glob("*/org/*")}
    hub.stalled, hub.asked, hub.go_on = None, [], threading.Event()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    yield hub
    hub.shutdown()


# ---- Calls -------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def environ(hub, tmp_path_factory):
    """A login node's environment: the hub, and a home folder that holds nothing of it."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    here = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path_factory.mktemp("home"))}
    here |= {"no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1", "PYTHONPATH": str(REPO / "scripts/job")}
    return ours | SMALL | here | {"MODEL_NAME": "org/tiny", "SQUAD_DATA": "org/squad"}


def program(environ, *command):
    run = subprocess.run(command, env=environ, check=False, text=True, capture_output=True, timeout=300)
    assert "Traceback" not in run.stderr, run.stderr
    return run


def prefetch(environ, folder, *before):
    return program(environ, *before, "bash", REPO / "scripts/prefetch.sh", folder)


def check(environ, code="sys.exit(c.main())"):
    return program(environ, sys.executable, "-c", f"import sys, check_inputs as c\n{code}")


def variables(exports):
    """The exports that a call has printed, as the shell would understand them."""
    assert all(line.startswith("export ") for line in exports.splitlines()), exports
    return dict(word.split("=", 1) for word in shlex.split(exports) if word != "export")


@pytest.fixture(scope="module")
def fetched(hub, environ, tmp_path_factory):
    """(folder, printed exports) of a fetch from the hub, in a folder whose name the shell would split."""
    folder = tmp_path_factory.mktemp("pre fetched") / "for the course"
    run = prefetch(environ, folder)
    assert run.returncode == 0, run.stderr
    return folder, run.stdout


def test_names_on_the_hub_are_checked_and_the_weights_are_not_fetched(hub, environ):
    code = "status = c.main()\nfor name in 'squad_v2', 'one_blank', 'train_only':\n"
    code += "  try: c.check(c.os.environ | {'SQUAD_DATA': f'org/{name}', 'MODEL_NAME': 'org/pickled'})\n"
    code += "  except c.InputError as error: print(error)\nsys.exit(status)"
    environ = environ | {"SQUAD_DATA": "org/one_text"}  # an answer that is a text is one answer
    done = check(environ, code)
    assert done.returncode == 0 and done.stderr == "" and "  MODEL_NAME         org/tiny\n" in done.stdout
    assert not [line for line in hub.asked if line.startswith("GET") and "safetensors" in line]
    lines = done.stdout.splitlines()[-6:]
    assert all(line.startswith("MODEL_NAME='org/pickled': has no model.safetensors (") for line in lines[::2])
    told = {"squad_v2": "in SQuAD v2, empty", "one_blank": "or its answers are", "train_only": 'Unknown split "valid'}
    for line, (name, why) in zip(lines[1::2], told.items(), strict=True):
        assert line.startswith(f"SQUAD_DATA='org/{name}': ") and why in line and "; " in line, line
    cache = f"{environ['HF_HOME']}/hub"
    huggingface_hub.snapshot_download("org/tiny", endpoint=environ["HF_ENDPOINT"], cache_dir=cache)
    assert check(environ | {"HF_HUB_OFFLINE": "1"}).returncode == 0  # all is in the cache


def test_a_node_without_a_route_is_told_what_to_do_at_once(environ):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the longest way to no answer
        there = {"HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}", "HF_HOME": "/none"}
        done = check(environ | there, code="c.HUB_SECONDS = 1; sys.exit(c.main())")
    assert done.returncode == 2
    for line, name in zip(done.stderr.splitlines(), ("MODEL_NAME='org/tiny'", "SQUAD_DATA='org/squad'"), strict=True):
        assert re.fullmatch(rf"ERROR: {name}: the hub cannot be reached .*; fetch it on a login node .*", line)


# ---- What a user of prefetch.sh gets -------------------------------------------------------------------------
def test_the_hub_s_model_and_data_are_in_the_folder_and_not_fetched_again(fetched, environ, hub, demo, hpo):
    folder, exports = fetched
    paths = {"MODEL_NAME": str(folder / "models/org--tiny"), "SQUAD_DATA": str(folder / "data/org--squad")}
    assert variables(exports) == paths | {"HF_HUB_OFFLINE": "1"}
    for path in (demo / "model").iterdir():
        assert (folder / "models/org--tiny" / path.name).read_bytes() == path.read_bytes(), path.name
    assert hpo.read_splits(folder / "data/org--squad") == hpo.read_splits(demo / "squad")
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "data", "models"]  # nothing of the way
    # Without a network, if root may do that: also if the model is given as it is there.
    asked, alone = len(hub.asked), () if refused else ("unshare", "-n")
    run = prefetch(environ | {"MODEL_NAME": paths["MODEL_NAME"]}, folder, *alone)
    assert run.returncode == 0 and run.stdout == exports, run.stderr
    assert not [line for line in hub.asked[asked:] if "org/" in line]


def test_local_folders_stay_where_they_are_and_are_checked_too(course, demo, tmp_path):
    """With the environment of site.sh: a container, and no other Python with the packages."""
    shutil.rmtree(tmp_path / ".venv")
    with (tmp_path / "experiments/site.sh").open("a") as site:
        site.write(f'CONTAINER="env --chdir=/ PATH={REPO}/.venv/bin:/usr/bin:/bin"\n')
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train", "dev"):
        (data / f"{name}.jsonl").write_text('{"prompt": "a", "answer": "b"}\n' * 32)
    local = {"MODEL_NAME": os.path.relpath(demo / "model"), "SQUAD_DATA": str(data), "HF_HUB_OFFLINE": "1"}
    environ = local | SMALL | {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    first = program(environ, "bash", tmp_path / "scripts/prefetch.sh", tmp_path / "out")
    assert first.returncode == 0, first.stderr
    assert variables(first.stdout) == local | {"MODEL_NAME": str(demo / "model")}
    (data / "dev.jsonl").write_text('{"prompt": "a", "answer": ""}\n')
    second = program(environ, "bash", tmp_path / "scripts/prefetch.sh", tmp_path / "out")
    assert second.returncode == 2 and f"ERROR: SQUAD_DATA='{data}': dev.jsonl, line 1" in second.stderr


def test_a_fetch_that_was_killed_is_completed_by_the_next(environ, hub, demo, tmp_path):
    """The weights are half on their way when the machine is lost; small files are not asked for again."""
    model = tmp_path / "models/org--tiny"
    small = {path.name for path in (demo / "model").iterdir()} - {"model.safetensors"}
    hub.stalled = "model.safetensors"
    try:
        run = subprocess.Popen(["bash", REPO / "scripts/prefetch.sh", tmp_path], env=environ, start_new_session=True)
        there = lambda: {path.name for path in model.glob("*")} >= small and any(model.rglob("*.incomplete"))
        wait_for(there, 120, "the weights to be on their way")
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    finally:
        hub.stalled = None
        hub.go_on.set()
    asked = len(hub.asked)
    second = prefetch(environ, tmp_path)
    assert second.returncode == 0, second.stderr
    got = [line for line in hub.asked[asked:] if line.startswith("GET /org/tiny/resolve/")]
    assert got == [f"GET /org/tiny/resolve/{COMMIT}/model.safetensors"]
    assert (model / "model.safetensors").read_bytes() == (demo / "model/model.safetensors").read_bytes()


def test_each_mistake_is_one_line(environ, tmp_path):
    run = prefetch(environ | {"MODEL_NAME": "org/gated", "SQUAD_DATA": "org/quads"}, tmp_path / "out")
    said = "fetching .*\nfetching .*\n"
    said += "ERROR: MODEL_NAME='org/gated': the hub asks you to accept its terms .*; do so .*\n"
    said += "ERROR: SQUAD_DATA='org/quads': the hub has nothing public of this name .*\n"
    assert run.returncode == 2 and run.stdout == "" and re.fullmatch(said, run.stderr), run.stderr


@pytest.mark.skipif(refused, reason="needs root: a network namespace, a file system to mount")
@pytest.mark.parametrize("size", ["600k", "1300k"])  # full with half the model, and with the data
def test_a_full_disk_is_one_line(size, environ, tmp_path):
    small = 'mount -t tmpfs -o size="$0" tmpfs "${@: -1}"; exec "$@"'
    run = prefetch(environ, tmp_path, "unshare", "-m", "bash", "-ec", small, size)
    error = next(line for line in run.stderr.splitlines() if line.startswith("ERROR"))
    full = r"the disk is full, or your quota is reached .*; make room, or use a folder on another disk"
    assert run.returncode == 2 and re.fullmatch(rf"ERROR: \w+='org/\w+': {full}", error), error
