"""Settings: defaults, hyperparameters, what only the search itself can find out, and capacity. Bad input: test_bad_input.py."""

import os
import subprocess
import sys

import pytest
from conftest import REPO, SCRIPT


def test_defaults_are_the_documented_ones(hpo):
    s = hpo.read_settings({})
    assert (s.LR_LOWER, s.LR_UPPER, s.BS_CHOICES, s.WD_CHOICES) == (5e-6, 2e-4, [1, 2], [0.0, 0.01])
    assert (s.WORKER_NODES, s.NUM_SAMPLES, s.NUM_EPOCHS, s.TRAIN_SAMPLES, s.EVAL_SAMPLES, s.SEED) == (1, 12, 5, 1000, 100, 42)
    assert (s.WORKERS_PER_TRIAL, s.CPUS_PER_WORKER, s.GPUS_PER_WORKER) == (2, 2, 1)
    assert (s.MODEL_NAME, s.SQUAD_DATA) == ("bigscience/bloom-560m", "rajpurkar/squad")


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


def test_a_trials_own_process_has_imported_all_it_needs_and_no_pytorch():
    """What it has not imported ahead, the GPUs of the next trial wait for; PyTorch costs a second and 200 MB, for each trial."""
    code = """
import sys, bloom_hpo_manual
hpo = bloom_hpo_manual.load_search_script()
hpo.import_ahead()
ahead = set(sys.modules)
hpo.trainer_of_the_trial()
print("torch" in sys.modules, "ray.tune" in ahead, sorted(set(sys.modules) - ahead))
"""
    environ = os.environ | {"PYTHONPATH": str(REPO / "scripts/manual_hpo")}
    run = subprocess.run([sys.executable, "-c", code], env=environ, text=True, check=True, capture_output=True, timeout=60)
    assert run.stdout.split("\n")[-2] == "False True []"


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
