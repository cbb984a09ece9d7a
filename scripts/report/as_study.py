"""A run as an Optuna study, for the tools that know one: optuna-dashboard, optuna.load_study, Optuna's pictures.

Used by fill_tables.py --study and draw_report.py.
"""

import datetime
import math
import os

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial
from read_run import TITLES, finite_or_none, further_names

STATES = {"finished": TrialState.COMPLETE, "stopped by ASHA": TrialState.PRUNED, "diverged": TrialState.FAIL,
          "FAILED": TrialState.FAIL, "cut off": TrialState.FAIL, "not started": TrialState.WAITING}  # fmt: skip
FEW = 4  # distinct values of a hyperparameter that count as a choice; more are a range
optuna.logging.set_verbosity(optuna.logging.WARNING)


def write(run, path):
    """Writes study.db, in one step: all of a run as far as its log or folder tells."""
    new = f"{path}.new"
    if os.path.exists(new):
        os.remove(new)
    study = optuna.create_study(study_name=f"run {run.job}", storage=f"sqlite:///{os.path.abspath(new)}")
    ranges = distributions(run)
    for trial in run.trials.values():
        state, value = STATES.get(trial.status, TrialState.RUNNING), trial.best()
        if value is None and state == TrialState.COMPLETE:
            state = TrialState.FAIL
        frozen = create_trial(
            state=state,
            value=value if state in (TrialState.COMPLETE, TrialState.PRUNED) else None,  # the others have none
            **drawn(trial, ranges),
            intermediate_values={round(epoch): loss for epoch, loss in trial.reports if math.isfinite(loss)},
            user_attrs={"combo_id": trial.id, "trial": trial.name, "status": trial.status, "runtime_s": trial.runtime},
        )
        if run.start and trial.start is not None:
            frozen.datetime_start = run.start + datetime.timedelta(seconds=trial.start)
            end = run.now if trial.end is None else trial.end
            frozen.datetime_complete = run.start + datetime.timedelta(seconds=end)
        study.add_trial(frozen)
    os.replace(new, path)


def compared(run, value_of):
    """All trials to which value_of(trial) gives a finite value, as a study in memory, each as if complete.

    Optuna compares complete trials only; of a search with ASHA these are the few that nothing has stopped.
    """
    study, ranges = optuna.create_study(), distributions(run)
    for trial in run.trials.values():
        if finite_or_none(value := value_of(trial)) is not None:
            study.add_trial(create_trial(value=value, **drawn(trial, ranges)))
    return study


def distributions(run):
    """{hyperparameter: what its values were drawn from, as far as they show it}, of those that all trials have."""
    found = {}
    for name in [*TITLES, *further_names([run])]:
        values = [trial.params.get(name) for trial in run.trials.values()]
        distinct = set(map(str, values))
        if not values or None in values:
            continue
        if len(distinct) > FEW and all(finite_or_none(value) is not None for value in values):
            low, high = min(values), max(values)
            found[name] = FloatDistribution(low, high, log=low > 0 and high > 8 * low)
        else:
            plain = all(isinstance(value, (int, float)) for value in values)
            found[name] = CategoricalDistribution(sorted(set(values)) if plain else sorted(distinct))
    return found


def drawn(trial, ranges):
    """What create_trial() wants to know of a trial's hyperparameters."""
    words = {name for name, each in ranges.items() if isinstance(each, CategoricalDistribution) and any(
        isinstance(choice, str) for choice in each.choices)}  # fmt: skip
    values = {name: str(trial.params[name]) if name in words else trial.params[name] for name in ranges}
    return {"params": values, "distributions": ranges}
