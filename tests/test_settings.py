"""Settings: the documented defaults, RESUME, what a shell gets, names on the hub, and the capacity of a node."""

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from conftest import REPO
from test_prefetch import closed_port, hub  # noqa: F401  the stand-in for the Hugging Face hub

CHECK = REPO / "scripts/job/check_inputs.py"


@pytest.fixture
def local(demo):
    return {"MODEL_NAME": str(demo / "model"), "SQUAD_DATA": str(demo / "squad")}


def test_defaults_are_the_documented_ones(hpo):
    s = hpo.read_settings({})
    assert (s.LR_LOWER, s.LR_UPPER, s.BS_CHOICES, s.WD_CHOICES) == (5e-6, 2e-4, [1, 2], [0.0, 0.01])
    assert (s.WORKER_NODES, s.NUM_SAMPLES, s.NUM_EPOCHS, s.SEED) == (1, 12, 5, 42)
    assert (s.TRAIN_SAMPLES, s.EVAL_SAMPLES) == (1000, 100)
    assert (s.WORKERS_PER_TRIAL, s.CPUS_PER_WORKER, s.GPUS_PER_WORKER) == (2, 2, 1)
    assert (s.MODEL_NAME, s.SQUAD_DATA) == ("bigscience/bloom-560m", "rajpurkar/squad")


def test_a_misspelt_hyperparameter_is_a_problem_and_a_right_one_is_not(checks):
    drawn = {"lr": None, "per_device_bs": None, "wd": None}
    assert checks.search_space_problems({"train_loop_config": drawn}) == []
    right = drawn | {"warmup_ratio": None, "adam_beta2": None}
    assert checks.search_space_problems({"train_loop_config": right}) == []
    problems = checks.search_space_problems({"train_loop_config": drawn | {"warmup_rate": None, "weight_decai": None}})
    assert [line.split("'")[1] for line in problems] == ["warmup_rate", "weight_decai"]
    assert "did you mean 'warmup_ratio'?" in problems[0] and "did you mean 'weight_decay'?" in problems[1]


def test_a_scheduler_that_needs_checkpoints_is_a_problem_where_there_are_none(checks):
    from ray.tune import schedulers

    rule = {"metric": "eval_loss", "mode": "min"}
    pbt = schedulers.PopulationBasedTraining(**rule, hyperparam_mutations={"train_loop_config": {"lr": [1, 2]}})
    assert checks.scheduler_problems(schedulers.FIFOScheduler()) == []
    for chosen in (pbt, schedulers.HyperBandScheduler(**rule)):
        (problem,) = checks.scheduler_problems(chosen)
        assert problem.startswith(f"scheduler: {type(chosen).__name__} ") and "use raytune_pbt_hpo.py" in problem


