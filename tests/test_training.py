"""Training for real: DeepSpeed with the shipped settings, one and two processes; every hyperparameter is live.

Many trainings share a process, because its start takes longer than they do. So they are warm trials as well: no result
may depend on the trainings before it.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
PBT = TESTS.parent / "scripts/raytune_hpo/raytune_pbt_scheduler"
BASE = {"lr": 1e-3, "per_device_bs": 2, "wd": 0.0}
CHANGES = [{}, {"lr": 2e-3}, {"per_device_bs": 1}, {"wd": 0.5}, {"warmup_ratio": 0.5}, {"adam_beta2": 0.5},
           {"max_grad_norm": 0.01, "adam_epsilon": 1e-3}]  # fmt: skip
FROZEN = {"lr": 1e-12}  # training changes nothing, so the loss is that of the model as it is stored
ONE_STEP = {"per_device_bs": 4, "lr": 1e-2}  # four samples a step in one process
PRECISIONS = ("fp32", "bf16", "fp16")


def train(demo, processes, trainings, folder=""):
    """What train_variants.py found: {name: result}."""
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
         TESTS / "train_variants.py", demo / "model", demo / "squad", folder,
         *(json.dumps(BASE | training) for training in trainings.values())],
        env=os.environ | {"PYTHONPATH": f"{TESTS}:{PBT}", "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"},
        text=True, check=False, capture_output=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    results = json.loads(next(line for line in run.stdout.splitlines() if line.startswith("RESULT "))[7:])
    return dict(zip([*(["from a checkpoint"] if folder else []), *trainings], results, strict=True))


def strong_scores(source, folder):
    """The model with scores of about -40 in the head where distance counts least. -> the new folder"""
    import torch
    from transformers import AutoModelForCausalLM

    shutil.copytree(source, folder)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    heads, size = model.config.n_head, model.config.hidden_size // model.config.n_head
    with torch.no_grad():
        query, key = model.transformer.h[0].self_attention.query_key_value.bias.view(heads, 3, size)[-1, :2]
        query += (40 / size**0.5) ** 0.5
        key -= (40 / size**0.5) ** 0.5
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def one(demo, tmp_path_factory):
    """Results of trainings in one process."""
    plain = {f"plain {i}": change | {"engine": "none"} for i, change in enumerate(CHANGES)}
    ours = {f"deepspeed {i}": change for i, change in enumerate(CHANGES)}
    stages = {f"stage {stage}": ONE_STEP | {"engine": stage} for stage in (2, 3)}
    precisions = {precision: {"precision": precision} for precision in PRECISIONS}
    steep = {"lr": 1e4, "num_train_epochs": 3}
    diverging = {f"{precision}, far too fast": steep | {"precision": precision} for precision in ("bf16", "fp16")}
    model = strong_scores(demo / "model", tmp_path_factory.mktemp("strong") / "model")
    strong = FROZEN | {"model": model}
    strong = {f"{precision}, strong scores": strong | {"precision": precision} for precision in PRECISIONS}
    more = {"no zero": {"engine": "no zero"}} | precisions | diverging | strong
    return train(demo, 1, plain | ours | {"again": {}} | {"frozen": FROZEN} | more | stages)


@pytest.fixture(scope="module")
def two(demo, tmp_path_factory):
    """Results of trainings in two processes."""
    stages = {f"stage {stage}": ONE_STEP | {"per_device_bs": 2, "engine": stage} for stage in (2, 3)}
    return train(demo, 2, {"frozen": FROZEN} | stages, tmp_path_factory.mktemp("checkpoints"))


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_trains_with_the_shipped_settings(one, two, stage):
    """World sizes 1 and 2 with the same samples a step: real DeepSpeed engines that end with the same loss."""
    results = [world[f"stage {stage}"] for world in (one, two)]
    for result in results:
        assert result["optimizer"] == {2: "DeepSpeedZeroOptimizer", 3: "DeepSpeedZeroOptimizer_Stage3"}[stage]
        assert len(result["eval_loss"]) == 1 and result["steps"] == 4
        assert result["eval_loss"][0] < one["frozen"]["eval_loss"][0] - 0.5
    assert results[0]["eval_loss"][0] == pytest.approx(results[1]["eval_loss"][0], rel=1e-2)


def test_each_hyperparameter_changes_the_weights_with_deepspeed_and_without(one):
    for engine in ("plain", "deepspeed"):
        weights = [one[f"{engine} {i}"]["weights"] for i in range(len(CHANGES))]
        assert len({round(each, 4) for each in weights}) == len(CHANGES), weights
    for i in range(len(CHANGES)):  # and to the same effect
        ours, plain = one[f"deepspeed {i}"], one[f"plain {i}"]
        assert ours["optimizer"] == "DeepSpeedZeroOptimizer" and plain["optimizer"] == "AdamW"
        assert ours["eval_loss"][0] == pytest.approx(plain["eval_loss"][0], rel=1e-3)
    assert one["no zero"]["eval_loss"][0] == pytest.approx(one["deepspeed 0"]["eval_loss"][0], rel=1e-3)
    assert one["again"] == one["deepspeed 0"]  # bit for bit, after six others: they leave nothing in their process


def test_eval_loss_is_the_exact_mean_over_answer_tokens(demo, hpo, one, two):
    """11 validation questions in batches of 8 over 2 processes: the last batch is filled up, yet each counts once."""
    import torch
    from transformers import AutoModelForCausalLM

    local = {"MODEL_NAME": str(demo / "model"), "SQUAD_DATA": str(demo / "squad")}
    settings = hpo.read_settings(local | {"TRAIN_SAMPLES": "16", "EVAL_SAMPLES": "11"})
    model = AutoModelForCausalLM.from_pretrained(demo / "model")
    loss_sum = tokens = 0
    for row in hpo.load_squad(settings)[1]:
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
        target = torch.tensor(row["labels"][1:])
        loss_sum += torch.nn.functional.cross_entropy(logits, target, reduction="sum").item()
        tokens += (target != -100).sum().item()
    for world in (one, two):
        assert world["frozen"]["eval_loss"][0] == pytest.approx(loss_sum / tokens, abs=1e-5)


def test_each_precision_learns_the_same_and_loses_no_step(one):
    for precision, kind in zip(PRECISIONS, ("float32", "bfloat16", "float16"), strict=True):
        assert one[precision]["computes in"] == f"torch.{kind}" and one[precision]["skipped"] == 0
        assert one[precision]["eval_loss"] == pytest.approx(one["fp32"]["eval_loss"], rel=2e-3)
        # Padding: in fp16 the usual mask of -65,504 and a score of -40 are -inf; such a row is NaN, which spreads.
        strong = one[f"{precision}, strong scores"]["eval_loss"]
        assert strong == pytest.approx(one["fp32, strong scores"]["eval_loss"], rel=2e-3)
    assert one["deepspeed 0"]["computes in"] == "torch.float32"  # auto, on CPUs
    for precision in ("bf16", "fp16"):  # DeepSpeed raises an error when fp16's loss scale cannot become smaller
        diverged = one[f"{precision}, far too fast"]
        assert math.isnan(diverged["eval_loss"][-1]) and diverged["epoch"] in (1, 2, 3)


def test_a_training_goes_on_from_anothers_weights_with_its_own_hyperparameters(two):
    every, diverging = two["from a checkpoint"]
    assert math.isnan(diverging[-1])  # is reported, so that Tune ends the trial
    optimizers = {every[engine]["donor"]["by"] for engine in every}
    assert optimizers == {"AcceleratedOptimizer", "DeepSpeedOptimizerWrapper"}
    for results in every.values():
        donor, same, still, other = (results[name] for name in ("donor", "same", "still", "other"))
        assert donor["from"] == 0
        assert same["from"] == still["from"] == other["from"] == 8  # two of four epochs, 4 steps each
        assert same["first weights"] == still["first weights"] == other["first weights"] != donor["first weights"]
        assert same["eval_loss"] == donor["eval_loss"][2:]  # as if it had not been interrupted
        assert still["eval_loss"] == [donor["eval_loss"][1]] * 2  # the donor's weights, and a rate of nothing
        assert other["eval_loss"][0] != donor["eval_loss"][2]
        decay, none = other["groups"]  # half of the schedule is over, so half of the rate is left
        assert decay["lr"] == none["lr"] == pytest.approx(4e-2 / 2)
        assert decay["betas"] == none["betas"] == [0.9, 0.8] and decay["eps"] == none["eps"] == 1e-6
        assert (decay["weight_decay"], none["weight_decay"]) == (0.5, 0)
        assert [group["lr"] for group in still["groups"]] == pytest.approx([5e-13, 5e-13])
        assert other["last"] == pytest.approx(4e-2 / 16)  # the last of 16 steps, by the schedule
