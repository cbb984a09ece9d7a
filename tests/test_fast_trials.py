"""Warm trials: what lives on in a slot's processes must not be seen in any loss, and no fault may outlive its trial.

Most runs here train nothing and join nothing (Light), so that their processes start in a second.
"""

import contextlib
import gc
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import psutil
import pytest
from conftest import SCRIPT, address_of, command_of, end_ray, one_slot, start_ray, wait_for

ROOT = f"/tmp/ray_warm_{os.getpid()}"
ENVIRON = os.environ | {
    "RAY_AUTH_MODE": "disabled",
    "WARM_TEST": str(os.getpid()),
    "PYTHONPATH": f"{SCRIPT.parent}:{Path(__file__).parent}",
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    # Memory goes back to the system, so that what a process holds can be compared.
    "MALLOC_TRIM_THRESHOLD_": "0",
}


def marked():
    """Command lines of the processes of this file's Ray and drivers, by pid."""
    every = [process.info for process in psutil.process_iter(["pid", "cmdline", "environ", "status"])]
    return {each["pid"]: " ".join(each["cmdline"] or []) for each in every if each["status"] != psutil.STATUS_ZOMBIE
            and (each["environ"] or {}).get("WARM_TEST") == ENVIRON["WARM_TEST"]}  # fmt: skip


def of_trials():
    """Pids of the trials' processes: actors (their titles overwrite their environment), so children of the raylet."""
    (raylet,) = (pid for pid, command in marked().items() if "/raylet/raylet " in command)
    actors = ("ray::TrainingProcess", "ray::ResourceTrainable")
    return [each.pid for each in psutil.Process(raylet).children() if command_of(each.pid).startswith(actors)]


@pytest.fixture(scope="module")
def address():
    """A private Ray with room for one trial at a time, and twelve claimed GPUs."""
    head = start_ray(*one_slot(), "--num-gpus=12", f"--temp-dir={ROOT}", log=f"{ROOT}.log", environ=ENVIRON)
    try:
        yield address_of(ROOT)
    finally:
        end_ray(head)
        with contextlib.suppress(AssertionError):
            wait_for(lambda: not marked(), 10, "Ray to end")
        for pid in (left := marked()):
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(ROOT, ignore_errors=True)
        os.unlink(f"{ROOT}.log")
        assert not left


def driver_of(address, folder, script, **settings):
    """This file as the driver of a search."""
    command = [sys.executable, __file__, address, folder, json.dumps(script), json.dumps(settings)]
    with open(folder / "log.txt", "w") as log:
        return subprocess.Popen(command, env=ENVIRON, stdout=log, stderr=log)


def run(address, folder, script, **settings):
    """A search to its end. -> a dict for each trial, in order"""
    driver = driver_of(address, folder, script, **settings)
    try:
        status = driver.wait(900)
    finally:
        driver.kill()
    assert status == 0, (folder / "log.txt").read_text()[-4000:]
    wait_for(lambda: not of_trials(), 20, "the run's processes to end")
    return json.loads((folder / "trials.json").read_text())


