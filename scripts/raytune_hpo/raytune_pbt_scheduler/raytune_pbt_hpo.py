#!/usr/bin/env python3
"""Population based training (PBT): the search of raytune_asha_hpo.py with another scheduler and checkpoints.

Read that file first: data, objective, search space and variables are the same. Here no trial is stopped.
After an epoch, a trial in the worst quarter copies one in the best, weights and all, and continues from there
with slightly different hyperparameters. While the search runs, each trial's last checkpoint is kept (8 GB for
BLOOM-560M), and those from which a trial is about to continue; at the end, none.

    cd experiments/raytune/scheduler/asha
    export SEARCH_SCRIPT=../../../../scripts/raytune_hpo/raytune_pbt_scheduler/raytune_pbt_hpo.py
    NUM_SAMPLES=4 sbatch head_node_raytune_asha_hpo.slurm

By hand: as in raytune_asha_hpo.py, after  export PYTHONPATH=$PWD/../raytune_asha_scheduler  in this folder.
"""

import functools
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

import rooms  # noqa: F401  # isort: skip

import fast_trials
import numpy
import raytune_asha_hpo as lesson
import run_state
from ray import train, tune
from ray.tune.schedulers import PopulationBasedTraining

# ---- SCHEDULER: edit here ----------------------------------------------------------------------------------
INTERVAL = 1  # epochs from one comparison to the next


def mutations(s):
    """What a copy changes: a number by 20 %, a choice to its neighbour; one time in four it draws anew."""
    return {"lr": tune.loguniform(s.LR_LOWER, s.LR_UPPER), "wd": s.WD_CHOICES}


class PBT(PopulationBasedTraining):
    def choose_trial_to_run(self, controller):
        """The one furthest behind. Ray's own choice can be a copy for ever, while its donor never runs."""
        waiting = [each for each in controller.get_trials() if each.status in (each.PENDING, each.PAUSED)]
        return min(waiting, key=lambda trial: trial.last_result.get("epoch", 0), default=None)


def scheduler(s):
    random.seed(s.SEED)  # PBT draws from both
    numpy.random.seed(s.SEED)
    return PBT(
        metric="eval_loss", mode="min", time_attr="epoch", perturbation_interval=INTERVAL,
        hyperparam_mutations={"train_loop_config": mutations(s)},
    )


def check(s):
    """Ends the script, before anything starts, if `mutations` has what a copy cannot change."""
    for name in mutations(s):
        if name in ("per_device_bs", "gradient_accumulation_steps"):
            sys.exit(f"ERROR: mutations: {name!r} sets the steps of an epoch: it cannot change in between")
        if name not in lesson.search_space(s)["train_loop_config"]:
            sys.exit(f"ERROR: mutations: {name!r} is not in the search space; add it in raytune_asha_hpo.py")


# ---- Trial: trains from a checkpoint, its own or another trial's, to the next one --------------------------
def train_loop_per_worker(config, folder, start_from=None):
    """The lesson's, but it reports when the epoch's checkpoint lies in the folder, and says where."""
    from transformers import TrainerCallback
    report, evaluated = train.report, {}
    train.report = evaluated.update  # what the lesson's callback calls; fast_trials.py sets it for each trial

    class Checkpointing(TrainerCallback):
        def on_train_begin(self, args, state, control, optimizer=None, lr_scheduler=None, **kwargs):
            """The loaded checkpoint has its donor's hyperparameters; this trial's own replace them."""
            for group, its_lr in zip(optimizer.param_groups, lr_scheduler.base_lrs, strict=True):
                group["lr"] *= args.learning_rate / its_lr  # stays at its place in the schedule
                group["initial_lr"] = args.learning_rate
                group["betas"], group["eps"] = (args.adam_beta1, args.adam_beta2), args.adam_epsilon
            optimizer.param_groups[0]["weight_decay"] = args.weight_decay  # not of [1]: biases and norms
            lr_scheduler.base_lrs = [args.learning_rate] * len(optimizer.param_groups)

        def on_save(self, args, state, control, **kwargs):
            report(evaluated | {"checkpoint": f"{folder}/checkpoint-{state.global_step}"})

    config |= {"callbacks": [Checkpointing()], "save_strategy": "epoch"}
    lesson.train_loop_per_worker(config | {"output_dir": folder, "resume_from_checkpoint": start_from})


class PbtTrial(fast_trials.WarmTrial):
    """The Trainer writes the checkpoints. Tune saves only the name of the folder, and hands it to copies."""

    @classmethod
    def configure(cls, run_dir, run_config):
        run_config.checkpoint_config = tune.CheckpointConfig(checkpoint_frequency=1, checkpoint_at_end=False)
        run_config.callbacks.append(Checkpoints(run_dir))

    def reset_config(self, new_config):
        self.start_from = None
        return super().reset_config(new_config)

    def save_checkpoint(self, checkpoint_dir):
        return {"folder": self.last["checkpoint"]}

    def load_checkpoint(self, checkpoint):
        if Path(checkpoint["folder"]).exists():  # else removed just before the run was killed: it starts over
            self.start_from = checkpoint["folder"]

    def start(self):
        folder = self.run.run_dir / "checkpoints" / self.trial_id
        folder.mkdir(parents=True, exist_ok=True)
        new = tempfile.mkdtemp(dir=folder)  # one for each start, so that no checkpoint is overwritten
        self.run.loop = functools.partial(train_loop_per_worker, folder=new, start_from=self.start_from)
        super().start()


class Checkpoints(tune.Callback):
    """Logs who copies whom, and removes each checkpoint from which no trial can go on any more."""

    def __init__(self, run_dir):
        self.run_dir, self.folder = run_dir, run_dir / "checkpoints"

    def setup(self, **info):
        self.saved = [str(path) for path in self.folder.glob("*/*/checkpoint-*")]  # if a run is continued

    def on_trial_start(self, iteration, trials, trial, **info):
        for other in trials:
            if other is not trial and f"/{other.trial_id}/" in starts_from(trial):
                epoch = trial.latest_checkpoint_result.metrics["epoch"]
                lesson.say(f"{trial}  copies     {other} as it was after epoch {epoch:g}")
                run_state.record(self.run_dir, "trial_copied", trial=str(trial), donor=str(other), epoch=epoch)

    def on_trial_result(self, iteration, trials, trial, result, **info):
        self.saved.append(result["checkpoint"])

    def on_trial_save(self, iteration, trials, trial, **info):
        needed = set()
        for each in trials:
            if each.status != each.TERMINATED:  # it may continue, or be copied as of the last comparison
                own = [folder for folder in self.saved if f"/{each.trial_id}/" in folder]
                needed.update([starts_from(each), *own[-INTERVAL:]])
        for folder in set(self.saved) - needed:
            self.saved.remove(folder)
            shutil.rmtree(folder, ignore_errors=True)

    def on_trial_complete(self, iteration, trials, trial, **info):
        if all(each.status == each.TERMINATED for each in trials if each is not trial):
            shutil.rmtree(self.folder, ignore_errors=True)


def starts_from(trial):
    """The folder of the checkpoint from which the trial would start now."""
    return trial.latest_checkpoint_result.metrics["checkpoint"] if trial.latest_checkpoint_result else ""


if __name__ == "__main__":
    check(lesson.read_settings(os.environ))
    lesson.__doc__, lesson.scheduler, fast_trials.TRIAL = __doc__, scheduler, PbtTrial
    lesson.main()