# ---- What a shell gets -------------------------------------------------------------------------------------------
def run(environ, *options):
    """check_inputs.py as scripts call it."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "HF_"))}
    return subprocess.run([sys.executable, CHECK, *options], env=ours | environ, cwd=environ.get("PWD"), text=True,
                          check=False, capture_output=True, timeout=60)  # fmt: skip


HOSTILE = ["a b", "it's \"so\"", "$(touch here)", "`touch here`;x", "*", "-n", "é 模型", "back\\slash", "$HOME"]


def test_eval_of_the_exports_gives_exactly_the_values(checks, hpo, demo, tmp_path):
    for name in HOSTILE:
        (tmp_path / name).mkdir()
    for file in [*(demo / "model").iterdir(), *(demo / "squad").iterdir()]:
        for name in HOSTILE:
            (tmp_path / name / file.name).symlink_to(file)
    for i, name in enumerate(HOSTILE):
        given = {"MODEL_NAME": f"{tmp_path}/{name}", "SQUAD_DATA": f"./{name}", "PWD": str(tmp_path),
                 "LR_LOWER": "0.00001", "BS_CHOICES": " 4  2 ", "NUM_SAMPLES": "007"}  # fmt: skip
        given |= {"GPUS_PER_WORKER": "0"} if i else {}
        if i < 2:  # the real thing; the others in this process
            done = run(given, "--export")
            assert done.returncode == 0 and f"  MODEL_NAME         {tmp_path}/{name}\n" in done.stderr
            exports = done.stdout
        else:
            s = checks.check(given | {"SQUAD_DATA": f"{tmp_path}/{name}"})
            exports = "".join(f"{line}\n" for line in checks.export_lines(s))
        shell = subprocess.run(["bash", "-euc", 'eval "$0"; env -0', exports], cwd=tmp_path, text=True, check=True,
                               env={"PATH": os.environ["PATH"]}, capture_output=True)  # fmt: skip
        got = dict(entry.split("=", 1) for entry in shell.stdout.split("\0") if entry)
        assert got["MODEL_NAME"] == got["SQUAD_DATA"] == f"{tmp_path}/{name}"
        assert set(hpo.VARIABLES) - set(got) == (set() if i else {"GPUS_PER_WORKER"})  # 0 where there are no GPUs
        s = hpo.read_settings(got)
        assert (s.LR_LOWER, s.BS_CHOICES, s.NUM_SAMPLES, s.SEED) == (1e-5, [4, 2], 7, 42)
        assert s.GPUS_PER_WORKER == (0 if i else 1)
    assert not (tmp_path / "here").exists()


def test_single_values_come_without_a_look_at_the_data(local, tmp_path):
    done = run(local | {"SQUAD_DATA": str(tmp_path), "BS_CHOICES": "2 4"}, "--get", "SEED", "BS_CHOICES", "SQUAD_DATA")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"42\n2 4\n{tmp_path}\n", "")
    assert run(local | {"SEED": "x"}, "--get", "SEED").returncode == 2


def test_a_missing_package_is_one_line(local, tmp_path, checks, monkeypatch):
    (tmp_path / "ray.py").write_text("raise ModuleNotFoundError(name='ray')")
    done = run(local | {"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("ERROR: ") and "has no package ray; run scripts/setup_env.sh" in done.stderr
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: name != "deepspeed")
    with pytest.raises(ModuleNotFoundError) as error:
        checks.check(local)
    assert error.value.name == "deepspeed"


# ---- RESUME ------------------------------------------------------------------------------------------------------
@pytest.fixture
def earlier(local, tmp_path):
    """The folder of an earlier run; its settings.json also names variables that no longer exist."""
    saved = local | {"LR_LOWER": "1e-5", "NUM_SAMPLES": "7", "WORKER_NODES": "3"}
    saved |= {"CHECKPOINTS": "1", "SEEDS": "1", "OLD": None}
    (tmp_path / "settings.json").write_text(json.dumps(saved))
    return str(tmp_path)


def test_a_resumed_run_has_its_settings_and_some_may_change(checks, earlier, local):
    model = local["MODEL_NAME"] + "/."
    s = checks.check({"RESUME": earlier, "LR_LOWER": "0.00001", "WORKER_NODES": "2", "MODEL_NAME": model})
    assert (s.LR_LOWER, s.NUM_SAMPLES, s.WORKER_NODES, s.SEED, s.gpus_required) == (1e-5, 7, 2, 42, False)
    assert checks.check({"RESUME": earlier}).WORKER_NODES == 3 and s.MODEL_NAME == local["MODEL_NAME"]


def test_a_resumed_run_keeps_what_decides_its_results(checks, earlier):
    with pytest.raises(checks.InputError) as error:
        checks.check({"RESUME": earlier, "NUM_SAMPLES": "8", "SEED": "42", "LR_LOWER": "x", "GPUS_PER_WORKER": "0"})
    lines = str(error.value).splitlines()
    assert sorted(line.split("=")[0] for line in lines) == ["GPUS_PER_WORKER", "LR_LOWER", "NUM_SAMPLES", "SEED"]
    fix = "unset NUM_SAMPLES, or start a new run without RESUME"
    assert f"NUM_SAMPLES='8': the run in {earlier} has '7'; {fix}" in lines


@pytest.mark.parametrize("content", [None, "", "[1]", "3", '"text"', "[" * 100_000])
def test_a_folder_without_settings_is_no_run(checks, tmp_path, content):
    if content is not None:
        (tmp_path / "settings.json").write_text(content)
    with pytest.raises(checks.InputError, match=r"^RESUME='.*': no settings.json of a search in this folder; give .*$"):
        checks.check({"RESUME": str(tmp_path)})


# ---- Names on the Hugging Face hub -------------------------------------------------------------------------------
def test_names_on_the_hub(hub, tmp_path):  # noqa: F811
    """The hub's own clients ask the stand-in. The check leaves nothing that an offline node would take for a model."""
    on_hub = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "no_proxy": "127.0.0.1"}
    on_hub |= {"MODEL_NAME": "org/tiny", "SQUAD_DATA": "org/squad"}
    done = run(on_hub)
    assert done.returncode == 0 and done.stderr == "" and "  MODEL_NAME         org/tiny\n" in done.stdout
    assert not [line for line in hub.asked if line == "GET /org/tiny/resolve/main/model.safetensors"]
    done = run(on_hub | {"MODEL_NAME": "org/pickled", "SQUAD_DATA": "org/none"})
    model, data = done.stderr.splitlines()
    assert done.returncode == 2
    assert model.startswith("ERROR: MODEL_NAME='org/pickled': has no weights in model*.safetensors")
    assert data.startswith("ERROR: SQUAD_DATA='org/none': cannot be loaded: ")
    assert data.endswith("and give the local folder")
    done = run(on_hub | {"HF_ENDPOINT": f"http://127.0.0.1:{closed_port()}"})  # a node without a route
    names = [line.split(": cannot be loaded: ")[0] for line in done.stderr.splitlines()]
    assert done.returncode == 2 and names == ["ERROR: MODEL_NAME='org/tiny'", "ERROR: SQUAD_DATA='org/squad'"]


