#!/usr/bin/env python3
"""Puts one model and one data set into FOLDER, each in a folder of its own there. scripts/prefetch.sh calls this.

    python scripts/prefetch.py MODEL DATA FOLDER       # MODEL, DATA: a Hugging Face hub id or a local folder

Of a model only what a run reads is taken: weights as safetensors, configuration, tokenizer. A data set of the hub is
written as train-v1.1.json and dev-v1.1.json, with its questions in the hub's order, so that a seed draws the same ones.
Prints the two folders on stdout. Exit status 2: one line for each thing that is wrong.
"""

import argparse
import errno
import fnmatch
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

SEARCH_SCRIPT = Path(__file__).resolve().parent / "raytune_hpo/raytune_asha_scheduler/raytune_asha_hpo.py"
MARK = "prefetched.json"  # in each folder that is made here: where from, and whether it is complete
CONFIGURATION_AND_TOKENIZER = (
    "config.json", "generation_config.json", "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "chat_template.*",
    "vocab.json", "vocab.txt", "merges.txt", "*.model")  # fmt: skip
INDEX = "model.safetensors.index.json"  # of weights in several files
SQUAD_FILES = {"train": "train-v1.1.json", "validation": "dev-v1.1.json"}
ONLINE_TIMEOUT = 20  # seconds, to find out whether the hub can be reached


def load_search_script():
    """raytune_asha_hpo.py as a module: its checks and its way to read the data are used here."""
    spec = importlib.util.spec_from_file_location("raytune_asha_hpo", SEARCH_SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hpo = load_search_script()


def log(text):
    print(text, file=sys.stderr, flush=True)


# ---- What can go wrong, in one line ----------------------------------------------------------------------------------
def explain(variable, value, error, folder):
    """The InputError to raise when `value` could not be brought into `folder`."""
    from huggingface_hub import errors

    chain = [error]
    while chain[-1].__cause__ or chain[-1].__context__:
        chain.append(chain[-1].__cause__ or chain[-1].__context__)
    status = next((e.response.status_code for e in chain if isinstance(e, errors.HfHubHTTPError) and e.response is not None), None)
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    name = f"{variable}={value!r}"
    if any(getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT) for e in chain) or "Not enough disk space" in str(error):
        return hpo.InputError(f"FOLDER={str(folder)!r}: the disk is full, or your quota is reached ({free(folder)}); give a folder on another disk")
    if any(isinstance(e, errors.OfflineModeIsEnabled) for e in chain):
        return hpo.InputError(f"HF_HUB_OFFLINE={os.environ.get('HF_HUB_OFFLINE', '')!r}: the hub is switched off; run: unset HF_HUB_OFFLINE")
    if any(isinstance(e, errors.GatedRepoError) for e in chain):
        return hpo.InputError(f"{name}: the hub gives it only to users who have accepted its terms; do so on {hub}/{value}, then: hf auth login")
    if any(isinstance(e, errors.RepositoryNotFoundError) for e in chain) or status in (401, 404):
        return hpo.InputError(f"{name}: the hub has nothing public of this name; check the spelling (for a private one: hf auth login)")
    if status:
        return hpo.InputError(f"{name}: the hub answers with HTTP status {status}; try again later")
    text = " ".join(str(chain[-1]).split())[:200]
    if any(type(e).__name__ in ("ConnectError", "ConnectTimeout", "ReadTimeout", "ReadError", "RemoteProtocolError", "ProxyError", "ConnectionError")
           for e in chain):
        return hpo.InputError(f"{name}: {hub} cannot be reached from this machine ({text}); use a login node that can, or set HTTPS_PROXY to your site's proxy")
    return hpo.InputError(f"{name}: cannot be fetched: {type(error).__name__}: {' '.join(str(error).split())[:200]}")


def free(folder):
    return f"{shutil.disk_usage(folder).free / 1e9:.1f} GB free"


def check_space(folder, needed, what):
    """Raises InputError if `needed` bytes do not fit. A quota is not seen here; it shows when it is reached."""
    if needed > shutil.disk_usage(folder).free:
        raise hpo.InputError(f"FOLDER={str(folder)!r}: {what} needs {needed / 1e9:.1f} GB, the disk has {free(folder)}; give a folder on another disk")


