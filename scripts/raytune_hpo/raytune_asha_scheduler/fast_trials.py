"""Warm trials. Without this file every trial starts new processes, and a run takes several times as long; and on a
node with more than ten GPUs Ray Train mixes them up, as it sorts their numbers as text.

The W training processes of a slot live from trial to trial, with what they have imported and their process
group. Tune's `reuse_actors=True` hands a WarmTrial the next configuration, which it passes to its W processes,
where `train_loop_per_worker` runs in a thread. A report waits there until Tune asks for the next one, so a
stopped trial computes nothing more; an exception at that point unwinds it before the next one starts.

After an error, a loss that is not finite or a training that leaves its model in memory (ZeRO-3) the processes
are replaced: no later trial inherits them.
"""

import datetime
import gc
import math
import os
import queue
import re
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import ray
from ray import train, tune
from ray.exceptions import RayActorError
from ray.tune.result import RESULT_DUPLICATE
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

JOIN = datetime.timedelta(seconds=600)  # for the W processes to find one another
END_SECONDS = 60  # for a stopped trial to unwind
GRACE_SECONDS = 2  # after a first failure, for the one that caused it


def warm(loop, s, data, scaling, run_dir, tune_config, run_config):
    """The lesson's trial as a WarmTrial: with its training loop, and the workers of its ScalingConfig."""
    run = SimpleNamespace(loop=loop, s=s, data=data, scaling=scaling, run_dir=run_dir)
    tune_config.reuse_actors = True
    TRIAL.configure(run_dir, run_config)
    bundles = [{"trial_slot": 1}, *[scaling.resources_per_worker] * scaling.num_workers]
    place = tune.PlacementGroupFactory(bundles, strategy=scaling.placement_strategy)
    return tune.with_resources(tune.with_parameters(TRIAL, run=run), place)


class WarmTrial(tune.Trainable):
    """The trials of one slot, one after another."""

    @classmethod
    def configure(cls, run_dir, run_config):
        """What Tune must know of such trials; raytune_pbt_hpo.py saves checkpoints."""
        run_config.checkpoint_config = tune.CheckpointConfig(checkpoint_at_end=False)

    def setup(self, config, run=None):
        self.run, self.processes, self.sound = run, [], False
        self.reset_config(config)

    def reset_config(self, new_config):
        """Tune: the next trial. It starts at its first step, so that its errors count as its own."""
        self.config, self.started, self.last = new_config, False, None
        return True

    def step(self):
        """Trains until the next report and returns it."""
        if not self.started:
            self.start()
        self.sound = False  # unless this step ends well
        report = self.of_all("next_report")[0]
        if report is None and self.last is None:
            raise RuntimeError("the training ended without a report")
        self.sound = report is None or math.isfinite(report["eval_loss"])
        if report is None:  # fewer epochs than NUM_EPOCHS, as drawn
            return {"done": True, RESULT_DUPLICATE: True}
        self.last = report
        return dict(report)

    def start(self):
        if self.sound:
            try:
                self.of_all("end")
            except Exception:  # noqa: BLE001  whatever it is, it is not this trial's fault
                self.sound = False
        if not self.sound:
            self.cleanup()
            self.processes, self.words = self.new_processes(), ()
            (address, *_), self.words = zip(*self.of_all("prepare"), strict=True)
            self.of_all("join", address)
        self.started = True
        config = self.config["train_loop_config"] | {"settings": self.run.s, "data": self.run.data}
        self.of_all("start", self.run.loop, config)

    def new_processes(self):
        place, number = ray.util.get_current_placement_group(), self.run.scaling.num_workers
        worker = self.run.scaling.resources_per_worker
        process = ray.remote(num_cpus=worker.get("CPU", 1), num_gpus=worker.get("GPU", 0))(TrainingProcess)
        bundle = lambda rank: {"scheduling_strategy": PlacementGroupSchedulingStrategy(place, rank + 1)}
        return [process.options(**bundle(rank)).remote(rank, number) for rank in range(number)]

    def of_all(self, method, *arguments):
        """Calls a method of all W processes -> their answers, by rank. Raises the cause if one fails."""
        calls = [getattr(process, method).remote(*arguments) for process in self.processes]
        try:
            return ray.get(calls)
        except Exception:
            # When one process dies, the others may fail before Ray notices. When the whole node is lost, so is
            # this process: it must not blame the trial, which run_state.py then starts again.
            time.sleep(GRACE_SECONDS)
            for rank, call in enumerate(calls):
                if isinstance(error := failure(call), RayActorError):
                    why = self.words and last_words(self.words[rank]) or "out of memory?"
                    raise RuntimeError(f"training worker {rank} died; {why}") from error  # noqa: TRY004
            raise

    def cleanup(self):
        for process in self.processes:
            ray.kill(process)
        self.processes = []


