#!/usr/bin/env python3
"""Puts a model into FOLDER/models and a data set into FOLDER/data. scripts/prefetch.sh calls this.

    python scripts/prefetch.py MODEL DATA FOLDER       # MODEL, DATA: a Hugging Face hub id or a local folder

Of a model only what a run reads is taken: weights as safetensors, configuration, tokenizer. A data set of the hub is
written as train-v1.1.json and dev-v1.1.json, with its questions in the hub's order, so that a seed draws the same ones.
Prints the two folders on stdout. Exit status 2: one line for each thing that is wrong.
"""

import argparse
import errno
import fnmatch
import json
import os
import shutil
import sys
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from pathlib import Path

import check_inputs
import rooms  # noqa: F401
from check_inputs import InputError
from check_inputs import lesson as hpo

MARK = "prefetched.json"  # in each folder that is made here: where from, and whether it is complete
CONFIGURATION_AND_TOKENIZER = (
    "config.json", "generation_config.json", "tokenizer*.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.*", "vocab.json", "vocab.txt", "merges.txt", "*.model")  # fmt: skip
INDEX = "model.safetensors.index.json"  # of weights in several files
SQUAD_FILES = {"train": "train-v1.1.json", "validation": "dev-v1.1.json"}
ONLINE_TIMEOUT = 20  # seconds, to find out whether the hub can be reached


def log(text):
    print(text, file=sys.stderr, flush=True)


# ---- What can go wrong, in one line ----------------------------------------------------------------------------------
UNREACHABLE = ("ConnectError", "ConnectTimeout", "ReadTimeout", "ReadError", "RemoteProtocolError", "ProxyError",
               "ConnectionError")  # fmt: skip


@contextmanager
def told_in(problems, variable, value, folder):
    """Whatever goes wrong inside becomes one line of `problems`."""
    try:
        yield
    except InputError as error:
        problems += str(error).splitlines()
    except Exception as error:  # noqa: BLE001  each library raises its own kinds
        problems.append(explain(error, variable, value, folder))


def explain(error, variable, value, folder):
    """The line to print when `value` could not be brought into `folder`: what, its value, and what to do."""
    from huggingface_hub import errors

    chain = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)

    def caused_by(*kinds):
        return any(isinstance(e, kinds) for e in chain)

    responses = (e.response for e in chain if isinstance(e, errors.HfHubHTTPError))
    status = next((response.status_code for response in responses if response is not None), None)
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    name = f"{variable}={value!r}"
    full = any(getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT) for e in chain)
    if full or "Not enough disk space" in str(error):
        why = f"the disk is full, or your quota is reached ({free(folder)})"
        return f"FOLDER={str(folder)!r}: {why}; give a folder on another disk"
    if caused_by(errors.OfflineModeIsEnabled):
        switch = next(switch for switch in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if os.environ.get(switch))
        return f"{switch}={os.environ[switch]!r}: the hub is switched off; run: unset {switch}"
    if caused_by(errors.GatedRepoError):
        why = "the hub gives it only to users who have accepted its terms"
        return f"{name}: {why}; do so on {hub}/{value}, then: hf auth login"
    if caused_by(errors.RepositoryNotFoundError) or status in (401, 404):
        why = "the hub has nothing public of this name"
        return f"{name}: {why}; check the spelling (for a private one: hf auth login)"
    if status:
        return f"{name}: the hub answers with HTTP status {status}; try again later"
    if any(type(e).__name__ in UNREACHABLE for e in chain):
        why = f"{hub} cannot be reached from this machine ({one_line(chain[-1])})"
        return f"{name}: {why}; use a login node that can, or set HTTPS_PROXY to your site's proxy"
    return f"{name}: cannot be fetched: {type(error).__name__}: {one_line(error)}"


def one_line(error):
    return " ".join(str(error).split())[:200]


def free(folder):
    return f"{shutil.disk_usage(folder).free / 1e6:.1f} MB free"


