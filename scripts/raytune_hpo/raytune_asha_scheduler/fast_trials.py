"""Warm trials. Without this file every trial starts new processes, and a run takes several times as long.

The W training processes of a slot live from trial to trial: what they have imported and their process group
stay. Tune's `reuse_actors=True` hands a WarmTrial the next configuration; it hands it to its W processes, where
`train_loop_per_worker` runs in a thread. A report waits there until Tune asks for the next one, so a stopped
trial computes nothing more; an exception at that point unwinds it before the next one starts.

After an error or a loss that is not finite the processes are replaced: no later trial inherits them.
"""

import datetime
import gc
import math
import os
import queue
import threading
import time

import ray
from ray import tune
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

JOIN_SECONDS = 600  # for the W processes to import what they need and find one another
GRACE_SECONDS = 2  # after the first failure, for the one that caused it


def improve(plan, trial_class=None):
    """Replaces the plan's trial by a warm one; raytune_pbt_hpo.py has a class of its own."""
    context = plan.context
    place = [{"trial_slot": 1}, *[context.worker] * context.s.WORKERS_PER_TRIAL]
    plan.trainable = tune.with_resources(
        tune.with_parameters(trial_class or WarmTrial, context=context), tune.PlacementGroupFactory(place, strategy="STRICT_PACK")
    )
    plan.tune_config.reuse_actors = True
    plan.run_config.checkpoint_config = tune.CheckpointConfig(checkpoint_at_end=False)


class WarmTrial(tune.Trainable):
    """The trials of one slot, one after another."""

    def setup(self, config, context=None):
        self.context, self.processes, self.diverged = context, [], False
        self.reset_config(config)

    def reset_config(self, new_config):
        """Tune: the next trial. It starts at its first step, so that its errors are told as a trial's errors."""
        self.config, self.started = new_config, False
        return True

    def step(self):
        """Trains until the next report and returns it."""
        if not self.started:
            self.start()
        report = self.of_all("next_report")[0]
        if report is None:  # fewer epochs than NUM_EPOCHS, as drawn
            return self.last | {"done": True}
        self.diverged = not math.isfinite(report["eval_loss"])
        self.last = report
        return dict(report)

    def start(self):
        if self.processes and not self.diverged:
            try:
                self.of_all("end")
            except Exception:  # noqa: BLE001  whatever it is, it is not this trial's fault
                self.diverged = True
        if self.diverged:
            self.cleanup()
        if not self.processes:
            self.processes = self.new_processes()
            address = ray.get(self.processes[0].open_store.remote(), timeout=JOIN_SECONDS)
            self.of_all("join", address)
        self.diverged, self.started = False, True
        context = self.context
        config = self.config["train_loop_config"] | {"settings": context.s, "data": context.data}
        self.of_all("start", context.loop, config)

    def new_processes(self):
        place, worker = ray.util.get_current_placement_group(), self.context.worker
        return [
            TrainingProcess.options(
                num_cpus=worker["CPU"],
                num_gpus=worker.get("GPU", 0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(place, placement_group_bundle_index=rank + 1),
            ).remote(rank, self.context.s.WORKERS_PER_TRIAL)
            for rank in range(self.context.s.WORKERS_PER_TRIAL)
        ]

    def of_all(self, method, *arguments):
        """Calls a method of all W processes -> their answers, by rank. Raises what is to blame as soon as one fails."""
        calls = {getattr(process, method).remote(*arguments): rank for rank, process in enumerate(self.processes)}
        answers, waiting = {}, list(calls)
        while waiting:
            (done, *_), waiting = ray.wait(waiting)
            try:
                answers[calls[done]] = ray.get(done)
            except Exception as error:
                # If a process dies, the others fail, too; if a node is lost, so is this process: wait for either.
                time.sleep(GRACE_SECONDS)
                ended, _ = ray.wait([done, *waiting], num_returns=len(waiting) + 1, timeout=0)
                for call in ended:
                    if call not in answers and (rank := calls[call]) not in answers:
                        try:
                            ray.get(call)
                        except RayActorError:
                            raise RuntimeError(f"training worker {rank} died; out of memory?") from None
                        except Exception:  # noqa: BLE001, S112  the first one is raised below
                            continue
                raise error
        return [answers[rank] for rank in sorted(answers)]

    def cleanup(self):
        for process in self.processes:
            ray.kill(process)
        self.processes = []


class Stopped(BaseException):
    """Raised in the training thread, at a report, when Tune has given the place to another trial."""


@ray.remote
class TrainingProcess:
    """One of the W processes. It sees its own GPU alone, so that is device 0, whatever its number on the node."""

    def __init__(self, rank, number):
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(number), LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
        if not ray.get_gpu_ids():
            os.environ["DS_ACCELERATOR"] = "cpu"
        self.rank, self.number, self.thread = rank, number, None
        gc.disable()  # the collector rescans imported objects again and again, and finds nothing
        import deepspeed  # noqa: F401
        from transformers import Trainer  # noqa: F401

        gc.freeze()
        gc.enable()

    def open_store(self):
        """Rank 0: the address at which the others find it. The system chooses the port, so it is free."""
        from torch.distributed import TCPStore

        address = ray.util.get_node_ip_address()
        timeout = datetime.timedelta(seconds=JOIN_SECONDS)
        self.store = TCPStore(address, 0, self.number, is_master=True, timeout=timeout, wait_for_workers=False)
        return address, self.store.port

    def join(self, address):
        """Makes this process one of the trial's process group, for all trials to come."""
        from torch import distributed

        os.environ.update(MASTER_ADDR=address[0], MASTER_PORT=str(address[1]))
        if self.rank > 0:
            self.store = distributed.TCPStore(*address, self.number, timeout=datetime.timedelta(seconds=JOIN_SECONDS))
        backend = "nccl" if ray.get_gpu_ids() else "gloo"
        distributed.init_process_group(backend, store=self.store, rank=self.rank, world_size=self.number)

    def start(self, train_loop, config):
        self.reports, self.go_on, self.stopped, self.waits = queue.Queue(), threading.Semaphore(0), False, False

        def report(metrics):
            self.reports.put(metrics)
            self.go_on.acquire()
            if self.stopped:
                raise Stopped

        def train():
            try:
                train_loop(config | {"report": report})
                self.reports.put(None)
            except Stopped:
                pass
            except BaseException as error:  # noqa: BLE001  raised again in next_report
                self.reports.put(error)

        self.thread = threading.Thread(target=train, daemon=True)
        self.thread.start()

    def next_report(self):
        """The next report's metrics; None when training has ended. Raises what the training has raised."""
        if self.waits:
            self.go_on.release()
        report = self.reports.get()
        self.waits = True
        if isinstance(report, BaseException):
            raise report
        return report

    def end(self):
        """Unwinds the training that waits at its last report, and gives its memory back."""
        self.stopped = True
        self.go_on.release()
        self.thread.join(JOIN_SECONDS)
        if self.thread.is_alive():
            raise RuntimeError(f"the previous trial is still training after {JOIN_SECONDS} s")
        self.reports = None
        gc.collect()
        import torch

        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
