"""The program of the manual grid: its options, its record, and --best.

The grid itself, its losses and those of the search, and the winner for longer: test_exercises.py.
"""

import json
from types import SimpleNamespace

import pytest
from conftest import REPO, call, load_module


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
