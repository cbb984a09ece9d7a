"""What the benchmarks claim, where it can be asserted without a clock."""

import statistics

import pytest
from conftest import REPO, load_module


@pytest.mark.parametrize("slots", [1, 4])
def test_asha_trains_less_than_the_full_grid_and_mostly_finds_its_best(hpo, slots):
    """Recorded curves, met by the script's own scheduler; the seeds are fixed, so is the outcome."""
    savings = load_module(REPO / "tests/benchmarks/asha_savings.py")
    curves = savings.Curves(hpo, savings.DEMO, epoch_seconds=60)
    runs = [savings.compare_with_full(hpo, curves, seed, slots, startup=5) for seed in range(30)]
    assert {run["epochs_full"] for run in runs} == {60}
    assert all(12 < run["epochs"] <= 60 for run in runs)
    assert statistics.median(run["epochs"] for run in runs) <= 40
    assert statistics.median(run["time"] for run in runs) <= 0.8
    assert sum(run["best_found"] for run in runs) >= 24
    assert all(run["regret"] >= 0 for run in runs)
