#!/usr/bin/env python3
"""Puts a model into FOLDER/models and a data set into FOLDER/data. scripts/prefetch.sh calls this.

    python scripts/prefetch.py MODEL DATA FOLDER    # MODEL, DATA: a Hugging Face hub id, or a local folder, which stays

Of a model only what a run reads is taken: weights as safetensors, configuration, tokenizer. A data set of the hub is
written as train-v1.1.json and dev-v1.1.json, with its questions in the hub's order, so that a seed draws the same ones.
Prints the two folders on stdout. Exit status 2: one line for each thing that is wrong.
"""

import json
import os
import shutil
import sys
from itertools import groupby
from pathlib import Path

import rooms  # noqa: F401
from check_inputs import HUB_SECONDS, check_rows, lesson, told, weights_of

MARK = ".complete"  # in each folder whose files are all there
CONFIGURATION_AND_TOKENIZER = [
    "config.json", "generation_config.json", "tokenizer*.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.*", "vocab.json", "vocab.txt", "merges.txt", "*.model"]  # fmt: skip


def fetch_model(source, target):
    from huggingface_hub import HfApi, snapshot_download

    info = HfApi().model_info(source, timeout=HUB_SECONDS)
    wanted = weights_of([file.rfilename for file in info.siblings]) + CONFIGURATION_AND_TOKENIZER
    snapshot_download(source, revision=info.sha, local_dir=target, allow_patterns=wanted, ignore_patterns="*/*",
                      etag_timeout=HUB_SECONDS)  # fmt: skip
    shutil.rmtree(target / ".cache", ignore_errors=True)


def fetch_data(source, target):
    from datasets import load_dataset
    from huggingface_hub import HfApi

    HfApi().dataset_info(source, timeout=HUB_SECONDS)  # in time; load_dataset tries again and again
    target.mkdir(parents=True, exist_ok=True)
    for split, name in (("train", "train-v1.1.json"), ("validation", "dev-v1.1.json")):
        rows = check_rows(load_dataset(source, split=split).to_list())
        (target / name).write_text(json.dumps(squad_json(rows), ensure_ascii=False), encoding="utf-8")


def squad_json(rows):
    """Rows of the hub's form as SQuAD v1.1 JSON, in order; neighbours with one context become one paragraph."""
    answers = lambda row: [{"text": text} for text in lesson.answers(row)]
    question = lambda row: {"id": row.get("id"), "question": row["question"], "answers": answers(row)}
    paragraphs = [{"context": context, "qas": list(map(question, asked))}
                  for context, asked in groupby(rows, key=lambda row: row["context"])]  # fmt: skip
    return {"version": "1.1", "data": [{"title": "", "paragraphs": paragraphs}]}


def main():
    model, data, folder = sys.argv[1:]
    folder = Path(folder).absolute()
    # What libraries keep on the way goes there too: home folders have small quotas.
    kept = {"HF_HUB_CACHE": "hub", "HF_DATASETS_CACHE": "datasets", "HF_XET_CACHE": "xet"}
    os.environ |= {name: f"{folder}/.cache/{where}" for name, where in kept.items()}
    if not sys.stderr.isatty():
        os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    problems, targets = [], []
    for variable, source, kind, fetch in (
        ("MODEL_NAME", model, "models", fetch_model),
        ("SQUAD_DATA", data, "data", fetch_data),
    ):
        with told(problems, variable, source):
            target = Path(source) if os.path.isabs(source) else folder / kind / source.replace("/", "--")
            targets.append(target)
            if not os.path.isabs(source) and not (target / MARK).exists():
                print(f"fetching {source}", file=sys.stderr)
                fetch(source, target)
                (target / MARK).touch()
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    if problems:
        print(*(f"ERROR: {line}" for line in problems), sep="\n", file=sys.stderr)
        return 2
    print(*targets, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
