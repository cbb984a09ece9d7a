"""Was it luck? The best of a search again, with several seeds. A real one: exercise 12 in test_exercises.py."""

import re

import pytest
from conftest import REPO, load_module

SEEDS = REPO / "scripts/raytune_hpo/raytune_seeds/raytune_seeds_hpo.py"


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