TRIAL = WarmTrial  # raytune_pbt_hpo.py has another


def failure(call):
    """The exception of a call; None if it has succeeded."""
    try:
        ray.get(call, timeout=0)
    except Exception as error:  # noqa: BLE001  the caller looks at it
        return error
    return None


def last_words(file):
    """How a process has crashed, by its standard error: the signal, and the error named before; "" if it was killed."""
    text = Path(file).read_text(errors="replace") if os.path.isfile(file) else ""  # a terminal, or a pipe
    before, crashed, after = text.partition("*** SIG")
    named = re.findall(r".*(?:what\(\)|\[E|[Ee]rror|bad_alloc).*", before)
    return f"SIG{after.split()[0]}{f': {named[-1].strip():.300}' if named else ''}" if crashed else ""


class Stopped(BaseException):
    """Raised in the training thread, at a report, when Tune has given the place to another trial."""


class TrainingProcess:
    """One of the W processes, as an actor. It sees only its own GPU, as device 0."""

    def __init__(self, rank, number):
        # accelerate and DeepSpeed take the GPU's number from LOCAL_RANK.
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(number), LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
        self.rank, self.number = rank, number

    def prepare(self):
        """Imports what training needs. -> the address at which the others find rank 0; the file of its own stderr"""
        if not ray.get_gpu_ids():
            os.environ["DS_ACCELERATOR"] = "cpu"
        gc.disable()  # the collector rescans imported objects again and again, and finds nothing
        import deepspeed  # noqa: F401
        from torch.distributed import TCPStore
        from transformers import Trainer  # noqa: F401

        gc.freeze()
        gc.enable()
        words = os.readlink("/proc/self/fd/2")
        if self.rank > 0:
            return None, words
        # All W are on one node, and the store asks nobody for a password: without a socket of its own it would listen
        # on every network. The system chooses the port, so it is free.
        here = socket.create_server(("127.0.0.1", 0)).detach()
        self.store = TCPStore("127.0.0.1", 0, self.number, is_master=True, timeout=JOIN, wait_for_workers=False,
                              master_listen_fd=here)  # fmt: skip
        return (self.store.host, self.store.port), words

    def join(self, address):
        """Makes this process one of the trial's process group, for all trials to come."""
        from torch import distributed

        os.environ.update(MASTER_ADDR=address[0], MASTER_PORT=str(address[1]))
        if self.rank > 0:
            self.store = distributed.TCPStore(*address, self.number, timeout=JOIN)
        backend = "nccl" if ray.get_gpu_ids() and distributed.is_nccl_available() else "gloo"
        distributed.init_process_group(backend, store=self.store, rank=self.rank, world_size=self.number)

    def start(self, train_loop, config):
        self.reports, self.go_on = queue.Queue(), threading.Semaphore(0)
        self.stopped = self.waits = False
        self.environment = dict(os.environ)

        def report(metrics):
            self.reports.put(metrics)
            self.go_on.acquire()
            if self.stopped:
                raise Stopped

        def run():
            try:
                train_loop(config)
                self.reports.put(None)
            except Stopped:
                pass
            except BaseException as error:  # noqa: BLE001  raised again in next_report
                self.reports.put(error if isinstance(error, Exception) else RuntimeError(repr(error)))

        train.report = report  # what the lesson's loop calls
        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()

    def next_report(self):
        """The next report's metrics; None when training has ended. Raises what the training has raised."""
        if self.waits:
            self.go_on.release()
        report = self.reports.get()
        self.waits = True
        if isinstance(report, Exception):
            raise report
        return report

    def end(self):
        """Unwinds the training that waits at its last report, and gives its memory back."""
        self.stopped = True
        self.go_on.release()
        self.thread.join(END_SECONDS)
        if self.thread.is_alive() or not self.reports.empty():
            raise RuntimeError("the previous trial's training did not unwind")
        # accelerate leaves variables behind that would turn DeepSpeed on in a trial without it.
        for name in set(os.environ) - set(self.environment):
            del os.environ[name]
        os.environ.update(self.environment)
        gc.collect()
        import deepspeed
        import torch

        # ZeRO-3 of DeepSpeed 0.19.8 never frees its model, and leaves its own nn.functional.linear in torch.
        if any(type(thing) is deepspeed.DeepSpeedEngine for thing in gc.get_objects()):
            raise RuntimeError("the previous trial's model is still in memory")
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
