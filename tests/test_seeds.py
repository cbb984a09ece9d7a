"""Was it luck? The best of a search again, with several seeds."""

import re

import pytest
from conftest import REPO, SMALL, SPACE, job_of, load_module, quickstart, reports_of, table_of

SEEDS = REPO / "scripts/raytune_hpo/raytune_seeds/raytune_seeds_hpo.py"


def losses_of(run_dir):
    """The losses of each trial, in the order drawn."""
    return [[report["eval_loss"] for report in reports] for _, reports in sorted(reports_of(run_dir).items())]


def test_seeds_tell_luck_from_merit(course, demo):
    """A search of three; then the best two with two seeds each. Bad input is refused in one line."""
    variables = SMALL | SPACE | {"NUM_SAMPLES": "3", "NUM_EPOCHS": "2", "WORKERS_PER_TRIAL": "1"}
    variables |= {"CPUS_PER_WORKER": "1", "MODEL_NAME": str(demo / "model"), "SQUAD_DATA": str(demo / "squad")}
    status, log = quickstart(course, **variables)
    assert status == 0
    searched = losses_of(course / "runs" / job_of(log))
    repeat = {"REPEAT": f"runs/{job_of(log)}", "SEEDS": "2", "NUM_SAMPLES": "4"}
    repeat["SEARCH_SCRIPT"] = str(course.parents[3] / "scripts/raytune_hpo/raytune_seeds/raytune_seeds_hpo.py")
    status, log = quickstart(course, **variables | repeat)
    assert status == 0 and log.count("finished   all epochs") == 4 and len(table_of(log)) == 4
    again = losses_of(course / "runs" / job_of(log))
    for first, (same, other) in zip(sorted(searched, key=min)[:2], (again[:2], again[2:]), strict=True):
        assert same[: len(first)] == first != other[: len(first)]  # the search's own seed gives its losses
    means = [sum(map(min, pair)) / 2 for pair in (again[:2], again[2:])]
    told = re.findall(r"seeds: [\d.]+ +([\d.]+) ", log)
    assert told == [f"{mean:.5f}" for mean in means]
    assert ("as in the search" in log) and ("not as in the search" in log) == (means[1] < means[0])


def test_a_run_to_continue_knows_what_it_repeats(tmp_path, monkeypatch, hpo):
    seeds = load_module(SEEDS)
    monkeypatch.setattr(seeds, "asked", lambda s: ([[1.0, {"lr": 1}]], 2))
    first = seeds.chosen(hpo.read_settings({}), tmp_path)
    monkeypatch.setattr(seeds, "asked", lambda s: pytest.fail("asked once more"))
    assert first == seeds.chosen(hpo.read_settings({}), tmp_path) == ([[1.0, {"lr": 1}]], 2)


def test_a_configuration_that_diverges_with_every_seed_is_the_last():
    seeds = load_module(SEEDS)
    again = [(2.0, {"lr": 2, "seed": 1}), (3.0, {"lr": 2, "seed": 2})]
    told = list(seeds.compare([(1.0, {"lr": 1}), (2.0, {"lr": 2})], 2, again))
    assert "order by the mean: 2, 1, not as in the search" in told and "inf" in told[2]


@pytest.mark.parametrize("wrong, said", [
    ({"REPEAT": "runs/none"}, "REPEAT='runs/none': not the run folder of a search"), ({}, "REPEAT='': not the run"),
    ({"SEEDS": "0"}, "SEEDS='0': set a whole number"), ({"SEEDS": "x"}, "SEEDS='x': set a whole number"),
    ({"NUM_SAMPLES": "10"}, "NUM_SAMPLES='10': set a multiple of SEEDS=3"),
    ({"REPEAT": "run", "EVAL_SAMPLES": "7"}, "EVAL_SAMPLES='7': the search in run had '100'"),
    ({"REPEAT": "run"}, "NUM_SAMPLES='9': run has 1 trials with a loss; set at most 3"),
])
def test_what_cannot_be_repeated_is_refused(tmp_path, monkeypatch, hpo, wrong, said):
    seeds = load_module(SEEDS)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    seeds.run_state.record("run", "started", job="1", start="2026-11-29 10:00:00 UTC", kind="search")
    seeds.run_state.record("run", "settings", EVAL_SAMPLES="100")
    for trial, loss, error in (("a", 2.0, None), ("b", 1.0, "ValueError"), ("c", None, None)):  # b failed, c diverged
        seeds.run_state.record("run", "trial_started", trial=trial, config={"lr": 1})
        seeds.run_state.record("run", "report", trial=trial, epoch=1, eval_loss=loss, seconds=1)
        seeds.run_state.record("run", "trial_ended", trial=trial, error=error)
    with open("run/events.jsonl", "a") as file:
        file.write('{"eval_l')
    for name, value in wrong.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=re.escape(f"ERROR: {said}")) as ended:
        seeds.asked(hpo.read_settings({"NUM_SAMPLES": "9"} | wrong))
    assert "\n" not in str(ended.value)


def test_names_of_this_exercise_count_as_nobodys_misspelling(checks):
    assert not any(map(checks.misspelt, ("REPEAT", "SEEDS", "TEST_SAMPLES")))
