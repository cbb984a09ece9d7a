"""Run by torchrun in test_training.py: trains variants of one configuration, prints a JSON line with what came out.

    torchrun --standalone --nproc_per_node=2 train_variants.py MODEL SQUAD STAGE VARIANT...

STAGE: a ZeRO stage to write into a copy of the shipped ds_config.json, or "none" for training without DeepSpeed.
VARIANT: a JSON dict of hyperparameters.
"""

import json
import os
import sys
from pathlib import Path

from conftest import SCRIPT, load_module

hpo = load_module(SCRIPT)


def weights_digest(trainer):
    """The sum of the absolute values of all weights; with ZeRO-3 they are gathered first."""
    import deepspeed

    total = 0.0
    for parameter in trainer.model.parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            total += parameter.detach().double().abs().sum().item()
    return total


def main():
    model, squad, stage, *variants = sys.argv[1:]
    settings = hpo.read_settings({"MODEL_NAME": model, "SQUAD_DATA": squad, "TRAIN_SAMPLES": "16", "EVAL_SAMPLES": "11", "NUM_EPOCHS": "1"})
    if stage == "none":
        hpo.DS_CONFIG = None
    else:
        config = json.loads(hpo.DS_CONFIG.read_text())
        config["zero_optimization"]["stage"] = int(stage)
        hpo.DS_CONFIG = Path(f"{sys.argv[0]}.{os.environ['RANK']}.{os.getpid()}.json")
        hpo.DS_CONFIG.write_text(json.dumps(config))
    rows = hpo.load_squad(settings)
    results = []
    for variant in variants:
        trainer = hpo.fine_tune(json.loads(variant), settings, *rows)
        evaluations = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        results.append({"eval_loss": evaluations, "weights": weights_digest(trainer), "steps": trainer.state.global_step,
                        "engine": type(trainer.model_wrapped).__name__, "zero": getattr(trainer.model_wrapped, "zero_optimization_stage", lambda: None)()})
    if stage != "none":
        hpo.DS_CONFIG.unlink()
    if os.environ["RANK"] == "0":
        print("RESULT " + json.dumps(results), flush=True)


main()
