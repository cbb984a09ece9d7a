"""What the benchmarks claim, where it can be asserted without a clock."""

import statistics

import pytest
from conftest import REPO, edit, load_module


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


def test_the_lines_of_the_page_for_even_learning_rates_draw_them(course):
    from ray.tune.experiment import Experiment
    from ray.tune.registry import register_trainable

    script = load_module(edit(course, (REPO / "tests/benchmarks/README.md").read_text()))
    settings = script.read_settings({"NUM_SAMPLES": "6", "LR_LOWER": "1e-6", "LR_UPPER": "1"})
    register_trainable("nothing", lambda config: None)
    sampler = script.sampler(settings)
    space = script.search_space(settings)
    sampler.add_configurations(Experiment("even", run="nothing", config=space, num_samples=6))
    drawn = [sampler.next_trial().config["train_loop_config"] for _ in range(6)]
    rates = [d["lr"] for d in drawn]
    assert sorted(rates) == pytest.approx([10 ** (-6 + i + 0.5) for i in range(6)]) and rates != sorted(rates)
    assert {d["per_device_bs"] for d in drawn} <= {1, 2}


def test_every_benchmark_is_on_the_page():
    """That its commands name existing files and options, and that each answers --help: test_docs.py."""
    page = (REPO / "tests/benchmarks/README.md").read_text()
    for program in (REPO / "tests/benchmarks").glob("*.py"):
        assert f".venv/bin/python tests/benchmarks/{program.name}" in page
