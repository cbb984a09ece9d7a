"""Run by torchrun in test_training.py: trains several configurations one after another, prints a JSON line of results.

    torchrun --standalone --nproc_per_node=2 train_variants.py MODEL SQUAD FOLDER TRAINING...

FOLDER: if not empty, for the checkpoints of train_from_checkpoint.py, whose trainings then come first.
TRAINING: a JSON dict of hyperparameters. Its key "engine", if any, is "none" (training without DeepSpeed), a ZeRO stage
instead of the shipped one, or "no zero" (a ds_config.json that does not speak of ZeRO). Those with "none" come first:
accelerate cannot switch back from DeepSpeed. Its keys "precision" and "model" stand for PRECISION and MODEL_NAME. CPUs
compute fp16, slowly; DeepSpeed is told that they do.
"""

import json
import os
import sys
from pathlib import Path

import deepspeed
import numpy
from conftest import SCRIPT, load_module
from deepspeed.accelerator import get_accelerator
from transformers import TrainerCallback

os.environ["DS_ACCELERATOR"] = "cpu"
type(get_accelerator()).is_fp16_supported = lambda self: True
hpo = load_module(SCRIPT)
SHIPPED = json.loads(hpo.DS_CONFIG.read_text())


class Watch(TrainerCallback):
    """The losses, and what is there at the end of the training."""

    def __init__(self):
        self.seen = {"eval_loss": []}

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.seen["computes in"] = str(next(model.parameters()).dtype)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.seen["eval_loss"].append(metrics["eval_answer_loss"])
        self.seen["epoch"] = state.epoch

    def on_train_end(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **kwargs):
        total = 0.0  # of the absolute values of all weights; with ZeRO-3 they are gathered first
        for parameter in model.parameters():
            with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                total += parameter.detach().double().abs().sum().item()
        self.seen |= {"skipped": state.global_step - lr_scheduler.last_epoch, "steps": state.global_step}
        self.seen |= {"weights": total, "optimizer": type(optimizer.optimizer).__name__}


model, squad, folder, *trainings = sys.argv[1:]
small = {"TRAIN_SAMPLES": "16", "EVAL_SAMPLES": "11", "NUM_EPOCHS": "1"}
settings = hpo.read_settings({"MODEL_NAME": model, "SQUAD_DATA": squad} | small)
rows, results, written = hpo.load_squad(settings), [], Path(f"{sys.argv[0]}.{os.getpid()}.json")
if folder:
    import train_from_checkpoint

    results.append(train_from_checkpoint.results(model, squad, folder))
for training in map(json.loads, trainings):
    stage, watch = training.pop("engine", 2), Watch()
    settings.PRECISION, settings.MODEL_NAME = training.pop("precision", "auto"), training.pop("model", model)
    config = SHIPPED | {"zero_optimization": SHIPPED["zero_optimization"] | {"stage": stage}}
    if stage == "no zero":
        del config["zero_optimization"]
    written.write_text(json.dumps(config))
    hpo.DS_CONFIG = None if stage == "none" else written
    drawn = {name: numpy.asarray(value)[()] for name, value in training.items()}  # as from tune.choice(np.arange(4))
    hpo.fine_tune(drawn, settings, *rows, callbacks=[watch])
    results.append(watch.seen)
written.unlink()
if os.environ["RANK"] == "0":
    print("RESULT " + json.dumps(results), flush=True)
