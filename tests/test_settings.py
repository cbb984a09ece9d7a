"""Bad input is refused before anything is started: one line that names the variable, its value and the fix."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import EXERCISE, HEAD, REPO, SCRIPT


def test_defaults_are_the_documented_ones(hpo):
    s = hpo.read_settings({})
    assert (s.LR_LOWER, s.LR_UPPER, s.BS_CHOICES, s.WD_CHOICES) == (5e-6, 2e-4, [1, 2], [0.0, 0.01])
    assert (s.WORKER_NODES, s.NUM_SAMPLES, s.NUM_EPOCHS, s.TRAIN_SAMPLES, s.EVAL_SAMPLES, s.SEED) == (1, 12, 5, 1000, 100, 42)
    assert (s.WORKERS_PER_TRIAL, s.CPUS_PER_WORKER, s.GPUS_PER_WORKER) == (2, 2, 1)
    assert (s.MODEL_NAME, s.SQUAD_DATA) == ("bigscience/bloom-560m", "rajpurkar/squad")


BAD = [
    ("LR_LOWER", "abc"), ("LR_LOWER", ""), ("LR_LOWER", "-1e-5"), ("LR_LOWER", "0"), ("LR_LOWER", "nan"), ("LR_LOWER", "1e-3"),
    ("LR_LOWER", "2e-4"), ("LR_LOWER", "1e-5; touch x"), ("LR_LOWER", "1e-5\r"), ("LR_UPPER", "inf"), ("LR_UPPER", "1,0"),
    ("LR_UPPER", "1e-6"), ("BS_CHOICES", ""), ("BS_CHOICES", "1,2"), ("BS_CHOICES", "0"), ("BS_CHOICES", "1.5"), ("BS_CHOICES", "2 2"),
    ("BS_CHOICES", "1 two"), ("WD_CHOICES", "-0.1"), ("WD_CHOICES", "0.0 0.00"), ("WD_CHOICES", "nan"), ("WORKER_NODES", "0"),
    ("WORKER_NODES", "1.0"), ("NUM_SAMPLES", "0"), ("NUM_EPOCHS", "-5"), ("MODEL_NAME", ""), ("MODEL_NAME", "/no/such/model"),
    ("MODEL_NAME", "two\nlines"), ("MODEL_NAME", str(EXERCISE)), ("SQUAD_DATA", "./no_such_folder"), ("SQUAD_DATA", str(EXERCISE)),
    ("TRAIN_SAMPLES", "0"), ("TRAIN_SAMPLES", "1000000"), ("EVAL_SAMPLES", "1e2"), ("WORKERS_PER_TRIAL", "0"),
    ("CPUS_PER_WORKER", "x"), ("GPUS_PER_WORKER", "-1"), ("SEED", "-1"), ("SEED", "4294967296"),
]
MISSPELT = [("LR_LOW", "1e-5"), ("NUM_SAMPLE", "4"), ("BS_CHOICE", "1 2"), ("EVAL_SAMPLE", "5")]


@pytest.mark.parametrize("name, value", BAD + MISSPELT)
def test_bad_input_is_one_line_that_names_it(name, value, demo):
    environ = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"MODEL_NAME": str(demo / "model"), "SQUAD_DATA": str(demo / "squad")}
    run = subprocess.run([sys.executable, SCRIPT, "--check"], env=environ | {name: value}, text=True, check=False, capture_output=True, timeout=60)
    lines = run.stderr.splitlines()
    assert run.returncode == 2 and run.stdout == ""
    assert len(lines) == 1 and lines[0].startswith("ERROR: ") and name in lines[0], run.stderr
    assert repr(value)[1:-1] in lines[0] or value in lines[0]


def test_several_errors_are_reported_together():
    environ = os.environ | {"LR_LOWER": "x", "BS_CHOICES": "0", "NUM_SAMPLE": "3", "SEED": "?"}
    run = subprocess.run([sys.executable, SCRIPT, "--check"], env=environ, text=True, check=False, capture_output=True, timeout=60)
    assert run.returncode == 2 and run.stderr.count("ERROR: ") == 4


def test_a_misspelt_hyperparameter_is_refused_with_a_suggestion_and_a_right_one_is_not(hpo):
    drawn = {"lr": None, "per_device_bs": None, "wd": None}
    hpo.check_search_space({"train_loop_config": drawn})
    hpo.check_search_space({"train_loop_config": drawn | {"warmup_ratio": None, "adam_beta2": None}})
    with pytest.raises(hpo.InputError, match="warmup_rate.*did you mean 'warmup_ratio'"):
        hpo.check_search_space({"train_loop_config": drawn | {"warmup_rate": None}})


@pytest.mark.parametrize("name", ["MODEL_NAME", "SQUAD_DATA"])
def test_what_the_hub_does_not_deliver_is_one_line_before_ray_is_needed(name, demo, tmp_path):
    variables = {"MODEL_NAME": str(demo / "model"), "SQUAD_DATA": str(demo / "squad"), name: "no-such-owner/no-such-name"}
    run = subprocess.run([sys.executable, SCRIPT, "--run-dir", tmp_path], env=os.environ | variables | {"HF_HUB_OFFLINE": "1", "RAY_ADDRESS": "127.0.0.1:1"},
                         text=True, check=False, capture_output=True, timeout=60)
    assert run.returncode == 2 and not list(tmp_path.iterdir())
    assert run.stderr.count("ERROR: ") == 1 and f"ERROR: {name}='no-such-owner/no-such-name' cannot be loaded: " in run.stderr
    assert "Traceback" not in run.stderr


def test_a_search_without_a_cluster_says_how_to_start_one(demo, tmp_path):
    variables = {"MODEL_NAME": str(demo / "model"), "SQUAD_DATA": str(demo / "squad")}
    run = subprocess.run([sys.executable, SCRIPT, "--run-dir", tmp_path], env=os.environ | variables, text=True, check=False, capture_output=True, timeout=60)
    assert run.returncode == 2 and run.stdout == "" and not list(tmp_path.iterdir())
    assert run.stderr.startswith("ERROR: RAY_ADDRESS is not set") and run.stderr.count("\n") == 1


def run_head(exercise, **variables):
    return subprocess.run(["bash", HEAD], cwd=exercise, env=os.environ | variables, text=True, check=False, capture_output=True, timeout=60)


@pytest.fixture
def course(tmp_path):
    """A copy of the repository's scripts and exercise, in a folder whose name is not plain."""
    top = tmp_path / "my course é"
    for folder in ("scripts", "experiments"):
        shutil.copytree(REPO / folder, top / folder, symlinks=True, ignore=shutil.ignore_patterns("runs", "*.out", "__pycache__"))
    (top / ".venv").symlink_to(REPO / ".venv")
    return top / EXERCISE.relative_to(REPO)


