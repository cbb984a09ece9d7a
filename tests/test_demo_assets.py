"""The embedded demo: valid SQuAD, a model that loads and learns, the same for a seed; no file is lost."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter

import pytest
import torch
from conftest import REPO, call, load_module
from transformers import AutoModelForCausalLM, AutoTokenizer

SCRIPT = REPO / "scripts/demo_assets.py"
SMALL = ["--train", "21", "--dev", "5", "--seed", "1"]


def make(*arguments):
    return call(load_module(SCRIPT), *arguments)


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def questions(folder, split):
    """(context, question, answer, answer_start, id) for each question of a file."""
    document = json.loads((folder / f"squad/{split}-v1.1.json").read_text(encoding="utf-8"))
    assert document["version"] == "1.1" and all(page["title"] for page in document["data"])
    return [
        (
            paragraph["context"],
            qa["question"],
            qa["answers"][0]["text"],
            qa["answers"][0]["answer_start"],
            qa["id"],
        )
        for page in document["data"]
        for paragraph in page["paragraphs"]
        for qa in paragraph["qas"]
    ]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small demo in a folder whose parent is made too; tests do not change it."""
    folder = tmp_path_factory.mktemp("small") / "deep/er/demo"
    run = make(folder, *SMALL)
    assert run.returncode == 0, run.stderr
    assert 2 <= len(run.stdout.splitlines()) <= 4 and "21 train and 5 dev" in run.stdout and run.stderr == ""
    return folder


def test_data_are_valid_squad_without_overlap(demo):
    train, dev = questions(demo, "train"), questions(demo, "dev")
    assert (len(train), len(dev)) == (1000, 100)
    for context, question, answer, start, _ in train + dev:
        assert context[start : start + len(answer)] == answer
        assert context.count(answer) == 1  # not by chance inside another word
        assert 1 <= len(answer.split()) <= 3 and question.endswith("?") and question.count("?") == 1
        assert 3 <= context.count(". ") + 1 <= 4
    assert len({row[4] for row in train + dev}) == 1100
    assert len({row[:2] for row in train + dev}) == 1100
    assert not {row[0] for row in train} & {row[0] for row in dev}
    assert not {row[1] for row in train} & {row[1] for row in dev}  # other wordings
    assert {row[2] for row in dev} <= {row[2] for row in train}  # known facts


def test_model_and_tokenizer_fit_together(demo):
    tokenizer = AutoTokenizer.from_pretrained(demo / "model")
    model = AutoModelForCausalLM.from_pretrained(demo / "model")
    config = model.config
    assert config.model_type == "bloom" and config.vocab_size == len(tokenizer) <= 2048
    special = (tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    assert special == ("<unk>", "<s>", "</s>", "<pad>")
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 3)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 3)
    lengths = [len(tokenizer(f"{row[0]} {row[1]} {row[2]}")["input_ids"]) for row in questions(demo, "train")]
    assert max(lengths) < 80
    long = tokenizer("a " * 900, return_tensors="pt")  # no limit on the length
    assert torch.isfinite(model(**long).logits).all()


def test_tokenizer_gives_any_text_back(demo):
    tokenizer = AutoTokenizer.from_pretrained(demo / "model")
    for text in (
        "", " ", "  two  blanks , and a . stop \n\n\ttab", "Zürich, Αθήνα, Москва",
        "北京 東京 서울", "مرحبا שלום",
        "👩‍🚀🌍 1,234.5 €", "x\x00y\u200b\ufffd", "e\u0301 and \u00e9", "the cat's 'n' \"dogs'\"",
        "</s", "Context: a\nQuestion: b\nAnswer: c",
    ):  # fmt: skip
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert not set(ids) & {0, 1, 2, 3}, text


def test_tokenizer_does_not_cut_ordinary_english_into_letters(demo):
    text = "The university was established during the nineteenth century, and became the largest in the east."
    assert len(AutoTokenizer.from_pretrained(demo / "model")(text)["input_ids"]) < len(text) / 2.5


def test_incomplete_it_is_made_again_byte_for_byte_by_another_process(small, tmp_path):
    out = tmp_path / "demo"
    shutil.copytree(small, out)
    (out / "squad/dev-v1.1.json").unlink()
    subprocess.run([sys.executable, SCRIPT, out, *SMALL], check=True, capture_output=True, umask=0o022)
    assert content(out) == content(small)
    modes = {oct(path.stat().st_mode & 0o777) for path in out.rglob("*")}
    assert modes == {"0o644", "0o755"}  # a group can share it
    assert list(tmp_path.iterdir()) == [out]  # nothing temporary is left


def test_other_options_replace_it_and_another_seed_makes_other_texts(small, tmp_path):
    out = tmp_path / "demo"
    shutil.copytree(small, out)
    assert make(out, "--train", "21", "--dev", "4", "--seed", "2").returncode == 0
    assert (len(questions(out, "train")), len(questions(out, "dev"))) == (21, 4)
    same = {name for name, data in content(small).items() if data == content(out)[name]}
    assert {"model/model.safetensors", "model/tokenizer.json"} <= same
    assert not same & {"squad/train-v1.1.json", "squad/dev-v1.1.json", "demo.json"}
    assert list(tmp_path.iterdir()) == [out]


def test_second_call_does_nothing(small):
    before = {path: path.stat().st_mtime_ns for path in small.rglob("*")}
    again = make(small, *SMALL)
    assert again.returncode == 0 and "nothing to do" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in small.rglob("*")} == before


def refused(*arguments):
    """The one line with which a call is refused."""
    run = make(*arguments)
    assert run.returncode == 2 and run.stdout == "", run.stdout
    (line,) = run.stderr.splitlines()
    assert line.startswith("ERROR: ")
    return line


