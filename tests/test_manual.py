"""The manual grid and its program: the same training as the search's, its record, and --best.

A grid that was cut short goes on: test_run.py. The winner for longer: test_exercises.py.
"""

import csv
import json
import os
import re
import subprocess
from types import SimpleNamespace

import pytest
from conftest import HEAD, REPO, call, load_module

GRID = "bloom_hpo_manual.slurm"
SMALL = {"TRAIN_SAMPLES": "16", "EVAL_SAMPLES": "11", "NUM_EPOCHS": "2", "CPUS_PER_WORKER": "1"}


def test_a_combination_that_fails_is_named_and_the_losses_of_others_are_those_of_the_search(course, demo):
    folder = course.parents[2] / "manual"
    text = (folder / GRID).read_text()
    for name, values in {"LEARNING_RATES": "20 1e-2", "BATCH_SIZES": "2", "WEIGHT_DECAYS": "0.01"}.items():
        text, found = re.subn(rf"{name}=\(.*?\)", f"{name}=({values})", text)
        assert found == 1
    (folder / GRID).write_text(text)
    environ = os.environ | SMALL | {"MODEL_NAME": str(demo / "model"), "SQUAD_DATA": str(demo / "squad")}
    grid = subprocess.run(["bash", GRID], cwd=folder, env=environ, text=True, check=False, capture_output=True,
                          timeout=300)  # fmt: skip
    assert grid.returncode == 1, grid.stdout + grid.stderr
    why = "ERROR: --lr='20': must be a number above 0.0 and at most 10.0"
    assert re.search(rf"^FAILED lr=20\S* per_device_bs=2 wd=0.01 : {why}", grid.stdout, re.MULTILINE)
    assert grid.stdout.count("RESULT ") == grid.stdout.count("  epoch 2/2  eval_loss ") == 1  # from rank 0 alone
    (row,) = csv.DictReader(next(folder.glob("results-*.csv")).open())
    assert float(row["lr"]) == 1e-2

    (record,) = folder.glob("runs/*/events.jsonl")
    rows = [json.loads(line) for line in record.read_text().splitlines()]
    assert {r["event"] for r in rows} >= {"started", "settings", "worker_joined", "finished"}
    (failed,) = [r["error"] for r in rows if r["event"] == "trial_ended" and r["error"]]
    assert why.removeprefix("ERROR: ") in failed
    trained = "lr=0.01 per_device_bs=2 wd=0.01"
    first, *reports, ended = [r for r in rows if r.get("trial") == trained]
    assert first["event"] == "trial_started"
    assert first["config"] == {"lr": 0.01, "per_device_bs": 2, "wd": 0.01}
    assert [(r["event"], r["epoch"], r["training_iteration"]) for r in reports] == [("report", n, n) for n in (1, 2)]
    assert (ended["event"], ended["error"]) == ("trial_ended", None)
    assert 0 < reports[0]["seconds"] <= reports[1]["seconds"]  # to a tenth of a second
    assert min(r["eval_loss"] for r in reports) == pytest.approx(float(row["eval_loss"]), abs=1e-5)

    # The same configuration, seed and number of workers in a search: one training definition, so the same loss.
    same = {"NUM_SAMPLES": "1", "LR_LOWER": "1e-2", "LR_UPPER": "1.0000001e-2", "BS_CHOICES": "2", "WD_CHOICES": "0.01"}
    search = subprocess.run(["bash", HEAD], cwd=course, env=environ | same, text=True, check=True, capture_output=True,
                            timeout=300)  # fmt: skip
    losses = [float(loss) for loss in re.findall(r"epoch \d/2  eval_loss (\S+)", search.stdout)]
    assert losses == pytest.approx([r["eval_loss"] for r in reports], abs=1e-4)


# ---- The program -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def manual():
    return load_module(REPO / "scripts/manual_hpo/bloom_hpo_manual.py")


@pytest.fixture
def on_demo(demo, monkeypatch):
    monkeypatch.setenv("MODEL_NAME", str(demo / "model"))
    monkeypatch.setenv("SQUAD_DATA", str(demo / "squad"))


RIGHT = {"--lr": "1e-3", "--bs": "1", "--wd": "0"}


