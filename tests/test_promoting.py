"""ASHA as published, which pauses and promotes: simulated, and once with Ray."""

import os
import signal
import subprocess
import sys

import pytest
import run_state
from conftest import REPO, SCRIPT, call, load_module, reports_of, wait_for
from forecast import replay
from test_benchmarks import asha_savings

promoting = load_module(asha_savings.PROMOTING)
epochs_of = lambda found: [trial.last_result["epoch"] for trial in found["trials"]]


@pytest.mark.parametrize("seconds, whole, alone", [([1] * 9, 9, 21), ([1, 2, 1, 4, 1, 1, 1, 1, 1], 13, 27)])
def test_nine_configurations_on_nine_machines_are_as_fast_as_with_synchronous_halving(seconds, whole, alone):
    """As in section 3.1 of Li et al. (2020), bracket 0: r = 1, R = 9, factor 3: nine train to 1, three to 3, one to 9.
    It is there after time(R); if each rung trains from the beginning, 1 + 3 + 9, after 13/9 of it, or alone after 3."""
    curves = [([number] * 9, seconds) for number in range(9)]
    found = replay(promoting.PromotingASHA(1, 9, 3), curves, slots=9)
    assert epochs_of(found) == [9, 3, 3, 1, 1, 1, 1, 1, 1] and found["seconds"] == 9 * whole
    assert [asha_savings.synchronous(curves, machines, 3, [1, 3, 9]) for machines in (9, 1)] == [whole, alone]


def test_one_that_waits_goes_on_when_later_ones_are_worse_and_rungs_wait_for_no_straggler():
    curves = lambda losses: [([loss] * 5, [1] * 5) for loss in losses]
    one_by_one = lambda *losses: epochs_of(replay(promoting.PromotingASHA(1, 5, 2), curves(losses), slots=1))
    assert one_by_one(2, 1)[0] == 1 and one_by_one(2, 1, 3, 4)[0] > 1
    assert one_by_one(1) == [5]
    curves = [([number] * 9, [1 if number < 26 else 99] * 9) for number in range(27)]
    found = replay(promoting.PromotingASHA(1, 9, 3), curves, slots=9)
    first = min(trial.ended for trial in found["trials"] if trial.last_result["epoch"] == 9)
    assert first < 15 and asha_savings.synchronous(curves, 9, 3, [1, 3, 9]) > 99


def test_ray_promotes_what_the_simulation_does_also_in_a_run_that_is_continued(private_ray, demo, tmp_path):
    run_dir, log = tmp_path / "run", tmp_path / "log.txt"
    command = [sys.executable, asha_savings.PROMOTING, "--run-dir", run_dir]
    environ = os.environ | private_ray | {"PYTHONPATH": str(SCRIPT.parent)} | {
        "MODEL_NAME": str(demo / "model"), "SQUAD_DATA": str(demo / "squad"), "TRAIN_SAMPLES": "32",
        "EVAL_SAMPLES": "16", "LR_LOWER": "1e-4", "LR_UPPER": "5e-2", "BS_CHOICES": "2", "NUM_SAMPLES": "6",
        "NUM_EPOCHS": "5", "WORKERS_PER_TRIAL": "1", "CPUS_PER_WORKER": "2",
    }  # fmt: skip
    run_dir.mkdir()
    run_state.record(run_dir, "settings", NUM_EPOCHS=5)  # as the head script does
    with log.open("w") as output:
        first = subprocess.Popen(command, env=environ, stdout=output, stderr=subprocess.STDOUT)
        wait_for(lambda: "00003  started" in log.read_text() or first.poll() is not None, 300, "the fourth trial")
        first.send_signal(signal.SIGINT)
        first.wait(60)
        status = subprocess.run(command, env=environ, stdout=output, stderr=subprocess.STDOUT, timeout=300, check=False)
    assert status.returncode == 0, log.read_text()
    trained = [[report["eval_loss"] for report in reports] for _, reports in sorted(reports_of(run_dir).items())]
    curves = [(losses + [9] * (5 - len(losses)), [1] * 5) for losses in trained]  # a 9 would be one not trained
    assert list(map(len, trained)) == epochs_of(replay(promoting.PromotingASHA(1, 5, 2), curves, slots=1))
    told = log.read_text()
    assert told.count("finished   all epochs") == 1 and told.count("stopped    by PromotingASHA after epoch") == 5
    tables = call(load_module(REPO / "scripts/report/fill_tables.py"), run_dir).stdout
    assert tables.count("| stopped by PromotingASHA |") == 5
    assert "  continues  " in told and not (run_dir / "checkpoints").exists()
