"""The manual grid: the same training as the search's, and a grid that goes on where it was cut short."""

import csv
import os
import re
import shutil
import subprocess

import pytest
from conftest import HEAD, REPO, load_module
from test_gpus import TORCH

GRID = "bloom_hpo_manual.slurm"
SMALL = {"TRAIN_SAMPLES": "16", "EVAL_SAMPLES": "11", "NUM_EPOCHS": "2", "CPUS_PER_WORKER": "1"}
PATH = {"PATH": f"{REPO}/.venv/bin:{os.environ['PATH']}"}


@pytest.fixture
def course(tmp_path, demo):
    """A copy of the repository whose grid is 2 x 1 x 1, and the environment for a small run on the demo."""
    made_by_runs = shutil.ignore_patterns("runs", "*.out", "results-*", "__pycache__")
    for folder in ("scripts", "experiments"):
        shutil.copytree(REPO / folder, tmp_path / folder, symlinks=True, ignore=made_by_runs)
    (tmp_path / ".venv").symlink_to(REPO / ".venv")
    grid = tmp_path / "experiments/manual" / GRID
    text = grid.read_text().replace("(1e-5 2e-4 5e-6)", "(3e-3 1e-2)").replace("(1 2) ", "(2) ")
    text = text.replace("(0.0 0.01)", "(0.01)")
    assert "(3e-3 1e-2)" in text and "(0.01)" in text
    grid.write_text(text)
    return tmp_path, os.environ | SMALL | {"MODEL_NAME": str(demo / "model"), "SQUAD_DATA": str(demo / "squad")}


def rows_of(folder):
    (file,) = folder.glob("results-*.csv")
    return list(csv.DictReader(file.open()))


def test_a_combination_that_fails_is_named_and_the_losses_of_others_are_those_of_the_search(course, demo):
    """A grid that was cut short goes on: test_run.py. The winner for longer: test_exercises.py."""
    top, environ = course
    folder = top / "experiments/manual"
    (folder / GRID).write_text((folder / GRID).read_text().replace("(3e-3 1e-2)", "(20 1e-2)"))
    grid = subprocess.run(["bash", GRID], cwd=folder, env=environ, text=True, check=False, capture_output=True,
                          timeout=300)  # fmt: skip
    assert grid.returncode == 1, grid.stdout + grid.stderr
    why = "ERROR: --lr='20': must be a number above 0 and at most 10"
    assert re.search(rf"^FAILED lr=20 per_device_bs=2 wd=0.01 : {why}", grid.stdout, re.MULTILINE)
    assert grid.stdout.count("RESULT ") == grid.stdout.count("  epoch 2/2  eval_loss ") == 1  # from rank 0 alone
    (row,) = rows_of(folder)
    assert float(row["lr"]) == 1e-2

    # The same configuration, seed and number of workers in a search: one training definition, so the same loss.
    script = top / "scripts/raytune_hpo/raytune_asha_scheduler/raytune_asha_hpo.py"
    line = "tune.loguniform(s.LR_LOWER, s.LR_UPPER)"
    script.write_text(script.read_text().replace(line, "tune.choice([1e-2])"))
    search = subprocess.run(["bash", HEAD], cwd=top / "experiments/raytune/scheduler/asha", text=True, check=True,
                            env=environ | {"NUM_SAMPLES": "1", "BS_CHOICES": "2", "WD_CHOICES": "0.01"},
                            capture_output=True, timeout=300)  # fmt: skip
    losses = [float(loss) for loss in re.findall(r"eval_loss (\d\S+)", search.stdout)]
    assert len(losses) == 2
    assert min(losses) == pytest.approx(float(row["eval_loss"]), abs=1e-4)