# ---- In the driver --------------------------------------------------------------------------------------------
def drive(address, folder, script, *, w=1, light=True, demo=None, others_gpus=0):
    """The script's trials one after another, by Tune and fast_trials.

    others_gpus: how many of the claimed GPUs somebody else holds; then each process gets one of the others."""
    import fast_trials
    import ray
    import raytune_asha_hpo as hpo
    from ray import tune

    variables = {"NUM_EPOCHS": 2, "TRAIN_SAMPLES": 8, "EVAL_SAMPLES": 4, "WORKERS_PER_TRIAL": w,
                 "CPUS_PER_WORKER": 1, "NUM_SAMPLES": len(script)}  # fmt: skip
    variables |= {"MODEL_NAME": f"{demo}/model", "SQUAD_DATA": f"{demo}/squad"}
    s = hpo.read_settings({name: str(value) for name, value in variables.items()})
    rows = [] if light else hpo.load_squad(s)
    ray.init(address, log_to_driver=False, runtime_env={"env_vars": {"RAY_ADDRESS": address}})
    other = ray.remote(num_cpus=0, num_gpus=others_gpus)(SimpleNamespace)
    others = [other.remote()] if others_gpus else []
    ray.get([one.__ray_ready__.remote() for one in others])
    space = {"train_loop_config": tune.grid_search(script)}
    tune_config = tune.TuneConfig(trial_dirname_creator=lambda trial: trial.trial_id)
    ends = lambda trial_id, result: not math.isfinite(result["eval_loss"]) or result["epoch"] >= result["until"]
    run_config = tune.RunConfig(name="tune", storage_path=str(folder), stop=ends, callbacks=[], verbose=0)
    gpus = 1 if others else 0
    scaling = ray.train.ScalingConfig(num_workers=w, resources_per_worker={"CPU": 1, "GPU": gpus}, use_gpu=gpus > 0,
                                      placement_strategy="STRICT_PACK")  # fmt: skip
    fast_trials.TRIAL = hurt_trial(light)
    loop = pretend if light else train
    trial = fast_trials.warm(loop, s, ray.put(rows), scaling, folder, tune_config, run_config)
    trials = []
    for result in tune.Tuner(trial, param_space=space, tune_config=tune_config, run_config=run_config).fit():
        files = {file.name: file for file in Path(result.path).iterdir()}
        rows = files["result.json"].read_text().splitlines() if "result.json" in files else []
        found = {"losses": "eval_loss", "states": "process", "torch": "torch", "seen": "seen"}
        written = [file.stat().st_mtime for file in files.values()]  # the first ones when the trial starts
        trials.append({what: [json.loads(row).get(key) for row in rows] for what, key in found.items()} | {
            "error": files["error.txt"].read_text() if result.error else None, "seconds": max(written) - min(written)})
    (folder / "trials.json").write_text(json.dumps(trials))


def hurt_trial(light):
    """WarmTrial with processes that can be hurt while they start, as the trial's configuration says."""
    import fast_trials

    class Light(fast_trials.TrainingProcess):
        """Joins its group, but imports nothing that only training needs."""

        def prepare(self):
            sys.modules["deepspeed"], sys.modules["transformers"] = ModuleType("deepspeed"), ModuleType("transformers")
            sys.modules["transformers"].Trainer, sys.modules["deepspeed"].DeepSpeedEngine = None, ModuleType
            self.before = sees()
            return super().prepare()

        def start(self, train_loop, config):
            super().start(train_loop, config | {"before": self.before})

    base = Light if light else fast_trials.TrainingProcess
    base.__name__ = "TrainingProcess"

    def hurt(fault):
        def run(self, *arguments):
            if self.rank != fault["rank"]:
                return getattr(base, fault["at"])(self, *arguments)
            if fault["how"] == "exit":
                os._exit(1)
            if fault["how"] == "abort":  # as NCCL's watchdog does
                print("[rank1]:[E made to fail", file=sys.stderr, flush=True)
                os.abort()
            raise ImportError(f"made to fail in {fault['at']}")

        return type("TrainingProcess", (base,), {fault["at"]: run})

    class HurtTrial(fast_trials.WarmTrial):
        def new_processes(self):
            fault = self.config["train_loop_config"].get("start")
            fast_trials.TrainingProcess = hurt(fault) if fault else base
            if light:
                fast_trials.GRACE_SECONDS = 0.5
            return super().new_processes()

        def step(self):
            report = super().step()
            return report | {"torch": "torch" in sys.modules} if "process" in report else report

    return HurtTrial


def prepared(config):
    """The script's words out of a configuration, and a report that does as they say."""
    from ray import train as ray_train

    rank, fault = int(os.environ["RANK"]), config.pop("fault", {})
    until = config.pop("until", config["settings"].NUM_EPOCHS)
    words = {name: config.pop(name, None) for name in ("start", "stage", "unwind")}
    report = ray_train.report

    def new_report(metrics):
        if fault and rank == fault.get("rank", 0) and metrics["epoch"] == fault.get("epoch", 1):
            if fault["how"] == "nan":
                metrics["eval_loss"] = math.nan
            elif fault["how"] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif fault["how"] == "value":
                raise ValueError("made to fail")
            while fault["how"] == "hold":
                time.sleep(0.1)
        report(metrics | {"until": until, "process": state()})

    return words, new_report


