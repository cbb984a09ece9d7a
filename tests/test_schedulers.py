"""Population based training: weights that pass from trial to trial, and what is read from a checkpoint."""

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO, SCRIPT, wait_for

TESTS = Path(__file__).resolve().parent
PBT = REPO / "scripts/raytune_hpo/raytune_pbt_scheduler/raytune_pbt_hpo.py"
MUTATIONS = 'return {"lr": tune.loguniform(s.LR_LOWER, s.LR_UPPER), "wd": s.WD_CHOICES}'


@pytest.fixture
def pbt(tmp_path):
    """A function that writes other mutations into a copy of the script -> its path."""
    shutil.copytree(REPO / "scripts", tmp_path / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    script = tmp_path / PBT.relative_to(REPO)

    def mutating(mutations):
        text = PBT.read_text()
        assert text.count(MUTATIONS) == 1
        script.write_text(text.replace(MUTATIONS, f"return {mutations}"))
        return script

    return mutating


def test_weights_pass_from_trial_to_trial_also_in_a_run_that_is_continued(pbt, private_ray, demo, tmp_path):
    """Mutations to a learning rate of nothing: after a copy the loss must stay what the donor's was at that epoch.

    One trial at a time, so PBT pauses each after each epoch: the order of reports, and so the copies, do not depend on
    the machine. One process a trial; two processes are tested below.
    """
    run_dir, log = tmp_path / "run", tmp_path / "log.txt"
    command = [sys.executable, pbt('{"lr": [1e-12]}'), "--run-dir", run_dir]
    environ = os.environ | private_ray | {"PYTHONPATH": str(SCRIPT.parent)} | {
        "MODEL_NAME": str(demo / "model"), "SQUAD_DATA": str(demo / "squad"), "TRAIN_SAMPLES": "32",
        "EVAL_SAMPLES": "16", "LR_LOWER": "1e-4", "LR_UPPER": "5e-2", "BS_CHOICES": "2", "NUM_SAMPLES": "2",
        "NUM_EPOCHS": "8", "WORKERS_PER_TRIAL": "1", "CPUS_PER_WORKER": "2",
    }  # fmt: skip
    with log.open("w") as output:
        first = subprocess.Popen(command, env=environ, stdout=output, stderr=subprocess.STDOUT)
        copied = lambda: proofs(log.read_text()) or first.poll() is not None
        wait_for(copied, 180, "a trial that has trained what it copied")
        saved = list(run_dir.glob("checkpoints/*/*/checkpoint-*"))
        first.send_signal(signal.SIGINT)  # Ray records where each trial is, and ends
        first.wait(60)
        assert 2 <= len(saved) <= 4, saved  # of each trial the last one, and that to be copied; one may be about to go
        status = subprocess.run(command, env=environ, stdout=output, stderr=subprocess.STDOUT, timeout=180, check=False)
    assert status.returncode == 0, log.read_text()
    before, after = log.read_text().split("continues the run in ")
    for mine, donors in proofs(before + after):
        assert mine == donors
    copier = re.search(r"(\S+)  copies", before)[1]
    kept = re.findall(rf"{copier}  epoch \d/8  eval_loss (\S+)", before)[-1]  # at a rate of nothing
    copied, loss = re.search(rf"{copier}  (?:(copies)|epoch \d/8  eval_loss (\S+))", after).groups()
    assert copied or loss == kept  # copied: after its last report in the first part
    assert after.count("finished   all epochs") == 2 and "epoch 1/8" not in after  # each went on from its checkpoint
    assert not (run_dir / "checkpoints").exists() and (run_dir / "tune/pbt_global.txt").stat().st_size > 0


def proofs(log):
    """For each copy that was then trained: (the copier's loss at its next epoch, the donor's at the copied epoch)."""
    losses, waiting, found = {}, {}, []
    for line in log.splitlines():
        if match := re.search(r"search \| (\S+)  copies     (\S+) as it was after epoch (\d+)", line):
            waiting[match[1]] = losses[match[2], int(match[3])]
        elif match := re.search(r"search \| (\S+)  epoch (\d+)/\d+  eval_loss (\S+)", line):
            losses[match[1], int(match[2])] = match[3]
            if match[1] in waiting:
                found.append((match[3], waiting.pop(match[1])))
    return found


@pytest.mark.parametrize("mutations, why", [
    ('{"lr": [1e-3], "per_device_bs": [1, 2]}', "'per_device_bs' sets the steps of an epoch"),
    ('{"warmup_ratio": [0.1]}', "'warmup_ratio' is not in the search space")])
def test_what_a_copy_cannot_change_is_named_before_anything_starts(pbt, mutations, why):
    with pytest.raises(SystemExit, match=f"^ERROR: mutations: {why}.*$"):
        runpy.run_path(str(pbt(mutations)), run_name="__main__")


def test_a_training_goes_on_from_anothers_weights_with_its_own_hyperparameters(demo, tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         TESTS / "train_from_checkpoint.py", demo / "model", demo / "squad", tmp_path],
        env=os.environ | {"PYTHONPATH": str(PBT.parent), "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"},
        text=True, check=False, capture_output=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    every = json.loads(next(line for line in run.stdout.splitlines() if line.startswith("RESULT "))[7:])
    optimizers = {every[engine]["donor"]["optimizer"] for engine in every}
    assert optimizers == {"AcceleratedOptimizer", "DeepSpeedOptimizerWrapper"}
    for results in every.values():
        donor, same, still, other = (results[name] for name in ("donor", "same", "still", "other"))
        assert donor["step"] == 0
        assert same["step"] == still["step"] == other["step"] == 8  # two of four epochs, 4 steps each
        assert same["weights"] == still["weights"] == other["weights"] != donor["weights"]
        assert same["losses"] == donor["losses"][2:]  # as if it had not been interrupted
        assert still["losses"] == [donor["losses"][1]] * 2  # the donor's weights, and a rate of nothing
        assert other["losses"][0] != donor["losses"][2]
        decay, none = other["groups"]  # half of the schedule is over, so half of the rate is left
        assert decay["lr"] == none["lr"] == pytest.approx(4e-2 / 2)
        assert decay["betas"] == none["betas"] == [0.9, 0.8] and decay["eps"] == none["eps"] == 1e-6
        assert (decay["weight_decay"], none["weight_decay"]) == (0.5, 0)
        assert [group["lr"] for group in still["groups"]] == pytest.approx([5e-13, 5e-13])
        assert other["last"] == pytest.approx(4e-2 / 16)  # the last of 16 steps, by the schedule
