#!/usr/bin/env python3
"""Puts a model into FOLDER/models and a data set into FOLDER/data. scripts/prefetch.sh calls this.

    python scripts/prefetch.py MODEL DATA FOLDER       # MODEL, DATA: a Hugging Face hub id or a local folder

Of a model only what a run reads is taken: weights as safetensors, configuration, tokenizer. A data set of the hub is
written as train-v1.1.json and dev-v1.1.json, with its questions in the hub's order, so that a seed draws the same ones.
Prints the two folders on stdout. Exit status 2: one line for each thing that is wrong.
"""

import argparse
import filecmp
import fnmatch
import json
import os
import shutil
import sys
from itertools import groupby
from pathlib import Path

import rooms  # noqa: F401
from check_inputs import HUB_SECONDS, InputError, check_rows, files_of_data, told, weights_of

MARK = "prefetched.json"  # in each folder that is made here: where from, and whether it is complete
CONFIGURATION_AND_TOKENIZER = (
    "config.json", "generation_config.json", "tokenizer*.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.*", "vocab.json", "vocab.txt", "merges.txt", "*.model")  # fmt: skip
SQUAD_FILES = {"train": "train-v1.1.json", "validation": "dev-v1.1.json"}


def log(text):
    print(text, file=sys.stderr, flush=True)


def place(source, folder):
    """(target, complete): the folder in `folder` for `source`, and whether all of it is there."""
    folder.mkdir(exist_ok=True)
    if Path(source).parent == folder and (Path(source) / MARK).exists():  # what an earlier call has printed
        return Path(source), True
    target = folder / (Path(source).name if os.path.isabs(source) else source.replace("/", "--"))
    made = json.loads((target / MARK).read_text(encoding="utf-8")) if (target / MARK).exists() else {}
    if made.get("source") == source:
        return target, made["complete"] and not os.path.isabs(source)  # a local folder may have changed
    if target.exists() and any(target.iterdir()):
        raise InputError(f"{target} holds {made.get('source', 'other files')}; remove it, or give another folder")
    return target, False


def mark(target, source, complete):
    target.mkdir(exist_ok=True)
    (target / f"{MARK}.tmp").write_text(json.dumps({"source": source, "complete": complete}) + "\n", encoding="utf-8")
    os.replace(target / f"{MARK}.tmp", target / MARK)


def files_of_the_model(names):
    """Of the file names of a model those that a run reads. Raises InputError if it has no weights or tokenizer."""
    wanted = lambda name: any(fnmatch.fnmatch(name, pattern) for pattern in CONFIGURATION_AND_TOKENIZER)
    return [*weights_of(names), *(name for name in names if "/" not in name and wanted(name))]


def fetch_model(source, target):
    from huggingface_hub import HfApi, snapshot_download

    info = HfApi().model_info(source, files_metadata=True, timeout=HUB_SECONDS)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings}
    names = files_of_the_model(sorted(sizes))
    needed = sum(sizes[name] for name in names if not (target / name).exists())
    free = shutil.disk_usage(target.parent).free
    if needed > free:  # a quota is not seen here; it shows when it is reached
        raise InputError(f"needs {needed / 1e6:.1f} MB, the disk has {free / 1e6:.1f}; give a folder on another disk")
    mark(target, source, complete=False)
    log(f"fetching {source} ({needed / 1e6:.1f} MB)")
    snapshot_download(source, revision=info.sha, local_dir=target, allow_patterns=names, etag_timeout=HUB_SECONDS)
    shutil.rmtree(target / ".cache", ignore_errors=True)


def fetch_data(source, target):
    from datasets import load_dataset
    from huggingface_hub import HfApi

    HfApi().dataset_info(source, timeout=HUB_SECONDS)  # in time; load_dataset tries again and again
    mark(target, source, complete=False)
    for split, name in SQUAD_FILES.items():
        log(f"fetching {source} {split}")
        rows = check_rows(load_dataset(source, split=split).to_list())
        (target / name).write_text(json.dumps(squad_json(rows), ensure_ascii=False), encoding="utf-8")


def squad_json(rows):
    """Rows of the hub's form as SQuAD v1.1 JSON, in order; neighbours with one context become one paragraph."""
    answers = lambda row: [{"text": text} for text in row["answers"]["text"]]
    question = lambda row: {"id": row.get("id"), "question": row["question"], "answers": answers(row)}
    paragraphs = [{"context": context, "qas": list(map(question, asked))}
                  for context, asked in groupby(rows, key=lambda row: row["context"])]  # fmt: skip
    return {"version": "1.1", "data": [{"title": "", "paragraphs": paragraphs}]}


def copy(source, names, target):
    """The files `names` of a local folder. One with the same length and time is not copied again."""
    mark(target, str(source), complete=False)
    for name in names:
        if not (target / name).is_file() or not filecmp.cmp(source / name, target / name):
            log(f"copying {source / name}")
            shutil.copy2(source / name, target / name)  # the time is set last, so an interrupted copy is made again


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "data", "folder"):
        parser.add_argument(name, metavar=name.upper())
    a = parser.parse_args()
    folder = Path(a.folder).absolute()
    # What libraries keep on the way goes there too: home folders have small quotas.
    kept = {"HF_HUB_CACHE": "hub", "HF_DATASETS_CACHE": "datasets", "HF_XET_CACHE": "xet"}
    os.environ |= {name: f"{folder}/.cache/{where}" for name, where in kept.items()}
    if not sys.stderr.isatty():
        os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    problems, targets = [], []
    for variable, source, kind, fetch in (
        ("MODEL_NAME", a.model, "models", fetch_model),
        ("SQUAD_DATA", a.data, "data", fetch_data),
    ):
        with told(problems, variable, source):
            target, complete = place(source, folder / kind)
            targets.append(str(target))
            if complete:
                log(f"{source} is in {target} already")
                continue
            if not os.path.isabs(source):
                fetch(source, target)
            elif kind == "models":
                copy(Path(source), files_of_the_model(os.listdir(source)), target)
            else:
                copy(Path(source), files_of_data(source), target)
            mark(target, source, complete=True)
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    if problems:
        print(*(f"ERROR: {line}" for line in problems), sep="\n", file=sys.stderr)
        return 2
    print(*targets, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