def test_it_destroys_nothing_that_it_did_not_make(small, tmp_path):
    file, folder, mine = tmp_path / "file", tmp_path / "folder", tmp_path / "mine"
    file.write_text("precious")
    assert f"{file} is a file" in refused(file)
    assert "is a file" in refused(small / "demo.json") and str(file) in refused(file / "demo")
    folder.mkdir()
    (folder / "thesis.txt").write_text("precious")
    assert f"{folder} is not empty" in refused(folder)
    for stamp in ("", "[]", '{"options": 1}', '{"options": 1, "files": 2}', '{"options": 1, "files": []}'):
        (folder / "demo.json").write_text(stamp)
        assert str(folder) in refused(folder)
    assert (folder / "thesis.txt").read_text() == file.read_text() == "precious"

    shutil.copytree(small, mine)
    (mine / "notes.txt").write_text("precious")
    assert make(mine, *SMALL).returncode == 0  # still what these options make
    assert "notes.txt" in refused(mine, "--train", "3", "--dev", "1")
    (mine / "notes.txt").unlink()
    (mine / "squad/dev-v1.1.json").write_text("edited")
    assert "dev-v1.1.json" in refused(mine, *SMALL)
    assert (mine / "squad/dev-v1.1.json").read_text() == "edited"


def test_numbers_out_of_range_and_the_current_folder_are_refused(tmp_path, monkeypatch):
    for option, value in (
        ("--train", "0"),
        ("--dev", "-1"),
        ("--train", "20001"),
        ("--seed", "-1"),
        ("--seed", 2**32),
    ):
        said = refused(tmp_path / "demo", option, value)
        assert f"{option} {value} is out of range; give a number from" in said
    monkeypatch.chdir(tmp_path)
    assert "current folder" in refused(".")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_leaves_nothing(tmp_path, number):
    # In the midst of it: the process sends itself the signal when it has made a folder for the questions.
    (tmp_path / "sitecustomize.py").write_text(f"""
import os, sys
def hook(event, args):
    if event == "open" and str(args[0]).endswith("new/squad/train-v1.1.json"):
        os.kill(os.getpid(), {number})
sys.addaudithook(hook)
""")
    out = tmp_path / "here/demo"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, SCRIPT, out], env=environment, capture_output=True, timeout=120, check=False)
    assert done.returncode == 128 + number, done
    assert not list(out.parent.iterdir())


# ---- Learning: the exercise's objective in plain PyTorch, 240 train and 60 dev questions -------------------


class Task:
    """240 train and 60 dev questions as token ids, and training and evaluation on them."""

    def __init__(self, demo):
        self.folder = demo / "model"
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.train, self.dev = (self.sample(demo, split, n) for split, n in (("train", 240), ("dev", 60)))

    def sample(self, demo, split, n):
        """[(prompt ids, answer ids + eos)] of n questions."""
        rows = random.Random(0).sample(questions(demo, split), n)

        def ids(text):
            return self.tokenizer(text)["input_ids"]

        return [(ids(f"Context: {c}\nQuestion: {q}\nAnswer:"), [*ids(f" {a}"), 2]) for c, q, a, *_ in rows]

    def loss(self, model, rows):
        """Mean loss over the answer tokens of the rows, padded on the left."""
        width = max(len(p) + len(a) for p, a in rows)
        pad = [width - len(p) - len(a) for p, a in rows]
        ids = torch.tensor([[3] * n + p + a for n, (p, a) in zip(pad, rows, strict=True)])
        mask = torch.tensor([[0] * n + [1] * (width - n) for n in pad])
        labels = torch.tensor([[-100] * (width - len(a)) + a for _, a in rows])
        return model(input_ids=ids, attention_mask=mask, labels=labels).loss

    def run(self, lr, epochs):
        """The model trained in global batches of 4, and its dev loss before training and after each epoch."""
        model, order = AutoModelForCausalLM.from_pretrained(self.folder), random.Random(0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
        decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, epochs * len(self.train) // 4)
        losses = [self.evaluate(model)]
        for _ in range(epochs):
            rows = order.sample(self.train, len(self.train))
            for start in range(0, len(rows), 4):
                optimizer.zero_grad()
                self.loss(model, rows[start : start + 4]).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                decay.step()
            losses.append(self.evaluate(model))
        return model, losses

    @torch.no_grad()
    def evaluate(self, model):
        return self.loss(model, self.dev).item()

    def exact_match(self, model):
        """Share of dev questions that greedy decoding answers exactly."""
        right = 0
        for prompt, answer in self.dev:
            ids = torch.tensor([prompt])
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
            right += out[0, len(prompt) :].tolist() == answer
        return right / len(self.dev)

    def guessing(self):
        """(dev loss, exact match) of one who knows only how often each answer occurs in train and dev."""
        counts = Counter(tuple(answer) for _, answer in self.train + self.dev)
        total = sum(counts.values())
        loss = -sum(math.log(counts[tuple(answer)] / total) for _, answer in self.dev)
        return loss / sum(len(answer) for _, answer in self.dev), counts.most_common(1)[0][1] / total


def test_the_learning_rate_decides(demo):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # faster for so small a model
    try:
        task = Task(demo)
        model, good = task.run(3e-3, epochs=3)
        _, small = task.run(1e-5, epochs=1)
        _, large = task.run(1e-1, epochs=1)
        guess_loss, guess_match = task.guessing()
        assert abs(good[0] - math.log(len(task.tokenizer))) < 1  # untrained: chance
        assert good[3] < guess_loss / 2 and task.exact_match(model) > 0.5 > 5 * guess_match
        assert good[1] < 0.7 * min(small[1], large[1])  # seen after one epoch
    finally:
        torch.set_num_threads(threads)