# ---- Folders ---------------------------------------------------------------------------------------------------------
def place(source, folder):
    """(target, complete): the folder in `folder` for `source`, and whether all of it is there. Raises InputError if others use it."""
    target = folder / (Path(source).name if os.path.isabs(source) else source.replace("/", "--"))
    try:
        mark = json.loads((target / MARK).read_text(encoding="utf-8"))
        if mark["source"] == source:
            return target, bool(mark["complete"])
        holds = f"holds {mark['source']}"
    except FileNotFoundError:
        if not target.exists() or (target.is_dir() and not any(target.iterdir())):
            return target, False
        holds = "was not made by this script"
    except (OSError, ValueError, KeyError, TypeError):
        holds = f"has a {MARK} that cannot be read"
    raise hpo.InputError(f"FOLDER={str(folder)!r}: {target.name} in it {holds}; remove it, or give another folder")


def mark(target, source, complete, **more):
    target.mkdir(exist_ok=True)
    (target / f"{MARK}.tmp").write_text(json.dumps({"source": source, "complete": complete} | more) + "\n", encoding="utf-8")
    os.replace(target / f"{MARK}.tmp", target / MARK)


def copy_folder(source, names, target, folder):
    """The files `names` of the folder `source` into `target`, which then holds these and no other."""
    changed = [n for n in names if not same(source / n, target / n)]
    check_space(folder, sum((source / name).stat().st_size for name in changed), source)
    mark(target, str(source), complete=False)
    for name in changed:
        log(f"copying {source / name}")
        shutil.copy2(source / name, target / f"{name}.tmp")
        os.replace(target / f"{name}.tmp", target / name)
    for path in target.iterdir():
        if path.name not in (*names, MARK):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    mark(target, str(source), complete=True)


def same(a, b):
    return b.is_file() and (a.stat().st_size, int(a.stat().st_mtime)) == (b.stat().st_size, int(b.stat().st_mtime))


# ---- Model -----------------------------------------------------------------------------------------------------------
def files_of_the_model(names, value):
    """Of the file names of a model those that a run reads. Raises InputError if it has no weights as safetensors."""
    if "model.safetensors" in names:
        weights = ["model.safetensors"]
    elif INDEX in names:
        weights = [INDEX, *fnmatch.filter(names, "model-*.safetensors")]
    else:
        raise hpo.InputError(f"MODEL_NAME={value!r}: has no model.safetensors (other formats, such as pytorch_model.bin, are not loaded); choose another model")
    return weights + [name for name in names if "/" not in name and any(fnmatch.fnmatch(name, p) for p in CONFIGURATION_AND_TOKENIZER)]


def fetch_model(value, target, folder, info):
    """The files of the model `value` of the hub, as `info` lists them. A file that is there is not fetched again."""
    from huggingface_hub import hf_hub_download

    sizes = {file.rfilename: file.size or 0 for file in info.siblings}
    names = files_of_the_model(sorted(sizes), value)
    missing = sum(sizes[name] for name in names if not (target / name).exists())
    check_space(folder, missing, value)
    mark(target, value, complete=False)
    for name in names:
        log(f"fetching {value} {name} ({sizes[name] / 1e6:.1f} MB)")
        hf_hub_download(value, name, revision=info.sha, local_dir=target, etag_timeout=ONLINE_TIMEOUT)
    shutil.rmtree(target / ".cache", ignore_errors=True)
    mark(target, value, complete=True, revision=info.sha)