def state():
    """What a process holds."""
    me, torch = psutil.Process(), sys.modules.get("torch")
    found = {"pid": os.getpid(), "mb": me.memory_info().rss / 1e6, "fds": me.num_fds(), "threads": me.num_threads()}
    if torch and "deepspeed.runtime.engine" in sys.modules:
        from deepspeed.runtime.engine import DeepSpeedEngine

        found["engines"] = sum(isinstance(thing, DeepSpeedEngine) for thing in gc.get_objects())
        found["groups"] = len(torch.distributed.distributed_c10d._world.pg_map)
    return found


def sees():
    """The GPUs that Ray gives this process, those that it sees, and whether PyTorch has been imported or woken one."""
    import ray

    torch = sys.modules.get("torch")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ["LOCAL_RANK"]
    return [ray.get_gpu_ids(), *visible, torch and torch.cuda.is_initialized()]


def pretend(config):
    """A training that trains nothing, but asks the other ranks at each epoch. Its loss tells the draw and the epoch."""
    import torch

    before, (words, report) = config.pop("before"), prepared(config)
    seen = [None] * int(os.environ["WORLD_SIZE"])
    torch.distributed.all_gather_object(seen, [before, sees()])
    try:
        for epoch in range(1, config.get("num_train_epochs", config["settings"].NUM_EPOCHS) + 1):
            torch.distributed.all_reduce(torch.ones(1))
            report({"eval_loss": config["lr"] + 1 / epoch, "epoch": float(epoch), "seen": seen})
    finally:
        if words["unwind"]:
            raise ValueError("made to fail")


def train(config):
    """The lesson's training with ZeRO at the script's stage (0: without DeepSpeed)."""
    import raytune_asha_hpo as hpo
    from ray import train as ray_train

    hpo.original = getattr(hpo, "original", hpo.DS_CONFIG)
    words, ray_train.report = prepared(config)
    hpo.DS_CONFIG = hpo.original if words["stage"] else None
    if words["stage"] == 3:
        config["deepspeed"] = json.loads(hpo.original.read_text())
        config["deepspeed"]["zero_optimization"] = {"stage": 3, "stage3_param_persistence_threshold": 0}
    hpo.train_loop_per_worker(config)


# ---- Tests ----------------------------------------------------------------------------------------------------
def pids(trial):
    return {state["pid"] for state in trial["states"]}


DIED = "RuntimeError: training worker {} died"
FAULTS = {  # trial: what goes wrong in it, how many reports arrive, its error
    "good": ({}, 2, None),
    "stopped": ({"until": 1}, 1, None),
    "value": ({"fault": {"how": "value", "rank": 1, "epoch": 2}}, 1, "ValueError: made to fail"),
    "kill 1": ({"fault": {"how": "kill", "rank": 1, "epoch": 2}}, 1, f"{DIED.format(1)}; out of memory?"),
    "dies as it imports": ({"start": {"at": "prepare", "how": "exit", "rank": 1}}, 0, DIED.format(1)),
    "cannot import": ({"start": {"at": "prepare", "how": "raise", "rank": 1}}, 0, "ImportError: made to fail in prep"),
    "dies as it joins 0": ({"start": {"at": "join", "how": "exit", "rank": 0}}, 0, DIED.format(0)),
    "dies as it joins 1": ({"start": {"at": "join", "how": "abort", "rank": 1}}, 0,
                           f"{DIED.format(1)}; SIGABRT: [rank1]:[E made to fail"),
    "fewer epochs": ({"num_train_epochs": 1}, 1, None),
    "no report": ({"num_train_epochs": 0}, 0, "RuntimeError: the training ended without a report"),
    "unwinds badly": ({"until": 1, "unwind": True}, 1, None),
    "last": ({}, 2, None),
}


def test_each_trial_that_fails_tells_its_own_cause_and_no_other_trial_notices(address, tmp_path):
    """In one run. Each new pair of processes takes seconds. What else can fail, in one process: test_faults.py."""
    numbered = [{"lr": float(i)} | words for i, (words, *_) in enumerate(FAULTS.values())]
    trials = dict(zip(FAULTS, run(address, tmp_path, numbered, w=2), strict=True))
    for number, (what, (_, reports, error)) in enumerate(FAULTS.items()):
        trial = trials[what]
        assert trial["losses"] == [number + 1.0, number + 0.5][:reports], what  # those of the draw
        assert bool(trial["error"]) == bool(error), (what, trial["error"])
        assert not error or error in trial["error"].strip().splitlines()[-1], trial["error"]
        assert trial["seconds"] < 60, what
        assert not any(trial["torch"])  # its own process does without
    assert pids(trials["good"]) == pids(trials["stopped"]) == pids(trials["value"])  # kept after a good trial
    slots = [pids(trials[what]) for what in ("value", "kill 1", "fewer epochs", "unwinds badly", "last")]
    assert len(set.union(*slots)) == sum(map(len, slots)) == len(slots)  # replaced after a bad one


