"""For nodes without a network: prefetch.sh fetches from a hub that stands here, and a run then needs none.

The stand-in answers what huggingface_hub and datasets ask for, so the real clients do all that they do.
"""

import hashlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pyarrow
import pyarrow.parquet
import pytest
from conftest import (
    HEAD,
    REPO,
    SMALL,
    best_of,
    check_log,
    copy_of_the_course,
    job_of,
    load_module,
    quickstart,
    wait_for,
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def can(*command):
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


without_network = pytest.mark.skipif(
    not can("unshare", "-n", "ip", "link", "set", "lo", "up"), reason="needs root: a network namespace"
)
on_a_small_disk = pytest.mark.skipif(
    not can("unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"),
    reason="needs root: a file system to mount",
)


# ---- The stand-in for the hub ------------------------------------------------------------------------------
class Hub(ThreadingHTTPServer):
    """repos: {"models/org/name" or "datasets/org/name": folder}; stalled: files that are sent by half."""

    daemon_threads = True

    def __init__(self, repos):
        super().__init__(("127.0.0.1", 0), Answer)
        self.repos, self.gated, self.stalled, self.asked, self.go_on = (
            repos,
            set(),
            set(),
            [],
            threading.Event(),
        )
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, body=b"", status=200, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
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
            files = {
                f.relative_to(folder).as_posix(): f.read_bytes()
                for f in sorted(folder.rglob("*"))
                if f.is_file()
            }
            if path in (api, f"{api}/revision/{COMMIT}", f"{api}/revision/main"):
                siblings = [{"rfilename": f, "size": len(content)} for f, content in files.items()]
                return self.reply(
                    json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode(),
                    Content_Type="application/json",
                )
            if match := re.fullmatch(rf"{api}/tree/\w+(?:/(.+))?", path):
                return self.tree(files, match[1], recursive="recursive=true" in self.path.lower())
            if match := re.fullmatch(
                rf"/{repo.removeprefix('models/')}/resolve/\w+/(.+)",
                path,
            ):
                return self.file(files.get(match[1]), name in self.server.gated)
        return self.reply(b'{"error": "Repository not found"}', 404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

    def tree(self, files, under, recursive):
        if under and not any(name.startswith(f"{under}/") for name in files):
            return self.reply(b"{}", 404, X_Error_Code="EntryNotFound")
        rows = {}
        for name, content in files.items():
            if under and not name.startswith(f"{under}/"):
                continue
            inside = name[len(f"{under}/") if under else 0 :]
            rows[name] = {
                "type": "file",
                "path": name,
                "size": len(content),
                "oid": hashlib.sha1(content).hexdigest(),
            }
            if "/" in inside and not recursive:
                del rows[name]
                folder = name[: len(name) - len(inside)] + inside.split("/")[0]
                rows[folder] = {"type": "directory", "path": folder, "size": 0, "oid": COMMIT}
        return self.reply(json.dumps([*rows.values()]).encode(), Content_Type="application/json")

    def file(self, content, gated):
        if gated:
            return self.reply(
                status=403, X_Error_Code="GatedRepo", X_Error_Message="Access to this model is restricted"
            )
        if content is None:
            return self.reply(status=404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        headers = {
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
            "X_Repo_Commit": COMMIT,
            "Accept_Ranges": "bytes",
        }
        if match := re.match(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            start = int(match[1])
            return self.reply(
                content[start:],
                206,
                Content_Range=f"bytes {start}-{len(content) - 1}/{len(content)}",
                **headers,
            )
        return self.reply(content, **headers)


@pytest.fixture(scope="module")
def hub(demo, tmp_path_factory):
    """It has the demo as org/tiny and org/squad, org/gated like it, and org/pickled without safetensors."""
    folder = tmp_path_factory.mktemp("hub")
    (folder / "squad/plain_text").mkdir(parents=True)
    for split, file in (("train", "train-v1.1.json"), ("validation", "dev-v1.1.json")):
        rows = [
            {"id": q["id"], "title": article["title"], "context": p["context"], "question": q["question"],
             "answers": {key: [answer[key] for answer in q["answers"]] for key in ("text", "answer_start")}}
            for article in json.loads((demo / "squad" / file).read_text())["data"]
            for p in article["paragraphs"] for q in p["qas"]]  # fmt: skip
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(rows), folder / f"squad/plain_text/{split}-00000-of-00001.parquet"
        )
    splits = "".join(
        f"  - split: {split}\n    path: plain_text/{split}-*\n" for split in ("train", "validation")
    )
    (folder / "squad/README.md").write_text(
        f"---\nconfigs:\n- config_name: plain_text\n  data_files:\n{splits}---\n# SQuAD\n"
    )
    (folder / "pickled").mkdir()
    for name in ("config.json", "tokenizer.json"):
        (folder / "pickled" / name).write_bytes((demo / "model" / name).read_bytes())
    (folder / "pickled/pytorch_model.bin").write_bytes(b"x" * 1000)
    hub = Hub({"models/org/tiny": demo / "model", "models/org/gated": demo / "model",
               "models/org/pickled": folder / "pickled",
               "datasets/org/squad": folder / "squad"})  # fmt: skip
    hub.gated.add("org/gated")
    yield hub
    hub.shutdown()


# ---- Calls -------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def environ(hub, tmp_path_factory):
    """A login node's environment: the hub, and a home folder that holds nothing of it."""
    ours = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))
    }
    return ours | SMALL | {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path_factory.mktemp("home")),
        "no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1",
        "MODEL_NAME": "org/tiny", "SQUAD_DATA": "org/squad"}  # fmt: skip