def check_model(target):
    """Raises InputError if weights are missing or cut short, or configuration and tokenizer cannot be loaded."""
    from safetensors import safe_open

    try:
        names = ["model.safetensors"]
        if not (target / names[0]).exists():
            names = sorted(set(json.loads((target / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        for name in names:
            with safe_open(target / name, framework="numpy") as file:  # compares the header with the file's length
                file.keys()
    except Exception as error:  # noqa: BLE001  the library has an exception of its own, derived from none
        raise hpo.InputError(f"MODEL_NAME={str(target)!r}: the weights are not complete ({' '.join(str(error).split())[:200]}); remove this folder and fetch them again") from None


# ---- Data ------------------------------------------------------------------------------------------------------------
def squad_json(rows):
    """Rows of the hub's form as SQuAD v1.1 JSON, in their order: articles and paragraphs begin where title or context change."""
    articles = []
    for row in rows:
        title, context, answers = row.get("title", ""), row["context"], row["answers"]
        starts = answers.get("answer_start") or [None] * len(answers["text"])
        if not answers["text"]:
            raise LookupError("a question without an answer")
        if not articles or articles[-1]["title"] != title:
            articles.append({"title": title, "paragraphs": []})
        paragraphs = articles[-1]["paragraphs"]
        if not paragraphs or paragraphs[-1]["context"] != context:
            paragraphs.append({"context": context, "qas": []})
        paragraphs[-1]["qas"].append({
            "id": row.get("id"), "question": row["question"],
            "answers": [{"text": text, "answer_start": start} for text, start in zip(answers["text"], starts, strict=True)]})  # fmt: skip
    return {"version": "1.1", "data": articles}


def fetch_data(value, target, folder):
    """The two splits of the data set `value` of the hub, as the search would load them, written as JSON."""
    from datasets import load_dataset

    mark(target, value, complete=False)
    for split, name in SQUAD_FILES.items():
        log(f"fetching {value} {split}")
        questions = load_dataset(value, split=split)
        try:
            text = json.dumps(squad_json(questions), ensure_ascii=False)
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise hpo.InputError(f"SQUAD_DATA={value!r} ({split}): a row is not of SQuAD v1.1 ({type(error).__name__}: {error}); "
                                 f"give {hpo.VARIABLES['SQUAD_DATA'][0]}, or another of that form") from None
        (target / f"{name}.tmp").write_text(text, encoding="utf-8")
        os.replace(target / f"{name}.tmp", target / name)
        log(f"wrote {len(questions)} questions to {target / name}")
    mark(target, value, complete=True)


# ---- Main ------------------------------------------------------------------------------------------------------------
def main():
    """Returns the exit status: 0 all is in the folder, 2 something is wrong (one line each)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "data", "folder"):
        parser.add_argument(name, metavar=name.upper())
    a = parser.parse_args()
    folder = Path(a.folder).resolve()
    # What libraries keep on the way goes there too: home folders have small quotas.
    os.environ |= {"HF_HUB_CACHE": f"{folder}/.cache/hub", "HF_DATASETS_CACHE": f"{folder}/.cache/datasets"}
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.utils import disable_progress_bars
    except ImportError as error:
        print(f"ERROR: {sys.executable} has no package {error.name}; run: bash scripts/setup_env.sh", file=sys.stderr)
        return 2
    if not sys.stderr.isatty():
        disable_progress_bars()
    problems, jobs, targets = [], [], []
    api = HfApi()
    for variable, value, ask in (("MODEL_NAME", a.model, api.model_info), ("SQUAD_DATA", a.data, api.dataset_info)):
        try:  # all that can be known at once, before the first gigabyte
            source = Path(value)
            if not os.path.isabs(value):
                target, complete = place(value, folder)
                info = None if complete else ask(value, files_metadata=True, timeout=ONLINE_TIMEOUT)
                jobs.append((variable, value, target, None if complete else info))
                if complete:
                    log(f"{value} is in {target} already")
            elif source.parent == folder and (source / MARK).exists():
                target = source
            else:
                target, _ = place(value, folder)
                names = files_of_the_model(os.listdir(source), value) if variable == "MODEL_NAME" else [*SQUAD_FILES.values()]
                copy_folder(source, names, target, folder)
            targets.append(target)
        except hpo.InputError as error:
            problems.append(str(error))
        except Exception as error:  # noqa: BLE001  so many libraries, so many kinds
            problems.append(str(explain(variable, value, error, folder)))
    try:
        for variable, value, target, info in jobs if not problems else []:
            if info is not None:
                try:
                    fetch_model(value, target, folder, info) if variable == "MODEL_NAME" else fetch_data(value, target, folder)
                except hpo.InputError:
                    raise
                except Exception as error:  # noqa: BLE001
                    raise explain(variable, value, error, folder) from None
        if not problems:
            check_model(targets[0])
            environ = os.environ | {"MODEL_NAME": str(targets[0]), "SQUAD_DATA": str(targets[1])}
            hpo.load_squad(hpo.read_settings(environ, look_into_folders=True))  # the tokenizer is loaded, the questions are drawn
    except hpo.InputError as error:
        problems += str(error).splitlines()
    finally:
        shutil.rmtree(folder / ".cache", ignore_errors=True)
    if problems:
        print(*(f"ERROR: {line}" for line in dict.fromkeys(problems)), sep="\n", file=sys.stderr)
        return 2
    print(*targets, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
