"""A run as an Optuna study, for the tools that know one: optuna-dashboard, optuna.load_study, Optuna's pictures.

Used by fill_tables.py --study and draw_report.py.
"""

import datetime

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial
from read_run import TITLES, further_names

STATES = {"finished": TrialState.COMPLETE, "stopped by ASHA": TrialState.PRUNED, "diverged": TrialState.FAIL,
          "FAILED": TrialState.FAIL, "cut off": TrialState.FAIL, "pending": TrialState.WAITING}  # fmt: skip
FEW = 4  # distinct values of a hyperparameter that count as a choice; more are a range
optuna.logging.set_verbosity(optuna.logging.WARNING)


def write(run, path):
    """Writes study.db, in one step: all of a run as far as its record tells."""
    new, ranges = path.absolute().with_name(f"{path.name}.new"), distributions(run)
    new.write_bytes(b"")  # a new one, or an OSError that names it
    study = optuna.create_study(study_name=f"run {run.job}", storage=f"sqlite:///{new}")
    for trial in run.trials.values():
        state = STATES.get(trial.status, TrialState.RUNNING)
        if state == TrialState.COMPLETE and trial.best() is None:
            state = TrialState.FAIL
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
    new.replace(path)


def compared(run, value_of):
    """All trials to which value_of(trial) gives a value, as a study in memory, each as if complete.

    Optuna compares complete trials only; of a search with ASHA these are the few that nothing has stopped.
    """
    study, ranges = optuna.create_study(), distributions(run)
    for trial in run.trials.values():
        if (value := value_of(trial)) is not None:
            study.add_trial(create_trial(value=value, **drawn(trial, ranges)))
    return study


def distributions(run):
    """{hyperparameter: what its values were drawn from, as far as they show it}, of those that all trials have."""
    found = {}
    for name in [*TITLES, *further_names([run])] if run.trials else ():
        values = [plain(trial.params.get(name)) for trial in run.trials.values()]
        if len(set(values)) > FEW and all(isinstance(value, (int, float)) for value in values):
            low, high = min(values), max(values)
            found[name] = FloatDistribution(low, high, log=low > 0 and high > 8 * low)
        elif all(name in trial.params for trial in run.trials.values()):
            found[name] = CategoricalDistribution(sorted(set(values), key=str))
    return found


def plain(value):
    """A value that Optuna takes as one of a choice."""
    return value if isinstance(value, (int, float)) else str(value)


def drawn(trial, ranges):
    """What create_trial() wants to know of a trial's hyperparameters."""
    return {"params": {name: plain(trial.params[name]) for name in ranges}, "distributions": ranges}