def test_a_hub_that_never_answers_is_given_up(checks):
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="no answer from the hub within 0.2 s"):
        checks.within(0.2, lambda: time.sleep(30))
    assert time.monotonic() - start < 5


def test_what_the_hub_says_of_a_data_set_is_checked(checks, local, monkeypatch):
    import datasets

    def of(features, train):
        info = SimpleNamespace(features=features, splits=train and {"train": SimpleNamespace(num_examples=train)})
        monkeypatch.setattr(datasets, "load_dataset_builder", lambda name: SimpleNamespace(info=info))
        return checks.check(local | {"SQUAD_DATA": "some/set"})

    squad = dict.fromkeys(("id", "context", "question", "answers"))
    assert of(squad, 1000).SQUAD_DATA == of(squad, None).SQUAD_DATA == of(None, 0).SQUAD_DATA == "some/set"
    with pytest.raises(checks.InputError, match=r"^TRAIN_SAMPLES='1000': some/set \(train\) has only 999 questions"):
        of(squad, 999)
    with pytest.raises(checks.InputError, match="^SQUAD_DATA='some/set': no columns context, question and answers"):
        of({"text": None}, 1000)


# ---- Capacity ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("W, Cw, Gw, Csys, Cnode, Gnode, T", [
    (2, 2, 1, 2, 20, 8, 4), (2, 2, 1, 2, 17, 8, 3), (2, 2, 1, 2, 64, 4, 2), (2, 2, 0, 2, 20, 0, 4),
    (2, 2, 1, 2, 20, 1, 0), (4, 8, 1, 2, 20, 8, 0), (1, 1, 0, 2, 1, 0, 0), (1, 1, 1, 0, 1, 1, 1)])
def test_capacity(W, Cw, Gw, Csys, Cnode, Gnode, T):
    numbers = {"W": W, "Cw": Cw, "Gw": Gw, "Csys": Csys, "Cnode": Cnode, "Gnode": Gnode}
    options = [f"--{name}={value}" for name, value in numbers.items()]
    tool = [sys.executable, REPO / "scripts/job/worker_capacity.py"]
    assert subprocess.run([*tool, "--slots", *options], text=True, check=False, capture_output=True).stdout == f"{T}\n"
    told = subprocess.run([*tool, *options], text=True, check=False, capture_output=True)
    assert told.returncode == (T == 0)
    assert f"capacity: {T} trial(s) at once on a node" in told.stdout
    if T:  # T trials hold both inequalities, T + 1 break one
        fits = lambda t: Csys + t * W * Cw <= Cnode and t * W * Gw <= Gnode
        assert fits(T) and not fits(T + 1)
