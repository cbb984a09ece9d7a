"""A run as an Optuna study, for the tools that know one: optuna-dashboard, optuna.load_study, Optuna's pictures.

Used by fill_tables.py --study and draw_report.py.
"""

import datetime
import itertools

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial

STATES = {"finished": TrialState.COMPLETE, "stopped by ASHA": TrialState.PRUNED, "running": TrialState.RUNNING,
          "pending": TrialState.WAITING}  # fmt: skip
optuna.logging.set_verbosity(optuna.logging.WARNING)


def write(run, path):
    """Writes study.db: all of a run as far as its record tells."""
    path.write_bytes(b"")  # a new one, or an OSError that names it
    study = optuna.create_study(study_name=f"run {run.job}", storage=f"sqlite:///{path}")
    for trial, drawn in with_hyperparameters(run):
        state = STATES.get(trial.status, TrialState.FAIL)
        state = TrialState.FAIL if state == TrialState.COMPLETE and trial.best() is None else state
        frozen = create_trial(
            state=state,
            value=trial.best() if state in (TrialState.COMPLETE, TrialState.PRUNED) else None,
            **drawn,
            intermediate_values={round(report.epoch): report.loss for report in trial.finite()},
            user_attrs={"combo_id": trial.id, "trial": trial.name, "status": trial.status, "runtime_s": trial.clock()},
        )
        if trial.spans:
            start, end = (run.began + second for second in (trial.spans[0][0], trial.spans[-1][1]))
            frozen.datetime_start = datetime.datetime.fromtimestamp(start)
            frozen.datetime_complete = datetime.datetime.fromtimestamp(end) if state.is_finished() else None
        study.add_trial(frozen)


def compared(run):
    """All trials with a loss as a study in memory, each as if complete.

    Optuna compares complete trials only; of a search with ASHA these are the few that nothing has stopped.
    """
    study = optuna.create_study()
    study.add_trials(create_trial(value=trial.best(), **drawn) for trial, drawn in with_hyperparameters(run)
                     if trial.best() is not None)  # fmt: skip
    return study


def with_hyperparameters(run):
    """[(trial, what create_trial() wants to know of its hyperparameters)]; ranges: as far as values show them."""
    trials = run.trials.values()
    params = [{name: value if isinstance(value, (int, float)) else str(value) for name, value in trial.params.items()}
              for trial in trials]  # fmt: skip
    ranges = {}
    for name in dict.fromkeys(itertools.chain(*params)):
        values = {drawn[name] for drawn in params if name in drawn}
        if len(values) > 4 and not any(isinstance(value, str) for value in values):  # fewer are a choice
            ranges[name] = FloatDistribution(min(values), max(values), log=min(values) > 0)
        else:
            ranges[name] = CategoricalDistribution(sorted(values, key=str))
    return [(trial, {"params": drawn, "distributions": {name: ranges[name] for name in drawn}})
            for trial, drawn in zip(trials, params)]
