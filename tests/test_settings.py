"""Settings: the documented defaults, RESUME, what a shell gets, search spaces, and the capacity of a node."""

import json
import os
import re
import subprocess
import sys

import conftest
import numpy as np
import pytest
from conftest import EXERCISE, REPO, load_module
from ray import tune
from ray.tune import schedulers
from ray.tune.search.optuna import OptunaSearch

CHECK = REPO / "scripts/job/check_inputs.py"


@pytest.fixture
def local(demo):
    return {"MODEL_NAME": str(demo / "model"), "SQUAD_DATA": str(demo / "squad")}


# ---- Search space and scheduler ------------------------------------------------------------------------------------
RULE = {"metric": "eval_loss", "mode": "min"}
DRAWN = {"lr": tune.loguniform(1e-5, 1e-4), "per_device_bs": 2, "wd": 0.0}
space = lambda **more: ("search_space", lambda s: {"train_loop_config": DRAWN | more})
scheduler = lambda kind, **more: ("scheduler", lambda s: getattr(schedulers, kind)(**RULE | more))


@pytest.mark.parametrize("edit, said", [
    (space(warmup_ratio=tune.uniform(0.0, 0.2), lr_scheduler_type=tune.choice(["cosine", "polynomial"]),
           per_device_bs=tune.choice(np.arange(1, 3)), gradient_accumulation_steps=tune.choice(np.arange(1, 3))), None),
    (space(bf16=True, tf32=True), None),  # the nodes of the run may have what this one lacks
    (space(warmup_rate=0.1), "search space: 'warmup_rate' is no hyperparameter; .* did you mean 'warmup_ratio'?"),
    (space(optim=tune.grid_search(["adamw_torch", "adam_w"])),
     "search space=.'optim': 'adam_w'.: training with it fails .*adam_w is not a valid Opt.*; draw something else"),
    (space(learning_rate=1e-5), "search space: 'lr' and 'learning_rate' are the same hyperparameter; remove one"),
    (space(per_device_bs=tune.quniform(2, 2, 1)), "search space: per_device_bs=2.0: is not a whole number"),
    (space(lr="1e-5x"), "search space: lr='1e-5x': is not a number"),
    (("search_space", lambda s: {"lr": 1}), "search space: has .'lr'.; put what is drawn into train_loop_config.*"),
    (scheduler("ASHAScheduler", mode="max"), "AsyncHyperBandScheduler: mode='max': is not .*; set mode='min'"),
    (scheduler("MedianStoppingRule", time_attr="epochs"), "M.*: time_attr='epochs': is not .*; set time_attr='epoch'"),
    (("search_algorithm", lambda s: OptunaSearch(metric="loss", mode="min")), "Opt.*='loss': is not .*='eval_loss'"),
    (scheduler("HyperBandScheduler"), "scheduler: HyperBandScheduler .* use raytune_pbt_hpo.py.*"),
    (scheduler("ASHAScheduler", grace_period=9, max_t=5), "search space or scheduler: AssertionError.*; mend it in .*"),
])  # fmt: skip
def test_a_search_that_would_fail_in_every_trial_is_refused(checks, local, monkeypatch, edit, said):
    monkeypatch.setattr(checks.lesson, *edit)
    if said is None:
        checks.check(local)
    else:
        with pytest.raises(checks.InputError) as error:
            checks.check(local)
        assert re.fullmatch(said.replace("?", "[?]"), str(error.value))


