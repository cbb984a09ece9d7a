"""What the benchmarks claim, where it can be asserted without a clock."""

import statistics

import pytest
from conftest import REPO, load_module


@pytest.mark.parametrize("slots", [1, 4])
def test_savings_asha_trains_less_than_the_full_grid_and_mostly_finds_its_best(hpo, slots):
    """Recorded curves, met by the script's own scheduler; the seeds are fixed, so is the outcome."""
    savings = load_module(REPO / "tests/benchmarks/asha_savings.py")
    curves = savings.Curves(savings.CURVES[0], epoch_seconds=60)
    runs = [savings.compare_with_full(hpo, curves, seed, slots, startup=5) for seed in range(30)]
    assert {run["epochs_full"] for run in runs} == {60}
    assert all(12 < run["epochs"] <= 60 for run in runs)
    assert statistics.median(run["epochs"] for run in runs) <= 40
    assert statistics.median(run["time"] for run in runs) <= 0.8
    assert sum(run["best_found"] for run in runs) >= 24
    assert all(run["regret"] >= 0 for run in runs)


def test_savings_the_recorded_configurations_are_those_of_the_search(hpo):
    """The quickstart's are the first twelve. Close, not equal: the last digit of exp() depends on the CPU."""
    savings = load_module(REPO / "tests/benchmarks/asha_savings.py")
    curves = savings.Curves(savings.CURVES[0])
    space = hpo.search_space(savings.settings_of(hpo, curves.about))
    recorded = [{key: c[key] for key in ("lr", "per_device_bs", "wd")} for c in curves.configurations]
    drawn = savings.draw_configurations(space, curves.about["SEED"], len(recorded))
    for ours, theirs in zip(drawn, recorded, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9)


def test_every_benchmark_is_on_the_page():
    """That its commands name existing files and options, and that each answers --help: test_docs.py."""
    page = (REPO / "tests/benchmarks/README.md").read_text()
    for program in (REPO / "tests/benchmarks").glob("*.*"):
        assert program.suffix not in (".py", ".sh") or program.name in page