def test_the_head_script_refuses_bad_input_before_it_starts_anything(course):
    run = run_head(course, LR_LOWER="1; touch here", SQUAD_DATA="/none")
    assert run.returncode == 2
    assert "ERROR: LR_LOWER='1; touch here'" in run.stdout
    lines = run.stdout.splitlines()
    assert lines[0].startswith("===== JOB local-") and " START " in lines[0]
    assert lines[-1].startswith("===== JOB local-") and " FINISH : " in lines[-1]
    assert not list(course.glob("**/here")) and not (course / "runs").exists()
    assert "Traceback" not in run.stdout + run.stderr
    (log,) = (course / "logs").glob("*.out")
    assert log.read_text() == run.stdout  # the terminal shows what the log file holds


@pytest.mark.parametrize("W, Cw, Gw, Csys, Cnode, Gnode, T", [
    (2, 2, 1, 2, 20, 8, 4), (2, 2, 1, 2, 17, 8, 3), (2, 2, 1, 2, 64, 4, 2), (2, 2, 0, 2, 20, 0, 4), (2, 2, 1, 2, 20, 1, 0),
    (4, 8, 1, 2, 20, 8, 0), (1, 1, 0, 2, 1, 0, 0), (1, 1, 1, 0, 1, 1, 1)])
def test_capacity(W, Cw, Gw, Csys, Cnode, Gnode, T):
    numbers = {"W": W, "Cw": Cw, "Gw": Gw, "Csys": Csys, "Cnode": Cnode, "Gnode": Gnode}
    options = [f"--{name}={value}" for name, value in numbers.items()]
    tool = [sys.executable, REPO / "scripts/raytune_hpo/worker_capacity.py"]
    assert subprocess.run([*tool, "--slots", *options], text=True, check=False, capture_output=True).stdout == f"{T}\n"
    told = subprocess.run([*tool, *options], text=True, check=False, capture_output=True)
    assert told.returncode == (T == 0)
    assert f"capacity: {T} trial(s) at once on a node" in told.stdout
    if T:  # T trials hold both inequalities, T + 1 break one
        fits = lambda t: Csys + t * W * Cw <= Cnode and t * W * Gw <= Gnode
        assert fits(T) and not fits(T + 1)
