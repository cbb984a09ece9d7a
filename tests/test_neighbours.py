"""The lesson on a plain Ray, alone and without each of the files beside it: the same losses, and no more lost than the
file says. And the script of population based training (PBT), which changes the lesson.
"""

import json
import math
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
from importlib import metadata
from types import SimpleNamespace

import forecast
import pytest
import run_state
import trial_log
from conftest import REPO, SCRIPT, table_of, wait_for
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule

NEIGHBOURS = {"fast_trials", "run_state", "trial_log", "library_fixes", "own_data"}
FEW = {"TRAIN_SAMPLES": "16", "EVAL_SAMPLES": "8", "NUM_EPOCHS": "1", "WORKERS_PER_TRIAL": "1", "CPUS_PER_WORKER": "1"}
RATE = 'tune.sample_from(lambda spec: math.inf if spec.config["train_loop_config"]["per_device_bs"] == 8 else 1e-2)'


@pytest.fixture(scope="module")
def search_with(private_ray, demo, tmp_path_factory):
    """Runs the lesson in a folder of its own with these neighbours, one of its two trials at a rate that diverges."""

    def run(*neighbours):
        folder = tmp_path_factory.mktemp("lesson")
        shutil.copy(REPO / "scripts/ds_config.json", folder)
        text = SCRIPT.read_text()
        for old, new in (
            ("tune.choice(s.BS_CHOICES)", "tune.grid_search([8, 2])"),
            ("tune.loguniform(s.LR_LOWER, s.LR_UPPER)", RATE),
        ):
            assert text.count(old) == 1
            text = text.replace(old, new)
        (folder / SCRIPT.name).write_text(text)
        for name in neighbours:
            shutil.copy(SCRIPT.with_name(f"{name}.py"), folder)
        variables = FEW | {"NUM_SAMPLES": "1", "MODEL_NAME": str(demo / "model"), "SQUAD_DATA": str(demo / "squad")}
        command = [sys.executable, "-u", SCRIPT.name, "--run-dir", "results"]
        done = subprocess.run(command, cwd=folder, env=os.environ | private_ray | variables, text=True, check=False,
                              capture_output=True, timeout=300)  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr[-3000:]
        losses = {}
        for path in (folder / "results/tune").glob("*/result.json"):
            for report in map(json.loads, path.read_text().splitlines()):
                losses[report["config"]["train_loop_config"]["per_device_bs"], report["epoch"]] = report["eval_loss"]
        return folder, done.stdout, losses

    return run


@pytest.fixture(scope="module")
def alone(search_with):
    return search_with()


def test_the_lesson_alone_searches_with_plain_ray(alone):
    """Places are freed, a diverged trial ends, the table and the best line are there."""
    folder, log, losses = alone
    assert set(losses) == {(2, 1.0), (8, 1.0)} and math.isfinite(losses[2, 1.0]) and math.isnan(losses[8, 1.0])
    table = log[log.rindex("Number of trials: 2/2 (2 TERMINATED)") :]
    assert [row["status"] for row in table_of(table) if row["status"]] == ["TERMINATED"] * 2
    assert f"Best Trial Result:\n{{'eval_loss': {losses[2, 1.0]}, " in log
    assert sorted(path.name for path in folder.iterdir()) == sorted(["ds_config.json", SCRIPT.name, "results"])


@pytest.mark.parametrize("missing", ["run_state", "trial_log"])
def test_without_a_neighbour_only_what_it_does_is_lost(missing, search_with, alone):
    folder, log, losses = search_with(*NEIGHBOURS - {missing})
    assert {key: str(loss) for key, loss in losses.items()} == {key: str(loss) for key, loss in alone[2].items()}
    assert "Best Trial Result:" in log
    lines = re.findall(r"search \| TorchTrainer_\S+  (started|epoch|finished|ended)", log)
    told = ["ended", "epoch", "epoch", "finished", "started", "started"]
    assert sorted(lines) == ([] if missing == "trial_log" else told)
    kept = {path.name for path in (folder / "results").iterdir()} - {"tune"}
    if missing == "run_state":
        assert kept == set()
        return
    assert kept == {"events.jsonl"}  # what happened to each trial
    events = [json.loads(line) for line in (folder / "results/events.jsonl").read_text().splitlines()]
    names = [event["event"] for event in events]
    assert names[0] == "search" and names[-1] == "best" and sorted(names[1:-1]) == [
        *["report"] * 2, *["trial_ended"] * 2, *["trial_started"] * 2]
    reports = {event["trial"]: event for event in events if event["event"] == "report"}
    assert sorted(event["eval_loss"] or 0 for event in reports.values()) == [0, losses[2, 1.0]]  # null: not finite
    assert {event["decision"] for event in reports.values()} == {"STOP"}
    assert f"'eval_loss': {events[-1]['eval_loss']}" in log and events[-1]["config"]["per_device_bs"] == 2


