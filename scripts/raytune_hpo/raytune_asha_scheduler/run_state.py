"""The run's record, RESUME and lost nodes. Without this file a run cannot be continued, its trials are not in
events.jsonl, from which pictures and comparisons are made, a lost node costs its trials, and TIME_BUDGET ends trials
within an epoch.

events.jsonl, in the run folder, has a line for each thing that happens: a JSON object with "time" (UTC) and "event".
The head script writes those of the job, this file those of the trials:

    search         scheduler, continues; if false, it continues no earlier part, and the trials before it are void
    trial_started  trial, config
    report         trial, trial_id, epoch, eval_loss (null: not finite), seconds, training_iteration, decision, config
    trial_lost     trial; its node was lost, and it starts again
    trial_ended    trial, error (null: none)
    best           eval_loss, epoch, time_total_s, config, as in the line under "Best Trial Result:"

From the reports a continued run knows its rungs: Ray saves the trials (tune/), but not their scheduler.
"""

import json
import math
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import ray
from ray import cloudpickle, tune
from ray.exceptions import RayActorError
from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from raytune_asha_hpo import say

SHORT_NAMES = {"AsyncHyperBandScheduler": "ASHA"}  # Ray's own name of the class is the older one
RESTARTS = 3  # of a trial whose node was lost, for each worker node
TESTED = ("2.60.0",)  # versions of Ray in which should_recover below decides on a restart


def attach(s, run_dir, tune_config, run_config):
    """Makes the run one that can be continued. -> what makes its Tuner: a new one, or the one that was cut short"""
    run_dir.mkdir(parents=True, exist_ok=True)
    # Seconds between two saves of the state that RESUME needs; with more trials a save takes longer.
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", str(max(0.5, s.NUM_SAMPLES / 100)))
    # Prepare only as many trials as can start, so that they start in the order drawn.
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(int(ray.cluster_resources()["trial_slot"]))
    saved, name = newest_state(run_dir / "tune"), type(tune_config.scheduler).__name__
    remembering = Remembering(tune_config.scheduler, run_dir, s.NUM_EPOCHS)
    if type(tune_config.scheduler) in (AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule):
        tune_config.scheduler = remembering
    run_config.callbacks.append(Recorder(run_dir, remembering))
    end_in_order(tune_config, run_config)
    if ray.__version__ in TESTED:
        Trial.should_recover = lost_with_its_node
        run_config.failure_config = tune.FailureConfig(max_failures=RESTARTS * s.WORKER_NODES)
    else:
        say(f"Ray {ray.__version__} is not {' or '.join(TESTED)}: a trial fails if its node is lost")
    record(run_dir, "search", scheduler=SHORT_NAMES.get(name, name), continues=saved is not None)
    if not saved:
        return tune.Tuner
    say(f"continues the run in {run_dir}: finished and stopped trials stay as they are")
    return lambda trial, param_space, **_: tune.Tuner.restore(
        str(saved), trial, resume_unfinished=True, restart_errored=True, param_space=param_space)  # fmt: skip


def newest_state(folder):
    """The folder if Ray has saved trials there, else None. A save that a kill has cut off is removed."""
    for path in sorted(folder.glob("experiment_state-*.json"), reverse=True):
        try:
            json.loads(path.read_text())
            return folder
        except ValueError:
            path.unlink()
    return None


# ---- Lost nodes ----------------------------------------------------------------------------------------------------
def lost_with_its_node(trial):
    """Does a trial that ended with an error start again? Any other error would only happen again."""
    file = trial.pickled_error_file
    error = cloudpickle.loads(Path(file).read_bytes()) if file else None
    lost = isinstance(error, RayActorError) and not error.actor_init_failed
    return lost and trial.run_metadata.num_failures <= trial.max_failures


def time_is_over():
    # In the environment, since a continued run gets the functions below as they were.
    return time.time() >= float(os.environ.get("TIME_BUDGET_ENDS", "inf"))