A = {"lr": 1e-3, "per_device_bs": 2, "wd": 0.0, "stage": 2}
B = {"lr": 2e-3, "per_device_bs": 1, "wd": 0.1, "stage": 3}
C = {"lr": 3e-3, "per_device_bs": 2, "wd": 0.1, "stage": 0}
NAN = {"fault": {"how": "nan", "epoch": 2}}


def same_losses(script, trials, config):
    """Of all trials of this configuration, whatever processes they had: each loss that is one is that of its epoch."""
    losses = [trial["losses"] for words, trial in zip(script, trials, strict=True) if config.items() <= words.items()]
    full = max(losses, key=len)
    assert len(full) == 2 and len(set(full)) == 2
    for each in losses:
        assert [loss for loss in each if not math.isnan(loss)] == full[: len(each) - any(map(math.isnan, each))]


def test_memory_and_losses_over_many_trials_in_one_process(address, demo, tmp_path):
    stop = {"until": 1}
    script = [A, C, *[A | stop, C | stop, A, C] * 8, C, A | NAN, C, A]
    trials = run(address, tmp_path, script, light=False, demo=str(demo))
    assert not any(trial["error"] for trial in trials)
    same_losses(script, trials, A)
    same_losses(script, trials, C)
    assert pids(trials[-2]) != pids(trials[-3])  # one that diverged leaves its processes to nobody

    slot = [trial["states"][0] for trial in trials[:35]]
    assert len({each["pid"] for each in slot}) == 1
    assert [each["engines"] for each in slot] == [int(words["stage"] > 0) for words in script[:35]]
    # Memory levels off after some 20 trials. An engine left behind by each (3 to 4 MB) would show, so would a file.
    for what, room in (("mb", 20), ("fds", 2), ("threads", 2), ("groups", 0)):
        assert max(each[what] for each in slot[30:]) <= max(each[what] for each in slot[17:22]) + room, what


def test_losses_of_two_processes_and_a_kill_in_mid_training(address, demo, tmp_path):
    """With ZeRO-3 new processes, used ones, and of these the second is killed. That of one process: above."""
    script = [B, C | {"until": 1}, A, B | {"fault": {"how": "kill", "rank": 1, "epoch": 2}}]
    trials = run(address, tmp_path, script, light=False, w=2, demo=str(demo))
    same_losses(script, trials, B)
    assert pids(trials[0]) != pids(trials[1]) == pids(trials[3])  # ZeRO-3 would leave its model in memory
    assert {state["engines"] for trial in (trials[0], trials[3]) for state in trial["states"]} == {1}
    assert [bool(trial["error"]) for trial in trials] == [False, False, False, True]
    assert "training worker 1 died" in trials[3]["error"].strip().splitlines()[-1]


def test_each_process_has_a_gpu_of_its_own_before_it_imports_anything_and_ends_with_a_killed_driver(address, tmp_path):
    """Eight GPUs are another's: the four processes of a trial get 8 to 11, whose order as text is another."""
    driver = driver_of(address, tmp_path, [{"lr": 1.0, "fault": {"how": "hold", "epoch": 2}}], w=4, others_gpus=8)
    reported = lambda: [text for file in tmp_path.glob("tune/*/result.json") if (text := file.read_text())]
    try:  # rank 0 holds in its second report, the others have handed over theirs
        (text,) = wait_for(reported, 180, "the trial to train")
        assert len(of_trials()) == 5
    finally:
        driver.kill()
        driver.wait()
    wait_for(lambda: not of_trials(), 20, "the processes to end with their driver")
    processes = json.loads(text)["seen"]
    assert sorted(gpu for _, now in processes for gpu in now[0]) == [8, 9, 10, 11]
    for before, now in processes:
        (gpu,) = now[0]
        assert before == [[gpu], str(gpu), "0", None] and now == [[gpu], str(gpu), "0", False]


if __name__ == "__main__":
    drive(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]), **json.loads(sys.argv[4]))
