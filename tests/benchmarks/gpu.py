#!/usr/bin/env python3
"""The training step on GPUs; gpu.sh runs it under torchrun, one process for each GPU.

First the demo's model in each precision; then BLOOM's 560M configuration with random weights, beside the documented
recipe: padded to 512, logits for all positions, ZeRO-3. Leaves that model and its data in FOLDER.
"""

import gc
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import REPO, SCRIPT, load_module
from training_step import BLOOM_560M, VOCABULARY, make_model, matmul_flops, padded_to_512

FIRST, WORKERS = os.environ["RANK"] == "0", int(os.environ["WORLD_SIZE"])


def train(hpo, folder, drawn, recipe=False, **settings):
    """One fine_tune -> what was measured: median step in s, losses, skipped steps, memory in GB, FLOP of a step."""
    import torch
    from transformers import TrainerCallback

    found, steps, computed, ours = {"losses": []}, [], [], hpo.collate

    def collate(rows, accepted=()):
        batch = padded_to_512(ours(rows, ())) if recipe else ours(rows, accepted)
        computed.append((batch["input_ids"].numel(), batch["labels"].numel()))
        return batch

    class Measure(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            torch.cuda.synchronize()
            steps.append(time.perf_counter() - self.start)

        def on_evaluate(self, args, state, control, metrics, **__):
            found["losses"].append(metrics["eval_answer_loss"])

        def on_train_end(self, args, state, control, model, lr_scheduler, **__):
            words = VOCABULARY * model.config.hidden_size
            body = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters()) - words
            tokens, positions = map(statistics.mean, zip(*computed[1 : len(steps)]))
            found.update(skipped=len(steps) - lr_scheduler.last_epoch, flop=6 * (body * tokens + words * positions))

    s = hpo.read_settings({"MODEL_NAME": f"{folder}/model", "SQUAD_DATA": f"{folder}/squad"} | settings)
    config, hpo.collate = hpo.DS_CONFIG, collate
    if recipe:
        stage_3 = json.loads(config.read_text())
        stage_3["zero_optimization"]["stage"] = 3
        hpo.DS_CONFIG = Path(folder, f"ds_config-{os.environ['RANK']}.json")
        hpo.DS_CONFIG.write_text(json.dumps(stage_3))
        drawn = drawn | {"per_device_eval_batch_size": 2}
    torch.cuda.reset_peak_memory_stats()
    hpo.fine_tune(drawn, s, *hpo.load_squad(s), [Measure()])
    hpo.collate, hpo.DS_CONFIG = ours, config
    found.update(step=statistics.median(steps[2:]), memory=torch.cuda.max_memory_allocated() / 1e9)
    gc.collect()
    torch.cuda.empty_cache()
    return found


def table(header, rows):
    if FIRST:
        print(f"\n| {' | '.join(header)} |\n|{'---|' * len(header)}")
        print(*(f"| {' | '.join(row)} |" for row in rows), sep="\n", flush=True)


def main():
    import torch

    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl")
    hpo, folder = load_module(SCRIPT), Path(sys.argv[1])
    if FIRST:
        make_demo = [sys.executable, REPO / "scripts/demo_assets.py", folder / "demo"]
        subprocess.run(make_demo, check=True, stdout=subprocess.DEVNULL)
        squad = REPO.parent / "shared/squad"
        (folder / "squad").symlink_to(squad if squad.is_dir() else folder / "demo/squad")
        make_model(hpo, folder / "model", folder / "squad", BLOOM_560M)
    torch.distributed.barrier()

    demo = {"TRAIN_SAMPLES": "160", "EVAL_SAMPLES": "50", "NUM_EPOCHS": "2"}
    rows = []
    for precision in ("fp32", "bf16", "fp16"):
        found = train(hpo, folder / "demo", {"lr": 1e-3, "per_device_bs": 2, "wd": 0.0}, PRECISION=precision, **demo)
        far = train(hpo, folder / "demo", {"lr": 1e4, "per_device_bs": 2, "wd": 0.0}, PRECISION=precision, **demo)
        rows.append([precision, *(f"{loss:.4f}" for loss in found["losses"]), str(found["skipped"]),
                     ", ".join(f"{loss:.3g}" for loss in far["losses"])])  # fmt: skip
    table(["demo model, rate 1e-3", "eval_loss, epoch 1", "epoch 2", "steps skipped of 160", "with rate 1e4"], rows)

    rows, throughput = [], matmul_flops(gpu=True)
    big = {"TRAIN_SAMPLES": "48", "EVAL_SAMPLES": "32", "NUM_EPOCHS": "1"}
    for recipe, precision, batch in ((False, "bf16", 2), (False, "bf16", 1), (False, "fp16", 2), (False, "fp16", 1),
                                     (False, "fp32", 2), (True, "fp16", 2)):  # fmt: skip
        drawn = {"lr": 2e-5, "per_device_bs": batch, "wd": 0.01}
        found = train(hpo, folder, drawn, recipe, PRECISION=precision, **big)
        rows.append(["recipe" if recipe else "ours", precision, str(batch), f"{found['step'] * 1000:.0f}",
                     f"{batch * WORKERS / found['step']:.1f}", f"{found['memory']:.1f}",
                     f"{found['flop'] / found['step'] / throughput:.3f}", f"{found['losses'][0]:.4f}",
                     str(found["skipped"])])  # fmt: skip
    table(["560M configuration", "precision", "batch", "ms a step", "samples/s", "peak memory of a card, GB",
           "share of the matrix throughput", "eval_loss", "steps skipped"], rows)  # fmt: skip
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