def test_with_another_ray_a_lost_node_costs_its_trials_and_the_log_says_so(tmp_path, monkeypatch):
    """run_state.py replaces a method of Ray's, whose versions it names."""
    import ray
    from ray import tune
    from ray.tune.experiment import Trial

    rule, said = Trial.should_recover, []
    monkeypatch.setattr(run_state, "say", said.append)
    monkeypatch.setattr(ray, "__version__", "9.9.9")
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"trial_slot": 1})
    monkeypatch.setenv("TUNE_MAX_PENDING_TRIALS_PG", "1")
    monkeypatch.setenv("TUNE_GLOBAL_CHECKPOINT_S", "1")
    monkeypatch.setenv("TIME_BUDGET_ENDS", "inf")
    run_config = tune.RunConfig(callbacks=[])
    run_state.attach(SimpleNamespace(NUM_SAMPLES=1, NUM_EPOCHS=1), tmp_path,
                     tune.TuneConfig(scheduler=FIFOScheduler()), run_config)  # fmt: skip
    assert said == ["Ray 9.9.9 is not 2.60.0: a trial fails if its node is lost"]
    assert Trial.should_recover is rule and run_config.failure_config.max_failures == 0


def test_with_another_deepspeed_its_methods_stay_and_the_log_says_so(tmp_path, monkeypatch):
    """library_fixes.py replaces two of them, whose versions it names."""
    import library_fixes
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer as Zero
    from ray import tune
    from transformers.models.bloom.modeling_bloom import BloomGelu

    said, methods = [], (Zero.check_overflow, Zero.get_grad_norm_direct)
    monkeypatch.setattr(trial_log, "say", said.append)
    monkeypatch.setattr(BloomGelu, "forward", BloomGelu.forward)
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # attach() sends it elsewhere
    monkeypatch.setattr(library_fixes, "TESTED", ("9.9.9",))
    run_config, space = tune.RunConfig(callbacks=[]), {"train_loop_config": {}}
    trial_log.attach(SimpleNamespace(NUM_SAMPLES=1), tmp_path, space, tune.TuneConfig(), run_config)
    library_fixes.launch_less()
    assert said == [f"DeepSpeed {metadata.version('deepspeed')} is not 9.9.9: on a GPU a step takes longer"]
    assert (Zero.check_overflow, Zero.get_grad_norm_direct) == methods


@pytest.mark.parametrize("error, told", [
    ("RuntimeError: CUDA error: the MPS client has been terminated", " (MPS ends all trials of a GPU when one"),
    ("RuntimeError: CUDA error: an illegal memory access was encountered", ""),
])  # fmt: skip
def test_what_a_trial_dies_of_when_another_has_ended_mps_is_told(tmp_path, error, told):
    (tmp_path / "error.txt").write_text(f"Traceback\n  a line\n{error}\n")
    cause = run_state.cause_of(SimpleNamespace(error_file=tmp_path / "error.txt"))
    assert cause.startswith(error) and cause[len(error) :].startswith(told) and bool(told) == (len(cause) > len(error))


def test_a_cluster_without_trial_slots_is_told_so_at_once(hpo, monkeypatch):
    import ray

    monkeypatch.setattr(ray, "init", lambda *address, **options: None)
    looks = []
    monkeypatch.setattr(ray, "cluster_resources", lambda: looks.append(1) or {"CPU": 8.0, "memory": 1e9})
    with pytest.raises(SystemExit, match="ERROR: no node offers a trial_slot; start Ray as"):
        hpo.join_cluster(hpo.read_settings({"WORKER_DEADLINE": "2"}))
    assert len(looks) == 1  # not only at the deadline


