"""Training for real: DeepSpeed with the shipped settings, one and two processes; every hyperparameter is live.

Many trainings share a process, because its start takes longer than they do. So they are warm trials as well: no result
may depend on the trainings before it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
BASE = {"lr": 1e-3, "per_device_bs": 2, "wd": 0.0}
CHANGES = [{}, {"lr": 2e-3}, {"per_device_bs": 1}, {"wd": 0.5}, {"warmup_ratio": 0.5}, {"adam_beta2": 0.5},
           {"max_grad_norm": 0.01, "adam_epsilon": 1e-3}]  # fmt: skip
FROZEN = {"lr": 1e-12}  # training changes nothing, so the loss is that of the model as it is stored
ONE_STEP = {"per_device_bs": 4, "lr": 1e-2}  # four samples a step in one process


def train(demo, processes, trainings):
    """What train_variants.py found: {name: result}."""
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
         TESTS / "train_variants.py", demo / "model", demo / "squad",
         *(json.dumps(BASE | training) for training in trainings.values())],
        env=os.environ | {"PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"},
        text=True, check=False, capture_output=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    results = json.loads(next(line for line in run.stdout.splitlines() if line.startswith("RESULT "))[7:])
    return dict(zip(trainings, results, strict=True))


@pytest.fixture(scope="module")
def one(demo):
    """Results of trainings in one process."""
    plain = {f"plain {i}": change | {"engine": "none"} for i, change in enumerate(CHANGES)}
    ours = {f"deepspeed {i}": change for i, change in enumerate(CHANGES)}
    stages = {f"stage {stage}": ONE_STEP | {"engine": stage} for stage in (2, 3)}
    return train(demo, 1, plain | ours | {"again": {}} | {"frozen": FROZEN} | stages)


@pytest.fixture(scope="module")
def two(demo):
    """Results of trainings in two processes."""
    stages = {f"stage {stage}": ONE_STEP | {"per_device_bs": 2, "engine": stage} for stage in (2, 3)}
    return train(demo, 2, {"frozen": FROZEN} | stages)


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


def test_a_training_leaves_nothing_to_the_next_one_in_its_process(one):
    assert one["again"] == one["deepspeed 0"]  # bit for bit, after six others


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
