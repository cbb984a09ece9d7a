"""A run as an Optuna study, for the tools that know one: optuna-dashboard, optuna.load_study, Optuna's pictures.

Used by fill_tables.py --study and draw_report.py.
"""

import datetime

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial
from read_run import TITLES, further_names

STATES = {"finished": TrialState.COMPLETE, "stopped by ASHA": TrialState.PRUNED, "running": TrialState.RUNNING,
          "pending": TrialState.WAITING}  # fmt: skip
optuna.logging.set_verbosity(optuna.logging.WARNING)


def write(run, path):
    """Writes study.db: all of a run as far as its record tells."""
    ranges = distributions(run)
    path.write_bytes(b"")  # a new one, or an OSError that names it
    study = optuna.create_study(study_name=f"run {run.job}", storage=f"sqlite:///{path}")
    for trial in run.trials.values():
        state = STATES.get(trial.status, TrialState.FAIL)
        state = TrialState.FAIL if state == TrialState.COMPLETE and trial.best() is None else state
        frozen = create_trial(
            state=state,
            value=trial.best() if state in (TrialState.COMPLETE, TrialState.PRUNED) else None,
            **drawn(trial, ranges),
            intermediate_values={round(report.epoch): report.loss for report in trial.finite()},
            user_attrs={"combo_id": trial.id, "trial": trial.name, "status": trial.status, "runtime_s": trial.clock()},
        )
        if trial.spans:
            start, end = (run.began + second for second in (trial.spans[0][0], trial.spans[-1][1]))
            frozen.datetime_start = datetime.datetime.fromtimestamp(start)
            frozen.datetime_complete = datetime.datetime.fromtimestamp(end) if state.is_finished() else None
        study.add_trial(frozen)


def compared(run, loss_of):
    """All trials of which loss_of(trial) is not None as a study in memory, each as if complete.

    Optuna compares complete trials only; of a search with ASHA these are the few that nothing has stopped.
    """
    study, ranges = optuna.create_study(), distributions(run)
    losses = ((trial, loss_of(trial)) for trial in run.trials.values())
    study.add_trials(create_trial(value=loss, **drawn(trial, ranges)) for trial, loss in losses if loss is not None)
    return study


def distributions(run):
    """{hyperparameter: what its values were drawn from, as far as they show it}."""
    found = {}
    for name in [*TITLES, *further_names([run])]:
        values = {plain(trial.params[name]) for trial in run.trials.values() if name in trial.params}
        if len(values) > 4 and not any(isinstance(value, str) for value in values):  # fewer are a choice
            found[name] = FloatDistribution(min(values), max(values), log=min(values) > 0)
        elif values:
            found[name] = CategoricalDistribution(sorted(values, key=str))
    return found


def plain(value):
    """A value that Optuna takes as one of a choice."""
    return value if isinstance(value, (int, float)) else str(value)


def drawn(trial, ranges):
    """What create_trial() wants to know of a trial's hyperparameters."""
    params = {name: plain(value) for name, value in trial.params.items()}
    return {"params": params, "distributions": {name: ranges[name] for name in params}}
