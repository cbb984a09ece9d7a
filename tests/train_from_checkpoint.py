"""Run by torchrun in test_schedulers.py: trainings that start from another one's checkpoint; prints a JSON line.

    torchrun --standalone --nproc_per_node=2 train_from_checkpoint.py MODEL SQUAD FOLDER [none]

FOLDER: for the checkpoints, new. With "none" without DeepSpeed.
"""

import json
import os
import sys
from pathlib import Path

from conftest import SCRIPT, load_module
from transformers import TrainerCallback

hpo = load_module(SCRIPT)
DONOR = {"lr": 1e-2, "per_device_bs": 2, "wd": 0.0, "adam_beta2": 0.9}


class Watch(TrainerCallback):
    """The optimizer's settings at the first step, and the weights that it then has."""

    seen = None

    def on_step_begin(self, args, state, control, optimizer=None, model=None, **kwargs):
        if not self.seen:
            self.seen = {"groups": [{key: group[key] for key in ("lr", "weight_decay", "betas")} for group in optimizer.param_groups],
                         "weights": sum(parameter.detach().double().abs().sum().item() for parameter in model.parameters()), "step": state.global_step}


def main():
    model, squad, folder, *without = sys.argv[1:]
    if without:
        hpo.DS_CONFIG = None
    settings = hpo.read_settings({"MODEL_NAME": model, "SQUAD_DATA": squad, "TRAIN_SAMPLES": "16", "EVAL_SAMPLES": "11", "NUM_EPOCHS": "4"})
    rows, results, start = hpo.load_squad(settings), {}, None
    for name, changes in {"donor": {}, "same": {}, "still": {"lr": 1e-12}, "other": {"lr": 4e-2, "wd": 0.5, "adam_beta2": 0.8}}.items():
        watch = Watch()
        trainer = hpo.fine_tune(DONOR | changes, settings, *rows, [watch], f"{folder}/{name}", start)
        results[name] = watch.seen | {"losses": [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]}
        start = start or sorted(Path(folder, "donor").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))[1]  # after epoch 2
    if os.environ["RANK"] == "0":
        print("RESULT " + json.dumps(results), flush=True)


main()