# ---- Folders ---------------------------------------------------------------------------------------------------------
def place(source, folder):
    """(target, complete): the folder in `folder` for `source`, and whether all of it is there.

    Raises InputError if it holds something else.
    """
    folder.mkdir(exist_ok=True)
    if Path(source).parent == folder and (Path(source) / MARK).exists():  # what an earlier call has printed
        return Path(source), True
    target = folder / (Path(source).name if os.path.isabs(source) else source.replace("/", "--"))
    try:
        made = json.loads((target / MARK).read_text(encoding="utf-8"))
        if made["source"] == source:
            return target, made["complete"] and not os.path.isabs(source)  # a local folder may have changed
        holds = f"holds {made['source']}"
    except FileNotFoundError:
        if not target.exists() or (target.is_dir() and not any(target.iterdir())):
            return target, False
        holds = "was not made by this script"
    except (OSError, ValueError, KeyError, TypeError):
        holds = f"has a {MARK} that cannot be read"
    why = f"{folder.name}/{target.name} in it {holds}"
    raise InputError(f"FOLDER={str(folder.parent)!r}: {why}; remove it, or give another folder")


def mark(target, source, complete):
    target.mkdir(exist_ok=True)
    (target / f"{MARK}.tmp").write_text(json.dumps({"source": source, "complete": complete}) + "\n", encoding="utf-8")
    os.replace(target / f"{MARK}.tmp", target / MARK)


def copy(source, names, target):
    """The files `names` of the folder `source` into `target`. One with the same length and time is not copied again."""
    length_and_time = lambda path: (path.stat().st_size, int(path.stat().st_mtime))
    for name in names:
        a, b = source / name, target / name
        if not b.is_file() or length_and_time(a) != length_and_time(b):
            log(f"copying {a}")
            shutil.copy2(a, b)  # the time is set last, so an interrupted copy is made again


# ---- Model and data: ask the hub first, return the function that fetches ---------------------------------------------
def files_of_the_model(names, value):
    """Of the file names of a model those that a run reads. Raises InputError if it has no weights as safetensors."""
    names = [name for name in names if "/" not in name]
    if "model.safetensors" in names:
        weights = ["model.safetensors"]
    elif INDEX in names:
        weights = [INDEX, *fnmatch.filter(names, "model?*-of-*.safetensors")]
    else:
        why = "has no model.safetensors (other formats, such as pytorch_model.bin, are not loaded)"
        raise InputError(f"MODEL_NAME={value!r}: {why}; choose another model")
    wanted = lambda name: any(fnmatch.fnmatch(name, pattern) for pattern in CONFIGURATION_AND_TOKENIZER)
    return [*weights, *filter(wanted, names)]


def model_from_hub(value, target, folder):
    from huggingface_hub import HfApi, snapshot_download

    info = HfApi().model_info(value, files_metadata=True, timeout=ONLINE_TIMEOUT)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings}
    names = files_of_the_model(sorted(sizes), value)
    needed = sum(sizes[name] for name in names if not (target / name).exists())
    if needed > shutil.disk_usage(folder).free:  # a quota is not seen here; it shows when it is reached
        why = f"{value} needs {needed / 1e6:.1f} MB, the disk has {free(folder)}"
        raise InputError(f"FOLDER={str(folder)!r}: {why}; give a folder on another disk")

    def fetch():
        log(f"fetching {value} ({needed / 1e6:.1f} MB)")
        snapshot_download(value, revision=info.sha, local_dir=target, allow_patterns=names, etag_timeout=ONLINE_TIMEOUT)
        shutil.rmtree(target / ".cache", ignore_errors=True)

    return fetch


def data_from_hub(value, target, folder):
    from huggingface_hub import HfApi

    HfApi().dataset_info(value, timeout=ONLINE_TIMEOUT)

    def fetch():
        from datasets import load_dataset

        for split, name in SQUAD_FILES.items():
            log(f"fetching {value} {split}")
            questions = load_dataset(value, split=split)  # as the search would
            try:
                text = json.dumps(squad_json(questions), ensure_ascii=False)
            except (LookupError, TypeError, AttributeError, ValueError) as error:
                reason = f"{type(error).__name__}: {error}"
                raise InputError(f"SQUAD_DATA={value!r} ({split}): a row is not of SQuAD v1.1 ({reason}); "
                                     f"give {hpo.VARIABLES['SQUAD_DATA'][0]}, or another of that form") from None
            (target / name).write_text(text, encoding="utf-8")
            log(f"wrote {len(questions)} questions to {target / name}")

    return fetch