def test_only_a_lost_process_starts_again_not_one_that_could_not_be_made(tmp_path, monkeypatch):
    from ray import cloudpickle
    from ray.exceptions import RayActorError

    def starts_again(error, failures=1):
        file = tmp_path / "error.pkl"
        file.write_bytes(cloudpickle.dumps(error))
        failed = SimpleNamespace(num_failures=failures)
        return run_state.lost_with_its_node(
            SimpleNamespace(pickled_error_file=file, run_metadata=failed, max_failures=run_state.RESTARTS)
        )

    assert starts_again(RayActorError(None, "its node died"))
    assert starts_again(RayActorError(None, "its node died"), failures=3)
    assert not starts_again(RayActorError(None, "its node died"), failures=4)
    assert not starts_again(RayActorError(None, "ModuleNotFoundError", actor_init_failed=True))
    assert not starts_again(RuntimeError("training worker 0 died; out of memory?"))


@pytest.mark.parametrize("losses, stopped, how", [
    ([2.0], True, "stopped    by ASHA after epoch 1"), ([2.0, math.nan], True, "ended      diverged at epoch 2"),
    ([2.0, 1.0, 0.5], True, "finished   all epochs"),
    ([2.0, 1.0], False, "finished   its epochs, 2 as drawn"),  # num_train_epochs is a hyperparameter, say
])  # fmt: skip
def test_the_log_tells_how_a_trial_has_ended(tmp_path, monkeypatch, losses, stopped, how):
    said, trial = [], forecast.Trial(0, losses, [])
    monkeypatch.setattr(trial_log, "say", said.append)
    lines = trial_log.TrialLines(SimpleNamespace(NUM_EPOCHS=3, NUM_SAMPLES=1), tmp_path, "ASHA")
    for epoch, loss in enumerate(losses, 1):
        done = stopped and epoch == len(losses)
        trial.last_result = {"epoch": epoch, "eval_loss": loss} | ({"done": True} if done else {})
        lines.on_trial_result(0, [trial], trial, trial.last_result)
    trial.last_result["done"], trial.is_finished = True, lambda: True
    lines.on_trial_complete(0, [trial], trial)
    assert said[-1].endswith(f"  {how}") and len(said) == len(losses) + 1


@pytest.mark.parametrize("scheduler", [
    lambda: ASHAScheduler(metric="eval_loss", mode="min", max_t=5, reduction_factor=2),
    lambda: MedianStoppingRule(metric="eval_loss", mode="min", grace_period=1),  # of seconds, as it is by default
    lambda: MedianStoppingRule("epoch", "eval_loss", "min", grace_period=1),
])  # fmt: skip
def test_a_scheduler_decides_after_a_cut_as_without_one_and_pauses_nothing(tmp_path, scheduler):
    """Trials one after another. A continued run adds all again, and starts those anew that had not ended."""
    draw = random.Random(2)
    trials = [forecast.Trial(number, [draw.random() for _ in range(5)], []) for number in range(12)]
    waiting = SimpleNamespace(status="PENDING")
    controller = SimpleNamespace(get_live_trials=lambda: [waiting])

    def search(folder, reports=math.inf):
        """Until so many reports are recorded -> all decisions"""
        remembering = run_state.Remembering(scheduler(), folder, 5)
        for trial in trials:
            remembering.on_trial_add(controller, trial)
        ended = {row["trial_id"] for row in run_state.reports_so_far(folder) if row["decision"] == "STOP"}
        for trial in trials:
            for epoch, loss in enumerate([] if trial.trial_id in ended else trial.losses, 1):
                row = {"trial_id": trial.trial_id, "epoch": epoch, "eval_loss": loss, "seconds": 2.0 * epoch}
                result = row | {"training_iteration": epoch, "time_total_s": 2.0 * epoch}
                decision = remembering.on_trial_result(controller, trial, result) if epoch < 5 else "STOP"
                run_state.record(folder, "report", decision=decision, training_iteration=epoch, **row)
                if (reports := reports - 1) <= 0:
                    return None
                if decision == "STOP":
                    remembering.on_trial_complete(controller, trial, result)
                    break
        rows = run_state.reports_so_far(folder)
        return {(row["trial_id"], row["epoch"]): row["decision"] for row in rows}

    (tmp_path / "whole").mkdir()
    whole = search(tmp_path / "whole")
    assert set(whole.values()) == {"CONTINUE", "STOP"} and len(whole) < 60
    for cut in range(1, len(whole), 5):
        (tmp_path / str(cut)).mkdir()
        assert search(tmp_path / str(cut), cut) is None and search(tmp_path / str(cut)) == whole, cut


# ---- Population based training ---------------------------------------------------------------------------------------
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
    the machine. One process a trial; two: test_training.py.
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