def end_in_order(tune_config, run_config):
    """Tune's own time budget ends trials at once. Here none starts after it, and those that run report once more."""
    os.environ["TIME_BUDGET_ENDS"] = str(time.time() + (tune_config.time_budget_s or math.inf))
    scheduler, rule, tune_config.time_budget_s = tune_config.scheduler, run_config.stop, None
    choose = scheduler.choose_trial_to_run

    def choose_in_time(controller):
        if not time_is_over():
            return choose(controller)
        if not controller.search_alg.is_finished():
            say("the time budget is used up: no further trial starts (TIME_BUDGET)")
            controller.search_alg.set_finished()
        for trial in list(controller.get_live_trials()):
            if trial.status in (Trial.PENDING, Trial.PAUSED):
                controller.stop_trial(trial)
        return None

    scheduler.choose_trial_to_run = choose_in_time
    run_config.stop = lambda trial, report: rule(trial, report) or time_is_over()
    run_config.callbacks[-1].cut_off = lambda trial, report: time_is_over() and not rule(trial, report)


def cause_of(trial):
    """The line of a failed trial's trace that names the error, such as "ValueError: ...": the innermost is the last."""
    text = Path(trial.error_file).read_text() if trial.error_file else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    cause = (named or lines or ["unknown"])[-1][:200]
    return cause + " (MPS ends all trials of a GPU when one of them crashes there)" * ("MPS" in cause)


# ---- The record ----------------------------------------------------------------------------------------------------
def record(run_dir, event, **fields):
    """Appends an event. Ends the program if that is not possible: Ray would go on, and lose results."""
    now = time.time()
    moment = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now))}.{int(now % 1 * 1000):03d}Z"
    path = Path(run_dir, "events.jsonl")
    plain = lambda value: value.item() if hasattr(value, "item") else str(value)  # a number of numpy as one of Python
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": moment, "event": event} | fields, default=plain) + "\n")
    except OSError as error:
        sys.exit(f"ERROR: {path}: {error.strerror}; is the disk full, or the quota reached?")


def read_record(run_dir):
    """The events so far; without a line that a kill has cut off."""
    path, events = Path(run_dir, "events.jsonl"), []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return events


def reports_so_far(run_dir):
    """The reports of this search with a loss, and of the earlier parts that it continues."""
    reports = []
    for event in read_record(run_dir):
        if event["event"] == "search" and not event["continues"]:
            reports = []
        elif event["event"] == "report" and event["eval_loss"] is not None:
            reports.append(event)
    return reports


class Recorder(tune.Callback):
    """Writes the events of the trials, until another head has taken the run over."""

    def __init__(self, run_dir, remembering):
        self.run_dir, self.remembering, self.cut_off = run_dir, remembering, lambda trial, report: False

    def on_step_begin(self, iteration, trials, **info):
        """Before Ray saves anything."""
        number = lambda path: int(path.name.removeprefix("head-"))
        head = Path(os.environ.get("HEAD_DIR", "head-1"))  # the latest of the run folder when this head started
        if any(number(other) > number(head) for other in self.run_dir.glob("head-*")):
            sys.exit("ERROR: Slurm has started this run again, on another node; this search ends")

    def on_trial_start(self, iteration, trials, trial, **info):
        record(self.run_dir, "trial_started", trial=str(trial), config=trial.config["train_loop_config"])

    def on_trial_result(self, iteration, trials, trial, result, **info):
        loss, epoch = result["eval_loss"], result["epoch"]
        # Without a decision of the scheduler: all epochs are trained, the loss is not finite, or the time is over.
        ended = "TIME" if self.cut_off(trial.trial_id, result) else "STOP"
        decision = ended if result.get("done") else "CONTINUE"
        decision = self.remembering.decisions.get((trial.trial_id, epoch), decision)
        record(self.run_dir, "report", trial=str(trial), trial_id=trial.trial_id, epoch=epoch,
               eval_loss=loss if math.isfinite(loss) else None, seconds=result["time_total_s"],
               training_iteration=result["training_iteration"], decision=decision,
               config=trial.config["train_loop_config"])  # fmt: skip

    def on_trial_recover(self, iteration, trials, trial, **info):
        record(self.run_dir, "trial_lost", trial=str(trial))

    def on_trial_complete(self, iteration, trials, trial, **info):
        if trial.status != Trial.PENDING or "epoch" in trial.last_result:  # else it never started: no time was left
            record(self.run_dir, "trial_ended", trial=str(trial), error=None)

    def on_trial_error(self, iteration, trials, trial, **info):
        record(self.run_dir, "trial_ended", trial=str(trial), error=cause_of(trial))

    def on_experiment_end(self, trials, **info):
        """What best_report() prints: the lowest loss of trials without error, and its configuration at that time."""
        failed = {str(trial) for trial in trials if trial.status == Trial.ERROR}
        reports = [report for report in reports_so_far(self.run_dir) if report["trial"] not in failed]
        if reports:
            best = min(reports, key=lambda report: report["eval_loss"])
            record(self.run_dir, "best", eval_loss=best["eval_loss"], epoch=best["epoch"],
                   time_total_s=best["seconds"], config=best["config"])  # fmt: skip


