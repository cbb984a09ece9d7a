"""What a search is going to cost, told before it starts."""

import os
import random
import re
import statistics

import forecast
import numpy as np
import pytest
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule
from test_fill_tables import keep, started, trial


@pytest.fixture
def search(monkeypatch):
    """search(a scheduler, or None for the lesson's; settings of a search): the settings"""
    def search(scheduler=None, **changes):
        monkeypatch.setattr(forecast.lesson, "scheduler", scheduler or forecast.lesson.scheduler)
        return forecast.lesson.read_settings({name: str(value) for name, value in changes.items()})

    return search


def one_at_a_time(factor, grace, trials, epochs, draw):
    """The epochs of one search by hand: at each rung a trial goes on if it is among the best 1/factor seen there."""
    rungs = [grace * factor**k for k in range(20) if grace * factor**k < epochs]
    seen, total = {rung: [] for rung in rungs}, 0
    for _ in range(trials):
        loss = draw.random()
        for epoch in range(1, epochs + 1):
            total += 1
            if epoch in seen:
                limit = np.quantile(seen[epoch] or [1], 1 / factor)
                seen[epoch].append(loss)
                if loss > limit:
                    break
    return total


@pytest.mark.parametrize("factor, grace, trials, epochs", [(2, 1, 12, 5), (4, 2, 20, 10)])
def test_the_epochs_are_those_of_the_scheduler_whatever_its_arguments(search, factor, grace, trials, epochs):
    rule = {"metric": "eval_loss", "mode": "min", "grace_period": grace, "max_t": epochs, "reduction_factor": factor}
    s = search(lambda s: ASHAScheduler(**rule), NUM_SAMPLES=trials, NUM_EPOCHS=epochs)
    low, mean, high, wall = forecast.expected(s, slots=1)
    by_hand = [one_at_a_time(factor, grace, trials, epochs, random.Random(seed)) for seed in range(400)]
    assert mean == pytest.approx(statistics.mean(by_hand), rel=0.06)
    assert low < mean < high and wall == pytest.approx(mean, rel=0.05)
    assert forecast.expected(s, slots=1) == (low, mean, high, wall)
    assert forecast.expected(s, slots=4)[3] < 0.5 * wall


@pytest.mark.parametrize("scheduler, low, high", [
    (lambda s: FIFOScheduler(), 60, 60),
    (lambda s: MedianStoppingRule(time_attr="epoch", metric="eval_loss", mode="min", grace_period=1), 12, 59),
])
def test_another_scheduler_of_the_lesson_has_a_forecast_as_well(search, scheduler, low, high):
    assert low <= forecast.expected(search(scheduler), slots=2)[1] <= high


def test_each_value_of_a_grid_is_drawn_num_samples_times(search, monkeypatch):
    s, space = search(), {"train_loop_config": {"lr": tune.grid_search([1e-5, 1e-4, 1e-3])}}
    monkeypatch.setattr(forecast.lesson, "search_space", lambda s: space)
    assert next(forecast.lines(s, 4, 1)).split(",")[0].endswith(" of 180 epochs")


def test_a_search_too_large_to_simulate_has_none(search):
    assert list(forecast.lines(search(NUM_SAMPLES=100_000), 4, 1)) == []


def lines(s, slots=4, Gw=1):
    epochs, time = forecast.lines(s, slots, Gw)
    assert re.fullmatch(rf"\d+ to \d+ of 60 epochs, \d+ on average, with {slots} trial\(s\) at once", epochs)
    return time


def test_minutes_of_an_epoch_are_those_of_the_variable(search, monkeypatch):
    monkeypatch.setenv("MINUTES_PER_EPOCH", "2")
    told = r"about [\d.]+ minutes and \d\.\d GPU-hours, at most 30.0 minutes and 4.0 GPU-hours, at 2 minutes .*"
    assert re.fullmatch(told, lines(search()))
    assert "and 2.0 GPU-hours, at 2 " in lines(search(WORKERS_PER_TRIAL=1)) and "slot-minutes" in lines(search(), Gw=0)
    for text in ("0", "-1", "x"):
        monkeypatch.setenv("MINUTES_PER_EPOCH", text)
        assert f"MINUTES_PER_EPOCH='{text}' is not a number above 0" in lines(search())


def test_without_the_variable_the_newest_fitting_run_tells(search, monkeypatch, tmp_path):
    s, runs = search(), tmp_path / "runs"
    monkeypatch.delenv("MINUTES_PER_EPOCH", raising=False)
    assert forecast.minutes_per_epoch(s, runs) == (
        None, "no earlier run has this model and data; to know, set MINUTES_PER_EPOCH")
    settings = {name: str(getattr(s, name)) for name in forecast.SAME} | {"GPUS_PER_WORKER": "1"}
    trials = [trial(0, *[2.0] * 5, each=60), trial(1, 3.0, each=60), trial(2, 2.0, ended=False), trial(3, error="x")]
    keep(tmp_path, started(**settings), *trials, job="1")
    keep(tmp_path, started(**settings | {"MODEL_NAME": "x"}), trial(0, 2.0), job="2")
    keep(tmp_path, started(**settings | {"GPUS_PER_WORKER": "0.5"}), trial(0, 2.0), job="5")  # slower on half a GPU
    keep(tmp_path, started(**settings), ["{half"], job="3")
    keep(tmp_path, job="4")
    assert forecast.minutes_per_epoch(s, runs) == (1.0, "run 1")
    keep(tmp_path, started(**settings), trial(0, 2.0, each=120), job="5")
    os.utime(runs / "1/events.jsonl", (1, 1))
    assert forecast.minutes_per_epoch(s, runs) == (2.0, "run 5")
