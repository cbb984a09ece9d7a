"""The log's lines about trials. Without this file the log has Ray's status table every 30 s instead.

One line for each start, report and end of a trial, with the cause of a failure; one boxed table at the end.
"""

import contextlib
import io
import logging
import math
import re
import sys

from ray import tune
from raytune_asha_hpo import neighbour, say

LOG = sys.stdout
MANY_TRIALS = 100  # with more, one line a trial, at its end, and one for each tenth of them
SHORT_NAMES = {"AsyncHyperBandScheduler": "ASHA"}  # Ray's own name of the class is the older one


def attach(s, run_dir, space, tune_config, run_config):
    """Adds the lines and the table to a search."""
    sys.stdout = sys.stderr  # what libraries print is not for the log
    # A failed trial has its line below and its trace in error.txt; Ray's message would repeat them.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    if (fixes := neighbour("library_fixes")) and fixes.untried():
        say(fixes.untried())
    name = type(tune_config.scheduler).__name__
    run_config.callbacks.append(TrialLines(s, run_dir, SHORT_NAMES.get(name, name)))
    run_config.progress_reporter = FinalTable(
        metric_columns={"training_iteration": "iter", "time_total_s": "total time (s)", "eval_loss": "eval_loss"},
        parameter_columns=[f"train_loop_config/{name}" for name in space["train_loop_config"]],
        max_column_length=40,
        max_progress_rows=s.NUM_SAMPLES,
        max_error_rows=0,
    )
    numbers = Numbers(run_dir / "tune")
    tune_config.trial_name_creator = lambda trial: f"TorchTrainer_{numbers.numbered(trial.trial_id)}"


class Numbers:
    """Numbers trials in the order drawn: 00000, 00001, ... Most search algorithms do not."""

    def __init__(self, folder):
        self.folder, self.next = folder, None

    def numbered(self, trial_id):
        if re.fullmatch(r"\w+_\d{5}", trial_id):
            return trial_id
        if self.next is None:  # in a continued run after those of its earlier part
            self.next = len(list(self.folder.glob("TorchTrainer_*")))
        self.next += 1
        return f"{trial_id[:5]}_{self.next - 1:05d}"


class TrialLines(tune.Callback):
    """One line for each event of a trial."""

    def __init__(self, s, run_dir, scheduler):
        self.s, self.run_dir, self.scheduler, self.best = s, run_dir, scheduler, math.inf
        self.stopped, self.ended = set(), set()
        self.many = s.NUM_SAMPLES > MANY_TRIALS

    def drawn(self, trial):
        values = trial.config["train_loop_config"].items()
        return "  ".join(f"{name} {x:.3g}" if isinstance(x, float) else f"{name} {x}" for name, x in values)

    def on_trial_start(self, iteration, trials, trial, **info):
        if not self.many:
            how = "continues" if trial.latest_checkpoint_result else "started  "  # PBT pauses its trials
            say(f"{trial}  {how}  {self.drawn(trial)}")

    def on_trial_result(self, iteration, trials, trial, result, **info):
        self.best = min(self.best, result["eval_loss"])  # min() keeps its first argument if the second is NaN
        self.stopped |= {trial.trial_id} if result.get("done") else set()
        if not self.many:
            epoch, loss = result["epoch"], result["eval_loss"]
            say(f"{trial}  epoch {epoch:g}/{self.s.NUM_EPOCHS}  eval_loss {loss:.5f}")

    def on_trial_complete(self, iteration, trials, trial, **info):
        last = trial.last_result
        if trial.status == "PENDING" and "epoch" not in last:  # it never started: the time budget was used up
            return
        loss, epoch = last.get("eval_loss", math.nan), last.get("epoch", 0)
        if not math.isfinite(loss):
            end = f"ended      diverged at epoch {epoch:g}"
        elif epoch >= self.s.NUM_EPOCHS:
            end = "finished   all epochs"
        elif (run_state := neighbour("run_state")) and run_state.time_is_over():
            end = f"cut off    by TIME_BUDGET after epoch {epoch:g}"
        elif trial.trial_id not in self.stopped:  # it has ended by itself
            end = f"finished   its epochs, {epoch:g} as drawn"
        else:
            end = f"stopped    by {self.scheduler} after epoch {epoch:g}"
        if self.many:
            end += f"  eval_loss {loss:.5f}  seconds {last.get('time_total_s', 0):.1f}  {self.drawn(trial)}"
        say(f"{trial}  {end}")
        self.count(trial, trials)

    def on_trial_recover(self, iteration, trials, trial, **info):
        times = f"{trial.run_metadata.num_failures} of at most {trial.max_failures} times"
        say(f"{trial}  lost       with its node ({times}); starts again")

    def on_trial_error(self, iteration, trials, trial, **info):
        run_state = neighbour("run_state")
        cause = f"{run_state.cause_of(trial)} " if run_state else ""
        say(f"{trial}  FAILED     {cause}(full trace: {self.run_dir}/tune/{trial}/error.txt)")
        self.count(trial, trials)

    def count(self, trial, trials):
        self.ended = self.ended or {each.trial_id for each in trials if each.is_finished()}  # if a run is continued
        self.ended.add(trial.trial_id)
        if self.many and len(self.ended) % (self.s.NUM_SAMPLES // 10) == 0:
            ended, best = f"{len(self.ended)} of {self.s.NUM_SAMPLES}", f"{self.best:.5f}"
            say(f"{ended} trials have ended, the lowest eval_loss is {best}")


class FinalTable(tune.CLIReporter):
    """Ray's boxed table of trials, once at the end, without the lines around it."""

    def should_report(self, trials, done=False):
        return done

    def report(self, trials, done, *system_info):
        printed = io.StringIO()
        trials = [trial for trial in trials if trial.status != "TERMINATED" or "epoch" in trial.last_result]
        with contextlib.redirect_stdout(printed):
            super().report(sorted(trials, key=str), done, *system_info)
        text = printed.getvalue().split("Number of errored trials")[0]  # those have lines of their own
        lines = [line for line in text.splitlines() if line.startswith(("+", "|", "Number of trials"))]
        print(*lines, sep="\n", file=LOG, flush=True)
