"""Other schedulers in the same frame. Checkpoints that pass from trial to trial, for real: weights, and new hyperparameters."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import (
    check_log,
    edit,
    exercise,
    job_of,
    nothing_left,
    quickstart,
)

TESTS = Path(__file__).resolve().parent


@pytest.mark.parametrize("deepspeed", [True, False])
def test_a_training_goes_on_from_anothers_weights_with_its_own_hyperparameters(demo, tmp_path, deepspeed):
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", TESTS / "train_from_checkpoint.py",
         demo / "model", demo / "squad", tmp_path, *([] if deepspeed else ["none"])],
        env=os.environ | {"PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"},
        text=True, check=False, capture_output=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    results = json.loads(next(line for line in run.stdout.splitlines() if line.startswith("RESULT "))[7:])
    donor, same, still, other = (results[name] for name in ("donor", "same", "still", "other"))
    assert donor["step"] == 0 and same["step"] == still["step"] == other["step"] == 8  # two of four epochs, 4 steps each
    assert same["weights"] == still["weights"] == other["weights"] != donor["weights"]
    assert same["losses"] == donor["losses"]  # as if it had not been interrupted
    assert still["losses"][2] == still["losses"][3] == donor["losses"][1]  # the donor's weights, and a rate of nothing
    assert other["losses"][:2] == donor["losses"][:2] and other["losses"][2] != donor["losses"][2]
    decay, none = other["groups"]  # half of the schedule is over, so half of the rate is left
    assert decay["lr"] == none["lr"] == pytest.approx(4e-2 / 2) and decay["betas"][1] == 0.8
    assert (decay["weight_decay"], none["weight_decay"]) == (0.5, 0)
    assert [group["lr"] for group in still["groups"]] == pytest.approx([5e-13, 5e-13])


def chosen(**mutations):
    from ray.tune.schedulers import PopulationBasedTraining

    return PopulationBasedTraining(metric="eval_loss", mode="min", hyperparam_mutations=mutations)


def test_what_pbt_needs_is_asked_for_before_anything_starts(hpo):
    from ray.tune.schedulers import HyperBandScheduler

    settings = hpo.read_settings({"CHECKPOINTS": "1"})
    hpo.check_scheduler(chosen(train_loop_config={"lr": [1e-3, 1e-2]}), settings)
    hpo.check_scheduler(hpo.scheduler(hpo.read_settings({})), hpo.read_settings({}))
    with pytest.raises(hpo.InputError, match="'per_device_bs' cannot change within a training"):
        hpo.check_scheduler(chosen(train_loop_config={"lr": [1e-3, 1e-2], "per_device_bs": [1, 2]}), settings)
    with pytest.raises(hpo.InputError, match="names nothing that is drawn"):
        hpo.check_scheduler(chosen(lr=[1e-3, 1e-2]), settings)
    for scheduler in (chosen(train_loop_config={"lr": [1e-3, 1e-2]}), HyperBandScheduler()):
        with pytest.raises(hpo.InputError, match="CHECKPOINTS='0': .* set CHECKPOINTS=1"):
            hpo.check_scheduler(scheduler, SimpleNamespace(CHECKPOINTS=0))


def test_pbt_copies_weights_from_trial_to_trial(course, demo):
    """Mutations to a learning rate of nothing: after a copy the loss must stay what the donor's was at that epoch.

    One trial at a time, so PBT pauses each after each epoch: the order of reports, and so the copies, do not depend on
    the machine. One process a trial, for six starts; two processes are tested above.
    """
    script = edit(course, exercise(10))
    line = '"lr": tune.loguniform(s.LR_LOWER, s.LR_UPPER), "wd": s.WD_CHOICES}},'
    text = script.read_text()
    assert text.count(line) == 1
    script.write_text(text.replace(line, '"lr": lambda: 1e-12}}, resample_probability=1,'))
    variables = {"NUM_SAMPLES": "2", "NUM_EPOCHS": "3", "TRAIN_SAMPLES": "32", "EVAL_SAMPLES": "16", "LR_LOWER": "1e-4", "LR_UPPER": "5e-2", "BS_CHOICES": "2"}
    variables |= {"MODEL_NAME": str(demo / "model"), "SQUAD_DATA": str(demo / "squad"), "WORKERS_PER_TRIAL": "1", "CPUS_PER_WORKER": str(os.cpu_count())}
    status, log = quickstart(course, **variables)
    assert status == 2 and "ERROR: CHECKPOINTS='0': PopulationBasedTraining" in log and not (course / "runs").exists()
    status, log = quickstart(course, **variables, CHECKPOINTS="1")
    assert status == 0, log
    check_log(log, job_of(log))
    copies = proofs(log)
    assert copies, log
    for mine, donors in copies:
        assert mine == donors
    run_dir = course / "runs" / job_of(log)
    assert not (run_dir / "checkpoints").exists() and (run_dir / "tune/pbt_global.txt").stat().st_size > 0
    assert log.count("finished   all epochs") == 2
    assert nothing_left(job_of(log))


def proofs(log):
    """For each copy that was then trained: (the copier's loss at its next epoch, the donor's at the epoch that was copied)."""
    losses, waiting, found = {}, {}, []
    for line in log.splitlines():
        if match := re.search(r"search \| (\S+)  copies     (\S+) as it was after epoch (\d+)", line):
            waiting[match[1]] = losses[match[2], int(match[3])]
        elif match := re.search(r"search \| (\S+)  epoch (\d+)/\d+  eval_loss (\S+)", line):
            losses[match[1], int(match[2])] = match[3]
            if match[1] in waiting:
                found.append((match[3], waiting.pop(match[1])))
    return found