@dataclass(eq=False)
class Earlier:
    """What a scheduler knows a trial by that has reported in the earlier part of a run."""

    trial_id: str


class Remembering(TrialScheduler):
    """A scheduler that knows the decisions of the earlier part of a run, and pauses no trial.

    Ray restores it as it was before the first trial. Then it is told the reports of the record once more, in order, so
    its rungs are what they were. A trial that runs again gets the decisions that it had at the same epochs.
    """

    def __init__(self, scheduler, run_dir, epochs):
        self.scheduler, self.run_dir, self.epochs, self.decisions, self.earlier = scheduler, run_dir, epochs, {}, None

    @property
    def metric(self):
        return self.scheduler.metric

    def set_search_properties(self, metric, mode, **spec):
        return self.scheduler.set_search_properties(metric, mode, **spec)

    def on_trial_add(self, controller, trial):
        if self.earlier is None:
            self.earlier = {}
            self.tell_again(controller)
        self.scheduler.on_trial_add(controller, self.known(trial))

    def tell_again(self, controller):
        for row in reports_so_far(self.run_dir):
            key = row["trial_id"], row["epoch"]
            if key in self.decisions:
                continue  # trained twice, since the run was cut short
            self.decisions[key], row["time_total_s"] = row["decision"], row["seconds"]
            trial = self.earlier.setdefault(key[0], Earlier(key[0]))
            self.scheduler.on_trial_add(controller, trial)
            if row["epoch"] < self.epochs:  # of the last, Ray tells that the trial is complete, and nothing else
                self.scheduler.on_trial_result(controller, trial, row)
            if row["decision"] == "STOP":
                self.scheduler.on_trial_complete(controller, trial, row)

    def known(self, trial):
        return self.earlier.get(trial.trial_id, trial)

    def on_trial_result(self, controller, trial, result):
        key = trial.trial_id, result["epoch"]
        if key not in self.decisions:
            decision = self.scheduler.on_trial_result(controller, self.known(trial), result)
            self.decisions[key] = "CONTINUE" if decision == "PAUSE" else decision  # there are no checkpoints
        return self.decisions[key]

    def choose_trial_to_run(self, controller):
        """In the order drawn, also after a restart: names end with the trial's number."""
        waiting = [trial for trial in controller.get_live_trials() if trial.status == Trial.PENDING]
        return min(waiting, key=lambda trial: str(trial)[-5:], default=None)

    def on_trial_complete(self, controller, trial, result):
        self.scheduler.on_trial_complete(controller, self.known(trial), result)

    def on_trial_remove(self, controller, trial):
        self.scheduler.on_trial_remove(controller, self.known(trial))

    def on_trial_error(self, controller, trial):
        self.scheduler.on_trial_error(controller, self.known(trial))

    def debug_string(self):
        return self.scheduler.debug_string()
