"""The Hugging Face hub: what a check asks of it, and prefetch.sh, after which a run needs no network.

A stand-in answers what huggingface_hub and datasets ask for, so the real clients do all that they do.
"""

import hashlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pyarrow
import pyarrow.parquet
import pytest
from conftest import HEAD, REPO, SMALL, best_of, check_log, copy_of_the_course, job_of, quickstart, wait_for

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def can(*command):
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


root = "needs root: a network namespace, a file system to mount"
without_network = pytest.mark.skipif(not can("unshare", "-n", "ip", "link", "set", "lo", "up"), reason=root)
on_a_small_disk = pytest.mark.skipif(not can("unshare", "-m", "mount", "-t", "tmpfs", "t", "/mnt"), reason=root)


# ---- The stand-in for the hub ------------------------------------------------------------------------------
class Hub(ThreadingHTTPServer):
    """repos: {"models/org/name" or "datasets/org/name": folder}; stalled: files that are sent by half."""

    daemon_threads = True

    def __init__(self, repos):
        super().__init__(("127.0.0.1", 0), Answer)
        self.repos, self.gated, self.stalled, self.asked, self.go_on = repos, set(), set(), [], threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, body=b"", status=200, **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({"Content_Length": len(body), "Content_Type": "application/json"} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            stalls = urlsplit(self.path).path.rsplit("/", 1)[-1] in self.server.stalled
            self.wfile.write(body[: len(body) // 2] if stalls else body)
            if stalls:
                self.wfile.flush()
                self.server.go_on.wait(300)

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"{self.command} {path}")
        for repo, folder in self.server.repos.items():
            name, api = repo.split("/", 1)[1], f"/api/{repo}"
            files = {f.relative_to(folder).as_posix(): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}
            if path in (api, f"{api}/revision/{COMMIT}", f"{api}/revision/main"):
                siblings = [{"rfilename": file, "size": len(content)} for file, content in files.items()]
                return self.reply({"id": name, "sha": COMMIT, "siblings": siblings})
            if match := re.fullmatch(rf"{api}/tree/\w+(?:/(.+))?", path):
                return self.tree(files, f"{match[1]}/" if match[1] else "", "recursive=true" in self.path.lower())
            if match := re.fullmatch(rf"/{repo.removeprefix('models/')}/resolve/\w+/(.+)", path):
                return self.file(files.get(match[1]), name in self.server.gated)
        return self.reply({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

    def tree(self, files, under, recursive):
        if not any(name.startswith(under) for name in files):
            return self.reply({}, 404, X_Error_Code="EntryNotFound")
        rows = {}
        for name, content in files.items():
            if name.startswith(under):
                folder, _, rest = name[len(under) :].partition("/")
                path, kind = (name, "file") if recursive or not rest else (under + folder, "directory")
                oid = hashlib.sha1(content).hexdigest()
                rows[path] = {"type": kind, "path": path, "size": len(content), "oid": oid}
        return self.reply([*rows.values()])

    def file(self, content, gated):
        if gated:
            return self.reply(status=403, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
        if content is None:
            return self.reply(status=404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes"}
        if match := re.match(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            start, end = int(match[1]), len(content)
            return self.reply(content[start:], 206, Content_Range=f"bytes {start}-{end - 1}/{end}", **headers)
        return self.reply(content, **headers)


def rows_of(file):
    return [{"id": q["id"], "title": article["title"], "context": p["context"], "question": q["question"],
             "answers": {key: [answer[key] for answer in q["answers"]] for key in ("text", "answer_start")}}
            for article in json.loads(file.read_text())["data"]
            for p in article["paragraphs"] for q in p["qas"]]  # fmt: skip


def data_set(folder, splits):
    (folder / "data").mkdir(parents=True)
    for split, rows in splits.items():
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"data/{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="module")
def hub(demo, tmp_path_factory):
    """It has the demo as org/tiny and org/squad, org/gated like it, and others that cannot be trained on."""
    folder = tmp_path_factory.mktemp("hub")
    (folder / "pickled").mkdir()
    for name in ("config.json", "tokenizer.json"):
        (folder / "pickled" / name).write_bytes((demo / "model" / name).read_bytes())
    (folder / "pickled/pytorch_model.bin").write_bytes(b"x" * 1000)
    train, validation = (rows_of(demo / "squad" / name) for name in ("train-v1.1.json", "dev-v1.1.json"))
    one_text = [row | {"answers": {"text": row["answers"]["text"][0]}} for row in train]
    data = {
        "squad": {"train": train, "validation": validation},
        "squad_v2": {"train": [row | {"answers": {"text": [], "answer_start": []}} for row in train], "validation": []},
        "one_text": {"train": one_text, "validation": one_text[:100]},
        "train_only": {"train": train},
        "prose": {"train": [{"text": "a"}], "validation": [{"text": "a"}]},
    }
    data["squad_v2"]["validation"] = data["squad_v2"]["train"][:100]
    repos = {f"datasets/org/{name}": data_set(folder / name, splits) for name, splits in data.items()}
    repos |= {"models/org/tiny": demo / "model", "models/org/gated": demo / "model"}
    hub = Hub(repos | {"models/org/pickled": folder / "pickled"})
    hub.gated.add("org/gated")
    yield hub
    hub.shutdown()


# ---- Calls -------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def environ(hub, tmp_path_factory):
    """A login node's environment: the hub, and a home folder that holds nothing of it."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    here = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path_factory.mktemp("home"))}
    here |= {"no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}
    return ours | SMALL | here | {"MODEL_NAME": "org/tiny", "SQUAD_DATA": "org/squad"}


def program(environ, *command):
    run = subprocess.run(command, env=environ, check=False, text=True, capture_output=True, timeout=300)
    assert "Traceback" not in run.stderr, run.stderr
    return run


def prefetch(environ, folder, *before):
    return program(environ, *before, "bash", REPO / "scripts/prefetch.sh", folder)


def check(environ):
    return program(environ, sys.executable, REPO / "scripts/job/check_inputs.py")


def variables(exports):
    """The exports that a call has printed, as the shell would understand them."""
    words = [shlex.split(line) for line in exports.splitlines()]
    assert all(len(each) == 2 and each[0] == "export" for each in words), exports
    return dict(each[1].split("=", 1) for each in words)


@pytest.fixture(scope="module")
def fetched(hub, environ, tmp_path_factory):
    """(folder, printed exports) of a fetch from the hub, in a folder whose name the shell would split."""
    folder = tmp_path_factory.mktemp("pre fetched") / "for the course"
    run = prefetch(environ, folder)
    assert run.returncode == 0, run.stderr
    return folder, run.stdout


# ---- The check of a run: names on the hub --------------------------------------------------------------------
def test_names_on_the_hub(hub, environ):
    """What cannot be trained is refused, and the weights are not fetched."""
    done = check(environ)
    assert done.returncode == 0 and done.stderr == "" and "  MODEL_NAME         org/tiny\n" in done.stdout
    assert not [line for line in hub.asked if line.startswith("GET") and "safetensors" in line]
    program(environ, sys.executable, "-c", "import huggingface_hub as h; h.snapshot_download('org/tiny')")
    assert check(environ | {"HF_HUB_OFFLINE": "1"}).returncode == 0  # all is in the cache
    code = "import os, check_inputs as c\nfor name in 'squad_v2', 'one_text', 'train_only', 'prose':\n"
    code += "  try: c.check(os.environ | {'SQUAD_DATA': f'org/{name}', 'MODEL_NAME': 'org/pickled'})\n"
    code += "  except c.InputError as error: print(error)"
    done = program(environ | {"PYTHONPATH": str(REPO / "scripts/job")}, sys.executable, "-c", code)
    lines = done.stdout.splitlines()
    assert all(line.startswith("MODEL_NAME='org/pickled': has no model.safetensors (") for line in lines[::2])
    for line, (name, why) in zip(lines[1::2], {
        "squad_v2": "as in SQuAD v2, has no answer", "one_text": "are not a list of texts",
        "train_only": 'Unknown split "validation"', "prose": "KeyError: 'context'",
    }.items(), strict=True):  # fmt: skip
        assert line.startswith(f"SQUAD_DATA='org/{name}': ") and re.search(why, line) and "; " in line, line


def test_a_node_without_a_route_is_told_what_to_do_at_once(environ):
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = f"http://127.0.0.1:{server.getsockname()[1]}"
    done = check(environ | {"HF_ENDPOINT": closed, "HF_HOME": "/none"})
    assert done.returncode == 2
    for line, name in zip(done.stderr.splitlines(), ("MODEL_NAME='org/tiny'", "SQUAD_DATA='org/squad'"), strict=True):
        assert re.fullmatch(rf"ERROR: {name}: the hub cannot be reached .*; fetch it on a login node .*", line)


# ---- What a user of prefetch.sh gets -------------------------------------------------------------------------
def test_the_hub_s_model_and_data_are_in_the_folder(fetched, demo, hpo):
    folder, exports = fetched
    paths = {"MODEL_NAME": str(folder / "models/org--tiny"), "SQUAD_DATA": str(folder / "data/org--squad")}
    assert variables(exports) == paths | {"HF_HUB_OFFLINE": "1"}
    for path in (demo / "model").iterdir():
        assert (folder / "models/org--tiny" / path.name).read_bytes() == path.read_bytes(), path.name
    ours, theirs = (hpo.read_splits(at) for at in (folder / "data/org--squad", demo / "squad"))
    assert ours == theirs
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "data", "models"]  # nothing of the way


@without_network
def test_a_whole_run_without_a_network(fetched, tmp_path):
    course = copy_of_the_course(tmp_path)
    there = {"EXPORTS": fetched[1], "HF_HOME": str(tmp_path / "home"), "NUM_SAMPLES": "1", "NUM_EPOCHS": "1"}
    alone = f'ip link set lo up; eval "$EXPORTS"; exec bash {HEAD}'
    status, log = quickstart(course, "unshare", "-n", "bash", "-ec", alone, **there | SMALL)
    assert status == 0, log
    check_log(log, job_of(log))
    assert best_of(log)["epoch"] == 1.0
    assert re.search(rf"^  SQUAD_DATA +{re.escape(str(fetched[0]))}/data/org--squad$", log, re.MULTILINE)


def test_what_is_there_is_not_fetched_again_also_with_the_printed_exports(fetched, environ, hub):
    folder, exports = fetched
    asked = len(hub.asked)
    for given in ({}, variables(exports)):
        run = prefetch(environ | given, folder)
        assert run.returncode == 0 and run.stdout == exports, run.stderr
    assert not [line for line in hub.asked[asked:] if "org/" in line]


def test_local_folders_are_copied_and_a_changed_file_again(demo, environ, tmp_path):
    (tmp_path / "model").mkdir()  # of the same name as the model's folder
    for name in ("train", "dev"):
        (tmp_path / f"model/{name}.jsonl").write_text('{"prompt": "a", "answer": "b"}\n' * 32)
    names = {"MODEL_NAME": str(demo / "model"), "SQUAD_DATA": str(tmp_path / "model")}
    local, out = environ | names | {"HF_HUB_OFFLINE": "1"}, tmp_path / "out"
    first = prefetch(local, out)
    assert first.returncode == 0, first.stderr
    paths = {"MODEL_NAME": f"{out}/models/model", "SQUAD_DATA": f"{out}/data/model"}
    assert variables(first.stdout) == paths | {"HF_HUB_OFFLINE": "1"}
    (tmp_path / "model/dev.jsonl").write_text('{"prompt": "a", "answer": ""}\n')
    second = prefetch(local, out)
    assert re.findall(r"copying (.*)", second.stderr) == [f"{tmp_path}/model/dev.jsonl"]
    assert second.returncode == 2 and f"ERROR: SQUAD_DATA='{out}/data/model': dev.jsonl, line 1" in second.stderr


def test_a_fetch_that_was_killed_is_completed_by_the_next(environ, hub, demo, tmp_path):
    """The weights are half on their way when the machine is lost; small files are not asked for again."""
    model = tmp_path / "models/org--tiny"
    small = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
    hub.stalled.add("model.safetensors")
    try:
        command, quiet = ["bash", REPO / "scripts/prefetch.sh", tmp_path], subprocess.DEVNULL
        run = subprocess.Popen(command, env=environ, start_new_session=True, stdout=quiet, stderr=quiet)
        wait_for(lambda: all((model / name).exists() for name in small), 120, "the small files")
        wait_for(lambda: any(model.rglob("*.incomplete")), 120, "the weights to be on their way")
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    finally:
        hub.stalled.clear()
        hub.go_on.set()
    asked = len(hub.asked)
    second = prefetch(environ, tmp_path)
    assert second.returncode == 0, second.stderr
    got = [line for line in hub.asked[asked:] if line.startswith("GET /org/tiny/resolve/")]
    assert got == [f"GET /org/tiny/resolve/{COMMIT}/model.safetensors"]
    assert sorted(path.name for path in model.iterdir()) == sorted([*small, "model.safetensors", "prefetched.json"])
    assert (model / "model.safetensors").read_bytes() == (demo / "model/model.safetensors").read_bytes()


# ---- What can go wrong -------------------------------------------------------------------------------------
@pytest.mark.parametrize("more, lines", [
    ({"MODEL_NAME": "org/tyni", "SQUAD_DATA": "org/quads"}, [
        "MODEL_NAME='org/tyni': the hub has nothing public of this name .*; check its spelling, .*",
        "SQUAD_DATA='org/quads': the hub has nothing public .*"]),
    ({"MODEL_NAME": "org/gated"}, ["MODEL_NAME='org/gated': the hub asks you to accept its terms .*; do so .*"]),
    ({"MODEL_NAME": "org/pickled", "SQUAD_DATA": "org/squad_v2"}, [
        r"MODEL_NAME='org/pickled': has no model.safetensors .*; use another model",
        "SQUAD_DATA='org/squad_v2': .*as in SQuAD v2, has no answer.*"]),
    ({"HF_HUB_OFFLINE": "1"}, [rf"{name}='org/\w+': the hub is switched off .*; unset HF_HUB_OFFLINE .*"
                               for name in ("MODEL_NAME", "SQUAD_DATA")]),
    ({"LR_LOWER": "abc"}, [r"LR_LOWER='abc': is not a number .*"]),
], ids=lambda value: " ".join(map("=".join, value.items())) if isinstance(value, dict) else "")  # fmt: skip
def test_each_mistake_is_one_line(more, lines, environ, tmp_path):
    run = prefetch(environ | more, tmp_path / "out")
    told = [line for line in run.stderr.splitlines() if not line.startswith(("fetching ", "wrote "))]
    assert run.returncode == 2 and run.stdout == "" and len(told) == len(lines), run.stderr
    for line, expected in zip(told, lines, strict=True):
        assert re.fullmatch(f"ERROR: {expected}", line), line


@on_a_small_disk
@pytest.mark.parametrize("size, expected", [
    ("600k", r"needs 1\.0 MB, the disk has 0\.\d; give a folder on another disk"),
    ("1300k", r"the disk is full, or your quota is reached .*; make room, or use a folder on another disk"),
])  # fmt: skip
def test_a_full_disk_is_one_line(size, expected, environ, tmp_path):
    small = 'mount -t tmpfs -o size="$0" tmpfs "${@: -1}"; exec "$@"'
    run = prefetch(environ, tmp_path, "unshare", "-m", "bash", "-ec", small, size)
    (error,) = [line for line in run.stderr.splitlines() if line.startswith("ERROR")]
    assert run.returncode == 2 and re.fullmatch(rf"ERROR: \w+='org/\w+': {expected}", error), error
