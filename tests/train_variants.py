"""Run by torchrun in test_training.py: trains several configurations one after another, prints a JSON line of results.

    torchrun --standalone --nproc_per_node=2 train_variants.py MODEL SQUAD FOLDER TRAINING...

FOLDER: if not empty, for the checkpoints of trainings that start from another one's, as those of PBT's trials do. They
come first.
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
import ray
import raytune_pbt_hpo as pbt
from deepspeed.accelerator import get_accelerator
from transformers import TrainerCallback

os.environ["DS_ACCELERATOR"] = "cpu"
type(get_accelerator()).is_fp16_supported = lambda self: True
ray.get, ray.get_gpu_ids = lambda data: data, list  # there is no Ray here
hpo, fine_tune = pbt.lesson, pbt.lesson.fine_tune
SHIPPED = hpo.DS_CONFIG
DONOR = {"lr": 1e-2, "per_device_bs": 2, "wd": 0.0, "adam_beta2": 0.9}
OTHER = {"lr": 4e-2, "wd": 0.5, "adam_beta2": 0.8, "adam_epsilon": 1e-6}
VARIANTS = {"donor": {}, "same": {}, "still": {"lr": 1e-12}, "other": OTHER}


def sum_of(model):
    """That of the absolute values of all weights; with ZeRO-3 they are gathered first."""
    total = 0.0
    for parameter in model.parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            total += parameter.detach().double().abs().sum().item()
    return total


class Watch(TrainerCallback):
    """The losses, and what is there at the first step and at the end of the training."""

    def __init__(self):
        self.seen = {"eval_loss": []}

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.seen["computes in"] = str(next(model.parameters()).dtype)
        self.seen["last"] = optimizer.param_groups[0]["lr"]
        if "first weights" not in self.seen:
            keys = ("lr", "weight_decay", "betas", "eps")
            self.seen["groups"] = [{key: group[key] for key in keys} for group in optimizer.param_groups]
            self.seen |= {"first weights": sum_of(model), "from": state.global_step, "by": type(optimizer).__name__}

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.seen["eval_loss"].append(metrics["eval_answer_loss"])
        self.seen["epoch"] = state.epoch

    def on_train_end(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **kwargs):
        self.seen |= {"skipped": state.global_step - lr_scheduler.last_epoch, "steps": state.global_step}
        self.seen |= {"weights": sum_of(model), "optimizer": type(optimizer.optimizer).__name__}


def settings_of(epochs):
    small = {"TRAIN_SAMPLES": "16", "EVAL_SAMPLES": "11", "NUM_EPOCHS": str(epochs)}
    return hpo.read_settings({"MODEL_NAME": model, "SQUAD_DATA": squad} | small)


def from_a_checkpoint():
    """{engine: {variant: what was seen}}; the losses of one in fp16 that diverges. Checkpoints are in the folder."""
    found = {}

    def train(name, changes, start=None, data=rows, precision="auto"):
        watch, reports, settings = Watch(), [], settings_of(4)
        hpo.fine_tune = lambda *training: fine_tune(*training[:4], [*training[4], watch])
        pbt.train.report, settings.PRECISION = reports.append, precision
        pbt.train_loop_per_worker(DONOR | changes | {"settings": settings, "data": data}, f"{folder}/{name}", start)
        return watch.seen | {"eval_loss": [report["eval_loss"] for report in reports]}, reports

    for engine, hpo.DS_CONFIG in {"none": None, "deepspeed": SHIPPED}.items():  # accelerate knows no way back
        found[engine], start = {}, None
        for name, changes in VARIANTS.items():
            found[engine][name], reports = train(f"{engine}-{name}", changes, start)
            start = start or reports[1]["checkpoint"]  # the donor's, after epoch 2
    longer = rows[0] * 4, rows[1]  # so many steps that no loss scale is left before the first evaluation
    return found, train("fp16", {"lr": 1e4, "per_device_bs": 1}, data=longer, precision="fp16")[0]["eval_loss"]


model, squad, folder, *trainings = sys.argv[1:]
settings = settings_of(1)
rows, written = hpo.load_squad(settings), Path(f"{sys.argv[0]}.{os.getpid()}.json")
results = [from_a_checkpoint()] if folder else []
shipped = json.loads(SHIPPED.read_text())
for training in map(json.loads, trainings):
    stage, watch = training.pop("engine", 2), Watch()
    settings.PRECISION, settings.MODEL_NAME = training.pop("precision", "auto"), training.pop("model", model)
    config = shipped | {"zero_optimization": shipped["zero_optimization"] | {"stage": stage}}
    if stage == "no zero":
        del config["zero_optimization"]
    written.write_text(json.dumps(config))
    hpo.DS_CONFIG = None if stage == "none" else written
    drawn = {name: numpy.asarray(value)[()] for name, value in training.items()}  # as from tune.choice(np.arange(4))
    fine_tune(drawn, settings, *rows, callbacks=[watch])
    results.append(watch.seen)
written.unlink()
if os.environ["RANK"] == "0":
    print("RESULT " + json.dumps(results), flush=True)