@pytest.mark.parametrize("wrong, why", [
    ({"--lr": "x"}, "is not a number"), ({"--lr": "nan"}, "above 0"), ({"--lr": ""}, "is not a number"),
    ({"--bs": "0"}, "at least 1"), ({"--bs": "1 2"}, "is not a whole number"), ({"--bs": "9" * 400}, "at most 1024"),
    ({"--wd": "-1"}, "at least 0"), ({"--wd": "inf"}, "at most 10"), ({"--epochs": "0"}, "at least 1"),
    ({"--csv": "/none/results.csv"}, "in an existing folder"), ({"--record": "/"}, "in an existing folder"),
    ({"--lr": "x", "--bs": "y", "--epochs": "-1"}, ""), ({"--best": "x"}, None)])
def test_each_wrong_option_is_one_line(manual, on_demo, wrong, why):
    run = call(manual, *(f"{name}={value}" for name, value in (RIGHT | wrong).items()))
    lines = run.stderr.splitlines()
    assert run.returncode == 2 and run.stdout == ""
    if why is None:  # options that exclude each other
        assert "give --lr, --bs and --wd, or --best RUN_FOLDER" in lines[-1]
        return
    assert len(lines) == len(wrong)
    for line, (name, value) in zip(lines, wrong.items(), strict=True):
        assert line.startswith(f"ERROR: {name}={value!r}: ") and why in line


def test_best_takes_configuration_and_settings_from_the_record_also_through_a_link(manual, on_demo, demo, tmp_path,
                                                                                    monkeypatch):  # fmt: skip
    """Further hyperparameters included. The environment comes before the run's settings."""
    settings = {"MODEL_NAME": "/elsewhere", "SQUAD_DATA": str(demo / "squad"), "TRAIN_SAMPLES": "17", "SEED": "7"}
    rows = [{"event": "settings"} | settings]
    for name, loss in (("a", 0.5), ("b", 0.4)):
        config = {"lr": 1e-3, "per_device_bs": 1, "wd": 0.0, "warmup_ratio": loss}
        rows += [{"event": "trial_started", "trial": name, "config": config},
                 {"event": "report", "trial": name, "epoch": 1, "eval_loss": loss, "seconds": 1.0, "decision": "STOP"},
                 {"event": "trial_ended", "trial": name, "error": None if name == "a" else "lost"}]  # fmt: skip
    (tmp_path / "scratch/7").mkdir(parents=True)
    (tmp_path / "runs").symlink_to("scratch")
    text = "".join(f"{json.dumps({'time': '2026-11-29T09:30:00.123Z'} | row)}\n" for row in rows)
    (tmp_path / "runs/7/events.jsonl").write_text(text + '{"event": "rep')
    trained = []
    monkeypatch.setattr(manual, "train", lambda drawn, settings, *_: trained.append((drawn, settings)))
    assert call(manual, "--best", tmp_path / "runs/7", "--epochs", "3").returncode == 0
    ((drawn, s),) = trained
    assert drawn == {"lr": 1e-3, "per_device_bs": 1, "wd": 0.0, "warmup_ratio": 0.5}
    assert (s.TRAIN_SAMPLES, s.SEED, s.MODEL_NAME, s.NUM_EPOCHS) == (17, 7, str(demo / "model"), 3)


def test_a_training_that_diverges_and_one_that_breaks_are_recorded_as_such(manual, tmp_path, monkeypatch):
    def fine_tune(*_, callbacks):
        for epoch, loss in ((1, float("inf")), (2, float("nan"))):
            callbacks[0].on_evaluate(None, SimpleNamespace(epoch=epoch), None, metrics={"eval_answer_loss": loss})
        if broken:
            raise ValueError("out of\nmemory")

    monkeypatch.setattr(manual.hpo, "load_squad", lambda s: ([], []))
    monkeypatch.setattr(manual.hpo, "fine_tune", fine_tune)
    for broken, raised in ((False, manual.InputError), (True, ValueError)):
        with pytest.raises(raised):
            manual.train({"lr": 5.0}, SimpleNamespace(NUM_EPOCHS=2), record_file=tmp_path / "events.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [row["eval_loss"] for row in rows if row["event"] == "report"] == [None] * 4
    assert [row["error"] for row in rows if row["event"] == "trial_ended"] == [None, "ValueError: out of"]
