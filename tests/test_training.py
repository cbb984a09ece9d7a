"""Training for real: DeepSpeed with the shipped settings, one and two processes; every hyperparameter is live."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
BASE = {"lr": 1e-3, "per_device_bs": 2, "wd": 0.0}


def train(demo, stage, processes, *variants):
    """What train_variants.py found for each variant."""
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", TESTS / "train_variants.py",
         demo / "model", demo / "squad", stage, *map(json.dumps, variants)],
        env=os.environ | {"PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"},
        text=True, check=False, capture_output=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(next(line for line in run.stdout.splitlines() if line.startswith("RESULT "))[7:])


@pytest.mark.parametrize("stage", ["2", "3"])
def test_deepspeed_trains_with_the_shipped_settings(demo, stage):
    """World sizes 1 and 2 with the same samples a step: real DeepSpeed engines that end with the same loss."""
    (one,) = train(demo, stage, 1, BASE | {"per_device_bs": 4, "lr": 1e-2})
    (two,) = train(demo, stage, 2, BASE | {"lr": 1e-2})
    (untrained,) = train(demo, stage, 1, BASE | {"lr": 1e-9})
    for result in (one, two):
        assert result["engine"] == "DeepSpeedEngine" and result["zero"] == int(stage)
        assert len(result["eval_loss"]) == 1 and result["steps"] == 4
        assert result["eval_loss"][0] < untrained["eval_loss"][0] - 0.5


def test_each_hyperparameter_changes_the_weights_with_deepspeed_and_without(demo):
    variants = [BASE, BASE | {"lr": 2e-3}, BASE | {"per_device_bs": 1}, BASE | {"wd": 0.5}, BASE | {"warmup_ratio": 0.5},
                BASE | {"adam_beta2": 0.5}, BASE | {"max_grad_norm": 0.01, "adam_epsilon": 1e-3}]
    with_deepspeed, without = train(demo, "2", 1, *variants), train(demo, "none", 1, *variants)
    for results in (with_deepspeed, without):
        assert len({round(result["weights"], 4) for result in results}) == len(variants), results
    assert {result["engine"] for result in without} != {"DeepSpeedEngine"}
    for ours, plain in zip(with_deepspeed, without, strict=True):  # and to the same effect
        assert ours["eval_loss"][0] == pytest.approx(plain["eval_loss"][0], rel=1e-3)


def test_eval_loss_is_the_exact_mean_over_answer_tokens(demo, hpo):
    """11 validation questions in batches of 8 over 2 processes: the last batch is filled up, yet each counts once."""
    import torch
    from transformers import AutoModelForCausalLM

    frozen = BASE | {"lr": 1e-12}  # training changes nothing, so the loss is that of the model as it is stored
    one, two = train(demo, "2", 1, frozen)[0], train(demo, "2", 2, frozen)[0]
    settings = hpo.read_settings({"MODEL_NAME": str(demo / "model"), "SQUAD_DATA": str(demo / "squad"), "TRAIN_SAMPLES": "16", "EVAL_SAMPLES": "11"})
    model = AutoModelForCausalLM.from_pretrained(demo / "model")
    loss_sum = tokens = 0
    for row in hpo.load_squad(settings)[1]:
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
        target = torch.tensor(row["labels"][1:])
        loss_sum += torch.nn.functional.cross_entropy(logits, target, reduction="sum").item()
        tokens += (target != -100).sum().item()
    assert one["eval_loss"][0] == pytest.approx(loss_sum / tokens, abs=1e-5)
    assert two["eval_loss"][0] == pytest.approx(loss_sum / tokens, abs=1e-5)
