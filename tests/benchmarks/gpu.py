#!/usr/bin/env python3
"""The training step on GPUs; gpu.sh runs it under torchrun, one process for each GPU.

    gpu.py FOLDER             the tables; leaves the model and its data in FOLDER
    gpu.py FOLDER I N         trial I of N that share a GPU; the first of four asks for too much

What a process waits for at its start; the demo's model in each precision; BLOOM's 560M configuration with random
weights, beside the documented recipe: padded to 512, logits for all positions, ZeRO-3.
"""

import gc
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import SCRIPT, load_module, wait_for
from training_step import make_model, matmul_flops, measure

FIRST, WORKERS = os.environ.get("RANK", "0") == "0", int(os.environ.get("WORLD_SIZE", "1"))
BIG = {"TRAIN_SAMPLES": "48", "EVAL_SAMPLES": "32", "NUM_EPOCHS": "1"}
BLOOM_560M = {"hidden_size": 1024, "n_layer": 24, "n_head": 16}


def train(*arguments, **settings):
    """measure(), and the most memory that PyTorch held on this card, in GB."""
    import torch

    torch.cuda.reset_peak_memory_stats()
    found = measure(*arguments, **settings) | {"memory": torch.cuda.max_memory_allocated() / 1e9}
    gc.collect()
    torch.cuda.empty_cache()
    return found


def table(header, rows):
    if FIRST:
        print(f"\n| {' | '.join(header)} |\n|{'---|' * len(header)}")
        print(*(f"| {' | '.join(map(str, row))} |" for row in rows), sep="\n", flush=True)


def start():
    """A process as fast_trials.py makes it -> [[what, seconds]]."""
    rows, since = [], time.perf_counter()

    def took(what):
        nonlocal since
        rows.append([what, f"{time.perf_counter() - since:.1f}"])
        since = time.perf_counter()

    import deepspeed  # noqa: F401
    import torch
    from transformers import Trainer  # noqa: F401

    took("imports")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.cuda.init()
    took("CUDA")
    one = torch.ones(64, 64, device="cuda", dtype=torch.float16)
    (one @ one).sum().item()
    took("the first kernels")
    torch.distributed.init_process_group("nccl")
    torch.distributed.all_reduce(one)
    torch.cuda.synchronize()
    took("NCCL")
    return rows


def share(hpo, folder, number, trials):
    """Prints what one of some trials on this GPU has measured; they start their trainings together."""
    import torch

    torch.cuda.set_per_process_memory_fraction(1 / trials - 6e8 / torch.cuda.mem_get_info()[1])  # as the lesson does
    (folder / f"ready-{trials}-{number}").touch()
    wait_for(lambda: len([*folder.glob(f"ready-{trials}-*")]) == trials, 300, "all trials of this GPU")
    hungry = number == 1 and trials == 4
    try:
        found = train(hpo, {"lr": 2e-5, "per_device_bs": 64 if hungry else 2, "wd": 0.01}, folder, hungry, **BIG)
        print(f"{2 / found['step']:.1f} samples/s, eval_loss {found['eval'][0][0]:.6f}, {found['memory']:.1f} GB")
    except torch.OutOfMemoryError:
        print("out of memory")


def main():
    startup = start()
    import torch

    hpo, folder = load_module(SCRIPT), Path(sys.argv[1])
    if sys.argv[2:]:
        return share(hpo, folder, *map(int, sys.argv[2:]))
    table(["a process waits at its start for", "seconds"], startup)
    if FIRST:
        make_model(hpo, folder, BLOOM_560M)
    torch.distributed.barrier()

    rows, demo = [], {"TRAIN_SAMPLES": "160", "EVAL_SAMPLES": "50", "NUM_EPOCHS": "2"}
    for precision in ("fp32", "bf16", "fp16"):
        near, far = (train(hpo, {"lr": lr, "per_device_bs": 2, "wd": 0.0}, folder / "demo", PRECISION=precision, **demo)
                     for lr in (1e-3, 1e4))  # fmt: skip
        losses = [f"{loss:.4f}" for loss, _ in near["eval"]]
        rows.append([precision, *losses, near["skipped"], ", ".join(f"{loss:.3g}" for loss, _ in far["eval"])])
    table(["demo model, rate 1e-3", "eval_loss, epoch 1", "epoch 2", "steps skipped", "with rate 1e4"], rows)

    rows, throughput = [], matmul_flops()
    for recipe, precision, batch in ((False, "bf16", 2), (False, "bf16", 1), (False, "fp16", 2), (False, "fp16", 1),
                                     (False, "fp32", 2), (True, "fp16", 2)):  # fmt: skip
        drawn = {"lr": 2e-5, "per_device_bs": batch, "wd": 0.01}
        found = train(hpo, drawn, folder, recipe, PRECISION=precision, **BIG)
        rows.append(["recipe" if recipe else "ours", precision, batch, f"{found['step'] * 1000:.0f}",
                     f"{batch * WORKERS / found['step']:.1f}", f"{found['memory']:.1f}",
                     f"{found['flop'] / found['step'] / throughput:.3f}", f"{found['eval'][0][0]:.4f}",
                     found["skipped"]])  # fmt: skip
    table(["560M configuration", "precision", "batch", "ms a step", "samples/s", "peak memory of a card, GB",
           "share of the matrix throughput", "eval_loss", "steps skipped"], rows)  # fmt: skip
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