def squad_json(rows):
    """Rows of the hub's form as SQuAD v1.1 JSON, in order: a new title starts an article, a context a paragraph."""
    question = lambda row: {"id": row.get("id"), "question": row["question"], "answers": answers_of(row)}
    return {"version": "1.1", "data": [
        {"title": title, "paragraphs": [
            {"context": context, "qas": list(map(question, asked))}
            for context, asked in groupby(article, key=lambda row: row["context"])]}
        for title, article in groupby(rows, key=lambda row: row.get("title", ""))]}  # fmt: skip


def answers_of(row):
    """{"text": [...], "answer_start": [...]} as [{"text": ..., "answer_start": ...}]."""
    if not row["answers"]["text"]:
        raise LookupError("a question without an answer")
    return [dict(zip(row["answers"], values, strict=True)) for values in zip(*row["answers"].values(), strict=True)]


def check_model(target):
    """Raises InputError if weights are missing or cut short."""
    from safetensors import safe_open

    try:
        names = ["model.safetensors"]
        if not (target / names[0]).exists():
            names = sorted(set(json.loads((target / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        for name in names:
            with safe_open(target / name, framework="numpy") as file:  # compares the header with the file's length
                file.keys()
    except Exception as error:  # noqa: BLE001  the library has an exception of its own, derived from none
        why = f"the weights are not complete ({one_line(error)})"
        raise InputError(f"MODEL_NAME={str(target)!r}: {why}; remove this folder and fetch them again") from None


# ---- Main ------------------------------------------------------------------------------------------------------------
def main():
    """Returns the exit status: 0 all is in the folder, 2 something is wrong (one line each)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "data", "folder"):
        parser.add_argument(name, metavar=name.upper())
    a = parser.parse_args()
    folder = Path(a.folder).resolve()
    # What libraries keep on the way goes there too: home folders have small quotas.
    kept = {"HF_HUB_CACHE": "hub", "HF_DATASETS_CACHE": "datasets", "HF_XET_CACHE": "xet"}
    os.environ |= {name: f"{folder}/.cache/{where}" for name, where in kept.items()}
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    if not sys.stderr.isatty():
        os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    try:
        import huggingface_hub  # noqa: F401
    except ImportError as error:
        print(f"ERROR: {sys.executable} has no package {error.name}; run: bash scripts/setup_env.sh", file=sys.stderr)
        return 2
    problems, plans = [], []
    for variable, value, kind, from_hub in (
        ("MODEL_NAME", a.model, "models", model_from_hub),
        ("SQUAD_DATA", a.data, "data", data_from_hub),
    ):
        with told_in(problems, variable, value, folder):
            target, complete = place(value, folder / kind)
            if complete:
                log(f"{value} is in {target} already")
                fetch = None
            elif os.path.isabs(value):
                model = variable == "MODEL_NAME"
                names = files_of_the_model(os.listdir(value), value) if model else SQUAD_FILES.values()
                fetch = partial(copy, Path(value), names, target)
            else:
                fetch = from_hub(value, target, folder)
            plans.append((variable, value, target, fetch))
    for variable, value, target, fetch in plans:
        if problems:
            break
        with told_in(problems, variable, value, folder):
            if fetch:
                mark(target, value, complete=False)
                fetch()
                mark(target, value, complete=True)
    targets = [str(target) for _, _, target, _ in plans]
    if not problems:
        with told_in(problems, "MODEL_NAME", a.model, folder):
            check_model(Path(targets[0]))
            environ = os.environ | dict(zip(("MODEL_NAME", "SQUAD_DATA"), targets, strict=True))
            hpo.load_squad(check_inputs.check(environ))  # the tokenizer is loaded, the questions are drawn
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    if problems:
        print(*(f"ERROR: {line}" for line in dict.fromkeys(problems)), sep="\n", file=sys.stderr)
        return 2
    print(*targets, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