def test_with_fewer_gpus_than_workers_no_combination_is_tried(course):
    """One GPU and two workers. There is no GPU here: a stand-in for PyTorch claims it."""
    top, environ = course
    (top / "claimed").mkdir()
    (top / "claimed/torch.py").write_text(TORCH.format(count=1, name="Tesla V100-SXM2-16GB", bf16=False))
    functions = top / "scripts/job/this_node.py"
    functions.write_text(functions.read_text().replace("/dev/nvidiactl", "/dev/null"))
    grid = top / "experiments/manual" / GRID
    text = grid.read_text()
    assert text.count("    look_at_node\n") == 1
    stand_in = f"    PYTHONPATH={top}/claimed look_at_node\n"
    grid.write_text(text.replace("    look_at_node\n", stand_in))
    run = subprocess.run(["bash", GRID], cwd=grid.parent, env=environ, text=True, check=False, capture_output=True,
                         timeout=60)  # fmt: skip
    assert run.returncode == 1 and not list(grid.parent.glob("results-*"))
    assert "a trial asks for 2 GPU(s) and this node has 1; set WORKERS_PER_TRIAL=1, or GPUS_PER_WORKER=0" in run.stderr
    assert "FAILED" not in run.stdout and "GPUs: " not in run.stdout


@pytest.mark.parametrize("options", [
    [], ["--lr", "1e-3"], ["--lr", "1e-3", "--bs", "1", "--wd", "0", "--best", "x"], ["--best", "/none"]])
def test_a_wrong_call_says_what_is_missing(options):
    script = REPO / "scripts/manual_hpo/bloom_hpo_manual.py"
    run = subprocess.run([script, *options], text=True, check=False, capture_output=True, timeout=60,
                         env=os.environ | PATH)  # fmt: skip
    assert run.returncode == 2 and "--best" in run.stderr and "Traceback" not in run.stderr


RIGHT = {"--lr": "1e-3", "--bs": "1", "--wd": "0"}


@pytest.mark.parametrize("wrong, why", [
    ({"--lr": "x"}, "is not a number"), ({"--lr": "0"}, "above 0"), ({"--lr": "nan"}, "above 0"),
    ({"--lr": "1e-3; touch here"}, "is not a number"), ({"--lr": ""}, "is not a number"),
    ({"--bs": "0"}, "at least 1"), ({"--bs": "1.5"}, "is not a whole number"),
    ({"--bs": "1 2"}, "is not a whole number"), ({"--bs": "9" * 400}, "at most 1024"),
    ({"--wd": "-1"}, "at least 0"), ({"--wd": "inf"}, "at most 10"),
    ({"--epochs": "0"}, "at least 1"), ({"--epochs": "five"}, "is not a whole number"),
    ({"--csv": "/none/results.csv"}, "in an existing folder"), ({"--csv": "/"}, "in an existing folder"),
    ({"--lr": "x", "--bs": "y", "--epochs": "-1"}, "")])
def test_a_wrong_option_is_one_line_before_anything_is_loaded(wrong, why, demo):
    script = REPO / "scripts/manual_hpo/bloom_hpo_manual.py"
    options = [f"{name}={value}" for name, value in (RIGHT | wrong).items()]
    environ = os.environ | PATH | {"MODEL_NAME": str(demo / "model"), "SQUAD_DATA": str(demo / "squad")}
    run = subprocess.run([script, *options], text=True, check=False, capture_output=True, timeout=15, env=environ)
    lines = run.stderr.splitlines()
    assert run.returncode == 2 and run.stdout == "" and len(lines) == len(wrong)
    for line, (name, value) in zip(lines, wrong.items()):
        assert line.startswith(f"ERROR: {name}={value!r}: ") and why in line


def test_the_best_configuration_is_found_beside_a_line_half_written(tmp_path):
    manual = load_module(REPO / "scripts/manual_hpo/bloom_hpo_manual.py")
    line = '{"eval_loss": %s, "config": {"train_loop_config": {"lr": %s}}}\n'
    for trial, text in {
        "a": line % ("NaN", 1) + line % (0.5, 2) + '{"eval_lo',
        "b": line % (0.7, 3) + '{"done": true}\n[]\n',
        "c": "",
    }.items():
        (tmp_path / "tune" / trial).mkdir(parents=True)
        (tmp_path / "tune" / trial / "result.json").write_text(text)
    assert manual.best_configuration(tmp_path) == {"lr": 2}
    shutil.rmtree(tmp_path / "tune/a")
    (tmp_path / "tune/b/result.json").write_text("{")
    with pytest.raises(manual.InputError, match="no results of a search in this folder"):
        manual.best_configuration(tmp_path)
