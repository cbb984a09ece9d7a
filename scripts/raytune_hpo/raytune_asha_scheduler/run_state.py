"""RESUME and lost nodes. Without this file a run cannot be continued, and a lost node costs its trials.

In the run folder: settings.json, with which a run is continued, and reports.jsonl, each report with ASHA's
decision on it, from which a continued run knows its rungs. Ray saves the trials (tune/), not their scheduler.
"""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import ray
from ray import cloudpickle, tune
from ray.exceptions import RayActorError
from ray.tune.experiment import Trial
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    TrialScheduler,
)
from raytune_asha_hpo import VARIABLES, say

RESTARTS = 3  # of a trial whose node was lost, for each worker node
TESTED = ("2.60.0",)  # versions of Ray in which should_recover below decides on a restart


def improve(plan):
    """Makes the plan resumable; resumes it if its run folder holds an earlier part."""
    s, run_dir = plan.context.s, plan.context.run_dir
    run_dir.mkdir(parents=True, exist_ok=True)
    save_settings(s, run_dir / "settings.json")
    # Seconds between two saves of the state that RESUME needs; with more trials a save takes longer.
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", str(max(0.5, s.NUM_SAMPLES / 100)))
    # Prepare only as many trials as can start, so that they start in the order drawn.
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(int(ray.cluster_resources()["trial_slot"]))
    if type(plan.tune_config.scheduler) in (AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule):
        plan.tune_config.scheduler = Remembering(plan.tune_config.scheduler, run_dir / "reports.jsonl")
    if ray.__version__ in TESTED:
        Trial.should_recover = lost_with_its_node
        plan.run_config.failure_config = tune.FailureConfig(max_failures=RESTARTS * s.WORKER_NODES)
    else:
        say(f"Ray {ray.__version__} is not {' or '.join(TESTED)}: a trial fails if its node is lost")
    if (saved := newest_state(run_dir / "tune")) is not None:
        plan.make_tuner = lambda trainable, param_space, **_: tune.Tuner.restore(
            str(saved), trainable, resume_unfinished=True, restart_errored=True, param_space=param_space
        )
        say(f"continues the run in {run_dir}: finished and stopped trials stay as they are")
    elif (run_dir / "reports.jsonl").exists():
        (run_dir / "reports.jsonl").unlink()
        say(f"starts the run in {run_dir} over: Ray has saved no trial there")


def save_settings(s, path):
    """The variables as they were set, for RESUME; written whole or not at all. Kept if a run is continued."""
    if not path.exists():
        texts = {name: os.environ.get(name, default) for name, (default, *_) in VARIABLES.items()}
        if "GPUS_PER_WORKER" not in os.environ:
            del texts["GPUS_PER_WORKER"]  # "as many as there are, up to 1" is not the same as 1
        new = path.with_suffix(".new")
        new.write_text(json.dumps(texts, indent=1))
        os.replace(new, path)


def newest_state(folder):
    """The folder if Ray has saved trials there, else None. A save that a kill has cut off is removed."""
    for path in sorted(folder.glob("experiment_state-*.json"), reverse=True):
        try:
            json.loads(path.read_text())
            return folder
        except ValueError:
            path.unlink()
    return None


def lost_with_its_node(trial):
    """Does a trial that ended with an error start again? Any other error would only happen again."""
    file = trial.pickled_error_file
    error = cloudpickle.loads(Path(file).read_bytes()) if file else None
    lost = isinstance(error, RayActorError) and not error.actor_init_failed
    return lost and trial.run_metadata.num_failures <= trial.max_failures


class Remembering(TrialScheduler):
    """A scheduler whose decisions outlive the process.

    Each report and the decision on it is a line of the journal. When a run is continued, the scheduler is
    told all of them once more, in order, so its rungs are what they were. A trial that runs again gets the
    decisions that it had at the same epochs.
    """

    def __init__(self, scheduler, journal):
        self.scheduler, self.journal, self.decisions = scheduler, journal, None

    @property
    def metric(self):
        return self.scheduler.metric

    def set_search_properties(self, metric, mode, **spec):
        return self.scheduler.set_search_properties(metric, mode, **spec)

    def on_trial_add(self, controller, trial):
        if self.decisions is None:
            self.decisions = {}
            for row in read_journal(self.journal):
                told = SimpleNamespace(trial_id=row["trial_id"])
                self.scheduler.on_trial_add(controller, told)
                self.scheduler.on_trial_result(controller, told, row)
                self.decisions[row["trial_id"], row["epoch"]] = row["decision"]
        self.scheduler.on_trial_add(controller, trial)

    def on_trial_result(self, controller, trial, result):
        row = {key: result[key] for key in ("trial_id", "epoch", "eval_loss", "training_iteration")}
        key = (row["trial_id"], row["epoch"])
        if key not in self.decisions:
            self.decisions[key] = self.scheduler.on_trial_result(controller, trial, result)
            with self.journal.open("a") as file:
                file.write(json.dumps(row | {"decision": self.decisions[key]}) + "\n")
        return self.decisions[key]

    def choose_trial_to_run(self, controller):
        """In the order drawn, also after a restart: names end with the trial's number."""
        waiting = [trial for trial in controller.get_live_trials() if trial.status == Trial.PENDING]
        return min(waiting, key=lambda trial: str(trial)[-5:], default=None)

    def on_trial_complete(self, controller, trial, result):
        self.scheduler.on_trial_complete(controller, trial, result)

    def on_trial_remove(self, controller, trial):
        self.scheduler.on_trial_remove(controller, trial)

    def on_trial_error(self, controller, trial):
        self.scheduler.on_trial_error(controller, trial)

    def debug_string(self):
        return self.scheduler.debug_string()


def read_journal(path):
    """The rows of the journal. A last line that a kill or a full disk has cut off is removed from it."""
    if not path.exists():
        return []
    lines, rows = path.read_text().splitlines(keepends=True), []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    if len(rows) < len(lines) or (lines and not lines[-1].endswith("\n")):
        new = path.with_suffix(".new")
        new.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.replace(new, path)
    return rows
