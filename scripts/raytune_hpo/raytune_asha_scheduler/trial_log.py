"""The log's lines about trials. Without this file it shows Ray's own status table every 30 s, and no line a report.

One line for each start, report and end of a trial, one boxed table at the end, and the cause of each failure.
"""

import contextlib
import io
import logging
import math
import re
import sys
from pathlib import Path

from ray import tune
from raytune_asha_hpo import say

MANY_TRIALS = 100  # with more, one line a trial, at its end, and one for each tenth of them


def improve(plan):
    """Adds the lines and the table to the plan."""
    # A failed trial's cause is told below and its trace is in error.txt.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    s = plan.context.s
    plan.run_config.callbacks.append(TrialLines(s, type(plan.tune_config.scheduler).__name__))
    plan.run_config.progress_reporter = FinalTable(
        metric_columns={"training_iteration": "iter", "time_total_s": "total time (s)", "eval_loss": "eval_loss"},
        max_column_length=40,
        max_progress_rows=s.NUM_SAMPLES,
        max_error_rows=0,
    )


class TrialLines(tune.Callback):
    """One line for each event of a trial."""

    def __init__(self, s, scheduler):
        self.s, self.many = s, s.NUM_SAMPLES > MANY_TRIALS
        self.scheduler = "ASHA"
        self.ended, self.best = set(), math.inf

    def drawn(self, trial):
        values = trial.config["train_loop_config"].items()
        return "  ".join(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in values)

    def on_trial_start(self, iteration, trials, trial, **info):
        if not self.many:
            say(f"{trial}  started    {self.drawn(trial)}")

    def on_trial_result(self, iteration, trials, trial, result, **info):
        self.best = min(self.best, result["eval_loss"])  # keeps the first of the two if the second is NaN
        if not self.many:
            say(f"{trial}  epoch {result['epoch']:g}/{self.s.NUM_EPOCHS}  eval_loss {result['eval_loss']:.5f}")

    def on_trial_complete(self, iteration, trials, trial, **info):
        loss, epoch = trial.last_result.get("eval_loss", math.nan), trial.last_result.get("epoch", 0)
        if not math.isfinite(loss):
            end = f"ended      diverged at epoch {epoch:g}"
        else:
            end = "finished   all epochs" if epoch >= self.s.NUM_EPOCHS else f"stopped    by {self.scheduler} after epoch {epoch:g}"
        if self.many:
            end += f"  eval_loss {loss:.5f}  seconds {trial.last_result.get('time_total_s', 0):.1f}  {self.drawn(trial)}"
        say(f"{trial}  {end}")
        self.count(trials)

    def on_trial_recover(self, iteration, trials, trial, **info):
        say(f"{trial}  lost       with its node ({trial.run_metadata.num_failures} of at most {trial.max_failures} times); starts again")

    def on_trial_error(self, iteration, trials, trial, **info):
        say(f"{trial}  FAILED     {cause_of(Path(trial.error_file).read_text() if trial.error_file else '')}")
        self.count(trials)

    def count(self, trials):
        ended = sum(trial.is_finished() for trial in trials) if self.many else 0
        if ended and ended % (self.s.NUM_SAMPLES // 10) == 0:
            say(f"{ended} of {self.s.NUM_SAMPLES} trials have ended, the lowest eval_loss is {self.best:.5f}")


class FinalTable(tune.CLIReporter):
    """Ray's boxed table of trials, once at the end, without the lines around it."""

    def should_report(self, trials, done=False):
        return done

    def report(self, trials, done, *system_info):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            super().report(sorted(trials, key=str), done, *system_info)
        lines = printed.getvalue().split("Number of errored trials")[0].splitlines()
        print(*(line for line in lines if line.startswith(("+", "|", "Number of trials"))), sep="\n", flush=True)


def cause_of(error_text):
    """The line of a trace that names the error, such as "ValueError: ...": the innermost cause stands last."""
    lines = [line.strip() for line in error_text.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    return (named or lines or ["unknown"])[-1][:200]
