"""For train_variants.py: trainings that start from another one's checkpoint, as those of PBT's trials do."""

import ray
import raytune_pbt_hpo as pbt
from transformers import TrainerCallback

ray.get = lambda data: data  # there is no Ray here
ray.get_gpu_ids = list
DONOR = {"lr": 1e-2, "per_device_bs": 2, "wd": 0.0, "adam_beta2": 0.9}
OTHER = {"lr": 4e-2, "wd": 0.5, "adam_beta2": 0.8, "adam_epsilon": 1e-6}
VARIANTS = {"donor": {}, "same": {}, "still": {"lr": 1e-12}, "other": OTHER}
SHIPPED, fine_tune = pbt.lesson.DS_CONFIG, pbt.lesson.fine_tune


class Watch(TrainerCallback):
    """The optimizer's settings at the first step, the weights that it then has, and the rate of the last step."""

    def __init__(self):
        self.seen = {}

    def on_step_begin(self, args, state, control, optimizer=None, model=None, **kwargs):
        self.seen["last"] = optimizer.param_groups[0]["lr"]
        if len(self.seen) == 1:
            keys = ("lr", "weight_decay", "betas", "eps")
            self.seen["groups"] = [{key: group[key] for key in keys} for group in optimizer.param_groups]
            weights = (parameter.detach().double().abs().sum().item() for parameter in model.parameters())
            self.seen |= {"weights": sum(weights), "step": state.global_step, "optimizer": type(optimizer).__name__}


def train(hyperparameters, settings, rows, folder, start_from):
    """What was seen, and the reports."""
    watch, reports = Watch(), []
    pbt.lesson.fine_tune = lambda *training: fine_tune(*training[:4], [*training[4], watch])
    pbt.train.report = reports.append
    config = {"settings": settings, "data": rows}
    pbt.train_loop_per_worker(hyperparameters | config, folder, start_from)
    return watch.seen | {"losses": [report["eval_loss"] for report in reports]}, reports


def results(model, squad, folder):
    """{engine: {variant: what was seen}}; the losses of one in fp16 that diverges. Checkpoints are in the folder."""
    small = {"TRAIN_SAMPLES": "16", "EVAL_SAMPLES": "11", "NUM_EPOCHS": "4"}
    settings = pbt.lesson.read_settings({"MODEL_NAME": model, "SQUAD_DATA": squad} | small)
    rows, found = pbt.lesson.load_squad(settings), {}
    for engine, pbt.lesson.DS_CONFIG in {"none": None, "deepspeed": SHIPPED}.items():  # accelerate knows no way back
        found[engine], start = {}, None
        for name, changes in VARIANTS.items():
            found[engine][name], reports = train(DONOR | changes, settings, rows, f"{folder}/{engine}-{name}", start)
            start = start or reports[1]["checkpoint"]  # the donor's, after epoch 2
    settings.PRECISION, steep = "fp16", DONOR | {"lr": 1e4, "per_device_bs": 1}
    rows = rows[0] * 4, rows[1]  # so many steps that no loss scale is left before the first evaluation
    return found, train(steep, settings, rows, f"{folder}/fp16", None)[0]["losses"]