def prefetch(environ, folder, *before):
    run = subprocess.run(
        [*before, "bash", REPO / "scripts/prefetch.sh", folder],
        env=environ,
        check=False,
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert "Traceback" not in run.stderr, run.stderr
    return run


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


# ---- What a user gets --------------------------------------------------------------------------------------
def test_the_hub_s_model_and_data_are_in_the_folder(fetched, demo):
    folder, exports = fetched
    assert variables(exports) == {
        "MODEL_NAME": str(folder / "models/org--tiny"),
        "SQUAD_DATA": str(folder / "data/org--squad"),
        "HF_HUB_OFFLINE": "1",
    }
    for path in (demo / "model").iterdir():
        assert (folder / "models/org--tiny" / path.name).read_bytes() == path.read_bytes(), path.name
    for name in ("train-v1.1.json", "dev-v1.1.json"):
        ours, theirs = (at / name for at in (folder / "data/org--squad", demo / "squad"))
        assert json.loads(ours.read_text()) == json.loads(theirs.read_text())
    left = sorted(path.name for path in folder.iterdir())
    assert left == [".lock", "data", "models"]  # nothing that was only on the way


@without_network
def test_a_whole_run_without_a_network(fetched, tmp_path):
    course = copy_of_the_course(tmp_path)
    there = {"EXPORTS": fetched[1], "HF_HOME": str(tmp_path / "home"), "NUM_SAMPLES": "1", "NUM_EPOCHS": "1"}
    there |= SMALL
    alone = f'ip link set lo up; eval "$EXPORTS"; exec bash {HEAD}'
    status, log = quickstart(course, "unshare", "-n", "bash", "-ec", alone, **there)
    assert status == 0, log
    check_log(log, job_of(log))
    assert best_of(log)["epoch"] == 1.0
    assert re.search(rf"^  SQUAD_DATA +{re.escape(str(fetched[0]))}/data/org--squad$", log, re.MULTILINE)


def test_what_is_there_is_not_fetched_again_also_with_the_printed_exports(fetched, environ, hub):
    folder, exports = fetched
    asked = len(hub.asked)
    run = prefetch(environ, folder)
    assert run.returncode == 0 and run.stdout == exports, run.stderr
    place = load_module(REPO / "scripts/prefetch.py").place
    for name, kind in (("MODEL_NAME", "models"), ("SQUAD_DATA", "data")):
        path = variables(exports)[name]
        assert place(path, folder / kind) == (Path(path), True)
    assert not [line for line in hub.asked[asked:] if "org/" in line]


def test_local_folders_are_copied_and_a_changed_file_again(demo, environ, tmp_path):
    (tmp_path / "model").mkdir()  # of the same name as the model's folder
    for name in ("train-v1.1.json", "dev-v1.1.json"):
        (tmp_path / "model" / name).write_bytes((demo / "squad" / name).read_bytes())
    names = {"MODEL_NAME": str(demo / "model"), "SQUAD_DATA": str(tmp_path / "model")}
    local = environ | names | {"HF_HUB_OFFLINE": "1"}
    first = prefetch(local, tmp_path / "out")
    assert first.returncode == 0, first.stderr
    assert variables(first.stdout) == {
        "MODEL_NAME": f"{tmp_path}/out/models/model",
        "SQUAD_DATA": f"{tmp_path}/out/data/model",
        "HF_HUB_OFFLINE": "1",
    }
    (tmp_path / "model/dev-v1.1.json").write_bytes((demo / "squad/train-v1.1.json").read_bytes())
    second = prefetch(local, tmp_path / "out")
    assert second.returncode == 0, second.stderr
    assert re.findall(r"copying (.*)", second.stderr) == [f"{tmp_path}/model/dev-v1.1.json"]
    for name in ("train-v1.1.json", "dev-v1.1.json"):
        assert (tmp_path / "out/data/model" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()


def test_a_fetch_that_was_killed_is_completed_by_the_next(environ, hub, demo, tmp_path):
    """The weights are half on their way when the machine is lost; small files are not asked for again."""
    model, small = (
        tmp_path / "models/org--tiny",
        ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    )
    hub.stalled.add("model.safetensors")
    try:
        command = ["bash", REPO / "scripts/prefetch.sh", tmp_path]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        run = subprocess.Popen(command, env=environ, start_new_session=True, **quiet)
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
    assert [line for line in hub.asked[asked:] if line.startswith("GET /org/tiny/resolve/")] == [
        f"GET /org/tiny/resolve/{COMMIT}/model.safetensors"
    ]
    assert sorted(path.name for path in model.iterdir()) == sorted(
        [*small, "model.safetensors", "prefetched.json"]
    )
    assert (model / "model.safetensors").read_bytes() == (demo / "model/model.safetensors").read_bytes()


# ---- What can go wrong -------------------------------------------------------------------------------------
def closed_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize("more, lines", [
    ({"HF_ENDPOINT": "CLOSED"}, [
        r"MODEL_NAME='org/tiny': http://127.0.0.1:\d+ cannot be reached from this machine \(.*refused\); .*",
        r"SQUAD_DATA='org/squad': http://127.0.0.1:\d+ cannot be reached .*"]),
    ({"MODEL_NAME": "org/tyni", "SQUAD_DATA": "org/quads"}, [
        "MODEL_NAME='org/tyni': the hub has nothing public of this name; check the spelling .*",
        "SQUAD_DATA='org/quads': the hub has nothing public .*"]),
    ({"MODEL_NAME": "org/gated"}, [
        r"MODEL_NAME='org/gated': .* accepted its terms; do so on http://\S+/org/gated, then: hf auth .*"]),
    ({"MODEL_NAME": "org/pickled"}, [
        r"MODEL_NAME='org/pickled': has no model.safetensors .*; choose another model"]),
    ({"HF_HUB_OFFLINE": "1"}, [r"HF_HUB_OFFLINE='1': the hub is switched off; run: unset HF_HUB_OFFLINE"]),
    ({"TRANSFORMERS_OFFLINE": "1"}, [
        "TRANSFORMERS_OFFLINE='1': the hub is switched off; run: unset TRANSFORMERS_OFFLINE"]),
    ({"LR_LOWER": "abc"}, [r"LR_LOWER='abc': is not a number .*"]),
], ids=lambda value: " ".join(map("=".join, value.items())) if isinstance(value, dict) else "")  # fmt: skip
def test_each_mistake_is_one_line(more, lines, environ, tmp_path):
    if more.get("HF_ENDPOINT"):
        more = {"HF_ENDPOINT": f"http://127.0.0.1:{closed_port()}"}
    run = prefetch(environ | more, tmp_path / "out")
    told = [line for line in run.stderr.splitlines() if not line.startswith("fetching ")]
    assert run.returncode == 2 and run.stdout == "" and len(told) == len(lines), run.stderr
    for line, expected in zip(told, lines, strict=True):
        assert re.fullmatch(f"ERROR: {expected}", line), line


@on_a_small_disk
@pytest.mark.parametrize("size, expected", [
    ("600k", r"org/tiny needs 1\.0 MB, the disk has 0\.\d MB free; give a folder on another disk"),
    ("1300k", r"the disk is full, or your quota is reached \(0\.\d MB free\); give a folder on another disk"),
])  # fmt: skip
def test_a_full_disk_is_one_line(size, expected, environ, tmp_path):
    run = prefetch(
        environ,
        tmp_path,
        "unshare",
        "-m",
        "bash",
        "-ec",
        'mount -t tmpfs -o size="$0" tmpfs "${@: -1}"; exec "$@"',
        size,
    )
    told = [line for line in run.stderr.splitlines() if not line.startswith("fetching ")]
    assert run.returncode == 2 and len(told) == 1, run.stderr
    assert re.fullmatch(f"ERROR: FOLDER='{tmp_path}': {expected}", told[0]), told
