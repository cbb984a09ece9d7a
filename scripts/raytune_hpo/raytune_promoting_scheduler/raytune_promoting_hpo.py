#!/usr/bin/env python3
"""ASHA as it was published: a trial pauses at each rung, and a free slot promotes the best of those that wait.

Read raytune_asha_hpo.py first, then raytune_pbt_hpo.py, whose checkpoints this search uses. Ray's own ASHAScheduler
decides as soon as a trial reaches a rung, and what it stops never comes back. Here it pauses. A slot that becomes
free takes the best of those that wait, among the best 1/reduction_factor of a rung, the highest rung first; only if
there is none, it starts a new trial (Li et al., A System for Massively Parallel Hyperparameter Tuning, MLSys 2020).

All that wait keep their last checkpoint until the search ends: 8 GB each for BLOOM-560M.

    cd experiments/raytune/scheduler/asha
    export SEARCH_SCRIPT=../../../../scripts/raytune_hpo/raytune_promoting_scheduler/raytune_promoting_hpo.py
    sbatch head_node_raytune_asha_hpo.slurm

By hand: as in raytune_asha_hpo.py, after  export PYTHONPATH=$PWD/../raytune_asha_scheduler  in this folder.
"""

import math
import shutil
import sys
from pathlib import Path

import rooms  # noqa: F401  # isort: skip

sys.path.append(str(Path(__file__).resolve().parents[1] / "raytune_pbt_scheduler"))
import fast_trials
import raytune_asha_hpo as lesson
import raytune_pbt_hpo
import run_state
import trial_log
from ray import cloudpickle
from ray.tune.schedulers import FIFOScheduler


# ---- SCHEDULER: edit here ----------------------------------------------------------------------------------
def scheduler(s):
    return PromotingASHA(grace_period=1, max_t=s.NUM_EPOCHS, reduction_factor=2)


def with_status(status, controller):
    return [trial for trial in controller.get_trials() if trial.status == status]


class PromotingASHA(FIFOScheduler):
    def __init__(self, grace_period, max_t, reduction_factor):
        super().__init__()
        self.factor, self.rungs, epoch = reduction_factor, {}, grace_period
        while epoch < max_t:
            self.rungs, epoch = {epoch: {}} | self.rungs, epoch * reduction_factor  # the highest rung first
        self.decisions, self.added, self.run_dir = {}, set(), None  # see Recorder

    def on_trial_result(self, controller, trial, result):
        epoch = result["epoch"]
        if epoch not in self.rungs:
            return self.CONTINUE
        self.rungs[epoch][trial.trial_id] = result["eval_loss"]
        if self.promoted([trial, *with_status("PAUSED", controller)], math.floor) is trial:
            return self.CONTINUE  # the slot that it would free is its own
        self.decisions[trial.trial_id, epoch] = self.PAUSE
        return self.PAUSE

    def promoted(self, waiting, rounded):
        """Of the trials that wait: the best 1/factor of a rung, the highest rung first; of them the best."""
        passed = set()
        for losses in self.rungs.values():
            best = sorted(losses, key=losses.get)[: rounded(len(losses) / self.factor)]
            here = [each for each in waiting if each.trial_id in best and each.trial_id not in passed]
            if here:
                return min(here, key=lambda each: losses[each.trial_id])
            passed.update(losses)

    def choose_trial_to_run(self, controller):
        """As published, 1/factor is rounded down: more trials will come. Once none will, it is rounded up, or in a
        small search no trial would reach the last epoch."""
        paused, pending = with_status("PAUSED", controller), with_status("PENDING", controller)
        if pending or with_status("RUNNING", controller):
            # A new trial, in the order drawn; before it one that was interrupted.
            new = max(pending, key=lambda each: each.last_result.get("epoch", 0), default=None)
            return self.promoted(paused, math.floor) or new
        if last := self.promoted(paused, math.ceil):
            return last
        for each in paused:  # the search is over
            controller.stop_trial(each)

    def on_trial_add(self, controller, trial):
        """If a run is continued, Ray has forgotten the rungs, and would start each trial that was paused."""
        if self.run_dir and not self.added:
            for row in run_state.reports_so_far(self.run_dir):
                self.rungs.get(row["epoch"], {})[row["trial_id"]] = row["eval_loss"]
        waited = trial.trial_id not in self.added and trial.last_result.get("epoch") in self.rungs
        if waited and trial.status == "PENDING":
            trial.set_status("PAUSED")
        self.added.add(trial.trial_id)  # it comes again if its node is lost, and then goes on at once


# ---- Record and log ----------------------------------------------------------------------------------------
class Recorder(run_state.Recorder):
    """Records this scheduler's decisions, and tells it where."""

    def __init__(self, run_dir, remembering):
        super().__init__(run_dir, remembering.scheduler)
        remembering.scheduler.run_dir = run_dir

    def on_trial_save(self, iteration, trials, trial, **info):
        """Ray copies results to the run folder twice a second, and a trial that goes on starts with that copy."""
        shutil.copy(Path(trial.local_path, "result.json"), trial.storage.trial_fs_path)


class TrialLines(trial_log.TrialLines):
    def on_trial_complete(self, iteration, trials, trial, **info):
        if trial.status == trial.PAUSED:
            self.stopped.add(trial.trial_id)
        super().on_trial_complete(iteration, trials, trial, **info)


if __name__ == "__main__":
    cloudpickle.register_pickle_by_value(raytune_pbt_hpo)  # its folder is not on the path of Ray's processes
    lesson.__doc__, lesson.scheduler, fast_trials.TRIAL = __doc__, scheduler, raytune_pbt_hpo.PbtTrial
    run_state.Recorder, trial_log.TrialLines = Recorder, TrialLines
    lesson.main()
