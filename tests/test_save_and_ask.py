"""From the best line to a model that answers: bloom_hpo_manual.py --save, and ask.py."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from types import SimpleNamespace

import ask
import pytest
import saved_model
import torch
from conftest import REPO, call, load_module
from transformers import AutoModelForCausalLM, AutoTokenizer

MANUAL, ASK = REPO / "scripts/manual_hpo/bloom_hpo_manual.py", load_module(REPO / "scripts/model/ask.py")


def train(scripts, demo, folder, *options, stage=2):
    """Trains by a copy of the scripts with this ZeRO stage -> what it printed."""
    shutil.copytree(REPO / "scripts", scripts, symlinks=True)
    config = scripts / "ds_config.json"
    config.write_text(config.read_text().replace('"stage": 2', f'"stage": {stage}'))
    variables = {"MODEL_NAME": demo / "model", "SQUAD_DATA": demo / "squad", "TRAIN_SAMPLES": 160, "EVAL_SAMPLES": 50,
                 "CPUS_PER_WORKER": 1, "TORCHDYNAMO_DISABLE": 1}  # fmt: skip
    environ = os.environ | {name: str(value) for name, value in variables.items()}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               scripts / "manual_hpo/bloom_hpo_manual.py", *options, "--save", folder]  # fmt: skip
    run = subprocess.run(command, env=environ, text=True, check=False, capture_output=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def kept(demo, tmp_path_factory):
    """(folder of a model, what its training printed)"""
    top = tmp_path_factory.mktemp("kept")
    (top / "model").mkdir()  # an older one gives way
    (top / "model/training.json").write_text("{}")
    printed = train(top / "scripts", demo, top / "model", "--lr", "1.2e-2", "--bs", "2", "--wd", "0")
    return top / "model", printed


def settings_of(folder):
    return SimpleNamespace(**json.loads((folder / "training.json").read_text())["settings"])


def loss_of(folder):
    """The mean over the answer tokens of the validation questions."""
    s = settings_of(folder)
    losses = ask.Model(folder).losses(ask.hpo.draw(ask.hpo.read_splits(s.SQUAD_DATA)[1], s.EVAL_SAMPLES, s.SEED))
    return sum(loss for loss, _ in losses) / sum(count for _, count in losses)


def test_a_kept_model_is_the_one_of_the_lowest_loss_and_complete(kept, demo, checks):
    folder, printed = kept
    losses = [float(loss) for loss in re.findall(r"eval_loss (\S+)", printed)]
    training = json.loads((folder / "training.json").read_text())
    assert len(losses) == 5 and training["eval_loss"] == pytest.approx(min(losses), abs=1e-5)
    assert loss_of(folder) == pytest.approx(min(losses), abs=1e-5)
    card = (folder / "README.md").read_text()
    assert f"base_model: {demo / 'model'}" in card and "lr 0.012, per_device_bs 2, wd 0.0" in card
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.float32
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o666 & ~saved_model.umask()}
    variables = {"MODEL_NAME": str(folder), "SQUAD_DATA": str(demo / "squad"), "EVAL_SAMPLES": "50"}
    assert checks.check(variables).MODEL_NAME == str(folder)  # another search can start from it


def test_kept_weights_are_whole_though_the_model_is_split(demo, tmp_path):
    out, options = tmp_path / "model", ("--lr", "1e-2", "--bs", "8", "--wd", "0", "--epochs", "1")
    printed = train(tmp_path / "scripts", demo, out, *options, stage=3)
    assert loss_of(out) == pytest.approx(float(re.search(r"RESULT .* eval_loss=(\S+)", printed)[1]), abs=1e-5)


# ---- Whole or not at all ---------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def base(demo):
    return AutoModelForCausalLM.from_pretrained(demo / "model", dtype=torch.float32)


def keep(folder, model, demo, limit=None):
    s = SimpleNamespace(MODEL_NAME=str(demo / "model"), SQUAD_DATA="x", TRAIN_SAMPLES=1, EVAL_SAMPLES=1, NUM_EPOCHS=1,
                        SEED=1, PRECISION="fp32", WORKERS_PER_TRIAL=1)  # fmt: skip
    with saved_model.NewModel(folder) as new:
        new.keep(model)
        if limit:
            limit()
        new.finish(s, {"hyperparameters": {"lr": 1}, "eval_loss": 1.0, "epoch": 1})


def test_a_full_disk_leaves_the_model_before_as_it_was(base, demo, tmp_path):
    keep(tmp_path / "model.before", base, demo)  # as one that was killed between two models leaves it
    keep(tmp_path / "model", base, demo)
    keep(tmp_path / "model", base, demo)
    before = {path: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    whole = resource.getrlimit(resource.RLIMIT_FSIZE)
    full = lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, whole[1]))
    for at_first in (True, False):  # the weights do not fit; the tokenizer does not
        try:
            if at_first:
                full(100_000)
            with pytest.raises(saved_model.InputError, match=f"--save='{tmp_path}/model': .*; the folder is as it was"):
                keep(tmp_path / "model", base, demo, None if at_first else lambda: full(1000))
        finally:
            full(whole[0])
        assert {path: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
        assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("error, raised", [
    (OSError(5, "Input/output error"), saved_model.InputError), (SystemExit(143), SystemExit)])  # the latter: scancel
def test_an_older_model_is_there_again_if_the_new_one_cannot_take_its_place(base, demo, tmp_path, monkeypatch, error,
                                                                            raised):  # fmt: skip
    keep(tmp_path / "model", base, demo)
    before, rename = (tmp_path / "model/training.json").read_text(), os.rename

    def fails(source, target):
        if os.path.basename(source).startswith(".model."):
            raise error
        rename(source, target)

    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(raised):
        keep(tmp_path / "model", base, demo)
    assert (tmp_path / "model/training.json").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_ends_a_training_leaves_no_part_of_a_model(base, tmp_path):
    with pytest.raises(SystemExit), saved_model.NewModel(tmp_path / "new/model") as new:
        new.keep(base)
        os.kill(os.getpid(), 15)
    assert list(tmp_path.glob("new/*")) == [] and list(tmp_path.glob("new/.*")) == []


def test_a_folder_with_other_things_and_one_that_cannot_be_written_are_refused(tmp_path, demo, monkeypatch):
    for name, value in (("MODEL_NAME", demo / "model"), ("SQUAD_DATA", demo / "squad")):
        monkeypatch.setenv(name, str(value))
    (tmp_path / "file").write_text("mine")
    for folder, why in ((tmp_path, "is there, and not a model that --save"), (tmp_path / "file/x", "File exists")):
        run = call(load_module(MANUAL), "--lr", "1e-3", "--bs", "1", "--wd", "0", "--save", folder)
        assert run.returncode == 2 and why in run.stderr and len(run.stderr.splitlines()) == 1, run.stderr


# ---- Questions that no trial has seen --------------------------------------------------------------------------------
def test_training_validation_and_test_questions_never_meet(tmp_path, hpo):
    """Also where a text occurs twice."""
    def article(name):
        ask_all = [{"question": f"{name} {i % 35}?", "answers": [{"text": str(i)}]} for i in range(40)]
        return {"paragraphs": [{"context": "The text.", "qas": ask_all}]}

    (tmp_path / "train-v1.1.json").write_text(json.dumps({"data": [article("seen")]}))
    (tmp_path / "dev-v1.1.json").write_text(json.dumps({"data": [article("new"), article("seen")]}))
    for seed in range(5):
        s = SimpleNamespace(SQUAD_DATA=str(tmp_path), TRAIN_SAMPLES=30, EVAL_SAMPLES=30, SEED=seed)
        splits = zip(hpo.read_splits(tmp_path), (s.TRAIN_SAMPLES, s.EVAL_SAMPLES), strict=True)
        seen = {row["question"] for rows, count in splits for row in hpo.draw(rows, count, seed)}
        rows = [row["question"] for row in ask.unseen(s, None)]
        assert rows and len(set(rows)) == len(rows) and not seen & set(rows)
        assert rows == [row["question"] for row in ask.unseen(s, None)]
        with pytest.raises(ask.InputError, match=f"ask for at most {len(rows)}"):
            ask.unseen(s, len(rows) + 1)


def test_answers_and_losses_do_not_depend_on_the_batch(kept, monkeypatch):
    rows, found = ask.unseen(settings_of(kept[0]), 12), []
    model = ask.Model(kept[0])
    for size in (1, 5, 12):
        monkeypatch.setattr(ask, "AT_ONCE", size)
        found.append((model.answers(rows), model.losses(rows)))
    for answers, losses in found[1:]:
        assert answers == found[0][0]
        assert torch.allclose(torch.tensor(losses), torch.tensor(found[0][1]), atol=1e-5)


def test_the_score_is_squads():
    """Articles, case and punctuation do not count; the nearest of several answers does. The loss by hand."""
    rows = [{"answers": {"text": texts}} for texts in (["The Cat", "dog"], ["a red hat"], ["Rome"])]
    model = SimpleNamespace(answers=lambda _: ["cat.", "red", "Paris"], losses=lambda _: [(2.0, 2), (6.0, 2), (1.0, 2)])
    found = ask.score(model, rows)
    assert found["exact_match"] == pytest.approx(100 / 3) and found["f1"] == pytest.approx(100 * (1 + 2 / 3) / 3)
    assert found["eval_loss"] == pytest.approx(1.5)
    # answers of one length: the standard error of the mean of 1, 3 and 0.5
    assert found["standard_error"] == pytest.approx(torch.tensor([1, 3, 0.5]).std().item() / 3**0.5)


def test_a_student_sees_what_was_learned(kept, tmp_path, monkeypatch):
    shown = call(ASK, kept[0]).stdout
    right, model = (re.findall(rf"    {who}: (.*)", shown) for who in ("right", "model"))
    assert len(right) == len(model) == 10
    assert sum(answer in of.split(" | ") for answer, of in zip(model, right, strict=True)) >= 2
    own = call(ASK, kept[0], "--question", "Who?", "--context", "Ann is.")
    assert own.returncode == 0 and len(own.stdout.splitlines()) == 1
    monkeypatch.setenv("TEST_SAMPLES", "20")
    score = call(ASK, kept[0], "--score", "--json", tmp_path / "scores.json")
    (_, before), (_, after) = json.loads((tmp_path / "scores.json").read_text()).items()
    assert before["questions"] == after["questions"] == 20 and len(score.stdout.splitlines()) == 3
    assert before["exact_match"] == 0 and after["exact_match"] > 10 and after["eval_loss"] < before["eval_loss"] - 1


@pytest.mark.parametrize("variables, training, said", [
    ({}, "{half", "no training.json in this folder"), ({}, '{"settings": 1}', "no training.json in this folder"),
    ({}, {"SQUAD_DATA": "/none/data"}, "/none/data"), ({"TEST_SAMPLES": "x"}, {}, "TEST_SAMPLES='x': is not a whole"),
    ({"TEST_SAMPLES": "0"}, {}, "TEST_SAMPLES='0': must be"),
    ({"TEST_SAMPLES": "51"}, {}, "has only 50 questions beside those of the run; ask for at most 50")])
def test_bad_input_of_ask_is_one_line(kept, tmp_path, monkeypatch, variables, training, said):
    """training: the text of training.json, or settings that it has instead of the right ones."""
    for name, value in (variables | {"HF_HUB_OFFLINE": "1"}).items():
        monkeypatch.setenv(name, value)
    if isinstance(training, dict):
        right = json.loads((kept[0] / "training.json").read_text())
        training = json.dumps(right | {"settings": right["settings"] | training})
    (tmp_path / "training.json").write_text(training)
    run = call(ASK, tmp_path)
    assert run.returncode == 2 and said in run.stderr and run.stderr.startswith("ERROR: ")
    assert len(run.stderr.splitlines()) == 1 and not run.stdout


# ---- Any data --------------------------------------------------------------------------------------------------------
def test_prompts_of_jsonl_files_are_learned_as_they_are(tmp_path, demo, hpo):
    for name, n in (("train", 6), ("dev", 4)):
        lines = [json.dumps({"prompt": f"{i} + {i} =", "answer": str(2 * i)}) for i in range(n)]
        (tmp_path / f"{name}.jsonl").write_text("\ufeff" + "\r\n".join(lines) + "\n\n", encoding="utf-8", newline="")
    variables = {"MODEL_NAME": demo / "model", "SQUAD_DATA": tmp_path, "TRAIN_SAMPLES": 6, "EVAL_SAMPLES": 4}
    s = hpo.read_settings({name: str(value) for name, value in variables.items()})
    tokenizer = AutoTokenizer.from_pretrained(demo / "model")
    texts = {tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in hpo.load_squad(s)[0]}
    assert texts == {f"{i} + {i} = {2 * i}" for i in range(6)}


@pytest.mark.parametrize("text, said", [
    (b'{"prompt": "a", "answer": "b"}\n{"prompt": "a"}\n', "line 2"), (b'{"prompt": "a", "answer": 3}\n', "line 1"),
    (b'{"prompt": "a", "answer": " "}\n', "line 1"), (b'\n\n["prompt", "answer"]\n', "line 3"),
    (b'{"prompt": "a", "answer": "b"}\n\xff\n', "line 2: is not UTF-8"), (b"\n", "")])
def test_a_wrong_line_of_a_jsonl_file_is_named(tmp_path, demo, checks, text, said):
    (tmp_path / "train.jsonl").write_bytes(b'{"prompt": "a", "answer": "b"}\n')
    (tmp_path / "dev.jsonl").write_bytes(text)
    environ = {"MODEL_NAME": str(demo / "model"), "SQUAD_DATA": str(tmp_path), "TRAIN_SAMPLES": "1"}
    with pytest.raises(checks.InputError, match=rf"SQUAD_DATA='{tmp_path}': dev.jsonl,? .*{said}") as error:
        checks.check(environ)
    assert len(str(error.value).splitlines()) == 1


TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}<assistant>"


def test_chat_models_see_the_template_and_the_context_alone_is_cut(demo, hpo):
    tokenizer = AutoTokenizer.from_pretrained(demo / "model")
    tokenizer.chat_template = TEMPLATE
    row = hpo.encode("river " * 400, "Where?", "here", tokenizer, max_length=200, chat=True)
    text = tokenizer.decode(row["input_ids"], skip_special_tokens=True)
    assert text.startswith("<user>Context: river") and text.endswith("Question: Where?\nAnswer:</user><assistant> here")
    assert len(row["input_ids"]) == 200


@pytest.mark.parametrize("template, said", [
    (TEMPLATE, None), ("", "has no chat template"), ("{{ messages[0].content | upper }}@@", "does not show the prompt"),
    ("{{ raise_exception('no user') }}", "takes no single prompt")])
def test_whether_a_model_has_a_chat_template_is_checked(tmp_path, demo, checks, template, said):
    shutil.copytree(demo / "model", tmp_path / "model")
    if template:
        (tmp_path / "model/chat_template.jinja").write_text(template)
    environ = {"MODEL_NAME": str(tmp_path / "model"), "SQUAD_DATA": str(demo / "squad"), "CHAT_TEMPLATE": "1"}
    if said is None:
        assert checks.check(environ).CHAT_TEMPLATE == 1
    else:
        with pytest.raises(checks.InputError, match=f"CHAT_TEMPLATE='1': .*{said}.*; set CHAT_TEMPLATE=0"):
            checks.check(environ)
