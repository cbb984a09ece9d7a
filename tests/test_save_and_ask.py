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

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}<assistant>"
FAILED = "^--save='.*/model': .*; the folder is not written$"
WHOLE = resource.getrlimit(resource.RLIMIT_FSIZE)
MANUAL, ASK = REPO / "scripts/manual_hpo/bloom_hpo_manual.py", load_module(REPO / "scripts/model/ask.py")


def train(scripts, demo, folder, *options, stage=2, processes=1):
    """Trains by a copy of the scripts with this ZeRO stage -> what it printed."""
    shutil.copytree(REPO / "scripts", scripts, symlinks=True)
    config = scripts / "ds_config.json"
    config.write_text(config.read_text().replace('"stage": 2', f'"stage": {stage}'))
    variables = {"MODEL_NAME": f"{demo}/model", "SQUAD_DATA": f"{demo}/squad", "TRAIN_SAMPLES": "160",
                 "EVAL_SAMPLES": "50", "CPUS_PER_WORKER": "1", "TORCHDYNAMO_DISABLE": "1"}  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
               scripts / "manual_hpo/bloom_hpo_manual.py", *options, "--save", folder]  # fmt: skip
    run = subprocess.run(command, env=os.environ | variables, text=True, check=False, capture_output=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def kept(demo, tmp_path_factory):
    """(folder of a model, what its training printed)"""
    top = tmp_path_factory.mktemp("kept")
    return top / "model", train(top / "scripts", demo, top / "model", "--lr", "1.2e-2", "--bs", "4", "--wd", "0")


def loss_of(folder):
    """The mean over the answer tokens of the validation questions."""
    s = ask.settings_of(folder)
    losses = ask.Model(folder).losses(ask.hpo.draw(ask.hpo.read_splits(s.SQUAD_DATA)[1], s.EVAL_SAMPLES, s.SEED))
    return sum(loss for loss, _ in losses) / sum(count for _, count in losses)


def test_a_kept_model_is_the_one_of_the_lowest_loss_and_complete(kept, demo, checks):
    folder, printed = kept
    losses = [float(loss) for loss in re.findall(r"eval_loss (\S+)", printed)]
    told = json.loads((folder / "training.json").read_text())["eval_loss"]
    assert len(losses) == 5 and (told, loss_of(folder)) == pytest.approx((min(losses), min(losses)), abs=1e-5)
    card = (folder / "README.md").read_text()
    assert f"base_model: {demo / 'model'}" in card and "lr 0.012, per_device_bs 4, wd 0.0" in card
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.float32
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1  # none for the owner alone
    variables = {"MODEL_NAME": str(folder), "SQUAD_DATA": str(demo / "squad"), "EVAL_SAMPLES": "50"}
    assert checks.check(variables).MODEL_NAME == str(folder)  # another search can start from it


def test_kept_weights_are_whole_though_the_model_is_split(demo, tmp_path):
    out, options = tmp_path / "model", ("--lr", "1e-2", "--bs", "8", "--wd", "0", "--epochs", "1")
    printed = train(tmp_path / "scripts", demo, out, *options, stage=3, processes=2)
    assert loss_of(out) == pytest.approx(float(re.search(r"RESULT .* eval_loss=(\S+)", printed)[1]), abs=1e-5)


# ---- Whole or not at all ---------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def base(demo):
    return AutoModelForCausalLM.from_pretrained(demo / "model", dtype=torch.float32)


def keep(folder, model, demo, before=lambda: None, between=lambda: None):
    s = SimpleNamespace(MODEL_NAME=str(demo / "model"), SQUAD_DATA="x", TRAIN_SAMPLES=1, EVAL_SAMPLES=1, NUM_EPOCHS=1,
                        SEED=1, PRECISION="fp32", WORKERS_PER_TRIAL=1)  # fmt: skip
    with saved_model.NewModel(folder) as new:
        before()
        new.keep(model)
        between()
        new.finish(s, {"hyperparameters": {"lr": 1}, "eval_loss": 1.0, "epoch": 1})


def full(size):
    """From now on a file gets no larger."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, WHOLE[1]))


@pytest.mark.parametrize("fault, said", [
    ({"before": lambda: full(100_000)}, FAILED), ({"between": lambda: full(1000)}, FAILED),  # weights; tokenizer
    ({"between": lambda: os.kill(os.getpid(), 15)}, "^143$")])  # by scancel
def test_what_ends_a_training_leaves_no_half_of_a_model(base, demo, tmp_path, fault, said):
    try:
        with pytest.raises((saved_model.InputError, SystemExit), match=said):
            keep(tmp_path / "model", base, demo, **fault)
    finally:
        full(WHOLE[0])
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there_and_one_that_cannot_be_written_are_refused(tmp_path, demo, monkeypatch):
    monkeypatch.setenv("MODEL_NAME", f"{demo}/model")
    monkeypatch.setenv("SQUAD_DATA", f"{demo}/squad")
    (tmp_path / "file").write_text("mine")
    for folder, why in ((tmp_path, "is there already; remove it, or give"), (tmp_path / "file/x", "Not a directory")):
        run = call(load_module(MANUAL), "--lr", "1e-3", "--bs", "1", "--wd", "0", "--save", folder)
        assert run.returncode == 2 and why in run.stderr and len(run.stderr.splitlines()) == 1, run.stderr


# ---- Questions that no trial has seen --------------------------------------------------------------------------------
def test_training_validation_and_test_questions_never_meet(tmp_path, hpo):
    asked = {name: [{"question": f"{name} {i % 35}?", "answers": [{"text": str(i)}]} for i in range(40)]
             for name in ("seen", "new")}  # five of the texts twice
    for file, names in (("train-v1.1.json", ["seen"]), ("dev-v1.1.json", ["new", "seen"])):
        articles = [{"paragraphs": [{"context": "The text.", "qas": asked[name]}]} for name in names]
        (tmp_path / file).write_text(json.dumps({"data": articles}))
    for seed in range(5):
        s = SimpleNamespace(SQUAD_DATA=str(tmp_path), TRAIN_SAMPLES=30, EVAL_SAMPLES=30, SEED=seed)
        seen = {row["question"] for split in hpo.read_splits(tmp_path) for row in hpo.draw(split, 30, seed)}
        rows = [row["question"] for row in ask.unseen(s, None)]
        assert rows and len(set(rows)) == len(rows) and not seen & set(rows)
        assert rows == [row["question"] for row in ask.unseen(s, None)]
        with pytest.raises(ask.InputError, match=f"ask for at most {len(rows)}"):
            ask.unseen(s, len(rows) + 1)


def test_answers_and_losses_do_not_depend_on_the_batch(kept, monkeypatch):
    rows, model, found = ask.unseen(ask.settings_of(kept[0]), 12), ask.Model(kept[0]), []
    for size in (1, 5, 12):
        monkeypatch.setattr(ask, "AT_ONCE", size)
        found.append((model.answers(rows), torch.tensor(model.losses(rows))))
    for answers, losses in found[1:]:
        assert answers == found[0][0] and torch.allclose(losses, found[0][1], atol=1e-5)
    model.model.generation_config.no_repeat_ngram_size = 1  # nor on what the model brings along
    assert model.answers(rows) == found[0][0]


def test_the_score_is_squads():
    """Articles, case and punctuation do not count; the nearest of several answers does. The loss by hand."""
    rows = [{"answers": {"text": texts}} for texts in (["The Cat", "dog"], ["a red hat"], ["Rome"])]
    model = SimpleNamespace(answers=lambda _: ["cat.", "red", "Paris"], losses=lambda _: [(2.0, 2), (6.0, 2), (1.0, 2)])
    found = ask.score(model, rows)
    assert (found["exact_match"], found["f1"]) == pytest.approx((100 / 3, 100 * (1 + 2 / 3) / 3))
    # answers of one length: the standard error of the mean of 1, 3 and 0.5
    error = torch.tensor([1, 3, 0.5]).std().item() / 3**0.5
    assert (found["eval_loss"], found["standard_error"]) == pytest.approx((1.5, error))


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


@pytest.mark.parametrize("samples, training, said", [
    ("", {"settings": 1}, "no training.json in this folder"), ("", {"SQUAD_DATA": "/none/data"}, "/none/data"),
    ("x", {}, "TEST_SAMPLES='x': is not a whole"), ("0", {}, "TEST_SAMPLES='0': must be"),
    ("51", {}, "has only 50 questions beside those of the run; ask for at most 50")])
def test_bad_input_of_ask_is_one_line(kept, tmp_path, monkeypatch, samples, training, said):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TEST_SAMPLES", samples)
    right = json.loads((kept[0] / "training.json").read_text())
    (tmp_path / "training.json").write_text(json.dumps({"settings": right["settings"] | training} | training))
    run = call(ASK, tmp_path)
    assert run.returncode == 2 and re.fullmatch(f"ERROR: .*{said}.*\n", run.stderr) and not run.stdout


@pytest.mark.parametrize("text, said", [
    (b'{"prompt": "a", "answer": "b"}\n{"prompt": "a"}\n', "line 2"), (b'{"prompt": "a", "answer": 3}\n', "line 1"),
    (b'\n\n["prompt", "answer"]\n', "line 3"), (b'{"prompt": "a", "answer": "b"}\n\xff\n', "line 2: is not UTF-8"),
    (b'{"prompt": "a", "answer": " "}\n', "line 1"), (b"\n", "")])
def test_a_wrong_line_of_a_jsonl_file_is_named(tmp_path, demo, checks, text, said):
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "answer": "b"}')
    (tmp_path / "dev.jsonl").write_bytes(text)
    environ = {"MODEL_NAME": str(demo / "model"), "SQUAD_DATA": str(tmp_path), "TRAIN_SAMPLES": "1"}
    with pytest.raises(checks.InputError, match=rf"^SQUAD_DATA='{tmp_path}': dev.jsonl,? .*{said}.*$"):
        checks.check(environ)


@pytest.mark.parametrize("template, said", [
    (TEMPLATE, None), ("", "has no chat template"), ("{{ messages[0].content | upper }}@@", "does not show the prompt"),
    ("{{ raise_exception('no user') }}", "takes no single prompt")])
def test_chat_models_see_their_template_with_the_context_alone_cut(tmp_path, demo, hpo, checks, template, said):
    shutil.copytree(demo / "model", tmp_path / "model")
    if template:
        (tmp_path / "model/chat_template.jinja").write_text(template)
    environ = {"MODEL_NAME": str(tmp_path / "model"), "SQUAD_DATA": str(demo / "squad"), "CHAT_TEMPLATE": "1"}
    if said:
        with pytest.raises(checks.InputError, match=f"CHAT_TEMPLATE='1': .*{said}.*; set CHAT_TEMPLATE=0"):
            checks.check(environ)
        return
    assert checks.check(environ).CHAT_TEMPLATE == 1
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    row = hpo.encode("river " * 400, "Where?", "here", tokenizer, max_length=200, chat=True)
    text = tokenizer.decode(row["input_ids"], skip_special_tokens=True)
    assert text.startswith("<user>Context: river") and text.endswith("Question: Where?\nAnswer:</user><assistant> here")
    assert len(row["input_ids"]) == 200
