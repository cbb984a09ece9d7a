"""The embedded demo: valid SQuAD, a model that loads, the same each time; no file is lost."""

import json
import os
import shutil
import signal
import subprocess
import sys

import torch
from conftest import REPO, call, load_module
from transformers import AutoModelForCausalLM, AutoTokenizer

SCRIPT = REPO / "scripts/demo_assets.py"


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_data_are_valid_squad_without_overlap(demo):
    rows = {}
    for split in ("train", "dev"):
        document = json.loads((demo / f"squad/{split}-v1.1.json").read_text(encoding="utf-8"))
        assert document["version"] == "1.1" and all(page["title"] for page in document["data"])
        paragraphs = [paragraph for page in document["data"] for paragraph in page["paragraphs"]]
        rows[split] = [(each["context"], qa["question"], qa["answers"][0]["text"], qa["answers"][0]["answer_start"],
                        qa["id"]) for each in paragraphs for qa in each["qas"]]  # fmt: skip
    train, dev = rows.values()
    assert len(train) == 1000 and len(dev) == 100
    for context, question, answer, start, _ in train + dev:
        assert context[start : start + len(answer)] == answer
        assert context.count(answer) == 1  # not by chance inside another word
        assert 1 <= len(answer.split()) <= 3 and question.endswith("?") and question.count("?") == 1
    assert len({row[4] for row in train + dev}) == len({row[:2] for row in train + dev}) == 1100
    assert not {row[0] for row in train} & {row[0] for row in dev}
    assert not {row[1] for row in train} & {row[1] for row in dev}  # other wordings
    assert {row[2] for row in dev} <= {row[2] for row in train}  # known facts


def test_model_and_tokenizer_fit_together(demo):
    tokenizer = AutoTokenizer.from_pretrained(demo / "model")
    model = AutoModelForCausalLM.from_pretrained(demo / "model")
    assert model.config.model_type == "bloom" and model.config.vocab_size == len(tokenizer) <= 2048
    for both in (model.config, tokenizer):
        assert (both.bos_token_id, both.eos_token_id, both.pad_token_id) == (1, 2, 3)
    long = tokenizer("a " * 900, return_tensors="pt")  # no limit on the length
    assert torch.isfinite(model(**long).logits).all()
    for text in ("", "  two  blanks , and a . stop \n\n\ttab", "Zürich, Αθήνα, 서울 مرحبا 👩‍🚀", "x\x00\u200b", "</s"):
        ids = tokenizer(text)["input_ids"]  # any text comes back, and has no special token
        assert tokenizer.decode(ids) == text and not set(ids) & {0, 1, 2, 3}
    english = "The university was established during the century, and became the largest in the east."
    assert len(tokenizer(english)["input_ids"]) < len(english) / 2.5  # not cut into letters


def test_made_again_it_is_the_same_and_a_new_version_replaces_it(demo, tmp_path):
    script, out = tmp_path / "demo_assets.py", tmp_path / "deep/er/demo"
    shutil.copy(SCRIPT, script)
    subprocess.run([sys.executable, script, out], check=True, capture_output=True, umask=0o022)
    assert content(out) == content(demo)  # byte for byte, by another process
    assert {oct(path.stat().st_mode & 0o777) for path in out.rglob("*")} == {"0o644", "0o755"}  # a group can share it
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert "nothing to do" in call(load_module(script), out).stdout
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    (out / "squad/dev-v1.1.json").unlink()
    script.write_text(script.read_text().replace("A new map of", "An old map of"))
    assert call(load_module(script), out).returncode == 0
    assert all("An old map of" in (out / f"squad/{split}-v1.1.json").read_text() for split in ("train", "dev"))
    assert list(out.parent.iterdir()) == [out]  # nothing temporary is left


def test_it_destroys_nothing_that_it_did_not_make(demo, tmp_path):
    folder, mine = tmp_path / "folder", tmp_path / "mine"
    folder.mkdir()
    shutil.copytree(demo, mine)
    thesis, edited = folder / "thesis.txt", mine / "squad/dev-v1.1.json"
    thesis.write_text("precious")
    edited.write_text("edited")
    before = content(tmp_path)
    for out, file in ((thesis, thesis), (folder, thesis), (mine, edited)):
        run = call(load_module(SCRIPT), out)
        assert run.returncode == 1 and run.stderr.startswith(f"ERROR: {file} is not as this script makes it; ")
    assert content(tmp_path) == before


def test_interrupted_it_leaves_nothing(tmp_path, monkeypatch):
    script = load_module(SCRIPT)  # in the midst of it: the model is made, the data are not
    monkeypatch.setattr(script, "make_squad", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    assert call(script, tmp_path / "here/demo").returncode == 130
    assert not list((tmp_path / "here").iterdir())