# ---- What a shell gets -------------------------------------------------------------------------------------------
def test_eval_of_the_exports_gives_exactly_the_values(hpo, demo, tmp_path):
    """Of a folder with any name, on a terminal that lacks a letter."""
    name = """-n é "it's" $(touch here)`touch here`;* 100% back\\slash $HOME"""
    (tmp_path / name).mkdir()
    for file in [*(demo / "model").iterdir(), *(demo / "squad").iterdir()]:
        (tmp_path / name / file.name).symlink_to(file)
    given = {"MODEL_NAME": f"{tmp_path}/{name}", "SQUAD_DATA": f"./{name}", "PYTHONIOENCODING": "ascii",
             "LR_LOWER": "0.00001", "BS_CHOICES": " 4  2 ", "NUM_SAMPLES": "007"}  # fmt: skip
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "HF_"))}
    done = subprocess.run([sys.executable, CHECK, "--export"], env=ours | given, cwd=tmp_path, text=True, check=True,
                          capture_output=True, timeout=120)  # fmt: skip
    assert f"  MODEL_NAME         {tmp_path}/-n \\xe9 " in done.stderr
    shell = subprocess.run(["bash", "-euc", 'eval "$0"; env -0', done.stdout], cwd=tmp_path, text=True, check=True,
                           env={"PATH": os.environ["PATH"]}, capture_output=True)  # fmt: skip
    got = dict(entry.split("=", 1) for entry in shell.stdout.split("\0") if entry)
    assert got["MODEL_NAME"] == got["SQUAD_DATA"] == f"{tmp_path}/{name}"
    assert set(hpo.VARIABLES) - set(got) == {"GPUS_PER_WORKER"}  # 0 where there are no GPUs
    s = hpo.read_settings(got)
    assert (s.LR_LOWER, s.BS_CHOICES, s.NUM_SAMPLES, s.SEED) == (1e-5, [4, 2], 7, 42)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_wrong_number_is_refused_before_anything_large_is_imported(local):
    code = "import sys, check_inputs as c\ntry: c.check({'NUM_SAMPLES': 'x'})\nexcept c.InputError: "
    code += "print({'torch', 'transformers', 'datasets'} & {*sys.modules})"
    environ = os.environ | {"PYTHONPATH": str(CHECK.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environ, text=True, check=True, capture_output=True)
    assert done.stdout == "set()\n"


def test_a_missing_package_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name != "deepspeed")
    with pytest.raises(SystemExit) as end:
        load_module(CHECK)
    said = capsys.readouterr()
    assert end.value.code == 2 and said.out == "" and said.err.count("\n") == 1
    assert said.err.startswith("ERROR: ") and "lacks deepspeed; run scripts/setup_env.sh" in said.err


# ---- RESUME ------------------------------------------------------------------------------------------------------
@pytest.fixture
def earlier(local, tmp_path):
    """The folder of an earlier run; its record also names a variable that no longer exists."""
    (tmp_path / "my search.py").touch()
    time, saved = {"time": "2026-11-29T09:30:00.123Z"}, {"LR_LOWER": "1e-5", "NUM_SAMPLES": "7", "WORKER_NODES": "3"}
    events = [{"event": "started", "job": "7", "script": f"{tmp_path}/my search.py"},
              {"event": "settings", "CHECKPOINTS": "1"} | local | saved]  # fmt: skip
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(time | event) + "\n" for event in events))
    return str(tmp_path)


def test_a_resumed_run_has_its_settings_and_some_may_change(checks, earlier, local):
    model, script = local["MODEL_NAME"] + "/.", f"{earlier}/../{os.path.basename(earlier)}/my search.py"
    given = {"RESUME": earlier, "LR_LOWER": "0.00001", "WORKER_NODES": "2", "MODEL_NAME": model}
    s = checks.check(given | {"SEARCH_SCRIPT": script})
    assert (s.LR_LOWER, s.NUM_SAMPLES, s.WORKER_NODES, s.SEED, s.gpus_required) == (1e-5, 7, 2, 42, False)
    assert f"export SEARCH_SCRIPT='{earlier}/my search.py'" in checks.export_lines(s)
    assert checks.check({"RESUME": earlier}).WORKER_NODES == 3 and s.MODEL_NAME == local["MODEL_NAME"]


def test_a_resumed_run_keeps_what_decides_its_results(checks, earlier):
    given = {"NUM_SAMPLES": "8", "SEED": "42", "LR_LOWER": "x", "GPUS_PER_WORKER": "0", "SEARCH_SCRIPT": "other.py"}
    with pytest.raises(checks.InputError) as error:
        checks.check(given | {"RESUME": earlier})
    assert sorted(line.split("=")[0] for line in str(error.value).splitlines()) == sorted(given)
    assert f"NUM_SAMPLES='8': the run in {earlier} has '7'; unset NUM_SAMPLES, or start " in str(error.value)


def test_a_folder_without_a_record_is_no_run(checks, tmp_path):
    (tmp_path / "events.jsonl").write_text("[1]")
    with pytest.raises(checks.InputError, match=r"^RESUME='.*': no record of a search \(events.jsonl\); give .*$"):
        checks.check({"RESUME": str(tmp_path)})


# ---- Capacity ----------------------------------------------------------------------------------------------------
def test_capacity_is_told_as_the_page_shows_it():
    capacity = load_module(REPO / "scripts/job/worker_capacity.py")
    told = conftest.call(capacity, "--W=1", "--Cw=1", "--Gw=0.25")
    assert told.returncode == 0 and told.stdout in (EXERCISE / "README.md").read_text()
    assert conftest.call(capacity, "--slots", "--Cnode=20", "--Gnode=0", "--Gw=0").stdout == "4\n"
    laptop = ("--slots", "--W=2", "--Cw=1", "--Gw=0", "--Cnode=32", "--Gnode=0", "--Mw=0.7", "--Mnode=8")
    assert conftest.call(capacity, *laptop).stdout == "5 a trial takes 2*0.7 of 7 GiB (MEMORY_PER_WORKER)\n"
